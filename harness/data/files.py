"""Image files outside of a dataset: those of a folder, and DICOM files where pydicom is installed."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vipbench.harness.data.images import MAX_FILE_BYTES, SUFFIXES, BadImage, check_size, open_image, upright_rgb
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
            inside = sorted(own for own in path.rglob("*") if _is_image(own, path))
            if not inside:
                raise UserError(f"{path}: no image in this folder; files end in {', '.join(sorted(SUFFIXES))} or .dcm")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return found


def _is_image(path: Path, folder: Path) -> bool:
    known = path.suffix.lower() in (*SUFFIXES, *DICOM_SUFFIXES)
    return known and not is_clutter(path.relative_to(folder).as_posix()) and path.is_file()


def read_image(path: Path) -> Image.Image:
    """Read an image file as upright 8-bit RGB, as `prepare` does; of a DICOM file the pixels, as a viewer shows them.

    Raises:
        UserError: it cannot be read, is damaged, no image or too large, or is DICOM and pydicom is not installed.
    """
    try:
        data = read_whole(path, MAX_FILE_BYTES)
        if data[MAGIC_PLACE : MAGIC_PLACE + len(DICOM_MAGIC)] == DICOM_MAGIC:
            return _read_dicom(path, data)
        return upright_rgb(open_image(data))[0]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except BadImage as error:
        raise UserError(f"{path}: {error}") from error


def _read_dicom(path: Path, data: bytes) -> Image.Image:
    """The first frame: rescaled and windowed as the file asks (DICOM PS3.3, C.11), else from its own minimum to its maximum."""
    try:
        from pydicom import dcmread
        from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
        from pydicom.pixels.utils import pixel_array
    except ImportError as error:
        raise UserError(f"{path}: is a DICOM file, and pydicom is not installed: pip install pydicom") from error
    try:
        file = dcmread(io.BytesIO(data))
        check_size(int(file.Columns), int(file.Rows))
        pixels, interpretation = pixel_array(file, index=0), file.get("PhotometricInterpretation")
        if interpretation == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, file)
        if pixels.ndim == 3:
            return Image.fromarray(
                pixels if pixels.dtype == np.uint8 else _eight_bits(pixels, pixels.min(), pixels.max())
            )
        shown = apply_voi_lut(apply_modality_lut(pixels, file), file)
        values = _eight_bits(shown, *(_output_range(file) or (shown.min(), shown.max())))
        return Image.fromarray(255 - values if interpretation == "MONOCHROME1" else values).convert("RGB")
    except (BadImage, UserError):
        raise
    except Exception as error:  # pydicom and its decoders have no common kind of error
        raise UserError(f"{path}: the DICOM file cannot be decoded: {' '.join(str(error).split())[:200]}") from error


def _output_range(file: Any) -> tuple[float, float] | None:
    """The values that a DICOM file's window or table of values of interest gives black and white; None where it has neither."""
    from pydicom.pixels.processing import apply_windowing

    if file.get("VOILUTSequence"):
        return 0, 2 ** file.VOILUTSequence[0].LUTDescriptor[2] - 1
    if "WindowCenter" not in file or "WindowWidth" not in file:
        return None
    with np.errstate(over="ignore"):  # of a sigmoid
        black, white = apply_windowing(np.array([-1e9, 1e9]), file)
    return black, white


def _eight_bits(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Values of any type as 0 to 255, those of `black` and `white`."""
    shares = (values - float(black)) / (float(white) - float(black) or 1)
    return np.rint(255 * shares.clip(0, 1)).astype(np.uint8)
