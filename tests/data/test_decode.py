"""Every kind of image people have, by content."""

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from clipcluster.data.decode import BadImage, decode

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def expected(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
        ("PPM", {}),
    ],
)
def test_lossless_kinds_give_the_pixels(kind: str, options: dict[str, object]) -> None:
    out = decode(saved(RGB, kind, **options))
    assert out.dtype == torch.uint8
    assert torch.equal(out, expected(PIXELS))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_close_to_pillows(mode: str, progressive: bool) -> None:
    smooth = RGB.resize((64, 48), Image.Resampling.BICUBIC).convert(mode)
    data = saved(smooth, "JPEG", quality=95, progressive=progressive)
    reference = np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    difference = np.abs(decode(data).permute(1, 2, 0).numpy().astype(int) - reference)
    assert difference.mean() < 2
    assert difference.max() <= (12 if mode == "CMYK" else 4)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_and_palette(mode: str) -> None:
    image = RGB.convert(mode)
    for kind in ("PNG", "BMP", "TIFF"):
        assert torch.equal(decode(saved(image, kind)), expected(np.array(image.convert("RGB")))), kind


def test_sixteen_bits_become_eight() -> None:
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    wanted = [0, 0, 1, 128, 255]
    for kind in ("PNG", "TIFF"):
        out = decode(saved(Image.fromarray(values), kind))
        assert out.shape == (3, 1, 5)
        assert out[2, 0].tolist() == wanted, kind


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_goes_onto_white(kind: str) -> None:
    rgba = np.dstack([PIXELS, np.tile(np.array([0, 51, 128, 255, 10, 20, 30], np.uint8), (10, 2))])
    image = Image.fromarray(rgba)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    alpha = rgba[..., 3:].astype(int)
    wanted = (rgba[..., :3].astype(int) * alpha + 255 * (255 - alpha) + 127) // 255
    assert torch.equal(decode(saved(image, kind, **options)), expected(wanted.astype(np.uint8)))
    grey = image.convert("LA")
    assert decode(saved(grey, "PNG"))[:, 0, 0].tolist() == [255] * 3


def test_a_transparent_colour_goes_onto_white() -> None:
    palette = RGB.convert("P")
    out = decode(saved(palette, "PNG", transparency=int(np.array(palette)[0, 0])))
    assert out[:, 0, 0].tolist() == [255] * 3
    out = decode(saved(RGB, "PNG", transparency=tuple(int(v) for v in PIXELS[2, 3])))
    assert out[:, 2, 3].tolist() == [255] * 3
    assert out[:, 0, 0].tolist() == PIXELS[0, 0].tolist()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_of_several_frames_the_first(kind: str) -> None:
    frames = [Image.new("RGB", (14, 10), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    out = decode(saved(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert out.shape == (3, 10, 14)
    assert out[:, 5, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_turns_the_image_upright(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    out = decode(saved(RGB, kind, exif=exif))
    assert out.shape == (3, 14, 10)
    if kind != "JPEG":
        assert torch.equal(out, expected(np.rot90(PIXELS, -1)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_is_bad(kind: str) -> None:
    data = saved(RGB, kind)
    for keep in (len(data) // 2, len(data) - 6, 5):
        with pytest.raises(BadImage) as caught:
            decode(data[:keep])
        assert 5 < len(str(caught.value)) <= 220
        assert "/" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "HTML"),
        (b"\n <?xml", "HTML or XML"),
        (bytes(100), "no known kind"),
        (b"%PDF-1.4 ...", "no known kind"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"II*\0" + bytes(40), "no known kind|cannot"),
    ],
)
def test_what_is_no_image(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(data)


def test_a_bomb_in_a_bmp_is_refused() -> None:
    head = bytearray(saved(RGB, "BMP"))
    head[18:26] = struct.pack("<ii", 60_000, 60_000)
    with pytest.raises(BadImage):
        decode(bytes(head))


def test_bits_flipped_at_random_never_crash(picture: Callable[..., bytes]) -> None:
    numbers = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = picture(1, kind)
        for _ in range(40):
            data = bytearray(whole)
            for at in numbers.integers(0, len(data), 3):
                data[at] ^= 1 << int(numbers.integers(8))
            try:
                out = decode(bytes(data))
            except BadImage:
                continue
            assert out.dtype == torch.uint8
            assert out.shape[0] == 3
