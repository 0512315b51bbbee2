"""Tars of every dialect, read by headers alone, against Python's tarfile."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcluster.data.shards.tar import END, NO_BYTES, BrokenTar, compression, header, padded, scan

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


def _block(name: bytes, size: bytes, kind: bytes) -> bytes:
    """A header with these fields as they are, its checksum right."""
    block = bytearray(header("x", 0))
    block[:100], block[124:136], block[156:157] = name.ljust(100, b"\0"), size.ljust(12, b"\0"), kind
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_links_carry_no_bytes_whatever_size_they_name(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    blocks = [_block(b"a.jpg", b"00000002000", kind) for kind in (b"1", b"2", b"5")]
    path.write_bytes(b"".join(blocks) + header("b.jpg", 2) + b"hi".ljust(512, b"\0") + END)
    with open(path, "rb") as file:
        assert [member.name for member in scan(file.fileno())] == ["b.jpg"]
        found = [(member.name, member.size) for member in scan(file.fileno(), links=True)]
    assert found == [("a.jpg", NO_BYTES), ("a.jpg", NO_BYTES), ("b.jpg", 2)]  # a folder is no loss


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_files_are_passed_over_and_named(tmp_path: Path, form: str) -> None:
    with open(tmp_path / "a.jpg", "wb") as file:
        for place in range(1, 40):  # more holes than one header names
            file.seek(place * 100_000)
            file.write(b"x" * 4096)
    (tmp_path / "b.jpg").write_bytes(b"whole")
    command = ["tar", "--sparse", "--format", form, "-cf", "t.tar", "a.jpg", "b.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with open(tmp_path / "t.tar", "rb") as tar:
        assert [member.name for member in scan(tar.fileno())] == ["b.jpg"]
        found = [(member.name, member.size) for member in scan(tar.fileno(), links=True)]
    assert found == [("a.jpg", NO_BYTES), ("b.jpg", 5)]


@pytest.mark.parametrize("record", [10 << 10, 512 << 10, 3 << 20])  # GNU tar's default, --blocking-factor
def test_two_tars_laid_end_to_end_are_told(tmp_path: Path, record: int) -> None:
    path = tmp_path / "t.tar"
    _tarfile(path, ["a.jpg", "b.jpg"], tarfile.PAX_FORMAT)
    path.write_bytes(path.read_bytes().ljust(record, b"\0") * 2)
    seen: list[str] = []
    with pytest.raises(BrokenTar, match="concatenated"):
        _names_into(seen, path)
    assert seen == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    "body", [b"12345", b"30 path=", b"1 a=b\n", b"25 size=" + b"9" * 16 + b"\n", b"x path=a\n", b"9" * 600]
)
def test_broken_pax_headers_are_told(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "t.tar"
    extended = _block(b"PaxHeader", b"%011o" % len(body), b"x") + body + bytes(padded(len(body)) - len(body))
    path.write_bytes(extended + header("a.jpg", 0) + END)
    with pytest.raises(BrokenTar, match=r"byte 0|byte 1024"):
        _members(path)


def test_a_name_as_long_as_the_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with open(path, "wb") as file:
        file.write(_block(b"././@LongLink", b"%011o" % (3 << 30), b"L"))
        file.truncate(4 << 30)
    with pytest.raises(BrokenTar, match="announces a name"):
        _members(path)


def test_checksums_of_signed_bytes_hold(tmp_path: Path) -> None:
    block = bytearray(_block("é.jpg".encode(), b"00000000000", b"0"))
    total = sum(block[:148] + b"        " + block[156:]) - 2 * 256
    block[148:156] = b"%06o\0 " % total
    (tmp_path / "t.tar").write_bytes(bytes(block) + END)
    assert _members(tmp_path / "t.tar") == [("é.jpg", b"")]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 70_000), st.booleans()), max_size=12), st.data())
def test_members_of_any_size_are_found_as_tarfile_finds_them(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, bool]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("tar") / "t.tar"
    names = [f"{number}{'n' * 120 if long else ''}.jpg" for number, (_, long) in enumerate(sizes)]
    form = data.draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    with tarfile.open(path, "w", format=form) as tar:
        for name, (size, _) in zip(names, sizes, strict=True):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes([size % 251 + 1]) * size))
    assert _members(path) == [
        (name, bytes([size % 251 + 1]) * size) for name, (size, _) in zip(names, sizes, strict=True)
    ]


@pytest.mark.parametrize("way", ["gzip", "bz2", "xz"])
def test_what_a_file_is_packed_with(tmp_path: Path, way: str) -> None:
    with tarfile.open(tmp_path / "t.tar", f"w:{way.removesuffix('ip')}") as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with open(tmp_path / "t.tar", "rb") as file:
        assert compression(file.fileno()) == {"bz2": "bzip2"}.get(way, way)


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(b"")
    assert _members(tmp_path / "t.tar") == []


def test_small_members_are_scanned_in_a_few_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = tmp_path / "t.tar", bytes(512)
    with open(path, "wb") as file:
        for number in range(3_000):
            file.write(header(f"{number // 3:06d}.{('jpg', 'json', 'txt')[number % 3]}", 500) + content)
        file.write(END)
    reads: list[int] = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: reads.append(at) or real(fd, size, at))
    with open(path, "rb") as file:
        assert sum(1 for _ in scan(file.fileno())) == 3_000
    assert 0 < len(reads) < 300
