"""Shards as others write them, and the verb that indexes them."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tests.data.drawn_images import drawn
from vipbench.harness.cli import app


def picture(key: str, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    drawn(key).save(buffer, format, **options)
    return buffer.getvalue()


def png(key: str) -> bytes:
    return picture(key, "PNG")


def write(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """Write a tar of members KEY.EXTENSION, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def samples(name: str, count: int = 4, label: str = "cls") -> dict[str, dict[str, bytes]]:
    text = {"cls": lambda n: str(n % 2).encode(), "txt": lambda n: [b"nevus", b"melanoma\n"][n % 2]}
    text["json"] = lambda n: json.dumps(
        {"label": n % 2, "class": ["nevus", "melanoma"][n % 2], "patient": f"{name}{n}"}
    ).encode()
    return {f"{name}{n:03d}": {"jpg": picture(f"{name}{n}"), label: text[label](n)} for n in range(count)}


def index(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["index", *arguments])


def inspect(folder: Path) -> Any:
    return CliRunner().invoke(app, ["inspect", str(folder)])
