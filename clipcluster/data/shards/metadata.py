"""The metadata of a source, from its index: shards and samples by number, captions, classes. No torch.

No shard is opened here: everything comes from the mapped indexes of the folders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from clipcluster.data.shards import captions, folder_index
from clipcluster.data.shards.folder_index import IndexedFolder
from clipcluster.data.storage.urls import RemoteFile

_PIECES = 64  # columns concatenated without a copy
_SHARDS = 64  # whose samples are looked at together


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
    contents), `sample_counts` (n_shards,) int64, `sample_ends` their running sum, `n_samples`, `n_pairs`
    (captions of all samples), `classes` (n_samples,) int32 (-1: none), `fields` (the choices of captions,
    with their probabilities and counts; none where captions play no part), `more_than` (C, n_shards) samples
    of each shard with more than c captions (C is 1 where there are several fields, or none, and then holds
    all samples). All are mapped, and shared by the processes of a node,
    where the source is one whole folder; of several folders those by sample are too.
    """

    def __init__(
        self,
        folders: Sequence[IndexedFolder],
        probabilities: Sequence[float | None] = (None,),
    ) -> None:
        self.folders = tuple(folders)
        self.probabilities = tuple(probabilities)
        folder = self.folders[0].folder
        if isinstance(folder, Path):
            self.name = folder.resolve().name
        else:  # a command has no name, its index has
            self.name = self.folders[0].index.name if folder.is_pipe else folder.name
        self._tables = [folder_index.read_folder_index(indexed) for indexed in self.folders]
        # a folder that is taken whole has no list of its shards: it would be private to every process
        self._taken = [None if f.taken is None else np.array(f.taken, np.int64) for f in self.folders]
        counts = self._of_shards(["samples"] * len(self.folders))
        self._folder_ends = np.cumsum([len(column) for column in counts])
        if len(self.folders) == 1 and self.folders[0].taken is None:
            self.sample_counts = counts[0]
            self.sample_ends = self._tables[0].arrays["sample_ends"]
            self.fingerprint = str(self._tables[0].meta["fingerprint"])
        else:
            self.sample_counts = np.concatenate(counts)
            self.sample_ends = np.cumsum(self.sample_counts, dtype=np.int64)
            self.fingerprint = folder_index.fingerprint(
                [(self.shard_name(i), bytes.fromhex(self.sha256(i))) for i in range(len(self))]
            )
        self.n_samples = int(self.sample_ends[-1]) if len(self.sample_ends) else 0

    def __len__(self) -> int:
        """The number of shards."""
        return len(self.sample_counts)

    def _of_shards(self, names: Sequence[str]) -> list[np.ndarray]:
        """A column of the shards taken of each folder, (…, n_shards) each; `names` are those by folder."""
        columns = [table.arrays[name] for table, name in zip(self._tables, names, strict=True)]
        return [
            column if taken is None else column[..., taken]
            for column, taken in zip(columns, self._taken, strict=True)
        ]

    def _of_samples(self, names: Sequence[str]) -> np.ndarray:
        """A column of the samples of the shards taken, (n_samples,), -1 where a folder has none."""
        pieces = []
        for table, taken, name in zip(self._tables, self._taken, names, strict=True):
            ends = table.arrays["sample_ends"]
            column = table.arrays.get(name)
            if column is None:
                column = np.broadcast_to(np.int32(-1), (int(ends[-1]) if len(ends) else 0,))
            if taken is None:
                pieces.append(column)
            else:
                begins = ends[taken] - table.arrays["samples"][taken]
                pieces += [column[low:high] for low, high in zip(begins, ends[taken], strict=True)]
        if len(pieces) == 1:
            return pieces[0]
        # shards cut out of a folder are many small pieces: copied, they are as fast as one column
        if len(pieces) > _PIECES:
            return np.concatenate(pieces)
        return cast(np.ndarray, Concatenated(pieces))

    def _choices_of(self, folder: int) -> tuple[str, ...]:
        """The choices of captions read in a folder: those asked for, else the index's first; () for none."""
        if not self.probabilities:
            return ()
        choices = self.folders[folder].choices
        return (next(iter(self._tables[folder].meta["captions"])),) if choices is None else choices

    @cached_property
    def fields(self) -> tuple[CaptionField, ...]:
        """The choices of captions, one or several, in the order in which `read` lays their captions."""
        by_folder = [self._choices_of(folder) for folder in range(len(self.folders))]
        return tuple(
            CaptionField(
                choices[0],
                probability,
                self._of_samples([f"captions/{choice}" for choice in choices]),
            )
            for choices, probability in zip(zip(*by_folder, strict=True), self.probabilities, strict=True)
        )

    def caption_counts(self, where: Any = slice(None)) -> np.ndarray:
        """Captions over all fields of these samples (a number, an array of them, or a slice), int64."""
        counts = [field.counts[where] for field in self.fields]
        return np.asarray(np.sum(counts, axis=0, dtype=np.int64))

    @cached_property
    def classes(self) -> np.ndarray:
        """Class of every sample, (n_samples,) int32; -1 where it has none."""
        return self._of_samples(["classes"] * len(self.folders))

    @cached_property
    def more_than(self) -> np.ndarray:
        """Samples of each shard with more than c captions, (C, n_shards); C is 1 with several fields."""
        if not self.fields:
            return self.sample_counts[None]
        by_field = [self.more_than_of(number) for number in range(len(self.fields))]
        if len(by_field) == 1:
            return by_field[0]
        having = np.max([table[0] for table in by_field], axis=0)
        # in shards where no field alone has a caption for every sample, the samples are looked at
        partial = (having > 0) & (having < self.sample_counts)
        for low in range(0, len(self), _SHARDS):
            part = slice(low, low + _SHARDS)
            if partial[part].any():
                ends, sizes = self.sample_ends[part], self.sample_counts[part]
                begin = int(ends[0] - sizes[0])
                counts = self.caption_counts(slice(begin, int(ends[-1])))
                used = np.concatenate([[0], np.cumsum(counts > 0)])
                having[part] = used[ends - begin] - used[ends - begin - sizes]
        return having[None]

    def more_than_of(self, field: int) -> np.ndarray:
        """Samples of each shard with more than c captions of one field, (C, n_shards)."""
        choices = [self._choices_of(folder)[field] for folder in range(len(self.folders))]
        tables = self._of_shards([f"more_than/{choice}" for choice in choices])
        if len(tables) == 1:
            return tables[0]
        depth = max(map(len, tables))
        return np.concatenate([np.pad(t, ((0, depth - len(t)), (0, 0))) for t in tables], axis=1)

    @property
    def n_pairs(self) -> int:
        """Captions of all samples, of all fields."""
        return sum(int(self.more_than_of(field).sum(dtype=np.int64)) for field in range(len(self.fields)))

    @property
    def shard_names(self) -> list[str]:
        return [self.shard_name(shard) for shard in range(len(self))]

    @property
    def classnames(self) -> list[str] | None:
        """The lines of `classnames.txt` beside the tars or in the folder above: line N + 1 names class N.

        None if there is no such file; UserError as `captions.class_names`.
        """
        return self._beside(captions.CLASS_NAMES, captions.class_names)

    @property
    def templates(self) -> list[str] | None:
        """The lines of `zeroshot_classification_templates.txt`, each with `{c}`; None if there is none."""
        return self._beside(captions.TEMPLATES, captions.templates)

    def _beside(self, name: str, lines: Callable[[bytes, object], list[str]]) -> list[str] | None:
        """The lines of a text beside the shards, or in the folder above; None if there is none."""
        folder = self.folders[0].folder
        places = [folder, folder.parent] if isinstance(folder, Path) else [self.folders[0].index]
        for path in (place / name for place in places):
            if path.is_file():
                return lines(path.read_bytes(), path)
        if isinstance(folder, Path):
            return None
        from clipcluster.data.storage.download import read_beside

        data = read_beside(folder, name)
        return None if data is None else lines(data, folder / name)

    def _number_in_folder(self, shard: int) -> tuple[int, int]:
        """The number of its folder, and its own within that folder's index."""
        folder = int(np.searchsorted(self._folder_ends, shard, side="right"))
        first = int(self._folder_ends[folder - 1]) if folder else 0
        taken = self._taken[folder]
        return folder, shard - first if taken is None else int(taken[shard - first])

    def folder_of(self, shard: int) -> IndexedFolder:
        return self.folders[self._number_in_folder(shard)[0]]

    def shard_name(self, shard: int) -> str:
        folder, number = self._number_in_folder(shard)
        arrays = self._tables[folder].arrays
        begin = int(arrays["name_ends"][number - 1]) if number else 0
        name = arrays["names"][begin : int(arrays["name_ends"][number])].tobytes()
        return name.decode("utf-8", "surrogateescape")

    def shard_path(self, shard: int) -> Path:
        """The path of a shard of a local folder."""
        place = self.shard_location(shard)
        assert isinstance(place, Path), f"{place} is not on this machine"
        return place

    def shard_location(self, shard: int) -> Path | RemoteFile:
        """The path of a shard, or the address of a remote one, redacted where it is shown."""
        return self.folder_of(shard).folder / self.shard_name(shard)

    def sha256(self, shard: int) -> str:
        """The hash of a shard's bytes when it was indexed, in hex."""
        folder, number = self._number_in_folder(shard)
        return self._tables[folder].arrays["sha256"][number].tobytes().hex()

    def locate(self, position: int) -> tuple[int, int]:
        """Shard number and sample number within it."""
        if not 0 <= position < self.n_samples:
            raise IndexError(f"{self.name} has {self.n_samples} samples; there is no sample {position}")
        shard = int(np.searchsorted(self.sample_ends, position, side="right"))
        return shard, int(position - self.sample_ends[shard] + self.sample_counts[shard])


class Concatenated:
    """Columns of several folders, one after the other, without a copy.

    Indexed by a number, an array of numbers, or a slice without a step.
    """

    def __init__(self, pieces: Sequence[np.ndarray]) -> None:
        self._pieces = pieces
        self._ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        self.dtype = np.result_type(*(piece.dtype for piece in pieces))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            start, stop, _ = key.indices(len(self))
            begins = (self._ends - [len(piece) for piece in self._pieces]).tolist()
            parts = [
                piece[max(start - begin, 0) : stop - begin]
                for piece, begin in zip(self._pieces, begins, strict=True)
                if start < begin + len(piece) and stop > begin
            ]
            return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, self.dtype), *parts])
        numbers = np.asarray(key)
        flat = numbers.reshape(-1)
        if len(flat) and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"a number is out of 0 to {len(self) - 1}")
        values = np.empty(len(flat), self.dtype)
        rows = np.searchsorted(self._ends, flat, side="right")
        for row in np.unique(rows).tolist():
            mine, piece = rows == row, self._pieces[row]
            values[mine] = piece[flat[mine] - self._ends[row] + len(piece)]
        return values.reshape(numbers.shape)[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)
