"""What a rank says of itself: one logger, one line a message."""

from __future__ import annotations

import logging
from typing import TextIO

NAME = "clipcluster"


def setup(rank: int, stream: TextIO) -> logging.Logger:
    """Send the logger "clipcluster" to `stream`, one line a message: time, rank, message.

    Calling it again replaces the stream. Returns the logger.
    """
    logger = logging.getLogger(NAME)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logger
