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
    sink: bool = False,
) -> Tensor:
    """ViP: logits [C] of one image feature; `merge` holds t [C, d], wq and wk [d, d], or is None for the mean.

    With a sink the softmax has one more exponent, exp(0).
    """
    logits = []
    for index, (texts, context) in enumerate(zip(symptoms, contexts, strict=True)):
        values = [encode(model, tokenizer, body(model, tokenizer, context, text, position)) for text in texts]
        if merge is None:
            merged = torch.stack(values).sum(0) / len(values)
        else:
            query = merge["wq"] @ merge["t"][index]
            scores = [query @ (merge["wk"] @ value) / math.sqrt(len(query)) for value in values]
            exponents = [math.e**score for score in scores]
            total = sum(exponents) + int(sink)
            weighted = [e / total * value for e, value in zip(exponents, values, strict=True)]
            merged = merge["t"][index] + torch.stack(weighted).sum(0)
        logits.append(model.logit_scale.exp() * unit(image) @ unit(merged))
    return torch.stack(logits)


def softmax(values: list[Tensor]) -> list[Tensor]:
    highest = max(float(value.detach()) for value in values)
    exponents = [(value - highest).exp() for value in values]
    return [exponent / sum(exponents) for exponent in exponents]


def cross_entropy(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Mean over images of -log p(label)."""
    losses = [-softmax(list(row))[int(label)].log() for row, label in zip(logits, labels, strict=True)]
    return sum(losses[1:], start=losses[0]) / len(losses)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second) / (first.norm() * second.norm())


def template_feature(model: Any, tokenizer: Any, name: str) -> Tensor:
    return unit(encode(model, tokenizer, words(model, tokenizer, f"a photo of a {name}.")))


def prompted(model: Any, tokenizer: Any, classes: list[str], context: Tensor) -> list[Tensor]:
    """CoOp's normalised class features; one context [M, w] for all classes."""
    return [unit(encode(model, tokenizer, body(model, tokenizer, context, name, "end"))) for name in classes]


def logits_of(model: Any, images: Tensor, features: list[Tensor]) -> list[Tensor]:
    """[C] logits of each image."""
    scale = model.logit_scale.exp()
    return [torch.stack([scale * unit(image) @ feature for feature in features]) for image in images]


def kgcoop(
    model: Any, tokenizer: Any, images: Tensor, labels: Tensor, classes: list[str], context: Tensor, weight: float
) -> Tensor:
    """KgCoOp's loss: cross-entropy + w (1 - mean cosine to the template's features)."""
    features = prompted(model, tokenizer, classes, context)
    cosines = [
        cosine(feature, template_feature(model, tokenizer, name))
        for feature, name in zip(features, classes, strict=True)
    ]
    return cross_entropy(logits_of(model, images, features), labels) + weight * (1 - sum(cosines) / len(cosines))


def prograd(
    model: Any, tokenizer: Any, images: Tensor, labels: Tensor, classes: list[str], context: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """ProGrad's two losses: cross-entropy, and T^2 times the soft cross-entropy with the zero-shot prediction."""
    student = logits_of(model, images, prompted(model, tokenizer, classes, context))
    teacher = logits_of(model, images, [template_feature(model, tokenizer, name) for name in classes])
    soft = []
    for own, other in zip(student, teacher, strict=True):
        target = softmax(list(other / temperature))
        soft += [
            -p.detach() * q.log() * temperature**2
            for p, q in zip(target, softmax(list(own / temperature)), strict=True)
        ]
    return cross_entropy(student, labels), sum(soft[1:], start=soft[0]) / len(images)


def projected(own: Tensor, general: Tensor, factor: float) -> Tensor:
    """g - lambda (g . b^) b^ where g . b < 0, else g; number by number."""
    g, b = own.flatten().tolist(), general.flatten().tolist()
    product, square = sum(x * y for x, y in zip(g, b, strict=True)), sum(y * y for y in b)
    if product >= 0:
        return own
    return torch.tensor([x - factor * product / square * y for x, y in zip(g, b, strict=True)]).view(own.shape)


def lower_median(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def kept_prompts(scores: list[float], tau: float) -> list[int]:
    """BiomedCoOp's selection, as published: (score - median) / MAD, standardised with Bessel's correction, |z| <= tau."""
    median = lower_median(scores)
    mad = lower_median([abs(score - median) for score in scores])
    z = [(score - median) / mad for score in scores]
    mean = sum(z) / len(z)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in z) / (len(z) - 1))
    return [place for place, value in enumerate(z) if abs((value - mean) / deviation) <= tau]


def biomedcoop(
    model: Any,
    tokenizer: Any,
    images: Tensor,
    labels: Tensor,
    classes: list[str],
    texts: list[list[str]],
    context: Tensor,
    weights: tuple[float, float],
    tau: float,
) -> Tensor:
    """BiomedCoOp's loss; every class has as many texts."""
    fixed = [[unit(encode(model, tokenizer, words(model, tokenizer, f"{text}."))) for text in own] for own in texts]
    learned = prompted(model, tokenizer, classes, context)
    scores = []
    for place in range(len(texts[0])):
        rows = logits_of(model, images, [own[place] for own in fixed])
        scores.append(sum(float(max(row)) for row in rows) / len(rows))
    kept = kept_prompts(scores, tau)
    teacher = [unit(sum(unit(own[place]) for place in kept) / len(kept)) for own in fixed]  # type: ignore[arg-type]
    target = [unit(sum(own) / len(own)) for own in fixed]  # type: ignore[arg-type]
    squares = [(one - other).square().sum() for one, other in zip(learned, target, strict=True)]
    mse = sum(squares) / (len(classes) * len(images[0]))
    student = logits_of(model, images, learned)
    divergence = []
    for own, other in zip(student, logits_of(model, images, teacher), strict=True):
        divergence += [p * (p.log() - q.log()) for p, q in zip(softmax(list(other)), softmax(list(own)), strict=True)]
    kl = sum(divergence) / (len(images) * len(classes))
    return cross_entropy(student, labels) + weights[0] * mse + weights[1] * kl


def tip_logits(image: Tensor, text: list[Tensor], keys: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """Tip-Adapter: logits [C] of one normalised image feature."""
    logits = []
    for label, feature in enumerate(text):
        cached = [
            math.exp(-beta * (1 - float(image @ key))) for key, own in zip(keys, labels, strict=True) if own == label
        ]
        logits.append(100 * float(image @ feature) + alpha * sum(cached))
    return torch.tensor(logits)


def tip_search(
    images: Tensor,
    expected: Tensor,
    text: list[Tensor],
    keys: Tensor,
    labels: Tensor,
    ends: tuple[float, float],
    steps: int,
) -> tuple[float, float]:
    """(beta, alpha) of best accuracy, the first of equal ones."""
    best, chosen = -1, (0.0, 0.0)
    for i in range(steps):
        for j in range(steps):
            beta, alpha = 0.1 + i * (ends[0] - 0.1) / steps, 0.1 + j * (ends[1] - 0.1) / steps
            rows = [tip_logits(image, text, keys, labels, alpha, beta) for image in images]
            correct = sum(int(row.argmax()) == int(label) for row, label in zip(rows, expected, strict=True))
            if correct > best:
                best, chosen = correct, (beta, alpha)
    return chosen


def penalised_loss(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, c: float) -> Tensor:
    """Logistic regression's objective: |W|^2 / 2 + C sum over samples of -log p(label)."""
    losses = [
        -softmax(list(weight @ row + bias))[int(label)].log() for row, label in zip(features, labels, strict=True)
    ]
    return weight.square().sum() / 2 + c * sum(losses[1:], start=losses[0])


def gda_logits(image: Tensor, text: list[Tensor], samples: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """GDA: logits [C] of one normalised image feature; samples [n, d] with their labels, each view a sample of its own."""
    rows, count, dim = samples.double(), len(samples), samples.shape[1]
    means = [sum(row for row, own in zip(rows, labels, strict=True) if own == label) for label in range(len(text))]
    means = [total / int((labels == label).sum()) for label, total in enumerate(means)]
    centred = torch.stack([row - means[int(own)] for row, own in zip(rows, labels, strict=True)])
    covariance = centred.T.cov()
    precision = dim * torch.linalg.inv((count - 1) * covariance + covariance.trace() * torch.eye(dim).double())
    logits = []
    for mean, feature in zip(means, text, strict=True):
        prior = math.log(1 / len(text))
        gaussian = image.double() @ precision @ mean + prior - mean @ precision @ mean / 2
        logits.append(100 * image.double() @ feature.double() + alpha * gaussian)
    return torch.stack(logits)


def raw_template_feature(model: Any, tokenizer: Any, name: str, templates: tuple[str, ...]) -> Tensor:
    """Mean over templates of un-normalised text features [d]."""
    texts = [template.replace("{}", name) for template in templates]
    return torch.stack([encode(model, tokenizer, words(model, tokenizer, text)) for text in texts]).sum(dim=0) / len(
        texts
    )


def clap_penalties(scale: float, views: Tensor, labels: Tensor, text: list[Tensor]) -> list[float]:
    """CLAP: mean zero-shot probability of each class on its own samples, over views [V, N, d]; nan for one without samples."""
    found: list[list[float]] = [[] for _ in text]
    for view in views:
        for row, label in zip(view, labels, strict=True):
            probabilities = softmax([scale * unit(row) @ unit(feature) for feature in text])
            found[int(label)].append(float(probabilities[int(label)]))
    return [sum(own) / len(own) if own else math.nan for own in found]


def clap(
    scale: float, images: Tensor, labels: Tensor, text: list[Tensor], weights: Tensor, penalties: list[float]
) -> Tensor:
    """CLAP's loss: cross-entropy of cosines to the weights [C, d] + mean over classes of lambda |w - t|^2."""
    logits = [torch.stack([scale * unit(image) @ unit(weight) for weight in weights]) for image in images]
    terms = [
        penalty * ((weight - feature) ** 2).sum()
        for penalty, weight, feature in zip(penalties, weights, text, strict=True)
    ]
    return cross_entropy(logits, labels) + sum(terms[1:], start=terms[0]) / len(terms)


def ss_text(scale: float, images: Tensor, labels: Tensor, text: list[Tensor], plus: bool) -> list[Tensor]:
    """SS-Text's weights w_c [d] from normalised image features [N, d], one image at a time."""
    count, weights = len(images), []
    for label, feature in enumerate(text):
        own = [image for image, other in zip(images, labels, strict=True) if other == label]
        if not own:
            weights.append(feature)
            continue
        pull = 1 / len(own) if plus else 1 / count  # lambda_c
        weights.append(feature + 1 / count * 1 / pull * sum(image * scale for image in own))
    if not plus:
        return weights
    mean = sum(weights) / len(weights)
    return [weight - unit(2 * weight - mean) for weight in weights]
