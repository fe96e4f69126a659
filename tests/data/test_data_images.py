"""Images as they are stored: pixel checks for every mode, metadata gone, bad files refused with a reason."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from tests.data.drawn_images import drawn
from vipbench.harness.data.decode import Picture
from vipbench.harness.data.images import BadImage, ImageFile, max_pixels, normalise
from vipbench.harness.errors import UserError


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def secret_exif(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "SECRET", orientation
    return exif


JPEG_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "progressive": {"progressive": True},
    "full chroma": {"subsampling": 0},
    "rgb coded": {"keep_rgb": True},
    "restart markers": {"restart_marker_blocks": 2},
    "no metadata": {"exif": b""},
}


@pytest.mark.parametrize("options", JPEG_VARIANTS.values(), ids=JPEG_VARIANTS.keys())
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_keeps_its_pixels_and_loses_its_metadata(mode: str, options: dict[str, Any]) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if mode == "L":
        options = {name: value for name, value in options.items() if name != "keep_rgb"}
    data = encoded(
        drawn("a", mode=mode),
        "JPEG",
        **{"exif": secret_exif(), "comment": b"SECRET", "icc_profile": profile, **options},
    )
    stored = normalise(data + b"SECRET after the end")
    assert stored.extension == "jpg"
    assert stored.changes == ()
    assert decoded(stored.data).shape == ((30, 40) if mode == "L" else (30, 40, 3))
    np.testing.assert_array_equal(decoded(stored.data), decoded(data))
    assert b"SECRET" not in stored.data
    assert b"ICC_PROFILE" not in stored.data
    assert len(stored.data) < len(data)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_png_keeps_its_pixels_and_loses_its_metadata(mode: str) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", "SECRET")
    image = drawn("a", mode=mode)
    stored = normalise(encoded(image, "PNG", pnginfo=text, exif=secret_exif()) + b"SECRET")
    assert stored.extension == "png"
    assert Image.open(io.BytesIO(stored.data)).mode == mode
    np.testing.assert_array_equal(decoded(stored.data), np.asarray(image))
    assert b"SECRET" not in stored.data


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(format: str) -> None:
    image = drawn("a")
    data = encoded(image, format, exif=secret_exif(orientation=6))
    stored = normalise(data)
    assert stored.extension == "png"
    assert "EXIF orientation" in stored.changes[0]
    np.testing.assert_array_equal(decoded(stored.data), np.rot90(decoded(data), -1))
    assert b"SECRET" not in stored.data


def test_16_bit_grey_is_windowed_by_its_own_range() -> None:
    values = np.array([[1000, 1000], [2000, 3000], [1500, 2500]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        stored = normalise(encoded(Image.fromarray(values), format))
        assert stored.extension == "png"
        expected = np.array([[0, 0], [128, 255], [64, 191]], dtype=np.uint8)
        np.testing.assert_array_equal(decoded(stored.data), np.repeat(expected[..., None], 3, axis=2))
        assert "over 8 bits" in stored.changes[0]


def test_constant_16_bit_image_is_black_and_float_is_windowed() -> None:
    constant = normalise(encoded(Image.fromarray(np.full((4, 5), 700, np.uint16)), "PNG"))
    np.testing.assert_array_equal(decoded(constant.data), np.zeros((4, 5, 3)))
    floats = normalise(encoded(Image.fromarray(np.array([[-1.0, 0.0, 1.0]], np.float32)), "TIFF"))
    np.testing.assert_array_equal(decoded(floats.data)[0, :, 0], [0, 128, 255])


def test_float_image_with_nan_is_refused() -> None:
    with pytest.raises(BadImage, match="not finite"):
        normalise(encoded(Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "TIFF"))


def test_palette_image_becomes_its_colours() -> None:
    palette = drawn("a").quantize(16)
    for format in ("PNG", "GIF", "BMP"):
        stored = normalise(encoded(palette, format))
        assert stored.extension == "png"
        np.testing.assert_array_equal(decoded(stored.data), np.asarray(palette.convert("RGB")))


def test_cmyk_jpeg_becomes_rgb() -> None:
    data = encoded(drawn("a").convert("CMYK"), "JPEG")
    stored = normalise(data)
    assert (stored.extension, stored.changes) == ("png", ("were converted from CMYK to RGB",))
    np.testing.assert_array_equal(decoded(stored.data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(decoded(stored.data).astype(int) - np.asarray(drawn("a")).astype(int)).mean() < 8  # not inverted


def test_transparent_parts_become_black() -> None:
    image = drawn("a").convert("RGBA")
    alpha = np.full((30, 40), 255, np.uint8)
    alpha[:, 20:] = 0
    image.putalpha(Image.fromarray(alpha))
    pixels = decoded(normalise(encoded(image, "PNG")).data)
    np.testing.assert_array_equal(pixels[:, :20], np.asarray(drawn("a"))[:, :20])
    assert (pixels[:, 20:] == 0).all()
    # a PNG may also name one colour transparent
    keyed = Image.fromarray(np.array([[[9, 8, 7], [200, 100, 50]]], np.uint8))
    pixels = decoded(normalise(encoded(keyed, "PNG", transparency=(200, 100, 50))).data)
    np.testing.assert_array_equal(pixels, [[[9, 8, 7], [0, 0, 0]]])


@pytest.mark.parametrize("mode", ["LA", "1"])
def test_grey_with_alpha_and_two_level_images(mode: str) -> None:
    image = drawn("a", mode="L").convert(mode)
    np.testing.assert_array_equal(decoded(normalise(encoded(image, "PNG")).data), np.asarray(image.convert("RGB")))


def test_first_frame_is_taken_and_said() -> None:
    stored = normalise(encoded(drawn("a"), "TIFF", save_all=True, append_images=[drawn("b")]))
    np.testing.assert_array_equal(decoded(stored.data), np.asarray(drawn("a")))
    assert "several frames" in stored.changes[0]


def test_same_pixels_have_one_digest_in_any_format() -> None:
    grey = drawn("a", mode="L")
    digests = {normalise(encoded(grey.convert(mode), "PNG")).pixels for mode in ("L", "RGB", "RGBA")}
    digests.add(normalise(encoded(grey, "BMP")).pixels)
    assert len(digests) == 1
    assert normalise(encoded(drawn("b"), "PNG")).pixels not in digests


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("kept", [0.2, 0.6, 0.99])
def test_truncated_jpeg_is_refused(options: dict[str, Any], kept: float) -> None:
    data = encoded(drawn("a", (200, 200)), "JPEG", quality=95, **options)
    with pytest.raises(BadImage, match=r"truncated|decoded"):
        normalise(data[: int(len(data) * kept)])


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "GIF", "WEBP"])
def test_other_truncated_files_are_refused(format: str) -> None:
    data = encoded(drawn("a", (200, 200)), format)
    with pytest.raises(BadImage):
        normalise(data[: len(data) // 2])


def test_damaged_png_pixels_are_refused() -> None:
    data = bytearray(encoded(drawn("a"), "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(BadImage, match="checksum"):
        normalise(bytes(data))


@pytest.mark.parametrize("data", [b"", b"text", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage, match="not an image"):
        normalise(data)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        ImageFile(tmp_path / "none.png").read()


def palette_with_transparency() -> tuple[Image.Image, dict[str, Any]]:
    palette = drawn("a").quantize(16)
    return palette, {"transparency": bytes([0, 128, *[255] * 14])}


def rgba() -> Image.Image:
    image = drawn("a").convert("RGBA")
    image.putalpha(drawn("b", mode="L"))
    return image


ONE_RULE: dict[str, bytes] = {
    "RGB": encoded(drawn("a"), "PNG"),
    "grey": encoded(drawn("a", mode="L"), "JPEG"),
    "RGBA": encoded(rgba(), "PNG"),
    "WebP with alpha": encoded(rgba(), "WEBP", lossless=True),
    "grey and alpha": encoded(rgba().convert("LA"), "PNG"),
    "palette": encoded(drawn("a").quantize(16), "PNG"),
    "palette with transparency": encoded(palette_with_transparency()[0], "PNG", **palette_with_transparency()[1]),
    "one transparent colour": encoded(drawn("a"), "PNG", transparency=drawn("a").getpixel((3, 3))),
    "two levels": encoded(drawn("a", mode="1"), "PNG"),
    "16 bits": encoded(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100), "PNG"),
    "CMYK": encoded(drawn("a", mode="CMYK"), "JPEG"),
    **{f"JPEG turned {turn}": encoded(drawn("a"), "JPEG", exif=secret_exif(turn)) for turn in range(1, 9)},
    "PNG turned": encoded(drawn("a"), "PNG", exif=secret_exif(8)),
    "WebP turned": encoded(drawn("a"), "WEBP", lossless=True, exif=secret_exif(5)),
    "unknown orientation": encoded(drawn("a"), "JPEG", exif=secret_exif(77)),
    "large JPEG, turned": encoded(drawn("a", (400, 300)), "JPEG", exif=secret_exif(6)),
}


@pytest.mark.parametrize("data", ONE_RULE.values(), ids=ONE_RULE.keys())
@pytest.mark.parametrize("reduction", [1, 4])
def test_external_shards_show_the_pixels_that_prepare_stores(data: bytes, reduction: int) -> None:
    stored = Image.open(io.BytesIO(normalise(data).data)).convert("RGB")
    picture = Picture(data)
    assert (picture.width, picture.height) == stored.size
    np.testing.assert_array_equal(picture.pixels(), np.asarray(stored))
    reduced = picture.pixels(reduction)
    assert abs(reduced.shape[1] / reduced.shape[0] - stored.width / stored.height) < 0.1, "as upright as the whole"


BROKEN_EXIF = {
    "noise": b"Exif\0\0" + bytes(range(200)),
    "cut off": secret_exif(6).tobytes()[:20],
    "a directory that is elsewhere": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "a value of another kind": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\xff\xff\xff\x7f\0\0\0\0",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF.keys())
@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_broken_exif_does_not_cost_the_pixels(exif: bytes, format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(drawn("a"), format, exif=exif, **options)
    expected = decoded(encoded(drawn("a"), format, **options))
    np.testing.assert_array_equal(decoded(normalise(data).data), expected)
    np.testing.assert_array_equal(Picture(data).pixels(), expected)


def test_the_limit_on_pixels_can_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(drawn("a"), "PNG")
    monkeypatch.setenv("VIPBENCH_MAX_PIXELS", "1199")
    for read in (normalise, Picture):
        with pytest.raises(BadImage, match=r"has 40 x 30 pixels, more than the 1199 .* VIPBENCH_MAX_PIXELS raises"):
            read(data)
    monkeypatch.setenv("VIPBENCH_MAX_PIXELS", "1200")
    assert normalise(data).extension == "png"
    for wrong in ("", "0", "-1", "many", "1e9", "9" * 30):
        monkeypatch.setenv("VIPBENCH_MAX_PIXELS", wrong)
        with pytest.raises(UserError, match=r"VIPBENCH_MAX_PIXELS: .* is no number of pixels"):
            max_pixels()


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_decompression_bomb_is_refused(side: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(BadImage, match="decompression bomb"):
        normalise(bomb)
