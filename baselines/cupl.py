"""CuPL: zero-shot classification with sentences in which an LLM describes images of each class.

Paper: "What does a platypus look like? Generating customized prompts for zero-shot image classification", ICCV 2023,
arXiv 2209.03320; code github.com/sarahpratt/CuPL.
Protocol: the symptom set holds whole sentences, which are read as they are ("A platypus looks like a beaver with a duck's
bill."; 50 of each class there, 10 answers to each of 5 questions at temperature 0.99). The feature of a class is the mean of
the normalised features of its sentences, normalised again. `templates` adds the class name in hand-written templates to them,
which are the paper's rows of both kinds of prompt.
Command: `python harness/run.py CONFIG.yaml method=cupl symptoms=SENTENCES.json`
Published figure: over one percentage point more than hand-written templates on ImageNet (the paper's abstract). Nothing was
reproduced here: neither those weights nor the data could be had.

The published code cuts a sentence that is too long for the text tower; here it is refused, and named.
"""

from typing import Any

from vipbench.harness.config.schema import MethodConfig, Templates
from vipbench.harness.methods.base import Task
from vipbench.harness.methods.fixed_texts import FixedTexts
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.phrases import as_sentence, spoken


class CuPLConfig(MethodConfig):
    """Options of CuPL."""

    templates: Templates = None  # of class names, beside the sentences


@register("cupl")
class CuPL(FixedTexts):
    """Class features from sentences of an LLM."""

    Config = CuPLConfig

    def __init__(self, config: CuPLConfig, task: Task, backbone: Backbone) -> None:
        assert task.symptoms is not None
        by_hand = [[one.replace("{}", spoken(name)) for one in config.templates or ()] for name in task.classes]
        sentences = [[as_sentence(text) for text in texts] for texts in task.symptoms]
        texts = [own + described for own, described in zip(by_hand, sentences, strict=True)]
        super().__init__(config, task, backbone, texts, mean_feature=True)

    @classmethod
    def uses_symptoms(cls, config: Any) -> bool:
        return True
