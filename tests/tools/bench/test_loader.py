"""The loader measured for real, on little."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clipcluster.errors import UserError
from jobs.cli.app import main
from tools.bench import loader as bench_loader
from tools.bench.loader import Settings, measure, synthetic_photographs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 synthetic photographs."""
    patch = pytest.MonkeyPatch()
    patch.setattr(bench_loader, "SYNTHETIC", 64)
    with patch.context(), synthetic_photographs() as made:
        kept = tmp_path_factory.mktemp("bench") / "shards"
        subprocess.run(["cp", "-a", made, kept], check=True)
    patch.undo()
    return kept


@pytest.mark.long
def test_the_command_reports_all_it_promises(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = [
        sys.executable,
        "-m",
        "jobs.cli",
        "bench",
        "loader",
        "--shards",
        folder,
        "--workers",
        "1",
        "--json",
    ]
    options = ["--batch-size", "8", "--seconds", "0.3", "--repetitions", "1", "--size", "64", "--out", out]
    options.append("--augmented")
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads(out.read_text())
    assert document["workers"] == 1
    for key in ("images_per_second", "decode_images_per_second", "decode_resize_images_per_second"):
        assert document[key] > 1, key
    assert document["least"] <= document["images_per_second"] <= document["largest"]
    assert document["images_per_core_second"] > 1
    assert 1e6 < document["worker_uss_bytes"] < 400e6
    assert "peer" not in document
    augmented = document["augmented"]
    assert augmented["images_per_second"] > 1
    assert augmented["timm"]["images_per_second"] > 1
    assert augmented["timm"]["times_faster"]["median"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "0"], "numbers from 1"),
        (["--workers", "1,two"], "numbers from 1"),
        (["--size", "2"], "'--size'"),
        (
            ["--workers", "1,9", "--batch-size", "8"],
            "--batch-size 8: give at least 9, one sample for each of the workers",
        ),
        (["--seconds", "0"], "'--seconds'"),
        (["--repetitions", "0"], "'--repetitions'"),
    ],
)
def test_wrong_options_are_told(
    folder: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["clipcluster", "bench", "loader", "--shards", str(folder), *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 100}, "64 samples, less than one batch"),
        ({"peer": Path("/no/python")}, "no Python interpreter .*pip install open_clip_torch==3.3.0"),
        ({"shards": Path("/no/shards")}, "no such folder"),
    ],
)
def test_what_cannot_be_measured_is_told(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(Settings(**{"shards": folder, **options}))


def test_a_peer_without_the_packages_is_told(folder: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    with pytest.raises(UserError, match=r"No module named 'open_clip'; make one with: python -m venv"):
        measure(Settings(folder, batch_size=8, peer=tmp_path / "bare" / "bin" / "python"))


@pytest.mark.long
def test_a_contender_that_dies_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    for tar in folder.glob("*.idx"):
        tar.rename(tar.with_suffix(".away"))
    try:
        with pytest.raises(UserError, match=r"(the loader|decoding.*) ended early: .+"):
            measure(Settings(folder, batch_size=8, seconds=0.1, repetitions=1))
    finally:
        for tar in folder.glob("*.away"):
            tar.rename(tar.with_suffix(".idx"))
