"""Image files outside of a dataset: those of a folder, and DICOM files where pydicom is installed."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vipbench.harness.data.dicom import SUFFIXES as DICOM_SUFFIXES
from vipbench.harness.data.dicom import decode, is_dicom, require_pydicom
from vipbench.harness.data.images import MAX_FILE_BYTES, SUFFIXES, BadImage, open_image, upright_rgb
from vipbench.harness.data.names import is_clutter
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import read_whole


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
    """Read an image file as upright 8-bit RGB, as `prepare` does; of a DICOM file the first frame, as a viewer shows it.

    Raises:
        UserError: it cannot be read, is damaged, no image or too large, or is DICOM and pydicom is not installed.
    """
    try:
        data = read_whole(path, MAX_FILE_BYTES)
        if is_dicom(data):
            require_pydicom(f"{path}: is a DICOM file")
            return decode(data).convert("RGB")
        return upright_rgb(open_image(data))[0]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except BadImage as error:
        raise UserError(f"{path}: {error}") from error
