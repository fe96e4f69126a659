"""Phrases as prompts hold them: with one full stop at the end, whatever a symptom set holds; imports nothing heavy."""


def spoken(name: str) -> str:
    """Write a name as it stands in a sentence: underscores are spaces."""
    return name.replace("_", " ")


def without_full_stop(phrase: str) -> str:
    """Strip full stops and spaces from the end of a phrase."""
    return phrase.rstrip(". ")


def as_sentence(phrase: str) -> str:
    """End a phrase in exactly one full stop."""
    return f"{without_full_stop(phrase)}."
