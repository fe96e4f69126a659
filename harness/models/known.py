"""Known values of families of backbones and of medical backbones, from known_backbones.yaml."""

from functools import cache
from pathlib import Path

from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.config.validation import Section, validate
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.open_clip_internals import TimmModel
from vipbench.harness.models.openai_file import is_torchscript
from vipbench.harness.system.files import read_yaml

FILE = Path(__file__).with_name("known_backbones.yaml")


class Expected(Section):
    """Values that a backbone should have; each list holds all that are right, None where nothing is known."""

    activation: tuple[str, ...] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    image_size: tuple[int, ...] | None = None  # pixels per side
    context_length: tuple[int, ...] | None = None  # tokens


class KnownBackbone(Expected):
    """A medical backbone, with the values in which it differs from its family."""

    name: str
    id: str
    family: str
    licence: str
    modality: str
    note: str | None = None
    run: bool = False  # its weights were loaded and checked


class Known(Section):
    """The content of known_backbones.yaml."""

    families: dict[str, Expected]
    backbones: tuple[KnownBackbone, ...]


@cache
def known() -> Known:
    """Read known_backbones.yaml."""
    return validate(Known, read_yaml(FILE))


def expected_of(config: BackboneConfig, backbone: Backbone) -> tuple[str | None, Expected]:
    """The family of a loaded backbone, and the values that it should have; None and no values where it is not known.

    A hub id in the list has its entry; OpenAI's tags and files, and towers of SigLIP's form, have their family's values.
    """
    for entry in known().backbones:
        if entry.id == config.name.partition("@")[0]:
            own = {name: value for name in Expected.model_fields if (value := getattr(entry, name)) is not None}
            return entry.family, known().families[entry.family].model_copy(update=own)
    weights = Path(config.pretrained or "")
    if config.pretrained == "openai" or (weights.is_file() and is_torchscript(weights)):
        family = "openai-clip"
    elif isinstance(backbone.image, TimmModel) and getattr(backbone.image.trunk, "attn_pool", None) is not None:
        family = "siglip"
    else:
        return None, Expected()
    return family, known().families[family]
