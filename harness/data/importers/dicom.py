"""DICOM files, in class folders or listed in a manifest. Pixels and chosen codes survive, and no name, id or date.

Headers are read when the files are listed. Sample ids, patients and studies are pseudonyms (harness/data/pseudonyms.py).
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vipbench.harness.data.dicom import (
    TAGS,
    DicomImage,
    Header,
    Window,
    check_tags,
    is_dicom_file,
    read_header,
    require_pydicom,
)
from vipbench.harness.data.images import BadImage
from vipbench.harness.data.importers import csv
from vipbench.harness.data.importers.base import Record, Source
from vipbench.harness.data.importers.folder import list_folder
from vipbench.harness.data.pseudonyms import pseudonym
from vipbench.harness.errors import UserError
from vipbench.harness.system.progress import Progress

log = logging.getLogger(__name__)

STUDY = "study"


def read(
    source: Path,
    classes: list[str] | None = None,
    image_root: Path | None = None,
    metadata: Sequence[str] = (),
    *,
    key: bytes,
    frame: str = "first",
    window: Window | None = None,
) -> Source:
    """List the DICOM files of SOURCE/<split>/<class>/..., SOURCE/<class>/... or a manifest (see csv.py).

    Patients are those of the manifest, else the files' PatientID.

    Args:
        metadata: "study", elements of `TAGS`, or columns of the manifest, which are stored as they stand.
        key: of the pseudonyms.
        frame, window: as `DicomImage` has them.

    Raises:
        UserError: pydicom is not installed, an element may identify a patient, a file of a manifest holds no image, or as the
            folder's and the manifest's importers do.
    """
    require_pydicom("--format dicom reads DICOM files")
    check_tags(metadata)
    tags, columns = ([name for name in metadata if (name in (STUDY, *TAGS)) is own] for own in (True, False))
    if source.is_dir():
        if columns:
            raise UserError(
                f"--metadata: {columns[0]!r} is no element of the files; there are study, {', '.join(TAGS)}"
            )
        listed = list_folder(source, classes, image_root, is_dicom_file)
    else:
        listed = csv.read(source, classes, image_root, columns)
    for note in listed.notes:  # not stored, since suffixes may be parts of names
        log.info("%s", note)
    headers = _headers(listed.records, skip=source.is_dir())
    copies = Counter(header.image for _, header in headers)
    records = [_record(record, header, key, tags, copies[header.image] == 1) for record, header in headers]

    def images() -> Iterator[DicomImage]:
        return (DicomImage(record.path, frame, window) for record in records)

    notes = _notes([header for _, header in headers], len(listed.records), frame)
    return Source(listed.classes, records, notes, images, pseudonymous=True)


def _headers(records: Sequence[Record], skip: bool) -> list[tuple[Record, Header]]:
    """The records of files that hold an image; another is left out, or an error where `skip` is false."""
    found = []
    with Progress("read headers", len(records), "files") as progress:
        for record in records:
            try:
                header = read_header(record.path)
            except BadImage:
                header = Header(None, None, None, dict.fromkeys(TAGS), 1, "")  # decoding it gives the reason
            if header is not None:
                found.append((record, header))
            elif not skip:
                raise UserError(f"{record.path}: holds no image; take it out of the manifest")
            progress.advance()
    return found


def _record(record: Record, header: Header, key: bytes, tags: Sequence[str], single: bool) -> Record:
    """The record with pseudonyms in the place of ids, and with the elements that are kept.

    Args:
        single: no other file holds the same image, by its id; else the file's path tells them apart.
    """
    patient = record.patient or header.patient
    own = {name: header.tags[name] for name in tags if name != STUDY}
    study = {STUDY: pseudonym(key, STUDY, header.study) if header.study else None} if STUDY in tags else {}
    return replace(
        record,
        key=pseudonym(key, "image", header.image if header.image and single else f"{header.image or ''}/{record.key}"),
        patient=pseudonym(key, "patient", patient) if patient else None,
        metadata={**record.metadata, **study, **own},
    )


def _notes(headers: Sequence[Header], listed: int, frame: str) -> list[str]:
    burned = Counter(header.burned_in for header in headers)
    several = sum(header.frames > 1 for header in headers)
    unsure = len(headers) - burned["YES"] - burned["NO"]
    notes = [f"{listed - len(headers)} DICOM files hold no image and were left out"] if listed > len(headers) else []
    notes += [f"{several} files hold several frames: frame {frame!r} was taken"] if several else []
    if burned["YES"] or unsure:
        notes.append(
            f"text may be burned into the pixels, which nothing here removes: {burned['YES']} files say so, {unsure} say neither "
            "yes nor no (BurnedInAnnotation); look at the images before you share the dataset"
        )
    return notes
