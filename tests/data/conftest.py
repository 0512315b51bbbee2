"""Small folders of shards, each written whole, then indexed."""

import io
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipcluster.recipe.sections.data import Data
from tests.shard_writer import ShardWriter


def _picture(number: int, kind: str = "PNG", size: tuple[int, int] = (12, 10)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def _texts(number: int) -> list[str]:
    return [f"caption {i} of {number}" for i in range(1 + number % 3)]


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """picture(number, kind="PNG", size=(12, 10)): the bytes of a small coloured image."""
    return _picture


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., Path]:
    """make_shards(folder, samples, per_shard=7, bad={numbers}, texts=of_number): an indexed folder."""

    def make(
        folder: Path,
        samples: int,
        *,
        per_shard: int = 7,
        bad: Collection[int] = (),
        texts: Callable[[int], list[str]] = _texts,
    ) -> Path:
        with ShardWriter(folder, samples_per_shard=per_shard) as writer:
            for number in range(samples):
                image = b"<html>not found</html>" if number in bad else _picture(number)
                writer.add(
                    f"s{number:05d}", image, "png", texts(number), fields={"id": number}, cls=number % 4
                )
        return folder

    return make


@pytest.fixture
def data_section() -> Callable[..., Data]:
    """data_section(batch_size=…, **image keys): a recipe's data section, tiny images, byte tokenizer."""

    def section(batch_size: int = 8, context_length: int = 24, **image: object) -> Data:
        return Data.model_validate(
            {
                "train": [{"shards": "unused"}],
                "batch_size": batch_size,
                "image": {"size": 8, "crop_scale": [0.5, 1.0], "flip": True, **image},
                "text": {"tokenizer": "bytes", "context_length": context_length},
            }
        )

    return section
