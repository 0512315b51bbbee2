"""The blocks of YAML on the pages about training and towers: each is valid as it is written."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from clipcluster.recipe.load import load
from clipcluster.recipe.sections.recipe import Recipe

DOCS = Path(__file__).resolve().parents[1] / "docs"
BASE = """
name: page
data: {train: [{shards: x}], batch_size: 64}
optim: {lr: 1e-3}
train: {duration: 100 epochs}
"""
MODEL = "model: {image: {timm: resnet50, weights: a}, text: {hf: gpt2, weights: pretrained}}\n"
BLOCKS = [
    (page, number, text)
    for page in ("training.md", "towers.md")
    for number, block in enumerate(re.findall(r"(?:^    .*\n)+", (DOCS / page).read_text(), re.MULTILINE))
    if (text := textwrap.dedent(block)).partition(":")[0] in Recipe.model_fields
]


def test_the_pages_have_such_blocks() -> None:
    assert [page for page, _, _ in BLOCKS] == ["training.md"] * 4 + ["towers.md"]


@pytest.mark.parametrize(("page", "number", "text"), BLOCKS)
def test_a_block_belongs_into_a_recipe(page: str, number: int, text: str, tmp_path: Path) -> None:
    """Below the keys that every recipe has; one with a name is a whole recipe."""
    (tmp_path / "base.yaml").write_text(BASE + MODEL * ("model:" not in re.findall(r"^\w+:", text, re.M)))
    whole = text.startswith("name:")
    (tmp_path / "page.yaml").write_text(text if whole else f"extends: base.yaml\n{text}")
    environ = {"DATA": "/data", "WEIGHTS": "/weights", "XDG_CONFIG_HOME": str(tmp_path)}
    recipe = load(tmp_path / "page.yaml", environ=environ).recipe
    assert recipe.name == ("classifier" if whole else "page")
