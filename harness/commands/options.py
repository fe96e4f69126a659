"""Options that several verbs share: declare, read and check them."""

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.keys import KEY_ADVICE, KEY_VARIABLE
from vipbench.harness.system.files import output_errors

if TYPE_CHECKING:
    from vipbench.harness.models.backbone import Backbone

BackboneName = Annotated[str | None, typer.Option("--backbone", help="an open_clip name, hf-hub: id, folder or JSON")]
Pretrained = Annotated[str | None, typer.Option(help="the backbone's weights: an open_clip tag or a file")]
Out = Annotated[Path, typer.Option(help="the symptom set to write")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the file at --out")]

# Of the verbs that ask an LLM.
Url = Annotated[list[str] | None, typer.Option(help="an OpenAI-compatible server's base URL; several share the work")]
Serve = Annotated[str | None, typer.Option(help="or a model to serve with vLLM for this job")]
Model = Annotated[str | None, typer.Option(help="the model's name on the server")]
Cache = Annotated[Path, typer.Option(help="the record of answers, an SQLite file")]
Temperature = Annotated[float, typer.Option(min=0, help="of the sampling")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="of the sampling")]
MaxTokens = Annotated[int, typer.Option(min=1, help="the most tokens in an answer")]
Synonyms = Annotated[Path | None, typer.Option(help='other names of classes: {"class": ["name", ...]}')]
Presets = Annotated[Path | None, typer.Option(help="a YAML file with modalities of your own")]
Gpus = Annotated[int | None, typer.Option(min=1, help="for --serve")]
TensorParallel = Annotated[int, typer.Option(min=1, help="for --serve: GPUs that one copy is spread over")]

# Of the verbs that encode images.
BatchSize = Annotated[int, typer.Option(min=1, help="images at a time")]
Workers = Annotated[int, typer.Option(min=0, help="processes that decode images")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]

Rename = Annotated[
    list[str] | None, typer.Option("--rename", help='another name of a class, "OLD=NEW"; may be given several times')
]

Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="a Python file that registers a method; repeatable")
]
MovedPlugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", help="the run's plugin, where it lies elsewhere now; repeatable"),
]


def _refuse_key(value: str | None) -> None:
    if value is not None:
        raise UserError(f"--api-key: everybody on a machine can read command lines; {KEY_ADVICE}")


ApiKey = Annotated[str | None, typer.Option("--api-key", hidden=True, callback=_refuse_key)]
ApiKeyFile = Annotated[
    Path | None, typer.Option(help=f"a file that holds the server's API key; default: ${KEY_VARIABLE}, if set")
]


def class_names(data: str | None, classes: str | None) -> list[str] | None:
    """Read the classes of a prepared dataset (folder or URL) or of a CSV line; None when neither is given."""
    from vipbench.harness.data.info import DatasetInfo
    from vipbench.harness.data.names import listed_classes

    if data and classes:
        raise UserError("--data and --classes: give one of them")
    if data:
        return DatasetInfo.load(data).classes
    return listed_classes(classes, None)


def listed_names(text: str | None) -> tuple[str, ...] | None:
    """Split names at commas; one that holds a comma stands in quotes."""
    if text is None:
        return None
    return tuple(name.strip() for row in csv.reader([text], skipinitialspace=True) for name in row if name.strip())


def load(name: str, pretrained: str | None, device: str = "auto") -> "Backbone":
    """Load the backbone that the options name; "auto" is a GPU where there is one."""
    from vipbench.harness.config.schema import BackboneConfig
    from vipbench.harness.models.backbone import load_backbone  # imports torch
    from vipbench.harness.system.devices import choose_device

    chosen = choose_device(device, "--device")  # before any weights are read
    return load_backbone(BackboneConfig(name=name, pretrained=pretrained), chosen)


def check_output(path: Path, overwrite: bool = True) -> None:
    """Refuse, before the work begins, a file that cannot be written or that exists: it may be somebody's work.

    Raises:
        UserError: `path` is a folder, lies under a file or in a folder that cannot be written, or exists unless `overwrite`.
    """
    with output_errors(path):
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; give --overwrite to replace it, or another --out")
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        if not folder.is_dir():
            raise UserError(f"{path}: cannot be written: {folder} is a file, not a folder")
        if not os.access(folder, os.W_OK):
            raise UserError(f"{path}: cannot be written: {folder} is read-only")
