"""Kinds and sizes of images, from their first bytes alone."""

import io
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, features

from clipcluster.data.images.format import extension_of, kind_of, no_image, size_of

PICTURE = Image.linear_gradient("L").resize((37, 21)).convert("RGB")


def saved(kind: str, image: Image.Image = PICTURE, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


CASES = [
    ("JPEG", "JPEG", "jpg", {}),
    ("JPEG", "JPEG", "jpg", {"progressive": True, "comment": b"\xff\xc0" * 40}),
    ("PNG", "PNG", "png", {}),
    ("GIF", "GIF", "gif", {}),
    ("WEBP", "WebP", "webp", {}),
    ("WEBP", "WebP", "webp", {"lossless": True}),
    ("WEBP", "WebP", "webp", {"save_all": True, "append_images": [PICTURE.rotate(90)]}),
    ("BMP", "BMP", "bmp", {}),
    ("TIFF", "TIFF", "tif", {}),
    ("TIFF", "TIFF", "tif", {"big_tiff": True}),
    ("PPM", "PPM", "ppm", {}),
    ("AVIF", "AVIF", "avif", {}),
    ("JPEG2000", "JPEG 2000", "jp2", {}),
]


@pytest.mark.parametrize(("name", "kind", "extension", "options"), CASES)
def test_kind_extension_and_size(name: str, kind: str, extension: str, options: dict[str, object]) -> None:
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = saved(name, **options)
    assert (kind_of(data), extension_of(data), size_of(data)) == (kind, extension, (37, 21))
    assert kind_of(data[:64]) == kind


def test_the_size_of_a_bomb_is_told() -> None:
    """A header is all it takes: nothing is decoded, and Pillow's own refusal is passed by."""
    for name in ("PNG", "GIF", "BMP", "TIFF"):
        data = saved(name, Image.new("1", (16_000, 16_000)))
        assert size_of(data) == (16_000, 16_000), name


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"\xef\xbb\xbf\n <!DOCTYPE html>", "HTML or XML"),
        (b"BM, a text about cars", "no known kind"),
        (b"P4 is a number", None),
        (bytes(100), "no known kind"),
        (b"\0\0\0\x20ftypmp42" + bytes(40), "no known kind"),
    ],
)
def test_what_is_no_image(data: bytes, reason: str | None) -> None:
    if reason is not None:
        assert kind_of(data) is None
        assert extension_of(data) is None
        assert reason in no_image(data)
    assert size_of(data) is None


def test_heif_is_named_though_it_cannot_be_read() -> None:
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    assert (kind_of(data), extension_of(data), size_of(data)) == ("HEIF", "heic", None)
    assert kind_of(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + bytes(40)) == "AVIF"


@given(st.sampled_from([case[0] for case in CASES if case[0] != "AVIF"]), st.data())
def test_damaged_headers_never_raise(name: str, data: st.DataObject) -> None:
    whole = bytearray(saved(name))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, min(200, len(whole) - 1)))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    size = size_of(cut)
    assert size is None or min(size) > 0


@given(st.binary(max_size=80))
@example(b"\xff\xd8\xff")
@example(b"\xff\xd8\xff\xe0\0\0")
@example(b"RIFF\0\0\0\0WEBPVP8X")
def test_any_bytes_have_an_answer(data: bytes) -> None:
    size_of(data)
    extension_of(data)
    assert no_image(data)


def test_torch_and_pillow_stay_unloaded() -> None:
    code = (
        "import sys; from clipcluster.data.images.format import size_of\n"
        "size_of(b'\\xff\\xd8\\xff\\xc0\\0\\x11\\x08' + bytes(40))\n"
        "sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
