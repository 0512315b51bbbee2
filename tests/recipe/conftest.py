"""A small recipe on disk, and loading it with changes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from clipcluster.recipe.load import Loaded, load

SMALL = """\
name: small
data:
  train:
    - {shards: shards/train}
  batch_size: 12
model:
  image: {timm: convnext_atto}
  text: {arch: gpt2, config: {n_layer: 1}}
optim: {lr: 1e-3}
train: {duration: 2 epochs}
"""


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid recipe of a few lines, in an empty working directory; no site profile of the user's is seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return file


@pytest.fixture
def small(recipe_file: Path) -> Callable[..., Loaded]:
    """Load the small recipe with overrides: ``small("optim.lr=3", DATA="/d")``."""

    def read(*overrides: str, **environ: str) -> Loaded:
        return load(
            recipe_file, overrides, {"XDG_CONFIG_HOME": str(recipe_file.parent / "config"), **environ}
        )

    return read
