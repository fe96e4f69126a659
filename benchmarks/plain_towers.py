"""Methods that train inside the towers, as one would write them in plain PyTorch on open_clip's model, for speed to compare with.

The model's blocks are called as they are. Prompts have the full context length, as open_clip's tokenizer gives them, or are cut
after the longest.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (pixels, labels) -> logits [B, C], loss
Values = Mapping[str, nn.Parameter]


class Plain:
    """The passes of both towers.

    Args:
        model, tokenizer: open_clip's CLIP. A method may change the model.
        cut: whether prompts end with the longest.
        recompute: whether the image tower's blocks are checkpointed.
    """

    def __init__(self, model: Any, tokenizer: Any, cut: bool, recompute: bool) -> None:
        self.model, self.tokenizer, self.cut, self.recompute = model, tokenizer, cut, recompute
        self.scale = model.logit_scale.detach().exp()

    def images(self, pixels: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
        """L2-normalised features [B, d]; prompts [M, w] enter before the blocks, each in the place of the one before."""
        visual = self.model.visual
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
        tokens = x.shape[1]
        for number, block in enumerate(visual.transformer.resblocks):
            if number < len(prompts):
                x = torch.cat([x[:, :tokens], prompts[number].expand(len(x), -1, -1)], dim=1)
            if number == 0:
                x = visual.ln_pre(x)
            recompute = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)

    def texts(self, texts: Sequence[str], prompts: Sequence[Tensor] = ()) -> Tensor:
        """L2-normalised features [C, d]; prompts [M, w] take the place of the words after the start token, block by block."""
        model, ids = self.model, self.tokenizer(list(texts)).to(self.scale.device)
        ends = ids.argmax(dim=-1)
        ids = ids[:, : int(ends.max()) + 1] if self.cut else ids
        length = ids.shape[1]
        x, mask = model.token_embedding(ids), model.attn_mask[:length, :length]
        for number, block in enumerate(model.transformer.resblocks):
            if number < len(prompts):
                own = prompts[number].expand(len(x), -1, -1)
                x = torch.cat([x[:, :1], own, x[:, 1 + own.shape[1] :]], dim=1)
            if number == 0:
                x = x + model.positional_embedding[:length]
            x = block(x, attn_mask=mask)
        return F.normalize(model.ln_final(x)[torch.arange(len(x)), ends] @ model.text_projection, dim=-1)


def maple(plain: Plain, method: Any, values: Values) -> Loss:
    """MaPLe."""
    texts = [f"a photo of a {name}." for name in method.task.classes]
    deep = [values[f"deep.{place}"] for place in range(len(method.deep))]
    maps = ["project", *(f"project_deep.{place}" for place in range(len(deep)))]

    def loss(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        prompts = [values["context"][0], *deep]
        visual = [
            F.linear(own, values[f"{name}.weight"], values[f"{name}.bias"])
            for own, name in zip(prompts, maps, strict=True)
        ]
        return _cross_entropy(plain.scale * plain.images(pixels, visual) @ plain.texts(texts, prompts).T, labels)

    return loss


def vpt(plain: Plain, method: Any, values: Values) -> Loss:
    """VPT on fixed texts."""
    with torch.no_grad():
        classes = plain.texts([f"a photo of a {name}." for name in method.task.classes])

    def loss(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return _cross_entropy(plain.scale * plain.images(pixels, list(values.values())) @ classes.T, labels)

    return loss


def promptsrc(plain: Plain, method: Any, values: Values) -> Loss:
    """PromptSRC, with the method's frozen text features."""
    texts, config = [f"a photo of a {name}." for name in method.task.classes], method.config
    deep = [values[f"deep.{place}"] for place in range(len(method.deep))]
    visual = [values[f"visual.{place}"] for place in range(len(method.visual))]

    def loss(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, classes = plain.images(pixels, visual), plain.texts(texts, [values["context"][0], *deep])
        logits = plain.scale * images @ classes.T
        with torch.no_grad():
            frozen = plain.images(pixels)
            teacher = (plain.scale * frozen @ method.anchors.T).log_softmax(dim=-1)
        total = F.cross_entropy(logits, labels) + config.text_weight * (classes - method.anchors).abs().mean()
        total = total + config.image_weight * (images - frozen).abs().mean()
        return logits, total + F.kl_div(logits.log_softmax(dim=-1), teacher, reduction="mean", log_target=True)

    return loss


def clip_lora(plain: Plain, method: Any, values: Values) -> Loss:
    """CLIP-LoRA: each attention with matrices for queries, keys and values, dropout before each."""
    for side, tower in (("image", plain.model.visual), ("text", plain.model)):
        for number, block in enumerate(tower.transformer.resblocks):
            a, b = values[f"lora.{side}.{number}.a"], values[f"lora.{side}.{number}.b"]
            block.attn = LoraAttention(block.attn, a, b, method.config.alpha / method.config.rank**0.5, method)
    texts = [f"a photo of a {name}." for name in method.task.classes]

    def loss(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return _cross_entropy(100.0 * plain.images(pixels) @ plain.texts(texts).T, labels)

    return loss


class LoraAttention(nn.Module):
    """An attention of open_clip with low-rank updates a [3, r, w], b [3, w, r]."""

    def __init__(self, attention: nn.MultiheadAttention, a: Tensor, b: Tensor, scaling: float, method: Any) -> None:
        super().__init__()
        self.attention, self.a, self.b, self.scaling, self.method = attention, a, b, scaling, [method]

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: Any) -> tuple[Tensor, None]:
        rate, training = self.method[0].config.dropout, self.method[0].training
        updates = [F.linear(F.linear(F.dropout(x, rate, training), a), b) for a, b in zip(self.a, self.b, strict=True)]
        qkv = F.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias)
        qkv = qkv + self.scaling * torch.cat(updates, dim=-1)
        return self.attention.out_proj(_attend(qkv, self.attention.num_heads, attn_mask)), None


def clip_svd(plain: Plain, method: Any, values: Values) -> Loss:
    """CLIP-SVD: weights are put together from their singular vectors in each pass."""
    for side, tower in (("image", plain.model.visual), ("text", plain.model)):
        places = [place for block in tower.transformer.resblocks for place in _linear_maps(block)]
        for number, (parent, name) in enumerate(places):
            own = method.singular[side][number]
            singular = SingularMap(getattr(parent, name), own.u, values[f"singular.{side}.{number}.values"], own.v)
            setattr(parent, name, singular)
    texts = [f"a photo of a {name}." for name in method.task.classes]

    def loss(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return _cross_entropy(plain.scale * plain.images(pixels) @ plain.texts(texts).T, labels)

    return loss


class SingularMap(nn.Module):
    """A linear map, or an attention of open_clip, whose weight is U diag(s) V^T."""

    def __init__(self, module: Any, u: Tensor, s: Tensor, v: Tensor) -> None:
        super().__init__()
        self.module, self.u, self.s, self.v = module, u, s, v

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: Any) -> Any:
        weight = ((self.u * self.s[:, None]) @ self.v).flatten(0, 1)
        if isinstance(self.module, nn.Linear):
            return F.linear(x, weight, self.module.bias)
        qkv = F.linear(x, weight, self.module.in_proj_bias)
        return self.module.out_proj(_attend(qkv, self.module.num_heads, attn_mask)), None


def finetune(plain: Plain, method: Any, values: Values) -> Loss:
    """A linear head on the image tower, of which some weights are trained."""
    visual = copy.deepcopy(plain.model.visual)
    for name, value in values.items():
        path, _, own = name.removeprefix("tower.").rpartition(".")
        if name.startswith("tower."):
            setattr(visual.get_submodule(path), own, value)

    def loss(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return _cross_entropy(F.linear(visual(pixels), values["head.weight"], values["head.bias"]), labels)

    return loss


PLAIN: dict[str, Callable[[Plain, Any, Values], Loss]] = {
    function.__name__: function for function in (maple, vpt, promptsrc, clip_lora, clip_svd, finetune)
}


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits, F.cross_entropy(logits, labels)


def _attend(qkv: Tensor, heads: int, attn_mask: Tensor | None) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).flatten(2)


def _linear_maps(block: nn.Module) -> list[tuple[Any, str]]:
    """The maps of a block in the order in which the method decomposes them."""
    return [
        (parent, name)
        for parent in reversed(list(block.modules()))
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear | nn.MultiheadAttention)
    ]
