"""Durable files: whole or not at all, first wins, torn lines spoil nothing."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipcluster.runs import files


def limited(tmp_path, code):
    """Run `code` where no file may grow beyond 64 bytes: a write fails there as on a full disk."""
    script = (
        "import resource, signal, sys, pathlib\n"
        "from clipcluster.runs import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (64, {resource.RLIM_INFINITY}))\n"
        f"{code}\n"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_write_replaces_in_one_step(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"step": 1})
    files.write_json(path, {"step": 2, "name": "Größe"})
    assert files.read_json(path) == {"step": 2, "name": "Größe"}
    assert os.listdir(tmp_path) == ["a.json"]


def test_full_disk_keeps_the_old_file_and_no_half_one(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"step": 1})
    done = limited(tmp_path, "files.write_json(folder / 'a.json', list(range(1000)))")
    assert "OSError" in done.stderr
    assert files.read_json(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_full_disk_makes_no_first_file(tmp_path):
    done = limited(tmp_path, "files.link_once(folder / 'outcome.json', list(range(1000)))")
    assert "OSError" in done.stderr
    assert os.listdir(tmp_path) == []


def test_full_disk_cuts_the_line_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    files.append_lines(path, [{"step": 1}])
    done = limited(tmp_path, "files.append_lines(folder / 'metrics.jsonl', [{'step': 2, 'text': 'x' * 200}])")
    assert "OSError" in done.stderr
    assert path.read_bytes() == b'{"step":1}\n'


def test_broken_json_is_named(tmp_path):
    (tmp_path / "claim.json").write_text('{"job": ')
    with pytest.raises(ValueError, match=r"claim\.json"):
        files.read_json(tmp_path / "claim.json")


def test_the_first_link_wins(tmp_path):
    path = tmp_path / "outcome.json"
    assert files.link_once(path, {"rank": 0})
    assert not files.link_once(path, {"rank": 1})
    assert files.read_json(path) == {"rank": 0}
    assert os.listdir(tmp_path) == ["outcome.json"]


def test_one_of_many_processes_wins(tmp_path):
    code = (
        "import sys, pathlib, time\n"
        "from clipcluster.runs import files\n"
        "while not pathlib.Path(sys.argv[1], 'go').exists(): time.sleep(0.001)\n"
        "print(files.link_once(pathlib.Path(sys.argv[1], 'outcome.json'), {'rank': int(sys.argv[2])}))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(6)
    ]
    (tmp_path / "go").touch()
    won = [process.communicate()[0].strip() == "True" for process in processes]
    assert sum(won) == 1
    assert files.read_json(tmp_path / "outcome.json") == {"rank": won.index(True)}


def test_other_link_errors_are_raised(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="no hard links"):
        files.link_once(tmp_path / "outcome.json", {})
    assert os.listdir(tmp_path) == []


def test_a_torn_line_is_left_out_and_spoils_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    files.append_lines(path, [{"step": 1}])
    with path.open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert files.read_lines(path) == [{"step": 1}]
    files.append_lines(path, [{"step": 3}])
    assert files.read_lines(path) == [{"step": 1}, {"step": 3}]


def test_no_file_has_no_lines(tmp_path):
    assert files.read_lines(tmp_path / "metrics.jsonl") == []


@given(
    lines=st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.none(), min_size=1), min_size=1),
    data=st.data(),
)
def test_whatever_a_kill_cuts_off_the_lines_before_are_read(tmp_path_factory, lines, data):
    path = tmp_path_factory.mktemp("lines") / "events.jsonl"
    files.append_lines(path, lines)
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    read = files.read_lines(path)
    # A line whose newline alone is missing is whole too.
    assert read[:whole] == lines[:whole]
    assert len(read) - whole in (0, 1)
    assert read == lines[: len(read)]
    assert json.loads(json.dumps(read)) == read


def strictly(text):
    """JSON as its standard has it: NaN and Infinity are none."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_what_is_not_finite_is_null_and_named(tmp_path):
    line = {
        "step": 3,
        "loss": float("nan"),
        "lr": 0.1,
        "val": {"r1": float("-inf"), "all": (1.0, float("inf"))},
    }
    expected = {"step": 3, "loss": None, "lr": 0.1, "val": {"r1": None, "all": [1.0, None]}}
    expected["non_finite"] = ["loss", "val.all.1", "val.r1"]
    files.append_lines(tmp_path / "metrics.jsonl", [line])
    files.write_json(tmp_path / "evaluation.json", line)
    assert files.link_once(tmp_path / "outcome.json", line)
    for name in ("metrics.jsonl", "evaluation.json", "outcome.json"):
        assert strictly((tmp_path / name).read_text()) == expected
    assert files.read_lines(tmp_path / "metrics.jsonl") == [expected]
    # written again with more, as an evaluation's results are added to a line of metrics
    assert files.finite({**expected, "acc": float("nan")})["non_finite"] == [
        "acc",
        "loss",
        "val.all.1",
        "val.r1",
    ]


def test_finite_values_are_left_as_they_are():
    line = {"step": 3, "loss": 1.5, "parts": [{"a": 1}]}
    assert files.finite(line) is line
    assert files.finite([float("nan"), 1]) == [None, 1]


def test_a_name_that_is_not_utf_8_is_kept(tmp_path):
    line = {"key": os.fsdecode(b"caf\xe9"), "reason": "日本"}
    files.append_lines(tmp_path / "lines", [line])
    assert files.read_lines(tmp_path / "lines") == [line]
    assert files.link_once(tmp_path / "outcome.json", line)
    assert files.read_json(tmp_path / "outcome.json") == line


def test_the_bytes_of_a_folder_of_which_a_part_vanishes(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x" * 10)
    assert (files.size_of(tmp_path), files.size_of(tmp_path / "a" / "file")) == (30, 10)
    listed = os.listdir

    def removing(path):
        names = listed(path)
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        return names

    monkeypatch.setattr(os, "listdir", removing)
    assert (files.size_of(tmp_path), files.size_of(tmp_path / "b")) == (20, 0)
