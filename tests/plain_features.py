"""Methods on frozen features once more, plainly: one sample at a time, or with torch's own modules and gradients.

Nothing here uses harness/ or baselines/.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests import plain


def text_feature(model: Any, tokenizer: Any, name: str, template: str) -> Tensor:
    """The un-normalised text feature [d] of a class name in a template."""
    return plain.encode(model, tokenizer, plain.words(model, tokenizer, template.format(name)))


def clip_adapter(image: Tensor, text: list[Tensor], down: Tensor, up: Tensor, scale: Tensor, ratio: float) -> Tensor:
    """CLIP-Adapter as its authors have it: logits [C] of one un-normalised image feature."""
    adapted = torch.clamp(up @ torch.clamp(down @ image, min=0), min=0)
    mixed = plain.unit(ratio * adapted + (1 - ratio) * image)
    return torch.stack([scale * mixed @ feature for feature in text])


def clip_adapter_normalised(
    image: Tensor, text: list[Tensor], down: Tensor, up: Tensor, scale: Tensor, ratio: float
) -> Tensor:
    """CLIP-Adapter as the repositories of LP++ and BiomedCoOp have it."""
    feature = plain.unit(image)
    mixed = ratio * torch.clamp(up @ torch.clamp(down @ feature, min=0), min=0) + (1 - ratio) * feature
    return torch.stack([scale * mixed @ own for own in text])


def taskres(image: Tensor, templates: list[list[Tensor]], residual: Tensor, scale: Tensor, alpha: float) -> Tensor:
    """TaskRes: logits [C] of one normalised image feature; `templates` holds the un-normalised text features of each class."""
    bases = [sum(own[1:], start=own[0]) / len(own) for own in templates]
    return torch.stack([scale * image @ plain.unit(base + alpha * x) for base, x in zip(bases, residual, strict=True)])


class Fitted(NamedTuple):
    """The parameters of LP++ after an epoch: W [C, d], b [C], alpha [C]."""

    weight: Tensor
    bias: Tensor
    alpha: Tensor

    def logits(self, images: Tensor, text: Tensor) -> Tensor:
        """Logits [N, C], one sample and one class at a time."""
        rows = [
            [w @ image + b + alpha * (image @ t) for w, b, alpha, t in zip(*self, text, strict=True)]
            for image in images
        ]
        return torch.stack([torch.stack(row) for row in rows])


def lp_plus_plus(
    features: Tensor, labels: Tensor, text: Tensor, bias: Tensor, epochs: int, reset: bool = False
) -> list[Fitted]:
    """LP++ with torch's linear layer, SGD and gradients: the parameters after each epoch.

    Args:
        bias: [C], which b begins at.
        reset: whether the gradient of alpha is set to zero after each of its steps, and otherwise counts that epoch only.
    """
    classes = range(len(text))
    layer = torch.nn.Linear(features.shape[1], len(text)).to(features.dtype)
    own = [features[labels == label] for label in classes]
    layer.weight.data = torch.stack([rows.sum(0) for rows in own])
    layer.bias.data = bias.clone()
    means = [(rows @ t).mean() for rows, t in zip(own, text, strict=True)]
    alpha = (250 * sum(means) / len(means) * torch.ones(len(text), dtype=features.dtype)).requires_grad_()
    largest = torch.linalg.eigvalsh(features.T @ features).max()
    optimizer = torch.optim.SGD(layer.parameters(), float(4 * len(features) / largest), momentum=0.9)
    alpha_rate = len(features) / (4 * max(((features @ t) ** 2).sum() for t in text))
    after = []
    for epoch in range(epochs):
        optimizer.zero_grad()
        if reset:
            alpha.grad = None
        torch.nn.functional.cross_entropy(layer(features) + alpha * (features @ text.T), labels).backward()
        optimizer.step()
        if epoch % 10 == 9:
            assert alpha.grad is not None
            alpha.data -= alpha_rate * alpha.grad
        values = (layer.weight, layer.bias, alpha)
        after.append(Fitted(*(value.detach().clone() for value in values)))
    return after
