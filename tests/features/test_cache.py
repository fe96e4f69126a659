"""The feature bank: the same run as from images, filled once, safe against death and damage."""

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import vipbench.harness.system.signals
from vipbench.harness.cli import app
from vipbench.harness.config.overrides import override
from vipbench.harness.errors import UserError
from vipbench.harness.features.cache import STORED, FeatureBank, list_banks, prune
from vipbench.harness.features.encode import bank_facts
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.runs.data import RunData
from vipbench.harness.runs.execute import execute, fill_banks
from vipbench.harness.runs.resolve import load_config, resolve_config
from vipbench.harness.system.files import digest_json, read_json


def bank(root: Path, **facts: Any) -> FeatureBank:
    bound = facts.pop("bound", None)
    return FeatureBank(root, {"backbone": "b", "precision": "fp32", **facts}, samples=10, dim=4, bound=bound)


def run(base: dict[str, Any], out: Path, *overrides: str) -> Path:
    return execute(resolve_config(override(base, [f"run.out={out}", *overrides])))


def test_what_was_written_is_read_and_the_rest_is_missing(tmp_path: Path) -> None:
    store, features = bank(tmp_path), torch.arange(8.0).reshape(2, 4)
    store.write(3, np.array([7, 2]), features)
    found, present = bank(tmp_path).read(3, np.array([2, 5, 7]))
    assert present.tolist() == [True, False, True]
    assert torch.equal(found[[2, 0]], features)
    assert not found[1].any()
    assert not bank(tmp_path).read(4, np.arange(10))[1].any()
    assert not bank(tmp_path, precision="bf16").read(3, np.arange(10))[1].any(), "other facts are another bank"


def test_a_feature_of_zeros_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    store = bank(tmp_path)
    store.write(0, np.array([1]), torch.zeros(1, 4))
    assert store.read(0, np.arange(3))[1].tolist() == [False, True, False]


def test_damaged_records_are_missing_and_counted(tmp_path: Path) -> None:
    store = bank(tmp_path)
    store.write(0, np.arange(10), torch.rand(10, 4))
    path = next(tmp_path.glob("*/view-*.bin"))
    content = bytearray(path.read_bytes())
    content[20 * 4 + 1] ^= 1  # in the fifth record of 20 bytes
    path.write_bytes(content)
    assert store.read(0, np.arange(10))[1].tolist() == [True] * 4 + [False] + [True] * 5
    (info,) = list_banks(tmp_path)
    assert (info.records, info.damaged) == (9, 1)
    assert CliRunner().invoke(app, ["bank", "verify", str(tmp_path)]).exit_code == 1


def test_prune_removes_what_was_used_longest_ago(tmp_path: Path) -> None:
    folders = []
    for name in ("first", "second"):
        store = bank(tmp_path, name=name)
        store.write(0, np.arange(10), torch.ones(10, 4))
        folders.append(store.folder)
    del store  # it is in use as long as it is held
    (folders[0] / "facts.json").touch()
    assert prune(tmp_path, keep_bytes=5000) == [folders[1]]
    assert [info.folder for info in list_banks(tmp_path)] == [folders[0]]


def test_a_bank_in_use_is_not_pruned(tmp_path: Path) -> None:
    store = bank(tmp_path)
    store.write(0, np.arange(10), torch.ones(10, 4))
    assert prune(tmp_path, keep_bytes=0) == []
    assert store.read(0, np.arange(10))[1].all()


def test_the_bound_makes_room_and_holds(tmp_path: Path) -> None:
    bank(tmp_path, name="old").write(0, np.arange(10), torch.ones(10, 4))
    store = bank(tmp_path, name="new", bound=4200)
    store.reserve([(1, row) for row in range(10)])
    assert [info.folder for info in list_banks(tmp_path)] == [store.folder], "the old one made room"
    bank(tmp_path, name="another").write(0, np.arange(10), torch.ones(10, 4))
    with pytest.raises(UserError, match=r"100 more features take .* beyond run\.bank_gib"):
        store.reserve([(view, 0) for view in range(100)])
    assert len(list_banks(tmp_path)) == 2, "what does not fit anyway makes nobody leave"


@pytest.mark.parametrize(("precision", "size"), [("fp32", 20), ("tf32", 20), ("bf16", 12), ("fp16", 12)])
def test_features_are_stored_in_the_precision_they_were_computed_in(tmp_path: Path, precision: str, size: int) -> None:
    store = bank(tmp_path, precision=precision)
    values = torch.rand(10, 4).to(STORED[precision][1]).float()
    store.write(0, np.arange(10), values)
    found, present = store.read(0, np.arange(10))
    assert present.all()
    assert torch.equal(found, values)
    assert next(tmp_path.glob("*/view-*.bin")).stat().st_size == 10 * size


def test_room_is_counted_for_what_will_be_written(tmp_path: Path) -> None:
    """Sixteen shots of a million images take a few blocks, not the size of the file with its holes (2 GB here)."""
    facts = {"backbone": "b", "precision": "fp32"}
    store = FeatureBank(tmp_path, facts, samples=1_000_000, dim=512, bound=16 * 2 * 4096)
    rows = np.arange(16) * 60_000 + 7
    store.reserve([(1, int(row)) for row in rows])
    store.write(1, rows, torch.ones(16, 512))
    (info,) = list_banks(tmp_path, check=False)
    assert info.size <= 16 * 2 * 4096
    assert info.size <= store._disk_bytes([(1, int(row)) for row in rows])
    assert store._disk_bytes([(view, row) for view in (0, 1) for row in range(10)]) == 2 * 6 * 4096, (
        "neighbours share blocks"
    )


@pytest.mark.parametrize("size", [0, 1, 19, 20, 199])
def test_what_a_short_view_lacks_is_missing_reported_and_written_again(tmp_path: Path, size: int) -> None:
    store = bank(tmp_path)
    store.write(0, np.arange(10), torch.rand(10, 4))
    path = store.folder / "view-000000.bin"
    os.truncate(path, size)
    assert store.read(0, np.arange(10))[1].tolist() == [True] * (size // 20) + [False] * (10 - size // 20)
    (info,) = list_banks(tmp_path)
    assert (info.records, info.short) == (size // 20, ("view-000000.bin",))
    result = CliRunner().invoke(app, ["bank", "verify", str(tmp_path)])
    assert (result.exit_code, "too short: view-000000.bin" in result.output) == (1, True)
    store.write(0, np.array([9]), torch.ones(1, 4))
    assert store.read(0, np.array([9]))[1].all()
    assert list_banks(tmp_path)[0].short == ()


def test_a_view_that_is_no_file_is_missing(tmp_path: Path) -> None:
    store = bank(tmp_path)
    store.write(0, np.arange(10), torch.rand(10, 4))
    (store.folder / "view-000001.bin").symlink_to("nowhere")
    (store.folder / "view-000002.bin").mkdir()
    (found,) = list_banks(tmp_path)
    assert (found.records, found.damaged, found.short) == (10, 0, ())
    assert not any(store.read(view, np.arange(10))[1].any() for view in (1, 2))


def test_a_bank_with_damaged_facts_is_named_and_used_again(tmp_path: Path) -> None:
    damaged, whole = bank(tmp_path, name="damaged"), bank(tmp_path, name="whole")
    for store in (damaged, whole):
        store.write(0, np.arange(10), torch.ones(10, 4))
    (damaged.folder / "facts.json").write_text("{}")
    for verb, status in {"ls": 0, "verify": 1}.items():
        result = CliRunner().invoke(app, ["bank", verb, str(tmp_path)])
        assert result.exit_code == status, result.output
        lines = {line.split()[0].rstrip(":"): line for line in result.output.splitlines()}
        assert "facts.json is missing or damaged" in lines[damaged.folder.name]
        assert "10 " in lines[whole.folder.name]
    assert bank(tmp_path, name="damaged").read(0, np.arange(10))[1].all(), "a run that needs it mends it"
    assert all(info.facts for info in list_banks(tmp_path))
    (damaged.folder / "facts.json").unlink()
    assert damaged.folder in prune(tmp_path, keep_bytes=5000), "what pruning that was killed left is removed first"


def test_exclusive_locks_are_of_files_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS refuses others."""
    flock = fcntl.flock

    def strict(file: Any, operation: int) -> None:
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if operation & fcntl.LOCK_EX and mode == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", strict)
    folder = bank(tmp_path).folder
    bank(tmp_path).write(0, np.arange(10), torch.ones(10, 4))
    assert prune(tmp_path, keep_bytes=0) == [folder]


@pytest.mark.parametrize("verb", [["ls"], ["verify"], ["prune", "--keep-gib", "1"]])
def test_a_file_or_nothing_where_the_folder_should_be(tmp_path: Path, verb: list[str]) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "nothing"):
        result = CliRunner().invoke(app, ["bank", verb[0], str(tmp_path / name), *verb[1:]])
        assert isinstance(result.exception, UserError)
        assert "no folder of stored features" in str(result.exception)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    store = bank(tmp_path)
    (store.folder / "view-000000.bin").mkdir()
    with pytest.raises(UserError, match=r"run\.bank=false goes without"):
        store.write(0, np.array([0]), torch.ones(1, 4))


@pytest.mark.parametrize(("method", "precision"), [("vip", "fp32"), ("cocoop", "fp32"), ("vip", "bf16")])
def test_training_from_the_bank_is_training_from_images(
    base_config: dict[str, Any], tmp_path: Path, method: str, precision: str
) -> None:
    overrides = [f"method={method}", "data.shots=4", f"precision={precision}"]
    stored = run(base_config, tmp_path / "bank", *overrides)
    plain = run(base_config, tmp_path / "images", *overrides, "run.bank=false")
    assert stored.name == plain.name, "where features come from is not part of a run's identity"
    assert not (tmp_path / "images" / ".bank").exists()
    first, second = (load_file(path / "prompts.safetensors") for path in (stored, plain))
    assert all((first[name] - second[name]).abs().max() < 1e-5 for name in first)
    logits = [np.stack(pd.read_parquet(path / "predictions.parquet")["logits"].to_list()) for path in (stored, plain)]
    assert np.abs(logits[0] - logits[1]).max() < 1e-4


def test_build_computes_all_that_runs_will_read(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for name, overrides in {"a": ["method=coop", "data.shots=4", "train.select=best"], "b": ["precision=bf16"]}.items():
        config = resolve_config(override(base_config, [f"run.out={tmp_path / 'runs'}", *overrides]))
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(config.to_yaml())
    result = CliRunner().invoke(app, ["bank", "build", *map(str, paths)])
    assert result.exit_code == 0, result.output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".bank"], "no run was begun"
    monkeypatch.setattr(Backbone, "encode_with_norms", None)
    for path in paths:
        execute(load_config(path))


@pytest.mark.parametrize("bank", ["true", "false"])
@pytest.mark.slow
def test_a_signal_ends_encoding_between_batches(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bank: str
) -> None:
    """Training features, validation and test: each is left after the batch in which the signal came, and nothing is lost."""
    monkeypatch.setattr(vipbench.harness.system.signals, "SECONDS_BETWEEN_EXCHANGES", 0.0)
    encode, encoded = Backbone.encode_with_norms, 0

    def signalled(self: Backbone, pixels: Tensor) -> Tensor:
        nonlocal encoded
        encoded += 1
        os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, pixels)

    options = ["method=coop", "train.select=best", "train.views=1", "run.eval_batch_size=8", f"run.bank={bank}"]
    whole = run(base_config, tmp_path / "whole", *options)
    monkeypatch.setattr(Backbone, "encode_with_norms", signalled)
    for _ in range(100):
        try:
            path = run(base_config, tmp_path / "runs", *options)
        except vipbench.harness.system.signals.Stopped:
            pass
        else:
            break
        if bank == "true":
            assert sum(info.records for info in list_banks(tmp_path / "runs" / ".bank")) >= min(encoded, 5) * 2
        else:  # without a bank nothing that is encoded stays; a run must come through in one piece
            monkeypatch.setattr(Backbone, "encode_with_norms", encode)
    assert path.name == whole.name
    assert (path / "steps.jsonl").read_text() == (whole / "steps.jsonl").read_text()
    first, second = (load_file(folder / "prompts.safetensors") for folder in (path, whole))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert encoded == (8 if bank == "true" else 1), "each batch was encoded once: 3 + 2 + 3"


def test_images_are_encoded_once_for_all_runs_of_a_folder(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = Backbone.encode_with_norms

    def counted(self: Backbone, pixels: Tensor) -> Tensor:
        encoded.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Backbone, "encode_with_norms", counted)
    run(base_config, tmp_path, "method=coop", "data.shots=4", "train.epochs=2")
    assert sum(encoded) == 4 * 3 * 2 + 21, "two views of twelve training images, and the test images"
    encoded.clear()
    run(base_config, tmp_path, "method=cocoop", "data.shots=4", "train.epochs=2", "train.lr=0.5")
    run(base_config, tmp_path, "method=coop", "data.shots=2", "train.epochs=2")
    assert sum(encoded) == 0, "other methods, rates and smaller draws find all they need"
    run(base_config, tmp_path, "method=coop", "data.shots=4", "train.epochs=3")
    assert sum(encoded) == 12, "one more epoch is one more view"
    encoded.clear()
    run(base_config, tmp_path, "method=coop", "data.shots=4", "train.epochs=9", "train.views=3")
    assert sum(encoded) == 0, "three views in turn"


def test_features_of_another_result_version_are_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = [bank_facts("b", "d", "test", "fp32", None, device="cpu", compiled=False)]
    monkeypatch.setattr("vipbench.harness.features.encode.RESULT_VERSION", 10**6)
    facts.append(bank_facts("b", "d", "test", "fp32", None, device="cpu", compiled=False))
    assert digest_json(facts[0]) != digest_json(facts[1])


def test_what_rounds_differently_has_a_bank_of_its_own() -> None:
    facts = [
        bank_facts("b", "d", "test", precision, None, device=device, compiled=compiled)
        for precision, device, compiled in [
            ("fp32", "cpu", False),
            ("fp32", "cuda", False),
            ("tf32", "cuda", False),
            ("fp32", "cpu", True),
        ]
    ]
    assert len({digest_json(fact) for fact in facts}) == len(facts)


def test_a_compiled_tower_is_not_shared_with_runs_that_want_none(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process the bank is built for both, each with its own tower."""
    seen: list[tuple[bool, bool]] = []

    def compiled(data: RunData) -> None:
        seen.append((data.config.run.compile, data.inputs.backbone.image._compiled_call_impl is not None))
        assert data.config.train
        data.batches(data.config.train)
        data.validation_set()

    monkeypatch.setattr(RunData, "fill_bank", compiled)
    out = f"run.out={tmp_path}"
    fill_banks(
        [
            resolve_config(override(base_config, [out, f"run.compile={compile}"]))
            for compile in ("true", "false", "true")
        ]
    )
    assert seen == [(True, True), (False, False), (True, True)]
    facts = [read_json(path) for path in (tmp_path / ".bank").glob("*/facts.json")]
    assert sorted((fact["split"], fact["compiled"]) for fact in facts) == [
        ("train", False),
        ("train", True),
        ("val", False),
        ("val", True),
    ]
