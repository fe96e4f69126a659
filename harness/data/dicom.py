"""DICOM files: the pixels as a viewer shows them, and the few elements of the header that are read. pydicom is optional."""

import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vipbench.harness.data.images import MAX_FILE_BYTES, BadImage, check_size, png
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import read_whole

SUFFIXES = (".dcm", ".dicom")
MAGIC, MAGIC_PLACE = b"DICM", 128
OLDEST = 89  # years; an age above tells too much

# Elements that may become metadata: codes and ages (value representations CS and AS), which hold no free text.
TAGS = (
    "Modality",
    "BodyPartExamined",
    "ViewPosition",
    "Laterality",
    "ImageLaterality",
    "PatientSex",
    "PatientAge",
)
CODE, AGE = re.compile(r"[A-Z0-9 _]{1,16}"), re.compile(r"([0-9]{3})[DWMY]")
IDENTITIES = ("PatientID", "StudyInstanceUID", "SOPInstanceUID")
READ = (*TAGS, *IDENTITIES, "Rows", "Columns", "NumberOfFrames", "BurnedInAnnotation")


class Window(NamedTuple):
    """The values that are shown: from center - width / 2, black, to center + width / 2, white; after the rescale slope."""

    center: float
    width: float


@dataclass(frozen=True)
class Header:
    """Elements of a file that holds an image.

    Attributes:
        patient, study, image: ids as the file has them, which must not be stored; None where it has none.
        tags: values of `TAGS`, None where the file has none or another than the element's kind allows.
        frames: how many images the file holds. burned_in: its word on text in the pixels, "YES", "NO" or "".
    """

    patient: str | None
    study: str | None
    image: str | None
    tags: Mapping[str, str | None]
    frames: int
    burned_in: str


@dataclass(frozen=True)
class DicomImage:
    """One frame of a DICOM file.

    Attributes:
        frame: "first", "middle" or a number from 1. window: the values to show; None: as the file asks.
    """

    path: Path
    frame: str = "first"
    window: Window | None = None

    def read(self) -> bytes:
        """The frame as a PNG file. Raises BadImage where it cannot be decoded."""
        try:
            return png(decode(read_whole(self.path, MAX_FILE_BYTES), self.frame, self.window))
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error


def is_dicom(data: bytes) -> bool:
    """Return True for the first bytes of a DICOM file."""
    return data[MAGIC_PLACE : MAGIC_PLACE + len(MAGIC)] == MAGIC


def is_dicom_file(path: Path) -> bool:
    """Return True for a file of DICOM's suffix or with its mark. Raises OSError."""
    if path.suffix.lower() in SUFFIXES:
        return True
    with path.open("rb") as file:
        return is_dicom(file.read(MAGIC_PLACE + len(MAGIC)))


def require_pydicom(what: str) -> None:
    """Raise UserError where pydicom is not installed."""
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise UserError(f"{what}, and pydicom is not installed: pip install pydicom") from error


@contextmanager
def _reading(problem: str) -> Iterator[None]:
    """Keep what pydicom reports to itself where it may quote values of elements, since those may identify somebody.

    Its warnings do, and its errors unless they are of a decoder or a missing element, whose message is kept.

    Raises:
        BadImage: the file is damaged; it begins with the problem.
    """
    from pydicom import config

    logger = logging.getLogger("pydicom")
    propagated, logger.propagate = logger.propagate, False
    try:
        with warnings.catch_warnings(), config.disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    except (BadImage, UserError):
        raise
    except Exception as error:  # pydicom and its decoders have no common kind of error
        reason = f"a value in its header is wrong, or the file is cut off ({type(error).__name__})"
        if isinstance(error, RuntimeError | AttributeError):
            reason = " ".join(str(error).split())[:400]
        raise BadImage(f"{problem}: {reason}") from error
    finally:
        logger.propagate = propagated


def read_header(path: Path) -> Header | None:
    """Read a file's header, without its pixels; None where it holds no image.

    Raises:
        BadImage: it is no DICOM file, or damaged.
    """
    from pydicom import dcmread

    with _reading("the DICOM file cannot be read"):
        file = dcmread(path, force=True, stop_before_pixels=True, specific_tags=list(READ))
        if not file.get("Rows") or not file.get("Columns"):
            return None
        patient, study, image = (str(file.get(name) or "").strip() or None for name in IDENTITIES)
        tags = {name: _tag(name, str(file.get(name) or "").strip()) for name in TAGS}
        return Header(
            patient, study, image, tags, int(file.get("NumberOfFrames") or 1), str(file.get("BurnedInAnnotation") or "")
        )


def _tag(name: str, value: str) -> str | None:
    """A value that its element's kind allows: a code, or an age of which those above `OLDEST` years are one."""
    if name != "PatientAge":
        return value if CODE.fullmatch(value) else None
    age = AGE.fullmatch(value)
    if age and value.endswith("Y") and int(age[1]) > OLDEST:
        return f"over {OLDEST}"
    return value if age else None


def decode(data: bytes, frame: str = "first", window: Window | None = None) -> Image.Image:
    """A frame as 8-bit grey or RGB: rescaled and windowed (DICOM PS3.3, C.11), MONOCHROME1 inverted.

    Without a window in the file its values are shown from their minimum to their maximum.

    Args:
        frame, window: as `DicomImage` has them.

    Raises:
        BadImage: it cannot be decoded, has too many pixels or no such frame. UserError: pydicom is not installed.
    """
    require_pydicom("is a DICOM file")
    from pydicom import dcmread
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
    from pydicom.pixels.utils import pixel_array

    with _reading("the DICOM file cannot be decoded"):
        file = dcmread(io.BytesIO(data), force=True)
        check_size(int(file.Columns), int(file.Rows))
        pixels = pixel_array(file, index=_frame(frame, int(file.get("NumberOfFrames") or 1)))
        interpretation = file.get("PhotometricInterpretation")
        if interpretation == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, file)
        if pixels.ndim == 3:
            eight_bits = pixels if pixels.dtype == np.uint8 else _eight_bits(pixels, pixels.min(), pixels.max())
            return Image.fromarray(eight_bits)
        _set_window(file, window)
        shown = apply_voi_lut(apply_modality_lut(pixels, file), file)
        values = _eight_bits(shown, *(_output_range(file) or (shown.min(), shown.max())))
        return Image.fromarray(255 - values if interpretation == "MONOCHROME1" else values)


def _frame(frame: str, frames: int) -> int:
    """The position of a frame among those of the file. Raises BadImage where there is none."""
    if frame in ("first", "middle"):
        return frames // 2 if frame == "middle" else 0
    if not 1 <= int(frame) <= frames:
        raise BadImage(f"has {frames} frame{'s' if frames > 1 else ''}, and no frame {frame}")
    return int(frame) - 1


def _set_window(file: Any, window: Window | None) -> None:
    """Replace the file's window by another, and drop one that it left empty."""
    if window is not None:
        file.WindowCenter, file.WindowWidth, file.VOILUTFunction = window.center, window.width, "LINEAR_EXACT"
        file.pop("VOILUTSequence", None)
    elif any(file.get(name) in (None, "") for name in ("WindowCenter", "WindowWidth")):
        for name in ("WindowCenter", "WindowWidth"):
            file.pop(name, None)


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


def parse_frame(text: str) -> str:
    """The value of `--frame`. Raises UserError where it is none."""
    if text in ("first", "middle") or (re.fullmatch(r"[0-9]{1,9}", text) and int(text) > 0):
        return text
    raise UserError(f"--frame: {text[:50]!r}; it should be first, middle or a number from 1")


def parse_window(text: str) -> Window:
    """The value of `--window`, "CENTER,WIDTH". Raises UserError where it is none."""
    try:
        center, width = map(float, text.split(","))
    except ValueError:
        center, width = 0.0, 0.0
    if not (np.isfinite([center, width]).all() and width > 0):
        raise UserError(f"--window: {text[:50]!r}; it should be CENTER,WIDTH, such as -600,1500 for lungs in CT")
    return Window(center, width)


def check_tags(names: Sequence[str]) -> None:
    """Raise UserError for an element of DICOM that must not become metadata."""
    from pydicom.datadict import tag_for_keyword

    for name in names:
        if name not in TAGS and tag_for_keyword(name) is not None:
            raise UserError(
                f"--metadata: {name} may identify a patient; of a DICOM file there may be study, {', '.join(TAGS)}"
            )
