"""The method seam: what a method is given, what it computes, and what is left to the loops around it.

A method is one file in baselines/ (or harness/methods/): a `MethodConfig` with its options and a `Method` decorated with
`@register`. Loops, devices, logging, checkpoints and evaluation are not its business.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vipbench.harness.config.schema import MethodConfig
from vipbench.harness.data.augment import Augmentation
from vipbench.harness.errors import UserError
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.phrases import as_sentence, spoken

DEFAULT_TEMPLATES = ("a photo of a {}.",)
Family = Literal["prompts", "adapters", "image_tower", "untrained"]


@dataclass(frozen=True)
class Task:
    """The classes to be told apart, and what is written of them.

    Attributes:
        classes: names in the dataset's order; a label is an index into them.
        symptoms: for each class its symptoms in words (ragged), of all symptom sets; None when the method reads none.
        symptom_sets: the same, each set for itself.
        modality: of the images in words, where the symptom set names it.
        templates: sentences with {} where a class name goes.
    """

    classes: list[str]
    symptoms: list[list[str]] | None = None
    symptom_sets: tuple[list[list[str]], ...] = ()
    modality: str | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES


class SupportViews(NamedTuple):
    """The views of the support set that `Method.prepare` asks for: `number` augmented ones, or with 0 the images as evaluated."""

    number: int = 0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True

    def augmentation(self, seed: int) -> Augmentation | None:
        """Their augmentation; None where there is none."""
        return Augmentation(seed, self.crop_scale, self.flip) if self.number else None


@dataclass(frozen=True)
class Support:
    """Frozen features of labelled samples: the training samples or the validation samples, the same on all ranks.

    Attributes:
        features: [V, N, d] float32, L2-normalised, of V views.
        norms: [V, N] float32, which the features had before.
        labels: [N] int64.
        logits: [V, N, C] float32 of zero-shot classification with the task's first template.
    """

    features: Tensor
    norms: Tensor
    labels: Tensor
    logits: Tensor


class Output(NamedTuple):
    """The output of a forward pass: logits [b, C], and what else the losses of the method need, by name."""

    logits: Tensor
    extras: Mapping[str, Tensor] = {}


@dataclass
class Drawing:
    """Keys of all that a method draws at random in a training step, so that it draws the same on any number of ranks.

    Attributes:
        step: int64 scalar, keyed by (seed, step).
        samples: [b] int64, keyed by (seed, step, sample).
    """

    step: Tensor
    samples: Tensor


class Method(nn.Module):
    """A way to adapt a frozen backbone to a task. Trained are the parameters that require a gradient.

    Attributes:
        Config: the method's options.
        trains: whether there is a training loop.
        learns_prompts: whether what is learned goes through the text tower, as context vectors do.
        uses_templates: whether the method reads the task's templates.
        draws: whether a method that trains nothing draws something at random, so that the run's seed counts.
        needs: the inputs of `forward`: "features" [B, d] L2-normalised, "unnormalised" features, or "images" [B, 3, H, W].
        drawing: keys of random numbers, which the loop sets for each `forward` of a training step; None elsewhere.
    """

    Config: ClassVar[type[MethodConfig]]
    trains: ClassVar[bool] = True
    learns_prompts: ClassVar[bool] = False
    uses_templates: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    needs: ClassVar[Literal["features", "unnormalised", "images"]] = "features"
    backbone: Backbone
    drawing: Drawing | None = None

    def __init__(self, config: Any, task: Task, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.task = config, task
        self.backbone = backbone

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        """The paper's training settings, as entries of `TrainConfig` that differ from its defaults."""
        return {}

    @classmethod
    def grid(cls, config: Any) -> Mapping[str, Sequence[Any]]:
        """The values among which `recipe: tuned` chooses, by entry of `TrainConfig`; empty: those of the method's family."""
        return {}

    @classmethod
    def family(cls) -> Family:
        """The methods with which this one shares the setting of `recipe: fixed` (harness/methods/recipes.yaml)."""
        if not cls.trains:
            return "untrained"
        if cls.needs == "images":
            return "image_tower"
        return "prompts" if cls.learns_prompts else "adapters"

    @classmethod
    def uses_symptoms(cls, config: Any) -> bool:
        """Return True if the method reads the symptom set."""
        return False

    @classmethod
    def support(cls, config: Any) -> SupportViews | None:
        """The views of the support set that `prepare` reads; None where it reads none."""
        return None

    @classmethod
    def not_packed(cls, config: Any) -> str:
        """The reason why runs of this method do not train together in one process; "" where they may.

        Packing shares the start of a process, its inputs, and passes of the backbone's text tower.
        """
        return "it trains inside the image tower" if cls.needs == "images" else ""

    @property
    def per_class(self) -> bool:
        """True if what is learned belongs to the classes it was trained on, so that other classes cannot use it."""
        return False

    def prepare(self, support: Support, validation: Support | None) -> None:
        """Fit what is fitted in closed form, or start from; called once before training where `support` asks for views.

        Args:
            validation: as evaluated (V = 1); None where the dataset has no validation split.
        """

    def finish(self, validation: Support | None) -> None:
        """Choose on validation samples what is chosen once all else is learned; called once, with the kept epoch's parameters.

        Args:
            validation: as `prepare` was given it; None also where `support` asks for nothing.
        """

    def forward(self, inputs: Tensor) -> Output:
        """Logits [B, C] from what `needs` names."""
        raise NotImplementedError

    def statistics(self, inputs: Tensor) -> Tensor:
        """Values [b, ...] float32 of samples that `losses` needs for the whole global batch, without a gradient.

        They come back as `output.extras["batch"]` [B, ...] in the order of the global batch, the same on every rank and in every
        micro batch.
        """
        raise NotImplementedError

    def losses(self, output: Output, labels: Tensor) -> dict[str, Tensor]:
        """Losses by name, which add up: [b] one of each sample, or a scalar that counts once in a global batch."""
        return {"cross_entropy": F.cross_entropy(output.logits.float(), labels, reduction="none")}

    def combine(self, gradients: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """One gradient by parameter name from the gradients of each loss, all of the global batch. The default is their sum."""
        first, *others = gradients.values()
        return {name: sum((other[name] for other in others), start=value) for name, value in first.items()}

    def end_of_epoch(self, epoch: int, epochs: int) -> None:
        """Called after each of `epochs` epochs, counted from 1, before it is validated.

        It may change what is learned after the last one, when no optimizer holds a copy of it any more.
        """

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are optimised, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trainable parameters in groups for the optimizer: "params", and "lr_factor" where a group has another rate."""
        return [{"params": list(self.trainable().values())}]

    def symptom_features(self) -> Tensor:
        """Text features [P, d] of the task's symptoms, class by class, as the text tower gives them; here of plain sentences."""
        assert self.task.symptoms is not None
        texts = [as_sentence(text) for own in self.task.symptoms for text in own]
        return self.backbone.text.encode_texts(texts, symptom_names(self.task.classes, self.task.symptoms))

    def symptom_weights(self) -> Tensor | None:
        """The weight [P] of each symptom within its class, in that order; None where the method gives them none."""
        return None

    def leave_one_out(self) -> Tensor | None:
        """For each symptom the feature [P, d] of its class without it, NaN where nothing else is left; None: not known."""
        return None

    def learned(self) -> dict[str, Tensor]:
        """Collect all that was learned or fitted, by name: trainable parameters, and persistent buffers outside the backbone."""
        frozen = {id(buffer) for buffer in self.backbone.buffers()}
        state = self.state_dict(keep_vars=True)
        fitted = {name: buffer for name, buffer in self.named_buffers() if id(buffer) not in frozen and name in state}
        return {**self.trainable(), **fitted}

    def load_learned(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `learned` gave. A dimension of size 0, which `prepare` decides, takes any size.

        Raises:
            UserError: names or shapes are not those of this method on this task.
        """
        own = self.learned()
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes.keys() != given.keys() or not all(_fits(given[name], shape) for name, shape in shapes.items()):
            raise UserError(f"prompts: the file holds {given}, but the method learns {shapes}; they must agree")
        with torch.no_grad():
            for name, tensor in tensors.items():
                if own[name].shape != tensor.shape:
                    own[name].data = own[name].new_empty(tensor.shape)
                own[name].copy_(tensor)
        self.eval()


def _fits(given: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(given) == len(shape) and all(own in (0, size) for size, own in zip(given, shape, strict=True))


class TextClassifier(Method):
    """A method whose class features do not depend on the image: logits = scale * <image feature, class feature>.

    In evaluation mode the class features are computed once, from one call of `train` or `eval` to the next.
    """

    _cached: Tensor | None = None

    @property
    def logit_scale(self) -> Tensor:
        """Scalar that cosines are multiplied with: the backbone's own."""
        return self.backbone.logit_scale

    def class_features(self) -> Tensor:
        """L2-normalised features [C, d] of the classes."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Output:
        if self.training:
            features = self.class_features()
        else:
            if self._cached is None:
                self._cached = self.class_features().detach()
            features = self._cached
        return Output(cosine_logits(self.logit_scale, inputs, features), {"class_features": features})

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


def template_features(
    task: Task, backbone: Backbone, templates: Sequence[str] | None = None, *, normalise: bool = True
) -> Tensor:
    """Text features [C, T, d] of the classes in T templates, the task's by default; L2-normalised, or as the tower gave them."""
    templates = templates or task.templates
    names = [spoken(name) for name in task.classes]
    texts = [template.replace("{}", name) for name in names for template in templates]
    features = backbone.text.encode_texts(texts, [f"class {name!r}" for name in names for _ in templates])
    return (F.normalize(features, dim=-1) if normalise else features).view(len(names), len(templates), -1)


def class_name_features(task: Task, backbone: Backbone) -> Tensor:
    """L2-normalised text features [C, d] of the class names: the mean over the task's templates, normalised again."""
    return F.normalize(template_features(task, backbone).mean(dim=1), dim=-1)


def check_every_class(method: str, task: Task, support: Support) -> None:
    """Raise UserError where a class has no training sample, for a method that is fitted to those of each class."""
    present = set(support.labels.tolist())
    if absent := [name for label, name in enumerate(task.classes) if label not in present]:
        raise UserError(f"{method}: no training image of class {absent[0]!r}; it needs at least one of each class")


def symptom_names(classes: Sequence[str], symptoms: Sequence[Sequence[str]]) -> list[str]:
    """Descriptions of all symptoms, class by class, for error messages."""
    return [
        f"class {name!r}, symptom {text!r}" for name, texts in zip(classes, symptoms, strict=True) for text in texts
    ]
