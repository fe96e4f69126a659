"""MaPLe: prompts in both towers and at several depths, those of the image tower made from those of the text tower.

Paper: "MaPLe: Multi-modal Prompt Learning", CVPR 2023, arXiv 2210.03117.
Protocol: "a photo of a <class name>.", of which the first 2 tokens ("a photo") are learned; depth J = 9, that is, before each of
blocks 1 to J - 1 of both towers other learned vectors N(0, 0.02) take the place of the prompts; SGD 0.0035, batch 4, 5 epochs, of
which the last is kept. Across datasets: depth 3, 0.0026, 2 epochs.
Command: `python harness/run.py CONFIG.yaml method=maple data.shots=16`
Expected figure: none is quoted here. On BiomedCLIP published tables have it collapse (38 to 53 %), which is not tuned away here.

    text prompts:    P_0 "a photo" (learned), P_1 .. P_J-1, each [2, w], before blocks 0 .. J-1, in the slots
    image prompts:   F_i(P_i), a linear map with bias each, before the same blocks, after the patches and without positions;
                     those of block 0 go through the norm before the blocks (ln_pre), the others do not
"""

import copy
from collections.abc import Mapping
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vipbench.harness.config.schema import MethodConfig
from vipbench.harness.methods.base import Output, Task, TextClassifier
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.deep_prompts import random_prompts
from vipbench.harness.models.phrases import spoken
from vipbench.harness.models.prompts import SLOT, PromptBatch, context_vectors
from vipbench.harness.models.tower_view import TowerViews, check_depth

WORDS, LEARNED = "a photo of a", 2  # tokens of WORDS that are learned; the others stay


class MaPLeConfig(MethodConfig):
    """Options of MaPLe."""

    depth: Annotated[int, Field(ge=1, le=1000)] = 9  # blocks of each tower that have prompts of their own


@register("maple")
class MaPLe(TextClassifier):
    """Prompts of class c: [SOS] v_1 v_2 "of a" <class name> "." [EOS]; of an image: [CLS] <patches> F(v_1) F(v_2)."""

    Config = MaPLeConfig
    needs = "images"

    def __init__(self, config: MaPLeConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        self.towers, tower = TowerViews(backbone.image, backbone.text), backbone.text
        check_depth(config.depth, self.towers.image, self.towers.text)
        words = tower.tokenize(WORDS)
        self.context = nn.Parameter(context_vectors(tower, WORDS, None).detach()[:, :LEARNED].clone())  # [1, 2, w]
        self.deep = random_prompts(config.depth - 1, LEARNED, tower.width)
        self.project = nn.Linear(tower.width, self.towers.image.width)
        start = nn.Linear(tower.width, self.towers.image.width)
        self.project_deep = nn.ModuleList(copy.deepcopy(start) for _ in self.deep)
        prompts = [[SLOT] * LEARNED + words[LEARNED:] + tower.tokenize(f"{spoken(name)}.") for name in task.classes]
        self.prompts = PromptBatch(tower, prompts, [f"class {name!r}" for name in task.classes])

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        return {"lr": 0.0035, "batch_size": 4, "epochs": 5, "select": "last"}

    def forward(self, inputs: Tensor) -> Output:
        deep = [project(vectors) for project, vectors in zip(self.project_deep, self.deep, strict=True)]
        features = self.towers.image(inputs, [self.project(self.context[0]), *deep])
        return super().forward(F.normalize(features.float(), dim=-1))

    def class_features(self) -> Tensor:
        features = self.towers.text(self.prompts.fill(self.context, list(self.deep)))
        return F.normalize(features.float(), dim=-1)
