"""What the verbs of `vipbench symptoms` have in common: options, and how they are read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from harness.backbone import Backbone

BackboneName = Annotated[str | None, typer.Option("--backbone", help="an open_clip name, hf-hub: id, folder or JSON")]
Pretrained = Annotated[str | None, typer.Option(help="the backbone's weights: an open_clip tag or a file")]
Out = Annotated[Path, typer.Option(help="the symptom set to write")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the file at --out")]


def class_names(data: Path | None, classes: str | None) -> list[str] | None:
    """The classes of a prepared dataset, or those listed as a CSV line; None when neither is given."""
    from harness.data.info import DatasetInfo
    from harness.data.names import listed_classes
    from harness.errors import UserError

    if data and classes:
        raise UserError("--data and --classes: give one of them")
    if data:
        return DatasetInfo.load(data).classes
    return listed_classes(classes, None)


def load(name: str, pretrained: str | None, device: str = "auto") -> "Backbone":
    """The backbone that the options name; "auto" is a GPU where there is one."""
    import torch

    from harness.backbone import load_backbone
    from harness.config import BackboneConfig

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return load_backbone(BackboneConfig(name=name, pretrained=pretrained), device)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """A symptom set may be somebody's work, so it is not replaced unasked."""
    from harness.errors import UserError

    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; give --overwrite to replace it, or another --out")
