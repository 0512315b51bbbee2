"""A working directory with the tiny recipe and its shards."""

from collections.abc import Callable
from pathlib import Path

import pytest

from clipcluster.check import names, plain
from clipcluster.check.plain import Checked
from clipcluster.data.shards.indexing import index_folder
from tests.check.tiny import RECIPE, write_shard


@pytest.fixture(scope="session")
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache folder in which a deep check has stored timm's names."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        names.store_names()
    return folder


@pytest.fixture
def folder(tmp_path: Path, user_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe, eleven training samples and five test samples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(user_cache))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    write_shard(tmp_path / "data/train/00000.tar", 6)
    write_shard(tmp_path / "data/train/00001.tar", 5)
    write_shard(tmp_path / "data/test/00000.tar", 5)
    (tmp_path / "data/classnames.txt").write_text("even\nodd\n")
    (tmp_path / "data/zeroshot_classification_templates.txt").write_text("a {c} number\n")
    for name in ("train", "test"):
        index_folder(tmp_path / "data" / name)
    return tmp_path


@pytest.fixture
def checked(folder: Path) -> Callable[..., Checked]:
    """Check the recipe with overrides."""
    return lambda *overrides: plain.check("tiny.yaml", overrides)
