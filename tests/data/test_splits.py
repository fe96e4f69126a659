"""Splits: made by class and never across patients; leaks and empty classes refused."""

from collections import Counter
from pathlib import Path

import pytest

from harness.data.check import Checked
from harness.data.sources import Record
from harness.data.splits import HoldOut, split_samples
from harness.errors import UserError

CLASSES = ["mel", "nev"]


def sample(key: str, label: int = 0, split: str | None = None, patient: str | None = None, pixels: str = "") -> Checked:
    return Checked(Record(key, Path(key), label, split, patient), "jpg", pixels or key, 0, 1)


def many(mel: int, nev: int, split: str | None = None, per_patient: int = 0) -> list[Checked]:
    """Samples of both classes; patients have `per_patient` images each, across classes."""
    labels = [0] * mel + [1] * nev
    return [
        sample(f"{split}/{n}", label, split, f"id{(n * 7919) % len(labels) // per_patient}" if per_patient else None)
        for n, label in enumerate(labels)
    ]


def keys(splits: dict[str, list[Checked]]) -> dict[str, list[str]]:
    return {split: [member.record.key for member in members] for split, members in splits.items()}


def counts(members: list[Checked]) -> tuple[int, int]:
    found = Counter(member.record.label for member in members)
    return found[0], found[1]


def test_missing_splits_are_stratified_and_said() -> None:
    splits, notes = split_samples(many(100, 400), CLASSES, HoldOut(0.1, 0.2, seed=1))
    assert {split: counts(members) for split, members in splits.items()} == {
        "train": (70, 280),
        "val": (10, 40),
        "test": (20, 80),
    }
    assert any(note.startswith("test: the source has none; 100 of 500") and "seed 1" in note for note in notes)
    assert any("no patients known" in note for note in notes)


def test_splits_are_determined_by_the_seed_not_by_the_order() -> None:
    samples = many(20, 30)
    first = keys(split_samples(samples, CLASSES, HoldOut(seed=1))[0])
    again = keys(split_samples(samples[::-1], CLASSES, HoldOut(seed=1))[0])
    other = keys(split_samples(samples, CLASSES, HoldOut(seed=2))[0])
    assert {split: sorted(members) for split, members in again.items()} == {s: sorted(m) for s, m in first.items()}
    assert sorted(other["test"]) != sorted(first["test"])


def test_missing_val_comes_from_train_only() -> None:
    samples = many(20, 40, "train") + many(10, 20, "test")
    splits, notes = split_samples(samples, CLASSES, HoldOut())
    assert keys(splits)["test"] == [f"test/{number}" for number in range(30)]
    assert counts(splits["val"]) == (2, 4)
    assert all(key.startswith("train/") for key in keys(splits)["val"])
    assert len(notes) == 1


def test_missing_test_leaves_val_alone() -> None:
    splits, _ = split_samples(many(20, 40, "train") + many(3, 3, "val"), CLASSES, HoldOut())
    assert counts(splits["test"]) == (4, 8)
    assert len(splits["val"]) == 6


def test_given_splits_and_zero_fractions_make_nothing() -> None:
    samples = many(4, 4, "train") + many(4, 4, "val") + many(4, 4, "test")
    splits, notes = split_samples(samples, CLASSES, HoldOut())
    assert [len(members) for members in splits.values()] == [8, 8, 8]
    assert notes == []
    assert list(split_samples(many(4, 4), CLASSES, HoldOut(0, 0))[0]) == ["train"]


@pytest.mark.parametrize("seed", range(5))
def test_patients_and_copies_are_never_torn(seed: int) -> None:
    samples = many(60, 140, per_patient=5)
    # a copy of an image under another patient links both patients
    samples += [sample("copy", 0, None, "id3", pixels=samples[0].pixels)]
    splits, _ = split_samples(samples, CLASSES, HoldOut(0.2, 0.2, seed))
    for owned in (lambda member: member.record.patient, lambda member: member.pixels):
        where = [{owned(member) for member in members} for members in splits.values()]
        assert not (where[0] & where[1] or where[0] & where[2] or where[1] & where[2])
    for split in ("val", "test"):
        mel, nev = counts(splits[split])
        assert 0.12 <= mel / 61 <= 0.28
        assert 0.12 <= nev / 140 <= 0.28


def test_rare_class_keeps_a_training_image() -> None:
    splits, notes = split_samples(many(1, 50), CLASSES, HoldOut())
    assert counts(splits["train"])[0] == 1
    assert any("test: class 'mel' has no image here" in note for note in notes)
    splits, _ = split_samples(many(3, 50), CLASSES, HoldOut())
    assert [counts(members)[0] for members in splits.values()] == [1, 1, 1]


def test_same_image_in_two_splits_is_refused() -> None:
    samples = [*many(2, 2, "train"), sample("copy", 0, "test", pixels="train/0")]
    with pytest.raises(UserError, match=r"the same image is in train \(train/0\) and in test \(copy\)"):
        split_samples(samples, CLASSES, HoldOut())


def test_same_patient_in_two_splits_is_refused() -> None:
    samples = [*many(2, 2, "train"), sample("a", 0, "train", "ann"), sample("b", 0, "val", "ann")]
    with pytest.raises(UserError, match=r"patient 'ann' is in train \(a\) and in val \(b\)"):
        split_samples(samples, CLASSES, HoldOut())


def test_class_without_training_images_is_refused() -> None:
    with pytest.raises(UserError, match="class 'nev' has no training image"):
        split_samples([*many(2, 0, "train"), *many(2, 2, "test")], CLASSES, HoldOut())


def test_test_split_alone_is_for_evaluation_only() -> None:
    splits, notes = split_samples(many(2, 0, "test"), CLASSES, HoldOut())
    assert list(splits) == ["test"]
    assert "evaluation only" in notes[0]


def test_copies_within_a_split_are_noted() -> None:
    samples = [*many(3, 3), sample("x", 0, None, None, "None/0"), sample("y", 1, None, None, "None/0")]
    _, notes = split_samples(samples, CLASSES, HoldOut(0, 0))
    assert notes == [
        "train: 2 images are copies of others in this split; all are kept",
        "train: 1 images occur under several classes",
    ]


@pytest.mark.parametrize("fractions", [(-0.1, 0.2), (0.5, 0.5)])
def test_impossible_fractions(fractions: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="fractions"):
        HoldOut(*fractions)
