"""What a method is: what it trains, and how logits come from features. And the registry that finds methods by name.

A method is one file in baselines/ (or harness/vip.py): a `MethodConfig` with its options and a `Method` decorated with
`@register`. Loops, devices, logging, checkpoints and evaluation are not its business.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.backbone import Backbone
from harness.config import MethodConfig, nearest
from harness.errors import UserError


@dataclass(frozen=True)
class Task:
    """What is to be told apart.

    Attributes:
        classes: names in the dataset's order; a label is an index into them.
        symptoms: for each class its symptoms in words (ragged), or None when the method reads none.
    """

    classes: list[str]
    symptoms: list[list[str]] | None = None


class Method(nn.Module):
    """A way to adapt a frozen backbone to a task. Trained are the parameters that require a gradient.

    Attributes:
        Config: the method's options.
        trains: whether there is anything to train.
        needs: "features" if `forward` takes L2-normalised image features [B, d], "images" for pixels [B, 3, H, W].
    """

    Config: ClassVar[type[MethodConfig]]
    trains: ClassVar[bool] = True
    needs: ClassVar[Literal["features", "images"]] = "features"
    backbone: Backbone

    def __init__(self, config: Any, task: Task, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.task = config, task
        self.backbone = backbone

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        """The paper's training settings, as entries of `TrainConfig` that differ from its defaults."""
        return {}

    @classmethod
    def uses_symptoms(cls, config: Any) -> bool:
        """Whether the method reads the symptom set."""
        return False

    @property
    def per_class(self) -> bool:
        """Whether what is learned belongs to the classes it was trained on, so that other classes cannot use it."""
        return False

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [B, C] from what `needs` names."""
        raise NotImplementedError

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Training loss of each sample: [B]. The default is cross-entropy."""
        return F.cross_entropy(self(inputs).float(), labels, reduction="none")

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is learned, by name: optimised, reduced and saved; nothing else is."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


class TextClassifier(Method):
    """A method whose class features do not depend on the image: logits = scale * <image feature, class feature>.

    In evaluation mode the class features are computed once, from one call of `train` or `eval` to the next.
    """

    _cached: Tensor | None = None

    def class_features(self) -> Tensor:
        """L2-normalised features [C, d] of the classes."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            features = self.class_features()
        else:
            if self._cached is None:
                self._cached = self.class_features().detach()
            features = self._cached
        return cosine_logits(self.backbone.logit_scale, inputs, features)

    def train(self, mode: bool = True) -> "TextClassifier":
        self._cached = None
        return super().train(mode)


def cosine_logits(scale: Tensor, inputs: Tensor, features: Tensor) -> Tensor:
    """scale * <image feature, class feature>, in fp32 whatever the precision: half precision would round a logit by up to 1/8.

    Args:
        scale: scalar. inputs: [B, d]. features: [C, d], or [B, C, d] when each image has its own.

    Returns:
        [B, C] float32.
    """
    with torch.autocast(inputs.device.type, enabled=False):
        return scale * torch.einsum(
            "bd,cd->bc" if features.ndim == 2 else "bd,bcd->bc", inputs.float(), features.float()
        )


M = TypeVar("M", bound=Method)
_methods: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Class decorator: make a method known by its name."""

    def add(cls: type[M]) -> type[M]:
        assert name not in _methods, f"two methods are called {name}"
        _methods[name] = cls
        return cls

    return add


def method_names() -> list[str]:
    """Names of all methods: those in harness/vip.py and in every file of baselines/."""
    import baselines

    importlib.import_module("harness.vip")
    for module in pkgutil.iter_modules(baselines.__path__):
        importlib.import_module(f"baselines.{module.name}")
    return sorted(_methods)


def method_class(name: str | None) -> type[Method]:
    """The method of a name.

    Raises:
        UserError: no such method (says the nearest one).
    """
    names = method_names()
    if name not in names:
        raise UserError(f"config: method.name: there is no method {name!r}; {nearest(str(name), names)}")
    return _methods[str(name)]


def symptom_names(classes: Sequence[str], symptoms: Sequence[Sequence[str]]) -> list[str]:
    """Descriptions of all symptoms, class by class, for error messages."""
    return [
        f"class {name!r}, symptom {text!r}" for name, texts in zip(classes, symptoms, strict=True) for text in texts
    ]
