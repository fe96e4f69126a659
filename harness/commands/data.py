"""The data verbs: `vipbench prepare SOURCE --format folder --out DIR`, `vipbench index --train A.tar`, `vipbench inspect DIR`,
`vipbench datasets`.
"""

import os
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vipbench.harness.commands.options import Rename
from vipbench.harness.data.choices import Leaks, OnError
from vipbench.harness.data.importers import formats, importer
from vipbench.harness.errors import UserError
from vipbench.harness.system.processes import available_cores

if TYPE_CHECKING:
    from vipbench.harness.data.cards import Card
    from vipbench.harness.data.importers.base import Source
    from vipbench.harness.data.info import DatasetInfo

MAX_WORKERS = 1024
MAX_SHARD_MIB = 1 << 20

Classes = Annotated[
    str | None,
    typer.Option(help='class names in order, as a CSV line: A,"B, with a comma",C; default: sorted, or by label'),
]
ClassesFile = Annotated[Path | None, typer.Option(help="a file with a class name per line, in order")]
Shards = Annotated[
    list[str] | None,
    typer.Option(help="its shards: a path or URL, with * or {000..011} for several; may be given several times"),
]


Ordinal = Annotated[bool, typer.Option("--ordinal", help="the classes are grades, in the order that --classes gives")]
Metadata = Annotated[
    str | None,
    typer.Option(help="columns of a manifest, or keys of a .json, to keep for results by subgroup, as they stand: A,B"),
]
LeaksOption = Annotated[
    Leaks,
    typer.Option(
        help="images and patients in several splits: refuse, keep them as published, or drop-train: keep those of test, and "
        "take out of train what val or test holds (and out of val what test holds)"
    ),
]


def prepare(
    source: Annotated[
        Path, typer.Argument(help="a folder, a CSV or Parquet manifest, a CoOp-style split JSON, or MedMNIST's .npz")
    ],
    out: Annotated[Path, typer.Option(help="the dataset's folder, which this makes")],
    format: Annotated[
        str | None, typer.Option(help=f"what SOURCE is: {', '.join(formats())}; default: the recipe's, or folder")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="a card of `vipbench datasets`: how to read SOURCE, and what must be in it")
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help="where paths in SOURCE start; default: its folder")] = None,
    name: Annotated[str | None, typer.Option(help="the dataset's name; default: the name of --out")] = None,
    modality: Annotated[str | None, typer.Option(help="such as dermoscopy or chest X-ray")] = None,
    classes: Classes = None,
    classes_file: ClassesFile = None,
    rename: Rename = None,
    val_fraction: Annotated[float, typer.Option(help="part of train for a missing val split; 0: none")] = 0.1,
    test_fraction: Annotated[float, typer.Option(help="part of train for a missing test split; 0: none")] = 0.2,
    seed: Annotated[int, typer.Option(help="of the splits that are made")] = 0,
    ordinal: Ordinal = False,
    metadata: Metadata = None,
    label_column: Annotated[str | None, typer.Option(help="hf: the column of the class, where several may be")] = None,
    frame: Annotated[
        str | None, typer.Option(help="dicom: which frame of several: first (default), middle or a number from 1")
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="dicom: the values to show, CENTER,WIDTH; default: as the file asks")
    ] = None,
    pseudonym_key: Annotated[
        Path | None, typer.Option(help="dicom: the key of the pseudonyms; default: OUT.key, made once beside --out")
    ] = None,
    shard_size: Annotated[
        int, typer.Option(min=1, max=MAX_SHARD_MIB, help="about this many MiB of images per shard")
    ] = 256,
    on_error: Annotated[OnError, typer.Option(help="what to do with an image that cannot be used")] = OnError.stop,
    leaks: LeaksOption = Leaks.refuse,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the dataset at --out")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, max=MAX_WORKERS, help="processes that decode; default: one per core")
    ] = None,
) -> None:
    """Check images and labels and write them as a dataset: shards, indexes and dataset.json."""
    from vipbench.harness.data.cards import load_card
    from vipbench.harness.data.dicom import parse_frame, parse_window
    from vipbench.harness.data.names import column_names, listed_classes, renames
    from vipbench.harness.data.shards import write_dataset
    from vipbench.harness.data.splits import HoldOut

    hold_out = HoldOut(val_fraction, test_fraction, seed)
    order, changes = listed_classes(classes, classes_file), renames(rename or [])
    card = load_card(recipe) if recipe else None
    _check_order(ordinal and card is None, order)
    format = format or (card.format if card else "folder")
    source, root = card.place(source) if card else (source, None)
    listed = _read(
        format,
        source,
        out,
        order,
        image_root or root,
        metadata=column_names(metadata),
        label_column=label_column,
        frame=parse_frame(frame) if frame else None,
        window=parse_window(window) if window else None,
        pseudonym_key=pseudonym_key,
    )
    if card:
        listed = _compared(listed, card, str(recipe))
    info = write_dataset(
        listed.rename(changes),
        out,
        name=out.resolve().name if name is None else name,
        modality=modality or (card.modality if card else None),
        shard_bytes=shard_size * 2**20,
        on_error="skip" if on_error is OnError.skip else "raise",
        leaks=leaks,
        overwrite=overwrite,
        hold_out=hold_out,
        workers=workers or available_cores(),
        ordinal=ordinal,
    )
    _show(info, out)


def index(
    train: Shards = None,
    val: Shards = None,
    test: Shards = None,
    out: Annotated[Path | None, typer.Option(help="where dataset.json goes; default: the folder of the shards")] = None,
    classes: Classes = None,
    classes_file: ClassesFile = None,
    label_key: Annotated[str, typer.Option(help="where a .json holds the label; a.b for nested objects")] = "label",
    patient_key: Annotated[str, typer.Option(help="where a .json holds the patient")] = "patient",
    image: Annotated[str | None, typer.Option(help="the image's extension, where samples hold several")] = None,
    leaks: LeaksOption = Leaks.refuse,
    name: Annotated[str | None, typer.Option(help="the dataset's name; default: the name of --out")] = None,
    modality: Annotated[str | None, typer.Option(help="such as dermoscopy or chest X-ray")] = None,
    ordinal: Ordinal = False,
    metadata: Metadata = None,
) -> None:
    """Describe webdataset shards that others wrote, so that runs can read them where they are."""
    from vipbench.harness.data.external import expand, index_shards
    from vipbench.harness.data.members import Reading
    from vipbench.harness.data.names import column_names, listed_classes
    from vipbench.harness.data.remote import is_url

    patterns = {split: shards for split, shards in (("train", train), ("val", val), ("test", test)) if shards}
    if not patterns:
        raise UserError("index: no shards given; name them with --train, --val and --test")
    if out is None:
        shards = [shard for given in patterns.values() for shard in expand(given)]
        folders = {Path(shard).parent for shard in shards}
        if len(folders) > 1 or any(is_url(shard) for shard in shards):
            raise UserError(
                "--out: these shards are not in one local folder; say where dataset.json and the indexes go"
            )
        out = folders.pop()
    order = listed_classes(classes, classes_file)
    _check_order(ordinal, order)
    extension = image.lower().lstrip(".") if image else None
    reading = Reading(order, label_key, patient_key, extension, column_names(metadata))
    _show(index_shards(patterns, out, reading, name, modality, leaks, ordinal), out)


def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="a folder or URL that `prepare` or `index` wrote")],
    near_duplicates: Annotated[
        Path | None, typer.Option(help="compare all images, and list those that look alike in this CSV file")
    ] = None,
    distance: Annotated[
        int | None,
        typer.Option(min=0, max=255, help="bits of 256 in which the hashes of near-duplicates may differ; default: 24"),
    ] = None,
) -> None:
    """Print a dataset's counts, and verify the checksums of its shards and images."""
    from vipbench.harness.data.info import DatasetInfo
    from vipbench.harness.data.shards import verify

    if distance is not None and near_duplicates is None:
        raise UserError("--distance: has no effect without --near-duplicates FILE; leave it out")
    _show(DatasetInfo.load(folder), folder)
    verify(folder)
    typer.echo("all checksums are right")
    if near_duplicates is not None:
        from vipbench.harness.data.near_duplicates import DISTANCE, find
        from vipbench.harness.data.reader import Dataset

        typer.echo(find(Dataset(folder), near_duplicates, DISTANCE if distance is None else distance))


def datasets(
    name: Annotated[str | None, typer.Argument(help="show the card of this dataset")] = None,
) -> None:
    """List the public datasets that have a card, or show one: source, licence, counts, known flaws of the split."""
    from rich.console import Console
    from rich.table import Table

    from vipbench.harness.data.cards import card_names, load_card

    if name is not None:
        typer.echo(load_card(name).text(name))
        return
    table = Table("name", "modality", "classes", "train/val/test", "licence", box=None)
    table.columns[0].no_wrap = table.columns[3].no_wrap = True
    for key in card_names():
        card = load_card(key)
        images = "/".join(str(card.total(split)) for split in card.counts)
        kind = "" if card.task == "classes" else f", {card.task}"
        table.add_row(key, card.modality, f"{len(card.classes)}{kind}", images, card.licence or "not checked")
    Console(markup=False, highlight=False).print(table)


def _read(
    format: str, source: Path, out: Path, classes: list[str] | None, root: Path | None, **options: Any
) -> "Source":
    """List a source with the importer of a format and those of its options that are given.

    Raises:
        UserError: an option that the importer does not have, or as the importer does.
    """
    from vipbench.harness.data.pseudonyms import load_key, make_key

    read: Callable[..., Source] = importer(format)
    takes = signature(read).parameters
    given = {option: value for option, value in options.items() if value}
    key = given.pop("pseudonym_key", None)
    place = Path(os.path.abspath(out))  # "." and ".." have no name of their own
    if "key" in takes:
        given["key"] = load_key(key) if key else make_key(place.parent / f"{place.name}.key")
    elif key:
        raise UserError(f"--pseudonym-key: --format {format} makes no pseudonyms of a key; dicom does")
    if "metadata" in given and "metadata" not in takes:
        raise UserError(f"--metadata: --format {format} has no columns; a manifest has (--format csv)")
    for option in given:
        if option not in takes:
            raise UserError(f"--{option.replace('_', '-')}: --format {format} has no such option; leave it out")
    return read(source, classes, root, **given)


def _compared(source: "Source", card: "Card", name: str) -> "Source":
    """The source, with notes, if it is what its card describes. Raises UserError where it is not."""
    from dataclasses import replace

    if differences := card.differences(source.counts()):
        more = f" (and {len(differences) - 5} more)" if len(differences) > 5 else ""
        raise UserError(
            f"--recipe {name}: SOURCE is not what the card describes: {'; '.join(differences[:5])}{more}; "
            f"`vipbench datasets {name}` shows the card, and without --recipe SOURCE is prepared as it is"
        )
    notes = [
        f"classes and counts are those of the card {name!r}",
        *(f"known of {card.title}: {leak}" for leak in card.leaks),
    ]
    return replace(source, notes=[*source.notes, *notes], ordinal=source.ordinal or card.task == "ordinal")


def _check_order(ordinal: bool, classes: list[str] | None) -> None:
    if ordinal and classes is None:
        raise UserError("--ordinal: give the grades from lowest to highest with --classes or --classes-file")


def _show(info: "DatasetInfo", folder: str | Path) -> None:
    """Print counts per split and class, and what was decided."""
    from rich.console import Console
    from rich.table import Table

    table = Table("label", "class", *info.splits, title=f"{info.name} ({info.modality or 'modality not given'})")
    for column in table.columns[2:]:
        column.justify = "right"
    for label, name in enumerate(info.classes):
        table.add_row(str(label), name, *(str(split.counts[name]) for split in info.splits.values()))
    table.add_section()
    table.add_row("", "all", *(str(sum(split.counts.values())) for split in info.splits.values()))
    Console(markup=False, highlight=False).print(table)
    for note in info.notes:
        typer.echo(f"note: {note}")
    shards = sum(len(split.shards) for split in info.splits.values())
    typer.echo(f"{folder}: {shards} shards, digest {info.digest}")
