"""Splits: made by class and never across patients; leaks and empty classes refused."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from vipbench.harness.data import splits as module
from vipbench.harness.data.check import Checked
from vipbench.harness.data.choices import Leaks
from vipbench.harness.data.importers.base import Record
from vipbench.harness.data.splits import HoldOut
from vipbench.harness.errors import UserError

CLASSES = ["mel", "nev"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports of leaks go where the tests run."""
    monkeypatch.chdir(tmp_path)


def split_samples(
    samples: list[Checked], classes: list[str], hold_out: HoldOut, leaks: Leaks = Leaks.refuse
) -> tuple[dict[str, list[Checked]], list[str]]:
    splits, notes, _ = module.split_samples(samples, classes, hold_out, leaks, Path("leaks.csv"))
    return splits, notes


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


def rows(report: str) -> list[list[str]]:
    return list(csv.reader(report.splitlines()))[1:]


def leaky() -> list[Checked]:
    """Twins within train, between all pairs of splits, under two classes; and a patient in train and test."""
    return [
        *many(4, 4, "train"),
        *(sample(f"val{n}", n % 2, "val") for n in range(4)),
        *(sample(f"test{n}", n % 2, "test") for n in range(4)),
        sample("train copy", 0, "train", pixels="train/0"),
        sample("val twin", 0, "val", pixels="train/1"),
        sample("test twin", 1, "test", pixels="train/2"),
        sample("test twin of val", 0, "test", pixels="val0"),
        sample("ann in train", 1, "train", "ann"),
        sample("ann in test", 1, "test", "ann"),
    ]


def test_all_leaks_are_refused_at_once_with_one_report() -> None:
    with pytest.raises(UserError) as caught:
        split_samples(leaky(), CLASSES, HoldOut())
    assert str(caught.value).startswith(
        "4 groups of identical images (3 across splits, 1 under several classes) and 1 patients in several splits; "
        "leaks.csv lists them all"
    )
    found = rows(Path("leaks.csv").read_text())
    assert sorted({row[0] for row in found}) == ["1", "2", "3", "4", "5"]
    assert ["1", "identical images", "train", "mel", "train copy", ""] in found
    assert [row[1:5] for row in found if row[1] == "one patient"] == [
        ["one patient", "train", "nev", "ann in train"],
        ["one patient", "test", "nev", "ann in test"],
    ]
    assert "ann" not in {cell for row in found for cell in row}, "patients are not named"


def test_leaks_are_kept_as_published_or_dropped_from_train() -> None:
    samples = leaky()
    splits, _, settled = module.split_samples(samples, CLASSES, HoldOut(), Leaks.keep, Path("leaks.csv"))
    assert sum(map(len, splits.values())) == len(samples)
    assert settled.info is not None and (settled.info.policy, settled.info.dropped) == ("keep", 0)

    splits, notes, settled = module.split_samples(samples, CLASSES, HoldOut(), Leaks.drop_train, Path("leaks.csv"))
    gone = {one.record.key for one in samples} - {one.record.key for part in splits.values() for one in part}
    assert gone == {"train/1", "train/2", "val0", "ann in train"}, "test is whole; a copy within train stays"
    assert settled.info is not None and settled.info.dropped == 4
    assert any("4 samples dropped; leaks.csv lists them" in note for note in notes)
    assert settled.report is not None
    assert {row[4] for row in rows(settled.report) if row[5]} == gone
    assert not Path("leaks.csv").exists(), "only what is refused is reported beside the output"


def test_a_patient_that_left_val_does_not_empty_train() -> None:
    samples = [
        *many(2, 2, "train"),
        sample("bob in train", 0, "train", "bob"),
        sample("bob in val", 0, "val", "bob", pixels="same"),
        sample("test", 0, "test", pixels="same"),
    ]
    splits, _ = split_samples(samples, CLASSES, HoldOut(0, 0), Leaks.drop_train)
    assert "bob in train" in keys(splits)["train"]
    assert "val" not in splits


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
        "1 groups of identical images (0 across splits, 1 under several classes) and 0 patients in several splits: "
        "all are kept; leaks.csv lists them"
    ]


@pytest.mark.parametrize("fractions", [(-0.1, 0.2), (0.5, 0.5), (float("nan"), 0.1), (0.1, float("inf"))])
def test_impossible_fractions(fractions: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="fractions"):
        HoldOut(*fractions)
