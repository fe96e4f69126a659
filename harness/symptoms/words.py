"""Rules about the words of symptoms: same meaning, name of the class, not visible in an image, medical jargon.

The rules are for English; texts in other scripts are compared as they stand. Word frequencies are wordfreq's, on the Zipf
scale (log10 of occurrences per billion words); stems are Snowball's.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import yaml

LISTS_FILE = Path(__file__).with_name("words.yaml")
NO = "no"  # stands for every negation
SAME = 2 / 3  # of the content words of two texts; from here on they mean the same
LISTS = {name: frozenset(text.split()) for name, text in yaml.safe_load(LISTS_FILE.read_text(encoding="utf-8")).items()}
SMALL_WORDS, NEGATIONS, TERMS = (LISTS[name] for name in ("small", "negations", "terms"))
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
    found = words(text)
    return any(_contains_name(text, found, name) for name in names)


def _contains_name(text: str, found: list[str], name: str) -> bool:
    if not name.isascii() and name.casefold() in text.casefold():
        return True
    named = words(name)
    if len(named) == 1:
        return any(_same_term(word, named[0]) for word in found)
    windows = (found[first : first + len(named)] for first in range(len(found) - len(named) + 1))
    if named and any(list(map(stem, window)) == list(map(stem, named)) for window in windows):
        return True
    terms = [word for word in named if is_jargon(word)]
    return any(_same_term(word, term) for word in found for term in terms)


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
