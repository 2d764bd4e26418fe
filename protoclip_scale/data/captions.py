"""From the captions of a row to the one text that trains."""

import numpy as np


def clean_caption(text: str) -> str:
    """Control characters and runs of white space become one space; the ends are trimmed. Tokenizers do the rest."""
    if text.isprintable():
        return " ".join(text.split())
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def first_caption(captions: list[str], rng: np.random.Generator | None) -> str:
    """The first that is not empty; draws nothing."""
    return captions[0]


def random_caption(captions: list[str], rng: np.random.Generator) -> str:
    """One of them, uniformly."""
    return captions[int(rng.integers(len(captions)))]


def joined_captions(captions: list[str], rng: np.random.Generator | None) -> str:
    """All that differ, in order, as sentences; draws nothing."""
    return ". ".join(dict.fromkeys(captions))


CHOICES = {"first": first_caption, "random": random_caption, "join": joined_captions}


def choose_caption(captions: list[str], how: str, rng: np.random.Generator | None) -> str:
    """The cleaned caption that ``data.caption`` asks for; '' if none has any text. Only random needs a generator."""
    cleaned = [text for text in map(clean_caption, captions) if text]
    return CHOICES[how](cleaned, rng) if cleaned else ""
