"""Folders of shards with any members in them, for tests: written sample by sample, then indexed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipcluster.data.shards.indexing import index_folder
from clipcluster.data.shards.tar import END, header, padded


class ShardWriter:
    """Writes samples to `00000.tar`, `00001.tar`, … of a folder; leaving the `with` block indexes it."""

    def __init__(self, folder: Path, *, samples_per_shard: int = 10_000) -> None:
        self._folder, self._samples_per_shard = folder, samples_per_shard
        self._samples = 0
        self._shards: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            for path in self._shards:
                with open(path, "ab") as file:
                    file.write(END)
            index_folder(self._folder)

    def add(
        self,
        key: str,
        image: bytes,
        extension: str,
        texts: Sequence[str],
        *,
        fields: Mapping[str, Any] | None = None,
        cls: int | None = None,
    ) -> None:
        """Adds a sample as a conversion writes it: the image, `KEY.json`, `KEY.txt`, `KEY.cls`."""
        record = json.dumps({"captions": list(texts), **(fields or {})}, ensure_ascii=False)
        members = {extension: image, "json": record.encode()}
        if texts:
            members["txt"] = texts[0].encode()
        if cls is not None:
            members["cls"] = b"%d" % cls
        self.add_members(key, members)

    def add_members(self, key: str, members: Mapping[str, bytes]) -> None:
        """Adds a sample of any members, by extension, in the order given."""
        if self._samples % self._samples_per_shard == 0:
            self._shards.append(self._folder / f"{len(self._shards):05d}.tar")
            self._shards[-1].write_bytes(b"")
        self._samples += 1
        with open(self._shards[-1], "ab") as file:
            for extension, data in members.items():
                file.write(header(f"{key}.{extension}", len(data)) + data)
                file.write(bytes(padded(len(data)) - len(data)))
