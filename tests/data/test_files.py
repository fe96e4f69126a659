"""Image files outside of datasets, and DICOM files: written here with pydicom, shown as a viewer would."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vipbench.harness.data.files import image_files, read_image
from vipbench.harness.errors import UserError

pydicom = pytest.importorskip("pydicom")


def write_dicom(path: Path, pixels: np.ndarray, **elements: Any) -> None:
    """Write a DICOM file with uncompressed pixels [H, W] or [H, W, 3]."""
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=["tests"])
    file.Rows, file.Columns = pixels.shape[:2]
    file.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    file.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = 8 * pixels.itemsize
    file.HighBit, file.PixelRepresentation = file.BitsStored - 1, 0
    if pixels.ndim == 3:
        file.PlanarConfiguration = 0
    file.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(file, name, value)
    file.save_as(path, enforce_file_format=True)


def test_a_grey_image_is_windowed_as_the_file_asks(tmp_path: Path) -> None:
    pixels = np.array([[0, 100], [200, 4000]], np.uint16)
    write_dicom(tmp_path / "plain.dcm", pixels)
    assert np.asarray(read_image(tmp_path / "plain.dcm"))[..., 0].tolist() == [[0, 6], [13, 255]]
    write_dicom(tmp_path / "window.dcm", pixels, WindowCenter=100, WindowWidth=200)
    shown = np.asarray(read_image(tmp_path / "window.dcm"))[..., 0]
    assert shown[1, 1] == shown[1, 0] == 255 and shown[0, 0] == 0 and abs(int(shown[0, 1]) - 128) < 3
    write_dicom(tmp_path / "inverted.dcm", pixels, PhotometricInterpretation="MONOCHROME1")
    assert np.asarray(read_image(tmp_path / "inverted.dcm"))[..., 0].tolist() == [[255, 249], [242, 0]]


def test_what_does_not_fill_its_window_keeps_its_grey(tmp_path: Path) -> None:
    pixels = np.array([[0, 100], [200, 400]], np.uint16)
    write_dicom(tmp_path / "dark.dcm", pixels, WindowCenter=500, WindowWidth=1000)
    shown = np.asarray(read_image(tmp_path / "dark.dcm"))[..., 0].astype(int)
    assert np.abs(shown - 0.255 * pixels).max() < 1, "black is at 0 of the window and white at 1000"
    for function in ("LINEAR_EXACT", "SIGMOID"):
        write_dicom(tmp_path / "dark.dcm", pixels, WindowCenter=500, WindowWidth=1000, VOILUTFunction=function)
        assert 80 < np.asarray(read_image(tmp_path / "dark.dcm")).max() < 110
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [401, 0, 12])
    table.add_new("LUTData", "US", [*range(0, 2000, 10), *[2000] * 201])
    write_dicom(tmp_path / "table.dcm", pixels, VOILUTSequence=[table])
    assert np.asarray(read_image(tmp_path / "table.dcm"))[..., 0].tolist() == [[0, 62], [125, 125]]


def test_colours_of_a_palette(tmp_path: Path) -> None:
    palette = {
        f"{name}PaletteColorLookupTable{part}": value
        for name, entries in {"Red": b"\x00\xff", "Green": b"\x10\x20", "Blue": b"\x30\x40"}.items()
        for part, value in {"Descriptor": [2, 0, 8], "Data": entries}.items()
    }
    pixels = np.array([[0, 1], [1, 0]], np.uint8)
    write_dicom(tmp_path / "palette.dcm", pixels, PhotometricInterpretation="PALETTE COLOR", **palette)
    assert np.asarray(read_image(tmp_path / "palette.dcm"))[0].tolist() == [[0, 16, 48], [255, 32, 64]]


def test_too_many_pixels_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIPBENCH_MAX_PIXELS", "20")
    write_dicom(tmp_path / "a.dcm", np.zeros((5, 4), np.uint8))
    assert read_image(tmp_path / "a.dcm").size == (4, 5)
    write_dicom(tmp_path / "b.dcm", np.zeros((3, 7), np.uint8))
    with pytest.raises(UserError, match=r"b\.dcm: has 7 x 3 pixels, more than the 20 .*; VIPBENCH_MAX_PIXELS raises"):
        read_image(tmp_path / "b.dcm")


def test_a_colour_image_is_itself(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    write_dicom(tmp_path / "colour.dcm", pixels)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "colour.dcm")), pixels)


def test_dicom_is_known_by_its_content(tmp_path: Path) -> None:
    write_dicom(tmp_path / "IM0001", np.zeros((2, 2), np.uint8))
    assert read_image(tmp_path / "IM0001").size == (2, 2)
    data = (tmp_path / "IM0001").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(data[:-2])
    with pytest.raises(UserError, match=r"cut\.dcm: the DICOM file cannot be decoded"):
        read_image(tmp_path / "cut.dcm")


def test_without_pydicom_one_line_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dicom(tmp_path / "a.dcm", np.zeros((2, 2), np.uint8))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"a\.dcm: is a DICOM file, and pydicom is not installed: pip install pydicom"):
        read_image(tmp_path / "a.dcm")


def test_folders_give_their_images_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.JPG", "a/notes.txt", "z.dcm", "._b.png", "__MACOSX/c.png", "scan.dcm/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "._b.png").write_bytes(b"what macOS leaves beside a copy")
    (tmp_path / "scans.dcm").mkdir()
    names = [str(path.relative_to(tmp_path)) for path in image_files([tmp_path, tmp_path / "a" / "notes.txt"])]
    assert names == ["a/c.JPG", "b.png", "z.dcm", "a/notes.txt"]
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "b.png", exif=turned.getexif())
    assert read_image(tmp_path / "b.png").size == (2, 4)
