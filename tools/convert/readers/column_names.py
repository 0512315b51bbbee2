"""The usual names of the columns that tables of images and captions have, most telling first."""

from collections.abc import Sequence

IMAGE_PATHS = ("image_path", "filepath", "file_path", "path", "image", "file_name", "filename")
CAPTIONS = ("captions", "caption", "text", "txt", "TEXT", "title", "sentences")


def first_of(usual: Sequence[str], columns: Sequence[str]) -> str | None:
    """The first usual name that is among `columns`, or None."""
    return next((name for name in usual if name in columns), None)
