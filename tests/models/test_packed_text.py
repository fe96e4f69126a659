"""The text tower on ragged prompts: the numbers and gradients of the plain path, whatever is shared and however it is cut."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import MODELS, Towers
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.models.backbone import load_backbone
from vipbench.harness.models.prompts import SLOT, PromptBatch, Prompts

BODIES = ["round", "one even brown colour", "a net of lines", "small"]


def plain(tower: object, prompts: Prompts) -> Tensor:
    """Every prompt alone, padded to the full context length, through the model's own transformer."""
    features = []
    for row, length in zip(prompts.embeddings, prompts.lengths.tolist(), strict=True):
        x = torch.zeros(1, tower.context_length, tower.width)  # type: ignore[attr-defined]
        x = torch.cat([row[None, :length], x[:, length:]], dim=1) + tower.positional_embedding  # type: ignore[attr-defined]
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))  # type: ignore[attr-defined]
        features.append(x[0, length - 1] @ tower.text_projection)  # type: ignore[attr-defined]
    return torch.stack(features)


def batch(tower: object, bodies: list[str] = BODIES, front: int = 3) -> PromptBatch:
    tokens = [[SLOT] * front + tower.tokenize(f"{body}.") for body in bodies]  # type: ignore[attr-defined]
    return PromptBatch(tower, tokens, bodies)  # type: ignore[arg-type]


@pytest.mark.parametrize("copies", [1, len(BODIES)])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_forward_and_gradient_are_those_of_the_plain_path(towers: dict[str, Towers], kind: str, copies: int) -> None:
    tower = towers[kind].backbone.text
    prompts = batch(tower)
    context = torch.randn(copies, 3, tower.width, requires_grad=True)
    weights = torch.randn(len(BODIES), towers[kind].backbone.dim)
    filled = prompts.fill(context)
    assert filled.shared == (4 if copies == 1 else 1), "the start token, and the context where it is everyone's"
    features = {"ours": tower(filled), "plain": plain(tower, prompts.fill(context))}
    gradients = [torch.autograd.grad((value * weights).sum(), context)[0] for value in features.values()]
    assert (features["ours"] - features["plain"]).abs().max() < 1e-5
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5


def test_groups_share_within_themselves_only(towers: dict[str, Towers]) -> None:
    tower = towers["vit"].backbone.text
    prompts = batch(tower)
    contexts = torch.randn(5, 3, tower.width, requires_grad=True)
    together = prompts.fill_each(contexts)
    assert (len(together), together.groups, together.shared) == (20, 5, 4)
    apart = torch.cat([tower(prompts.fill(context[None])) for context in contexts])
    assert (tower(together) - apart).abs().max() < 1e-5
    joined = Prompts.concatenate([prompts.fill(context[None]) for context in contexts])
    assert (tower(joined) - apart).abs().max() < 1e-5


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8, 20, 100])
def test_parts_hold_every_prompt_once(towers: dict[str, Towers], size: int) -> None:
    tower = towers["vit"].backbone.text
    together = batch(tower).fill_each(torch.randn(5, 3, tower.width))
    parts = together.split(size)
    assert torch.equal(torch.cat([part.embeddings for part in parts]), together.embeddings)
    assert max(len(part) for part in parts) <= max(size, 1)
    assert (torch.cat([tower(part) for part in parts]) - tower(together)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["vit", "bert", "bidirectional"])
def test_little_memory_changes_neither_features_nor_gradients(
    towers: dict[str, Towers], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = towers[kind].backbone.text
    prompts = batch(tower)
    context = torch.randn(1, 3, tower.width, requires_grad=True)
    results = []
    for memory in (2**40, 1):
        monkeypatch.setattr(tower, "memory_bytes", memory)
        features = tower(prompts.fill(context))
        results.append((features, torch.autograd.grad(features.square().sum(), context)[0]))
        with torch.no_grad():
            assert (tower(prompts.fill(context)) - features).abs().max() < 1e-5
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5 * float(first.detach().abs().max()))


@contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Sizes of what autograd keeps, by storage."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def test_the_estimate_of_memory_is_about_what_autograd_keeps(tmp_path: Path) -> None:
    config = copy.deepcopy(MODELS["vit"])
    config["text_cfg"]["layers"] = 8
    (tmp_path / "deep.json").write_text(json.dumps({"model_cfg": config}))
    tower = load_backbone(BackboneConfig(name=str(tmp_path / "deep.json"))).text
    prompts = batch(tower, ["one of many words"] * 64)
    prompts.shared = 0  # every token counts
    weights = {parameter.untyped_storage().data_ptr() for parameter in tower.parameters()}
    with kept_bytes() as kept:
        tower(prompts.fill(torch.randn(1, 3, tower.width, requires_grad=True)))
    activations = sum(size for place, size in kept.items() if place not in weights)
    assert 0.8 < tower.bytes_per_token * int(prompts.lengths.sum()) / activations < 1.6


@pytest.mark.parametrize("kind", list(MODELS))
def test_towers_compute_where_they_are_whatever_the_default_device(towers: dict[str, Towers], kind: str) -> None:
    """Lengths, layouts and masks are made on a device that is said, never on one that happens to be torch's default."""
    tower = towers[kind].backbone.text
    context = torch.randn(1, 3, tower.width)
    bodies = [*BODIES, f"lengths that only the test of {kind} has had so far"]  # so that no cache has them
    tokens = [[SLOT] * 3 + tower.tokenize(body) for body in bodies]
    with torch.device("meta"):
        inside = tower(PromptBatch(tower, tokens, bodies).fill(context))
    assert (inside - tower(PromptBatch(tower, tokens, bodies).fill(context))).abs().max() < 1e-5
