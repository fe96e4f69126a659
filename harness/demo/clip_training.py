"""Training of the embedded benchmark's small CLIP: drawn lesions with captions that speak of visual attributes only.

harness/demo/train_clip.py is the command. The images are drawn from `BROAD`, which is without classes, and from other random
numbers than the benchmark's.
"""

import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip import CLIP
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vipbench.harness.demo.attributes import BROAD, sample
from vipbench.harness.demo.captions import FACTS, WORDINGS, caption, fact_flags, facts_of
from vipbench.harness.demo.draw import SIZE, Scene, draw, generator
from vipbench.harness.system.files import atomic_path, write_json
from vipbench.harness.system.progress import Progress

ATTRIBUTES = (
    "symmetry",
    "border",
    "edge",
    "size",
    "colour",
    "dots",
    "streaks",
    "veil",
    "network",
    "surface",
    "vessels",
    "centre",
)
CHUNK = 500  # images that a process draws at a time
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "layers": 6, "width": 160, "head_width": 40, "patch_size": 8},
    "text_cfg": {"context_length": 64, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 4},
}
PREPROCESS: dict[str, Any] = {
    "size": SIZE,
    "mean": [0.75, 0.6, 0.53],
    "std": [0.2, 0.2, 0.2],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def draw_pool(count: int, workers: int, seed: int) -> tuple[Tensor, list[list[str]]]:
    """Draw lesions from the broad distribution: uint8 [N, 3, SIZE, SIZE], and the facts of each."""
    chunks = [(seed, first, min(CHUNK, count - first)) for first in range(0, count, CHUNK)]
    pixels, facts = [], []
    with (
        ProcessPoolExecutor(max(workers, 1), mp_context=get_context("spawn")) as pool,
        Progress("draw", count, "images") as progress,
    ):
        for part, part_facts in pool.map(draw_chunk, chunks):
            pixels.append(torch.from_numpy(part))
            facts += part_facts
            progress.advance(len(part))
    return torch.cat(pixels).permute(0, 3, 1, 2).contiguous(), facts


def draw_chunk(chunk: tuple[int, int, int]) -> tuple[np.ndarray, list[list[str]]]:
    """Images number `first` and on: uint8 [n, SIZE, SIZE, 3] and their facts."""
    seed, first, count = chunk
    images, facts = [], []
    for number in range(first, first + count):
        rng = generator("captioned", seed, number)
        lesion = sample(BROAD, rng)
        images.append(draw(lesion, Scene.sample(rng), rng))
        facts.append(facts_of(lesion))
    return np.stack(images), facts


class Captions(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Item t is the batch of step t: positions in the pool, tokens of fresh captions, and the facts that these state."""

    def __init__(self, facts: list[list[str]], batch_size: int, steps: int, seed: int) -> None:
        self.facts, self.batch_size, self.steps, self.seed = facts, batch_size, steps, seed
        self.tokenizer = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
        self.known: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.integers(len(self.facts), size=self.batch_size)
        tokens = np.zeros((self.batch_size, MODEL["text_cfg"]["context_length"]), dtype=np.int64)
        flags = np.zeros((self.batch_size, len(FACTS)), dtype=bool)
        for row, place in enumerate(chosen):
            pieces, stated = caption(self.facts[place], rng)
            ids = [token for piece in pieces for token in self._encode(piece)]
            ids = [self.tokenizer.sot_token_id, *ids, self.tokenizer.eot_token_id]
            tokens[row, : len(ids)] = ids
            flags[row] = fact_flags(stated)
        length = int((tokens != 0).any(0).nonzero()[0].max()) + 1
        return torch.from_numpy(chosen), torch.from_numpy(tokens[:, :length]), torch.from_numpy(flags)

    def _encode(self, piece: str) -> list[int]:
        if piece not in self.known:  # byte-pair encoding works word by word, so pieces can be encoded apart
            self.known[piece] = self.tokenizer.encode(piece)
        return self.known[piece]


def fit(
    model: CLIP, pixels: Tensor, facts: list[list[str]], steps: int, batch_size: int, lr: float, workers: int, seed: int
) -> None:
    """Train contrastively (AdamW, warm-up and cosine, bf16 on a GPU) in place.

    Captions are short, so one is often true of several images of a batch: all pairs that are true count as matches.
    """
    device = model.logit_scale.device
    pixels, true = pixels.to(device), torch.from_numpy(np.stack([fact_flags(each) for each in facts])).to(device)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.98))
    warm_up = max(1, min(500, steps // 10))
    batches = DataLoader(
        Captions(facts, batch_size, steps, seed), batch_size=None, num_workers=workers if steps > 10 else 0
    )
    with Progress("train", steps, "steps") as progress:
        for step, (chosen, tokens, stated) in enumerate(batches):
            rate = lr * min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            chosen, tokens, stated = chosen.to(device), tokens.to(device), stated.to(device)
            matches = stated.float() @ (~true[chosen]).float().T == 0  # [captions, images]: nothing stated is untrue
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                image = F.normalize(model.visual(normalise(crop(pixels[chosen]))).float(), dim=-1)
                text = F.normalize(encode_text(model, tokens).float(), dim=-1)
            logits = model.logit_scale.exp().clamp(max=50) * text.float() @ image.float().T
            loss = (contrast(logits, matches) + contrast(logits.T, matches.T)) / 2
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            note = f"loss {loss.item():.3f}" if step % 20 == 0 else None
            progress.advance(note=note)


def contrast(logits: Tensor, matches: Tensor) -> Tensor:
    """Cross-entropy of each row against its matches, all counting the same."""
    target = matches / matches.sum(dim=1, keepdim=True)
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def encode_text(model: CLIP, tokens: Tensor) -> Tensor:
    """Text features [B, d] of tokens [B, L], L no longer than needed."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)] @ model.text_projection


def crop(pixels: Tensor) -> Tensor:
    """Random square crops of at least 60 % of the side, mirrored and turned by quarters: uint8 -> float32, same shape."""
    count, device = len(pixels), pixels.device
    scale = torch.empty(count, device=device).uniform_(0.6, 1.0)
    shift = (torch.rand(count, 2, device=device) * 2 - 1) * (1 - scale)[:, None]
    flip = torch.randint(2, (count,), device=device) * 2.0 - 1
    turn = torch.randint(4, (count,), device=device) * (math.pi / 2)
    cos, sin = turn.cos() * scale, turn.sin() * scale
    first = torch.stack([cos * flip, -sin, shift[:, 0]], dim=1)
    second = torch.stack([sin * flip, cos, shift[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), [count, 3, SIZE, SIZE], align_corners=False)
    return F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def normalise(pixels: Tensor) -> Tensor:
    """0..255 -> the model's input."""
    mean, std = (torch.tensor(PREPROCESS[name], device=pixels.device)[:, None, None] for name in ("mean", "std"))
    return (pixels / 255 - mean) / std


def write_model(model: CLIP, out: Path) -> None:
    """Write the model as a folder in the hub's layout, weights in half precision."""
    write_json(out / "open_clip_config.json", {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS})
    with atomic_path(out / "open_clip_model.safetensors") as temporary:
        state = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, temporary)


@torch.no_grad()
def attribute_accuracy(model: CLIP, seed: int, count: int = 1000) -> dict[str, float]:
    """The share of untrained images on which the right level of an attribute, by its first wording, scores highest."""
    model.eval()
    device = model.logit_scale.device
    pixels, facts = draw_chunk((seed + 1, 0, count))
    image = F.normalize(model.visual(normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device))), dim=-1)
    tokenizer = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
    result = {}
    for attribute in ATTRIBUTES:
        levels = [f"{attribute}={level}" for level in BROAD[attribute]]
        text = F.normalize(encode_text(model, tokenizer([WORDINGS[fact][0] for fact in levels]).to(device)), dim=-1)
        predicted = (image @ text.T).argmax(dim=1).tolist()
        result[attribute] = float(
            np.mean([levels[place] in each for place, each in zip(predicted, facts, strict=True)])
        )
    result["mean"] = float(np.mean(list(result.values())))
    return result
