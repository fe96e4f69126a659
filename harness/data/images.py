"""Images as upright 8-bit RGB pixels, by one rule for `prepare` and for shards that others wrote; and as they are stored.

In a shard of `prepare`'s, 8-bit RGB and greyscale JPEG and PNG keep their pixel data byte for byte, without metadata. All else
becomes an RGB PNG.
"""

import hashlib
import io
import os
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from vipbench.harness.errors import UserError
from vipbench.harness.system.files import read_whole

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
OTHER_SUFFIXES = (
    ".png",
    ".tif",
    ".tiff",
    ".bmp",
    ".dib",
    ".gif",
    ".webp",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".jp2",
    ".j2k",
)
SUFFIXES = frozenset((*JPEG_SUFFIXES, *OTHER_SUFFIXES))
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "DIB", "GIF", "WEBP", "PPM", "JPEG2000")  # not EPS, which starts a program
MAX_FILE_BYTES = 1 << 30
PNG_LEVEL = 1  # of zlib: over four times as fast as its default for about 15 % more bytes

# What Pillow's decoders raise on damaged files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    NotImplementedError,
    MemoryError,
    struct.error,
    zlib.error,
)

MAX_PIXELS = "VIPBENCH_MAX_PIXELS"  # the environment variable that bounds an image's size
DEFAULT_MAX_PIXELS = 2**28 // 3  # 256 MiB of RGB
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")  # of broken EXIF data
Image.MAX_IMAGE_PIXELS = None  # Pillow's own bound, which `open_image` replaces by one that can be raised

ORIENTATION = 0x0112
TURNS = {  # by EXIF orientation; all other values count as upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # neither a stuffed byte, a restart marker nor filling
JPEG_EOI, JPEG_SOS, JPEG_APP0, JPEG_ADOBE, JPEG_COMMENT = 0xD9, 0xDA, 0xE0, 0xEE, 0xFE
JPEG_APPLICATION = range(0xE0, 0xF0)
JFIF = bytes.fromhex("ffe0 0010 4a46494600 0101 00 0001 0001 00 00")  # version 1.1, no density, no thumbnail

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_GREY_OR_RGB = (0, 2)  # colour types


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Normalised:
    """An image as it is stored.

    Attributes:
        extension: "jpg" or "png".
        data: the file's bytes.
        pixels: SHA-256 (hex) of size and RGB pixels, the same for any two files that look the same.
        changes: those made to the pixels, as phrases.
    """

    extension: str
    data: bytes
    pixels: str
    changes: tuple[str, ...] = ()


class StoredImage(Protocol):
    """An image of a source. It travels to the process that decodes it, and is read there."""

    def read(self) -> bytes:
        """The bytes of an image file. Raises BadImage where there are none."""


@dataclass(frozen=True)
class ImageFile:
    """An image file on disk."""

    path: Path

    def read(self) -> bytes:
        """The file's bytes. Raises BadImage where it cannot be read."""
        try:
            return read_whole(self.path, MAX_FILE_BYTES)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class ImageBytes:
    """The bytes of an image file, which something else holds."""

    data: bytes

    def read(self) -> bytes:
        """The bytes as they are."""
        return self.data


def png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def max_pixels() -> int:
    """The most pixels that an image may have. Raises UserError where the environment variable is no positive number."""
    text = os.environ.get(MAX_PIXELS, str(DEFAULT_MAX_PIXELS))
    if not re.fullmatch(r"[0-9]{1,15}", text) or not int(text):
        raise UserError(f"{MAX_PIXELS}: {text[:50]!r} is no number of pixels; the default is {DEFAULT_MAX_PIXELS}")
    return int(text)


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Read an image file's header.

    Raises:
        BadImage: no image of these formats, damaged, or too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        raise BadImage(f"is not an image of a known format ({', '.join(formats)})") from error
    except DECODE_ERRORS as error:
        raise BadImage(f"cannot be decoded: {error}") from error
    check_size(image.width, image.height)
    return image


def check_size(width: int, height: int) -> None:
    """Raise BadImage for an image of too many pixels, before they are decoded."""
    if width * height > max_pixels():
        raise BadImage(
            f"has {width} x {height} pixels, more than the {max_pixels()} that are taken for no decompression bomb; "
            f"{MAX_PIXELS} raises the limit"
        )


def orientation(image: Image.Image) -> int:
    """An image's EXIF orientation, 2 to 8, without decoding its pixels; 1 where it is upright or the EXIF data are broken."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        value = exif.get(ORIENTATION, 1)
        return int(value) if value in TURNS else 1
    except DECODE_ERRORS:
        return 1


def upright_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """An opened image as upright 8-bit RGB, and the changes to its pixels, as phrases.

    16-bit, 32-bit and float greyscale are windowed linearly from the image's own minimum and maximum to 0..255; what is
    transparent becomes black; of several frames the first is taken; an EXIF orientation is applied. 16-bit colour keeps
    its high bytes, which is all that Pillow reads. Colour profiles are not applied.

    Raises:
        BadImage: damaged, truncated, or values that are not finite.
    """
    try:
        changes = _several_frames(image)
        if turn := TURNS.get(orientation(image)):
            image = image.transpose(turn)
            changes.append("were turned as their EXIF orientation says")
        rgb, change = _to_rgb(image)
    except BadImage:
        raise
    except DECODE_ERRORS as error:
        raise BadImage(f"cannot be decoded: {error}") from error
    return rgb, changes + ([change] if change else [])


def normalise(data: bytes) -> Normalised:
    """Decode an image file's bytes and return the form that is stored. Raises BadImage as `open_image` and `upright_rgb` do."""
    image = open_image(data)
    if orientation(image) == 1 and (stored := _without_metadata(image, data)):
        rgb, _ = upright_rgb(open_image(stored))  # so that what is decoded here is what is stored
        extension = "jpg" if stored.startswith(JPEG_START) else "png"
        return Normalised(extension, stored, _pixel_digest(rgb), tuple(_several_frames(image)))
    rgb, changes = upright_rgb(image)
    return Normalised("png", png(rgb), _pixel_digest(rgb), tuple(changes))


def _several_frames(image: Image.Image) -> list[str]:
    several = image.format != "MPO" and getattr(image, "n_frames", 1) > 1  # an MPO's other frames are previews
    return ["hold several frames: the first was taken"] if several else []


def _without_metadata(image: Image.Image, data: bytes) -> bytes | None:
    """The file's bytes without metadata, or None where the image must be stored in another form."""
    if image.mode not in ("L", "RGB"):
        return None
    if image.format in ("JPEG", "MPO"):
        return strip_jpeg(data)
    if image.format == "PNG" and "transparency" not in image.info:
        depth, colour = data[24], data[25]
        return strip_png(data) if depth == 8 and colour in PNG_GREY_OR_RGB else None
    return None


def strip_jpeg(data: bytes) -> bytes:
    """A JPEG file's first image with only the segments that its decoding needs; the scans stay byte for byte.

    Application segments (EXIF, XMP, colour profile, thumbnails) and comments go, and so does what follows the image's
    end. The Adobe segment stays since it says how colours are coded; JFIF is replaced by a bare one. ITU T.81, annex B.
    """
    kept, position = [JPEG_START], len(JPEG_START)
    while match := JPEG_MARKER.search(data, position):
        start, marker = match.start(), data[match.start() + 1]
        if marker == JPEG_EOI:
            return b"".join([*kept, JPEG_END])
        position = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker == JPEG_SOS:
            following = JPEG_MARKER.search(data, position)
            position = following.start() if following else len(data)
        if marker == JPEG_APP0 and data[start + 4 : start + 9] == b"JFIF\0":
            kept.append(JFIF)
        elif marker == JPEG_ADOBE or marker not in (*JPEG_APPLICATION, JPEG_COMMENT):
            kept.append(data[start:position])
    raise BadImage("is truncated: the JPEG has no end")


def strip_png(data: bytes) -> bytes:
    """A PNG file with only its critical chunks, whose checksums are verified (Pillow skips those of pixel data)."""
    kept, position = [PNG_START], len(PNG_START)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            break
        if kind[:1].isupper():
            if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                raise BadImage(f"is damaged: the checksum of its {kind.decode('ascii', 'replace')} chunk is wrong")
            kept.append(data[position:end])
        if kind == b"IEND":
            return b"".join(kept)
        position = end
    raise BadImage("is truncated: the PNG has no end")


def _to_rgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """An image of any mode as RGB, and the change that this made to its pixels, as a phrase."""
    if image.mode.startswith(("I", "F")):
        return _window(image).convert("RGB"), "have over 8 bits: windowed from their own minimum and maximum to 8 bits"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB"), "have transparency: put on black"
    change = f"were converted from {image.mode} to RGB" if image.mode not in ("L", "RGB", "1") else None
    return image.convert("RGB"), change


def _window(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite([low, high]).all():
        raise BadImage("holds values that are not finite")
    scaled = (values - low) * (255 / (high - low) if high > low else 0)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _pixel_digest(rgb: Image.Image) -> str:
    return hashlib.sha256(b"%dx%d:" % rgb.size + rgb.tobytes()).hexdigest()
