"""Zero-shot methods with fixed texts once more, plainly: one text and one class at a time, on the open_clip model itself.

Nothing here uses harness/ or baselines/.
"""

import hashlib
import json
import math
import string
from typing import Any

import torch
from torch import Tensor

from tests.plain import encode, unit, words


def feature(model: Any, tokenizer: Any, text: str) -> Tensor:
    """L2-normalised feature [d] of a text."""
    return unit(encode(model, tokenizer, words(model, tokenizer, text)))


def cupl(model: Any, tokenizer: Any, image: Tensor, texts: list[list[str]]) -> Tensor:
    """CuPL: logits [C] of one image feature, from all texts of each class."""
    logits = []
    for own in texts:
        total = torch.zeros(len(image))
        for text in own:
            total = total + feature(model, tokenizer, text)
        logits.append(model.logit_scale.exp() * unit(image) @ unit(total / len(own)))
    return torch.stack(logits)


def mean_cosine(model: Any, tokenizer: Any, image: Tensor, texts: list[list[str]]) -> Tensor:
    """DCLIP and WaffleCLIP: logits [C] of one image feature, the mean cosine with the texts of each class."""
    logits = []
    for own in texts:
        cosines = [float(unit(image) @ feature(model, tokenizer, text)) for text in own]
        logits.append(float(model.logit_scale.exp()) * sum(cosines) / len(cosines))
    return torch.tensor(logits)


def xplainer(
    model: Any,
    tokenizer: Any,
    image: Tensor,
    classes: list[str],
    observations: list[list[str]],
    no_finding: int | None = None,
    temperature: float = 0.5,
) -> Tensor:
    """Xplainer: log probabilities [C] of the classes for one image feature."""
    found = []
    for name, own in zip(classes, observations, strict=True):
        product = 1.0
        for text in own:
            yes = float(unit(image) @ feature(model, tokenizer, f"There are {text} indicating {name}"))
            no = float(unit(image) @ feature(model, tokenizer, f"There are no {text} indicating {name}"))
            product *= math.exp(yes / temperature) / (math.exp(yes / temperature) + math.exp(no / temperature))
        found.append(product ** (1 / len(own)))
    if no_finding is not None:
        found[no_finding] = 1 - max(value for place, value in enumerate(found) if place != no_finding)
    return torch.tensor([math.log(value) for value in found])


def waffle_descriptors(key: int, pairs: int, classes: list[str], word_list: list[str]) -> list[str]:
    """WaffleCLIP's random descriptors, of the shape of a sample name that is spelt out, as in the published code."""
    split = [name.split(" ") for name in classes]
    averages = [sum(len(word) for word in name) / len(name) for name in split]
    word_count = round(sum(len(name) for name in split) / len(split))
    word_length = round(sum(averages) / len(split))
    chunks = round(sum(name.count(" ") for name in classes) / len(classes)) + 1
    longest = math.ceil(sum(max(len(word) for word in name) for name in split) / len(split))
    longest += chunks - longest % chunks
    sample = " ".join(["a" * (longest // chunks)] * chunks)
    cut, alphabet = [word[:word_length] for word in word_list], string.ascii_letters + string.digits + "'()-/:"

    def number(*place: int | str) -> int:
        text = json.dumps(["waffle", key, *place]).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest()[:8], "little") // 2

    descriptors = []
    for pair in range(pairs):
        chosen = [cut[number(pair, "word", place) % len(cut)] for place in range(max(word_count, 1))]
        noise, drawn = "", 0
        for letter in sample:
            if letter == " ":
                noise += ", "
                continue
            noise += alphabet[number(pair, "character", drawn) % len(alphabet)]
            drawn += 1
        descriptors += [" ".join(chosen), noise]
    return descriptors
