"""A damaged image ends the run with its id and place, or is left out and named in the results; a damaged result is not read."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from vipbench.harness.config.overrides import override
from vipbench.harness.data import reader
from vipbench.harness.data.reader import DamagedSample, Dataset
from vipbench.harness.errors import UserError
from vipbench.harness.runs.collect import make_row, read_runs
from vipbench.harness.runs.directory import FILES, check_run, read_prompts, write_digests
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.runs.transfer import evaluate_run


@pytest.fixture
def damaged(dataset: Path, tmp_path: Path) -> tuple[Path, dict[str, tuple[str, int]]]:
    """The dataset with one training and one test image changed; (id, byte) of each by split."""
    reader._open.cache_clear()
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    places = {}
    for split, position in (("train", 4), ("test", 9)):
        samples = Dataset(folder).split(split)
        offset = int(samples.offsets[position])
        shard = Path(samples.files[samples.shards[position]].path)
        content = bytearray(shard.read_bytes())
        content[offset + 50] ^= 1
        shard.chmod(0o644)
        shard.write_bytes(content)
        places[split] = (samples.key(position), offset)
    return folder, places


def run(base: dict[str, Any], out: Path, *overrides: str) -> Path:
    return execute(resolve_config(override(base, [f"run.out={out}", *overrides])))


@pytest.mark.parametrize("bank", ["true", "false"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_it_ends_the_run_with_its_place(
    base_config: dict[str, Any],
    tmp_path: Path,
    damaged: tuple[Path, dict[str, tuple[str, int]]],
    bank: str,
    workers: str,
) -> None:
    folder, places = damaged
    key, offset = places["train"]
    options = [f"data.path={folder}", f"run.bank={bank}", f"run.workers={workers}"]
    with pytest.raises(UserError, match=rf"train-000000.tar: sample '{key}' at byte {offset} is damaged"):
        run(base_config, tmp_path / "runs", *options)


def test_it_can_be_left_out_and_is_named(
    base_config: dict[str, Any], tmp_path: Path, damaged: tuple[Path, dict[str, tuple[str, int]]]
) -> None:
    folder, places = damaged
    options = [f"data.path={folder}", "data.on_error=skip", "train.select=best"]
    runs = [run(base_config, tmp_path / bank, *options, f"run.bank={bank}") for bank in ("true", "false")]
    again = run(base_config, tmp_path / "true", *options, "train.lr=0.01")
    for path in (*runs, again):
        skipped = json.loads((path / "provenance.json").read_text())["skipped"]
        assert {split: list(found) for split, found in skipped.items()} == {s: [key] for s, (key, _) in places.items()}
        assert f"at byte {places['test'][1]} is damaged" in skipped["test"][places["test"][0]]
        predicted = pd.read_parquet(path / "predictions.parquet")["id"].tolist()
        assert len(predicted) == 20
        assert places["test"][0] not in predicted
        assert json.loads((path / "metrics.json").read_text())["samples"] == 20
    first, second = (load_file(path / "prompts.safetensors") for path in runs)
    assert all((first[name] - second[name]).abs().max() < 1e-5 for name in first), "with and without a bank"


def test_a_whole_dataset_says_nothing_of_skipping(base_config: dict[str, Any], tmp_path: Path) -> None:
    path = run(base_config, tmp_path, "data.on_error=skip", "train.epochs=4", "train.views=2")
    provenance = json.loads((path / "provenance.json").read_text())
    assert "skipped" not in provenance
    assert provenance["approximations"] == [
        "4 epochs show 2 views of an image in turn, not a new one each (train.views)"
    ]


def test_views_of_a_method_s_own_recipe_are_no_approximation(base_config: dict[str, Any], tmp_path: Path) -> None:
    notes = [
        json.loads((run(base_config, tmp_path, "method=clap", *own) / "provenance.json").read_text()).get(
            "approximations"
        )
        for own in ([], ["train.views=2"])
    ]
    assert notes == [None, ["3 epochs show 2 views of an image in turn, not a new one each (train.views)"]]


def test_what_cannot_be_decoded_or_was_cut_off_is_damaged_too(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = Dataset(dataset).split("test")
    monkeypatch.setattr(type(samples), "image_bytes", lambda self, position: b"\x89PNG\r\n\x1a\nno image")
    with pytest.raises(DamagedSample, match="cannot be decoded") as caught:
        samples.pixels(3)
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - as from a loader's process
    assert (copy.key, copy.offset, str(copy)) == (samples.key(3), int(samples.offsets[3]), str(caught.value))
    monkeypatch.undo()
    shutil.copytree(dataset, tmp_path / "cut")
    shard = tmp_path / "cut" / "test-000000.tar"
    last = int(np.argmax(samples.offsets))
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[: int(samples.offsets[last]) + 30])
    with pytest.raises(DamagedSample, match=r"the shard ends after 30 of its \d+ bytes"):
        Dataset(tmp_path / "cut").split("test").pixels(last)


@pytest.fixture(scope="module")
def finished(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base_config, tmp_path_factory.mktemp("finished"), "method=coop", "train.epochs=2")


def test_a_run_writes_a_digest_of_each_of_its_files(finished: Path) -> None:
    files = {path.name for path in finished.iterdir() if path.is_file()}
    assert set(json.loads((finished / FILES).read_text())) == files - {FILES}
    assert {"prompts.safetensors", "steps.jsonl", "metrics.json"} < files
    check_run(finished)


@pytest.mark.parametrize(
    "name",
    ["prompts.safetensors", "config.yaml", "provenance.json", "predictions.parquet", "metrics.json", "steps.jsonl"],
)
def test_a_changed_file_of_a_run_is_named_by_all_that_read_it(
    finished: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Zeros inside of saved prompts among them."""
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    content = bytearray((copy / name).read_bytes())
    content[-40:-20] = bytes(20)
    (copy / name).write_bytes(content)
    for read in (read_prompts, lambda path: evaluate_run(path, dataset, "test", None, "cpu")):
        with pytest.raises(UserError, match=f"{name}: damaged: it is not what the run wrote"):
            read(copy)
    assert read_runs(tmp_path).empty
    assert f"left out: {copy / name}: damaged" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("provenance.json", {}),
        ("provenance.json", {"dataset": "d", "classes": ["a"], "digests": {"dataset": "0", "backbone": 7}}),
        ("metrics.json", {"samples": 21, "accuracy": 7}),
        ("metrics.json", {"samples": 21, "accuracy": True}),
        ("metrics.json", {"samples": 21, "mae": 10**400}),
        ("metrics.json", [0.5]),
        ("config.yaml", {"method": "coop"}),
        ("config.yaml", {"method": {}, "data": {}}),
    ],
)
def test_a_file_of_another_form_is_named_although_its_digest_is_right(
    finished: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: Any
) -> None:
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    (copy / name).write_text(json.dumps(value))
    write_digests(copy)
    assert read_runs(tmp_path).empty
    assert f"left out: {copy / name}: damaged" in caplog.text
    if name == "provenance.json":
        with pytest.raises(UserError, match=rf"{name}: damaged"):
            evaluate_run(copy, dataset, "test", None, "cpu")


@pytest.mark.parametrize("cost", [3, {"train_seconds": "long"}, {"runs_together": None}])
def test_a_cost_that_is_no_number_is_named(cost: Any) -> None:
    good = {"dataset": "d", "digests": {}, "cost": {"train_seconds": 1.5, "peak_of": "memory"}}
    assert make_row(Path("run"), {"seed": 1}, good, {})["metrics.cost.train_seconds"] == 1.5
    with pytest.raises(UserError, match=r"^run/provenance\.json: damaged: .* cost$"):
        make_row(Path("run"), {"seed": 1}, {**good, "cost": cost}, {})


def test_an_evaluation_needs_the_classes_that_were_learned(finished: Path, dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    provenance = json.loads((copy / "provenance.json").read_text())
    (copy / "provenance.json").write_text(json.dumps({**provenance, "classes": 3}))
    write_digests(copy)
    with pytest.raises(UserError, match=r"provenance\.json: damaged: it does not name the classes"):
        evaluate_run(copy, dataset, "test", None, "cpu")


def test_a_run_of_an_earlier_version_is_read_where_its_content_is_plausible(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    (copy / FILES).unlink()
    shutil.rmtree(copy / "logs")
    assert len(read_runs(tmp_path)) == 1
    assert read_prompts(copy).keys() == read_prompts(finished).keys()
    (copy / "prompts.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match=r"prompts\.safetensors: damaged: .*; remove the run, or run it again"):
        read_prompts(copy)
