"""Memory and time of what takes most of both: CoCoOp's prompts of each image, and methods that train inside the image tower.

The latter beside plain PyTorch: both towers with prompts padded to the context length, everything kept for the backward pass.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.kernels import peak_mib
from benchmarks.gpu.setting import Row, Setting, Workspace, workspace
from benchmarks.measure import median_seconds
from vipbench.harness.methods.base import Task
from vipbench.harness.methods.registry import method_class

BATCHES = (1, 8, 32)


def measure(setting: Setting, begin: Callable[[], None], precision: str) -> Iterator[Row]:
    """Rows of CoCoOp by its batch, then of plain PyTorch and of the methods in the image tower."""
    with workspace(setting, precision, begin) as place:
        sizes = BATCHES if not setting.small else BATCHES[:1]
        for batch in sizes:
            row = {"what": "cocoop", "precision": place.precision, "batch": batch, "classes": setting.classes}
            yield place.attempt(row, partial(_cocoop, place, setting, batch))
        batch, classes = (32 if not setting.small else 2), len(place.inputs.dataset.classes)
        row = {"what": "plain PyTorch, both towers", "precision": place.precision, "batch": batch, "classes": classes}
        yield place.attempt(row, partial(_plain, place, setting, batch))
        for name in (name for name in setting.trained() if method_class(name).needs == "images"):
            row = {"what": name, "precision": place.precision, "batch": batch, "classes": classes}
            yield place.attempt(row, partial(_step, place, setting, name, batch))


def _cocoop(place: Workspace, setting: Setting, batch: int) -> Row:
    cls, backbone = method_class("cocoop"), place.inputs.backbone
    task = Task([f"finding number {index}" for index in range(setting.classes)])
    method = cls(cls.Config(name="cocoop"), task, backbone).to(place.device).train()
    inputs = F.normalize(torch.randn(batch, backbone.dim, device=place.device), dim=-1)
    labels = torch.zeros(batch, dtype=torch.long, device=place.device)

    def passes() -> None:
        with place.topology.autocast():
            loss = method.losses(method(inputs), labels)["cross_entropy"].mean()
        loss.backward()

    return _measured(passes, setting)


def _plain(place: Workspace, setting: Setting, batch: int) -> Row:
    """Gradients reach what goes into the first blocks, as they do where prompts or LoRA are learned there."""
    backbone = place.inputs.backbone
    tower = backbone.text
    texts = [f"a photo of a {name}." for name in place.inputs.dataset.classes]
    tokens = torch.zeros(len(texts), tower.context_length, dtype=torch.long)
    for row, text in enumerate(texts):
        ids = [*tower.start, *tower.tokenize(text), *tower.end]
        tokens[row, : len(ids)] = torch.tensor(ids)
    ends = tokens.argmax(dim=1).to(place.device)
    with torch.no_grad():
        embedded = tower.embed(tokens.to(place.device))
    pixels = torch.randn(batch, *backbone.pixels_shape, device=place.device, requires_grad=True)
    embedded.requires_grad_(True)
    labels = torch.zeros(batch, dtype=torch.long, device=place.device)

    def passes() -> None:
        with place.topology.autocast():
            x = tower.transformer(embedded + tower.positional_embedding, attn_mask=tower.attn_mask)  # type: ignore[operator]
            classes = tower.ln_final(x)[torch.arange(len(x), device=x.device), ends] @ tower.text_projection  # type: ignore[operator]
            images = F.normalize(backbone.image(pixels).float(), dim=-1)
            logits = backbone.logit_scale * images @ F.normalize(classes.float(), dim=-1).T
            loss = F.cross_entropy(logits, labels)
        loss.backward()

    return _measured(passes, setting)


def _step(place: Workspace, setting: Setting, name: str, batch: int) -> Row:
    training = place.job(name, train={"batch_size": batch}).training
    assert training is not None
    (part,) = training.parts(next(training.batches()), None)

    def passes() -> None:
        with place.topology.autocast():
            loss = training.loss(*part)
        loss.sum().backward()

    return _measured(passes, setting)


def _measured(passes: Callable[[], None], setting: Setting) -> Row:
    milliseconds = 1e3 * median_seconds(passes, setting.repeats)
    return {"ms": milliseconds, "peak_mib": peak_mib(passes)}
