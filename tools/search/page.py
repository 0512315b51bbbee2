"""The answers of a search as one HTML file with thumbnails, which needs nothing from a network."""

from __future__ import annotations

import base64
from pathlib import Path

import torch
from jinja2 import Environment, StrictUndefined
from torchvision.io import encode_jpeg
from torchvision.transforms.v2 import functional as F

from clipcluster.data.images.decode import decode
from tools.search.images import bytes_at
from tools.search.search import Answers

TEMPLATE = Path(__file__).with_name("page.html")
_SIDE = 256  # pixels of a thumbnail's longer side
_QUALITY = 80


def page(answers: Answers) -> str:
    """The page as text. Raises OSError and BadImage where an image changed since it was found."""
    shown = []
    for query in answers.queries:
        asked = thumbnail(Path(query.value).read_bytes()) if query.kind == "image" else None
        hits = [(hit, thumbnail(bytes_at(answers.folder, hit.place))) for hit in query.hits]
        shown.append((query, asked, hits))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(answers=answers, queries=shown)


def thumbnail(data: bytes) -> str:
    """An image's file as a small JPEG in a data URI, never larger than it was."""
    pixels = decode(data)
    scale = min(1.0, _SIDE / max(pixels.shape[1:]))
    size = [max(1, round(side * scale)) for side in pixels.shape[1:]]
    small = F.resize(pixels, size, antialias=True).contiguous()
    return "data:image/jpeg;base64," + base64.b64encode(_jpeg(small)).decode()


def _jpeg(pixels: torch.Tensor) -> bytes:
    return encode_jpeg(pixels, quality=_QUALITY).numpy().tobytes()
