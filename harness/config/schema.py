"""The sections of a config: plain types with their bounds; no method and no file is known here."""

import os
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, SerializeAsAny, model_validator

from vipbench.harness.config.validation import Section
from vipbench.harness.system.urls import without_credentials

Precision = Literal["fp32", "tf32", "bf16", "fp16"]  # tf32: fp32 with rounded products; needs a GPU, as fp16 does
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Rate = Annotated[float, Field(gt=0, le=3e38)]  # what fp32 holds
NonNegative = Annotated[float, Field(ge=0, le=3e38)]
Minutes = Annotated[float, Field(gt=0, le=525_600)]  # a year
Gib = Annotated[float, Field(gt=0, le=2**30)]
ContextLength = Annotated[int, Field(ge=1, le=4096)]  # vectors; more than any text tower takes


def expand_home(value: Any) -> Any:
    """A path or name with "~" or "~user" in front as the home folder; everything else as it is."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def one_place(template: str) -> str:
    """Check that a template has one place for a text. Raises ValueError."""
    if template.count("{}") != 1 or set(template.replace("{}", "")) & set("{}"):
        raise ValueError(f"template {template!r} must hold {{}} once, where the text goes, and no other brace")
    return template


Template = Annotated[str, AfterValidator(one_place)]
Switch = Annotated[Literal[True] | None, BeforeValidator(lambda value: None if value is False else value)]  # null: off
Words = Annotated[str, Field(pattern=r"\w", max_length=1000)]  # a text in which there is something to tokenise
HomePath = Annotated[Path, BeforeValidator(expand_home)]
HomeText = Annotated[str, BeforeValidator(expand_home)]

Recipe = Literal["published", "fixed", "tuned"]
Grid = Annotated[dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]], Field(min_length=1)]

Templates = Annotated[tuple[Template, ...], Field(min_length=1)] | None  # of class names; None: "a photo of a {}."
SymptomFiles = HomePath | Annotated[tuple[HomePath, ...], Field(min_length=1)] | None  # one set, or several


class DataConfig(Section):
    """The dataset, and which of its images are learned from."""

    # A folder or URL that `vipbench prepare` or `vipbench index` wrote.
    path: Annotated[str, BeforeValidator(expand_home), AfterValidator(without_credentials)]
    shots: Annotated[int, Field(ge=0, lt=2**31)] | Literal["all"] = "all"  # training images per class; 0: no training
    split_seed: Seed | None = None  # which images the few shots are; default: the run's seed
    # A class with fewer images than shots ends the run, or gives what it has.
    fewer: Literal["refuse", "take"] = "refuse"
    on_error: Literal["raise", "skip"] = (
        "raise"  # a damaged image ends the run, or is left out and named in provenance.json
    )


class BackboneConfig(Section):
    """The frozen model; see `vipbench.harness.models.backbone.load_backbone`."""

    name: HomeText = "ViT-B-16"
    pretrained: HomeText | None = None


class MethodConfig(Section):
    """The options that every method has; a method adds its own in a subclass.

    Attributes:
        LATER: options that came after runs had been recorded; where null, a run's identity is what it was before they came.
    """

    LATER: ClassVar[tuple[str, ...]] = ()

    name: str

    def files(self) -> dict[str, Path]:
        """The files that options name, by option: what they hold counts in a run's identity, and not where they lie."""
        return {}


class TrainConfig(Section):
    """The recipe. Each method's `recipe` states its paper's values; what stands here is Dassl's, which most share."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Rate = 0.002
    batch_size: Count = 32  # over all processes together
    epochs: Annotated[int, Field(ge=1, le=10**6)] | None = 50
    steps: Annotated[int, Field(ge=1, le=10**9)] | None = None  # optimiser steps, in the place of epochs
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None  # of SGD, 0.9 by default
    weight_decay: NonNegative = 5e-4
    warmup_epochs: Annotated[int, Field(ge=0, le=10**6)] = 1
    warmup_lr: Rate | None = None  # 1e-5 by default
    # None: half a cosine by epoch that ends above 0 (Dassl). "step": half a cosine by step, down to `final_lr`.
    schedule: Literal["step"] | None = None
    final_lr: NonNegative | None = None  # 0 by default
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = (
        None  # of Adam, torch's
    )
    eps: Rate | None = None  # of Adam, 1e-8 by default
    select: Literal["best", "last"] = "last"  # the epoch that is kept; "best" is by validation accuracy
    # Of epochs with equal accuracy: the one of lowest validation loss (the first of equal ones), or simply the first, as Dassl.
    select_ties: Literal["lower_loss", "first"] | None = None
    max_grad_norm: Rate | None = None  # L2 norm that gradients are scaled down to
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)  # area of the random resized crop
    flip: bool = True
    augmentation_seed: Seed | None = None  # default: the run's seed
    shuffle_block: Count | None = None  # None: all at once; a number: shards, then blocks of so many
    views: Annotated[int, Field(ge=1, le=10**6)] | Literal["all"] = (
        "all"  # views per image: a new one each epoch, or K in turn (an approximation)
    )

    @model_validator(mode="after")
    def _settle_options(self) -> Self:
        self.settle("momentum", self.optimizer == "sgd", 0.9, f"the optimizer is {self.optimizer}")
        self.settle("warmup_lr", self.warmup_epochs > 0, 1e-5, "there is no warm-up epoch")
        self.settle("select_ties", self.select == "best", "lower_loss", f"select is {self.select}")
        for name in ("betas", "eps"):
            if getattr(self, name) is not None and self.optimizer == "sgd":
                raise ValueError(f"{name} has no effect, since the optimizer is sgd; leave it out")
        if self.final_lr is not None and self.schedule is None:
            raise ValueError("final_lr has no effect without schedule: step; leave it out")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give epochs or steps; the other one is null")
        if self.warmup_epochs and (self.steps or self.schedule):
            raise ValueError("warmup_epochs goes with epochs and their own schedule; set it to 0")
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} leaves none of {self.epochs} epochs for training at the learning rate; "
                "give fewer, or 0"
            )
        low, high = self.crop_scale
        if not low <= high <= 1:
            raise ValueError(f"crop_scale [{low}, {high}] is no range within (0, 1]; the papers use [0.08, 1.0]")
        return self


class RunConfig(Section):
    """Execution of a run; nothing here changes a result but `compile`, which rounds differently and is in the identity."""

    out: HomePath = Path("runs")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Annotated[int, Field(ge=0, le=1024)] = 2  # image loading processes per rank
    eval_batch_size: Count = 64  # images per process
    micro_batch: Count | None = None  # samples per process in a training pass; the gradients of a batch are added up
    text_memory_gib: Gib = 2.0  # of a text tower pass; what takes more is computed in parts, twice where it is trained
    image_memory_gib: Gib = 4.0  # of a training pass inside the image tower; beyond it blocks are computed twice
    compile: bool = False  # the image tower, with torch.compile; earns its start-up back after some hundred images
    cuda_graph: bool = (
        False  # replay the passes of a training step as one CUDA graph; on one GPU, without `micro_batch`
    )
    log_every: Count = 10  # steps
    checkpoint_minutes: Minutes | None = 10.0  # between checkpoints
    checkpoint_steps: Count | None = (
        None  # between checkpoints too; both may be left out, see harness/training/checkpoint.py
    )
    keep_checkpoints: Count = 2  # of an unfinished run, the newest
    timeout_minutes: Minutes = 30.0  # after which a process that waits for the others in vain gives up
    # Where steps and results are sent to; see harness/runs/tracking.py.
    tracking: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    tracking_project: str = "vipbench"  # its name at W&B and MLflow
    plugins: tuple[HomePath, ...] = ()  # Python files that register methods; see harness/methods/registry.py
    # A symptom set whose verdict is "not usable" (see harness/symptoms/verdict.py) ends the run, or is taken as it is.
    unusable_symptoms: Literal["refuse", "take"] = "refuse"
    bank: bool = True  # store image features under `out`, shared by all runs there
    bank_gib: Gib | None = None  # how much the stored features may take; those used longest ago leave first


class Config(Section):
    """A resolved run: every default is filled in, so that the config alone tells what was done."""

    seed: Seed = 1
    precision: Precision = "fp32"
    data: DataConfig
    backbone: BackboneConfig = BackboneConfig()
    symptoms: SymptomFiles = None
    templates: Templates = None
    method: SerializeAsAny[MethodConfig]
    # The paper's settings, one setting for all methods of a family, or the best of a grid on validation. "published" for methods
    # that do not train.
    recipe: Recipe = "published"
    grid: Grid | None = None  # of "tuned": the values to choose from, by entry of `train`
    train: TrainConfig | None  # None for methods that do not train; with a grid its first values
    run: RunConfig = RunConfig()

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON types, in the order of the fields; without the entries of `train` that the grid will decide."""
        mapping = self.model_dump(mode="json")
        if self.grid:
            mapping["train"] = {name: value for name, value in mapping["train"].items() if name not in self.grid}
        return mapping

    def candidates(self) -> list[Self]:
        """One config for each point of the grid, in which the last entry varies fastest; this one alone without a grid."""
        if self.grid is None:
            return [self]
        assert self.train is not None
        settled = self.train.model_dump()
        points = (dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values()))
        return [self.model_copy(update={"train": TrainConfig.model_validate(settled | point)}) for point in points]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_mapping(), sort_keys=False, allow_unicode=True)

    @property
    def seeds(self) -> dict[str, int | None]:
        """The seeds of initial values and order, of the few-shot draw, and of augmentation (None: nothing is trained)."""
        augmentation = self.train.augmentation_seed if self.train else None
        return {"run": self.seed, "split": self.data.split_seed, "augmentation": augmentation}

    @property
    def shots_label(self) -> str:
        return "all" if self.data.shots == "all" else f"{self.data.shots}shot"
