"""Phrases with and without their full stop. Prompts end in one, whatever a symptom set holds; imports nothing heavy."""


def without_full_stop(phrase: str) -> str:
    """Strip full stops and spaces from the end of a phrase."""
    return phrase.rstrip(". ")


def as_sentence(phrase: str) -> str:
    """End a phrase in exactly one full stop."""
    return f"{without_full_stop(phrase)}."
