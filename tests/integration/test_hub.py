"""The hub as a user has it: environment variables, a cache of the hub's layout, and a server that speaks its file API."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launching import ROOT, launch
from tests.repositories import commit_of, hub_server, lay_out, open_clip_repository, transformers_repository
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.models.backbone import load_backbone

pytestmark = pytest.mark.integration

LOAD = """
import json, sys
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.models.backbone import load_backbone
loaded = {}
for name in sys.argv[1:]:
    backbone = load_backbone(BackboneConfig(name="hf-hub:" + name))
    loaded[name] = {"digest": backbone.digest, **backbone.source}
print(json.dumps(loaded))
"""


def load(names: list[str], folder: Path, **variables: str) -> dict[str, Any]:
    result = launch([sys.executable, "-c", LOAD, *names], folder, PYTHONPATH=str(ROOT), **variables)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    """A repository of each family, by name."""
    root = tmp_path_factory.mktemp("hub")
    open_clip_repository(root / "vit", "vit", model_folder)
    open_clip_repository(root / "resnet", "resnet", model_folder)
    bert = {"hf_model_name": "tiny/bert", "hf_tokenizer_name": "tiny/bert"}
    open_clip_repository(root / "biomed", "bert", model_folder, **bert)
    shutil.copytree(model_folder / "bert", root / "bert")
    for family in ("clip", "siglip", "siglip2"):
        transformers_repository(root / family, family, "gelu_pytorch_tanh")
    return {f"tiny/{folder.name}": folder for folder in root.iterdir()}


def test_every_family_by_its_id_offline_and_from_a_server(repositories: dict[str, Path], tmp_path: Path) -> None:
    names = [name for name in repositories if name != "tiny/bert"]
    commits = {name: lay_out(tmp_path / "home" / "hub", name, folder) for name, folder in repositories.items()}
    pinned = f"tiny/clip@{commits['tiny/clip']}"
    offline = load([*names, pinned], tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert {name: offline[name]["commit"] for name in names} == {name: commits[name] for name in names}
    assert offline[pinned]["digest"] == offline["tiny/clip"]["digest"]
    for name in ("tiny/clip", "tiny/siglip", "tiny/siglip2"):
        assert offline[name]["digest"] == load_backbone(BackboneConfig(name=str(repositories[name]))).digest
    assert offline["tiny/biomed"]["text"][0]["commit"] == commits["tiny/bert"]

    newer = shutil.copytree(repositories["tiny/clip"], tmp_path / "newer")
    (newer / "README.md").write_text("a newer commit of the same model")
    (newer / "onnx").mkdir()
    (newer / "onnx" / "config.json").write_text("{}")
    served = {name: {"main": folder} for name, folder in repositories.items()}
    served["tiny/clip"] = {"main": newer, "v1": repositories["tiny/clip"]}
    with hub_server(served) as (endpoint, requests):
        home = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "other"), "HF_HUB_OFFLINE": "0"}
        online = load([*names, "tiny/clip@v1", pinned], tmp_path, HF_HUB_DISABLE_PROGRESS_BARS="1", **home)
    assert {name: online[name]["digest"] for name in names} == {name: offline[name]["digest"] for name in names}
    assert online["tiny/clip"]["commit"] == commit_of(newer)
    assert online["tiny/clip@v1"]["commit"] == online[pinned]["commit"] == commits["tiny/clip"]
    assert not any("README.md" in request or "onnx" in request for request in requests), "only what is read is fetched"
    weights = [request for request in requests if request.startswith("GET") and request.endswith("model.safetensors")]
    assert all("/resolve/main/" not in request for request in weights), "files are fetched by their commit"
    assert weights
