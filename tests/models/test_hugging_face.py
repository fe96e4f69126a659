"""Repositories of transformers as open_clip modules: the same features, logits and pixels as transformers' own classes give."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.repositories import clip_tokenizer, siglip_tokenizer, transformers_repository
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.errors import UserError
from vipbench.harness.models.backbone import Backbone, load_backbone
from vipbench.harness.models.prompts import SLOT, PromptBatch

TEXTS = ["a photo of a melanoma.", "round", "the border of an irregular lesion, with many colours"]
PLAIN = [
    "a photo of a melanoma",
    "round",
    "the border of an irregular lesion with many colours",
]  # as SigLIP reads them
KINDS: dict[str, dict[str, Any]] = {
    "clip": {"family": "clip", "activation": "quick_gelu"},
    "clip argmax": {"family": "clip", "activation": "gelu", "text": {"eos_token_id": 2}},
    "clip sizes": {
        "family": "clip",
        "activation": "gelu_pytorch_tanh",
        "text": {"hidden_size": 48, "num_attention_heads": 4, "layer_norm_eps": 0.1, "max_position_embeddings": 80},
        "vision": {"num_hidden_layers": 1, "layer_norm_eps": 0.2},
        "shards": True,
    },
    "clip vocabulary": {"family": "clip", "activation": "gelu", "vocabulary": True},
    "siglip": {"family": "siglip", "activation": "gelu_pytorch_tanh"},
    "siglip sizes": {
        "family": "siglip",
        "activation": "quick_gelu",
        "text": {"hidden_size": 48, "num_attention_heads": 4, "projection_size": 32, "layer_norm_eps": 0.1},
        "vision": {"hidden_act": "gelu", "patch_size": 14, "layer_norm_eps": 0.2},
    },
    "siglip2": {"family": "siglip2", "activation": "gelu_pytorch_tanh"},
}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """A repository of each kind and the model of transformers that is in it."""
    root = tmp_path_factory.mktemp("repositories")
    return {kind: (root / kind, transformers_repository(root / kind, **given)) for kind, given in KINDS.items()}


def load(folder: Path) -> Backbone:
    return load_backbone(BackboneConfig(name=str(folder)))


def transformers_tokens(kind: str, model: Any) -> torch.Tensor:
    """Tokens of TEXTS as transformers' processors make them, padded to the text tower's length."""
    family = KINDS[kind]["family"]
    tokenizer = clip_tokenizer() if family == "clip" else siglip_tokenizer(family)
    texts = PLAIN if family == "siglip" else TEXTS
    length = model.config.text_config.max_position_embeddings
    return tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids


@pytest.mark.parametrize("kind", list(KINDS))
def test_features_and_logits_equal_transformers(repositories: dict[str, tuple[Path, Any]], kind: str) -> None:
    folder, model = repositories[kind]
    backbone = load(folder)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=transformers_tokens(kind, model), pixel_values=pixels)
        texts = torch.nn.functional.normalize(backbone.text.encode_texts(TEXTS), dim=-1)
        images = backbone.encode_images(pixels)
        logits = backbone.logit_scale * images @ texts.T + backbone.logit_bias
    assert (images - expected.image_embeds).abs().max() < 1e-5
    assert (texts - expected.text_embeds).abs().max() < 1e-5
    assert (logits - expected.logits_per_image).abs().max() < 1e-5
    assert float(backbone.logit_bias) == (0 if kind.startswith("clip") else -3.25)
    assert backbone.dim == expected.image_embeds.shape[-1]
    assert torch.equal(backbone.text.tokenizer(TEXTS), transformers_tokens(kind, model))


@pytest.mark.parametrize("kind", ["clip", "clip argmax", "siglip", "siglip2"])
def test_slots_take_context_vectors(repositories: dict[str, tuple[Path, Any]], kind: str) -> None:
    """A word's own embeddings in the slots are the word, padding of SigLIP included."""
    tower = load(repositories[kind][0]).text
    word, rest = tower.tokenize("blue"), tower.tokenize("round")
    batch = PromptBatch(tower, [[SLOT] * len(word) + rest], ["one"])
    features = tower(batch.fill(tower.embed(torch.tensor([word]))))
    assert (features - tower.encode_texts(["blue round"])).abs().max() < 1e-5
    assert tower.pads_to_context_length == kind.startswith("siglip")


def test_siglip_reads_lower_case_without_punctuation(repositories: dict[str, tuple[Path, Any]]) -> None:
    """SigLIP 2 keeps punctuation."""
    first, second = load(repositories["siglip"][0]).text, load(repositories["siglip2"][0]).text
    assert first.tokenize("Round, of  AN.") == first.tokenize("round of an")
    assert second.tokenize("Round.") == second.tokenize("round.") != second.tokenize("round")


def pixel_difference(folder: Path, shape: tuple[int, int]) -> float:
    """The most by which a drawn image's pixels differ from those that transformers prepares."""
    from transformers import AutoImageProcessor

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    expected = torch.as_tensor(np.array(processor(image, return_tensors="np").pixel_values[0]))
    return float((load(folder).eval_transform(image) - expected).abs().max())


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("shape", [(32, 32), (40, 90), (64, 20)])
def test_pixels_equal_transformers(
    repositories: dict[str, tuple[Path, Any]], kind: str, shape: tuple[int, int]
) -> None:
    assert pixel_difference(repositories[kind][0], shape) < 1e-5


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("clip", {"resample": 2}),
        ("siglip", {"resample": 2}),
        ("clip", {"do_normalize": False}),
        ("siglip", {"do_normalize": False}),
        ("clip", {"size": 32, "crop_size": 32}),
    ],
)
def test_pixels_equal_transformers_under_other_settings(
    repositories: dict[str, tuple[Path, Any]], tmp_path: Path, kind: str, values: dict[str, Any]
) -> None:
    """In preprocessor_config.json, and within processor_config.json as newer transformers write it."""
    folder = changed(repositories[kind][0], tmp_path / "changed", "preprocessor_config.json", **values)
    assert pixel_difference(folder, (40, 90)) < 1e-5
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert pixel_difference(folder, (40, 90)) < 1e-5


def changed(source: Path, folder: Path, file: str, section: str | None = None, **values: Any) -> Path:
    """A copy of a repository with other values in a JSON file; None takes one out."""
    shutil.copytree(source, folder)
    content = json.loads((folder / file).read_text())
    part = content[section] if section else content
    part.update(values)
    for name in [name for name, value in values.items() if value is None]:
        del part[name]
    (folder / file).write_text(json.dumps(content))
    return folder


def test_the_digest_covers_what_changes_a_result(repositories: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    """Weights, activation, EOT rule, preprocessing, tokenizer; not where the repository lies, nor how its weights are stored."""
    source = repositories["clip"][0]
    same = load(source).digest
    moved = shutil.copytree(source, tmp_path / "moved")
    (moved / "README.txt").write_text("is not read")
    weights = load_file(moved / "model.safetensors")
    (moved / "model.safetensors").unlink()
    torch.save(weights, moved / "pytorch_model.bin")
    assert load(moved).digest == same
    vision = changed(source, tmp_path / "act", "config.json", "vision_config", hidden_act="gelu")
    variants = [
        changed(vision, tmp_path / "acts", "config.json", "text_config", hidden_act="gelu"),
        changed(source, tmp_path / "eps", "config.json", "text_config", layer_norm_eps=1e-3),
        changed(source, tmp_path / "rule", "config.json", "text_config", eos_token_id=2),
        changed(source, tmp_path / "mean", "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3]),
        changed(source, tmp_path / "squash", "preprocessor_config.json", size={"height": 32, "width": 32}),
        changed(source, tmp_path / "words", "tokenizer_config.json", model_max_length=33),
    ]
    other = shutil.copytree(source, tmp_path / "weights")
    save_file(weights | {"logit_scale": weights["logit_scale"] + 1}, other / "model.safetensors")
    digests = [load(folder).digest for folder in [*variants, other]]
    assert len({same, *digests}) == len(digests) + 1
    siglip, eps = repositories["siglip"][0], tmp_path / "siglip"
    changed(siglip, eps, "config.json", "vision_config", layer_norm_eps=1e-3)
    assert load(eps).digest != load(siglip).digest


@pytest.mark.parametrize(
    ("kind", "file", "section", "values", "message"),
    [
        (
            "clip",
            "config.json",
            None,
            {"model_type": "chinese_clip"},
            "model_type is chinese_clip; only clip and siglip can be converted$",
        ),
        (
            "clip",
            "config.json",
            "text_config",
            {"hidden_act": "relu"},
            "hidden_act relu is not known; only quick_gelu, gelu, gelu_pytorch_tanh can be converted$",
        ),
        (
            "clip",
            "config.json",
            "text_config",
            {"hidden_act": "gelu"},
            "gelu and quick_gelu; open_clip has one for both",
        ),
        ("clip", "config.json", "text_config", {"eos_token_id": 5}, "end with token 61, but .* eos_token_id 5"),
        ("clip", "config.json", "text_config", {"vocab_size": 40}, "tokens up to 61, the text tower only 40"),
        ("clip", "config.json", "text_config", {"num_hidden_layers": 10**9}, "at most 1000 is expected"),
        ("clip", "config.json", "vision_config", {"num_channels": 1}, "square images and patches of 3 channels"),
        ("clip", "config.json", "text_config", {"num_hidden_layers": 3}, "cannot be loaded: .*Missing key"),
        ("clip", "config.json", "text_config", {"num_hidden_layers": 1}, "cannot be loaded: .*Unexpected key"),
        (
            "clip",
            "preprocessor_config.json",
            None,
            {"size": {"shortest_edge": 40}},
            "resized to .*40.*model's 32 pixels",
        ),
        ("clip", "preprocessor_config.json", None, {"crop_size": 28}, "cropped to 28; the model's 32 pixels"),
        ("clip", "preprocessor_config.json", None, {"resample": 1}, "resample is 1; 2 .bilinear. or 3 .bicubic."),
        ("clip", "preprocessor_config.json", None, {"image_std": None}, "image_mean or image_std is missing"),
        ("siglip", "config.json", "vision_config", {"vision_use_head": False}, "without its pooling head"),
        ("siglip", "config.json", "text_config", {"projection_size": 24}, "24 numbers, image features 32"),
        ("siglip", "tokenizer_config.json", None, {"padding_side": "left"}, "pads on the left"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    repositories: dict[str, tuple[Path, Any]],
    tmp_path: Path,
    kind: str,
    file: str,
    section: str | None,
    values: dict[str, Any],
    message: str,
) -> None:
    folder = changed(repositories[kind][0], tmp_path / "changed", file, section, **values)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("preprocessor_config.json", "preprocessor_config.json is missing"),
        ("model.safetensors", "no weights: one of model.safetensors, pytorch_model.bin"),
        ("tokenizer.json", "no tokenizer: tokenizer.json is expected"),
    ],
)
def test_a_missing_file_is_named(
    repositories: dict[str, tuple[Path, Any]], tmp_path: Path, missing: str, message: str
) -> None:
    folder = shutil.copytree(repositories["clip"][0], tmp_path / "lacking")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=message):
        load(folder)


def test_the_highest_token_must_be_the_end_token_under_the_old_rule(tmp_path: Path) -> None:
    """With special tokens in front the first end token is read, which transformers does alike; the old rule is refused."""
    tokenizer = clip_tokenizer(specials_first=True)
    model = transformers_repository(
        tmp_path, "clip", "gelu", {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    )
    tokenizer.save_pretrained(tmp_path)
    tokens = tokenizer(TEXTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.get_text_features(input_ids=tokens).pooler_output
    assert (load(tmp_path).text.encode_texts(TEXTS) - expected).abs().max() < 1e-5
    old = changed(tmp_path, tmp_path / "old", "config.json", "text_config", eos_token_id=2)
    with pytest.raises(UserError, match=r"end token 1 is not the highest \(61\); set text_config.eos_token_id to 1"):
        load(old)


def test_pickled_weights_are_not_run(
    repositories: dict[str, tuple[Path, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is code of a repository: an auto_map in its configs is not followed."""
    from tests.models.test_weights import Hostile

    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(repositories["clip"][0], tmp_path / "hostile")
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / file).read_text())
        own = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoTokenizer": ["own.T", "own.T"]}
        (folder / file).write_text(json.dumps(content | {"auto_map": own}))
    (folder / "own.py").write_text("raise SystemExit('code of a repository was run')")
    load(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)
    assert not (tmp_path / "executed").exists()
