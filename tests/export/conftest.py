"""The smallest models of every kind are importable, and every test has one thread."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """64 JPEG files of many sizes, smooth and coloured, of which both programs cut the same middle."""
    folder, numbers = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    files = []
    while len(files) < 64:
        width, height = (int(side) for side in numbers.integers(40, 200, 2))
        longer = int(32 * max(width, height) / min(width, height))
        if (longer - 32) % 4 == 3:  # see test_the_middle_may_be_a_pixel_off
            continue
        small = numbers.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        files.append(folder / f"{len(files):02d}.jpg")
        picture.save(files[-1], quality=95)
    return files
