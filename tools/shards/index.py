"""`clipcluster shards index DIR …`: makes the index of folders of shards, here or elsewhere."""

from collections.abc import Callable, Sequence
from pathlib import Path

from clipcluster.data.shards.find import find_shards, folders_of_shards
from clipcluster.data.shards.indexing import index_folder
from clipcluster.data.shards.shard_list import IndexSummary
from clipcluster.data.storage.urls import is_remote, redacted
from clipcluster.errors import UserError


def index_folders(
    folders: Sequence[str | Path],
    *,
    index: Path | None = None,
    captions: str | Sequence[str] | None = None,
    again: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[IndexSummary]:
    """Indexes each folder; `index` puts it elsewhere, and goes with one folder alone. Addresses and commands
    (`pipe:`) need it.

    A folder whose splits hold the shards stands for all of them. `captions` are choices (default, lines, txt,
    json:FIELD, MEMBER.json:FIELD) to stand beside those that an index has; none: what it has, and for a new
    one lines where `dataset_type.txt` says retrieval, else default. `again` scans what looks unchanged too.
    UserError as `index_folder`.
    """
    folders = every_folder(folders, index)
    for folder in folders:
        if not is_remote(folder):
            find_shards(Path(folder))
        elif index is None:
            raise UserError(
                f"{redacted(str(folder))}: its index needs a folder on this machine: --index FOLDER"
            )
    summaries = []
    for folder in folders:
        if is_remote(folder) and index is not None:
            from tools.shards.remote_index import index_remote

            made = index_remote(str(folder), index, captions, again=again, workers=workers, progress=progress)
        else:
            made = index_folder(
                Path(folder), index, captions, again=again, workers=workers, progress=progress
            )
        summaries.append(made)
    return summaries


def every_folder(folders: Sequence[str | Path], index: Path | None) -> list[str | Path]:
    """The folders that hold the shards: of a folder of splits all of them; addresses as they are.

    UserError if several of them are to share one `index`.
    """
    found: list[str | Path] = []
    for folder in folders:
        found += [folder] if is_remote(folder) else folders_of_shards(Path(folder))
    if index is not None and len(found) != 1:
        raise UserError(
            f"--index {index} holds the index of one folder, and {len(found)} were given; run one by one"
        )
    return found
