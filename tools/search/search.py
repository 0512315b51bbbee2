"""The images of a folder that are nearest to a text or to an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from clipcluster.build.opened import find_model
from clipcluster.errors import UserError
from tools.search.images import Bad, Place


class Hit(NamedTuple):
    """An image that was found, and the cosine of its features and the query's."""

    place: Place
    score: float


@dataclass(frozen=True)
class Query:
    """What was looked for, and the images found, the nearest first."""

    kind: Literal["text", "image"]
    value: str
    hits: Sequence[Hit]


@dataclass(frozen=True)
class Answers:
    """What a search found. searched: images with features; encoded: those of them that were new."""

    model: str
    step: int | None
    folder: Path
    index: Path
    searched: int
    encoded: int
    bad: Sequence[Bad]
    queries: Sequence[Query]

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        queries = []
        for query in self.queries:
            results = [
                {"file": hit.place.file, "key": hit.place.key or None, "score": round(hit.score, 6)}
                for hit in query.hits
            ]
            queries.append({query.kind: query.value, "results": results})
        return {
            "model": self.model,
            "step": self.step,
            "images": str(self.folder),
            "index": str(self.index),
            "searched": self.searched,
            "encoded": self.encoded,
            "bad": [bad._asdict() for bad in self.bad],
            "queries": queries,
        }


def search(
    what: str,
    folder: Path,
    texts: Sequence[str],
    images: Sequence[Path],
    *,
    count: int,
    runs: Path | None = None,
    weights: Literal["ema", "raw"] | None = None,
    index: Path | None = None,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """The `count` nearest images of a folder to each text, then to each image, by the features of a model.

    what, weights, runs: as of `clipcluster.load`. index: the folder for the index; default beside the images.
    Equal scores come in the order of the files. Raises UserError where there is no model, folder or image to
    look for, nothing to look for, or an index cannot be written; BadImage for a query that cannot be decoded.
    """
    if not texts and not images:
        raise UserError("There is nothing to look for: give --text or --image, several where you like.")
    for path in images:
        if not path.is_file():
            raise UserError(f"--image {path} is not a file; name an image file.")
    if not all(text.strip() for text in texts):
        raise UserError("--text is empty; give the words to look for.")
    if not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder; name one with image files or shards.")
    find_model(what, runs)  # before torch is loaded
    from clipcluster.build.loaded import load
    from clipcluster.data.images.decode import BadImage
    from tools.search.index import identity_of, index_file, up_to_date

    model = load(what, weights=weights, runs=runs)
    identity = identity_of(model)
    file = index_file(folder, identity, index)
    try:  # before the folder, which may take hours
        features = [model.encode_text(texts), model.encode_image(images)]
    except BadImage as error:
        raise UserError(f"--image {error}") from None
    found, encoded = up_to_date(folder, model, file, identity, say=say, progress=progress)
    if not found.places:
        first = f" that can be used ({found.bad[0].shown}: {found.bad[0].reason})" if found.bad else ""
        raise UserError(f"--images {folder} has no image{first}; name a folder with image files or shards.")
    asked: list[tuple[Literal["text", "image"], str]] = [("text", text) for text in texts]
    asked += [("image", str(path)) for path in images]
    queries = [
        Query(kind, value, nearest(found.features, vector, found.places, count))
        for (kind, value), vector in zip(
            asked, np.concatenate([own.cpu().numpy() for own in features]), strict=True
        )
    ]
    return Answers(
        model.opened.name, model.opened.step, folder, file, len(found.places), encoded, found.bad, queries
    )


def nearest(features: np.ndarray, query: np.ndarray, places: Sequence[Place], count: int) -> list[Hit]:
    """The places of the `count` rows of features (N, E) with the largest products with a query (E,).

    Of equal ones the earlier row comes first.
    """
    scores = features @ query
    return [Hit(places[at], float(scores[at])) for at in np.argsort(-scores, kind="stable")[:count].tolist()]
