"""The methods once more, plainly: one prompt and one class at a time, from the papers' equations, on the open_clip model itself.

Every prompt is padded to the full context length. Nothing here uses harness/ or baselines/.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Encode = Callable[[Tensor, Tensor], Tensor]


def words(model: Any, tokenizer: Any, text: str) -> Tensor:
    """Token embeddings [n, w] of a text without start and end tokens."""
    if hasattr(tokenizer, "encode"):
        table = model.token_embedding if hasattr(model, "token_embedding") else model.text.token_embedding
        return table(torch.tensor(tokenizer.encode(text), dtype=torch.long))
    ids = tokenizer.tokenizer(text, add_special_tokens=False).input_ids
    return model.text.transformer.embeddings.word_embeddings(torch.tensor(ids, dtype=torch.long))


def encode(model: Any, tokenizer: Any, body: Tensor) -> Tensor:
    """Text feature [d] of one prompt whose body (context and words) is given as embeddings [n, w]."""
    if not hasattr(tokenizer, "encode"):
        return _encode_bert(model.text, tokenizer, body)
    text = model if hasattr(model, "token_embedding") else model.text
    ids = torch.zeros(text.context_length, dtype=torch.long)
    ids[0], ids[len(body) + 1] = tokenizer.sot_token_id, tokenizer.eot_token_id
    x = text.token_embedding(ids).clone()
    x[1 : len(body) + 1] = body
    x = (x + text.positional_embedding)[None]
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask))[0]
    pool = model.text_pool_type if text is model else text.pool_type
    pooled = x[-1] if pool == "last" else x[len(body) + 1]
    projection = text.text_projection
    return projection(pooled) if isinstance(projection, torch.nn.Linear) else pooled @ projection


def _encode_bert(text: Any, tokenizer: Any, body: Tensor) -> Tensor:
    table = text.transformer.embeddings.word_embeddings
    start, end = tokenizer.tokenizer.cls_token_id, tokenizer.tokenizer.sep_token_id
    x = torch.cat([table(torch.tensor([start])), body, table(torch.tensor([end]))])[None]
    mask = torch.ones(x.shape[:2], dtype=torch.long)
    return text.proj(text.pooler(text.transformer(inputs_embeds=x, attention_mask=mask), mask))[0]


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def body(model: Any, tokenizer: Any, context: Tensor, name: str, position: str) -> Tensor:
    """Context vectors [M, w] and a name, in CoOp's three orders, then a full stop."""
    name_part, stop = words(model, tokenizer, name), words(model, tokenizer, ".")
    if position == "end":
        return torch.cat([context, name_part, stop])
    if position == "front":
        return torch.cat([name_part, context, stop])
    half = len(context) // 2
    return torch.cat([context[:half], name_part, context[half:], stop])


def coop(
    model: Any, tokenizer: Any, image: Tensor, classes: list[str], contexts: list[Tensor], position: str
) -> Tensor:
    """CoOp: logits [C] of one image feature; `contexts` holds one [M, w] per class."""
    logits = []
    for name, context in zip(classes, contexts, strict=True):
        feature = encode(model, tokenizer, body(model, tokenizer, context, name, position))
        logits.append(model.logit_scale.exp() * unit(image) @ unit(feature))
    return torch.stack(logits)


def cocoop(
    model: Any, tokenizer: Any, image: Tensor, classes: list[str], context: Tensor, net: dict[str, Tensor]
) -> Tensor:
    """CoCoOp: logits [C] of one image feature; its meta-token is added to every context vector."""
    hidden = torch.clamp(net["w1"] @ unit(image) + net["b1"], min=0)
    shift = net["w2"] @ hidden + net["b2"]
    return coop(model, tokenizer, image, classes, [context + shift] * len(classes), "end")


def vip(
    model: Any,
    tokenizer: Any,
    image: Tensor,
    symptoms: list[list[str]],
    contexts: list[Tensor],
    merge: dict[str, Tensor] | None,
    position: str = "end",
) -> Tensor:
    """ViP: logits [C] of one image feature; `merge` holds t [C, d], wq and wk [d, d], or is None for the mean."""
    logits = []
    for index, (texts, context) in enumerate(zip(symptoms, contexts, strict=True)):
        values = [encode(model, tokenizer, body(model, tokenizer, context, text, position)) for text in texts]
        if merge is None:
            merged = torch.stack(values).sum(0) / len(values)
        else:
            query = merge["wq"] @ merge["t"][index]
            scores = [query @ (merge["wk"] @ value) / math.sqrt(len(query)) for value in values]
            exponents = [math.e**score for score in scores]
            weighted = [e / sum(exponents) * value for e, value in zip(exponents, values, strict=True)]
            merged = merge["t"][index] + torch.stack(weighted).sum(0)
        logits.append(model.logit_scale.exp() * unit(image) @ unit(merged))
    return torch.stack(logits)
