"""Repositories of the hub, by id and revision, from a cache that the test lays out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.repositories import lay_out, open_clip_repository, transformers_repository
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.errors import UserError
from vipbench.harness.models.backbone import load_backbone
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import resolve_config


def load(name: str) -> Any:
    return load_backbone(BackboneConfig(name=f"hf-hub:{name}"))


def test_the_newest_commit_of_a_branch_and_a_pinned_one(hub_cache: Path, tmp_path: Path) -> None:
    """A branch stands for one commit, which is on record; a pinned commit stays what it was when the branch has moved on."""
    folder = tmp_path / "clip"
    transformers_repository(folder, "clip", "quick_gelu")
    first = lay_out(hub_cache, "tiny/clip", folder)
    old = load("tiny/clip")
    assert old.source == {"repository": "tiny/clip", "revision": "main", "commit": first}
    assert old.digest == load_backbone(BackboneConfig(name=str(folder))).digest

    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"logit_scale": weights["logit_scale"] + 1}, folder / "model.safetensors")
    second = lay_out(hub_cache, "tiny/clip", folder)
    lay_out(hub_cache, "tiny/clip", folder, revision="v2")
    new, pinned, tagged = load("tiny/clip"), load(f"tiny/clip@{first}"), load("tiny/clip@v2")
    assert new.source["commit"] == tagged.source["commit"] == second != first
    assert tagged.source["revision"] == "v2"
    assert new.digest == tagged.digest != old.digest == pinned.digest


def test_a_repository_of_both_is_read_as_open_clip_wrote_it(
    hub_cache: Path, tmp_path: Path, model_folder: Path
) -> None:
    """Lay out a repository as QuiltNet is: config.json of transformers stands beside open_clip's files."""
    open_clip_repository(tmp_path / "both", "vit", model_folder)
    lay_out(hub_cache, "tiny/one", tmp_path / "both")
    transformers_repository(tmp_path / "clip", "clip", "quick_gelu")
    shutil.copy(tmp_path / "clip" / "config.json", tmp_path / "both")
    lay_out(hub_cache, "tiny/both", tmp_path / "both")
    one, both = load("tiny/one"), load("tiny/both")
    assert one.mean == both.mean == (0.1, 0.2, 0.3)
    assert all(a.equal(b) for a, b in zip(one.parameters(), both.parameters(), strict=True))
    assert one.source["repository"] != both.source["repository"]


def test_what_a_text_tower_names_is_pinned_too(hub_cache: Path, tmp_path: Path, model_folder: Path) -> None:
    """BiomedCLIP's config names the repository of its BERT; its commit is on record."""
    bert = lay_out(hub_cache, "tiny/bert", model_folder / "bert")
    open_clip_repository(
        tmp_path / "biomed", "bert", model_folder, hf_model_name="tiny/bert", hf_tokenizer_name="tiny/bert"
    )
    lay_out(hub_cache, "tiny/biomed", tmp_path / "biomed")
    backbone = load("tiny/biomed")
    assert backbone.source["text"] == [{"repository": "tiny/bert", "revision": "main", "commit": bert}]
    assert backbone.text.encode_texts(["round"]).shape == (1, 512)


PLACES = ("hub", "folder", "JSON")
BERT = {"hf_model_name": "tiny/bert", "hf_tokenizer_name": "tiny/bert"}


def place(kind: str, hub: Path, folder: Path, model_folder: Path, text: dict[str, str]) -> BackboneConfig:
    """A model with a BERT that its text_cfg names, in the hub, in a folder or as a JSON."""
    open_clip_repository(folder, "bert", model_folder, **text)
    if kind == "hub":
        lay_out(hub, "tiny/b", folder)
        return BackboneConfig(name="hf-hub:tiny/b")
    if kind == "folder":  # whose tokenizer is its own
        shutil.copytree(model_folder / "bert", folder, dirs_exist_ok=True)
        return BackboneConfig(name=str(folder))
    return BackboneConfig(name=str(folder / "open_clip_config.json"))


def hostile_bert(model_folder: Path, folder: Path, file: str) -> Path:
    """A BERT that needs code of its own."""
    bert = shutil.copytree(model_folder / "bert", folder)
    own = {"auto_map": {"AutoConfig": "own.Config", "AutoTokenizer": ["own.T", "own.T"]}, "model_type": "own"}
    (bert / file).write_text(json.dumps(json.loads((bert / file).read_text()) | own))
    (bert / "own.py").write_text("raise SystemExit('code of a repository was run')")
    return bert


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_text_towers_repository_is_not_run(
    hub_cache: Path, tmp_path: Path, model_folder: Path, file: str, kind: str
) -> None:
    """Nor is anybody asked for leave to run it, as transformers would at a terminal."""
    lay_out(hub_cache, "tiny/bert", hostile_bert(model_folder, tmp_path / "bert", file))
    config = place(kind, hub_cache, tmp_path / "b", model_folder, BERT)
    with pytest.raises(UserError, match=f"{file}: auto_map: code of a repository is never run"):
        load_backbone(config)


@pytest.mark.parametrize("kind", PLACES)
def test_a_hub_id_is_not_a_folder_of_the_current_directory(
    hub_cache: Path, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    lay_out(hub_cache, "tiny/bert", model_folder / "bert")
    config = place(kind, hub_cache, tmp_path / "b", model_folder, BERT)
    expected = load_backbone(config)
    hostile_bert(model_folder, tmp_path / "here" / "tiny" / "bert", "config.json")
    monkeypatch.chdir(tmp_path / "here")
    found = load_backbone(config)
    assert (found.digest, found.source) == (expected.digest, expected.source)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_hub_repository_reads_no_path_outside_of_it(
    hub_cache: Path, tmp_path: Path, model_folder: Path, absolute: bool
) -> None:
    """Not even where a text tower lies there."""
    shutil.copytree(model_folder / "bert", hub_cache / "models--tiny--b" / "bert")
    outside = str(hub_cache / "models--tiny--b" / "bert") if absolute else "../../bert"
    for key in BERT:
        config = place("hub", hub_cache, tmp_path / key, model_folder, {**BERT, key: outside})
        lay_out(hub_cache, "tiny/bert", model_folder / "bert")
        with pytest.raises(UserError, match=f"text_cfg.{key}: .* leads out of the repository; a path in it or") as e:
            load_backbone(config)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["../nowhere", "a" * 300])
def test_a_text_tower_that_is_nowhere_is_one_line(
    hub_cache: Path, tmp_path: Path, model_folder: Path, name: str
) -> None:
    config = place("JSON", hub_cache, tmp_path / "b", model_folder, {**BERT, "hf_model_name": name})
    with pytest.raises(UserError, match=r"hf_model_name: \S+ is no path from there, and .*Repo id must") as e:
        load_backbone(config)
    assert "\n" not in str(e.value)


def test_code_of_a_text_towers_config_file_is_not_run(hub_cache: Path, tmp_path: Path, model_folder: Path) -> None:
    file = hostile_bert(model_folder, tmp_path / "bert", "config.json") / "config.json"
    config = place("JSON", hub_cache, tmp_path / "b", model_folder, {**BERT, "hf_model_name": str(file)})
    with pytest.raises(UserError, match="auto_map: code of a repository is never run"):
        load_backbone(config)


@pytest.mark.parametrize(
    ("family", "file", "change", "message"),
    [
        ("vit", "open_clip_config.json", {"multimodal_cfg": {}}, "is a CoCa"),
        ("clip", "config.json", {"model_type": "siglip2"}, "model_type is siglip2; only clip and siglip"),
        ("clip", "tokenizer_config.json", {"pad_token": None}, "the tokenizer has no padding token"),
    ],
)
def test_what_is_refused_costs_no_download_of_weights(
    hub_cache: Path,
    tmp_path: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    file: str,
    change: dict[str, Any],
    message: str,
) -> None:
    if family == "vit":
        open_clip_repository(tmp_path / "made", "vit", model_folder)
    else:
        transformers_repository(tmp_path / "made", family, "gelu")
    content = json.loads((tmp_path / "made" / file).read_text())
    content.get("model_cfg", content).update(change)
    (tmp_path / "made" / file).write_text(json.dumps(content))
    lay_out(hub_cache, "tiny/refused", tmp_path / "made")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("weights were fetched"))
    with pytest.raises(UserError, match=message):
        load("tiny/refused")


def test_shards_of_weights_come_one_by_one(hub_cache: Path, tmp_path: Path) -> None:
    transformers_repository(tmp_path / "clip", "clip", "gelu", shards=True)
    assert len(list((tmp_path / "clip").glob("*.safetensors"))) > 1
    lay_out(hub_cache, "tiny/clip", tmp_path / "clip")
    assert load("tiny/clip").digest == load_backbone(BackboneConfig(name=str(tmp_path / "clip"))).digest
    index = tmp_path / "clip" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"logit_scale": "../../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match=r"elsewhere\.safetensors is no name of a file beside it"):
        load_backbone(BackboneConfig(name=str(tmp_path / "clip")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "'hf-hub:nobody/nothing' cannot be had from the hub or its cache: .*HF_HUB_OFFLINE"),
        ("tiny/clip@v9", "'hf-hub:tiny/clip@v9' cannot be had from the hub or its cache"),
        ("../clip", "'hf-hub:../clip' cannot be had from the hub or its cache: Repo id must"),
    ],
)
def test_what_is_not_there_is_one_line(hub_cache: Path, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "clip").mkdir()
    lay_out(hub_cache, "tiny/clip", tmp_path / "clip")
    with pytest.raises(UserError, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_a_runs_provenance_names_the_commit(
    hub_cache: Path, tmp_path: Path, model_folder: Path, base_config: dict[str, Any]
) -> None:
    open_clip_repository(tmp_path / "vit", "vit", model_folder)
    commit = lay_out(hub_cache, "tiny/vit", tmp_path / "vit")
    train = {"epochs": 1, "batch_size": 9, "warmup_epochs": 0}
    run = {**base_config["run"], "out": str(tmp_path / "runs")}
    config = {**base_config, "backbone": {"name": "hf-hub:tiny/vit"}, "train": train, "run": run}
    provenance = json.loads((execute(resolve_config(config)) / "provenance.json").read_text())
    assert provenance["backbone"] == {"repository": "tiny/vit", "revision": "main", "commit": commit}
