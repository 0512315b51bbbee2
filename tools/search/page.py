"""The answers of a search as one HTML file with thumbnails, which needs nothing from a network."""

from __future__ import annotations

import base64
from pathlib import Path

import torch
from jinja2 import Environment, StrictUndefined
from torchvision.io import encode_jpeg
from torchvision.transforms.v2 import functional as F

from clipcluster.data.images.decode import BadImage, decode
from tools.search.images import Place, bytes_at
from tools.search.search import Answers

TEMPLATE = Path(__file__).with_name("page.html")
_SIDE = 256  # pixels of a thumbnail's longer side
_QUALITY = 80


def page(answers: Answers) -> bytes:
    """The page in UTF-8; an image that changed since it was found is said to be so."""
    shown = []
    for query in answers.queries:
        asked = thumbnail(Path(query.value).read_bytes()) if query.kind == "image" else None
        hits = [(hit, _shown(answers.folder, hit.place)) for hit in query.hits]
        shown.append((query, asked, hits))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    # names of files need not be UTF-8
    return template.render(answers=answers, queries=shown).encode(errors="replace")


def _shown(folder: Path, place: Place) -> str | None:
    """The thumbnail; None where the file is gone or holds something else by now."""
    try:
        return thumbnail(bytes_at(folder, place))
    except (BadImage, OSError):
        return None


def thumbnail(data: bytes) -> str:
    """An image's file as a small JPEG in a data URI, never larger than it was."""
    pixels = decode(data)
    scale = min(1.0, _SIDE / max(pixels.shape[1:]))
    size = [max(1, round(side * scale)) for side in pixels.shape[1:]]
    small = F.resize(pixels, size, antialias=True).contiguous()
    return "data:image/jpeg;base64," + base64.b64encode(_jpeg(small)).decode()


def _jpeg(pixels: torch.Tensor) -> bytes:
    return encode_jpeg(pixels, quality=_QUALITY).numpy().tobytes()
