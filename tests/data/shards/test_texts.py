"""The place of a line in classnames.txt is the number of its class, wherever the file lies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipcluster.data.shards.open import open_folder
from clipcluster.data.storage.cache import Cache
from clipcluster.errors import UserError


@pytest.fixture(params=["here", "there", "in the index"])
def opened(
    request: pytest.FixtureRequest, tmp_path: Path, make_shards: Callable[..., Path], web_server: Any
) -> Callable[[bytes], Any]:
    """opened(text): a dataset with this classnames.txt, on this machine, on a server, beside its index."""
    folder = make_shards(tmp_path / "train", 3)

    def open_with(text: bytes) -> Any:
        (folder / "classnames.txt").write_bytes(text)
        (folder / "zeroshot_classification_templates.txt").write_bytes(text)
        if request.param == "here":
            return open_folder(folder)
        index = folder if request.param == "in the index" else None
        return open_folder(web_server(folder).address, index, cache=Cache(str(tmp_path / "cache")))

    return open_with


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"cat\ndog\n", ["cat", "dog"]),
        (b"cat\r\ndog", ["cat", "dog"]),
        (b"\xef\xbb\xbfcat\ndog\n\n \n", ["cat", "dog"]),
        ("cat\x85s\nd\u2028og\x0c\n".encode(), ["cat\x85s", "d\u2028og\x0c"]),
        (b"", []),
    ],
)
def test_a_line_is_a_class(opened: Callable[[bytes], Any], text: bytes, names: list[str]) -> None:
    dataset = opened(text)
    assert dataset.classnames == names
    assert dataset.templates == names


def test_an_empty_line_shifts_no_class(opened: Callable[[bytes], Any]) -> None:
    dataset = opened(b"cat\n\ndog\n")
    with pytest.raises(UserError, match=r"classnames\.txt: line 2 is empty, .* the name of class 1"):
        _ = dataset.classnames
    assert dataset.templates == ["cat", "dog"]


def test_bytes_that_are_no_text(opened: Callable[[bytes], Any]) -> None:
    with pytest.raises(UserError, match=r"classnames\.txt: not UTF-8 text"):
        _ = opened(b"cat\n\xff\n").classnames
