"""CLIP-LoRA, CLIP-SVD and MaPLe against plain second implementations, and what holds for every method that changes the towers."""

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from tests import plain, plain_towers
from tests.conftest import MODELS, TEXT, VIT, Towers
from vipbench.harness.config.overrides import override
from vipbench.harness.config.schema import BackboneConfig, TrainConfig
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Drawing, Method, Task
from vipbench.harness.methods.registry import method_class
from vipbench.harness.models.backbone import Backbone, load_backbone
from vipbench.harness.models.open_clip import create
from vipbench.harness.models.tower_view import NUMBERS_PER_ACTIVATION, Block, ImageTowerView, view
from vipbench.harness.runs.inputs import build_method
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.training.loop import WeightedLoss
from vipbench.harness.training.optimizer import make_optimizer

CLASSES = ["melanoma", "basal cell carcinoma", "nevus"]
KINDS = ["vit", "bert", "bidirectional", "timm"]
OPTIONS: dict[str, dict[str, Any]] = {
    "clip_lora": {},
    "clip_svd": {},
    "maple": {"depth": 2},
    "promptsrc": {"depth": 2},
    "vpt": {"depth": 2},
}
BUFFERS = {"promptsrc": {"average"}}  # what is saved beside the parameters
DRAWING = Drawing(torch.tensor(77), torch.tensor([5, -(2**62), 99, 2**61]))


@pytest.fixture(scope="module")
def changeable(towers: dict[str, Towers], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Towers]:
    """Backbones with a vision transformer, by kind; that of "timm" is timm's, as in BiomedCLIP."""
    path = tmp_path_factory.mktemp("timm") / "timm.json"
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    path.write_text(json.dumps({"model_cfg": {"embed_dim": 40, "vision_cfg": vision, "text_cfg": TEXT}}))
    model, tokenizer, architecture = create(BackboneConfig(name=str(path)))
    built = {"timm": Towers(Backbone(model, tokenizer, architecture), model, tokenizer)}
    return {kind: (built | towers)[kind] for kind in KINDS}


def start(backbone: Backbone, name: str, task: Task = Task(CLASSES), **options: Any) -> Method:
    """A method as it starts."""
    cls = method_class(name)
    return cls(cls.Config(name=name, **{**OPTIONS[name], **options}), task, backbone)


def build(backbone: Backbone, name: str, task: Task = Task(CLASSES), **options: Any) -> Method:
    """A method whose learned values are all random, so that none hides another."""
    torch.manual_seed(3)
    method = start(backbone, name, task, **options)
    with torch.no_grad():
        for value in method.trainable().values():
            value.add_(torch.randn_like(value) * 0.05)
    return method.train()


def pixels(backbone: Backbone, count: int = 4) -> Tensor:
    return torch.randn(count, *backbone.pixels_shape, generator=torch.Generator().manual_seed(5))


def assert_same(method: Method, logits: Tensor, expected: Tensor, copies: dict[str, Tensor]) -> None:
    """Logits within 1e-5 of the largest, gradients of a weighted sum of them within 1e-5 of the largest of each tensor."""
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.detach().abs().max()))
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    parameters = method.trainable()
    found = torch.autograd.grad((logits * weights).sum(), list(parameters.values()))
    plain = torch.autograd.grad((expected * weights).sum(), list(copies.values()))
    for name, ours, theirs in zip(copies, found, plain, strict=True):
        assert theirs.abs().max() > 0, name
        assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max())), name


def copies_of(method: Method) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in method.trainable().items()}


@pytest.mark.parametrize("memory", [2**30, 1], ids=["one pass", "text in parts"])
@pytest.mark.parametrize("dropped", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("kind", KINDS)
def test_clip_lora(
    changeable: dict[str, Towers], kind: str, dropped: bool, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, rate = changeable[kind], 0.25
    monkeypatch.setattr(entry.backbone.text, "memory_bytes", memory)
    method, inputs = build(entry.backbone, "clip_lora"), pixels(entry.backbone)
    copies = copies_of(method)
    lora: Any = method.lora
    matrices = {
        tower: [(copies[f"lora.{tower}.{i}.a"], copies[f"lora.{tower}.{i}.b"]) for i in range(len(added))]
        for tower, added in lora.items()
    }
    masks: list[Any] = [None, None]
    if dropped:
        method.drawing = DRAWING
        prompts = plain_towers.split_keys(DRAWING.step.numpy().view("uint64"), len(CLASSES)).view("int64")
        masks = [plain_towers.masks_by_key(keys, rate) for keys in (DRAWING.samples, torch.from_numpy(prompts))]
    texts = [f"a photo of a {name}." for name in CLASSES]
    expected = plain_towers.clip_lora(
        entry.model, entry.tokenizer, inputs, texts, matrices["image"], matrices["text"], 1 / math.sqrt(2), rate, *masks
    )
    assert_same(method, method(inputs).logits, expected, copies)


@pytest.mark.parametrize("memory", [2**30, 1], ids=["one pass", "text in parts"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_maple(
    changeable: dict[str, Towers], kind: str, depth: int, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = changeable[kind]
    monkeypatch.setattr(entry.backbone.text, "memory_bytes", memory)
    method, inputs = build(entry.backbone, "maple", depth=depth), pixels(entry.backbone)
    copies = copies_of(method)
    text = [copies["context"][0], *[copies[f"deep.{i}"] for i in range(depth - 1)]]
    names = ["project", *[f"project_deep.{i}" for i in range(depth - 1)]]
    image = [
        prompt @ copies[f"{name}.weight"].T + copies[f"{name}.bias"] for prompt, name in zip(text, names, strict=True)
    ]
    expected = plain_towers.maple(entry.model, entry.tokenizer, inputs, CLASSES, text, image)
    assert_same(method, method(inputs).logits, expected, copies)


def singular_values(entry: Towers, learned: dict[str, Tensor]) -> dict[str, Tensor]:
    """Learned singular values by the name of the weight in open_clip's model."""
    names = {tower: plain_towers.learned_maps(entry.model, tower) for tower in ("image", "text")}
    values = {
        name: learned[f"singular.{tower}.{place}.values"] for tower in names for place, name in enumerate(names[tower])
    }
    assert len(values) == len(learned)
    return values


@pytest.mark.parametrize("memory", [2**30, 1], ids=["one pass", "text in parts"])
@pytest.mark.parametrize("kind", KINDS)
def test_clip_svd(changeable: dict[str, Towers], kind: str, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = changeable[kind]
    monkeypatch.setattr(entry.backbone.text, "memory_bytes", memory)
    # The tokens of 4 images are few for a weight.
    method, inputs = build(entry.backbone, "clip_svd"), pixels(entry.backbone, 16)
    copies, texts = copies_of(method), [f"a photo of a {name}." for name in CLASSES]
    values = singular_values(entry, copies)
    expected = plain_towers.clip_svd(entry.model, entry.tokenizer, inputs, texts, values)
    assert_same(method, method(inputs).logits, expected, copies)


@pytest.mark.parametrize("kind", KINDS)
def test_clip_svd_learns_what_plain_steps_learn(changeable: dict[str, Towers], kind: str) -> None:
    entry, labels = changeable[kind], torch.tensor([0, 2, 1, 2])
    method, inputs = start(entry.backbone, "clip_svd").train(), pixels(entry.backbone)
    # A larger eps, since BERT's keys have gradients near rounding here, which a step of the optimizer would make equal to others.
    recipe = TrainConfig(**{**method.recipe(None, 16, ""), "eps": 1e-5})
    optimizer, loss = make_optimizer(method.parameter_groups(), recipe), WeightedLoss(method)
    copies, texts = copies_of(method), [f"a photo of a {name}." for name in CLASSES]
    started = {name: value.detach().clone() for name, value in copies.items()}
    state: dict[int, tuple[Tensor, Tensor]] = {}
    for step in range(1, 6):
        optimizer.zero_grad()
        loss(inputs, labels, torch.full((4,), 0.25), DRAWING.samples, DRAWING.step).backward()
        optimizer.step()
        logits = plain_towers.clip_svd(entry.model, entry.tokenizer, inputs, texts, singular_values(entry, copies))
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(copies.values()))
        plain_towers.adamw(list(copies.values()), gradients, state, step, lr=0.007, decay=0.0, eps=1e-5)
    for name, value in method.trainable().items():
        assert (value - copies[name]).abs().max() <= 1e-4, name
        assert (value - started[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_clip_svd_starts_as_the_frozen_model(changeable: dict[str, Towers], kind: str, dtype: torch.dtype) -> None:
    """Within 1e-5, and what learning added is nothing; in half precision within its own rounding."""
    backbone = changeable[kind].backbone
    inputs = pixels(backbone)
    first: Any = start(backbone, "clip_svd").eval()
    again = start(backbone, "clip_svd")
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found, expected = first.towers.image(inputs).float(), backbone.image(inputs).float()
    assert (found - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * expected.abs().max()
    for singular in [*first.singular["image"], *first.singular["text"]]:
        rebuilt = (singular.u * singular.start[:, None] @ singular.v).flatten(0, 1)
        x = torch.eye(rebuilt.shape[1])
        assert not singular(x, whole=False).any() and (singular(x) - rebuilt.T).abs().max() <= 1e-6


def test_a_start_is_that_of_the_papers(changeable: dict[str, Towers]) -> None:
    """CLIP-LoRA and CLIP-SVD begin as zero-shot classification by the first template; MaPLe with the words' own vectors."""
    entry, texts = changeable["timm"], [f"one {name}." for name in CLASSES]
    backbone, inputs = entry.backbone, pixels(entry.backbone)
    lora = start(backbone, "clip_lora", Task(CLASSES, templates=("one {}.", "two {}."))).eval()
    expected = 100 * backbone.encode_images(inputs) @ F.normalize(backbone.text.encode_texts(texts), dim=-1).T
    assert (lora(inputs).logits - expected).abs().max() < 1e-4
    svd = start(backbone, "clip_svd", Task(CLASSES, templates=("one {}.", "two {}."))).eval()
    assert (svd(inputs).logits - expected / 100 * backbone.logit_scale).abs().max() < 1e-5
    learned = start(backbone, "maple").learned()
    assert torch.equal(learned["context"][0], plain.words(entry.model, entry.tokenizer, "a photo"))
    assert 0.01 < learned["deep.0"].std() < 0.03
    assert not torch.equal(learned["project.weight"], learned["project_deep.0.weight"])


def test_deep_projections_are_clones(tmp_path: Path) -> None:
    config = {**MODELS["vit"], "vision_cfg": {**VIT, "layers": 3}, "text_cfg": {**TEXT, "layers": 3}}
    (tmp_path / "three.json").write_text(json.dumps({"model_cfg": config}))
    learned = start(load_backbone(BackboneConfig(name=str(tmp_path / "three.json"))), "maple", depth=3).learned()
    assert torch.equal(learned["project_deep.0.weight"], learned["project_deep.1.weight"])
    assert not torch.equal(learned["deep.0"], learned["deep.1"])


@pytest.mark.parametrize("name", OPTIONS)
def test_parts_and_ranks_draw_what_the_whole_batch_draws(changeable: dict[str, Towers], name: str) -> None:
    """Gradients of a batch in one, in micro batches, and dealt out to ranks, where each part has the keys of its samples."""
    backbone = changeable["vit"].backbone
    loss = WeightedLoss(build(backbone, name))
    inputs, labels, weights = pixels(backbone), torch.tensor([0, 2, 1, 2]), torch.full((4,), 0.25)
    found = []
    for parts in ([[0, 1, 2, 3]], [[0, 1, 2], [3]], [[0, 2], [1, 3]]):
        loss.zero_grad()
        for rows in parts:
            batch = (inputs[rows], labels[rows], weights[rows], DRAWING.samples[rows], DRAWING.step)
            loss(*batch).backward()
        found.append({key: value.grad.clone() for key, value in loss.trainable().items() if value.grad is not None})
        assert len(found[-1]) == len(loss.trainable())
    for other in found[1:]:
        for key, gradient in found[0].items():
            torch.testing.assert_close(other[key], gradient, rtol=1e-4, atol=1e-6)


def test_dropout_is_of_the_step_and_the_sample(changeable: dict[str, Towers]) -> None:
    backbone = changeable["vit"].backbone
    method, inputs = build(backbone, "clip_lora"), pixels(backbone)
    undropped = method(inputs).logits
    results = {}
    for name, drawing in {
        "first": DRAWING,
        "again": DRAWING,
        "step": Drawing(torch.tensor(78), DRAWING.samples),
        "sample": Drawing(DRAWING.step, torch.cat([DRAWING.samples[:3], torch.tensor([1])])),
    }.items():
        method.drawing = drawing
        results[name] = method(inputs).logits.detach()
    assert torch.equal(results["first"], results["again"]) and not torch.allclose(results["first"], undropped)
    assert not torch.isclose(results["step"], results["first"]).all(1).any()
    changed = ~torch.isclose(results["sample"], results["first"], rtol=1e-6).all(1)
    assert changed.tolist() == [False, False, False, True]


def train(backbone: Backbone, name: str) -> Tensor:
    """Logits after three steps of AdamW."""
    method = build(backbone, name)
    loss, inputs = WeightedLoss(method), pixels(backbone)
    optimizer = torch.optim.AdamW(method.trainable().values(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss(inputs, torch.tensor([0, 2, 1, 2]), torch.full((4,), 0.25), DRAWING.samples, DRAWING.step).backward()
        optimizer.step()
    with torch.no_grad():
        return method.eval()(inputs).logits


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_methods_after_each_other_are_as_alone(model_folder: Path, kind: str) -> None:
    """They share a backbone, of which nothing changes: modules, hooks, weights, and what it computes, to the bit."""
    config = BackboneConfig(name=str(model_folder / f"{kind}.json"))
    alone = {name: train(load_backbone(config), name) for name in OPTIONS}
    shared = load_backbone(config)
    before = copy.deepcopy(shared)
    for name in [*OPTIONS, *OPTIONS]:
        assert torch.equal(train(shared, name), alone[name]), name
    assert [(name, type(module)) for name, module in shared.named_modules()] == [
        (name, type(module)) for name, module in before.named_modules()
    ]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in shared.modules())
    assert not any(parameter.requires_grad for parameter in shared.parameters())
    for (name, value), old in zip(shared.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(value, old), name
    inputs = pixels(shared)
    with torch.no_grad():
        assert torch.equal(shared.encode_images(inputs), before.encode_images(inputs))
        assert torch.equal(shared.text.encode_texts(CLASSES), before.text.encode_texts(CLASSES))


@pytest.mark.parametrize("name", OPTIONS)
def test_only_what_was_added_is_learned_and_it_is_put_back(changeable: dict[str, Towers], name: str) -> None:
    backbone = changeable["bert"].backbone
    method, inputs = build(backbone, name), pixels(backbone)
    learned = {key: value.detach().clone() for key, value in method.learned().items()}
    assert set(learned) == set(method.trainable()) | BUFFERS.get(name, set())
    assert not any("backbone" in key or "towers" in key for key in learned)
    assert not method.per_class
    held = {id(parameter) for parameter in method.parameters()}
    own = {id(parameter) for parameter in [*backbone.parameters(), *method.trainable().values()]}
    assert held == own, "a view has the backbone's very weights"
    other = start(backbone, name, Task(["other", "classes"]))
    other.load_learned(learned)
    again = start(backbone, name)
    again.load_learned(learned)
    with torch.no_grad():
        assert torch.equal(again.eval()(inputs).logits, method.eval()(inputs).logits)
        assert other(inputs).logits.shape == (4, 2)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_image_tower_without_blocks_is_refused(towers: dict[str, Towers], name: str) -> None:
    with pytest.raises(UserError, match=r"image tower is a ModifiedResNet; use a ViT"):
        build(towers["resnet"].backbone, name)


@pytest.mark.parametrize("name", ["maple", "promptsrc", "vpt"])
def test_too_deep_prompts_are_refused(changeable: dict[str, Towers], name: str) -> None:
    with pytest.raises(UserError, match=r"method\.depth: 9 blocks .* has 2 in all; use method.depth=2 or less"):
        build(changeable["vit"].backbone, name, depth=9)


def test_packing_is_refused() -> None:
    for name in OPTIONS:
        cls = method_class(name)
        assert "image tower" in cls.not_packed(cls.Config(name=name))


def test_a_text_tower_with_lora_keeps_to_its_memory(
    changeable: dict[str, Towers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are learned although its prompts are not, so that parts are computed again in the backward pass."""
    backbone, held = changeable["vit"].backbone, []
    for memory in (2**40, 2**18):
        monkeypatch.setattr(backbone.text, "memory_bytes", memory)
        method = start(backbone, "clip_lora", Task([f"finding number {index}" for index in range(100)]))
        with saved_bytes({parameter.untyped_storage()._cdata for parameter in method.parameters()}) as kept:
            method.train()(pixels(backbone))
        held.append(sum(kept.values()))
    assert held[1] < 0.5 * held[0]


def test_checkpointing_keeps_the_inputs_of_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image tower of ViT-B/16 at batch 4: what stays until the backward pass, and the activations of one block there."""
    monkeypatch.setattr(Block, "memory_bytes", 0)
    with torch.device("meta"):
        tower = VisionTransformer(224, 16, 768, 12, 12, 4.0).requires_grad_(False)
        weights = {parameter.untyped_storage()._cdata for parameter in tower.parameters()}
        inputs, tokens = torch.empty(4, 3, 224, 224), torch.empty(4, 199, 768, requires_grad=True)
        with saved_bytes(weights) as kept:
            ImageTowerView(tower)(inputs, [torch.empty(2, 768, requires_grad=True)])
        with saved_bytes(weights) as block:
            view(tower.transformer.resblocks[0])(tokens)
        with saved_bytes(weights) as everything:
            tower(inputs.requires_grad_())
    each = tokens.nbytes
    assert sum(kept.values()) < 15 * each, "the input of each of twelve blocks, and a little before and after"
    assert sum(everything.values()) > 100 * each, "which without checkpoints is much more"
    total = sum(parameter.nbytes for parameter in tower.parameters()) + sum(kept.values()) + sum(block.values())
    assert total < 2**29, "with the weights half a GiB; a text tower may take run.text_memory_gib, 2 GiB, beside it"


def test_activations_are_kept_as_far_as_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of blocks in order, ViT-B/16's at batch 4; what a block takes is about what is reckoned with."""
    with torch.device("meta"):
        tower = VisionTransformer(224, 16, 768, 12, 12, 4.0).requires_grad_(False)
        weights = {parameter.untyped_storage()._cdata for parameter in tower.parameters()}
        inputs, prompts = torch.empty(4, 3, 224, 224), [torch.empty(2, 768, requires_grad=True)]
        each = 4 * 199 * 768 * 4
        held = []
        for blocks in (0, 1, 6, 12):
            monkeypatch.setattr(Block, "memory_bytes", blocks * NUMBERS_PER_ACTIVATION * each)
            with saved_bytes(weights) as kept:
                ImageTowerView(tower)(inputs, prompts)
            held.append(sum(kept.values()) / each)
    per_block = held[1] - held[0]
    assert 0.5 * NUMBERS_PER_ACTIVATION < per_block < 1.2 * NUMBERS_PER_ACTIVATION
    assert held[2] - held[0] == pytest.approx(6 * per_block, rel=0.02)
    assert held[3] - held[0] == pytest.approx(12 * per_block, rel=0.02)


def test_a_run_bounds_the_activations(base_config: dict[str, Any], changeable: dict[str, Towers]) -> None:
    """They take 4 GiB unless `run.image_memory_gib` is given."""
    found = []
    for options in ([], ["run.image_memory_gib=0.5"]):
        config = resolve_config(override({**base_config, "method": {"name": "maple", "depth": 2}}, options))
        method = build_method(config, Task(CLASSES), changeable["vit"].backbone)
        found.append({module.memory_bytes for module in method.modules() if isinstance(module, Block)})
    assert found == [{2**32}, {2**29}]


@pytest.mark.parametrize("name", OPTIONS)
def test_activations_that_are_computed_again_are_the_same(
    changeable: dict[str, Towers], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """To the bit, with dropout, whichever blocks keep theirs."""
    backbone, found = changeable["vit"].backbone, []
    inputs = pixels(backbone)
    for memory in (0, NUMBERS_PER_ACTIVATION * 4 * 7 * 32 * 4, 2**40):  # none, one of two, both
        monkeypatch.setattr(Block, "memory_bytes", memory)
        method = build(backbone, name)
        method.drawing = DRAWING
        logits = method(inputs).logits
        found.append([logits, *torch.autograd.grad(logits.square().sum(), list(method.trainable().values()))])
    for other in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", [*OPTIONS, "finetune"])
def test_a_step_does_not_visit_the_modules_of_a_tower(
    changeable: dict[str, Towers], visited: list[nn.Module], name: str
) -> None:
    """They stay in evaluation mode; to set the mode of ViT-B/16's again takes about a millisecond."""
    cls = method_class(name)
    config = cls.Config(name=name, **OPTIONS.get(name, {}))
    method = cls(config, Task(CLASSES), changeable["vit"].backbone).train()
    visited.clear()
    assert not method.eval().training and method.train().training
    inside = list(method.get_submodule("tower" if name == "finetune" else "towers").modules())
    assert len(inside) > 20 and not any(module.training for module in inside)
    assert not {id(module) for module in inside} & {id(module) for module in visited}


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "vpt"])  # whose texts are encoded once
def test_the_text_side_computes_no_padding(changeable: dict[str, Towers], name: str) -> None:
    """Through the MLPs of the text tower go the tokens of all prompts, what they share once, and in the last block the ends."""
    method = build(changeable["vit"].backbone, name)
    method.drawing, computed = DRAWING, []
    towers: Any = method.towers
    for block in towers.text.blocks:
        block.mlp.register_forward_hook(lambda _, inputs, output: computed.append(inputs[0].shape[:-1].numel()))
    method(pixels(method.backbone))
    prompts: Any = method.prompts
    keys = DRAWING.samples[:3] if hasattr(method.config, "dropout") else None  # those of dropout share no prefix
    prompts = prompts.fill(method.context) if hasattr(method, "context") else prompts.fixed(keys)
    lengths = prompts.lengths
    assert int(lengths.min()) < int(lengths.max()) < towers.text.context_length, "so that there is padding to leave out"
    tokens = int(lengths.sum()) - (len(lengths) - prompts.groups) * prompts.shared
    assert computed == [tokens] * (len(computed) - 1) + [len(lengths)] and len(computed) == len(towers.text.blocks)


@contextmanager
def saved_bytes(weights: set[int]) -> Iterator[dict[int, int]]:
    """Bytes that autograd keeps beside the weights, by storage."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
