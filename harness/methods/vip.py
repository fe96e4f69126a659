"""ViP: visual symptom-guided prompt learning, the method this project is named after.

Paper: "Aligning Medical Images with General Knowledge from Large Language Models", MICCAI 2024, arXiv 2409.00341.
Protocol: 4 context vectors N(0, 0.02); SGD, rate and batch size by backbone; 50 epochs on all training images, the best by
validation accuracy is kept. With a number of shots, which the paper does not have, 200 epochs, of which the last is kept.
Command: `python harness/run.py CONFIG.yaml method=vip symptoms=symptoms_cache/derm7pt/clinical.json`
Expected figure: none is quoted here; the paper's tables were not at hand when this was written.

    prompt of a symptom:   [SOS] v_1 .. v_M <symptom> "." [EOS]                       context prompt v (shared or per class)
    features of a class:   V [S, d], un-normalised text features of its S symptoms
    merge prompt:          g_c = t_c + softmax(Wq t_c (Wk V)^T / sqrt(d)) V             then L2-normalised
    logits:                exp(logit_scale) * <image feature, g_c>

The paper leaves open a class with one symptom, where the softmax is 1 whatever is learned (`attention_sink`), several symptom
sets (`sets`) and the bias of SigLIP's logits (`logit_bias`): options of ours, off by default, described in docs/methods.md.
Thousands of classes: `run.text_memory_gib` bounds the activations of the text tower, and prompts are filled part by part.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from vipbench.harness.config.schema import ContextLength, MethodConfig, Switch
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Output, Task, TextClassifier, symptom_names
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.phrases import without_full_stop
from vipbench.harness.models.prompts import PromptBatch, context_prompt, context_vectors

FIXED_CONTEXT = "a photo of a"
QUERY_STD = 0.02
# Learning rate and batch size of the paper, by backbone (with or without -quickgelu, OpenAI's weights have it anyhow); ViT-B-16's
# where the backbone is another.
PAPER_RATES = {"ViT-B-16": (0.002, 32), "ViT-L-14-336": (0.002, 16), "RN50x64": (0.001, 8)}
# The paper trains on whole datasets. A few-shot epoch is one step or two, and its few validation images tell epochs apart by
# chance: docs/few_shot.md has the measurements behind this default of ours.
FULL: dict[str, Any] = {"epochs": 50, "select": "best"}
FEW_SHOT: dict[str, Any] = {"epochs": 200, "select": "last"}


class ViPConfig(MethodConfig):
    """Options of ViP; `context: fixed` and `merge: mean` are the ablations of its two prompts."""

    LATER: ClassVar[tuple[str, ...]] = ("attention_sink", "sets", "logit_bias")

    context: Literal["learned", "fixed"] = "learned"
    context_length: ContextLength | None = None  # 4 by default; a fixed context has the tokens of its words
    class_specific_context: bool = False
    position: Literal["end", "middle", "front"] = "end"  # of the symptom among the context vectors
    merge: Literal["attention", "mean"] = "attention"
    attention_sink: Switch = None  # one more entry of the softmax, with score 0 and no feature
    sets: Literal["ensemble"] | None = None  # a class feature of each symptom set; null: one, of all symptoms
    logit_bias: Switch = None  # add the backbone's (SigLIP has one)

    @model_validator(mode="after")
    def _settle_options(self) -> "ViPConfig":
        fixed = f"the context is fixed to {FIXED_CONTEXT!r}"
        self.settle("context_length", self.context == "learned", 4, fixed)
        if self.context == "fixed" and self.class_specific_context:
            raise ValueError(f"class_specific_context has no effect, since {fixed}; leave it out")
        if self.attention_sink and self.merge == "mean":
            raise ValueError("attention_sink has no effect, since merge is mean; leave it out")
        if self.context == "fixed" and self.merge == "mean":
            raise ValueError(
                "fixed context and mean merge leave nothing to train; use method zero_shot with text: symptoms"
            )
        return self


class MergePrompt(nn.Module):
    """Attention that merges the symptom features of each class into one feature, guided by a learned query per class.

    Wq and Wk are d x d (the published code sizes them by the text width, which fits only where that equals d). With a sink, as
    much of the attention as is learned goes to no feature at all: so a single feature is weighted too, by sigmoid(score).
    """

    def __init__(self, classes: int, dim: int, sink: bool = False) -> None:
        super().__init__()
        self.sink = sink
        self.queries = nn.Parameter(torch.randn(classes, dim) * QUERY_STD)
        self.to_query = nn.Linear(dim, dim, bias=False)
        self.to_key = nn.Linear(dim, dim, bias=False)
        nn.init.xavier_normal_(self.to_query.weight)
        nn.init.xavier_normal_(self.to_key.weight)

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        """Merge features [K, C, S, d] of K symptom sets into [K, C, d] (un-normalised).

        Args:
            present: [K, C, S] bool, False for padding.
        """
        return self.queries + torch.einsum("kcs,kcsd->kcd", self.weights(features, present), features)

    def weights(self, features: Tensor, present: Tensor) -> Tensor:
        """The attention [K, C, S], 0 for padding, that sums to 1, or with a sink to less."""
        query, key = self.to_query(self.queries), self.to_key(features)
        scores = torch.einsum("cd,kcsd->kcs", query, key) / math.sqrt(features.shape[-1])
        scores = scores.masked_fill(~present, -torch.inf)
        return F.pad(scores, (0, 1)).softmax(dim=-1)[..., :-1] if self.sink else scores.softmax(dim=-1)


@register("vip")
class ViP(TextClassifier):
    """Context prompt and merge prompt over the symptoms of each class, in K symptom sets: 1, unless they are an ensemble."""

    Config = ViPConfig
    learns_prompts = True
    row_class: Tensor  # [P] int64, the class of each symptom
    place: Tensor  # [K, C, S] int64, which of the P symptoms stands where; padded with 0
    present: Tensor  # [K, C, S] bool

    def __init__(self, config: ViPConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        assert task.symptoms is not None
        if config.logit_bias and not backbone.logit_bias:
            raise UserError("method.logit_bias: the backbone's logits have no bias; leave it out")
        tower, classes = backbone.text, len(task.classes)
        sets = task.symptom_sets if config.sets == "ensemble" else (task.symptoms,)
        counts = torch.tensor([len(texts) for symptoms in sets for texts in symptoms], device="cpu")
        copies = classes if config.class_specific_context else 1
        words = FIXED_CONTEXT if config.context == "fixed" else None
        self.context = context_vectors(tower, words, config.context_length, copies)
        self.context.requires_grad_(config.context == "learned")
        texts = [without_full_stop(text) for symptoms in sets for texts in symptoms for text in texts]
        prompts = [context_prompt(tower, text, self.context.shape[1], config.position) for text in texts]
        names = [name for symptoms in sets for name in symptom_names(task.classes, symptoms)]
        self.prompts = PromptBatch(tower, prompts, names)
        sink = bool(config.attention_sink)
        self.merge = MergePrompt(classes, backbone.dim, sink) if config.merge == "attention" else None
        rows = torch.arange(len(texts), device="cpu").split(counts.tolist())
        place = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        present = torch.arange(place.shape[1], device="cpu") < counts[:, None]
        row_class = torch.arange(classes, device="cpu").repeat(len(sets)).repeat_interleave(counts)
        self.register_buffer("place", place.view(len(sets), classes, -1), persistent=False)
        self.register_buffer("present", present.view(len(sets), classes, -1), persistent=False)
        self.register_buffer("row_class", row_class, persistent=False)

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        lr, batch_size = PAPER_RATES.get(backbone.replace("/", "-").removesuffix("-quickgelu"), PAPER_RATES["ViT-B-16"])
        return {"lr": lr, "batch_size": batch_size, **(FULL if shots == "all" else FEW_SHOT)}

    @classmethod
    def uses_symptoms(cls, config: Any) -> bool:
        return True

    @property
    def per_class(self) -> bool:
        return self.merge is not None or self.config.class_specific_context

    def forward(self, inputs: Tensor) -> Output:
        output = super().forward(inputs)
        return output._replace(logits=output.logits + self.backbone.logit_bias) if self.config.logit_bias else output

    def class_features(self) -> Tensor:
        """The mean over K symptom sets of their L2-normalised class features: [C, d]; its logits are the mean of theirs."""
        return self._merged(self._padded_features(), self.present)

    def symptom_features(self) -> Tensor:
        return self._by_class(self._padded_features())

    def symptom_weights(self) -> Tensor:
        if self.merge is None:
            return self._by_class(self.present / self.present.sum(-1, keepdim=True)) / len(self.present)
        return self._by_class(self.merge.weights(self._padded_features(), self.present)) / len(self.present)

    def leave_one_out(self) -> Tensor:
        features = self._padded_features()
        left = features.new_empty(features.shape)
        for symptom_set, slot in itertools.product(range(self.present.shape[0]), range(self.present.shape[2])):
            present = self.present.clone()
            present[symptom_set, :, slot] = False
            left[symptom_set, :, slot] = self._merged(features, present)
        return self._by_class(left)

    def _padded_features(self) -> Tensor:
        """Text features [K, C, S, d] of the symptoms, un-normalised."""
        context = self.context[self.row_class] if self.config.class_specific_context else self.context
        return self.backbone.text(self.prompts.fill(context))[self.place]

    def _merged(self, features: Tensor, present: Tensor) -> Tensor:
        if self.merge is not None:
            merged = self.merge(features, present)
        else:
            merged = (features * present[..., None]).sum(-2) / present.sum(-1, keepdim=True)
        return F.normalize(merged.float(), dim=-1).mean(dim=0)

    def _by_class(self, values: Tensor) -> Tensor:
        """Values [P, ...] in the order of `Task.symptoms`, from padded ones [K, C, S, ...]."""
        return values.transpose(0, 1)[self.present.transpose(0, 1)]
