"""An image file of a shard as pixels: JPEGs by simplejpeg, which gives Pillow's pixels sooner, all else by Pillow."""

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from harness.data.images import DECODE_ERRORS, JPEG_START, BadImage

FORMATS = ("JPEG", "PNG", "WEBP")  # of a shard's images
COLOURS = ("Gray", "YCbCr", "RGB")  # of JPEGs that simplejpeg turns into RGB; those of four colours are Pillow's


class Picture:
    """An image file whose pixels are decoded when they are asked for.

    Attributes:
        width, height: of the whole image in pixels.
        mode: Pillow's name of what a pixel is.

    Raises:
        BadImage: it is no JPEG, PNG or WebP file, or holds more pixels than Pillow takes.
    """

    def __init__(self, data: bytes) -> None:
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header
        except UnidentifiedImageError as error:
            raise BadImage("it is no JPEG, PNG or WebP image") from error
        except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
            raise BadImage(f"it cannot be decoded: {error}") from error
        self.data, (self.width, self.height), self.mode, self._image = data, image.size, image.mode, image

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """[H, W, 3] uint8 RGB, the same as Pillow's.

        Args:
            reduction: 2, 4 or 8 gives a JPEG with that part of its width and height, rounded up: the decoder then leaves out what
                is finer, which saves most of the time. Other files stay whole.

        Raises:
            BadImage: it cannot be decoded.
        """
        try:
            if self.data.startswith(JPEG_START):
                try:
                    return self._jpeg(reduction)
                except ValueError:
                    pass  # damaged or of four colours: Pillow's to judge
            return np.asarray(self._image.convert("RGB"))
        except DECODE_ERRORS as error:
            raise BadImage(f"it cannot be decoded: {error}") from error

    def _jpeg(self, reduction: int) -> np.ndarray:
        if simplejpeg.decode_jpeg_header(self.data)[2] not in COLOURS:
            raise ValueError("four colours")
        width, height = -(-self.width // reduction), -(-self.height // reduction)  # rounded up
        return simplejpeg.decode_jpeg(self.data, colorspace="RGB", min_width=width, min_height=height)
