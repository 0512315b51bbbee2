"""Memory that one process makes and others write into."""

import os
import subprocess
import sys

import pytest
import torch

from clipcluster.data.loading.shared_buffer import SHAREABLE, BufferSlice, SharedBuffer

pytestmark = pytest.mark.skipif(not SHAREABLE, reason="needs Linux")

WRITER = """
import sys
from clipcluster.data.loading.shared_buffer import BufferSlice
target = BufferSlice(sys.argv[1], (5, 3, 4, 4), 0, 5).cut(1, 3)
target.open()[:] = 7
"""


def test_another_process_writes_its_slice() -> None:
    buffer = SharedBuffer((5, 3, 4, 4))
    assert buffer.images.dtype == torch.uint8
    assert not buffer.images.any()
    subprocess.run([sys.executable, "-c", WRITER, buffer.whole.path], check=True)
    assert buffer.images.amax((1, 2, 3)).tolist() == [0, 7, 7, 0, 0]
    assert buffer.images.amin((1, 2, 3)).tolist() == [0, 7, 7, 0, 0]


def test_the_images_outlive_the_buffer_and_nothing_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    images, slices = [], []
    for number in range(20):
        buffer = SharedBuffer((2, 3, 4, 4))
        buffer.whole.open()[:] = number
        images.append(buffer.images)
        slices.append(buffer.whole)
        buffer.close()
        buffer.close()
    assert [int(pixels.max()) for pixels in images] == list(range(20))
    del buffer, images
    assert len(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(OSError, match=slices[0].path):
        slices[0].open()


def test_a_buffer_may_be_empty() -> None:
    buffer = SharedBuffer((0, 3, 4, 4))
    assert buffer.images.shape == buffer.whole.open().shape == (0, 3, 4, 4)


def test_slices_of_slices() -> None:
    assert BufferSlice("p", (9,), 0, 9).cut(2, 8).cut(1, 3) == BufferSlice("p", (9,), 3, 5)
