"""An image file of a shard as pixels: JPEGs by simplejpeg, which gives Pillow's pixels sooner, all else by Pillow."""

import numpy as np
import simplejpeg

from vipbench.harness.data.images import JPEG_START, open_image, orientation, upright_rgb

FORMATS = ("JPEG", "PNG", "WEBP")  # of a shard's images
COLOURS = ("Gray", "YCbCr", "RGB")  # of JPEGs that simplejpeg turns into RGB; those of four colours are Pillow's
LYING = range(5, 9)  # EXIF orientations that swap width and height


class Picture:
    """An image file whose pixels are decoded when they are asked for, by the rule of `vipbench.harness.data.images.upright_rgb`.

    Attributes:
        width, height: of the whole upright image in pixels.

    Raises:
        BadImage: it is no JPEG, PNG or WebP file, or holds more pixels than are taken.
    """

    def __init__(self, data: bytes) -> None:
        self._image = open_image(data, FORMATS)  # reads the header
        self._orientation = orientation(self._image)
        width, height = self._image.size
        self.data, self.width, self.height = data, width, height
        if self._orientation in LYING:
            self.width, self.height = height, width

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """[H, W, 3] uint8 RGB, the same as Pillow's.

        Args:
            reduction: 2, 4 or 8 gives an upright JPEG with that part of its width and height, rounded up: the decoder then leaves
                out what is finer, which saves most of the time. Other files stay whole.

        Raises:
            BadImage: it cannot be decoded.
        """
        if self.data.startswith(JPEG_START) and self._orientation == 1:
            try:
                return self._jpeg(reduction)
            except ValueError:
                pass  # damaged or of four colours: Pillow's to judge
        return np.asarray(upright_rgb(self._image)[0])

    def _jpeg(self, reduction: int) -> np.ndarray:
        if simplejpeg.decode_jpeg_header(self.data)[2] not in COLOURS:
            raise ValueError("four colours")
        width, height = -(-self.width // reduction), -(-self.height // reduction)  # rounded up
        return simplejpeg.decode_jpeg(self.data, colorspace="RGB", min_width=width, min_height=height)
