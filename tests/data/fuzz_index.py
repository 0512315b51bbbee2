"""Damaged and crafted indexes, by hypothesis: index.json, index.bin and the .idx are anybody's files.

    python tests/data/fuzz_index.py --minutes 5 --seed 1     # as fuzz.py

Whatever such a file holds, reading ends with samples or with an error that the project names; indexing the
folder again makes it whole. What reads runs in another process, so that a crash of it is seen.
"""

import json
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
from fuzz import Child, packed, pictures, rounds, serve
from hypothesis import given, settings
from hypothesis import strategies as st

FILES = ("index.json", "index.bin", "0.tar.idx", "1.tar.idx")
MAGIC = 8 + 8  # bytes in front of a header
NUMBERS = (-1, 0, 1, 2, 255, 256, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 62, (1 << 63) - 1, -(1 << 63))
VALUES = (
    *NUMBERS, 1 << 64, 1.5, float("nan"), float("inf"), None, True, "", "x", "/", "../0.tar",
    "a\0b", "0" * 64, [], [[]], {}, {"a": 1}, [-1],
    [1 << 40], [0, 1 << 40], "|O", "<f8", "<i8", "<i4", "|u1", "|V0", ">i8",
)  # fmt: skip


class Change(NamedTuple):
    """One change of a file: `way`, and where as a fraction of what can be changed, and what to put there."""

    file: str
    way: str
    where: float
    value: Any


@st.composite
def changes(draw: st.DrawFn) -> list[Change]:
    """One to three changes of the files of an index."""
    made = []
    ways = ["value", "value", "value", "lost", "number", "number", "cut", "flip", "noise"]
    for _ in range(draw(st.integers(1, 3))):
        way = draw(st.sampled_from(ways))
        value = {"value": VALUES, "number": NUMBERS, "flip": range(8)}.get(way)
        name, where = draw(st.sampled_from(FILES)), draw(st.floats(0, 1, exclude_max=True))
        put = draw(st.binary(min_size=1, max_size=40) if value is None else st.sampled_from(value))
        made.append(Change(name, way, where, put))
    return made


def changed(data: bytes, change: Change) -> bytes:
    """The bytes of a file after a change."""
    at = int(change.where * max(1, len(data)))
    if change.way == "cut":
        return data[:at]
    if change.way == "flip":
        return data[:at] + bytes([data[at] ^ 1 << change.value]) + data[at + 1 :] if data else data
    if change.way == "noise":
        return data[:at] + change.value + data[at + len(change.value) :]
    if change.way == "number":  # one of a column, in a file of columns
        at -= at % 8
        return data[:at] + change.value.to_bytes(8, "little", signed=True) + data[at + 8 :]
    start = MAGIC if change.file != "index.json" else 0
    length = int.from_bytes(data[8:MAGIC], "little") if start else len(data)
    try:
        document = json.loads(data[start : start + length])
    except (ValueError, RecursionError):
        return data
    places = list(_places(document))
    if not places:
        return data
    holder, key = places[int(change.where * len(places))]
    if change.way == "lost":
        del holder[key]
    else:
        holder[key] = change.value
    header = json.dumps(document).encode()
    if not start:
        return header
    columns = data[-(-(start + length) // 64) * 64 :]
    front = data[:8] + len(header).to_bytes(8, "little") + header
    return front + bytes(-len(front) % 64) + columns


def _places(document: Any) -> Any:
    """Every value inside a document, as what holds it and its key there."""
    inner = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(inner):
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


# ---- the child: everything that reads


def look(folder: Path) -> dict[str, Any]:
    """How reading a folder ends, and what its samples are after it was indexed again."""
    from clipcluster.data.shards.indexing import index_folder
    from clipcluster.data.shards.open import open_folder
    from clipcluster.data.shards.shard_list import read_list, read_summary
    from clipcluster.errors import UserError
    from clipcluster.runtime.outcome import DataError
    from tools.shards.stats import stats
    from tools.shards.verify import verify

    def read() -> Any:
        dataset = open_folder(folder)
        keys = []
        for position in range(dataset.n_samples):
            dataset.announce([position])
            keys.append(dataset.read(position).key)
        columns = [dataset.classes, dataset.caption_counts(), dataset.more_than, dataset.sample_counts]
        told = [len(column) for column in columns], dataset.n_pairs, dataset.shard_names
        assert told
        dataset.check_unchanged()
        return dataset.fingerprint, keys

    ends: Counter[str] = Counter()
    for action in (
        read,
        lambda: read_summary(folder),
        lambda: read_list(folder),
        lambda: verify(folder, images=False, workers=0),
        lambda: stats(folder, images=False, workers=0),
        lambda: index_folder(folder, workers=1),
        read,
    ):
        try:
            action()
            ends["read"] += 1
        except (UserError, DataError) as error:
            ends[type(error).__name__] += 1
    index_folder(folder, again=True)
    return {"ends": ends, "again": read()}


# ---- what has to hold


def folder_of(place: Path) -> Path:
    """Two tars with captions and classes, and their index."""
    from clipcluster.data.shards.indexing import index_folder

    for number in range(2):
        content = [
            member for key in "abc"[: 3 - number]
            for member in (
                (f"{key}{number}.png", pictures()["png"]), (f"{key}{number}.cls", b"%d" % number),
                (f"{key}{number}.txt", b"one"), (f"{key}{number}.json", b'{"captions": ["a", "b"]}'),
            )
        ]  # fmt: skip
        (place / f"{number}.tar").write_bytes(packed(content))
    index_folder(place, None, ["default", "txt"])
    return place


def check(made: list[Change], whole: Path, child: Child) -> dict[str, Any]:
    """Changes a copy of a folder's index, has it looked at, and asserts how that ends."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder = Path(place) / "folder"
        shutil.copytree(whole, folder)
        for change in made:
            path = folder / change.file
            path.write_bytes(changed(path.read_bytes(), change))
        found = child.look(folder)
    assert "raised" not in found, f"{made}: {found['raised']}"
    return found


def campaign(seed: int, count: int, whole: Path, child: Child) -> Counter[str]:
    """`count` examples by hypothesis, the same ones for the same seed; raises at a failure, shrunk."""
    tally: Counter[str] = Counter()
    expected = check([], whole, child)

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @given(changes())
    def run(made: list[Change]) -> None:
        found = check(made, whole, child)
        assert found["again"] == expected["again"], made
        tally.update(found["ends"])
        tally["examples"] += 1

    run()
    return tally


def main() -> int:
    """The long run."""
    if "--child" in sys.argv:
        serve(look)
        return 0
    child = Child(__file__)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        whole = folder_of(Path(place))
        rounds(lambda seed, count: campaign(seed, count, whole, child))
    child.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
