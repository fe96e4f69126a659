"""What the words of a symptom tell: whether two say the same, one names its class, speaks of the unseen, or needs a doctor.

Rules about words of English; texts in other scripts are compared as they stand.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import yaml

LISTS_FILE = Path(__file__).with_name("words.yaml")
NO = "no"
SAME = 2 / 3  # of the words of either text: from here on two texts say the same
LISTS = {name: frozenset(text.split()) for name, text in yaml.safe_load(LISTS_FILE.read_text(encoding="utf-8")).items()}
SMALL_WORDS, NEGATIONS, TERMS, PLAIN = (LISTS[name] for name in ("small", "negations", "terms", "plain"))
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

# Parts of medical terms of Latin and Greek make; a word with one of these that is rare in everyday text is taken for jargon.
MEDICAL_END = re.compile(
    r"(?:osis|oses|itis|oma|omas|omata|a?emia|oid|oids|plas(?:ia|tic)|trophy|trophic|path(?:y|ic|ology)|ecta(?:sia|sis|tic)|"
    r"cyt(?:e|es|ic|osis)|sclero(?:sis|tic)|uria|penia|megaly|thorax|edema|thema|thematous|ysema|ification|echoic|chroma(?:tic|sia)|"
    r"morph(?:ic|ism|ous)|nuclear|vascular|vascularity|cellular|epithelial|dermal|scop(?:y|ic)|genic|rrhag(?:e|ic)|rrhea|philic|"
    r"enchyma|enchymal|stroma|stromal|mucosa|mucosal|lobar|hilar|apical|basal|medial|distal|proximal|dorsal|ventral|caudal|cranial|"
    r"pleural|venous|intense|dense|lucent|lucency|opaque|opacit(?:y|ies)|exudates?|infiltrates?|effusions?|papules?|macules?|"
    r"pustules?|vesicles?|plaques?|nodul(?:e|es|ar)|lesions?)$"
)
MEDICAL_START = re.compile(
    r"^(?:hyper|hypo|peri|endo|neo|intra|para|cardio|pneumo|broncho|hepat|nephr|neuro|dermo|dermat|melano|kerat|cyto|histo|lympho|"
    r"angio|arteri|fibro|osteo|chondro|granulo|erythr|leuk|telang|necro|patho|onco|adeno|atel|haem|hem[ao]|meta[sp]|dys|pseudo|"
    r"mal(?:ign)|benign|calcif|mitot|mitos|nucle[oi]|vaso|gastro|entero|retino|thromb|ischa?em|oedem|stenos|spicul|arbori[sz]|indurat|pigment)"
)


def words(text: str) -> list[str]:
    """The words of a text, case folded, hyphens apart; of any script."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.findall(r"[^\W_]+", folded.replace("'", ""))


def stem(word: str) -> str:
    """A word without a common English ending; at least three letters stay."""
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return stem(word[: -len(ending)])
    return word


def content(text: str) -> frozenset[str]:
    """What a text says: the stems of its words but for small ones, `NO` for negations; all words, where nothing else is left."""
    found = words(text)
    stems = (NO if word in NEGATIONS else stem(word) for word in found if word not in SMALL_WORDS)
    return frozenset(stems) or frozenset(found)


def same_words(left: str, right: str) -> bool:
    """Whether two texts say the same: two thirds of all their content words are shared, and both or neither are negated."""
    return same_content(content(left), content(right))


def same_content(left: frozenset[str], right: frozenset[str]) -> bool:
    """`same_words` of two texts given by their `content`."""
    if (NO in left) != (NO in right):
        return False
    return len(left & right) >= SAME * len(left | right)


def names_class(text: str, names: Iterable[str]) -> bool:
    """Whether a text holds one of the names (a class's, and its synonyms): whole, or a medical term out of it.

    Latin plurals and other endings of the same word count as well: nevi, melanocytic, pneumonic.
    """
    said = words(text)
    return any(_holds(text, said, words(name), name) for name in names)


def _holds(text: str, said: list[str], named: list[str], name: str) -> bool:
    if not name.isascii() and name.casefold() in text.casefold():
        return True
    if len(named) == 1:
        return any(_same_term(word, named[0]) for word in said)
    windows = (said[first : first + len(named)] for first in range(len(said) - len(named) + 1))
    if named and any(list(map(stem, window)) == list(map(stem, named)) for window in windows):
        return True
    terms = [word for word in named if is_jargon(word)]
    return any(_same_term(word, term) for word in said for term in terms)


def _same_term(word: str, term: str) -> bool:
    word, term = (re.sub("[ao]e", "e", spelling) for spelling in (word, term))  # British and American
    if word == term or stem(word) == stem(term):
        return True
    for singular, plural in LATIN_PLURALS:
        if {word, term} in (
            {stem + singular, stem + plural} for stem in (term.removesuffix(singular), term.removesuffix(plural))
        ):
            return True
    common = len(term) * 3 // 4
    return len(term) >= 6 and term.isascii() and word.startswith(term[:common])


def is_unseen(text: str) -> bool:
    """Whether a text speaks of what no picture shows: laboratory values, history, feelings, sounds, causes, treatment."""
    return bool(UNSEEN.search(text.replace("-", " ")) or MEASURED.search(text))


@lru_cache(maxsize=100_000)
def is_jargon(word: str) -> bool:
    """Whether a word (folded) needs medical training.

    Measured, not only listed: CLIP's byte-pair vocabulary was merged by frequency over the captions of the web, so a word
    that everybody uses is one piece there and a term of a trade is many. Jargon is a word of three pieces or more; of two,
    if it is built of Latin and Greek parts; and the terms that are common enough to be missed by both (`TERMS`).
    Endings of plain English (-ish, -ly, -ness) do not count as pieces.
    """
    if word in PLAIN or stem(word) in PLAIN or word.isdigit():
        return False
    if word in TERMS:
        return True
    pieces = min(_pieces(form) for form in _forms(word))
    medical = bool(MEDICAL_END.search(word) or MEDICAL_START.search(word))
    return pieces >= 3 or (pieces == 2 and medical)


@lru_cache(maxsize=100_000)
def is_common(word: str) -> bool:
    """Whether a word of three letters or more is (but for its ending) one piece of CLIP's vocabulary."""
    return len(word) >= 3 and (word in PLAIN or min(_pieces(form) for form in _forms(word)) == 1)


def _forms(word: str) -> list[str]:
    """A word, and what is left without one plain English ending, or with "e" in its place (scal-y, scale)."""
    cut = [word[: -len(ending)] for ending in ENDINGS if word.endswith(ending) and len(word) - len(ending) >= 3]
    doubled = [form[:-1] for form in cut if form[-1] == form[-2]]
    bare = word.removeprefix("un")
    return [word, *cut, *(form + "e" for form in cut), *doubled, *([bare] if len(bare) >= 3 else [])]


def _pieces(word: str) -> int:
    return len(_tokenizer().encode(word))


@lru_cache(maxsize=1)
def _tokenizer():  # type: ignore[no-untyped-def]  # open_clip gives no types
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()
