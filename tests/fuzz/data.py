"""Datasets, sources of images and labels, and images."""

import shutil
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data.drawn_images import drawn, image_folder, save
from tests.data.external_shards import samples, write
from tests.data.test_dicom import FILES
from tests.data.test_hf import table, write_arrow, write_parquet
from tests.data.test_medmnist import published
from tests.fuzz.kind import Kind, Sound, each, quick_config, verb
from vipbench.harness.data.describe import digest_tables
from vipbench.harness.data.reader import Dataset
from vipbench.harness.runs.execute import execute
from vipbench.harness.system.files import digest_file, read_json, write_json


def _make_dataset(sound: Sound, folder: Path) -> None:
    shutil.copytree(sound.dataset, folder / "data")
    execute(quick_config(sound, folder / "runs"))
    shutil.rmtree(folder / "runs" / ".bank")


def _seal_dataset(folder: Path) -> None:
    info = read_json(folder / "data" / "dataset.json")
    tables: dict[str, list[pa.Table]] = {}
    for split, part in info["splits"].items():
        for shard in part["shards"]:
            shard["sha256"] = digest_file(folder / "data" / shard["file"])
            index = folder / "data" / shard["file"].replace(".tar", ".index.parquet")
            tables.setdefault(split, []).append(pq.read_table(index))
    info["digest"] = digest_tables(info["classes"], tables)
    write_json(folder / "data" / "dataset.json", info)


def _read_all(data: Path) -> None:
    dataset = Dataset(data)
    for split in dataset.info.splits:
        part = dataset.split(split)
        each(*(lambda part=part, place=place: part.pixels(place) for place in range(len(part))))


def _use_dataset(sound: Sound, folder: Path, rng: Random) -> None:
    data, run = folder / "data", next((folder / "runs").glob("vip_*"))
    skip = rng.choice([["--on-error", "skip"], []])
    evaluate = [lambda: verb("evaluate", run, "--data", data, "--device", "cpu", *skip)] if rng.random() < 0.5 else []
    each(lambda: verb("inspect", data), lambda: _read_all(data), *evaluate)


def _make_shards(sound: Sound, folder: Path) -> None:
    for split in ("train", "test"):
        labels = samples(split, label="json")
        for number, members in enumerate(labels.values()):
            members["cls"] = str(number % 2).encode()
        write(folder / f"{split}.tar", labels)
    (folder / "classes.txt").write_text("nevus\nmelanoma\n")


def _use_shards(sound: Sound, folder: Path, rng: Random) -> None:
    shards = [word for split in ("train", "test") for word in (f"--{split}", folder / f"{split}.tar")]
    leaks = ["--leaks", rng.choice(["refuse", "keep", "drop-train"])]
    verb("index", *shards, "--out", folder / "data", "--classes-file", folder / "classes.txt", *leaks)
    each(lambda: verb("inspect", folder / "data"), lambda: _read_all(folder / "data"))


def _make_lists(sound: Sound, folder: Path) -> None:
    image_folder(folder / "images", {f"{name}": 4 for name in ("nevus", "mel")})
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.glob("images/*/*"))
    rows = [(path, Path(path).parent.name, ["train", "val", "test"][n % 3], f"p{n}") for n, path in enumerate(paths)]
    columns: Any = dict(zip(("path", "label", "split", "patient"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), folder / "list.parquet")
    (folder / "list.csv").write_text("\n".join(",".join(row) for row in [tuple(columns), *rows]))
    split: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for path, name, part, _ in rows:
        split[part].append([path, ["mel", "nevus"].index(name), name])
    write_json(folder / "split.json", split)
    (folder / "classes.txt").write_text("nevus\nmel\n")


def _prepare(source: Path, format: str, *more: object) -> None:
    verb("prepare", source, "--format", format, "--out", source.parent / f"data-{source.name}", "--workers", 1, *more)


def _use_lists(sound: Sound, folder: Path, rng: Random) -> None:
    classes = ["--classes-file", folder / "classes.txt"]
    each(
        lambda: _prepare(folder / "list.csv", "csv", *classes),
        lambda: _prepare(folder / "list.parquet", "csv"),
        lambda: _prepare(folder / "split.json", "coop-split"),
    )


def _make_images(sound: Sound, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    form = {
        "jpg": {"exif": exif},
        "png": {"exif": exif},
        "webp": {},
        "tif": {},
        "gif": {},
        "bmp": {},
        "jp2": {},
        "ppm": {},
    }
    for suffix, options in form.items():
        for name in ("nevus", "mel"):
            save(folder / "images" / name / f"{suffix}.{suffix}", drawn(suffix + name), **options)
    save(folder / "images" / "mel" / "cmyk.jpg", drawn("cmyk", mode="CMYK"))
    save(folder / "images" / "mel" / "progressive.jpg", drawn("progressive"), progressive=True)
    save(folder / "images" / "mel" / "palette.png", drawn("palette", mode="P"), transparency=3)
    save(folder / "images" / "mel" / "deep.png", drawn("deep", mode="I").convert("I;16"))
    save(folder / "images" / "mel" / "float.tif", drawn("float", mode="F"))


def _use_images(sound: Sound, folder: Path, rng: Random) -> None:
    _prepare(folder / "images", "folder", "--on-error", rng.choice(["raise", "skip"]))
    _read_all(folder / "data-images")


def _make_containers(sound: Sound, folder: Path) -> None:
    published(folder / "pneumoniamnist.npz", (8, 8))
    for split in ("train", "test"):
        write_parquet(folder / "hub" / f"{split}-00000.parquet", table([f"{split}0", f"{split}1"], [0, 1]))
        write_arrow(folder / "saved" / split / "data.arrow", table([f"{split}0", f"{split}1"], [0, 1]))
    for number, name in enumerate(
        ("MR_small.dcm", "MR_small_RLE.dcm", "examples_palette.dcm", "SC_rgb_rle_2frame.dcm")
    ):
        place = folder / "dicom" / "ab"[number % 2] / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FILES / name, place)


def _use_containers(sound: Sound, folder: Path, rng: Random) -> None:
    error = ["--on-error", rng.choice(["raise", "skip"])]
    each(
        lambda: _prepare(folder / "pneumoniamnist.npz", "medmnist", *error),
        lambda: _prepare(folder / "hub", "hf", *error),
        lambda: _prepare(folder / "saved", "hf", *error),
        lambda: _prepare(folder / "dicom", "dicom", *error),
    )


KINDS = {
    "dataset": Kind(_make_dataset, ("data/*",), _use_dataset, _seal_dataset),
    "shards": Kind(_make_shards, ("*",), _use_shards),
    "lists": Kind(_make_lists, ("*.*",), _use_lists),
    "images": Kind(_make_images, ("images/*/*",), _use_images),
    "containers": Kind(_make_containers, ("*.npz", "hub/*", "saved/*/*", "dicom/*/*"), _use_containers),
}
