"""Every kind of image people have, by content."""

import io
import multiprocessing
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, features

from clipcluster.data.images import truncation as jpeg
from clipcluster.data.images.decode import LARGEST, BadImage, decode

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


SMOOTH = RGB.resize((64, 48), Image.Resampling.BICUBIC)


def difference(data: bytes) -> np.ndarray:
    """Levels of 255 between our pixels and Pillow's."""
    reference = np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    return np.abs(decode(data).permute(1, 2, 0).numpy().astype(int) - reference)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_jpeg_is_close_to_pillows(mode: str, options: dict[str, object]) -> None:
    levels = difference(saved(SMOOTH.convert(mode), "JPEG", quality=95, **options))
    assert levels.mean() < 0.5
    assert levels.max() <= 2


def test_adobes_inverted_cmyk_is_upright() -> None:
    data = saved(Image.new("RGB", (16, 16), "red").convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    assert (decode(data)[:, 8, 8].int() - torch.tensor([255, 0, 0])).abs().max() <= 3


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_by_pillow() -> None:
    assert difference(saved(SMOOTH, "AVIF", quality=95)).max() == 0


@pytest.mark.parametrize("lossless", [False, True])
def test_webp_is_pillows(lossless: bool) -> None:
    assert difference(saved(SMOOTH, "WEBP", quality=90, lossless=lossless)).max() == 0


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


def test_sixteen_bit_colours_become_eight() -> None:
    """16 bits a colour: written by hand, Pillow writes no such PNG."""
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = struct.pack(">6H", 0, 128, 65535, 32768, 256, 512)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    assert (decode(data)[:, 0].T.int() - torch.tensor([[0, 0, 255], [128, 1, 2]])).abs().max() <= 1


def test_cmyk_tiff() -> None:
    assert difference(saved(SMOOTH.convert("CMYK"), "TIFF")).max() == 0


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_thousands_of_frames_cost_one(kind: str) -> None:
    count = 3000 if kind == "GIF" else 300
    frames = (Image.new("L", (200, 200), 254 - number % 200) for number in range(count))
    data = saved(Image.new("L", (200, 200), 255), kind, save_all=True, append_images=frames)
    before = _peak_kilobytes()
    assert decode(data)[0, 5, 5] == 255
    assert _peak_kilobytes() - before < 10_000  # all frames: 360 MB of a GIF, 36 MB of a WebP


def _peak_kilobytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_turns_the_image_upright(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    out = decode(saved(RGB, kind, exif=exif))
    assert out.shape == (3, 14, 10)
    if kind != "TIFF":  # Pillow turns these itself
        assert torch.equal(decode(saved(RGB, kind, exif=exif), turned=False), decode(saved(RGB, kind)))
    if kind in ("PNG", "TIFF"):
        assert torch.equal(out, expected(np.rot90(PIXELS, -1)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_is_bad(kind: str) -> None:
    data = saved(RGB, kind)
    for keep in (len(data) // 2, len(data) - 6, 5):
        with pytest.raises(BadImage) as caught:
            decode(data[:keep])
        assert 5 < len(str(caught.value)) <= 220
        assert "/" not in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("turned", [1, 6, 3])
def test_a_jpeg_cut_before_its_end_marker_is_bad(mode: str, options: dict[str, object], turned: int) -> None:
    """Decoders fill the rest with grey and only warn."""
    exif = Image.Exif()
    exif[0x0112] = turned
    whole = saved(SMOOTH.resize((160, 120)).convert(mode), "JPEG", quality=95, exif=exif, **options)
    assert decode(whole).shape[0] == 3
    first = whole.index(b"\xff\xda") + 14
    last = whole.rindex(b"\xff\xc4") if "progressive" in options else len(whole)  # before the last refinement
    for at in np.linspace(first + 20, first + 0.9 * (last - first), 5).astype(int):
        with pytest.raises(BadImage, match="truncated JPEG"):
            decode(whole[:at] + b"\xff\xd9")


def test_grey_corners_and_bytes_after_the_end_are_no_cut() -> None:
    for size in ((64, 48), (1, 1), (17, 9)):
        for options in ({}, {"progressive": True}):
            data = saved(Image.new("RGB", size, (128, 128, 128)), "JPEG", **options)
            assert torch.equal(decode(data), torch.full((3, size[1], size[0]), 128, dtype=torch.uint8))
            assert torch.equal(decode(data), decode(data + b"junk after the end" * 9))


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = saved(SMOOTH, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(BadImage, match="more than 500 scans"):
        decode(data[:-2] + data[last:-2] * 600 + data[-2:])


@given(st.binary(max_size=300), st.integers(0, 300), st.booleans())
@example(b"\0\0\0\0\xfa", 163, True)  # more components than bytes
def test_the_markers_of_any_bytes_have_an_answer(noise: bytes, at: int, progressive: bool) -> None:
    whole = saved(SMOOTH, "JPEG", quality=20, progressive=progressive)
    for data in (noise, whole[:at] + noise, whole[:at] + noise + whole[at:]):
        try:
            assert jpeg.doubtful(data) in (True, False)
            jpeg.continued(data)
        except jpeg.BrokenMarkers:
            pass


def bomb(kind: str) -> bytes:
    """A small file whose header claims 16,000 by 16,000 pixels."""
    if kind in ("PNG", "GIF", "TIFF"):
        return saved(Image.new("1", (16_000, 16_000)), kind)
    data = bytearray(saved(RGB, kind, **({"lossless": True} if kind == "WEBP" else {})))
    if kind == "JPEG":
        struct.pack_into(">HH", data, jpeg.frame_at(data) + 5, 16_000, 16_000)
    elif kind == "BMP":
        struct.pack_into("<ii", data, 18, 16_000, 16_000)
    else:
        struct.pack_into("<I", data, 21, 15_999 | 15_999 << 14)
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_bomb_is_refused_before_it_is_unpacked(kind: str) -> None:
    data = bomb(kind)
    before = _peak_kilobytes()
    with pytest.raises(BadImage, match="too many"):
        decode(data)
    assert _peak_kilobytes() - before < 60_000
    assert LARGEST < 16_000**2


def test_a_frame_larger_than_its_gif_is_measured_too() -> None:
    data = bytearray(saved(Image.new("L", (30, 20)), "GIF"))
    at = data.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 30, 20))
    struct.pack_into("<HH", data, at + 5, 16_000, 16_000)
    with pytest.raises(BadImage, match="too many"):
        decode(bytes(data))


def decode_in(megabytes: int, data: bytes, results: "multiprocessing.SimpleQueue[str]") -> None:
    """Decode with so much memory left to the process."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)
    try:
        results.put(str(decode(data).shape[1:]))
    except (MemoryError, BadImage) as error:
        results.put(type(error).__name__)


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("PNG", {"compress_level": 1})])
def test_an_image_for_which_there_is_no_memory_is_not_called_bad(kind: str, options: dict[str, int]) -> None:
    """It would be replaced by another sample, and the run would not be the same."""
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    data = saved(Image.new("RGB", (8000, 5000)), kind, **options)  # 120 MB of pixels
    for megabytes, expected_ in ((20, "MemoryError"), (2000, "torch.Size([5000, 8000])")):
        process = fork.Process(target=decode_in, args=(megabytes, data, results))
        process.start()
        assert results.get() == expected_
        process.join()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "HTML"),
        (b"\n <?xml", "HTML or XML"),
        (bytes(100), "no known kind"),
        (b"%PDF-1.4 ...", "no known kind"),
        (b"\xff\xd8\xff", "JPEG"),
        (b"II*\0" + bytes(40), "TIFF: damaged header"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIF: no decoder"),
    ],
)
def test_what_is_no_image(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(data)


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


@pytest.mark.long
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000"])
def test_damaged_files_never_crash_a_process_of_their_own(kind: str) -> None:
    """A segmentation fault in a decoder would show as a negative exit status."""
    damage = Path(__file__).with_name("damage_images.py")
    done = subprocess.run(
        [sys.executable, damage, kind, "4"], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) > 100
