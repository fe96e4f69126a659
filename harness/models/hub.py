"""Repositories of the Hugging Face hub, pinned to one commit and read from the hub's cache.

The commit of a branch is looked up once each time a model is loaded; all files are then of that commit, even where the branch
moves on meanwhile.
`HF_HUB_OFFLINE`, `HF_HOME`, `HF_ENDPOINT` and `HF_TOKEN` have their usual meaning.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vipbench.harness.errors import UserError

PREFIX = "hf-hub:"
DESCRIPTIONS = ("*.json", "*.txt", "*.model")  # configs and tokenizers; weights are fetched one by one
NESTED = "*/*"  # in folders nothing is read, but "*.json" alone matches there too


@dataclass(frozen=True)
class Repository:
    """A repository at one commit.

    Attributes:
        name: "organisation/name".
        revision: the requested branch, tag or commit.
        commit: 40 hex digits.
        folder: its files so far, in the hub's cache.
        others: repositories that it names, as for a text tower's config and tokenizer.
    """

    name: str
    revision: str
    commit: str
    folder: Path
    others: list["Repository"] = field(default_factory=list)

    @property
    def source(self) -> dict[str, Any]:
        """Name, revision and commit, for provenance; with those of the repositories that it names."""
        facts: dict[str, Any] = {"repository": self.name, "revision": self.revision, "commit": self.commit}
        return facts | ({"text": [other.source for other in self.others]} if self.others else {})

    def pin_named(self, identifier: str) -> "Repository":
        """Pin a repository that this one names; the same one each time."""
        for other in (self, *self.others):
            if other.name == identifier:
                return other
        self.others.append(pin(identifier))
        return self.others[-1]

    def first_of(self, names: Sequence[str]) -> Path:
        """Download the first of several files that the repository has.

        Raises:
            UserError: it has none of them, or they can neither be reached nor are in the cache.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        reason = ""
        for name in names:
            try:
                return Path(hf_hub_download(self.name, name, revision=self.commit))
            except EntryNotFoundError as error:  # not in the repository, or not in the cache and out of reach
                reason = reason or " ".join(str(error).split())[:200]
        raise UserError(
            f"backbone {PREFIX + self.name!r}, commit {self.commit}: Required pretrained weights are missing; one of "
            f"{', '.join(names)} is expected ({reason})"
        )


def pin(identifier: str) -> Repository:
    """Find the commit that "organisation/name" or "organisation/name@revision" stands for, and fetch its small files.

    Raises:
        UserError: there is no such repository or revision, or it can neither be reached nor is it in the cache.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = identifier.removeprefix(PREFIX).partition("@")
    try:
        folder = Path(
            snapshot_download(
                name, revision=revision or None, allow_patterns=list(DESCRIPTIONS), ignore_patterns=NESTED
            )
        )
    except (OSError, ValueError) as error:  # the hub's own errors are kinds of these
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"backbone {identifier!r} cannot be had from the hub or its cache: {reason}") from error
    return Repository(name, revision or "main", folder.name, folder)
