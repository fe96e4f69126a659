"""Methods that change the towers once more, plainly, on copies of the open_clip model itself, with prompts of full length.

Nothing here uses harness/ or baselines/.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.plain import cross_entropy, unit, words

Masks = Callable[[int, int, int, int], Tensor]  # (number, maps, length, width) -> [maps, B, length, width], 0 or 1
GOLDEN, FIRST, SECOND = (np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def split_keys(keys: Any, count: int) -> Any:
    """SplitMix64 of keys [...] uint64: [..., count]."""
    with np.errstate(over="ignore"):
        x = np.asarray(keys, np.uint64)[..., None] + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
        x = (x ^ (x >> np.uint64(30))) * FIRST
        x = (x ^ (x >> np.uint64(27))) * SECOND
        return x ^ (x >> np.uint64(31))


def masks_by_key(keys: Tensor, rate: float) -> Masks:
    """Masks of a tower whose rows (samples, prompts) have these keys [B]: 21 bits of one hash for each map."""

    def masks(number: int, maps: int, length: int, width: int) -> Tensor:
        tokens = split_keys(keys.numpy().view(np.uint64), length) + np.uint64(number)
        hashes = split_keys(tokens, width)
        parts = [(hashes >> np.uint64(21 * place)) % np.uint64(2**21) for place in range(maps)]
        return torch.from_numpy(np.stack([part >= np.uint64(rate * 2**21) for part in parts])).float()

    return masks


def low_rank(x: Tensor, a: Tensor, b: Tensor, scaling: float, masks: Tensor | None, rate: float) -> Tensor:
    """Updates of the maps of x [B, L, w], one map after the other: [B, L, n * outputs]."""
    parts = []
    for place in range(len(a)):
        inputs = x if masks is None else x * masks[place] / (1 - rate)
        parts.append(inputs @ (scaling * b[place] @ a[place]).T)
    return torch.cat(parts, dim=-1)


class Attention(nn.Module):
    """`nn.MultiheadAttention` with an update of its queries, keys and values, head by head."""

    def __init__(self, attention: nn.MultiheadAttention, update: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attention, self.update = attention, update

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: Any) -> tuple[Tensor, None]:
        qkv = x @ self.attention.in_proj_weight.T + self.attention.in_proj_bias + self.update(x)
        q, k, v = qkv.chunk(3, dim=-1)
        size, heads = x.shape[-1] // self.attention.num_heads, []
        for first in range(0, x.shape[-1], size):
            part = slice(first, first + size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
            scores = scores if attn_mask is None else scores + attn_mask
            heads.append(scores.softmax(-1) @ v[..., part])
        return self.attention.out_proj(torch.cat(heads, dim=-1)), None


def add_updates(
    tower: nn.Module, matrices: Sequence[tuple[Tensor, Tensor]], scaling: float, masks: Masks | None, rate: float
) -> None:
    """Change a copy of a tower in place: its attentions, in order, get the updates given by (a, b)."""
    modules = [
        (parent, name, child)
        for parent in list(tower.modules())
        for name, child in parent.named_children()
        if isinstance(child, nn.MultiheadAttention) or name in ("qkv", "query", "key", "value")
    ]
    assert len(modules) == len(matrices)
    for number, ((parent, name, child), (a, b)) in enumerate(zip(modules, matrices, strict=True)):

        def update(x: Tensor, number: int = number, a: Tensor = a, b: Tensor = b) -> Tensor:
            drawn = None if masks is None else masks(number, len(a), x.shape[1], x.shape[2])
            return low_rank(x, a, b, scaling, drawn, rate)

        if isinstance(child, nn.MultiheadAttention):
            setattr(parent, name, Attention(child, update))
        else:
            child.register_forward_hook(lambda _, inputs, output, update=update: output + update(inputs[0]))


def clip_lora(
    model: Any,
    tokenizer: Any,
    pixels: Tensor,
    texts: list[str],
    image: Sequence[tuple[Tensor, Tensor]],
    text: Sequence[tuple[Tensor, Tensor]],
    scaling: float,
    rate: float = 0.0,
    image_masks: Masks | None = None,
    text_masks: Masks | None = None,
) -> Tensor:
    """CLIP-LoRA: logits [B, C] by open_clip's own forward pass, with W + scaling B A for W."""
    model = copy.deepcopy(model).eval()
    add_updates(model.visual, image, scaling, image_masks, rate)
    add_updates(model.text if hasattr(model, "text") else model.transformer, text, scaling, text_masks, rate)
    images, classes = model.encode_image(pixels, normalize=True), model.encode_text(tokenizer(texts), normalize=True)
    return 100.0 * images @ classes.T


LEARNED_MAPS = {  # weights of a block whose singular values CLIP-SVD learns: open_clip's blocks, timm's, BERT's
    "resblocks": ("mlp.c_fc.weight", "mlp.c_proj.weight", "attn.out_proj.weight", "attn.in_proj_weight"),
    "blocks": ("mlp.fc1.weight", "mlp.fc2.weight", "attn.qkv.weight", "attn.proj.weight"),
    "layer": (
        "output.dense.weight",
        "intermediate.dense.weight",
        "attention.output.dense.weight",
        "attention.self.query.weight",
        "attention.self.key.weight",
        "attention.self.value.weight",
    ),
}


def learned_maps(model: Any, tower: str) -> list[str]:
    """Names of those weights in a model's "image" or "text" tower, block by block."""
    found: list[str] = []
    names = [name for name, _ in model.named_parameters() if name.startswith("visual.") == (tower == "image")]
    for blocks, own in LEARNED_MAPS.items():
        for number in range(100):
            prefixes = {name.partition(f".{blocks}.{number}.")[0] for name in names if f".{blocks}.{number}." in name}
            found += [f"{prefix}.{blocks}.{number}.{name}" for prefix in prefixes for name in own]
    return found


def clip_svd(model: Any, tokenizer: Any, pixels: Tensor, texts: list[str], values: dict[str, Tensor]) -> Tensor:
    """CLIP-SVD: logits [B, C] by open_clip's own forward pass, with U diag(s) V^T for W, third by third where W is of q, k and v.

    Args:
        values: [n, r] by the name of a weight [n * outputs, inputs].
    """
    weights = {}
    for name, own in values.items():
        thirds = []
        for part, singular in zip(model.get_parameter(name).detach().chunk(len(own)), own, strict=True):
            u, _, v = torch.linalg.svd(part, full_matrices=False)
            thirds.append(u @ torch.diag(singular) @ v)
        weights[name] = torch.cat(thirds)
    images, classes, scale = torch.func.functional_call(model, weights, (pixels, tokenizer(texts)))[:3]
    return scale * images @ classes.T


def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    state: dict[int, tuple[Tensor, Tensor]],
    step: int,
    **given: Any,
) -> None:
    """One step of AdamW (arXiv 1711.05101, algorithm 2), in place; `step` counts from 1, `given` has lr, decay and eps."""
    for place, (value, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        first, second = state.get(place, (torch.zeros_like(value), torch.zeros_like(value)))
        state[place] = first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + given["eps"])
        with torch.no_grad():
            value.mul_(1 - given["lr"] * given["decay"]).sub_(given["lr"] * update)


def maple(
    model: Any,
    tokenizer: Any,
    pixels: Tensor,
    classes: list[str],
    text_prompts: Sequence[Tensor],
    image_prompts: Sequence[Tensor],
) -> Tensor:
    """MaPLe: logits [B, C]; J text prompts [M, w] and J image prompts [M, v]. "a photo" is learned, "of a" is not."""
    fixed = words(model, tokenizer, "a photo of a")[len(text_prompts[0]) :]
    images, features = _image(model.visual, pixels, image_prompts), []
    for name in classes:
        body = torch.cat([text_prompts[0], fixed, words(model, tokenizer, f"{name}.")])
        features.append(unit(_text(model, tokenizer, body, text_prompts[1:])))
    return model.logit_scale.exp() * torch.stack([unit(image) for image in images]) @ torch.stack(features).T


def vpt(model: Any, tokenizer: Any, pixels: Tensor, classes: list[str], image_prompts: Sequence[Tensor]) -> Tensor:
    """VPT: logits [B, C]; J image prompts [M, v]."""
    texts = [_text(model, tokenizer, words(model, tokenizer, f"a photo of a {name}."), ()) for name in classes]
    images = _image(model.visual, pixels, image_prompts)
    return (
        model.logit_scale.exp() * torch.stack([unit(image) for image in images]) @ torch.stack(list(map(unit, texts))).T
    )


def promptsrc(
    model: Any,
    tokenizer: Any,
    pixels: Tensor,
    labels: Tensor,
    classes: list[str],
    text_prompts: Sequence[Tensor],
    image_prompts: Sequence[Tensor],
    templates: Sequence[str],
    weights: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """PromptSRC: logits [B, C] and the loss; weights are those of the losses on text and image features."""
    scale, learned, frozen = model.logit_scale.exp(), [], []
    for name in classes:
        body = torch.cat([text_prompts[0], words(model, tokenizer, f"{name}.")])
        learned.append(unit(_text(model, tokenizer, body, text_prompts[1:])))
        own = [_text(model, tokenizer, words(model, tokenizer, text.replace("{}", name)), ()) for text in templates]
        frozen.append(unit(sum(own[1:], start=own[0]) / len(own)).detach())
    images = [unit(image) for image in _image(model.visual, pixels, image_prompts)]
    originals = [unit(image) for image in model.encode_image(pixels).detach()]
    logits = scale * torch.stack(images) @ torch.stack(learned).T
    text = sum((one - other).abs().sum() for one, other in zip(learned, frozen, strict=True))
    image = sum((one - other).abs().sum() for one, other in zip(images, originals, strict=True))
    divergence: Tensor | float = 0.0
    for row, original in zip(logits, originals, strict=True):
        p, q = (scale * torch.stack(frozen) @ original).softmax(-1).detach(), row.softmax(-1)
        divergence = divergence + (p * (p.log() - q.log())).sum()
    numbers = learned[0].numel()
    regular = weights[0] * text / (len(classes) * numbers) + weights[1] * image / (len(images) * numbers)
    return logits, cross_entropy(list(logits), labels) + regular + divergence / logits.numel()


def gaussian_mean(epochs: Sequence[Tensor], mean: float, deviation: float) -> Tensor:
    """The mean of what stood after each epoch, weighed by a normal density of the epoch's number."""
    densities = [math.exp(-((number + 1 - mean) ** 2) / (2 * deviation**2)) for number in range(len(epochs))]
    return torch.stack(
        [density / sum(densities) * values for density, values in zip(densities, epochs, strict=True)]
    ).sum(0)


def _image(visual: Any, pixels: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        x, norm, blocks = trunk._pos_embed(trunk.patch_embed(pixels)), trunk.norm_pre, trunk.blocks
    else:
        patches = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(pixels), 1, -1), patches], 1) + visual.positional_embedding
        norm, blocks = visual.ln_pre, visual.transformer.resblocks
    tokens = x.shape[1]
    x = norm(torch.cat([x, prompts[0].expand(len(x), -1, -1)], dim=1))
    for number, block in enumerate(blocks):
        if 0 < number < len(prompts):
            x = torch.cat([x[:, :tokens], prompts[number].expand(len(x), -1, -1)], dim=1)
        x = block(x)
    if trunk is not None:
        return visual.head(trunk.forward_head(trunk.norm(x)))
    return visual.ln_post(x)[:, 0] @ visual.proj


def _text(model: Any, tokenizer: Any, body: Tensor, deep: Sequence[Tensor]) -> Tensor:
    """Text feature [d] of one prompt; deep[i] replaces the tokens after the start token before block i + 1."""

    def run(x: Tensor, blocks: Any, **settings: Any) -> Tensor:
        for number, block in enumerate(blocks):
            if 0 < number <= len(deep):
                vectors = deep[number - 1]
                x = torch.cat([x[:, :1], vectors[None], x[:, 1 + len(vectors) :]], dim=1)
            x = block(x, **settings)
        return x

    if not hasattr(tokenizer, "encode"):
        bert, tokens = model.text.transformer, tokenizer.tokenizer
        start, end = (
            bert.embeddings.word_embeddings(torch.tensor([one])) for one in (tokens.cls_token_id, tokens.sep_token_id)
        )
        x = run(bert.embeddings(inputs_embeds=torch.cat([start, body, end])[None]), bert.encoder.layer)
        return model.text.proj(x[:, 0])[0]
    text = model if hasattr(model, "token_embedding") else model.text
    ids = torch.zeros(text.context_length, dtype=torch.long)
    ids[0], ids[len(body) + 1] = tokenizer.sot_token_id, tokenizer.eot_token_id
    x = text.token_embedding(ids).clone()
    x[1 : len(body) + 1] = body
    x = run((x + text.positional_embedding)[None], text.transformer.resblocks, attn_mask=text.attn_mask)
    pool = model.text_pool_type if text is model else text.pool_type
    pooled = text.ln_final(x)[0, -1 if pool == "last" else len(body) + 1]
    return (
        text.text_projection(pooled) if isinstance(text.text_projection, nn.Linear) else pooled @ text.text_projection
    )
