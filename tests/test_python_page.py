"""docs/python.md: its examples run, one after the other, in one process."""

import re
from pathlib import Path

import pytest

from tests.tiny_run import picture, write_run, write_shards

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "python.md").read_text()


def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLIPCLUSTER_RUNS", raising=False)
    shards = write_shards(tmp_path / "data" / "pairs")
    write_run(tmp_path / "runs" / "pets-convnext-0a1b2c3d", shards)
    Path("photos").mkdir()
    for number in range(5):
        Path("photos", f"{number}.png").write_bytes(picture(number))
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"example {number} of docs/python.md", "exec"), names)
    images, features, same = names["images"], names["features"], names["same"]
    assert images.shape == (5, 16)
    assert names["logits"].shape == (5, 2)
    for other in (features, same):
        assert (images - other).abs().max() < 1e-6
    assert names["scores"].shape == (2, 2)  # of ten pairs in batches of four
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 + 10 + 1
    step, top1, t2i = lines[-1].split()
    assert step == "8"
    assert 0 <= float(top1) <= 1
    assert 0 <= float(t2i) <= 1


def test_what_load_is_told_to_take_is_what_it_takes() -> None:
    from clipcluster.build.loaded import load

    given = [name for name in load.__annotations__ if name not in ("what", "return")]
    table = PAGE.partition("| argument | |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == given
