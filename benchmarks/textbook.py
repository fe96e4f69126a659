"""The plain textbook path that speed is compared with, written from the equations.

The image tower runs in every step, every prompt is padded to the full context length, classes go through the text tower one at a
time (in CoCoOp images too), and each epoch of each run decodes and augments its images again. Nothing is kept for another run.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from vipbench.harness.methods.base import Method
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.prompts import PromptBatch, context_prompt


def plain_logits(method: Method, backbone: Backbone) -> Callable[[Tensor], Tensor]:
    """Logits of pixels with the method's own parameters, by the equations, one class (and for CoCoOp one image) at a time."""
    tower: Any = backbone.text
    values = method.trainable()
    classes, symptoms = method.task.classes, method.task.symptoms
    length = values["context"].shape[1] if values else 0

    def encode(texts: list[str], context: Tensor | None) -> Tensor:
        prompts = PromptBatch(tower, [context_prompt(tower, text, length) for text in texts], texts)
        filled = prompts.embeddings if context is None else prompts.fill(context).embeddings
        x = tower.embed(torch.zeros(len(texts), tower.context_length, dtype=torch.long, device=tower.device)).clone()
        x[:, : filled.shape[1]] = filled
        x = tower.ln_final(tower.transformer(x + tower.positional_embedding, attn_mask=tower.attn_mask))
        ends = (prompts.lengths - 1).to(tower.device)
        return x[torch.arange(len(x), device=tower.device), ends] @ tower.text_projection

    def vip(images: Tensor) -> Tensor:
        merged = []
        for place, texts in enumerate(symptoms or []):
            features = encode(texts, values["context"])
            query = values["merge.to_query.weight"] @ values["merge.queries"][place]
            weights = (features @ values["merge.to_key.weight"].T @ query / math.sqrt(len(query))).softmax(dim=0)
            merged.append(values["merge.queries"][place] + weights @ features)
        return backbone.logit_scale * images @ F.normalize(torch.stack(merged), dim=-1).T

    def coop(images: Tensor) -> Tensor:
        features = torch.cat([encode([name], values.get("context")) for name in classes])
        return backbone.logit_scale * images @ F.normalize(features, dim=-1).T

    def cocoop(images: Tensor) -> Tensor:
        logits = []
        for image in images:
            hidden = F.relu(values["meta_net.0.weight"] @ image + values["meta_net.0.bias"])
            shift = values["meta_net.2.weight"] @ hidden + values["meta_net.2.bias"]
            features = torch.cat([encode([name], values["context"] + shift) for name in classes])
            logits.append(backbone.logit_scale * F.normalize(features, dim=-1) @ image)
        return torch.stack(logits)

    of_images = {"vip": vip, "coop": coop, "cocoop": cocoop, "zero_shot": coop}[method.config.name]
    return lambda pixels: of_images(backbone.encode_images(pixels))


def train_epoch(
    logits: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    files: Sequence[tuple[bytes, int]],
    backbone: Backbone,
    batch: int,
) -> None:
    """One epoch over (image file, label) pairs: decode, random resized crop, flip, forward, backward, step."""
    augment = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(backbone.image_size, scale=(0.08, 1), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(backbone.mean), list(backbone.std)),
        ]
    )
    order, device = torch.randperm(len(files)).tolist(), backbone.text.device
    for first in range(0, len(files), batch):
        chosen = [files[place] for place in order[first : first + batch]]
        pixels = torch.stack([augment(Image.open(io.BytesIO(data)).convert("RGB")) for data, _ in chosen])
        labels = torch.tensor([label for _, label in chosen])
        optimizer.zero_grad()
        F.cross_entropy(logits(pixels.to(device)), labels.to(device)).backward()
        optimizer.step()


@torch.no_grad()
def test(
    logits: Callable[[Tensor], Tensor], files: Sequence[tuple[bytes, int]], backbone: Backbone, batch: int
) -> float:
    """Accuracy on (image file, label) pairs with the model's own preprocessing."""
    right, device = 0, backbone.text.device
    for first in range(0, len(files), batch):
        chosen = files[first : first + batch]
        pixels = torch.stack(
            [backbone.eval_transform(Image.open(io.BytesIO(data)).convert("RGB")) for data, _ in chosen]
        )
        labels = torch.tensor([label for _, label in chosen])
        right += int((logits(pixels.to(device)).argmax(1).cpu() == labels).sum())
    return right / len(files)
