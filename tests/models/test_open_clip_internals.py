"""The internals of open_clip that are read: where a new version lacks one, its name and the reading file are reported here."""

import ast
import inspect
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
from packaging.requirements import Requirement

from tests.conftest import Towers
from vipbench.harness.models import open_clip_internals as internals

ROOT = Path(__file__).parents[2]
INTERNALS = "harness/models/open_clip_internals.py"
Reading = tuple[
    str, Any, Iterable[str], str
]  # owner in words, owner, names that it must have, the file that reads them


def changes(readings: Iterable[Reading]) -> list[str]:
    """Names that open_clip's objects or functions lack, each in one line."""
    return [
        f"open_clip {open_clip.__version__}: {what} has no {name} any more; {reader} reads it"
        for what, owner, names, reader in readings
        for name in names
        if name not in (inspect.signature(owner).parameters if inspect.isfunction(owner) else dir(owner))
    ]


def readings(towers: dict[str, Towers]) -> list[Reading]:
    """All that is read of open_clip's objects, by file."""
    clip, custom = towers["vit"].model, towers["bidirectional"].model
    resnet, bert, block = towers["resnet"].model, towers["bert"].model, clip.transformer.resblocks[0]
    timm = internals.TimmModel("vit_tiny_patch16_224", embed_dim=8)
    check, known, build, repository, packed, processor, text, view, backbone, trained = (
        f"harness/models/{name}.py"
        for name in (
            "check", "known", "open_clip", "hugging_face", "packed_text", "processor", "text_tower", "tower_view", "backbone",
            "trained_tower",
        )
    )  # fmt: skip
    shared = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection", "attn_mask")
    create = ("load_weights", "device", "force_quick_gelu", "pretrained_image", "pretrained_text", "weights_only")
    tokenizer = ("tokenizer", "clean_fn", "tokenizer_mode", "strip_sep_token", "context_length")
    return [
        ("CLIP", clip, (*shared, "text_pool_type"), text),
        ("CLIP", clip, ("visual", "logit_scale", "logit_bias"), backbone),
        ("CLIP", clip, ("visual",), build),
        ("CLIP.visual", clip.visual, ("preprocess_cfg",), backbone),
        ("CLIP.visual", clip.visual, ("preprocess_cfg",), build),
        ("CustomTextCLIP", custom, ("visual", "logit_scale", "logit_bias"), backbone),
        ("CustomTextCLIP", custom, ("text",), text),
        ("CustomTextCLIP", custom, ("visual",), repository),
        ("TextTransformer", custom.text, (*shared, "pool_type", "cls_emb"), text),
        ("VisionTransformer", clip.visual, ("transformer", "ln_pre"), view),
        ("TimmModel", timm, ("trunk",), view),
        ("TimmModel", timm, ("trunk",), known),
        ("TimmModel", timm, ("trunk", "head"), trained),
        ("VisionTransformer", clip.visual, ("transformer", "attn_pool", "ln_post", "proj"), trained),
        ("Transformer", clip.transformer, ("resblocks",), packed),
        ("Transformer", clip.transformer, ("resblocks",), text),
        ("Transformer", clip.visual.transformer, ("resblocks", "width"), view),
        ("ResidualAttentionBlock", block, ("ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"), packed),
        (
            "ResidualAttentionBlock.attn",
            block.attn,
            ("in_proj_weight", "in_proj_bias", "bias_k", "out_proj", "num_heads"),
            packed,
        ),
        ("ResidualAttentionBlock.mlp", block.mlp, ("c_fc", "c_proj"), repository),
        ("HFTextEncoder", bert.text, ("transformer", "pooler", "proj", "config", "context_length"), text),
        ("ModifiedResNet", resnet.visual, ("preprocess_cfg",), backbone),
        ("ModifiedResNet", resnet.visual, ("layer4", "attnpool"), trained),
        ("SimpleTokenizer", towers["vit"].tokenizer, ("eot_token_id",), text),
        ("SimpleTokenizer", towers["vit"].tokenizer, ("vocab_size",), check),
        ("HFTokenizer", towers["bert"].tokenizer, tokenizer, text),
        ("HFTokenizer", towers["bert"].tokenizer, tokenizer, processor),
        ("PreprocessCfg", internals.PreprocessCfg(), ("size", "mean", "std"), backbone),
        ("PreprocessCfg", internals.PreprocessCfg(), ("interpolation", "resize_mode"), check),
        ("create_model", open_clip.create_model, (*create, "force_preprocess_cfg"), build),
        ("image_transform_v2", internals.image_transform_v2, ("is_train",), backbone),
    ]


def test_each_file_reads_what_it_is_credited_with(towers: dict[str, Towers]) -> None:
    wrong = [
        (reader, name)
        for _, _, names, reader in readings(towers)
        for name in names
        if not re.search(rf"\b{name}\b", (ROOT / reader).read_text())
    ]
    assert wrong == []


def test_open_clip_has_what_is_read(towers: dict[str, Towers]) -> None:
    assert changes(readings(towers)) == []
    kinds = {"vit": internals.CLIP, "bidirectional": internals.CustomTextCLIP}
    assert all(type(towers[kind].model) is expected for kind, expected in kinds.items())
    block = towers["vit"].model.transformer.resblocks[0]
    assert type(block) is internals.ResidualAttentionBlock, "packed_text computes plain blocks only"
    assert isinstance(towers["resnet"].model.visual.attnpool, internals.AttentionPool2d)
    assert internals.get_pretrained_cfg("ViT-B-16", "openai")["quick_gelu"] is True


def test_a_change_is_named_with_its_reader() -> None:
    def create_model(name: str) -> None: ...

    block = SimpleNamespace(ln_1=1)
    found = changes(
        [("block", block, ("ln_1", "attn"), "a.py"), ("create_model", create_model, ("weights_only",), "b.py")]
    )
    version = open_clip.__version__
    assert found == [
        f"open_clip {version}: block has no attn any more; a.py reads it",
        f"open_clip {version}: create_model has no weights_only any more; b.py reads it",
    ]


def test_open_clip_is_pinned_below_4() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = [Requirement(line) for line in project["dependencies"] if line.startswith("open_clip_torch")]
    assert pin.specifier.contains(open_clip.__version__)
    assert not pin.specifier.contains("4.0")


def imports_of_internals(source: str) -> list[int]:
    """Lines that import a module inside open_clip."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = node.module if isinstance(node, ast.ImportFrom) and not node.level else None
            names = [module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [node.lineno for name in names if name.startswith("open_clip.")]
    return found


@pytest.mark.parametrize("folder", ["harness", "baselines", "sweeps"])
def test_internals_are_imported_in_one_place(folder: str) -> None:
    found = {
        str(file.relative_to(ROOT)): lines
        for file in sorted((ROOT / folder).rglob("*.py"))
        if (lines := imports_of_internals(file.read_text()))
    }
    assert set(found) <= {INTERNALS}, f"import what they need from {INTERNALS}: {found}"
    assert folder != "harness" or INTERNALS in found
