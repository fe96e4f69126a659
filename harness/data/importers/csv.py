"""A CSV or Parquet manifest: path, label, and optionally split, patient and columns of metadata."""

import csv
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vipbench.harness.data.importers.base import Row, Source, make_source, split_name
from vipbench.harness.data.names import class_name
from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.system.files import lines_of

COLUMNS = ("path", "label", "split", "patient")
BINARY = {"0", "1", "0.0", "1.0", "True", "False"}
PEEKED = 1000  # rows that show what a column holds
NOT_NUMBERS = ("nan", "inf", "-inf", "infinity", "-infinity")


def read(
    file: Path, classes: list[str] | None = None, image_root: Path | None = None, metadata: Sequence[str] = ()
) -> Source:
    """Read a CSV or Parquet table: path, label (a class name), optionally split and patient, and the columns of `metadata`.

    Paths are relative to `image_root`, or to the table's folder. Classes are sorted, numbers by value, unless given in order.
    """
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file")
    rows_of = _parquet_rows if file.suffix.lower() in (".parquet", ".pq") else _csv_rows
    rows = []
    try:
        for where, cells in rows_of(file, metadata):
            path, label, split, patient = (_text(cells.get(name), f"{where}: {name}") for name in COLUMNS)
            if not path or not label:
                raise UserError(f"{where}: the {'label' if path else 'path'} is empty")
            if label.casefold() in NOT_NUMBERS:
                raise UserError(
                    f"{where}: the label is {label!r}, as a missing number is written; it should name a class"
                )
            known = split_name(split, where) if split else None
            described = {name: _text(cells.get(name), f"{where}: {name}") or None for name in metadata}
            rows.append(Row(path, class_name(label), known, patient or None, where, described))
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file}: cannot be read as a table: {' '.join(str(error).split())}") from error
    if 0 < sum(row.split is None for row in rows) < len(rows):
        blank = next(row for row in rows if row.split is None)
        raise UserError(f"{blank.where}: no split, but other rows have one; give each row a split, or none")
    return make_source(rows, image_root or file.parent, classes)


def _check_columns(names: list[str], file: Path, metadata: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise UserError where a column is missing or there twice; the first of `rows` show what else gives labels."""
    if absent := [name for name in metadata if name not in names]:
        raise UserError(f"{file}: --metadata: no column {absent[0]!r}; {did_you_mean(absent[0], names)}")
    if "path" in names and "label" not in names and len(marks := _binary_columns(names, rows)) > 1:
        raise UserError(
            f"{file}: no column 'label', but {len(marks)} columns of 0 and 1 ({', '.join(marks[:5])}): several labels of one "
            "image (multi-label), and an image has one class here; give a column 'label' with the class of each"
        )
    if missing := [name for name in ("path", "label") if name not in names]:
        raise UserError(f"{file}: no column {missing[0]!r}; it needs path and label (and may have split, patient)")
    if twice := [name for name in (*COLUMNS, *metadata) if names.count(name) > 1]:
        raise UserError(f"{file}: the column {twice[0]!r} is there twice")


def _binary_columns(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns whose first cells are all 0 or 1."""
    cells: dict[str, set[str]] = {name: set() for name in names if name not in COLUMNS}
    for row in islice(rows, PEEKED):
        for name, values in cells.items():
            values.add(str(row.get(name) or 0).strip())
    return [name for name, values in cells.items() if values and values <= BINARY]


def _csv_rows(file: Path, metadata: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place of each row, and its cells by column. Raises csv.Error where there is no table."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines_of(lines), strict=True)
        header = next(reader, None)
        if header is None:
            raise csv.Error("it is empty")
        _check_columns(header, file, metadata, (dict(zip(header, row, strict=False)) for row in reader))
        for row in reader:
            where = f"{file}, row {reader.line_num}"
            if len(row) > len(header):
                raise UserError(
                    f"{where}: {len(row)} cells under {len(header)} columns; a cell with a comma needs quotes"
                )
            if row:
                yield where, dict(zip(header, row, strict=False))  # cells that are left out at the end are empty


def _parquet_rows(file: Path, metadata: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        batches = table.iter_batches(PEEKED)
        _check_columns(
            table.schema_arrow.names, file, metadata, (row for batch in batches for row in batch.to_pylist())
        )
        columns = [name for name in (*COLUMNS, *metadata) if name in table.schema_arrow.names]
        number = 0
        for batch in table.iter_batches(columns=columns):
            for cells in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", cells
    except pa.ArrowException as error:
        raise UserError(f"{file}: cannot be read as a table: {' '.join(str(error).split())}") from error


def _text(cell: Any, where: str) -> str:
    """Convert a cell to text; whole numbers without a point, since a column of integers with gaps comes as decimals."""
    if cell is None or cell != cell:
        return ""
    if isinstance(cell, float):
        if not math.isfinite(cell):
            raise UserError(f"{where} is {cell}; it should be text or a finite number")
        cell = int(cell) if cell.is_integer() else cell
    if not isinstance(cell, str | int | float):
        raise UserError(f"{where} is a {type(cell).__name__}; it should be text or a number")
    return str(cell).strip()
