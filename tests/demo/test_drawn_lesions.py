"""The embedded benchmark holds what must be true by construction."""

import csv
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image

from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.data.reader import Dataset
from vipbench.harness.demo import clip_training
from vipbench.harness.demo.attributes import BROAD, sample
from vipbench.harness.demo.benchmark import CLASSES, IMAGES, Picture, distribution, make_dataset, pictures, write_images
from vipbench.harness.demo.captions import FACTS, caption, fact_flags, facts_of, words_of_captions
from vipbench.harness.demo.clip_training import ATTRIBUTES
from vipbench.harness.demo.draw import SIZE, Scene, draw, generator
from vipbench.harness.features.encode import encode_samples
from vipbench.harness.methods.base import Task
from vipbench.harness.methods.registry import method_class
from vipbench.harness.models.backbone import Backbone, load_backbone
from vipbench.harness.symptoms.sets import SymptomSet

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "harness" / "demo" / "model"


@pytest.fixture(scope="module")
def test_pictures() -> list[Picture]:
    return list(pictures("test"))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(BackboneConfig(name=str(MODEL)))


def test_drawing_is_keyed_and_varies(test_pictures: list[Picture]) -> None:
    again = next(pictures("test"))
    assert np.array_equal(again.pixels, test_pictures[0].pixels)
    assert not np.array_equal(next(pictures("test", seed=1)).pixels, again.pixels)
    lesion, scene = sample(BROAD, generator("a")), Scene.sample(generator("b"))
    first, second = (draw(lesion, scene, generator("draw", number)) for number in (1, 2))
    assert first.shape == (SIZE, SIZE, 3)
    assert first.dtype == np.uint8
    assert np.abs(first.astype(int) - second).mean() > 5, "the same lesion is drawn anew each time"


@pytest.mark.parametrize(
    ("attribute", "level"), [("veil", "present"), ("vessels", "many"), ("dots", "many"), ("centre", "sore")]
)
def test_attributes_are_seen_in_the_pixels(attribute: str, level: str) -> None:
    """Changing one attribute changes the picture, all else (random numbers too) being the same."""
    plain = {"veil": "none", "vessels": "none", "dots": "none", "centre": "plain"}[attribute]
    lesion = sample(BROAD, generator("lesion"))
    changes: list[dict[str, Any]] = [{attribute: level}, {attribute: plain}]
    with_it, without = (replace(lesion, **change) for change in changes)
    scene = Scene.sample(generator("scene"))
    images = [draw(each, scene, generator("draw")).astype(int) for each in (with_it, without)]
    assert np.abs(images[0] - images[1]).mean() > 1


def test_captions_never_speak_of_classes() -> None:
    medical = {word for name in CLASSES for word in name.split()}
    assert not medical & words_of_captions()
    rng = np.random.default_rng(0)
    lesion = sample(BROAD, rng)
    facts = facts_of(lesion)
    assert set(facts) <= set(FACTS)
    for _ in range(200):
        pieces, stated = caption(facts, rng)
        assert set(stated) <= set(facts), "a caption states only what is true"
        assert (
            set(" ".join(pieces).replace("-", " ").replace(",", " ").replace(".", " ").split()) <= words_of_captions()
        )
    assert fact_flags(facts).sum() == len(facts)


def test_classes_overlap_so_that_no_single_attribute_decides() -> None:
    rng = np.random.default_rng(0)
    drawn = {name: [sample(distribution(name), rng) for _ in range(500)] for name in CLASSES}
    for attribute in ATTRIBUTES:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for name, lesions in drawn.items():
            for lesion in lesions:
                counts[getattr(lesion, attribute)][name] += 1
        best = sum(max(by_class.values()) for by_class in counts.values()) / (500 * len(CLASSES))
        assert best < 0.6, f"{attribute} alone tells {best:.0%}"
        assert all(len(by_class) == len(CLASSES) for by_class in counts.values()), (
            f"a level of {attribute} gives a class away"
        )


def test_patients_have_several_images_and_stay_in_one_split(tmp_path: Path) -> None:
    with write_images(tmp_path).open() as file:
        rows = list(csv.DictReader(file))
    splits: dict[str, set[str]] = defaultdict(set)
    images: Counter[str] = Counter()
    for row in rows:
        splits[row["patient"]].add(row["split"])
        images[row["patient"]] += 1
    assert all(len(found) == 1 for found in splits.values())
    assert set(images.values()) == {2}
    assert len(rows) == sum(IMAGES.values()) * len(CLASSES)


def test_the_committed_model_is_small_and_says_what_it_is() -> None:
    assert (MODEL / "open_clip_model.safetensors").stat().st_size < 12_000_000
    card = (MODEL / "README.md").read_text()
    assert "train_clip" in card
    assert "clinical" in card


@pytest.mark.slow
def test_class_names_score_near_chance_and_symptoms_clearly_above(backbone: Backbone, tmp_path: Path) -> None:
    """The premise in miniature: general visual knowledge, no medical terms."""
    make_dataset(tmp_path / "data")
    dataset = Dataset(tmp_path / "data")
    test = dataset.split("test")
    features = encode_samples(backbone, test)
    symptoms = SymptomSet.load(ROOT / "symptoms_cache" / "demo" / "lesions.json")
    task, cls = Task(dataset.classes, symptoms.texts(dataset.classes)), method_class("zero_shot")

    def accuracy(text: str) -> float:
        method = cls(cls.Config.model_validate({"name": "zero_shot", "text": text}), task, backbone).eval()
        return float((method(features).logits.argmax(dim=1).numpy() == test.labels).mean())

    assert accuracy("class_names") < 0.35, "chance is 0.25"
    assert accuracy("symptoms") > 0.55


@pytest.mark.slow
def test_training_learns(tmp_path: Path) -> None:
    """A minute part of the training that made the weights: the loss falls, and the model that is written loads."""
    pixels, facts = clip_training.draw_chunk((0, 0, 64))
    torch.manual_seed(0)
    model = CLIP(**clip_training.MODEL)
    batch = clip_training.Captions(facts, 64, 1, seed=0)[0]

    def loss() -> float:
        with torch.no_grad():
            image = torch.nn.functional.normalize(
                model.visual(clip_training.normalise(tensor[batch[0]].float())), dim=-1
            )
            text = torch.nn.functional.normalize(clip_training.encode_text(model, batch[1]), dim=-1)
            true = torch.from_numpy(np.stack([fact_flags(facts[place]) for place in batch[0]]))
            matches = batch[2].float() @ (~true).float().T == 0
            assert matches.diagonal().all(), "each caption is true of its own image"
            return float(clip_training.contrast(model.logit_scale.exp() * text @ image.T, matches))

    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    before = loss()
    clip_training.fit(model, tensor, facts, steps=6, batch_size=64, lr=1e-3, workers=0, seed=0)
    assert loss() < before
    clip_training.write_model(model, tmp_path)
    loaded = load_backbone(BackboneConfig(name=str(tmp_path)))
    assert loaded.encode_images(loaded.eval_transform(Image.fromarray(pixels[0]))[None]).shape == (1, 128)
