"""Tars of every dialect, read by headers alone, against Python's tarfile."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcluster.data.tar import END, BrokenTar, header, padded, scan

NAMES = [
    "a.jpg",
    "folder/b.json",
    "é/ü.txt",
    "x" * 99 + ".jpg",
    "deep/" * 30 + "c.jpg",
    "y" * 300 + ".jpg",
    "p/" * 60 + "z" * 130 + ".txt",
]
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=250)


def _members(path: Path) -> list[tuple[str, bytes]]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return [(member.name, os.pread(fd, member.size, member.offset)) for member in scan(fd)]
    finally:
        os.close(fd)


def _names_into(seen: list[str], path: Path) -> None:
    with open(path, "rb") as file:
        for member in scan(file.fileno()):
            seen.append(member.name)


def _tarfile(path: Path, names: list[str], form: int) -> list[tuple[str, bytes]]:
    contents = [(name, bytes([number]) * (number * 300)) for number, name in enumerate(names)]
    with tarfile.open(path, "w", format=form) as tar:
        for number, (name, data) in enumerate(contents):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5 + number  # a broken second makes PAX write an mtime record
            tar.addfile(info, io.BytesIO(data))
    return contents


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, form: int) -> None:
    contents = _tarfile(tmp_path / "t.tar", NAMES, form)
    assert _members(tmp_path / "t.tar") == contents


def test_ustar_with_prefix(tmp_path: Path) -> None:
    contents = _tarfile(tmp_path / "t.tar", NAMES[:3] + NAMES[4:5], tarfile.USTAR_FORMAT)
    assert _members(tmp_path / "t.tar") == contents


def test_what_is_no_regular_file_is_passed_over(tmp_path: Path) -> None:
    with tarfile.open(
        tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "hello"}
    ) as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE), ("pipe", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x" * 150
            tar.addfile(info)
        info = tarfile.TarInfo("a.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    assert _members(tmp_path / "t.tar") == [("a.txt", b"hi")]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_sizes_beyond_eight_gigabytes(tmp_path: Path, form: int) -> None:
    size, path = 9 * 2**30, tmp_path / "big.tar"
    info, after = tarfile.TarInfo("big.bin"), tarfile.TarInfo("after.txt")
    info.size = size
    head, tail = info.tobuf(form), after.tobuf(form) + END
    with open(path, "wb") as file:
        file.write(head)
        file.seek(len(head) + size)
        file.write(tail)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert [(m.name, m.size, m.offset) for m in scan(fd)] == [
            ("big.bin", size, len(head)),
            ("after.txt", 0, len(head) + size + len(tail) - len(END)),
        ]
    finally:
        os.close(fd)
    assert tarfile.TarInfo.frombuf(header("big.bin", size)[-512:], "utf-8", "strict").isreg()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(TEXT, st.binary(max_size=1500)),
        max_size=5,
    )
)  # fmt: skip
def test_our_headers_read_by_tarfile(
    tmp_path_factory: pytest.TempPathFactory, contents: list[tuple[str, bytes]]
) -> None:
    contents = [("k/" + name.strip("/").replace("\n", "_") + ".bin", data) for name, data in contents]
    path = tmp_path_factory.mktemp("tar") / "t.tar"
    parts = [header(name, len(data)) + data + bytes(padded(len(data)) - len(data)) for name, data in contents]
    path.write_bytes(b"".join(parts) + END)
    with tarfile.open(path) as tar:
        read = [(info.name, tar.extractfile(info).read(), info.mode) for info in tar]  # type: ignore[union-attr]
    assert read == [(name, data, 0o444) for name, data in contents]
    assert _members(path) == contents


def test_a_tar_cut_anywhere_gives_what_is_whole_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    contents = _tarfile(path, ["a.jpg", "b.jpg", "q" * 120 + ".jpg"], tarfile.PAX_FORMAT)
    whole = path.read_bytes()
    ends = [m.offset + m.size for m in scan(os.open(path, os.O_RDONLY))]
    for cut in range(1, ends[-1] + 1, 37):
        path.write_bytes(whole[:cut])
        seen: list[str] = []
        with pytest.raises(BrokenTar, match="byte"):
            _names_into(seen, path)
        assert seen == [name for (name, _), end in zip(contents, ends, strict=True) if end <= cut]


def test_a_flipped_bit_in_a_header_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(header("a.txt", 0) + header("b.txt", 0) + END)
    data = bytearray(path.read_bytes())
    data[512 + 1] ^= 4
    path.write_bytes(data)
    with pytest.raises(BrokenTar, match="byte 512 fails its checksum"):
        _members(path)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000))
def test_garbage_never_crashes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("tar") / "t.tar"
    path.write_bytes(data)
    try:
        members = _members(path)
    except BrokenTar:
        return
    assert members == []


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(b"")
    assert _members(tmp_path / "t.tar") == []
