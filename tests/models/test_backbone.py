"""Backbones: both towers agree with open_clip's own, whatever the kind; loading from all sorts of places."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import MODELS, Towers
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.errors import UserError
from vipbench.harness.models.backbone import load_backbone
from vipbench.harness.models.prompts import SLOT, PromptBatch

TEXTS = ["a photo of a melanoma.", "round", "a very irregular border with three colours, some of them blue"]


@pytest.mark.parametrize("kind", list(MODELS))
def test_towers_equal_open_clip(towers: dict[str, Towers], kind: str) -> None:
    """Our ragged, shortened text path gives what the model's own padded path gives; images too."""
    backbone, model, tokenizer = towers[kind].backbone, towers[kind].model, towers[kind].tokenizer
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.encode_text(tokenizer(TEXTS))
        assert (backbone.text.encode_texts(TEXTS) - expected).abs().max() < 1e-5
        images = model.encode_image(pixels, normalize=True)
        assert (backbone.encode_images(pixels) - images).abs().max() < 1e-5
    assert backbone.dim == expected.shape[-1] == MODELS[kind]["embed_dim"]


def test_sizes_differ_where_they_should(towers: dict[str, Towers]) -> None:
    sizes = {kind: (entry.backbone.text.width, entry.backbone.dim) for kind, entry in towers.items()}
    assert sizes == {"vit": (32, 32), "resnet": (32, 64), "bert": (768, 512), "bidirectional": (32, 48)}


@pytest.mark.parametrize("kind", list(MODELS))
def test_slots_take_context_vectors_and_gradients(towers: dict[str, Towers], kind: str) -> None:
    """Filling the slots with a word's own embeddings is the same as writing the word, and gradients reach only the slots."""
    tower = towers[kind].backbone.text
    word, rest = tower.tokenize("blue"), [tower.tokenize("dots."), tower.tokenize("a border of no shape.")]
    batch = PromptBatch(tower, [[SLOT] * len(word) + body for body in rest], ["one", "two"])
    context = tower.embed(torch.tensor([word])).detach().requires_grad_()
    features = tower(batch.fill(context))
    expected = tower.encode_texts(["blue dots.", "blue a border of no shape."])
    assert (features - expected).abs().max() < 1e-5
    features.sum().backward()
    assert context.grad is not None
    assert context.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in towers[kind].backbone.parameters())


def test_a_prompt_that_does_not_fit_is_named(towers: dict[str, Towers]) -> None:
    tower = towers["bert"].backbone.text
    with pytest.raises(UserError, match=r"class 'nevus', symptom 'x': 90 tokens .* takes 64"):
        PromptBatch(tower, [[SLOT] * 8 + [9] * 80], ["class 'nevus', symptom 'x'"])


def test_random_weights_are_the_same_each_time_and_the_digest_knows_them(model_folder: Path) -> None:
    first, second, other = (
        load_backbone(BackboneConfig(name=str(model_folder / f"{kind}.json"))) for kind in ("vit", "vit", "resnet")
    )
    assert first.digest == second.digest != other.digest
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_loading_from_json_with_safetensors_file_and_folder(
    towers: dict[str, Towers], model_folder: Path, tmp_path: Path
) -> None:
    """A model JSON with a weights file, and a folder in the layout of the hub, give the same model."""
    state = {name: value + 0.01 for name, value in towers["vit"].model.state_dict().items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    preprocess = {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": MODELS["vit"], "preprocess_cfg": preprocess})
    )
    folder = load_backbone(BackboneConfig(name=str(tmp_path)))
    file = load_backbone(
        BackboneConfig(
            name=str(tmp_path / "open_clip_config.json"), pretrained=str(tmp_path / "open_clip_model.safetensors")
        )
    )
    assert folder.mean == file.mean == (0.1, 0.2, 0.3)
    assert folder.digest == file.digest != towers["vit"].backbone.digest
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(folder.encode_images(pixels), file.encode_images(pixels))


def test_open_clip_names_work_and_wrong_ones_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean ViT-B-16"):
        load_backbone(BackboneConfig(name="ViT-B16"))
    with pytest.raises(UserError, match="not a known tag or valid file"):
        load_backbone(BackboneConfig(name="RN50", pretrained="no-such-tag"))
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(BackboneConfig(name="RN50", pretrained=str(tmp_path / "bad.pt")))


def test_evaluation_uses_the_models_own_preprocessing(towers: dict[str, Towers]) -> None:
    """Short side resized to the model's size (bicubic), centre crop, the model's mean and deviation."""
    backbone = towers["vit"].backbone
    image = Image.radial_gradient("L").resize((64, 128)).convert("RGB")
    crop = image.resize((32, 64), Image.Resampling.BICUBIC).crop((0, 16, 32, 48))
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    assert (backbone.eval_transform(image) - (pixels - mean) / std).abs().max() < 1e-5


def test_a_frozen_backbone_stays_in_evaluation_mode(towers: dict[str, Towers]) -> None:
    """BERT's dropout and a ResNet's batch statistics must not move when a method around them trains."""
    for kind in ("bert", "resnet"):
        backbone = towers[kind].backbone
        backbone.train()
        pixels = torch.randn(2, 3, 32, 32)
        before = {name: value.clone() for name, value in backbone.named_buffers()}
        assert torch.equal(backbone.text.encode_texts(["round"]), backbone.text.encode_texts(["round"]))
        assert F.cosine_similarity(backbone.encode_images(pixels), backbone.encode_images(pixels)).min() > 0.99999
        assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())


@pytest.mark.parametrize("texts", [["round", "a photo of a melanoma"], ["a b", "c d"]], ids=["ragged", "even"])
def test_bert_gets_the_mask_that_transformers_would_make(
    towers: dict[str, Towers], monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    """The same bits, without asking the device if anything is padded."""
    tower: Any = towers["bert"].backbone.text
    assert tower.takes_square_mask
    ours = tower.encode_texts(texts)
    monkeypatch.setattr(tower, "takes_square_mask", False)
    assert torch.equal(tower.encode_texts(texts), ours)
