"""WaffleCLIP: DCLIP with random words and random characters for descriptors, the control of every method that reads LLM texts.

Paper: "Waffling around for Performance: Visual Classification with Random Words and Broad Concepts", ICCV 2023,
arXiv 2306.07282; code github.com/ExplainableML/WaffleCLIP.
Protocol: 15 pairs of a descriptor of random words and one of random characters, the same for all classes, in DCLIP's text after
"a photo of a"; the score is the mean of the cosines; the paper averages 7 draws. With W words in an average class name, of L
letters on average, random words are W words of a list, cut to L letters. Random characters have as many chunks as an average name
has words, joined by ", ", of together (about) as many characters as the longest word of an average name. `concept` names what
the classes have in common: "a photo of a {concept}: a {class}, which has {descriptor}."
Command: `python harness/run.py CONFIG.yaml method=waffle seed=1`
Published figure: accuracy 63.31 ± 0.09 on ImageNet (ViT-B/32, 7 draws; results/waffleclip.csv of the repository), where DCLIP has
63.12. Not reproduced here: neither those weights nor the data could be had.

Nothing is read of a symptom set. The run's seed decides what is drawn, the same on all machines: what is drawn is a hash of a
key, and the key is saved. The published words are the 4,329 that occur in DCLIP's descriptors of ImageNet; here they are as
many of the most frequent English words (wordfreq's). The characters are those of its descriptors. Where the code rounds the
number of characters up to a multiple of the chunks, one that is a multiple already gets one more per chunk: followed.
"""

import math
import string
from collections.abc import Mapping
from functools import cache
from statistics import mean

import torch
from torch import Tensor

from vipbench.baselines.dclip import DCLIPConfig, described
from vipbench.harness.config.schema import Count, Template, Words
from vipbench.harness.data.stateless_random import keyed_number
from vipbench.harness.methods.base import Task
from vipbench.harness.methods.fixed_texts import FixedTexts, Texts
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.phrases import spoken

WORDS = 4329
CHARACTERS = string.ascii_letters + string.digits + "'()-/:"


@cache
def frequent_words() -> list[str]:
    """The most frequent English words of letters only."""
    from wordfreq import top_n_list

    return [word for word in top_n_list("en", 2 * WORDS) if word.isascii() and word.isalpha()][:WORDS]


def descriptors(key: int, pairs: int, classes: list[str]) -> list[str]:
    """Pairs of random words and random characters of the shape of the class names, drawn by a key."""
    names = [spoken(name).split() or [name] for name in classes]
    count = max(round(mean(len(words) for words in names)), 1)
    letters = round(mean(mean(map(len, words)) for words in names))
    chunks = round(mean(len(words) - 1 for words in names)) + 1
    size = math.ceil(mean(max(map(len, words)) for words in names)) // chunks + 1

    def drawn(choices: str | list[str], *place: int | str) -> str:
        return choices[keyed_number("waffle", key, *place) % len(choices)]

    found = []
    for pair in range(pairs):
        found.append(" ".join(drawn(frequent_words(), pair, "word", place)[:letters] for place in range(count)))
        places = [range(chunk * size, (chunk + 1) * size) for chunk in range(chunks)]
        found.append(", ".join("".join(drawn(CHARACTERS, pair, "character", one) for one in own) for own in places))
    return found


class WaffleConfig(DCLIPConfig):
    """Options of WaffleCLIP."""

    template: Template = "a photo of a {}."
    pairs: Count = 15
    concept: Words | None = None  # of which the classes are kinds, such as "skin lesion"


@register("waffle")
class Waffle(FixedTexts):
    """Class features from random descriptors."""

    Config = WaffleConfig
    draws = True
    key: Tensor  # int64 scalar, of what is drawn

    def __init__(self, config: WaffleConfig, task: Task, backbone: Backbone) -> None:
        key = torch.randint(2**24, (), device="cpu")  # learned tensors are saved as float32
        super().__init__(config, task, backbone, self.texts(config, task, int(key)))
        self.register_buffer("key", key)

    @staticmethod
    def texts(config: WaffleConfig, task: Task, key: int) -> Texts:
        """The texts of each class."""
        concept = f"{config.concept}: a " if config.concept else ""
        random = descriptors(key, config.pairs, task.classes)
        return [
            [config.template.replace("{}", concept + described(name, text)) for text in random] for name in task.classes
        ]

    def load_learned(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_learned(tensors)
        self.set_texts(self.texts(self.config, self.task, int(self.key)))
