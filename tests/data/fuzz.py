"""Damaged tars, images and captions of every kind, by hypothesis; what reads them runs in another process.

    python tests/data/fuzz.py --minutes 5 --seed 1     # says what was tried, exits with 1 on a failure

Every example is indexed, verified, counted, read sample by sample, decoded and repaired. A crash or a hang of
that process is a failure, and so is a sample that no count has: what Python's tarfile finds in the tar is
compared with samples + without_image + duplicates, and used + bad with samples.
"""

import argparse
import base64
import contextlib
import functools
import io
import json
import os
import pickle
import re
import resource
import select
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0  # seconds for one example, on a busy machine
MEMORY = 3 << 30  # bytes that a child may have resident
BLOCK = 512


class Example(NamedTuple):
    """Tars by name; `whole` says that no byte of them was changed after they were written."""

    tars: dict[str, bytes]
    whole: bool

    def __repr__(self) -> str:
        """Short, and to be copied among the examples that were found."""
        return f"Example.of({base64.b85encode(zlib.compress(pickle.dumps(tuple(self)), 9)).decode()!r})"

    @classmethod
    def of(cls, text: str) -> "Example":
        """The example that a failure printed."""
        return cls(*pickle.loads(zlib.decompress(base64.b85decode(text))))


# ---- images


@functools.cache
def pictures() -> dict[str, bytes]:
    """A small picture of every kind and mode that people have."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
    colour = Image.fromarray(pixels)
    frames = [colour.convert("P"), colour.rotate(90).convert("P")]
    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (colour, "JPEG", {}), "progressive": (colour, "JPEG", {"progressive": True}),
        "grey": (colour.convert("L"), "JPEG", {}), "cmyk": (colour.convert("CMYK"), "JPEG", {}),
        "png": (colour, "PNG", {}), "palette": (colour.convert("P"), "PNG", {}),
        "alpha": (colour.convert("RGBA"), "PNG", {}),
        "sixteen": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG", {}),
        "gif": (frames[0], "GIF", {}),
        "frames": (frames[0], "GIF", {"save_all": True, "append_images": frames[1:]}),
        "webp": (colour, "WEBP", {}), "lossless": (colour, "WEBP", {"lossless": True}),
        "moving": (colour, "WEBP", {"save_all": True, "append_images": [colour.rotate(180)]}),
        "bmp": (colour, "BMP", {}), "tiff": (colour, "TIFF", {}),
        "lzw": (colour, "TIFF", {"compression": "tiff_lzw"}), "ppm": (colour, "PPM", {}),
        "jp2": (colour, "JPEG2000", {}), "avif": (colour, "AVIF", {}),
    }  # fmt: skip
    done = {}
    for name, (image, kind, options) in made.items():
        file = io.BytesIO()
        with contextlib.suppress(KeyError, OSError):  # a Pillow without this encoder
            image.save(file, kind, **options)
            done[name] = file.getvalue()
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    colour.save(file, "JPEG", exif=exif)
    return {**done, "turned": file.getvalue()}


NO_IMAGES = (
    b"",
    b"<html><body>404</body></html>",
    b"\xff\xd8\xff",
    b"GIF89a",
    b"\0" * 700,
    b"RIFF\0\0\0\0WEBPVP8X",
)
# Where each kind keeps its width and height, for bombs: offset and format.
SIZES = {
    "png": (16, ">II"),
    "gif": (6, "<HH"),
    "bmp": (18, "<ii"),
    "webp": (26, "<HH"),
    "lossless": (21, "<HH"),
}
LARGE = (0, 1, 0xFFFF, 0x7FFF, 16_000)


@st.composite
def images(draw: st.DrawFn) -> bytes:
    """A picture: whole, cut, with flipped bits, overwritten bytes or a size that lies; or none at all."""
    name = draw(st.sampled_from([*pictures(), "none"]))
    if name == "none":
        return draw(st.sampled_from(NO_IMAGES) | st.binary(max_size=80))
    data = bytearray(pictures()[name])
    way = draw(st.sampled_from(["whole", "whole", "cut", "flipped", "overwritten", "bomb", "tail", "header"]))
    if way == "cut":
        return bytes(data[: draw(st.integers(0, len(data)))])
    if way in ("flipped", "header"):
        top = 8 * (len(data) if way == "flipped" else min(len(data), 40)) - 1
        for bit in draw(st.lists(st.integers(0, top), min_size=1, max_size=6)):
            data[bit // 8] ^= 1 << bit % 8
    elif way == "overwritten":
        at, noise = draw(st.integers(0, len(data))), draw(st.binary(min_size=1, max_size=24))
        data[at : at + len(noise)] = noise
    elif way == "tail":
        data += draw(st.binary(max_size=40))
    elif way == "bomb" and name in SIZES:
        at, form = SIZES[name]
        struct.pack_into(form, data, at, draw(st.sampled_from(LARGE)), draw(st.sampled_from(LARGE)))
    elif way == "bomb":
        frame = data.find(b"\xff\xc0")
        if frame >= 0:
            struct.pack_into(
                ">HH", data, frame + 5, draw(st.sampled_from(LARGE)), draw(st.sampled_from(LARGE))
            )
    return bytes(data)


# ---- tars

CAPTIONS = (
    b"", b" \n", b"\xff\xfe", b"one\ntwo\x85three", "é\u2028ü".encode(), b"[" * 3000, b"[]", b"null",
    b'{"captions": ["a", "", 1, null]}', b'{"captions": "a"}', b'{"captions": ["\\ud800"]}',
    b'{"captions": {"a": 1e999}}', b'{"captions": [',
    b'{"captions": ["a", "b"], "id": 3}', b"\0", b'{"captions": ["\\u0000"]}', b"1" * 5000,
)  # fmt: skip
EXTENSIONS = ("jpg", "JPG", "png", "webp", "gif", "jpeg", "img")
KEYS = (
    "a",
    "b",
    "c",
    "d/e",
    "d/f",
    "x" * 120,
    "l/" * 60 + "y" * 140,
    "é",
    "\udcff",
    ".hidden",
    "__meta__",
    "a b",
)


@st.composite
def members(draw: st.DrawFn) -> list[tuple[str, bytes]]:
    """The members of one sample, in any order, some of them missing."""
    key, found = draw(st.sampled_from(KEYS)), []
    if draw(st.integers(0, 9)):
        found.append((f"{key}.{draw(st.sampled_from(EXTENSIONS))}", draw(images())))
    for extension in ("json", "txt", "cls", "syn.json", "npz"):
        if draw(st.booleans()):
            found.append((f"{key}.{extension}", draw(st.sampled_from(CAPTIONS) | st.binary(max_size=30))))
    return draw(st.permutations(found))


def packed(content: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT, *, link: bool = False) -> bytes:
    """A tar of these members, by Python's tarfile."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo("link.jpg")
            info.type, info.linkname = tarfile.SYMTYPE, "a.jpg"
            tar.addfile(info)
    return file.getvalue()


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """A whole tar of any dialect."""
    form = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    content = [member for sample in draw(st.lists(members(), max_size=5)) for member in sample]
    return packed(content, form, link=not draw(st.integers(0, 7)))


def with_checksum(block: bytearray) -> bytearray:
    """A header whose checksum fits what it says."""
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return block


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A tar that was cut, flipped, shortened, doubled, or whose headers lie with a right checksum."""
    data = bytearray(draw(tars()))
    blocks = len(data) // BLOCK
    way = draw(
        st.sampled_from(["cut", "flipped", "block lost", "block doubled", "two", "lying", "noise", "empty"])
    )
    at = BLOCK * draw(st.integers(0, max(0, min(blocks - 1, 30))))
    if way == "cut":
        del data[draw(st.integers(0, len(data))) :]
    elif way == "flipped":
        for bit in draw(st.lists(st.integers(0, 8 * min(len(data), 12_000) - 1), min_size=1, max_size=4)):
            data[bit // 8] ^= 1 << bit % 8
    elif way == "block lost":
        del data[at : at + BLOCK]
    elif way == "block doubled":
        data[at:at] = data[at : at + BLOCK]
    elif way == "two":
        data += draw(tars())
    elif way == "lying":
        block = data[at : at + BLOCK]
        if len(block) == BLOCK:
            fields = [(124, 136), (156, 157), (0, 100), (257, 265), (482, 483)]
            if block[257:263] == b"ustar\0":  # elsewhere tarfile alone takes it for a part of the name
                fields.append((345, 500))
            field = draw(st.sampled_from(fields))
            value = draw(
                st.sampled_from([b"77777777777", b"\x80" + b"\xff" * 11, b"x", b"L", b"S", b"g", b"0", b"-1"])
            )
            block[field[0] : field[1]] = value.ljust(field[1] - field[0], b"\0")[: field[1] - field[0]]
            data[at : at + BLOCK] = with_checksum(block)
    elif way == "noise":
        data[at : at + 40] = draw(st.binary(min_size=40, max_size=40))
    else:
        data = bytearray(
            draw(st.sampled_from([b"", bytes(512), bytes(1024), bytes(10240), b"\x1f\x8b\x08" + bytes(600)]))
        )
    return bytes(data)


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """One or two tars."""
    whole = draw(st.booleans())
    count = draw(st.integers(1, 2))
    return Example({f"{n}.tar": draw(tars() if whole else damaged()) for n in range(count)}, whole)


# ---- the child: everything that reads


def look(folder: Path) -> dict[str, Any]:
    """What the project finds in a folder, and what is wrong with how it counts."""
    from clipcluster.data.shards.indexing import index_folder, index_shard
    from clipcluster.data.shards.open import open_folder
    from clipcluster.data.shards.shard_list import read_list
    from clipcluster.errors import UserError
    from tools.shards.salvage import salvage
    from tools.shards.stats import stats
    from tools.shards.verify import verify

    try:
        summary = index_folder(folder, None, ["default", "lines", "syn.json:syn_text"])
    except UserError as error:
        return {"refused": str(error)}
    wrong = []
    for images in (True, False):
        counts, report = stats(folder, images=images, workers=0), verify(folder, images=images, workers=0)
        for one in (counts, report):
            if one.used + len(one.bad) != one.samples or one.samples != summary.samples:
                wrong.append(
                    f"{type(one).__name__}: {one.used} + {len(one.bad)} of {one.samples}, {summary.samples}"
                )
        if [bad for bad in report.broken if bad["fault"] != "cut"] or counts.notes:
            wrong.append(f"{report.broken} {counts.notes}")
        json.dumps(asdict(counts)), json.dumps(report.as_dict())
        if (counts.captions, counts.kinds, counts.bad) != (report.captions, report.kinds, report.bad):
            wrong.append("stats and verify differ")
    shards = open_folder(folder)
    keys = [shards.read(position).key for position in range(shards.n_samples)]
    if sum(len(shards.read(p).captions) for p in range(shards.n_samples)) != shards.n_pairs:
        wrong.append("captions are miscounted")
    shards.close()
    _, entries = read_list(folder)
    return {
        "wrong": wrong, "keys": keys, "repaired": _repaired(folder, salvage, index_shard),
        "shards": {n: (e.samples, e.without_image, e.duplicates, e.broken) for n, e in entries.items()},
        "bad": Counter(bad["reason"].partition(":")[0] for bad in report.bad),
    }  # fmt: skip


def _repaired(folder: Path, salvage: Callable[..., Any], index_shard: Callable[..., Any]) -> list[str]:
    """Repairs a copy of each tar; a repaired one has to be whole. Returns what is wrong."""
    wrong = []
    for path in sorted(folder.glob("*.tar")):
        copy = folder / "copy"
        copy.mkdir(exist_ok=True)
        tar = copy / path.name
        tar.write_bytes(path.read_bytes())
        done = salvage(tar)
        if done is None:
            continue
        entry = index_shard(tar, copy, ("default",))
        if entry.broken or done.original.read_bytes() != path.read_bytes():
            wrong.append(f"{path.name} repaired: {entry.broken}")
    return wrong


def serve(look: Callable[[Path], dict[str, Any]]) -> None:
    """The child's life: folders in, findings out."""
    import traceback

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr
    for line in sys.stdin:
        try:
            found = look(Path(line.rstrip("\n")))
        except BaseException:
            found = {"raised": traceback.format_exc()}
        found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        data = pickle.dumps(found)
        answers.write(len(data).to_bytes(8, "little") + data)
        answers.flush()


class Child:
    """A process that looks at folders as `script --child` does; after a crash or a hang the next is new."""

    def __init__(self, script: str = __file__) -> None:
        self._script = script
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process that looked last."""
        assert self._process is not None
        return self._process.pid

    def look(self, folder: Path) -> dict[str, Any]:
        """What `look` finds in another process; `raised` says what went wrong there."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, self._script, "--child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{folder}\n".encode())
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        size = self._process.stdout.read(8) if ready else b""
        if len(size) < 8:
            code = self.close()
            return {"raised": f"crashed with {code}" if ready else f"hung for {PATIENCE:.0f} s"}
        answer: dict[str, Any] = pickle.loads(self._process.stdout.read(int.from_bytes(size, "little")))
        return answer

    def close(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        process.kill()
        return process.wait()


# ---- what has to hold


def runs_of(data: bytes) -> tuple[int, bool]:
    """How many runs of members with one key Python's tarfile finds, of those that lie wholly in the tar; and
    whether there are links among the members."""
    count, links = 0, False
    key: str | None = None
    seen: set[str] = set()
    with contextlib.suppress(tarfile.TarError, ValueError, EOFError, OSError, OverflowError):  # then it stops
        tar = tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        for info in tar:
            links = links or info.issym() or info.islnk()
            folder, slash, base = info.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            about_the_tar = any(re.fullmatch("__.*__", part) for part in info.name.split("/"))
            if not info.isreg() or info.offset_data + info.size > len(data):
                continue
            if not dot or not stem or about_the_tar:
                continue
            if folder + slash + stem != key or extension.lower() in seen:
                count, key, seen = count + 1, folder + slash + stem, set()
            seen.add(extension.lower())
    return count, links


def check(example: Example, child: Child, folder: Path) -> dict[str, Any]:
    """Writes an example down, has it looked at, and asserts that nothing crashed and nothing is lost."""
    for name, data in example.tars.items():
        (folder / name).write_bytes(data)
    found = child.look(folder)
    assert "raised" not in found, found["raised"]
    assert found["memory"] < MEMORY, f"{found['memory']:,} bytes"
    if "refused" in found:
        assert "compressed with" in found["refused"], found["refused"]
        return found
    assert not found["wrong"], found["wrong"]
    assert not found["repaired"], found["repaired"]
    for name, (samples, without_image, duplicates, broken) in found["shards"].items():
        runs, links = runs_of(example.tars[name])
        counted = samples + without_image + duplicates
        if example.whole:
            assert broken is None, broken
            assert counted == runs + links, (name, counted, runs)
        elif broken is not None:
            # what lies before the damage is counted, but for the run that it cuts
            before, _ = runs_of(example.tars[name][: int(re.search(r"byte (\d+)", broken)[1])])  # type: ignore[index]
            assert counted + 1 >= before, (name, counted, before, broken)
        elif not links:
            assert counted >= runs, (name, counted, runs)
    return found


def campaign(seed: int, count: int, child: Child) -> Counter[str]:
    """`count` examples by hypothesis, the same ones for the same seed; raises at a failure, shrunk."""
    tally: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @given(examples())
    def run(example: Example) -> None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            found = check(example, child, Path(place))
        tally["examples"] += 1
        tally["refused"] += "refused" in found
        for samples, without_image, duplicates, broken in found.get("shards", {}).values():
            tally["tars"] += 1
            tally["samples"] += samples
            tally["without image"] += without_image
            tally["duplicates"] += duplicates
            tally["broken tars"] += broken is not None
        tally["bad images"] += sum(found.get("bad", {}).values())

    run()
    return tally


def rounds(campaign: Callable[[int, int], Counter[str]]) -> None:
    """Campaigns of the seeds that follow one another, for as long as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=200, help="of each seed; seeds follow one another")
    given_words = parser.parse_args()
    end, seed = time.monotonic() + 60 * given_words.minutes, given_words.seed
    total: Counter[str] = Counter()
    while time.monotonic() < end:
        try:
            total += campaign(seed, given_words.examples)
        except BaseException:
            print(f"seed {seed} of {given_words.examples} examples fails", flush=True)
            raise
        print(f"seed {seed}: {dict(total)}", flush=True)
        seed += 1


def main() -> int:
    """The long run."""
    if "--child" in sys.argv:
        serve(look)
        return 0
    child = Child()
    rounds(lambda seed, count: campaign(seed, count, child))
    child.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
