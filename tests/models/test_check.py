"""`vipbench backbone check` and `list`: known answers, and warnings where a model is not as its family is known to be."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.repositories import lay_out, transformers_repository
from vipbench.harness.cli import app
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.models.backbone import load_backbone
from vipbench.harness.models.check import activations, drawn_image
from vipbench.harness.models.known import FILE, known

MEDICAL = (
    "BiomedCLIP", "PubMedCLIP", "PLIP", "QuiltNet-B-32", "QuiltNet-B-16", "QuiltNet-B-16-PMB", "PMC-OA ViT-L/14", "DermLIP",
    "MONET", "MedSigLIP", "WhyLesionCLIP", "WhyXrayCLIP",
)  # fmt: skip


def check(*arguments: str) -> tuple[dict[str, str], list[str]]:
    """Run the check; return what is printed, by label, and the warnings."""
    result = CliRunner().invoke(app, ["backbone", "check", *arguments])
    assert result.exit_code == 0, result.output
    pairs = [line.split("  ", 1) for line in result.stdout.splitlines()]
    return {label: fact.strip() for label, fact in pairs}, result.stderr.splitlines()


def set_clip(folder: Path, size: int = 224, **text: object) -> Path:
    """A repository of a CLIP of few layers that reads images of a size."""
    transformers_repository(folder, "clip", "quick_gelu", text, {"image_size": size, "patch_size": 16})
    file = folder / "preprocessor_config.json"
    sizes = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    file.write_text(json.dumps(json.loads(file.read_text()) | sizes))
    return folder


def test_a_backbone_as_it_should_be_prints_its_facts(hub_cache: Path, tmp_path: Path) -> None:
    folder = set_clip(tmp_path / "plip")
    commit = lay_out(hub_cache, "vinid/plip", folder)
    facts, warnings = check("hf-hub:vinid/plip")
    assert warnings == []
    backbone = load_backbone(BackboneConfig(name=str(folder)))
    assert facts["revision"] == f"main, commit {commit}"
    assert facts["family"] == "openai-clip"
    assert facts["activation"] == "image QuickGELU; text QuickGELU"
    assert facts["digest"] == backbone.digest
    assert facts["preprocessing"].startswith(
        "resize shortest side to 224, centre crop 224 x 224 (bicubic), mean [0.4815"
    )
    assert facts["tokenizer"] == "TokenizersBackend of 62 tokens, start [60], end [61], padding 61"
    with torch.no_grad():
        feature = backbone.image(backbone.eval_transform(drawn_image())[None])[0]
    assert facts["drawn image"].startswith(f"norm {float(feature.norm()):.4f}")


def test_what_differs_from_its_family_is_warned_about(hub_cache: Path, tmp_path: Path) -> None:
    """QuickGELU, mean and deviation, resolution, context length."""
    folder = set_clip(tmp_path / "plip", 32, max_position_embeddings=64)
    for file, change in {
        "config.json": lambda content: [
            content[part].update(hidden_act="gelu") for part in ("text_config", "vision_config")
        ],
        "preprocessor_config.json": lambda content: content.update(image_mean=[0.5] * 3, image_std=[0.5] * 3),
    }.items():
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))
    lay_out(hub_cache, "vinid/plip", folder)
    _, warnings = check("hf-hub:vinid/plip@main")
    assert warnings == [
        "warning: image tower: GELU, but QuickGELU is known of openai-clip",
        "warning: text tower: GELU, but QuickGELU is known of openai-clip",
        "warning: mean: [0.5, 0.5, 0.5], but [0.4815, 0.4578, 0.4082] is known of openai-clip",
        "warning: std: [0.5, 0.5, 0.5], but [0.2686, 0.2613, 0.2758] is known of openai-clip",
        "warning: image_size: 32, but 224 is known of openai-clip",
        "warning: context_length: 64, but 77 is known of openai-clip",
    ]


def test_siglip_is_known_by_its_form(tmp_path: Path) -> None:
    transformers_repository(tmp_path / "siglip", "siglip", "gelu_pytorch_tanh")
    facts, warnings = check(str(tmp_path / "siglip"))
    assert (facts["family"], warnings) == ("siglip", [])
    assert facts["activation"] == "image tanh GELU; text tanh GELU"
    assert facts["logits"] == "scale 4.4817, bias -3.2500"
    assert facts["tokenizer"].endswith("start [], end [1], padding 1 up to the context length")
    transformers_repository(tmp_path / "quick", "siglip", "quick_gelu")
    _, warnings = check(str(tmp_path / "quick"))
    assert warnings[0] == "warning: image tower: QuickGELU, but tanh GELU or GELU is known of siglip"


def test_of_an_unknown_family_nothing_is_compared(model_folder: Path) -> None:
    facts, warnings = check(str(model_folder / "resnet.json"))
    assert facts["family"] == "not known"
    assert "nothing was compared" in warnings[-1]
    assert facts["activation"] == "image ReLU; text GELU"


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_activations_are_told_apart(tmp_path: Path, activation: str) -> None:
    """In open_clip's blocks and in timm's."""
    name = {"quick_gelu": "QuickGELU", "gelu": "GELU", "gelu_pytorch_tanh": "tanh GELU"}[activation]
    for family in ("clip", "siglip"):
        transformers_repository(tmp_path / family, family, activation)
        backbone = load_backbone(BackboneConfig(name=str(tmp_path / family)))
        assert activations(backbone.image) == activations(backbone.text) == [name]


def test_the_list_names_the_medical_backbones() -> None:
    result = CliRunner().invoke(app, ["backbone", "list"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) == 1 + len(known().backbones)
    for name in MEDICAL:
        assert any(line.startswith(name) and "hf-hub:" in line for line in lines), name
    assert all("not run here" in line for line in lines[1:])
    assert all(entry.family in known().families for entry in known().backbones)
    families = yaml.safe_load(FILE.read_text())["families"]
    openai = open_clip.get_pretrained_cfg("ViT-B-16", "openai")
    assert families["openai-clip"]["mean"] == pytest.approx(openai["mean"])
    assert families["openai-clip"]["std"] == pytest.approx(openai["std"])
