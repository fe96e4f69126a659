"""Backbones: configs, weights, OpenAI's archive, tokenizers."""

import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import MODELS
from tests.fuzz.kind import Kind, Sound, each
from tests.openai_clip import openai_weights, transformers_clip, write_archive
from tests.repositories import transformers_repository
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.models.backbone import load_backbone
from vipbench.harness.models.open_clip import create
from vipbench.harness.system.files import write_json


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


def _make_repositories(sound: Sound, folder: Path) -> None:
    for family in ("clip", "siglip"):
        transformers_repository(folder / family, family, "quick_gelu")


def _use_repositories(sound: Sound, folder: Path, rng: Random) -> None:
    each(lambda: _use_backbone(folder / "clip"), lambda: _use_backbone(folder / "siglip"))


def _use_backbone(name: Path, weights: Path | None = None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vipbench.harness.models.open_clip.MOST_PARAMETERS", 10**7)
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


KINDS = {
    "architecture": Kind(
        _make_models, ("vit.json", "resnet.json", "bert.json", "bert/*", "hub/*.json"), _use_architectures
    ),
    "weights": Kind(_make_models, ("*.safetensors", "*.pt"), _use_weights),
    "repositories": Kind(_make_repositories, ("*/*.json", "*/*.safetensors"), _use_repositories),
}
