"""One training step from the feature bank against the plain textbook path, as ratios measured in one run.

    python benchmarks/training_step.py [--steps 5] [--out training_step.json]

The plain path is written here from the equations: the image tower runs in every step, every prompt is padded to the full context
length, and classes go through the text tower one at a time. ViT-B-16 with random weights, 2 classes of 4 symptoms, fp32; batch
32 for CoOp and ViP, 8 for CoCoOp. Both paths do forward, backward and an SGD step; times are medians.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from harness.backbone import Backbone, load_backbone
from harness.config import BackboneConfig
from harness.files import write_json
from harness.method import Method, Task, method_class
from harness.prompts import PromptBatch, context_prompt
from harness.provenance import machine, versions

CLASSES = ["melanoma", "nevus"]
SYMPTOMS = [
    [
        "asymmetric shape with a jagged border",
        "several shades of brown and black",
        "a blue-white veil",
        "uneven dots and streaks",
    ],
    ["round symmetric shape", "one even shade of brown", "smooth well defined border", "regular net of brown lines"],
]
BATCH = {"coop": 32, "vip": 32, "cocoop": 8}


def main(
    steps: Annotated[int, typer.Option(help="timed steps of the plain path")] = 5, out: Path | None = None
) -> None:
    """Measure and print ratios."""
    torch.manual_seed(0)
    backbone = load_backbone(BackboneConfig(name="ViT-B-16"))
    rows: list[dict[str, Any]] = []
    for name, batch in BATCH.items():
        cls = method_class(name)
        method = cls(cls.Config(name=name), Task(CLASSES, SYMPTOMS), backbone).train()
        pixels, labels = torch.randn(batch, 3, backbone.image_size, backbone.image_size), torch.randint(2, (batch,))
        with torch.no_grad():
            features = backbone.encode_images(pixels)
        parameters = list(method.trainable().values())
        optimizer = torch.optim.SGD(parameters, 0.002, momentum=0.9, weight_decay=5e-4)

        def step(logits: Callable[[], Tensor], labels: Tensor = labels, optimizer: torch.optim.SGD = optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(logits(), labels).backward()
            optimizer.step()

        plain = plain_logits(method, backbone)
        with torch.no_grad():
            assert (plain(pixels) - method(features)).abs().max() < 1e-3, "both paths compute the same"
        ours_seconds = median(lambda: step(lambda: method(features)), 4 * steps)  # noqa: B023 - called at once
        plain_seconds = median(lambda: step(lambda: plain(pixels)), steps)  # noqa: B023
        rows.append({"method": name, "batch": batch, "plain_s": plain_seconds, "ours_s": ours_seconds})
        rows[-1]["ratio"] = plain_seconds / ours_seconds
    show(rows)
    if out:
        write_json(
            out, {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions(), "rows": rows}
        )
        typer.echo(f"written: {out}")


def plain_logits(method: Method, backbone: Backbone) -> Callable[[Tensor], Tensor]:
    """Logits of pixels with the method's own parameters, by the equations, one class (and for CoCoOp one image) at a time."""
    tower: Any = backbone.text
    values = method.trainable()
    length = values["context"].shape[1]

    def encode(texts: list[str], context: Tensor) -> Tensor:
        prompts = PromptBatch(tower, [context_prompt(tower, text, length) for text in texts], texts)
        filled = prompts.fill(context).embeddings
        x = tower.embed(torch.zeros(len(texts), tower.context_length, dtype=torch.long)).clone()
        x[:, : filled.shape[1]] = filled
        x = tower.ln_final(tower.transformer(x + tower.positional_embedding, attn_mask=tower.attn_mask))
        return x[torch.arange(len(x)), prompts.lengths - 1] @ tower.text_projection

    def vip(images: Tensor) -> Tensor:
        merged = []
        for place, texts in enumerate(SYMPTOMS):
            features = encode(texts, values["context"])
            query = values["merge.to_query.weight"] @ values["merge.queries"][place]
            weights = (features @ values["merge.to_key.weight"].T @ query / math.sqrt(len(query))).softmax(dim=0)
            merged.append(values["merge.queries"][place] + weights @ features)
        return backbone.logit_scale * images @ F.normalize(torch.stack(merged), dim=-1).T

    def coop(images: Tensor) -> Tensor:
        features = torch.cat([encode([name], values["context"]) for name in CLASSES])
        return backbone.logit_scale * images @ F.normalize(features, dim=-1).T

    def cocoop(images: Tensor) -> Tensor:
        logits = []
        for image in images:
            hidden = F.relu(values["meta_net.0.weight"] @ image + values["meta_net.0.bias"])
            shift = values["meta_net.2.weight"] @ hidden + values["meta_net.2.bias"]
            features = torch.cat([encode([name], values["context"] + shift) for name in CLASSES])
            logits.append(backbone.logit_scale * F.normalize(features, dim=-1) @ image)
        return torch.stack(logits)

    of_images = {"vip": vip, "coop": coop, "cocoop": cocoop}[method.config.name]
    return lambda pixels: of_images(backbone.encode_images(pixels))


def median(run: Callable[[], None], repeats: int) -> float:
    """Median seconds of a call, after one that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    table = Table("method", "batch", "plain, s/step", "from the bank, s/step", "ratio")
    for row in rows:
        table.add_row(
            str(row["method"]),
            str(row["batch"]),
            f"{row['plain_s']:.3f}",
            f"{row['ours_s']:.4f}",
            f"{row['ratio']:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
