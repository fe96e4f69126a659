"""Captions of drawn lesions: random subsets of their visual attributes in varied words, and never a class.

What can be said of a lesion is a list of facts such as "border=jagged"; each has several wordings.
"""

from collections.abc import Sequence

import numpy as np

from vipbench.harness.demo.attributes import Lesion

WORDINGS: dict[str, tuple[str, ...]] = {
    "symmetry=symmetric": ("symmetric", "symmetric shape", "both halves look the same", "even round shape"),
    "symmetry=slightly asymmetric": ("slightly asymmetric", "slightly lopsided shape", "halves that differ a little"),
    "symmetry=asymmetric": ("asymmetric", "asymmetric shape", "two halves that look different", "lopsided shape"),
    "border=smooth": ("smooth border", "smooth regular outline", "even border", "regular border"),
    "border=uneven": ("uneven border", "slightly wavy outline", "wavy border"),
    "border=jagged": ("jagged border", "irregular border", "notched ragged outline", "irregular jagged outline"),
    "edge=sharp": ("sharp edge", "clear edge", "sharply cut off from the skin", "well defined edge"),
    "edge=soft": ("soft edge", "slightly faded edge"),
    "edge=blurry": ("blurry edge", "edge that fades into the skin", "unclear blurred edge"),
    "size=small": ("small", "small spot", "small in size"),
    "size=medium": ("medium sized", "of medium size"),
    "size=large": ("large", "large spot", "wide and large", "big"),
    "dots=none": ("no dots", "without dots"),
    "dots=few": ("a few dots", "some dots", "few dots"),
    "dots=many": ("many dots", "lots of dots", "covered with dots"),
    "streaks=none": ("no streaks", "without streaks"),
    "streaks=few": ("a few streaks", "some streaks at the edge"),
    "streaks=many": ("many streaks", "streaks all around the edge", "lines radiating from the edge"),
    "veil=none": ("no veil", "without a veil"),
    "veil=present": ("a blue-white veil", "a milky blue veil", "a whitish blue haze"),
    "network=none": ("no net", "without a net of lines"),
    "network=present": ("a net of dark lines", "a fine net", "mesh of brown lines"),
    "surface=smooth": ("smooth surface", "flat smooth surface"),
    "surface=rough": ("rough surface", "rough grainy surface", "warty bumpy surface"),
    "surface=shiny": ("shiny surface", "glossy surface", "pearly bright reflections"),
    "vessels=none": ("no blood vessels", "without red vessels"),
    "vessels=few": ("a few blood vessels", "some thin red vessels"),
    "vessels=many": ("many blood vessels", "many branching red vessels", "tree-like red vessels"),
    "centre=plain": ("plain centre", "nothing special in the middle"),
    "centre=sore": ("an open sore in the centre", "a bleeding red sore in the middle"),
    "centre=crust": ("a yellow crust in the centre", "a dry crust in the middle"),
    "centre=scar": ("a white scar in the centre", "a pale white middle"),
    "colours=1": ("one colour", "a single even colour", "uniform colour"),
    "colours=2": ("two colours", "two different colours"),
    "colours=3": ("three colours", "several colours", "many different colours"),
    "colours=4": ("four colours", "several colours", "many different colours"),
}
COLOUR_WORDINGS = {
    "light brown": ("light brown", "pale brown", "tan"),
    "dark brown": ("dark brown", "deep brown"),
    "black": ("black", "very dark"),
    "red": ("red", "deep red"),
    "pink": ("pink", "pinkish"),
    "yellow": ("yellow", "yellowish"),
    "white": ("white", "whitish"),
    "blue-grey": ("blue-grey", "bluish grey", "grey blue"),
    "brown": ("brown",),
}
for _colour, _words in COLOUR_WORDINGS.items():
    WORDINGS[f"colour={_colour}"] = (*_words, *(f"mostly {word}" for word in _words), f"{_words[0]} colour")
    WORDINGS[f"patch={_colour}"] = tuple(f"{word} {noun}" for word in _words for noun in ("patches", "areas"))
    for _amount in ("few", "many"):
        WORDINGS[f"dots={_amount} {_colour}"] = tuple(f"{_amount} {word} dots" for word in _words)

FACTS = tuple(WORDINGS)
OPENINGS = (
    "",
    "",
    "",
    "a photo of",
    "a spot with",
    "a lesion with",
    "a skin lesion with",
    "a picture of a spot with",
    "skin with",
)
JOINTS = (",", "and", "with")


def facts_of(lesion: Lesion) -> list[str]:
    """List all facts of a lesion that have a wording."""
    facts = [f"colour={lesion.colour}", f"colours={1 + len(lesion.patches)}"]
    facts += [f"patch={colour}" for colour in lesion.patches]
    plain = ("symmetry", "border", "edge", "size", "dots", "streaks", "veil", "network", "surface", "vessels", "centre")
    facts += [f"{name}={getattr(lesion, name)}" for name in plain]
    if lesion.dots != "none":
        facts.append(f"dots={lesion.dots} {lesion.dot_colour}")
    return facts


def fact_flags(facts: Sequence[str]) -> np.ndarray:
    """Flag those of `FACTS` that are in a list: bool [len(FACTS)]."""
    flags = np.zeros(len(FACTS), dtype=bool)
    flags[[FACTS.index(fact) for fact in facts]] = True
    return flags


def caption(facts: Sequence[str], rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """A random caption as a list of pieces (opening, wordings, joints), and the facts that it states.

    One to six of the facts are stated; what a lesion lacks ("no dots") is stated less often than what it has.
    """
    weights = np.array([0.25 if fact.endswith(("=none", "=plain")) else 1.0 for fact in facts])
    count = min(int(rng.choice((1, 1, 2, 2, 3, 4, 5, 6))), len(facts))
    chosen = [facts[place] for place in rng.choice(len(facts), count, replace=False, p=weights / weights.sum())]
    pieces = [str(rng.choice(OPENINGS))]
    for place, fact in enumerate(chosen):
        if place:
            pieces.append(JOINTS[int(rng.integers(len(JOINTS)))])
        pieces.append(WORDINGS[fact][int(rng.integers(len(WORDINGS[fact])))])
    return [piece for piece in pieces if piece] + (["."] if rng.random() < 0.5 else []), chosen


def words_of_captions() -> set[str]:
    """Every word that a caption can hold."""
    texts = [*OPENINGS, *JOINTS, *(text for texts in WORDINGS.values() for text in texts)]
    return {word.strip(",.") for text in texts for word in text.replace("-", " ").split()} - {""}
