"""VPT and PromptSRC against plain second implementations: logits, losses, and what is learned in five steps."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import plain, plain_towers
from tests.baselines.test_methods_in_towers import CLASSES, DRAWING, KINDS, assert_same, build, copies_of, pixels, start
from tests.baselines.test_methods_in_towers import changeable as changeable
from tests.conftest import Towers
from tests.zoo import small_config
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Method, Task
from vipbench.harness.models.tower_view import ImageTowerView
from vipbench.harness.runs.directory import read_prompts
from vipbench.harness.runs.execute import execute
from vipbench.harness.training.loop import Training, WeightedLoss

LABELS = torch.tensor([0, 2, 1, 2])
TEMPLATES = ("a photo of a {}.", "this is {}, clearly.", "one {}.")
WEIGHTS = (25.0, 10.0)
Loss = Callable[[], Tensor]


def plain_vpt(entry: Towers, inputs: Tensor, copies: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and loss of VPT with the values that `copies` hold."""
    logits = plain_towers.vpt(entry.model, entry.tokenizer, inputs, CLASSES, list(copies.values()))
    return logits, plain.cross_entropy(list(logits), LABELS)


def plain_promptsrc(entry: Towers, inputs: Tensor, copies: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and loss of PromptSRC with the values that `copies` hold."""
    deep = [value for name, value in copies.items() if name.startswith("deep.")]
    visual = [value for name, value in copies.items() if name.startswith("visual.")]
    text = [copies["context"][0], *deep]
    assert len(visual) == len(text) and len(copies) == 2 * len(text)
    towers = (entry.model, entry.tokenizer)
    return plain_towers.promptsrc(*towers, inputs, LABELS, CLASSES, text, visual, TEMPLATES, WEIGHTS)


PLAIN = {"vpt": plain_vpt, "promptsrc": plain_promptsrc}


def make(entry: Towers, name: str, **options: Any) -> Method:
    task = Task(CLASSES, templates=TEMPLATES)
    return build(entry.backbone, name, task, **options, **({"templates": "task"} if name == "promptsrc" else {}))


@pytest.mark.parametrize("memory", [2**30, 1], ids=["one pass", "text in parts"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PLAIN)
def test_logits_and_losses(
    changeable: dict[str, Towers], name: str, kind: str, depth: int, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = changeable[kind]
    monkeypatch.setattr(entry.backbone.text, "memory_bytes", memory)
    method, inputs = make(entry, name, depth=depth), pixels(entry.backbone)
    copies = copies_of(method)
    expected, loss = PLAIN[name](entry, inputs, copies)
    output = method(inputs)
    assert_same(method, output.logits, expected, copies)
    ours = method.losses(method(inputs), LABELS)
    assert (sum(value.mean() for value in ours.values()) - loss).abs() <= 1e-5


def steps(loss: Loss, parameters: list[Tensor], count: int = 5) -> Iterator[int]:
    """Take steps of the papers' optimizer, at a rate at which something happens; yields the number of each."""
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=5e-4)
    for number in range(1, count + 1):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        yield number


@pytest.mark.parametrize("kind", ["vit", "timm"])
@pytest.mark.parametrize("name", PLAIN)
def test_five_steps(changeable: dict[str, Towers], name: str, kind: str) -> None:
    """Three epochs of two steps, the last one short; after it PromptSRC's prompts are the mean over the epochs."""
    entry = changeable[kind]
    method, inputs, epochs = make(entry, name), pixels(entry.backbone), {2: 1, 4: 2, 5: 3}
    first, copies, weighted = copies_of(method), copies_of(method), WeightedLoss(method)
    batch = (inputs, LABELS, torch.full((4,), 0.25), DRAWING.samples, DRAWING.step)
    for step in steps(lambda: weighted(*batch), list(method.trainable().values())):
        if step in epochs:
            method.end_of_epoch(epochs[step], 3)
    ends = []
    for step in steps(lambda: PLAIN[name](entry, inputs, copies)[1], list(copies.values())):
        if step in epochs:
            ends.append({key: value.detach().clone() for key, value in copies.items()})
    for key, value in method.trainable().items():
        kept = [end[key] for end in ends]
        expected = plain_towers.gaussian_mean(kept, 30, 30) if name == "promptsrc" else kept[-1]
        assert (value - expected).abs().max() <= 1e-4, key
        assert (expected - first[key]).abs().max() > 1e-3, "something was learned"
        assert name == "vpt" or (expected - kept[-1]).abs().max() > 1e-3, "the mean is not the last epoch"


def test_a_run_that_goes_on_has_the_mean_of_all_epochs(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, advance = {**base_config, "train": {}}, Training.advance
    whole = execute(small_config(base, "promptsrc", tmp_path / "whole"))
    config = small_config(base, "promptsrc", tmp_path / "again", "run.checkpoint_steps=1")

    def dying(training: Training, loss: Tensor) -> None:
        if training.step == training.data.steps_per_epoch + 1:
            raise KeyboardInterrupt
        advance(training, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", dying)
        with pytest.raises(KeyboardInterrupt):
            execute(config)
    resumed, expected = read_prompts(execute(config)), read_prompts(whole)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_epochs_far_from_the_mean_still_have_weights(changeable: dict[str, Towers]) -> None:
    """Densities that are all zero in floating point would make what is learned NaN."""
    method = make(changeable["vit"], "promptsrc", epoch_mean=1000.0, epoch_std=1.0)
    for epoch in (1, 2):
        last = copies_of(method)
        method.end_of_epoch(epoch, 2)
    assert all(torch.allclose(value, last[key]) for key, value in method.trainable().items())


def test_starts(changeable: dict[str, Towers]) -> None:
    """The text begins with the words' own vectors, all else is drawn; the options are the published ones."""
    entry = changeable["timm"]
    learned = start(entry.backbone, "promptsrc").learned()
    assert torch.equal(learned["context"][0], plain.words(entry.model, entry.tokenizer, "a photo of a"))
    drawn = {name: value for name, value in learned.items() if name.startswith(("deep.", "visual."))}
    shallow = start(entry.backbone, "vpt", depth=1).learned()
    assert shallow.keys() == {"prompts.0"}
    assert shallow["prompts.0"].shape == (8, ImageTowerView(entry.backbone.image).width)
    for name, value in {**drawn, **shallow}.items():
        assert 0.01 < value.std() < 0.03, name
    assert not learned["average"].any()


def test_frozen_texts_are_those_of_the_published_templates(changeable: dict[str, Towers]) -> None:
    """Sixty of CLIP's eighty for ImageNet, whose features are averaged before they are normalised."""
    from vipbench.baselines.promptsrc import IMAGENET_TEMPLATES

    assert len(set(IMAGENET_TEMPLATES)) == 60 and all(text.count("{}") == 1 for text in IMAGENET_TEMPLATES)
    assert {"a photo of a {}.", "a tattoo of a {}.", "itap of the {}."} < set(IMAGENET_TEMPLATES)
    assert "itap of a {}." not in IMAGENET_TEMPLATES, "which is among the last twenty"
    entry = changeable["vit"]
    method: Any = start(entry.backbone, "promptsrc")
    for name, anchor in zip(CLASSES, method.anchors, strict=True):
        bodies = [plain.words(entry.model, entry.tokenizer, text.replace("{}", name)) for text in IMAGENET_TEMPLATES]
        mean = torch.stack([plain.encode(entry.model, entry.tokenizer, body) for body in bodies]).mean(0)
        assert (anchor - F.normalize(mean, dim=0)).abs().max() <= 1e-5


def test_templates_of_the_config_are_asked_for(changeable: dict[str, Towers]) -> None:
    with pytest.raises(UserError, match=r"takes the 60 published ones .* method\.templates=task"):
        start(changeable["vit"].backbone, "promptsrc", Task(CLASSES, templates=("one {}.",)))
