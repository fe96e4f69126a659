"""The source of inputs: the same from the bank, computed anew, or as images; un-normalised features; the support set."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vipbench.harness.data.augment import Augmentation
from vipbench.harness.data.reader import Dataset, Samples
from vipbench.harness.data.views import EVALUATION, Loading
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.features.cache import FeatureBank
from vipbench.harness.features.encode import unnormalised
from vipbench.harness.features.source import Needs, Source
from vipbench.harness.models.backbone import Backbone

AUGMENTATION = Augmentation(7)


@pytest.fixture
def topology() -> Iterator[Topology]:
    topology = Topology("cpu", "fp32")
    yield topology
    topology.close()


@pytest.fixture(scope="module")
def samples(dataset: Path) -> Samples:
    return Dataset(dataset).split("train")


def source(
    samples: Samples,
    backbone: Backbone,
    topology: Topology,
    needs: Needs,
    folder: Path | None = None,
    on_error: str = "raise",
) -> Source:
    loading = Loading(4, 0, on_error)  # type: ignore[arg-type]
    bank = None
    if folder:
        bank = FeatureBank(folder, {"precision": "fp32"}, samples.split_size, backbone.dim + 1)
    return Source(samples, backbone, needs, topology, loading, "train", bank, AUGMENTATION)


def test_rows_hold_features_and_their_norm(samples: Samples, vit_backbone: Backbone, topology: Topology) -> None:
    rows, good = source(samples, vit_backbone, topology, "features").all_rows([EVALUATION])
    pixels = torch.stack([vit_backbone.eval_transform(samples.image(place)) for place in range(len(samples))])
    with torch.no_grad():
        expected = vit_backbone.image(pixels)
    assert good.all() and rows.shape == (1, len(samples), vit_backbone.dim + 1)
    assert torch.allclose(unnormalised(rows)[0], expected, atol=1e-5)
    assert torch.allclose(rows[0, :, :-1], F.normalize(expected, dim=-1), atol=1e-6)


@pytest.mark.parametrize("needs", ["features", "unnormalised"])
def test_a_bank_changes_nothing(
    samples: Samples, vit_backbone: Backbone, topology: Topology, tmp_path: Path, needs: Needs
) -> None:
    stored = source(samples, vit_backbone, topology, needs, tmp_path)
    fresh = source(samples, vit_backbone, topology, needs)
    views = [1, 2]
    assert torch.allclose(stored.all_rows(views)[0], fresh.all_rows(views)[0], atol=1e-5)
    batches = [[(view, place) for place in places] for view in views for places in ([3, 1], [0, 5, 2])]
    for first, second in zip(stored.batches(batches), fresh.batches(batches), strict=True):
        assert first.values.shape[1:] == stored.shape
        assert torch.allclose(first.values, second.values, atol=1e-5)
        assert torch.equal(first.labels, second.labels) and first.good.all()
    assert torch.equal(stored.all_rows([1])[0], stored.all_rows([1, 2])[0][:1]), (
        "a view is one view, whatever is asked for too"
    )


@pytest.mark.parametrize("stored", [True, False])
def test_damaged_samples_are_told_apart(
    samples: Samples,
    vit_backbone: Backbone,
    topology: Topology,
    tmp_path: Path,
    one_damaged_image: None,
    stored: bool,
) -> None:
    damaged = source(samples, vit_backbone, topology, "features", tmp_path if stored else None, "skip")
    _, good = damaged.all_rows([EVALUATION])
    assert good.tolist() == [place != 1 for place in range(len(samples))]
    outputs, kept = damaged.map_share(lambda inputs: inputs, "predict")
    assert outputs is not None and len(outputs) == len(samples)
    assert kept.tolist() == good.tolist()
    assert list(damaged.images.skipped) == [samples.key(1)]


def test_images_are_given_as_they_are(samples: Samples, vit_backbone: Backbone, topology: Topology) -> None:
    images = source(samples, vit_backbone, topology, "images")
    (batch,) = images.batches([[(1, 0), (1, 4)]])
    assert batch.values.shape == (2, *vit_backbone.pixels_shape) == (2, *images.shape)
