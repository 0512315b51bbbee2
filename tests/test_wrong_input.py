"""What is wrong with a recipe or its data, typed as users type it: one message, code 2, nothing written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.convert.convert import convert

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The handwritten digits as shards."""
    return convert("digits", tmp_path_factory.mktemp("data") / "digits").out


@pytest.fixture
def digits(converted: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(converted, tmp_path / "digits"))


Refused = Callable[..., None]


@pytest.fixture
def refused(digits: Path, tmp_path: Path) -> Refused:
    """Submits the demo's recipe with overrides and expects a refusal that says all `parts`."""

    def refused(*overrides: str, parts: list[str], executor: str = "local", path: str | None = None) -> None:
        runs = tmp_path / "runs"
        environment = {**os.environ, "DIGITS": str(digits), "XDG_CONFIG_HOME": str(tmp_path / "config")}
        environment.pop("NOT_SET", None)
        command = [sys.executable, "-m", "jobs.cli", "submit", "recipes/digits.yaml", *overrides]
        done = subprocess.run(
            [*command, "--executor", executor, "--runs", str(runs)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**environment, "PATH": path or environment["PATH"]},
        )
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.count("error:") == 1
        said = re.sub(r"\s+", " ", done.stderr)
        for part in parts:
            assert part in said
        assert not runs.exists()

    return refused


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.batchsize=64", ["data.batchsize", "did you mean", "batch_size"]),
        ("data.batch_size=many", ["data.batch_size", "'many'", "whole number"]),
        ("data.train.0.shards=/nowhere/at/all", ["data.train.0.shards", "/nowhere/at/all"]),
        ("data.train.0.shards=${NOT_SET}/train", ["data.train.0.shards", "NOT_SET"]),
        ("data.batch_size=33", ["33 does not divide by 2 ranks", "32 or 34"]),
    ],
)
def test_an_error_in_the_recipe(refused: Refused, override: str, parts: list[str]) -> None:
    refused(override, parts=parts)


def test_a_tower_that_timm_does_not_know(refused: Refused) -> None:
    refused("model.image.timm=convnext_atoo", parts=["convnext_atoo", "convnext_atto"])


def test_an_empty_folder_of_shards(refused: Refused, digits: Path) -> None:
    for file in (digits / "train").iterdir():
        file.unlink()
    refused(parts=["data.train.0.shards", str(digits / "train")])


def test_shards_without_an_index(refused: Refused, digits: Path) -> None:
    for file in (digits / "train").iterdir():
        if file.suffix != ".tar":
            file.unlink()
    refused(parts=[f"clipcluster shards index {digits / 'train'}"])


def test_a_shard_that_changed_since_it_was_indexed(refused: Refused, digits: Path) -> None:
    shard = sorted((digits / "train").glob("*.tar"))[1]
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    refused(parts=[shard.name, "changed since it was indexed"])


def test_no_sbatch(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(executor="slurm", path=str(tmp_path / "empty"), parts=["no sbatch on the PATH", "sandbox start"])
