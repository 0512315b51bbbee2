"""`clipcluster shards stats DIR …`: what is in a folder of shards, as figures for people and programs."""

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clipcluster.data.shards import captions, indexing, shard_list
from clipcluster.data.shards.open import open_folder
from clipcluster.errors import UserError
from clipcluster.runtime.outcome import DataError
from clipcluster.text import counted
from tools.shards.pool import over_shards
from tools.shards.survey import Survey, survey

_EXAMPLES = 20  # groups of duplicates that are named
_QUANTILES = {
    "min": 0,
    "p1": 1,
    "p5": 5,
    "p25": 25,
    "median": 50,
    "p75": 75,
    "p95": 95,
    "p99": 99,
    "max": 100,
}
_BINS = 40


@dataclass(frozen=True)
class Stats:
    """The figures of one folder, as `--json` prints them. used + bad = samples.

    `bad` are samples whose image cannot be used, `broken` shards that could not be read to their end (what
    lies before counts). `images` and `captions_characters` hold quantiles and a histogram each; image sizes
    are those of usable images, by their headers. What has no image, or a key that came before in its shard,
    is no sample: `without_image`, `repeated_keys`. `duplicates` are samples with the same image bytes, and
    those of different shards with one key.
    """

    folder: str
    captions_choice: str
    decoded: bool
    shards: int
    samples: int
    bytes: int
    used: int
    captions: int
    without_caption: int
    without_image: int
    repeated_keys: int
    kinds: dict[str, int]
    images: dict[str, Any]
    caption_characters: dict[str, Any]
    captions_per_sample: dict[str, int]
    classes: dict[str, int]
    duplicates: dict[str, Any]
    bad: list[dict[str, Any]]
    broken: list[dict[str, Any]]
    notes: list[str]


def stats(
    folder: Path,
    index: Path | None = None,
    *,
    captions_choice: str | None = None,
    images: bool = True,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Stats:
    """Reads every sample of a folder; decodes images if `images`, else tells only what is no image at all.

    The folder's index is used where it fits the shards and the choice of captions; else one is made for the
    moment, and `notes` say so. UserError: no folder, no shards, an unknown choice.
    """
    choice = captions.choice_for(folder, captions_choice or _chosen(folder, index))
    note = _misfit(folder, index, choice)
    with ExitStack() as stack:
        if note is not None:
            index = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clipcluster-index-")))
            indexing.index_folder(folder, index, choice, workers=workers)
        shards = stack.enter_context(closing(open_folder(folder, index, choice)))
        task = partial(survey, decoded=images, details=True)
        alone = 0 if workers == 1 and not images else workers
        found = over_shards(task, shards, workers=alone, progress=progress)
        whole = shard_list.read_summary(folder, index)
        counts = shards.caption_counts()
    bad = [entry for one in found for entry in one.bad]
    classes = _joined(found, "classes")
    return Stats(
        folder=str(folder),
        captions_choice=choice,
        decoded=images,
        shards=len(shards),
        samples=shards.n_samples,
        bytes=whole.bytes,
        used=shards.n_samples - len(bad),
        captions=shards.n_pairs,
        without_caption=int((counts == 0).sum()),
        without_image=whole.without_image,
        repeated_keys=whole.duplicates,
        kinds=dict(sum((one.kinds for one in found), Counter()).most_common()),
        images=_image_figures(found),
        caption_characters=_figures(_joined(found, "lengths")),
        captions_per_sample=_tally(counts),
        classes=_tally(classes[classes >= 0]),
        duplicates=_duplicates(found),
        bad=bad,
        broken=[{"shard": b["shard"], "key": None, "reason": b["reason"]} for b in whole.broken],
        notes=[] if note is None else [note],
    )


def _chosen(folder: Path, index: Path | None) -> str | None:
    """The choice of captions that the index was made for; None without one."""
    try:
        return shard_list.read_summary(folder, index).captions_choice
    except UserError:
        return None


def _misfit(folder: Path, index: Path | None, choice: str) -> str | None:
    """Why the index cannot be used; None if it can."""
    try:
        shards = open_folder(folder, index, choice)
        shards.check_unchanged()
        for shard in range(len(shards)):
            shards.columns(shard)
        shard_list.read_summary(folder, index)
        unknown = {path.name for path in indexing.find_shards(folder)} - set(shards.shard_names)
        shards.close()
    except DataError as error:
        return f"the index does not match ({error.reason}); the figures are of the shards as they are now"
    except UserError as error:
        indexing.find_shards(folder)
        return f"no index was used ({str(error).partition(';')[0]})"
    if unknown:
        lacks = counted(len(unknown), "shard")
        return f"the index lacks {lacks} ({min(unknown)}, …); the figures include them"
    return None


def _joined(found: Sequence[Survey], name: str) -> np.ndarray:
    return np.concatenate([getattr(one, name) for one in found])


def _image_figures(found: Sequence[Survey]) -> dict[str, Any]:
    """Of the usable images: widths, heights and pixels by their headers, and their bytes."""
    usable = _joined(found, "usable")
    sizes = _joined(found, "sizes")[usable]
    # the headers of images that nobody decoded may say anything
    known = sizes[(sizes > 0).all(axis=1) & (sizes < 2**31).all(axis=1)]
    return {
        "width": _figures(known[:, 0]),
        "height": _figures(known[:, 1]),
        "pixels": _figures(known[:, 0] * known[:, 1]),
        "bytes": _figures(_joined(found, "image_bytes")[usable]),
        "size_unknown": len(sizes) - len(known),
    }


def _figures(values: np.ndarray) -> dict[str, Any]:
    """Count, mean, quantiles (values that occur) and a histogram; the count alone where there is nothing."""
    if not len(values):
        return {"count": 0}
    quantiles = np.percentile(values, list(_QUANTILES.values()), method="nearest")
    low, high = int(values.min()), int(values.max())
    # bins of whole numbers, all of one width
    edges = np.arange(0, _BINS + 1) * max(1, -(-(high - low + 1) // _BINS)) + low
    edges = edges[: int(np.searchsorted(edges, high, side="right")) + 1]
    return {
        "count": len(values),
        "mean": round(float(values.mean()), 2),
        **{name: int(value) for name, value in zip(_QUANTILES, quantiles, strict=True)},
        "histogram": {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()},
    }


def _tally(counts: np.ndarray) -> dict[str, int]:
    values, numbers = np.unique(counts, return_counts=True)
    return {str(value): int(number) for value, number in zip(values, numbers, strict=True)}


def _duplicates(found: Sequence[Survey]) -> dict[str, Any]:
    """Samples with the same image bytes, and of one key: groups, copies beyond the first, examples."""
    places = [(one.shard, key) for one in found for key in one.keys]
    content = _joined(found, "content")
    return {
        "content": _groups(content.view(np.dtype((np.void, 16))).reshape(-1), places),
        "keys": _groups(np.array([key for _, key in places], dtype=object), places),
    }


def _groups(values: np.ndarray, places: Sequence[tuple[str, str]]) -> dict[str, Any]:
    _, first, inverse, counts = np.unique(values, return_index=True, return_inverse=True, return_counts=True)
    several = np.flatnonzero(counts > 1)
    several = several[np.argsort(first[several], kind="stable")]
    examples = []
    for group in several[:_EXAMPLES]:
        members = np.flatnonzero(inverse == group)
        examples.append([{"shard": places[at][0], "key": places[at][1]} for at in members[:_EXAMPLES]])
    return {
        "groups": len(several),
        "extra": int((counts[several] - 1).sum()),
        "examples": examples,
    }
