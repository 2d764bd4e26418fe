"""A held-out set and texts as a model sees them."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from protoclip_scale.evaluation.learned import Rows
from protoclip_scale.evaluation.zero_shot import class_names, prompts
from protoclip_scale.recipe.schema import EvaluationSet

EVERYTHING = sys.maxsize  # as a number of columns


@dataclass(frozen=True, eq=False)
class EncodedSet:
    """What figures are computed from: the decodable rows of a set, ``images`` [n, D] float32 unit rows on the CPU; ``image_prototypes`` [n, P] likewise, P = 0
    without prototypes; ``probe_features`` [n, F], which the linear probe sees; ``places``: the numbers of these rows in the set."""

    settings: EvaluationSet
    images: torch.Tensor
    probe_features: torch.Tensor
    image_prototypes: torch.Tensor
    captions: list[list[str]]
    classes: dict[str, list[str]]
    undecodable: int
    places: list[int]

    def prompts(self, column: str) -> list[str]:
        """All prompts of a class column."""
        return [prompt for name in self.names(column) for prompt in self.prompts_of(name)]

    def prompts_of(self, name: str) -> list[str]:
        """Those of one class."""
        return prompts(name, self.settings.prompt_templates, self.settings.class_words)

    def names(self, column: str) -> list[str]:
        """The classes of a column: those that the set lists, or those that occur."""
        return list(self.settings.classes) or class_names(self.classes[column])

    def labelled(self) -> Rows:
        return Rows(self.images, self.probe_features, self.classes)

    def with_captions(self) -> "EncodedSet":
        """The rows that have a caption: those that take part in retrieval and in the modality figures."""
        rows = [row for row, texts in enumerate(self.captions) if texts]
        own = self.images[rows], self.probe_features[rows], self.image_prototypes[rows], [self.captions[row] for row in rows]
        return EncodedSet(self.settings, *own, {}, self.undecodable, [self.places[row] for row in rows])


class TextRows:
    """Rows of distinct texts, encoded once each, so that equal texts score exactly alike: an embedding of ``width``, and what ``encode`` gives beside it."""

    def __init__(self, texts: Sequence[str], encode: Callable[[list[str]], torch.Tensor], width: int = EVERYTHING):
        ordered = by_length(set(texts))
        self.numbers = {text: number for number, text in enumerate(ordered)}
        rows = encode(ordered) if ordered else torch.empty(0, 0)
        self.rows, self.beside = rows[:, :width], rows[:, width:]

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        return self.rows[[self.numbers[text] for text in texts]]

    def prototypes(self, texts: Sequence[str]) -> torch.Tensor:
        """Their prototype features [n, P]."""
        return self.beside[[self.numbers[text] for text in texts]]


def by_length(texts: Sequence[str] | set[str]) -> list[str]:
    """In an order in which batches of like length leave little padding."""
    return sorted(texts, key=lambda text: (len(text), text))


class Gallery:
    """Images and captions of one or several sets among which those of one set, ``asking``, look for each other; all rows have captions.

    ``texts``: the distinct ones; caption c is ``texts[caption_text[c]]`` and belongs to the image ``caption_image[c]``; ``queries``: the numbers of the asking images, from
    ``first_image`` on.
    """

    def __init__(self, pooled: list[EncodedSet], asking: EncodedSet):
        captions = [own for held_out in pooled for own in held_out.captions]
        before = pooled[: pooled.index(asking)]
        self.texts = list(dict.fromkeys(text for own in captions for text in own))
        numbers = {text: number for number, text in enumerate(self.texts)}
        self.caption_text = torch.tensor([numbers[text] for own in captions for text in own])
        self.caption_image = torch.tensor([image for image, own in enumerate(captions) for _ in own])
        self.first_image = sum(len(held_out.images) for held_out in before)
        self.queries = torch.arange(self.first_image, self.first_image + len(asking.images))


def galleries(sets: dict[str, EncodedSet], pools: dict[str, tuple[str, ...]]) -> dict[str, tuple[list[EncodedSet], EncodedSet]]:
    """By the place of their figures: each captioned set by itself, and each with the others of its galleries (``evaluation.gallery``)."""
    captioned = {name: with_captions for name, held_out in sets.items() if len((with_captions := held_out.with_captions()).images)}
    found = {name: ([own], own) for name, own in captioned.items()}
    for gallery, members in pools.items():
        pooled = [captioned[member] for member in members if member in captioned]
        found |= {f"{gallery}/{asking.settings.name}": (pooled, asking) for asking in pooled}
    return found
