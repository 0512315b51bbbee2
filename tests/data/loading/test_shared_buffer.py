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
place = BufferSlice(sys.argv[1], (5, 3, 4, 4), 0, 5).cut(1, 3)
place.open()[:] = 7
"""


def test_another_process_writes_its_part() -> None:
    room = SharedBuffer((5, 3, 4, 4))
    assert room.images.dtype == torch.uint8
    assert not room.images.any()
    subprocess.run([sys.executable, "-c", WRITER, room.place.path], check=True)
    assert room.images.amax((1, 2, 3)).tolist() == [0, 7, 7, 0, 0]
    assert room.images.amin((1, 2, 3)).tolist() == [0, 7, 7, 0, 0]


def test_the_images_outlive_the_room_and_nothing_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    images, places = [], []
    for number in range(20):
        room = SharedBuffer((2, 3, 4, 4))
        room.place.open()[:] = number
        images.append(room.images)
        places.append(room.place)
        room.close()
        room.close()
    assert [int(pixels.max()) for pixels in images] == list(range(20))
    del room, images
    assert len(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(OSError, match=places[0].path):
        places[0].open()


def test_a_room_may_be_empty() -> None:
    room = SharedBuffer((0, 3, 4, 4))
    assert room.images.shape == room.place.open().shape == (0, 3, 4, 4)


def test_parts_of_parts() -> None:
    assert BufferSlice("p", (9,), 0, 9).cut(2, 8).cut(1, 3) == BufferSlice("p", (9,), 3, 5)
