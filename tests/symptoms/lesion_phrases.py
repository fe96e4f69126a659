"""A stand-in for an LLM: phrases about the embedded benchmark's classes, some true, some false, some nonsense."""

import hashlib
import json
from typing import Any

import numpy as np

from tests.symptoms.fake_endpoint import FakeEndpoint, Reply, completion
from vipbench.harness.demo.attributes import BROAD
from vipbench.harness.demo.benchmark import CLASSES, distribution
from vipbench.harness.demo.captions import WORDINGS
from vipbench.harness.symptoms.verify import CONTROLS

NONSENSE = """the sun is a star; an awful sun; a quiet train in winter; music from the kitchen; seven green chairs;
the cat sleeps; old letters; bread with butter; happy to be here; a list of words; a tall building;
wind over water; one two three; please read this; new shoes; warm soup; a fast car; the long road home;
blue sky today; open the door; hard work; a silver spoon; a good question; summer rain; a paper boat;
a loud crowd; fresh fish; a garden wall""".replace("\n", " ").split("; ")
OF_EACH = 2  # true, false and nonsensical phrases in an answer


def true_phrases(name: str) -> list[str]:
    """Wordings of the attributes that a class has at least 1.5 times as often as the other classes have on the average."""
    found: list[str] = []
    for attribute in BROAD:
        if attribute.startswith("patch") or attribute == "dot_colour":
            continue
        shares = {other: distribution(other)[attribute] for other in CLASSES}
        for level in BROAD[attribute]:
            own = shares[name][level] / sum(shares[name].values())
            others = np.mean([shares[other][level] / sum(shares[other].values()) for other in CLASSES if other != name])
            if own >= 1.5 * others and level != "none":
                found += WORDINGS[f"{attribute}={level}"]
    return found


KNOWN = {question.text: answer for question, answer in CONTROLS.items()}
TRUE = {name: true_phrases(name) for name in CLASSES}


class PhraseModel:
    """Answers each request with true, false and nonsensical phrases in random order, drawn by the request and a seed.

    Asked to verify a phrase, it believes all but nonsense.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def install(self, endpoint: FakeEndpoint) -> None:
        async def reply(body: dict[str, Any], number: int) -> Reply:
            return 200, completion(self.answer(body))

        endpoint.reply = reply

    def answer(self, body: dict[str, Any]) -> str:
        digest = hashlib.sha256(json.dumps([self.seed, body], sort_keys=True).encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        asked = body["messages"][-1]["content"]
        if "Phrase: " in asked:
            text = asked.split("Phrase: ")[1].split("\n")[0]
            return json.dumps({"answer": "yes" if KNOWN.get(text, text not in NONSENSE) else "no"})
        name = asked.rsplit("Class: ", 1)[1]
        false = [text for other in CLASSES if other != name for text in TRUE[other] if text not in TRUE[name]]
        phrases = [
            str(text) for pool in (TRUE[name], false, NONSENSE) for text in rng.choice(pool, OF_EACH, replace=False)
        ]
        rng.shuffle(phrases)
        return json.dumps({"symptoms": phrases})


def nonsense_texts(seed: int) -> dict[str, list[str]]:
    """Four phrases for each class that have nothing to do with it."""
    rng = np.random.default_rng(seed)
    return {name: [str(text) for text in rng.choice(NONSENSE, 4, replace=False)] for name in CLASSES}
