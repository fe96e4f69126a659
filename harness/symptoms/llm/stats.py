"""Counts of a client's work, for its progress line."""

from collections.abc import Collection
from dataclasses import dataclass

from vipbench.harness.symptoms.llm.endpoint import Endpoint


@dataclass
class Stats:
    """Counts of a client's work. `prefix_hit_rate`: the share of prompt tokens in the servers' prefix caches, if reported."""

    asked: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    prefix_hit_rate: float | None = None

    def note(self) -> str:
        """Format the end of a progress line."""
        seconds = max(self.seconds, 1e-9)
        tokens = (self.prompt_tokens + self.completion_tokens) / seconds
        share = self.cached / max(self.cached + self.asked, 1)
        rates = f"{self.asked / seconds:.1f} requests/s, {tokens:.0f} tokens/s, " if self.asked else ""
        prefix = "" if self.prefix_hit_rate is None else f", prefix cache {self.prefix_hit_rate:.0%}"
        retries = f", {self.retries} retries" if self.retries else ""
        return f"{rates}{share:.0%} from the cache{prefix}{retries}"


def prefix_hit_rate(endpoints: Collection[Endpoint]) -> float | None:
    """Compute the share of prompt tokens that were in the prefix caches; None where the servers do not report it."""
    queries = sum(endpoint.prefix_queries for endpoint in endpoints)
    hits = sum(endpoint.prefix_hits for endpoint in endpoints)
    return hits / queries if 0 <= hits <= queries and queries else None
