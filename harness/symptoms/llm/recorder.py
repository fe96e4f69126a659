"""Record answers as they arrive: those of one turn of the event loop in one transaction, and only then hand them on."""

import asyncio
from collections.abc import Callable

from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.record import Answer, Response

Outcomes = list[tuple[str, Response | UserError]]  # of requests, by their keys


class Recorder:
    """Answers that arrived in an event loop, on their way to the record.

    Args:
        hand_on: takes the answers that are on record now, or the error of the disk in place of each.
    """

    def __init__(self, cache: ResponseCache, hand_on: Callable[[Outcomes], None]) -> None:
        self.cache, self.hand_on = cache, hand_on
        self.arrived = asyncio.Event()
        self.answers: list[tuple[str, Answer]] = []

    def add(self, key: str, answer: Answer) -> None:
        """Take an answer to the request that is awaited under `key` (its own key differs where fields were refused)."""
        self.answers.append((key, answer))
        self.arrived.set()

    async def run(self) -> None:
        """Record what arrives until cancelled."""
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            self.commit()

    def commit(self) -> None:
        """Record what has arrived."""
        answers, self.answers = self.answers, []
        if not answers:
            return
        try:
            recorded = self.cache.put_all([answer for _, answer in answers])
        except UserError as error:
            self.hand_on([(key, error) for key, _ in answers])
        else:
            self.hand_on([(key, response) for (key, _), response in zip(answers, recorded, strict=True)])
