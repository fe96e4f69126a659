"""Rules about the words of symptoms: same meaning, names of classes, visible or not, contradictions, medical jargon.

The rules are for English; texts in other scripts are compared as they stand. Word frequencies are wordfreq's, on the Zipf
scale (log10 of occurrences per billion words); stems are Snowball's.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import yaml

LISTS_FILE = Path(__file__).with_name("words.yaml")
NO = "no"  # stands for every negation
SAME = 2 / 3  # of the content words of two texts; from here on they mean the same
LISTS = {name: frozenset(text.split()) for name, text in yaml.safe_load(LISTS_FILE.read_text(encoding="utf-8")).items()}
SMALL_WORDS, NEGATIONS, TERMS = (LISTS[name] for name in ("small", "negations", "terms"))
OPPOSITES = [[frozenset(side.split(",")) for side in pair.split("/")] for pair in sorted(LISTS["opposites"])]
OPPOSING_PREFIXES = ("un", "ir", "in", "im", "a", "non")
COMMON, EVERYDAY = 2.0, 3.3  # Zipf frequencies: of "blotchy" and more, of "opaque" and more
LATIN_PLURALS = (("us", "i"), ("a", "ae"), ("um", "a"), ("is", "es"), ("on", "a"), ("ma", "mata"))
ENDINGS = ("ness", "like", "ish", "ing", "ies", "ed", "es", "ly", "er", "s", "y", "d", "e")  # of plain English words

UNSEEN = re.compile(
    rf"\b(?:{'|'.join(sorted(LISTS['unseen_beginnings']))})|\b(?:{'|'.join(sorted(LISTS['unseen_words']))})\b",
    re.IGNORECASE,
)
MEASURED = re.compile(
    r"\d\s*(?:%|°|(?:[µmnk]?g|[mµd]l|mmol|mol|iu|mmhg|bpm|kg|hz|fever|days?|hours?|weeks?|months?|years?)\b)"
    r"|\b(?:elevated|raised|low|high|increased|decreased|reduced|abnormal)\s+(?:\w+\s+){0,3}(?:levels?|counts?|pressure|rate|temperature)\b"
    r"|\b(?:blood|lab|liver|kidney)\s+(?:test|count|pressure|sugar|level|work)|\bover time\b|\bsuddenly\b"
    r"|\bto (?:the )?touch\b|\bsore throat\b",
    re.IGNORECASE,
)

LISTED = re.compile(
    rf"[,;:]|\b(?:and|or|but|yet)\b|(?=\b(?:{'|'.join(sorted(NEGATIONS))})\b)", re.IGNORECASE
)  # places where a phrase goes on to another feature
IDENTITY = re.compile(r"\b(?:is|are|was|were) (?:a|an|the)\b", re.IGNORECASE)

# Parts of medical terms of Latin and Greek make: a word with one of these is jargon unless it is an everyday one.
MEDICAL_END = re.compile(
    r"(?:osis|oses|itis|oma|omas|omata|a?emia|oid|oids|plas(?:ia|tic)|trophy|trophic|path(?:y|ic|ology)|ecta(?:sia|sis|tic)|"
    r"cyt(?:e|es|ic|osis)|sclero(?:sis|tic)|uria|penia|megaly|thorax|edema|thema|thematous|ysema|ification|echoic|chroma(?:tic|sia)|"
    r"morph(?:ic|ism|ous)|nuclear|vascular|vascularity|cellular|epithelial|dermal|scop(?:y|ic)|genic|rrhag(?:e|ic)|rrhea|philic|"
    r"enchyma|enchymal|stroma|stromal|mucosa|mucosal|lobar|hilar|apical|basal|medial|distal|proximal|dorsal|ventral|caudal|cranial|"
    r"pleural|venous|opacit(?:y|ies)|exudates?|infiltrates?|effusions?|papules?|macules?|"
    r"pustules?|vesicles?|plaques?|nodul(?:e|es|ar)|lesions?)$"
)
MEDICAL_START = re.compile(
    r"^(?:hyper|hypo|peri|endo|neo|intra|para|cardio|pneumo|broncho|hepat|nephr|neuro|dermo|dermat|melano|kerat|cyto|histo|lympho|"
    r"angio|arteri|fibro|osteo|chondro|granulo|erythr|leuk|telang|necro|patho|onco|adeno|atel|haem|hem[ao]|meta[sp]|dys|pseudo|"
    r"mal(?:ign)|benign|calcif|mitot|mitos|nucle[oi]|vaso|gastro|entero|retino|thromb|ischa?em|oedem|stenos|spicul|arbori[sz]|indurat|pigment)"
)


def words(text: str) -> list[str]:
    """Split a text of any script into words: case folded, hyphens apart."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"[^\W_]+", folded.replace("'", ""))


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """Reduce a word to its Porter2 stem (snowballstem.org/algorithms/english/stemmer.html)."""
    return str(_stemmer().stemWord(word))


def content(text: str) -> frozenset[str]:
    """Collect the stems of a text's words, without small ones and with `NO` for negations; all words where none are left."""
    found = words(text)
    stems = (NO if word in NEGATIONS else stem(word) for word in found if word not in SMALL_WORDS)
    return frozenset(stems) or frozenset(found)


def same_words(left: str, right: str) -> bool:
    """Compare two texts by their content words: two thirds of all are shared, and both or neither are negated."""
    return same_content(content(left), content(right))


def same_content(left: frozenset[str], right: frozenset[str]) -> bool:
    """Compare as `same_words` two texts given by their `content`."""
    if (NO in left) != (NO in right):
        return False
    return len(left & right) >= SAME * len(left | right)


def names_class(text: str, names: Iterable[str]) -> bool:
    """Look in a text for one of the names (a class's, and its synonyms): whole, or a medical term out of it.

    Latin plurals and other endings of the same word count as well: nevi, melanocytic, pneumonic.
    """
    return Names(names).found_in(text)


class Names:
    """Names of classes that are looked for as `names_class` does; the work does not grow with their number."""

    def __init__(self, names: Iterable[str]) -> None:
        self.other_scripts: list[str] = []
        self.phrases: set[tuple[str, ...]] = set()  # stems of names of several words
        self.terms: dict[str, set[str]] = {}  # names of one word and medical terms of others, by their beginning
        self.matched: dict[str, bool] = {}
        for name in names:
            named = words(name)
            if not name.isascii():
                self.other_scripts.append(name.casefold())
            if len(named) > 1:
                self.phrases.add(tuple(map(stem, named)))
            for term in named if len(named) == 1 else filter(is_jargon, named):
                self.terms.setdefault(_beginning(term), set()).add(term)
        self.lengths = sorted({len(phrase) for phrase in self.phrases})

    def found_in(self, text: str) -> bool:
        """Return True where the text holds one of the names."""
        if self.other_scripts and not text.isascii():
            folded = text.casefold()
            if any(name in folded for name in self.other_scripts):
                return True
        found = words(text)
        return any(map(self._matches, found)) or self._holds_phrase(list(map(stem, found)))

    def _matches(self, word: str) -> bool:
        if word not in self.matched:
            terms = self.terms.get(_beginning(word), ())
            self.matched[word] = any(_same_term(word, term) for term in terms)
        return self.matched[word]

    def _holds_phrase(self, stems: list[str]) -> bool:
        return any(
            tuple(stems[first : first + length]) in self.phrases
            for length in self.lengths
            for first in range(len(stems) - length + 1)
        )


def _beginning(word: str) -> str:
    return re.sub("[ao]e", "e", word)[:3]


def _same_term(word: str, term: str) -> bool:
    word, term = (re.sub("[ao]e", "e", spelling) for spelling in (word, term))  # British and American
    if word == term or stem(word) == stem(term):
        return True
    for singular, plural in LATIN_PLURALS:
        bases = (term.removesuffix(singular), term.removesuffix(plural))
        if {word, term} in ({base + singular, base + plural} for base in bases):
            return True
    common = len(term) * 3 // 4
    return len(term) >= 6 and term.isascii() and word.startswith(term[:common])


def is_unseen(text: str) -> bool:
    """Find in a text what no image shows: laboratory values, history, feelings, sounds, causes, treatment."""
    return bool(UNSEEN.search(text.replace("-", " ")) or MEASURED.search(text))


def is_visual(text: str) -> bool:
    """Find in a text a word for what a picture can show: a colour, shape, texture, border, size or place (`visual`)."""
    return any(stem(word) in _visual_stems() for word in words(text))


@lru_cache(maxsize=1)
def _visual_stems() -> frozenset[str]:
    return frozenset(map(stem, LISTS["visual"]))


def contradicts_itself(text: str) -> bool:
    """Find opposite adjectives next to each other ("large small spot"), or a feature and its negation ("round, not round").

    Opposites that are listed ("thick and thin lines", "dark spot, bright rim") are of several things, and pass.
    """
    folded = text.casefold().split()
    if any(_opposite(left, right) for left, right in pairwise(folded)):
        return True
    parts = [content(part) for part in LISTED.split(text) if words(part)]
    stated = [part for part in parts if NO not in part]
    return any(part > {NO} and any(part - {NO} <= other for other in stated) for part in parts)


def _opposite(left: str, right: str) -> bool:
    if any(
        {left, right} == {prefix + word for prefix in (opposing, "")}
        for opposing in OPPOSING_PREFIXES
        for word in (left, right)
    ):
        return True
    return any((left in one and right in other) or (right in one and left in other) for one, other in OPPOSITES)


def is_phrase(text: str) -> bool:
    """Judge whether a text is a phrase about a picture.

    Not so are fragments ("is a", "the edge of"), single words that neither show anything nor are medical terms, statements
    of what something is ("the sun is a star"), and talk ("I cannot").
    """
    found = words(text)
    if not found or all(word in SMALL_WORDS or word in NEGATIONS for word in found):
        return False
    if len(found) == 1:
        return is_visual(text) or is_jargon(found[0])
    if found[0] in LISTS["opening"] or found[-1] in LISTS["unfinished"]:
        return False
    return not IDENTITY.search(text) and not LISTS["talk"].intersection(found)


@lru_cache(maxsize=100_000)
def is_jargon(word: str) -> bool:
    """Judge whether a word (folded) needs medical training.

    Jargon is a rare word; a word of Latin and Greek parts below the frequency of everyday words; and the terms that are
    too common for both measures (`TERMS`).
    """
    if word in TERMS:
        return True
    medical = MEDICAL_END.search(word) or MEDICAL_START.search(word)
    return not word.isdigit() and _frequency(word) < (EVERYDAY if medical else COMMON)


@lru_cache(maxsize=100_000)
def is_common(word: str) -> bool:
    """Judge whether a word of three letters or more is one that most readers of English have met."""
    return len(word) >= 3 and _frequency(word) >= COMMON


def _frequency(word: str) -> float:
    """The Zipf frequency of the commonest form of a word: itself, or without a plain English ending (scal-y: scale)."""
    from wordfreq import zipf_frequency

    cut = [word[: -len(ending)] for ending in ENDINGS if word.endswith(ending) and len(word) - len(ending) >= 3]
    doubled = [form[:-1] for form in cut if form[-1] == form[-2]]
    bare = word.removeprefix("un")
    forms = [word, *cut, *(form + "e" for form in cut), *doubled, *([bare] if len(bare) >= 3 else [])]
    return max(zipf_frequency(form, "en") for form in forms)


@lru_cache(maxsize=1)
def _stemmer():  # type: ignore[no-untyped-def]  # snowballstemmer gives no types
    import snowballstemmer

    return snowballstemmer.stemmer("english")
