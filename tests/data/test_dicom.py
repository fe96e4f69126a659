"""DICOM files into datasets: pydicom's own test files, and files written here whose every element could identify somebody."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.data.test_files import write_dicom
from vipbench.harness.cli import app
from vipbench.harness.data.dicom import TAGS, DicomImage, Window, parse_frame, parse_window
from vipbench.harness.data.images import BadImage
from vipbench.harness.data.importers import dicom
from vipbench.harness.data.pseudonyms import load_key, make_key, pseudonym
from vipbench.harness.data.reader import Dataset, Samples
from vipbench.harness.errors import UserError

pydicom = pytest.importorskip("pydicom")
FILES = Path(pydicom.__file__).parent / "data" / "test_files"  # of the installed package; nothing is downloaded
REAL = (
    "CT_small.dcm",
    "MR_small.dcm",
    "MR_small_RLE.dcm",
    "JPEG2000.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
    "examples_palette.dcm",
)
KEY = bytes(range(32))


def call(*arguments: object) -> str:
    """Run `vipbench prepare --format dicom`; returns its output, or its error."""
    command = ["prepare", *map(str, arguments), "--format", "dicom", "--workers", "1"]
    result = CliRunner().invoke(app, command)
    return str(result.exception) if result.exception else result.output


def texts(file: Any) -> Iterator[str]:
    """All text that a file's elements hold, in sequences and private elements too."""
    for element in file.iterall():
        values = element.value if isinstance(element.value, list | pydicom.multival.MultiValue) else [element.value]
        for value in values:
            if isinstance(value, bytes) and element.keyword not in ("PixelData",):
                value = value.decode("latin-1").strip("\0 ")
            if isinstance(value, str | pydicom.valuerep.PersonName):
                yield str(value).strip()


def written(folder: Path) -> str:
    """All that a dataset's files hold, as text: tables and members of shards too."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        found += [path.name, data.decode("latin-1")]
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            found += [str(table.schema.metadata), *map(str, table.to_pylist())]
        if path.suffix == ".tar":
            with tarfile.open(path) as shard:
                found += [member.name for member in shard]
    return "\n".join(found)


def identifying(text: str) -> bool:
    """Return True for a text that is in no digest or tar header by chance."""
    return len(set(text)) > 2 and len(text) >= (8 if text.isdigit() else 5)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pydicom's test files in two classes, of which three hold no image; their names hold patients' names."""
    root = tmp_path_factory.mktemp("real")
    for number, name in enumerate((*REAL, "rtplan.dcm", "test-SR.dcm", "reportsi.dcm")):
        file = root / "in" / "ab"[number % 2] / f"CompressedSamples {name}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((FILES / name).read_bytes())
    return root / "in"


def test_no_identifying_value_is_in_any_output_file(real: Path, tmp_path: Path) -> None:
    kept = ",".join([*TAGS, "study"])
    output = call(real, "--out", tmp_path / "data", "--metadata", kept, "--val-fraction", 0, "--test-fraction", 0.3)
    dataset = Dataset(tmp_path / "data")
    samples = [dataset.split(split) for split in dataset.info.splits]
    assert sum(map(len, samples)) == len(REAL)
    assert "3 DICOM files hold no image and were left out" in output
    values = {text for path in real.rglob("*.dcm") for text in texts(pydicom.dcmread(path, force=True))}
    values |= {path.stem for path in real.rglob("*.dcm")} | {"CompressedSamples"}
    held = {str(value) for part in samples for column in part.groups.values() for value in column}
    secret = {value for value in values - held if identifying(value)}
    assert len(secret) > 100 and "CompressedSamples^CT1" in secret, "the files do name patients"
    content = written(tmp_path / "data")
    assert not [value for value in secret if value in content]
    assert load_key(tmp_path / "data.key").hex() not in content
    assert (tmp_path / "data.key").stat().st_mode & 0o077 == 0, "the key is its owner's"


def test_skipped_and_repeated_files_give_nothing_away(tmp_path: Path) -> None:
    source = tmp_path / "in" / "a"
    source.mkdir(parents=True)
    for number in range(3):
        write_dicom(source / f"DOE^JANE {number}.dcm", np.full((3, 3), number % 2, np.uint8), PatientID="DOE-JANE-7")
    (source / "DOE^JANE notes.doe").write_text("DOE")
    (source / "DOE^JANE 3.dcm").write_bytes((source / "DOE^JANE 0.dcm").read_bytes()[:-3])
    for path in source.glob("*.dcm"):  # the writer gives all one instance
        file = pydicom.dcmread(path)
        file.SOPInstanceUID = f"1.2.3.{path.stem[-1]}"
        file.save_as(path)
    output = call(
        source.parent, "--out", tmp_path / "data", "--on-error", "skip", "--test-fraction", 0, "--val-fraction", 0
    )
    assert "note: skipped " in output and "identical images" in output
    assert (tmp_path / "data" / "leaks.csv").is_file()
    assert "DOE" not in written(tmp_path / "data") and "1.2.3." not in written(tmp_path / "data")


def test_what_pydicom_reports_of_values_is_not_shown(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "in" / "a"
    source.mkdir(parents=True)
    for number in range(2):
        with pydicom.config.disable_value_validation():
            write_dicom(
                source / f"{number}.dcm",
                np.full((3, 3), number, np.uint8),
                PatientID="DOE^JANE" * 20,
                StudyInstanceUID="DOE^JANE",
                NumberOfFrames="1",
            )
    damaged = source / "1.dcm"
    content = damaged.read_bytes()
    assert content.count(b"IS\x02\x001 ") == 1
    damaged.write_bytes(content.replace(b"IS\x02\x001 ", b"IS\x08\x00DOE^JANE"))
    options = ("--metadata", "study", "--test-fraction", 0, "--val-fraction", 0)
    output = call(source.parent, "--out", tmp_path / "data", *options)
    assert "1.dcm: the DICOM file cannot be decoded: a value in its header is wrong" in output
    output += call(source.parent, "--out", tmp_path / "data", *options, "--on-error", "skip")
    assert "note: skipped " in output
    reported = [output, caplog.text, *(str(warning.message) for warning in recwarn)]
    assert not [text for text in reported if "DOE" in text]
    assert "DOE" not in written(tmp_path / "data")


def test_patients_are_the_same_under_one_key_and_never_across_splits(tmp_path: Path) -> None:
    for patient in range(5):
        for number in range(2):
            place = tmp_path / "in" / "ab"[number] / f"{patient}.dcm"
            place.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((3, 3), 10 * patient + number, np.uint8)
            write_dicom(
                place,
                pixels,
                PatientID=f"P{patient}",
                StudyInstanceUID=f"1.2.{patient}",
                SOPInstanceUID=f"1.{patient}.{number}",
            )
    key = tmp_path / "key"
    key.write_text(KEY.hex())
    splits: dict[str, dict[str, set[Any]]] = {}
    for name in ("one", "two"):
        call(tmp_path / "in", "--out", tmp_path / name, "--pseudonym-key", key, "--metadata", "study")
        dataset = Dataset(tmp_path / name)
        splits[name] = {split: set(dataset.split(split).patients) for split in dataset.info.splits}
        assert not (tmp_path / f"{name}.key").exists()
    assert splits["one"] == splits["two"]
    members = list(splits["one"].values())
    assert set.union(*members) == {pseudonym(KEY, "patient", f"P{number}") for number in range(5)}
    assert sum(map(len, members)) == 5, "no patient is in two splits"
    studies = {study for split in members for study in Dataset(tmp_path / "one").split("train").groups["study"]}
    assert studies <= {pseudonym(KEY, "study", f"1.2.{number}") for number in range(5)}


def test_a_manifest_lists_labels_and_patients(tmp_path: Path) -> None:
    for number in range(2):
        write_dicom(
            tmp_path / f"{number}", np.full((2, 2), number, np.uint8), PatientID="x", SOPInstanceUID=f"1.{number}"
        )
    (tmp_path / "all.csv").write_text("path,label,patient,site\n0,mel,7,north\n1,nev,,south\n")
    source = dicom.read(tmp_path / "all.csv", metadata=("site", "Modality"), key=KEY)
    assert source.classes == ["mel", "nev"]
    assert [record.patient for record in source.records] == [pseudonym(KEY, "patient", name) for name in ("7", "x")]
    assert [dict(record.metadata) for record in source.records] == [
        {"site": "north", "Modality": None},
        {"site": "south", "Modality": None},
    ]
    (tmp_path / "1").write_bytes((FILES / "rtplan.dcm").read_bytes())
    with pytest.raises(UserError, match="1: holds no image; take it out of the manifest"):
        dicom.read(tmp_path / "all.csv", key=KEY)


@pytest.mark.parametrize("name", ["PatientName", "StudyDate", "InstitutionName", "AccessionNumber", "StudyInstanceUID"])
def test_elements_that_may_identify_are_refused_as_metadata(name: str, real: Path) -> None:
    with pytest.raises(UserError, match=f"--metadata: {name} may identify a patient; .* study, Modality"):
        dicom.read(real, metadata=(name,), key=KEY)


def test_values_that_no_code_has_are_left_out(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2), np.uint8)
    (tmp_path / "a").mkdir()
    elements = {"BodyPartExamined": "Doe, Jane", "PatientAge": "093Y", "PatientSex": "F", "ViewPosition": "PA"}
    with pydicom.config.disable_value_validation():
        write_dicom(tmp_path / "a" / "1.dcm", pixels, **elements)
        (record,) = dicom.read(tmp_path, metadata=tuple(elements), key=KEY).records
    assert record.metadata == {
        "BodyPartExamined": None,
        "PatientAge": "over 89",
        "PatientSex": "F",
        "ViewPosition": "PA",
    }


@pytest.mark.parametrize(
    ("value", "counts"), [("YES", "1 files say so, 0 say"), (None, "0 files say so, 1 say"), ("NO", "")]
)
def test_burned_in_annotation_is_warned_of(value: str | None, counts: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_dicom(
        tmp_path / "a" / "1.dcm", np.zeros((2, 2), np.uint8), **({"BurnedInAnnotation": value} if value else {})
    )
    notes = " ".join(dicom.read(tmp_path, key=KEY).notes)
    assert (f"text may be burned into the pixels, which nothing here removes: {counts}" in notes) == bool(counts)


def pixels_of(image: DicomImage) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image.read())))


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_shown(name: str) -> None:
    file = pydicom.dcmread(FILES / name)
    shown = pixels_of(DicomImage(FILES / name))
    assert shown.shape[:2] == (file.Rows, file.Columns)
    assert (shown.ndim == 3) == (file.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"))
    assert shown.max() - shown.min() > 100


def test_a_compressed_file_shows_what_its_original_does() -> None:
    np.testing.assert_array_equal(
        pixels_of(DicomImage(FILES / "MR_small.dcm")), pixels_of(DicomImage(FILES / "MR_small_RLE.dcm"))
    )


def test_a_syntax_without_decoder_is_named() -> None:
    with pytest.raises(BadImage, match=r"cannot be decoded: .*JPEG-LS"):
        DicomImage(FILES / "MR_small_jpeg_ls_lossless.dcm").read()


def test_a_window_is_of_values_after_the_rescale_slope() -> None:
    file = pydicom.dcmread(FILES / "CT_small.dcm")
    values = file.pixel_array * file.RescaleSlope + file.RescaleIntercept
    shown = pixels_of(DicomImage(FILES / "CT_small.dcm", window=Window(40, 400)))
    expected = np.clip((values + 160) / 400, 0, 1) * 255
    assert np.abs(shown - expected).max() <= 0.51


def test_frames(tmp_path: Path) -> None:
    several = FILES / "SC_rgb_rle_2frame.dcm"
    first, second = (pixels_of(DicomImage(several, frame)) for frame in ("1", "2"))
    assert (first != second).any()
    np.testing.assert_array_equal(pixels_of(DicomImage(several)), first)
    np.testing.assert_array_equal(pixels_of(DicomImage(several, "middle")), second)
    with pytest.raises(BadImage, match="has 2 frames, and no frame 3"):
        DicomImage(several, "3").read()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.dcm").write_bytes(several.read_bytes())
    assert (
        "1 files hold several frames: frame 'middle' was taken" in dicom.read(tmp_path, key=KEY, frame="middle").notes
    )


@pytest.mark.parametrize("text", ["", "0", "last", "1.5", "-1"])
def test_wrong_frames_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--frame"):
        parse_frame(text)


@pytest.mark.parametrize("text", ["", "40", "40,0", "40,-1", "a,b", "nan,4", "1,2,3"])
def test_wrong_windows_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--window"):
        parse_window(text)


def test_keys(tmp_path: Path) -> None:
    key = make_key(tmp_path / "new" / "key")
    assert len(key) == 32 and make_key(tmp_path / "new" / "key") == key != make_key(tmp_path / "other")
    assert len({pseudonym(key, kind, name) for kind in ("patient", "study") for name in ("1", "2")}) == 4
    assert pseudonym(key, "patient", "1") != pseudonym(KEY, "patient", "1")
    (tmp_path / "short").write_text("abcd")
    for name, message in (("short", "not a key"), ("none", "cannot be read")):
        with pytest.raises(UserError, match=message):
            load_key(tmp_path / name)
    (tmp_path / "in" / "a").mkdir(parents=True)
    Image.new("L", (2, 2)).save(tmp_path / "in" / "a" / "1.png")
    command = ["prepare", str(tmp_path / "in"), "--out", str(tmp_path / "x")]
    for option, value in (
        ("--pseudonym-key", tmp_path / "other"),
        ("--frame", "2"),
        ("--window", "1,2"),
        ("--label-column", "x"),
    ):
        assert option in str(CliRunner().invoke(app, [*command, option, str(value)]).exception)


def test_the_key_is_beside_a_dataset_that_is_the_working_directory(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    call(real, "--out", ".", "--overwrite", "--test-fraction", 0, "--val-fraction", 0)
    assert Dataset(tmp_path / "data").info.name == "data"
    assert load_key(tmp_path / "data.key") and not list((tmp_path / "data").glob("*.key"))


def test_shards_of_grey_files_hold_grey_pictures(real: Path, tmp_path: Path) -> None:
    call(real, "--out", tmp_path / "data", "--test-fraction", 0, "--val-fraction", 0)
    samples: Samples = Dataset(tmp_path / "data").split("train")
    modes = {Image.open(io.BytesIO(samples.image_bytes(position))).mode for position in range(len(samples))}
    assert modes == {"L", "RGB"}
    assert json.loads((tmp_path / "data" / "dataset.json").read_text())["classes"] == ["a", "b"]
