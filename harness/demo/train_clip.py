"""Train the small CLIP of the embedded benchmark (a program; the training is harness/demo/clip_training.py).

    python -m vipbench.harness.demo.train_clip --steps 6000 --images 200000 --device cuda --out harness/demo/model

On one GPU with 16 cores that takes a few minutes; figures of the committed weights are in harness/demo/model/README.md.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from open_clip import CLIP

from vipbench.harness.demo.clip_training import MODEL, attribute_accuracy, draw_pool, fit, write_model


def main(
    out: Annotated[Path, typer.Option(help="folder for open_clip_config.json and open_clip_model.safetensors")],
    steps: int = 6000,
    images: Annotated[
        int, typer.Option(help="how many to draw; they are seen many times, each time cropped anew")
    ] = 200_000,
    batch_size: int = 1024,
    lr: float = 1e-3,
    workers: int = 2,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Draw, train, write the model and print its accuracy by attribute."""
    torch.manual_seed(seed)
    pixels, facts = draw_pool(images, workers, seed)
    model = CLIP(**MODEL).to(device)
    fit(model, pixels, facts, steps, batch_size, lr, workers, seed)
    write_model(model, out)
    typer.echo(json.dumps(attribute_accuracy(model, seed), indent=2))


if __name__ == "__main__":
    typer.run(main)
