"""Typed, validated configs: YAML and dotted overrides in, a resolved config and a run's identity out.

`vipbench config CONFIG.yaml [key=value ...]` prints one resolved. Paths are relative to the current directory.
"""

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from harness.data.urls import without_credentials
from harness.errors import UserError, shortened
from harness.files import digest_json, parse_yaml, read_yaml

log = logging.getLogger(__name__)

# Raise it when a change of the code changes what a run computes, so that old runs are not taken for new ones.
RESULT_VERSION = 3

Precision = Literal["fp32", "tf32", "bf16", "fp16"]  # tf32: fp32 with rounded products; needs a GPU, as fp16 does
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Rate = Annotated[float, Field(gt=0, le=3e38)]  # what fp32 holds
Minutes = Annotated[float, Field(gt=0, le=525_600)]  # a year
Gib = Annotated[float, Field(gt=0, le=2**30)]
ContextLength = Annotated[int, Field(ge=1, le=4096)]  # vectors; more than any text tower takes


class Section(BaseModel):
    """A part of a config: unknown keys and numbers that are not finite are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def settle(self, name: str, applies: bool, default: Any, why: str) -> None:
        """Fill in an option that depends on others, from a validator: its default where it applies, else None.

        So equal runs have equal configs.

        Raises:
            ValueError: the option is given, as another value than the default, where it has no effect.
        """
        value = getattr(self, name)
        if not applies and value not in (None, default):
            raise ValueError(f"{name} has no effect, since {why}; leave it out")
        object.__setattr__(self, name, (default if value is None else value) if applies else None)


Model = TypeVar("Model", bound=Section)


def expand_home(value: Any) -> Any:
    """A path or name with "~" or "~user" in front as the home folder; everything else as it is."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


Words = Annotated[str, Field(pattern=r"\w", max_length=1000)]  # a text in which there is something to tokenise
HomePath = Annotated[Path, BeforeValidator(expand_home)]
HomeText = Annotated[str, BeforeValidator(expand_home)]


class DataConfig(Section):
    """What is trained and tested on."""

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
    """Which frozen model; see `harness.backbone.load_backbone`."""

    name: HomeText = "ViT-B-16"
    pretrained: HomeText | None = None


class MethodConfig(Section):
    """What every method's own config has; a method adds its options in a subclass."""

    name: str


class TrainConfig(Section):
    """The recipe. Each method's `recipe` states its paper's values; what stands here is Dassl's, which most share."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Rate = 0.002
    batch_size: Count = 32  # over all processes together
    epochs: Annotated[int, Field(ge=1, le=10**6)] = 50
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None  # of SGD, 0.9 by default
    weight_decay: Annotated[float, Field(ge=0, le=3e38)] = 5e-4
    warmup_epochs: Annotated[int, Field(ge=0, le=10**6)] = 1
    warmup_lr: Rate | None = None  # 1e-5 by default
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
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} leaves none of {self.epochs} epochs for training at the learning rate; "
                "give fewer, or 0"
            )
        low, high = self.crop_scale
        if not low <= high <= 1:
            raise ValueError(f"crop_scale [{low}, {high}] is no range within (0, 1]; the papers use [0.08, 1.0]")
        return self

    def steps_per_epoch(self, samples: int) -> int:
        """Optimiser steps of an epoch of so many samples; see `harness.features.global_batches`."""
        return max(1, samples // self.batch_size)


class RunConfig(Section):
    """Execution of a run; nothing here changes a result but `compile`, which rounds differently and is in the identity."""

    out: HomePath = Path("runs")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Annotated[int, Field(ge=0, le=1024)] = 2  # image loading processes per rank
    eval_batch_size: Count = 64  # images per process
    micro_batch: Count | None = None  # samples per process in a training pass; the gradients of a batch are added up
    text_memory_gib: Gib = 2.0  # of a text tower pass; what takes more is computed in parts, twice where it is trained
    compile: bool = False  # the image tower, with torch.compile; earns its start-up back after some hundred images
    log_every: Count = 10  # steps
    checkpoint_minutes: Minutes | None = 10.0  # between checkpoints
    checkpoint_steps: Count | None = None  # between checkpoints too; both may be left out, see harness/checkpoint.py
    keep_checkpoints: Count = 2  # of an unfinished run, the newest
    timeout_minutes: Minutes = 30.0  # after which a process that waits for the others in vain gives up
    # Where steps and results are sent to; see harness/tracking.py.
    tracking: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    tracking_project: str = "vipbench"  # its name at W&B and MLflow
    bank: bool = True  # store image features under `out`, shared by all runs there
    bank_gib: Gib | None = None  # how much the stored features may take; those used longest ago leave first


class Config(Section):
    """A resolved run: every default is filled in, so that the config alone says what was done."""

    seed: Seed = 1
    precision: Precision = "fp32"
    data: DataConfig
    backbone: BackboneConfig = BackboneConfig()
    symptoms: HomePath | None = None
    method: SerializeAsAny[MethodConfig]
    train: TrainConfig | None  # None for methods that do not train
    run: RunConfig = RunConfig()

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, apply `key.subkey=value` overrides, resolve.

        Raises:
            UserError: no such file, not YAML, unknown or misspelt key, wrong type or impossible value.
        """
        return cls.from_mapping(override(read_yaml(path), overrides))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Validate and resolve a plain mapping. Raises UserError as `load` does."""
        from harness.method import method_class  # methods import torch; a config alone does not

        given = {key: _longhand(key, value) for key, value in mapping.items()}
        draft = _validate(_Draft, given)
        method_type = method_class(draft.method.get("name"))
        method = _validate(method_type.Config, draft.method, "method.")
        values = {name: getattr(draft, name) for name in ("seed", "precision", "data", "backbone", "symptoms", "run")}
        values["method"] = method
        if method_type.uses_symptoms(method):
            if draft.symptoms is None:
                raise UserError(f"symptoms: method {method.name!r} reads a symptom set; give symptoms: FILE.json")
        else:
            values["symptoms"] = None
        if method_type.trains:
            values |= _resolve_training(draft, method_type.recipe(method, draft.data.shots, draft.backbone.name))
        else:
            values |= _resolve_training_free(draft, method.name)
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON types, in the order of the fields."""
        return self.model_dump(mode="json")

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


class Digests(NamedTuple):
    """SHA-256 of the content that a run reads."""

    dataset: str
    backbone: str
    symptoms: str | None


def run_name(config: Config, digests: Digests) -> str:
    """The run's identity as a directory name: readable front, then 12 hex digits of everything that determines the result.

    Where the inputs lie and how the run is executed (`run`) do not count; what they hold does, and `run.compile`, which
    rounds differently. The device is left out on purpose: a run has one identity on all machines, and its provenance names
    the device. So is `data.fewer`, which decides whether there is a result, and not which.
    """
    settings = config.model_dump(
        mode="json", exclude={"run": True, "data": {"path", "fewer"}, "backbone": True, "symptoms": True}
    )
    facts = {"version": RESULT_VERSION, "settings": settings, "digests": digests._asdict()}
    identity = digest_json(facts | ({"compile": True} if config.run.compile else {}))
    return f"{config.method.name}_{config.shots_label}_seed{config.seed}_{identity[:12]}"


def override(mapping: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `key.subkey=value` (the value is YAML) to a nested mapping; returns a new one."""
    result: dict[str, Any] = {key: _longhand(key, value) for key, value in mapping.items()}
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted:
            raise UserError(f"override {shortened(assignment)!r}: write key=value, such as data.shots=4")
        set_key(result, dotted, parse_yaml(text, f"override {shortened(assignment)!r}"))
    return result


def set_key(mapping: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted key in a nested mapping in place; mappings on the way are copied, so that others' are not changed."""
    *path, last = dotted.split(".")
    for key in path:
        inner = mapping.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise UserError(f"{dotted}: {key} is a value, not a section")
        mapping[key] = dict(inner or {})
        mapping = mapping[key]
    mapping[last] = _longhand(dotted, value)


def nearest(word: str, choices: Sequence[str]) -> str:
    """A hint for an error message: the nearest right word, or all of them."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(sorted(choices))}"


class _Draft(Section):
    """A config as written, before the method's defaults are known."""

    seed: Seed = 1
    precision: Precision = "fp32"
    data: DataConfig
    backbone: BackboneConfig = BackboneConfig()
    symptoms: HomePath | None = None
    method: dict[str, Any]
    train: dict[str, Any] | None = None
    run: RunConfig = RunConfig()


def _resolve_training(draft: _Draft, recipe: Mapping[str, Any]) -> dict[str, Any]:
    if draft.data.shots == 0:
        raise UserError(f"data.shots: method {draft.method['name']!r} trains and needs images; give a number or 'all'")
    train = _validate(TrainConfig, {**recipe, **(draft.train or {})}, "train.")
    if train.augmentation_seed is None:
        train = train.model_copy(update={"augmentation_seed": draft.seed})
    split_seed = None  # where nothing is drawn
    if draft.data.shots != "all":
        split_seed = draft.seed if draft.data.split_seed is None else draft.data.split_seed
    return {"train": train, "data": draft.data.model_copy(update={"split_seed": split_seed})}


def _resolve_training_free(draft: _Draft, name: str) -> dict[str, Any]:
    if draft.train:
        log.warning("train: ignored, method %r does not train", name)
    # Seeds and shots do not change what such a method computes; pinning them lets equal runs be one run.
    return {"train": None, "seed": 0, "data": draft.data.model_copy(update={"shots": 0, "split_seed": 0})}


def _longhand(key: str, value: Any) -> Any:
    return {"name": value} if key in ("method", "backbone") and isinstance(value, str) else value


def _validate(model: type[Model], values: Mapping[str, Any], prefix: str = "") -> Model:
    try:
        return model(**values)
    except ValidationError as error:
        # A misspelt key comes first, since it may be why another one is missing.
        first, *more = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        parts = [str(part) for part in first["loc"] if not str(part).startswith(("literal", "constrained"))]
        key = ".".join([*filter(None, [prefix.rstrip(".")]), *parts])
        text = f"config: {key}: {_explain(model, first)}"
        raise UserError(text + (f" (and {len(more)} more)" if _distinct(error) > 1 else "")) from error


def _distinct(error: ValidationError) -> int:
    return len({detail["loc"][:2] for detail in error.errors()})


def _explain(model: type[BaseModel], detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        for part in detail["loc"][:-1]:
            model = _section(model, str(part))
        return f"unknown key; {nearest(str(detail['loc'][-1]), list(model.model_fields))}"
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "value_error":  # of a validator of ours, which says it all
        return str(detail["ctx"]["error"])
    message = detail["msg"][0].lower() + detail["msg"][1:]
    if detail["type"] == "credentials":
        return message
    found = detail["input"]
    return f"{message}; found {shortened(found if isinstance(found, int) else repr(found))}"


def _section(model: type[BaseModel], name: str) -> type[BaseModel]:
    annotation = model.model_fields[name].annotation
    candidates = [annotation, *get_args(annotation)]
    return next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
