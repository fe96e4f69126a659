"""Small random backbones of every kind, built on the spot."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from vipbench.harness.cli import app
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.data.reader import DamagedSample, Samples
from vipbench.harness.methods import registry
from vipbench.harness.models.backbone import Backbone, load_backbone
from vipbench.harness.models.open_clip import create


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of tests/fuzz."""
    group = parser.getgroup("fuzz", "damaged files and answers (tests/fuzz)")
    group.addoption("--count", type=int, default=8, help="cases of each kind")
    group.addoption("--seed", type=int, default=1, help="of all cases")
    group.addoption("--case", type=int, default=None, help="one case of each kind, by its number")


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove after a test the methods that it registers, as in another process."""
    registry.method_names()
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(registry, "_plugins", {})


VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    # open_clip's CLIP, text width == joint size
    "vit": {"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT},
    # ResNet image tower, text width != joint size (as RN50 has 512 and 1024)
    "resnet": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": TEXT,
    },
    # CustomTextCLIP with a BERT text tower (as BiomedCLIP has: text width 768, joint size 512)
    "bert": {
        "embed_dim": 512,
        "vision_cfg": VIT,
        "text_cfg": {
            "hf_model_name": "bert",
            "hf_tokenizer_name": "bert",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 64,
        },
    },
    # CustomTextCLIP with open_clip's own transformer: bidirectional, pooled at the last position, padding attended to
    "bidirectional": {
        "embed_dim": 48,
        "custom_text": True,
        "vision_cfg": VIT,
        "text_cfg": {**TEXT, "context_length": 24, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
}
BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "vocab_size": 60,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ","]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]


@dataclass(frozen=True)
class Towers:
    """A backbone in our view, and the open_clip model and tokenizer behind it (same modules, same weights)."""

    backbone: Backbone
    model: Any
    tokenizer: Any


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model JSON of each kind, and a BERT configuration with its tokenizer."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("models")
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text(json.dumps(BERT))
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY + LETTERS + [f"##{letter}" for letter in LETTERS]))
    BertTokenizer(vocab=str(vocabulary)).save_pretrained(folder / "bert")
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps({"model_cfg": config}))
    return folder


@pytest.fixture(scope="session")
def towers(model_folder: Path) -> dict[str, Towers]:
    """All kinds of backbones, by name."""
    built = {}
    for name in MODELS:
        model, tokenizer, architecture = create(BackboneConfig(name=str(model_folder / f"{name}.json")))
        built[name] = Towers(Backbone(model, tokenizer, architecture), model, tokenizer)
    return built


@pytest.fixture(scope="session")
def vit_backbone(model_folder: Path) -> Backbone:
    """The smallest backbone."""
    return load_backbone(BackboneConfig(name=str(model_folder / "vit.json")))


CLASSES = ["melanoma", "basal cell carcinoma", "nevus"]
COUNTS = {"train": 6, "val": 3, "test": 7}  # images per class; 21 test images do not divide among 2 or 4 processes
SYMPTOMS = {
    "melanoma": ["jagged uneven border", "many colours"],
    "basal cell carcinoma": ["shiny bump"],
    "nevus": ["round", "one even brown colour", "small"],
}


def write_images(folder: Path, seed: int = 0) -> None:
    """A folder per split and class with small pictures, each class of its own tint."""
    numbers = np.random.default_rng(seed)
    for split, count in COUNTS.items():
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = numbers.integers(0, 160, (40, 48, 3), dtype=np.uint8)
                pixels[..., label] += 90
                Image.fromarray(pixels).save(folder / split / name / f"{name[:3]}{index}.png")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of three classes, with a validation split."""
    folder = tmp_path_factory.mktemp("dataset")
    write_images(folder / "images")
    command = ["prepare", str(folder / "images"), "--format", "folder", "--out", str(folder / "data")]
    result = CliRunner().invoke(app, [*command, "--classes", ",".join(CLASSES)])
    assert result.exit_code == 0, result.output
    return folder / "data"


@pytest.fixture(scope="session")
def symptoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A symptom set for those classes, in another order than the dataset's."""
    classes = [
        {"name": name, "symptoms": [{"text": text} for text in texts]} for name, texts in reversed(SYMPTOMS.items())
    ]
    provenance = {"kind": "hand-written", "author": "tests", "created": "2026-01-01", "how": "made up"}
    content = {
        "format": "vipbench-symptoms/1",
        "task": "test",
        "modality": None,
        "classes": classes,
        "provenance": provenance,
    }
    path = tmp_path_factory.mktemp("symptoms") / "set.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="session")
def base_config(dataset: Path, symptoms: Path, model_folder: Path) -> dict[str, Any]:
    """A config of a run that takes a second."""
    return {
        "data": {"path": str(dataset), "shots": "all"},
        "backbone": {"name": str(model_folder / "resnet.json")},
        "symptoms": str(symptoms),
        "method": {"name": "vip", "context_length": 2},
        "train": {"epochs": 3, "batch_size": 5, "lr": 0.05},
        "run": {"device": "cpu", "workers": 0},
    }


@pytest.fixture
def one_damaged_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second sample of every split cannot be read as it is evaluated."""
    whole = Samples.image

    def image(samples: Samples, position: int) -> Any:
        if position == 1:
            raise DamagedSample(samples.key(position), "a shard", 0, "made up")
        return whole(samples, position)

    monkeypatch.setattr(Samples, "image", image)


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules whose mode `nn.Module.train` sets from here on, in order."""
    found: list[nn.Module] = []
    train = nn.Module.train

    def noted(module: nn.Module, mode: bool = True) -> nn.Module:
        found.append(module)
        return train(module, mode)

    monkeypatch.setattr(nn.Module, "train", noted)
    return found
