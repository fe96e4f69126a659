"""Zero-shot CLIP: nothing is trained; the text is class names in a template, in several templates, or symptoms.

Papers: CLIP, arXiv 2103.00020 (one template; several: mean of the normalised features, normalised again); ViP, arXiv 2409.00341,
Figure 3 (I) (score of a class = mean over its symptoms of the cosine).
Command: `python harness/run.py CONFIG.yaml method=zero_shot method.text=symptoms`
Expected figure: none; it depends on the backbone and the task alone.
"""

from typing import Any, Literal, Self

from pydantic import model_validator

from vipbench.harness.config.schema import MethodConfig, Templates
from vipbench.harness.methods.base import Task
from vipbench.harness.methods.fixed_texts import FixedTexts
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.phrases import spoken, without_full_stop

DEFAULT_TEMPLATES = {
    "class_names": ["a photo of a {}."],
    "templates": [
        "a photo of a {}.",
        "a medical image of {}.",
        "a clinical photograph showing {}.",
        "an image of a patient with {}.",
        "a close-up picture of {}.",
        "this is {}.",
    ],
    "symptoms": ["{}."],
}


class ZeroShotConfig(MethodConfig):
    """Options of zero-shot classification; `templates` replaces the default ones."""

    text: Literal["class_names", "templates", "symptoms"] = "class_names"
    templates: Templates = None

    @model_validator(mode="after")
    def _one_template_of_class_names(self) -> Self:
        if self.text == "class_names" and self.templates and len(self.templates) > 1:
            raise ValueError("text: class_names takes one template; use text: templates for several")
        return self


@register("zero_shot")
class ZeroShot(FixedTexts):
    """Class features from class names or symptoms in templates."""

    Config = ZeroShotConfig

    def __init__(self, config: ZeroShotConfig, task: Task, backbone: Backbone) -> None:
        if config.text == "symptoms":
            assert task.symptoms is not None
            words = [[without_full_stop(symptom) for symptom in symptoms] for symptoms in task.symptoms]
        else:
            words = [[spoken(without_full_stop(name))] for name in task.classes]
        templates = config.templates or DEFAULT_TEMPLATES[config.text]
        texts = [[template.replace("{}", word) for word in own for template in templates] for own in words]
        super().__init__(config, task, backbone, texts, mean_feature=config.text != "symptoms")

    @classmethod
    def uses_symptoms(cls, config: Any) -> bool:
        return bool(config.text == "symptoms")
