"""Image files outside of a dataset: those of a folder, and DICOM files where pydicom is installed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vipbench.harness.data.images import MAX_FILE_BYTES, SUFFIXES, BadImage, open_image, upright_rgb
from vipbench.harness.data.names import is_clutter
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import read_whole

DICOM_SUFFIXES = (".dcm", ".dicom")
DICOM_MAGIC, MAGIC_PLACE = b"DICM", 128


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files among paths, and of the folders among them the images, below them too, in the order of their names.

    What file managers leave in folders, and what is hidden, is passed over.

    Raises:
        UserError: a path is not there, or a folder has no image.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            suffixes = (*SUFFIXES, *DICOM_SUFFIXES)
            inside = sorted(own for own in path.rglob("*") if own.suffix.lower() in suffixes and own.is_file())
            inside = [own for own in inside if not is_clutter(own.relative_to(path).as_posix())]
            if not inside:
                raise UserError(f"{path}: no image in this folder; files end in {', '.join(sorted(SUFFIXES))} or .dcm")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return found


def read_image(path: Path) -> Image.Image:
    """Read an image file as upright 8-bit RGB, as `prepare` does; of a DICOM file the pixels, as a viewer shows them.

    Raises:
        UserError: it cannot be read, is damaged or no image, or is DICOM and pydicom is not installed.
    """
    try:
        data = read_whole(path, MAX_FILE_BYTES)
        if data[MAGIC_PLACE : MAGIC_PLACE + len(DICOM_MAGIC)] == DICOM_MAGIC:
            return _read_dicom(path)
        return upright_rgb(open_image(data))[0]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except BadImage as error:
        raise UserError(f"{path}: {error}") from error


def _read_dicom(path: Path) -> Image.Image:
    """The first frame: rescaled and windowed as the file asks (DICOM PS3.3, C.11), else from its own minimum to its maximum."""
    try:
        from pydicom import dcmread
        from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
        from pydicom.pixels.utils import pixel_array
    except ImportError as error:
        raise UserError(f"{path}: is a DICOM file, and pydicom is not installed: pip install pydicom") from error
    try:
        file = dcmread(path)
        colour = file.get("SamplesPerPixel", 1) == 3
        pixels = pixel_array(file, index=0) if int(file.get("NumberOfFrames", 1)) > 1 else pixel_array(file)
        if colour:
            return Image.fromarray(_eight_bits(pixels) if pixels.dtype != np.uint8 else pixels)
        values = _eight_bits(apply_voi_lut(apply_modality_lut(pixels, file), file))
        inverted = file.get("PhotometricInterpretation") == "MONOCHROME1"
        return Image.fromarray(255 - values if inverted else values).convert("RGB")
    except Exception as error:  # pydicom and its decoders have no common kind of error
        raise UserError(f"{path}: the DICOM file cannot be decoded: {' '.join(str(error).split())[:200]}") from error


def _eight_bits(values: np.ndarray) -> np.ndarray:
    low, high = float(np.min(values)), float(np.max(values))
    return np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
