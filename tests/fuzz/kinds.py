"""Each kind of file, or of answer, that the program reads: sound originals, and what reads them.

An original is a folder that is made once; a case damages one file of a copy of it (`files`), perhaps renews the checksums over
it (`seal`), so that what comes after their check is reached too, and reads it (`use`) in the folder of the copy.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file
from tenacity import wait_none
from typer.testing import CliRunner

from harness.backbone import load_backbone
from harness.bank import FeatureBank
from harness.checkpoint import FORMAT
from harness.cli import app
from harness.config import BackboneConfig, Config, override
from harness.data.reader import Dataset
from harness.data.shards import digest_tables
from harness.errors import UserError
from harness.files import digest_file, digest_json, read_json, write_json
from harness.results import write_digests
from harness.run import Job, execute
from harness.symptoms import client, endpoint
from harness.symptoms.answers import parse, tidy
from harness.symptoms.cache import ResponseCache
from harness.symptoms.client import Client
from harness.symptoms.prompting import FOLDER
from harness.symptoms.sets import SymptomSet
from harness.weights import create
from sweeps.grid import read_grid
from sweeps.profile import Profile
from tests.conftest import MODELS, SYMPTOMS
from tests.data.drawn_images import drawn, image_folder, save
from tests.data.test_foreign import samples, write
from tests.openai_clip import openai_weights, transformers_clip, write_archive
from tests.symptoms.fake_endpoint import completion
from tests.symptoms.test_cache import about, put
from tests.symptoms.test_client import requests

NO_SEAL = (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException)


@dataclass(frozen=True)
class Sound:
    """What originals are made of."""

    dataset: Path
    symptoms: Path
    models: Path
    config: dict[str, Any]


class Kind(NamedTuple):
    """A kind of input: see the module's docstring. `files` are patterns of `Path.glob`."""

    make: Callable[[Sound, Path], None]
    files: tuple[str, ...]
    use: Callable[[Sound, Path, Random], None]
    seal: Callable[[Path], None] = lambda folder: None


def verb(*words: object) -> None:
    """Give a command of `vipbench`. Raises what ends it, but for exit status 1 (something is missing or damaged)."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1), result.output


def each(*uses: Callable[[], object]) -> None:
    """Do one after the other, whether or not those before ended in an error of the user's. Raises the last one."""
    last: UserError | None = None
    for use in uses:
        try:
            use()
        except UserError as error:
            last = error
    if last:
        raise last


def _config(sound: Sound, folder: Path, *overrides: str) -> Config:
    every = ["run.log_every=1", "run.checkpoint_steps=2", "train.epochs=2", f"run.out={folder}", *overrides]
    return Config.from_mapping(override(sound.config, [f"backbone={sound.models / 'vit.json'}", *every]))


# Settings


def _make_config(sound: Sound, folder: Path) -> None:
    (folder / "config.yaml").write_text(_config(sound, Path("runs")).to_yaml())
    overrides = ["seed=2", "data.shots=4", "method.context_length=3", "train.lr=0.1", "run.tracking=[mlflow]"]
    (folder / "overrides.jsonl").write_text("\n".join(json.dumps(word) for word in overrides))


def _use_config(sound: Sound, folder: Path, rng: Random) -> None:
    lines = (folder / "overrides.jsonl").read_bytes().splitlines() if (folder / "overrides.jsonl").is_file() else []
    overrides = [line.decode("utf-8", "surrogateescape").strip('"') for line in lines]
    each(lambda: verb("config", folder / "config.yaml"), lambda: Config.load(folder / "config.yaml", overrides))


def _make_grid(sound: Sound, folder: Path) -> None:
    base = {key: value for key, value in sound.config.items() if key != "train"}
    rules = {"adjust": [{"where": {"seed": 2}, "set": {"data.shots": 4}}], "exclude": [{"method": "coop", "seed": 1}]}
    grid = {"base": base, "axes": {"method": ["coop", "zero_shot"], "seed": [1, 2]}, **rules, "include": [{"seed": 9}]}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    profile = {"partition": "gpu", "time": "4:00:00", "gpus_per_run": 8, "nodes_per_run": 2, "setup": ["true"]}
    (folder / "profile.yaml").write_text(yaml.safe_dump({**profile, "options": {"exclude": "n1"}, "mem": "32G"}))


def _use_grid(sound: Sound, folder: Path, rng: Random) -> None:
    each(lambda: read_grid(folder / "grid.yaml"), lambda: Profile.load(folder / "profile.yaml", {}).sbatch())


# Runs


def _make_run(sound: Sound, folder: Path) -> None:
    execute(_config(sound, folder / "runs"))
    execute(_config(sound, folder / "runs", "seed=2"))
    shutil.rmtree(folder / "runs" / ".bank")
    names = [path.name for path in sorted((folder / "runs").glob("vip_*"))]
    write_json(folder / "sweep.json", {"plans": [{"grid": "g.yaml", "runs": names}]})


def _seal_run(folder: Path) -> None:
    for run in (folder / "runs").glob("vip_*"):
        write_digests(run)


def _use_table(sound: Sound, folder: Path, rng: Random) -> None:
    verb("table", folder, "--rows", "seed", "--columns", "shots", "--format", rng.choice(["md", "csv", "latex"]))


def _use_evaluate(sound: Sound, folder: Path, rng: Random) -> None:
    run = sorted((folder / "runs").glob("vip_*"))[0]
    verb("evaluate", run, "--data", sound.dataset, "--device", "cpu")


def _make_partial(sound: Sound, folder: Path) -> None:
    """A run that ended after its training, before its test; and a sweep of it."""

    def stop(*_: object) -> None:
        raise UserError("stopped")

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(UserError):
        patch.setattr(Job, "test", stop)
        execute(_config(sound, folder / "runs"))
    name = next((folder / "runs").glob("vip_*.partial")).name.removesuffix(".partial")
    write_json(folder / "sweep.json", {"plans": [{"grid": "g.yaml", "runs": [name, "a_failed", "a_job"]}]})
    for part in ("failed", "logs", "jobs"):
        (folder / part).mkdir()
    write_json(folder / "failed" / "a_failed.json", {"error": "no luck", "exit_status": 1, "log": "logs/a_failed.log"})
    (folder / "logs" / "a_job.log").write_text("a line\nan error\n")
    job = {"name": "vipbench-1", "time": 1.0, "units": [["a_job"]], "job": "7", "cancelled": False}
    write_json(folder / "jobs" / "vipbench-1.json", job)


def _seal_partial(folder: Path) -> None:
    for path in (folder / "runs").glob("vip_*/checkpoints/*.json"):
        content = read_json(path)
        content.pop("sha256")
        content |= {"format": FORMAT, "tensors": digest_file(path.with_suffix(".safetensors"))}
        write_json(path, {**content, "sha256": digest_json(content)})


def _use_status(sound: Sound, folder: Path, rng: Random) -> None:
    name = next((folder / "runs").glob("vip_*.partial")).name.removesuffix(".partial")
    with FileLock(folder / "runs" / f".{name}.lock") if rng.random() < 0.6 else contextlib.nullcontext():
        verb("sweep", "status", folder)


def _use_resume(sound: Sound, folder: Path, rng: Random) -> None:
    execute(_config(sound, folder / "runs"))


def _make_bank(sound: Sound, folder: Path) -> None:
    execute(_config(sound, folder))
    for path in folder.glob("vip_*"):
        shutil.rmtree(path)
    (folder / ".bank").rename(folder / "bank")
    facts = [read_json(path) for path in sorted((folder / "bank").glob("*/facts.json"))]
    write_json(folder / "kept.json", facts)


def _use_bank(sound: Sound, folder: Path, rng: Random) -> None:
    facts = rng.choice(read_json(folder / "kept.json"))
    count, dim = facts["samples"], facts["dim"]

    def read() -> None:
        bank = FeatureBank(folder / "bank", facts, count, dim)
        bank.read(0, torch.arange(count).numpy())
        bank.write(0, torch.arange(1).numpy(), torch.zeros(1, dim))

    bank = folder / "bank"
    each(*(lambda word=word: verb("bank", word, bank) for word in ("ls", "verify")), read)
    verb("bank", "prune", bank, "--keep-gib", "0")


# Datasets


def _make_dataset(sound: Sound, folder: Path) -> None:
    shutil.copytree(sound.dataset, folder / "data")
    execute(_config(sound, folder / "runs"))
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


# Backbones


def _make_models(sound: Sound, folder: Path) -> None:
    shutil.copytree(sound.models, folder, dirs_exist_ok=True)
    model, _, _ = create(BackboneConfig(name=str(folder / "vit.json")))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "vit.safetensors")
    torch.save(weights, folder / "vit.pt")
    write_archive(openai_weights(transformers_clip()), folder / "openai.pt")
    (folder / "hub").mkdir()
    save_file(weights, folder / "hub" / "open_clip_model.safetensors")
    preprocess = {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    write_json(folder / "hub" / "open_clip_config.json", {"model_cfg": MODELS["vit"], "preprocess_cfg": preprocess})


def _use_backbone(name: Path, weights: Path | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.weights.MOST_PARAMETERS", 10**7)
        backbone = load_backbone(BackboneConfig(name=str(name), pretrained=str(weights) if weights else None))
    pixels = backbone.eval_transform(Image.new("RGB", (40, 30)))
    backbone.encode_images(pixels[None])
    backbone.text.encode_texts(["a lesion", "b"])


def _use_architectures(sound: Sound, folder: Path, rng: Random) -> None:
    weights = rng.choice([None, folder / "vit.safetensors"])
    uses = [lambda: _use_backbone(folder / "vit.json", weights), lambda: _use_backbone(folder / "resnet.json")]
    each(*uses, lambda: _use_backbone(folder / "bert.json"), lambda: _use_backbone(folder / "hub"))


def _use_weights(sound: Sound, folder: Path, rng: Random) -> None:
    files = ("vit.safetensors", "vit.pt", "openai.pt")
    each(*(lambda file=file: _use_backbone(folder / "vit.json", folder / file) for file in files))


# Symptoms


def _make_sets(sound: Sound, folder: Path) -> None:
    shutil.copy(sound.symptoms, folder / "set.json")
    write_json(folder / "plain.json", SYMPTOMS)
    rows = [
        {"name": name, "text": text, "auroc": 0.6, "redundancy": 0.1} for name, own in SYMPTOMS.items() for text in own
    ]
    digests = {"symptoms": SymptomSet.load(sound.symptoms).digest(), "data": "0" * 64, "backbone": "0" * 64}
    figures = {"images": 9, "coverage": dict.fromkeys(SYMPTOMS, 0.5), "accuracy": 0.5, "balanced_accuracy": 0.5}
    write_json(folder / "scores.json", {**digests, **figures, "scores": rows})


def _use_sets(sound: Sound, folder: Path, rng: Random) -> None:
    file = folder / "set.json"
    each(
        lambda: verb("symptoms", "show", file),
        lambda: verb("symptoms", "check", file, "--data", sound.dataset),
        lambda: verb("symptoms", "diff", file, sound.symptoms),
        lambda: verb("symptoms", "import", folder / "plain.json", "--task", "t", "--out", folder / "imported.json"),
        lambda: verb(
            "symptoms", "prune", file, folder / "scores.json", "--below", "0.7", "--out", folder / "pruned.json"
        ),
    )


def _make_answers(sound: Sound, folder: Path) -> None:
    """A record of answers, its export, and what else generating a set reads; all answers of the first step are there."""
    (folder / "classes.txt").write_text("melanoma\tdark\nnevus\tdark\npsoriasis\tred\n")
    write_json(folder / "synonyms.json", {"nevus": ["mole"], "melanoma": ["black cancer"]})
    preset = {"picture": "a photo", "look_at": ["colours", "border"], "aliases": ["photo"], "plainly": {"a": "b"}}
    (folder / "presets.yaml").write_text(yaml.safe_dump({"snapshot": preset}))
    shutil.copytree(FOLDER, folder / "templates")
    with ResponseCache(folder / "answers.sqlite") as cache:
        for number in range(4):
            put(cache, about(f"class {number}"))
        cache.export(folder / "export.jsonl")
    _generate(folder, "--batch-file", folder / "asked.jsonl")
    answers = []
    for line in (folder / "asked.jsonl").read_text().splitlines():
        body = completion(json.dumps({"features": ["dark brown spots all over", "an uneven border"]}))
        answers.append({"custom_id": json.loads(line)["custom_id"], "response": {"status_code": 200, "body": body}})
    (folder / "batch.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))


def _generate(folder: Path, *more: object) -> None:
    own = ["--classes-file", folder / "classes.txt", "--task", "t", "--modality", "snapshot", "--model", "m"]
    own += ["--synonyms", folder / "synonyms.json", "--presets", folder / "presets.yaml"]
    own += ["--templates", folder / "templates", "--cache", folder / "generated.sqlite", "--out", folder / "sets"]
    verb("symptoms", "generate", *own, *more)


def _use_answers(sound: Sound, folder: Path, rng: Random) -> None:
    cache, out = folder / "answers.sqlite", folder / "out.jsonl"
    batch = ["--from-batch", folder / "batch.jsonl", "--batch-file", folder / "asked-again.jsonl"]
    each(
        *(lambda word=word: verb("symptoms", "cache", word, cache) for word in ("stats", "verify")),
        lambda: verb("symptoms", "cache", "export", cache, out),
        lambda: verb("symptoms", "cache", "import", folder / "new.sqlite", folder / "export.jsonl"),
        lambda: verb("symptoms", "cache", "prune", cache, "--model", "m"),
        lambda: _generate(folder, *batch),
    )


# A server


def _make_server(sound: Sound, folder: Path) -> None:
    text = "<think>hm</think> ```json\n" + json.dumps({"symptoms": ["1. dark", {"text": "red"}]}) + "```"
    write_json(folder / "completions.json", completion(text))
    write_json(folder / "models.json", {"data": [{"id": "fake"}, {"id": "fake@r1"}]})
    write_json(folder / "version.json", {"version": "0.9"})
    lines = ["num_requests_waiting 3", 'prefix_cache_hits_total{a="b"} 7', "prefix_cache_queries_total 1e3"]
    (folder / "metrics.txt").write_text("".join(f"vllm:{line}\n" for line in lines))
    write_json(folder / "headers.json", {"retry-after": "1", "date": "Fri, 27 Nov 2026 15:00:00 GMT"})
    refusal = {"message": "seed and max_tokens are not supported", "param": "seed"}
    write_json(folder / "refusal.json", {"error": refusal, "detail": [{"loc": ["seed"], "msg": "no"}]})


def _use_server(sound: Sound, folder: Path, rng: Random) -> None:
    content = {path.stem: path.read_bytes() if path.is_file() else b"" for path in folder.glob("*.*")}
    try:
        headers = httpx.Headers(json.loads(content.get("headers", b"")))
    except (ValueError, TypeError, AttributeError):  # what HTTP itself cannot carry
        headers = httpx.Headers({"retry-after": content.get("headers", b"").hex()[:200]})
    headers.pop("content-encoding", None)
    bad = rng.choice([400, 401, 404, 408, 422, 429, 500, 503, 302, 204, 102])

    def answer(request: httpx.Request) -> httpx.Response:
        status = bad if rng.random() < 0.3 else 200
        part = "refusal" if status in (400, 422) else request.url.path.rpartition("/")[2]
        return httpx.Response(status, headers=headers, content=content.get(part, b""))

    def connect(*_: object) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(answer))

    with pytest.MonkeyPatch.context() as patch, ResponseCache(folder / "cache.sqlite") as cache:
        patch.setattr(endpoint, "connect", connect)
        patch.setattr(client, "BACKOFF", wait_none())
        patch.setattr(client, "WATCH_SECONDS", 0.02)
        asker = Client(["http://127.0.0.1:9"], None, cache, concurrency=4, timeout=2, retries=2, patience=0.5)
        for _, response in asker.complete(requests(3)):
            for item in parse(response.text, "symptoms") or []:
                tidy(item)
        asker.stats.note()
        verb("symptoms", "cache", "verify", folder / "cache.sqlite")


RUN_FILES = ("runs/vip_*/*", "sweep.json")
KINDS = {
    "config": Kind(_make_config, ("*",), _use_config),
    "grid": Kind(_make_grid, ("*",), _use_grid),
    "table": Kind(_make_run, RUN_FILES, _use_table, _seal_run),
    "evaluate": Kind(_make_run, RUN_FILES[:1], _use_evaluate, _seal_run),
    "status": Kind(_make_partial, ("runs/vip_*/*", "*.json", "failed/*", "logs/*", "jobs/*"), _use_status),
    "resume": Kind(_make_partial, ("runs/vip_*/*", "runs/vip_*/checkpoints/*"), _use_resume, _seal_partial),
    "bank": Kind(_make_bank, ("bank/*/*",), _use_bank),
    "dataset": Kind(_make_dataset, ("data/*",), _use_dataset, _seal_dataset),
    "shards": Kind(_make_shards, ("*",), _use_shards),
    "lists": Kind(_make_lists, ("*.*",), _use_lists),
    "images": Kind(_make_images, ("images/*/*",), _use_images),
    "architecture": Kind(
        _make_models, ("vit.json", "resnet.json", "bert.json", "bert/*", "hub/*.json"), _use_architectures
    ),
    "weights": Kind(_make_models, ("*.safetensors", "*.pt"), _use_weights),
    "sets": Kind(_make_sets, ("*",), _use_sets),
    "answers": Kind(_make_answers, ("*", "templates/*"), _use_answers),
    "server": Kind(_make_server, ("*",), _use_server),
}
