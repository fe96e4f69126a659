"""open_clip's own SigLIP and SigLIP 2 configs, made small: their text towers read padding, as open_clip does; CoCa is refused."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from tests.conftest import MODELS
from tests.repositories import siglip_tokenizer
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.errors import UserError
from vipbench.harness.models.backbone import Backbone, load_backbone
from vipbench.harness.models.hugging_face import TRUNK
from vipbench.harness.models.open_clip import create
from vipbench.harness.models.prompts import SLOT, PromptBatch

TEXTS = ["a photo of a melanoma.", "Round", "a border"]
NAMES = [name for name in open_clip.list_models() if "SigLIP" in name]


def small(name: str, folder: Path) -> BackboneConfig:
    """A model JSON with every flag of one of open_clip's configs, but few layers, a tiny trunk and a tokenizer of letters."""
    tokenizer = siglip_tokenizer("siglip2" if "SigLIP2" in name else "siglip")
    tokenizer.save_pretrained(folder / "tokenizer")
    trunk = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    (folder / "trunk").mkdir()
    described = {"architecture": TRUNK, "model_args": trunk, "pretrained_cfg": {}}
    (folder / "trunk" / "config.json").write_text(json.dumps(described))
    config: dict[str, Any] = open_clip.get_model_config(name)
    config["embed_dim"] = 32
    config["vision_cfg"] |= {"timm_model_name": f"local-dir:{folder / 'trunk'}", "image_size": 32}
    text = {"width": 32, "heads": 2, "layers": 2, "vocab_size": len(tokenizer), "hf_tokenizer_name": "tokenizer"}
    config["text_cfg"] |= text
    (folder / "model.json").write_text(json.dumps(config))
    return BackboneConfig(name=str(folder / "model.json"))


@pytest.mark.parametrize(
    "name", ["ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "ViT-SO400M-14-SigLIP", "ViT-SO400M-16-SigLIP2-384"]
)
def test_towers_equal_open_clip(tmp_path: Path, name: str) -> None:
    model, tokenizer, architecture = create(small(name, tmp_path))
    model.eval()
    backbone = Backbone(model, tokenizer, architecture)
    pixels = torch.randn(2, 3, 32, 32)
    texts = [text for text in TEXTS if len(backbone.text.tokenize(text)) < backbone.text.context_length]
    with torch.no_grad():
        assert (backbone.text.encode_texts(texts) - model.encode_text(tokenizer(texts))).abs().max() < 1e-5
        assert (backbone.encode_images(pixels) - model.encode_image(pixels, normalize=True)).abs().max() < 1e-5
        logits = model.get_logits(pixels, tokenizer(texts))[0]
        features = torch.nn.functional.normalize(backbone.text.encode_texts(texts), dim=-1)
        ours = backbone.logit_scale * backbone.encode_images(pixels) @ features.T + backbone.logit_bias
    assert (ours - logits).abs().max() < 1e-5
    assert float(backbone.logit_bias) == -10
    tower, word = backbone.text, backbone.text.tokenize("red")
    batch = PromptBatch(tower, [[SLOT] * len(word)], ["one"])
    filled = tower(batch.fill(tower.embed(torch.tensor([word]))))
    assert (filled - tower.encode_texts(["red"])).abs().max() < 1e-5


def test_all_siglip_names_have_flags_that_are_read() -> None:
    """Each of open_clip's configs is like one of those that were built above, apart from sizes."""
    assert len(NAMES) >= 20
    for name in NAMES:
        config = open_clip.get_model_config(name)
        text = config["text_cfg"]
        assert (text["pool_type"], text["no_causal_mask"]) == ("last", True), name
        assert (config["vision_cfg"]["timm_pool"], config["vision_cfg"]["timm_proj"]) == ("map", "none"), name
        assert text["hf_tokenizer_name"] and not text.get("embed_cls"), name


@pytest.mark.parametrize("where", ["file", "name"])
def test_coca_is_refused_with_a_reason(tmp_path: Path, where: str) -> None:
    """Before it is built, so at once."""
    multimodal = {"context_length": 76, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
    config = {**MODELS["vit"], "custom_text": True, "multimodal_cfg": multimodal}
    (tmp_path / "coca.json").write_text(json.dumps(config))
    name = str(tmp_path / "coca.json") if where == "file" else "coca_ViT-L-14"
    with pytest.raises(
        UserError, match="is a CoCa; only CLIP and CustomTextCLIP are supported, since CoCa reads its text"
    ):
        load_backbone(BackboneConfig(name=name))
