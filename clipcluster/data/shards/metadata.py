"""What the index says of a source: its shards and samples by number, their captions and classes. No torch.

No shard is opened here: everything comes from the mapped lists of the folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from clipcluster.data.shards import folder_index, shard_index, texts
from clipcluster.data.shards.concatenated import Concatenated
from clipcluster.data.storage.urls import RemoteFile, RemoteFolder

_SCAN = 1 << 20  # samples looked at together
_PIECES = 64  # columns laid together without a copy


@dataclass(frozen=True)
class IndexedFolder:
    """A folder, its index and the choices of captions asked for (None: the index's first, none is needed);
    `rows` are the shards taken (None: all).

    Of a remote folder `index` is a local one, and `rows_at` where its shards' rows lie (None: in `index`).
    """

    folder: Path | RemoteFolder
    index: Path
    choices: tuple[str, ...] | None
    rows: tuple[int, ...] | None = None
    rows_at: RemoteFolder | None = None

    @property
    def place(self) -> str:
        """What a command that indexes this folder says of the index's place."""
        if self.rows_at is not None:
            return " --index FOLDER"  # a copy of ours is no place for it
        return "" if self.index == self.folder else f" --index {self.index}"


class CaptionField(NamedTuple):
    """One choice of captions of a source, with its probability (None: it is the only one).

    counts: (n_samples,) integers, captions of each sample by this choice.
    """

    choice: str
    probability: float | None
    counts: np.ndarray


class Metadata:
    """The samples of one source, numbered 0 … n_samples - 1 in the order of the shards' names.

    Attributes: `name` (last component of the first folder), `fingerprint` (hash over shard names and
    contents), `sample_counts` (n_shards,) int64, `n_samples`, `n_pairs` (captions of all samples),
    `classes` (n_samples,) int32 (-1: none), `fields` (the choices of captions, with their probabilities and
    counts), `caption_counts` (n_samples,) the sum over the fields, `more_than` (C, n_shards) samples of each
    shard with more than c captions (C is 1 where there are several fields). All are mapped, and shared by the
    processes of a node, where the source is one whole folder; of several folders those by sample are too.
    """

    def __init__(
        self,
        parts: Sequence[IndexedFolder],
        probabilities: Sequence[float | None] = (None,),
    ) -> None:
        self.parts = tuple(parts)
        self.probabilities = tuple(probabilities)
        self.name = _name_of(self.parts[0])
        self._tables = [
            folder_index.read_folder_index(p.folder, p.index, captions_choice=p.choices, place=p.place)
            for p in self.parts
        ]
        # a part that is not cut has no list of its rows: it would be private to every process
        self._rows = [None if part.rows is None else np.array(part.rows, np.int64) for part in self.parts]
        self.sample_counts = self._of_shards("samples")
        self._part_ends = np.cumsum(
            [
                len(table.arrays["samples"] if rows is None else rows)
                for table, rows in zip(self._tables, self._rows, strict=True)
            ]
        )
        whole = len(self.parts) == 1 and self.parts[0].rows is None
        self._sample_ends = (
            self._tables[0].arrays["sample_ends"] if whole else np.cumsum(self.sample_counts, dtype=np.int64)
        )
        self.n_samples = int(self._sample_ends[-1]) if len(self._sample_ends) else 0
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        if len(self.parts) == 1 and self.parts[0].rows is None:
            return str(self._tables[0].meta["fingerprint"])
        return folder_index.fingerprint(
            [(self.shard_name(i), bytes.fromhex(self.sha256(i))) for i in range(len(self))]
        )

    def __len__(self) -> int:
        """The number of shards."""
        return len(self.sample_counts)

    def _of_shards(self, name: str) -> np.ndarray:
        """A column of the shards taken, (…, n_shards); the mapped one where that is all of one folder."""
        columns = [table.arrays[name] for table in self._tables]
        taken = [
            column if rows is None else column[..., rows]
            for column, rows in zip(columns, self._rows, strict=True)
        ]
        return taken[0] if len(taken) == 1 else np.concatenate(taken, axis=-1)

    def _of_samples(self, names: Sequence[str | None], absent: int | None = None) -> np.ndarray:
        """A column of the samples of the shards taken, (n_samples,): `names` by part (None: `absent`)."""
        pieces = []
        for table, rows, name in zip(self._tables, self._rows, names, strict=True):
            ends = table.arrays["sample_ends"]
            if name is None or name not in table.arrays:
                column = np.broadcast_to(np.int32(absent or 0), (int(ends[-1]) if len(ends) else 0,))
            else:
                column = table.arrays[name]
            if rows is None:
                pieces.append(column)
            else:
                begins = ends[rows] - table.arrays["samples"][rows]
                pieces += [column[low:high] for low, high in zip(begins, ends[rows], strict=True)]
        if len(pieces) == 1:
            return pieces[0]
        # shards cut out of a folder are many small pieces: copied, they are as fast as one column
        if len(pieces) > _PIECES:
            return np.concatenate(pieces)
        return cast(np.ndarray, Concatenated([[piece] for piece in pieces]))

    def _choices_of(self, part: int) -> tuple[str, ...]:
        """The choices of captions read in a part: those asked for, else the index's first."""
        choices = self.parts[part].choices
        return (next(iter(self._tables[part].meta["captions"])),) if choices is None else choices

    @property
    def sample_ends(self) -> np.ndarray:
        """The running sum of `sample_counts`, (n_shards,) int64."""
        return self._sample_ends

    @cached_property
    def fields(self) -> tuple[CaptionField, ...]:
        """The choices of captions, one or several, in the order in which `read` lays their captions."""
        by_part = [self._choices_of(part) for part in range(len(self.parts))]
        return tuple(
            CaptionField(
                choices[0],
                probability,
                self._of_samples([shard_index.caption_column("captions", choice) for choice in choices]),
            )
            for choices, probability in zip(zip(*by_part, strict=True), self.probabilities, strict=True)
        )

    @cached_property
    def caption_counts(self) -> np.ndarray:
        """Captions of every sample over all fields, (n_samples,)."""
        if len(self.fields) == 1:
            return self.fields[0].counts
        return cast(np.ndarray, Concatenated([[field.counts for field in self.fields]]))

    @cached_property
    def classes(self) -> np.ndarray:
        """Class of every sample, (n_samples,) int32; -1 where it has none."""
        return self._of_samples(["classes"] * len(self.parts), absent=-1)

    @cached_property
    def more_than(self) -> np.ndarray:
        """Samples of each shard with more than c captions, (C, n_shards); C is 1 with several fields."""
        by_field = [self.more_than_of(number) for number in range(len(self.fields))]
        if len(by_field) == 1:
            return by_field[0]
        having = np.max([rows[0] for rows in by_field], axis=0)
        # in shards where no field alone has a caption for every sample, the samples are looked at
        partial, first = (having > 0) & (having < self.sample_counts), 0
        while partial[first:].any():
            first += int(partial[first:].argmax())
            low = int(self._sample_ends[first] - self.sample_counts[first])
            last = max(first + 1, int(np.searchsorted(self._sample_ends, low + _SCAN, side="right")))
            ends, counts = self._sample_ends[first:last] - low, self.sample_counts[first:last]
            used = np.cumsum(np.asarray(self.caption_counts[low : low + int(ends[-1])]) > 0)
            used = np.concatenate([[0], used])
            having[first:last] = used[ends] - used[ends - counts]
            first = last
        return having[None]

    def more_than_of(self, field: int) -> np.ndarray:
        """Samples of each shard with more than c captions of one field, (C, n_shards)."""
        tables = []
        for part, (table, rows) in enumerate(zip(self._tables, self._rows, strict=True)):
            column = table.arrays[shard_index.caption_column("more_than", self._choices_of(part)[field])]
            tables.append(column if rows is None else column[:, rows])
        if len(tables) == 1:
            return tables[0]
        depth = max(map(len, tables))
        return np.concatenate([np.pad(t, ((0, depth - len(t)), (0, 0))) for t in tables], axis=1)

    @cached_property
    def n_pairs(self) -> int:
        """Captions of all samples, of all fields."""
        if all(part.rows is None for part in self.parts):
            return sum(
                int(table.meta["captions"][choice])
                for part, table in enumerate(self._tables)
                for choice in self._choices_of(part)
            )
        return sum(
            int(counts[low : low + _SCAN].sum(dtype=np.int64))
            for _, _, counts in self.fields
            for low in range(0, len(counts), _SCAN)
        )

    @property
    def shard_names(self) -> list[str]:
        return [self.shard_name(shard) for shard in range(len(self))]

    @property
    def classnames(self) -> list[str] | None:
        """The lines of `classnames.txt` beside the tars or in the folder above: line N + 1 names class N.

        None if there is no such file; UserError as `texts.class_names`.
        """
        found = self._beside(texts.CLASS_NAMES)
        return None if found is None else texts.class_names(*found)

    @property
    def templates(self) -> list[str] | None:
        """The lines of `zeroshot_classification_templates.txt`, each with `{c}`; None if there is none."""
        found = self._beside(texts.TEMPLATES)
        return None if found is None else texts.templates(*found)

    def _beside(self, name: str) -> tuple[bytes, object] | None:
        """A text beside the shards, or in the folder above, and where it lies; None if it is not there."""
        folder, index = self.parts[0].folder, self.parts[0].index
        places = [index] if isinstance(folder, RemoteFolder) else [folder, folder.parent]
        for path in (place / name for place in places):
            if path.is_file():
                return path.read_bytes(), path
        if not isinstance(folder, RemoteFolder):
            return None
        from clipcluster.data.storage.download import read_beside

        data = read_beside(folder, name)
        return None if data is None else (data, folder / name)

    def _place(self, shard: int) -> tuple[int, int]:
        """IndexedFolder, and row in its table."""
        part = int(np.searchsorted(self._part_ends, shard, side="right"))
        first = int(self._part_ends[part - 1]) if part else 0
        rows = self._rows[part]
        return part, shard - first if rows is None else int(rows[shard - first])

    def shard_name(self, shard: int) -> str:
        part, row = self._place(shard)
        arrays = self._tables[part].arrays
        begin = int(arrays["name_ends"][row - 1]) if row else 0
        name = arrays["names"][begin : int(arrays["name_ends"][row])].tobytes()
        return name.decode("utf-8", "surrogateescape")

    def shard_path(self, shard: int) -> Path:
        """Where a shard of a local folder lies."""
        place = self.shard_location(shard)
        assert isinstance(place, Path), f"{place} lies on no disk of this machine"
        return place

    def shard_location(self, shard: int) -> Path | RemoteFile:
        """Where a shard lies, for messages; a remote one shows its address."""
        return self.parts[self._place(shard)[0]].folder / self.shard_name(shard)

    def sha256(self, shard: int) -> str:
        """The hash of a shard's bytes when it was indexed, in hex."""
        part, row = self._place(shard)
        return self._tables[part].arrays["sha256"][row].tobytes().hex()

    def locate(self, position: int) -> tuple[int, int]:
        """Shard number and sample number within it."""
        if not 0 <= position < self.n_samples:
            raise IndexError(f"{self.name} has {self.n_samples} samples; there is no sample {position}")
        shard = int(np.searchsorted(self._sample_ends, position, side="right"))
        return shard, int(position - self._sample_ends[shard] + self.sample_counts[shard])


def _name_of(part: IndexedFolder) -> str:
    """What a source is called after: its folder; a command has none, its index has."""
    if isinstance(part.folder, Path):
        return part.folder.resolve().name
    return part.index.name if part.folder.is_pipe else part.folder.name
