"""Few-shot draws: k per class, nested, keyed by seed and class."""

from itertools import pairwise

import pytest

from tests.data.drawn_images import source_of
from vipbench.harness.data.draws import draw, fewer
from vipbench.harness.data.reader import Dataset, Samples
from vipbench.harness.data.shards import write_dataset
from vipbench.harness.data.splits import HoldOut
from vipbench.harness.errors import UserError

CLASSES = ["mel", "nev", "bcc"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp("fewshot")
    source = source_of(folder / "source", classes=tuple(CLASSES), train=8)
    write_dataset(source, folder / "data", name="demo", hold_out=HoldOut(0, 0))
    return Dataset(folder / "data").split("train")


def test_k_per_class_in_key_order(samples: Samples) -> None:
    drawn = draw(samples, CLASSES, 3, seed=1)
    assert sorted(drawn.labels.tolist()) == [0] * 3 + [1] * 3 + [2] * 3
    assert drawn.keys.tolist() == sorted(drawn.keys.tolist())
    assert len(set(drawn.keys)) == 9
    assert len(draw(samples, CLASSES, 0, seed=1)) == 0
    assert draw(samples, CLASSES, 8, seed=1).keys.tolist() == samples.keys.tolist()


def test_draws_are_nested_and_depend_on_the_seed(samples: Samples) -> None:
    draws = [set(draw(samples, CLASSES, k, seed=1).keys) for k in (1, 2, 4, 8)]
    assert all(small < large for small, large in pairwise(draws))
    assert draws[2] != set(draw(samples, CLASSES, 4, seed=2).keys)


def test_a_class_draws_the_same_whatever_the_others_and_the_order(samples: Samples) -> None:
    expected = [key for key in draw(samples, CLASSES, 4, seed=1).keys if key.startswith("mel")]
    mixed = samples.select(list(range(len(samples)))[::-1])
    assert [key for key in draw(mixed, CLASSES, 4, seed=1).keys if key.startswith("mel")] == expected
    alone = samples.select(samples.labels == 0)
    assert draw(alone, ["mel"], 4, seed=1).keys.tolist() == expected


def test_too_few_images_are_an_error(samples: Samples) -> None:
    with pytest.raises(UserError, match="class 'mel' has 8 images, fewer than the 9 shots"):
        draw(samples, CLASSES, 9, seed=1)


def test_a_class_with_fewer_images_gives_what_it_has_where_that_is_allowed(samples: Samples) -> None:
    with pytest.raises(UserError, match=r"has 8 images, fewer than the 10 shots asked for; data\.fewer=take"):
        draw(samples, CLASSES, 10, seed=1)
    short = samples.select(range(20))
    taken = draw(short, CLASSES, 7, seed=1, fewer=True)
    counts = {name: int((short.labels == label).sum()) for label, name in enumerate(CLASSES)}
    assert fewer(taken, CLASSES, 7) == {name: count for name, count in counts.items() if count < 7} != {}
    assert len(taken) == sum(min(count, 7) for count in counts.values())
