"""DCLIP, classification by description: zero-shot with the class name and one descriptor of it in each text.

Paper: "Visual Classification via Description from Large Language Models", ICLR 2023, arXiv 2210.07183; code
github.com/sachit-menon/classify_by_description_release.
Protocol: a text is "{class}, which has {descriptor}." ("which is" before an article or "used"; "which" alone before has, often,
typically, may and can); the score of a class is the mean of the cosines with its texts. WaffleCLIP's comparison puts "A photo of
a" in front: `method.template='a photo of a {}.'`.
Command: `python harness/run.py CONFIG.yaml method=dclip symptoms=symptoms_cache/derm7pt/clinical.json`
Published figure: accuracy 63.12 on ImageNet (ViT-B/32, "A photo of a" in front; results/baselines_gpt.csv of
github.com/ExplainableML/WaffleCLIP). Not reproduced here: neither those weights nor the data could be had.

The published code looks for these words with `startswith`, so that "antennae" becomes "which is antennae", and "asymmetric
shape" would become "which is asymmetric shape". Here the first word decides; of the 5,800 published descriptors of ImageNet that
changes 47. The code ends texts in a full stop for ImageNet only, here all do.
"""

import re
from typing import Any

from vipbench.harness.config.schema import MethodConfig, Template
from vipbench.harness.methods.base import Task
from vipbench.harness.methods.fixed_texts import FixedTexts
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.phrases import spoken, without_full_stop

NOUN_PHRASES, VERB_PHRASES = {"a", "an", "used"}, {"has", "often", "typically", "may", "can"}


def described(name: str, descriptor: str) -> str:
    """Name a class with a relative clause: "nevus, which has a descriptor"."""
    found = re.match(r"[\w-]*", descriptor.casefold())
    first = found.group() if found else ""
    verb = "" if first in VERB_PHRASES else "is " if first in NOUN_PHRASES else "has "
    return f"{spoken(name)}, which {verb}{without_full_stop(descriptor)}"


class DCLIPConfig(MethodConfig):
    """Options of DCLIP."""

    template: Template = "{}."  # where "{class}, which has {descriptor}" goes


@register("dclip")
class DCLIP(FixedTexts):
    """Class features from descriptors of the classes."""

    Config = DCLIPConfig

    def __init__(self, config: DCLIPConfig, task: Task, backbone: Backbone) -> None:
        assert task.symptoms is not None
        texts = [
            [config.template.replace("{}", described(name, text)) for text in own]
            for name, own in zip(task.classes, task.symptoms, strict=True)
        ]
        super().__init__(config, task, backbone, texts)

    @classmethod
    def uses_symptoms(cls, config: Any) -> bool:
        return True
