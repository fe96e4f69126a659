"""Words: same, naming, unseen, jargon."""

import subprocess
import sys

import pytest

from vipbench.harness.symptoms.words import (
    Names,
    contradicts_itself,
    is_common,
    is_jargon,
    is_phrase,
    is_unseen,
    is_visual,
    names_class,
    same_words,
    words,
)


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("jagged uneven border", "uneven, jagged borders", True),
        ("a jagged border", "Jagged-border", True),
        ("dark brown colour", "brown and dark", True),
        ("dark brown colour", "light brown colour", False),
        ("sharp border", "no sharp border", False),
        ("without a sharp border", "sharp border absent", True),
        ("of the", "of the", True),
        ("of the", "in a", False),
        ("暗い", "暗い", True),
        ("暗い", "明るい", False),
    ],
)
def test_same_words(left: str, right: str, same: bool) -> None:
    assert same_words(left, right) is same is same_words(right, left)


@pytest.mark.parametrize(
    ("text", "name", "named"),
    [
        ("looks like melanoma", "melanoma", True),
        ("melanocytic dots", "melanoma", True),
        ("several nevi", "nevus", True),
        ("like a naevus", "nevus", True),
        ("never round", "nevus", False),
        ("pneumonic patch", "Pneumonia", True),
        ("round cells", "basal cell carcinoma", False),
        ("a carcinoma in the middle", "basal cell carcinoma", True),
        ("Basal-cell carcinomas", "basal_cell_carcinoma", True),
        ("clear lungs", "normal lung", False),
        ("two normal lungs", "normal lung", True),
        ("anemic", "anaemia", True),
        ("das ist ein 黒色腫 hier", "黒色腫", True),
        ("dark", "", False),
    ],
)
def test_naming_a_class(text: str, name: str, named: bool) -> None:
    assert names_class(text, [name]) is named


def test_one_of_many_names_is_found_as_fast_as_one_of_two() -> None:
    """Count the comparisons: 70,000 classes cost a phrase no more than a few that begin alike."""
    names = Names(
        f"{left}{right} disease {number}" for number in range(700) for left in "abcdefghij" for right in "klmnopqrst"
    )
    assert len(names.phrases) == 70_000
    assert names.found_in("looks like ak Diseases 699") and not names.found_in("looks like ak disease 700")
    many = Names([f"{stem}oma" for stem in map(chr, range(ord("a"), ord("z") + 1))] + ["melanoma", "Kaposi sarcoma"])
    assert many.found_in("a few melanomas") and many.found_in("sarcomatous") and not many.found_in("dark border")
    assert max(map(len, many.terms.values())) <= 2
    alike = Names(f"carcinoma of kind {number}" for number in range(700))
    assert alike.found_in("carcinomatous") and sum(map(len, alike.terms.values())) == 1


@pytest.mark.parametrize(
    ("text", "contradicts"),
    [
        ("large small spot", True),
        ("round and not round", True),
        ("round, but not round", True),
        ("even uneven border", True),
        ("border without border", True),
        ("smooth rough surface", True),
        ("thick and thin lines", False),
        ("dark spot with a bright rim", False),
        ("dark border without dark dots", False),
        ("round spot, not dark", False),
        ("light-dark stripes", False),
        ("no clear border", False),
        ("without", False),
        ("several colours such as brown, black and blue", False),
    ],
)
def test_contradictions(text: str, contradicts: bool) -> None:
    assert contradicts_itself(text) is contradicts


FRAGMENTS = (
    "is a|the|of the|and a dark|dark spot with|the colour of|Sunscreen|Malnutrition|tooth|The sun is a star|"
    "I cannot see it|sorry no image|is dark brown|not"
)
PHRASES = (
    "White|round|dark spots|blotchy|has a jagged border|white as snow|the border fades|erythema|not round|many colours"
)


@pytest.mark.parametrize(
    ("text", "phrase"), [(t, False) for t in FRAGMENTS.split("|")] + [(t, True) for t in PHRASES.split("|")]
)
def test_phrases_and_fragments(text: str, phrase: bool) -> None:
    assert is_phrase(text) is phrase


def test_visual_words() -> None:
    assert all(map(is_visual, ("Jagged borders", "reddish", "a few dots", "greyish-white haze over patches")))
    assert not any(map(is_visual, ("Sunscreen", "Fat Dealin", "mopped up", "Blond hair", "")))


UNSEEN = (
    "fever and cough|CRP above 10 mg/L|elevated white blood cell count|family history|warm to the touch|grows over time"
)
SEEN = "smoky grey veil|number of dots|painted look|patches touching the border|transparent edge|raised border|pale optic nerve"


@pytest.mark.parametrize(
    ("text", "unseen"), [(t, True) for t in UNSEEN.split("|")] + [(t, False) for t in SEEN.split("|")]
)
def test_what_no_picture_shows(text: str, unseen: bool) -> None:
    assert is_unseen(text) is unseen


PLAIN = """
speckled jagged brownish blotchy feathery whitish cobblestone streaks bluish ragged uneven fuzzy hazy patchy doughnut
honeycomb flaky scaly bumpy dots wavy crusty freckles threads asymmetrical lopsided blurry waxy ribs lungs diaphragm retina
spiky pigmented vessels milky glands mottled lumpy crescent skull kidney unevenly
"""
JARGON = """
erythematous pleomorphism hyperchromatic telangiectasia opacity consolidation effusion atelectasis reticular acanthosis
papule exudate drusen hypoechoic pedunculated ulceration infiltrate parenchyma edema cardiomegaly interstitial hilar
melanocytic atypical necrosis hyperkeratosis spiculation microaneurysms stenosis bilateral lateral fibrosis
cysts erosions infarcts
"""


def test_jargon_is_told_from_plain_words() -> None:
    assert [word for word in PLAIN.split() if is_jargon(word)] == []
    assert [word for word in JARGON.split() if not is_jargon(word)] == []


def test_gibberish_is_not_common() -> None:
    assert [word for word in ("xqz", "zzkj", "vbnq", "ab") if is_common(word)] == []
    assert all(map(is_common, ("brown", "streaks", "scaly", "speckled")))


def test_words_of_any_script() -> None:
    assert words("Dark-brown, ＡＢ it's_ 漢字\x00") == ["dark", "brown", "ab", "its", "漢字"]


def test_neither_the_command_line_nor_the_rules_about_words_load_what_is_heavy() -> None:
    code = """
import sys
import vipbench.harness.cli
heavy = {"torch", "open_clip", "wordfreq", "snowballstemmer", "prometheus_client", "matplotlib"} & set(sys.modules)
from vipbench.harness.symptoms import filters, sets, words
assert words.is_jargon("telangiectasia") and words.names_class("nevi", ["nevus"])
heavy |= {"torch", "open_clip"} & set(sys.modules)
sys.exit(f"loads {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
