"""A damaged tar made sound: no whole sample is lost, no half one is kept, and the original stays."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from clipcluster.data.shards.tar import scan
from tools.shards.salvage import salvage

KEYS = [f"s{number}" for number in range(6)]


def _tar(path: Path, keys: list[str] = KEYS, form: int = tarfile.PAX_FORMAT) -> bytes:
    """Samples of jpg, json and txt; the members' bytes say where they belong."""
    with tarfile.open(path, "w", format=form) as tar:
        for key in keys:
            for extension in ("jpg", "json", "txt"):
                info, data = tarfile.TarInfo(f"{key}.{extension}"), f"{key} {extension} ".encode() * 60
                info.size, info.mtime = len(data), 1.5
                tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def _samples(path: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for info in tar:
            key, _, extension = info.name.partition(".")
            found.setdefault(key, {})[extension] = tar.extractfile(info).read()  # type: ignore[union-attr]
    return found


def _starts(path: Path) -> dict[str, int]:
    with open(path, "rb") as file:
        return {member.name: member.start for member in scan(file.fileno())}


@pytest.mark.parametrize(
    ("member", "shift", "kept", "left_out"),
    [
        ("s3.json", 700, ["s0", "s1", "s2"], ["s3"]),  # inside a member of a sample that has begun
        ("s3.jpg", 700, ["s0", "s1", "s2"], []),  # inside a header of its own PAX kind: no name to tell
        ("s3.jpg", 0, ["s0", "s1", "s2"], []),  # between two samples
        ("s3.txt", 0, ["s0", "s1", "s2"], ["s3"]),  # between two members of one
    ],
)
def test_a_cut(tmp_path: Path, member: str, shift: int, kept: list[str], left_out: list[str]) -> None:
    path = tmp_path / "a.tar"
    whole = _tar(path)
    original = _samples(path)
    cut = whole[: _starts(path)[member] + shift]
    path.write_bytes(cut)
    done = salvage(path)
    assert done is not None
    assert (done.kept, done.left_out) == (len(kept), left_out)
    assert _samples(path) == {key: original[key] for key in kept}
    assert done.original.name == "a.tar.broken"
    assert done.original.read_bytes() == cut
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.tar", "a.tar.broken"]


def test_behind_a_damaged_header_it_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    data = bytearray(_tar(path))
    original, at = _samples(path), _starts(path)["s2.json"]
    data[at + 3] ^= 64
    data[at + 1024 + 3] ^= 64
    path.write_bytes(data)
    done = salvage(path)
    assert done is not None
    assert _samples(path) == {key: value for key, value in original.items() if key != "s2"}
    assert done.left_out == ["s2", "s2"]


def test_a_file_of_no_sample_says_that_what_it_follows_is_whole(tmp_path: Path) -> None:
    path, inner = tmp_path / "a.tar", _tar(tmp_path / "inner.tar", ["x"])
    with tarfile.open(path, "w") as tar:
        for name, data in (("s0.jpg", b"0"), ("s1.jpg", b"1"), ("s1.cls", b"1"), ("README", inner)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(path.read_bytes()[: tar.offset] + b"damage" * 200)
    done = salvage(path)
    assert done is not None
    assert (done.kept, done.left_out) == (2, [])
    assert _samples(path) == {"s0": {"jpg": b"0"}, "s1": {"jpg": b"1", "cls": b"1"}}


@example(cut=1, form=tarfile.GNU_FORMAT, flip=None)
@given(
    cut=st.integers(1, 40_000),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
    flip=st.none() | st.integers(0, 40_000),
)
def test_what_is_kept_is_whole(
    tmp_path_factory: pytest.TempPathFactory, cut: int, form: int, flip: int | None
) -> None:
    path = tmp_path_factory.mktemp("salvage") / "a.tar"
    data = bytearray(_tar(path, form=form))
    original, ends = _samples(path), _starts(path)
    if flip is not None:
        data[flip % len(data)] ^= 1
    path.write_bytes(data[:cut])
    done = salvage(path)
    if done is None:
        assert path.read_bytes() == data[:cut]
        return
    found = _samples(path)
    assert len(found) == done.kept
    for key, members in found.items():
        assert set(members) == set(original[key])
        changed = [name for name, content in members.items() if content != original[key][name]]
        assert not changed or (flip is not None and len(changed) == 1)  # bytes of a member have no checksum
    # what begins before the cut is kept or left out, unless its header is what was damaged
    begun = {name.partition(".")[0] for name, start in ends.items() if start + 512 <= min(cut, len(data))}
    lost = begun - set(found) - set(done.left_out)
    assert len(lost) <= 1 + (flip is not None)


def test_nothing_whole_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for content in (b"\x1f\x8b packed" * 200, _tar(tmp_path / "b.tar")[:1100]):
        path.write_bytes(content)
        assert salvage(path) is None
        assert path.read_bytes() == content
        assert not path.with_name("a.tar.broken").exists()


def test_an_original_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    whole = _tar(path)
    path.write_bytes(whole[:-5000])
    (tmp_path / "a.tar.broken").write_bytes(b"of another day")
    done = salvage(path)
    assert done is not None
    assert done.original.name == "a.tar.broken.2"
    assert (tmp_path / "a.tar.broken").read_bytes() == b"of another day"


def test_a_repair_killed_before_the_last_step_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(_tar(path)[:-5000])
    os.link(path, tmp_path / "a.tar.broken")
    done = salvage(path)
    assert done is not None
    assert done.original.name == "a.tar.broken"


def test_a_sample_with_less_than_the_others_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("README", "a.jpg", "a.txt", "__info__", "b.jpg", "b.txt", "b.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    path.write_bytes(path.read_bytes()[: 7 * 512])
    done = salvage(path)
    assert done is not None
    assert (done.kept, done.left_out) == (2, ["b"])
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["a.jpg", "a.txt", "b.jpg", "b.txt"]
