"""The choices that the options of the data verbs offer, in a module that is quick to import."""

from enum import StrEnum


class OnError(StrEnum):
    """Ways to deal with an image that cannot be used."""

    stop = "raise"
    skip = "skip"


class Leaks(StrEnum):
    """Ways to deal with images and patients that are in several splits."""

    refuse = "refuse"
    keep = "keep"
    drop_train = "drop-train"
