import json
import re

import yaml

from clipcluster.recipe.files import RECIPES
from clipcluster.recipe.reference import DOCS, PAGE, SCHEMA, page, schema
from clipcluster.recipe.sections.base import sections_of, walk
from clipcluster.recipe.sections.recipe import Recipe


def test_the_committed_files_are_up_to_date() -> None:
    command = "run python -m clipcluster.recipe.reference"
    assert (DOCS / PAGE).read_text() == page(), command
    assert json.loads((DOCS / SCHEMA).read_text()) == schema(), command


def test_every_key_is_on_the_page() -> None:
    text = page()
    for path, field in walk(Recipe):
        if not sections_of(field):
            assert f"| `{path[-1]}` |" in text
        elif ".".join(path[:4]) != "distill.teachers.*.model" or len(path) == 4:  # those are the recipe's own
            assert f"### {'.'.join(path).replace('*', 'N')}\n" in text
    assert "The keys are those of [`model`](#model)." in text


def test_defaults_are_in_the_words_of_a_recipe() -> None:
    text = page()
    assert "| `every` | duration or time or `auto` | `15 min` |" in text
    assert "| `nodes` | whole number (>= 1) or range | `1` |" in text
    assert "| `mean` | `openai`, `imagenet` or 3 numbers | `openai` |" in text
    assert "{'" not in text


def test_the_schema_knows_the_keys_that_the_shipped_recipes_use() -> None:
    made = schema()

    def known(value: object, section: dict, path: str) -> None:
        if "$ref" in section:
            section = made["$defs"][section["$ref"].rsplit("/", 1)[1]]
        kinds = [choice for choice in section.get("anyOf", ()) if "$ref" in choice]
        for kind in kinds:
            told = next(iter(made["$defs"][kind["$ref"].rsplit("/", 1)[1]]["properties"]))
            if len(kinds) == 1 or told in value:
                return known(value, kind, path)
        if isinstance(value, dict) and "properties" in section:
            for name, entry in value.items():
                assert name in section["properties"], f"{path}.{name}"
                known(entry, section["properties"][name], f"{path}.{name}")
        elif isinstance(value, list) and "$ref" in section.get("items", {}):
            for entry in value:
                known(entry, section["items"], path)
        return None

    for file in RECIPES.glob("*.yaml"):
        known(yaml.safe_load(file.read_text()), made, file.name)


def test_numbers_may_be_variables_in_the_schema() -> None:
    choices = schema()["$defs"]["Data"]["properties"]["batch_size"]["anyOf"]
    assert {"type": "integer", "minimum": 1} in choices
    assert any(re.search(choice.get("pattern", "^$"), "${BATCH}") for choice in choices)
