"""A union of sections in every position a recipe may have one: alone, optional, in a list."""

from typing import Annotated, Any

import pytest
from pydantic import ValidationError

from clipcluster.errors import UserError
from clipcluster.recipe.problems import validated
from clipcluster.recipe.sections.base import Kinds, Section, key, kinds_of, section, sections_of, walk
from clipcluster.recipe.tree import Origin, tree_of


class Round(Section):
    radius: float = key("result", "Half of the width.")
    colour: str = key("record", "A name.", "red")


class Square(Section):
    side: float = key("result", "The width.")
    corners: int = key("result", "How round.", 0)


Shape = Annotated[Round | Square, Kinds(radius=Round, side=Square)]


class Drawing(Section):
    one: Shape = section("A shape.")
    more: tuple[Shape, ...] = section("Shapes.", ())
    last: Shape | None = section("Perhaps a shape.", None)


def errors_of(value: dict[str, Any]) -> list[str]:
    tree = tree_of(value, Origin("a.yaml:1"))
    with pytest.raises(UserError) as caught:
        validated(tree, {}, "a.yaml", Drawing)
    return [line.strip().removeprefix("a.yaml:1: ") for line in str(caught.value).splitlines()]


def test_the_key_tells_the_kind() -> None:
    value = {"one": {"radius": 1}, "more": [{"side": 2}, {"radius": 3, "side": None}], "last": {"side": 4}}
    drawing = Drawing.model_validate(value)
    assert drawing == Drawing(
        one=Round(radius=1), more=(Square(side=2), Round(radius=3)), last=Square(side=4)
    )
    assert Drawing.model_validate(drawing.model_dump()) == drawing
    assert Drawing.model_validate_json(drawing.model_dump_json()) == drawing


def test_every_field_knows_its_kinds() -> None:
    for field in Drawing.model_fields.values():
        assert sections_of(field) == [Round, Square]
        assert kinds_of(field) == {"radius": Round, "side": Square}
    paths = {".".join(path) for path, _ in walk(Drawing)}
    assert {"one.radius", "one.corners", "more.*.side", "more.*.colour", "last.side"} <= paths


@pytest.mark.parametrize(
    ("one", "said"),
    [
        ({"radius": 1, "colr": "x"}, "one.colr: unknown key; did you mean one.colour?"),
        ({"radius": "far"}, "one.radius: got 'far'; should be a number"),
        (
            {"radius": 1, "corners": 4},
            "one.corners: belongs to one with the key side; here it has the keys radius, colour",
        ),
        (
            {"radius": 1, "side": 2},
            "one.side: has radius and side; should have exactly one of them",
        ),
        ({"sid": 2}, "one: unknown key sid; did you mean one.side?"),
        ({"colour": "red"}, "one: should have exactly one of the keys radius, side"),
        (
            3,
            "one: got 3; should be a section with the keys radius, colour, or side, corners; write "
            "one: {radius: 3} or one: {side: 3}",
        ),
    ],
)
def test_an_error_names_the_kind(one: Any, said: str) -> None:
    assert errors_of({"one": one}) == [said]


def test_errors_in_lists_and_optional_sections_name_the_key_as_it_is_written() -> None:
    right = {"radius": 1}
    value = {"one": right, "more": [right, {"side": 1, "corner": 1}], "last": {"side": []}}
    assert errors_of(value) == [
        "a.yaml: 2 errors",
        "more.1.corner: unknown key; did you mean more.1.corners?",
        "last.side: got []; should be a number",
    ]


def test_a_key_of_another_kind_may_stand_at_its_default() -> None:
    drawing = Drawing.model_validate({"one": {"radius": 1, "corners": 0}})
    assert drawing.one == Round(radius=1)
    with pytest.raises(ValidationError):
        Drawing.model_validate({"one": {"radius": 1, "corners": 1}})


def test_the_json_schema_has_every_kind() -> None:
    made = Drawing.model_json_schema()
    kinds = [{"$ref": "#/$defs/Round"}, {"$ref": "#/$defs/Square"}]
    assert made["properties"]["one"]["anyOf"] == kinds
    assert made["properties"]["more"]["items"] == {"anyOf": kinds}
