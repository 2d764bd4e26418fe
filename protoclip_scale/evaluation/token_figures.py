"""Figures by late interaction between tokens, of all sets of a suite."""

from collections.abc import Callable

import torch

from protoclip_scale import collectives
from protoclip_scale.evaluation.encoded import EncodedSet, galleries
from protoclip_scale.evaluation.late_interaction import (
    Pairs,
    Questions,
    late_retrieval_figures,
    late_zero_shot_figures,
    questions_of_classes,
    questions_of_texts,
)
from protoclip_scale.evaluation.ranking import TOKENS
from protoclip_scale.evaluation.token_scores import TokenEncoder, late_scores
from protoclip_scale.evaluation.zero_shot import targets_of
from protoclip_scale.recipe.schema import Evaluation

Pixels = Callable[[range], tuple[torch.Tensor, torch.Tensor]]


def token_figures(settings: Evaluation, sets: dict[str, EncodedSet], pixels_of: Callable[[str], tuple[Pixels, int]], encoder: TokenEncoder) -> dict[str, float]:
    """``SET/zero_shot_tokens/COLUMN/...``, ``SET/retrieval_tokens/...`` and ``GALLERY/SET/retrieval_tokens/...``, with the same figures as without ``_tokens``; a collective.

    ``pixels_of`` a set gives what reads its images, and how many there are. Cost: see ``late_scores``; rank 0 keeps a set's similarities with captions until its galleries are
    done, and takes up to three times the memory of those with the classes of a column to make its figures.
    """
    work = _Work(settings, sets)
    for name in sets:
        asked = work.questions(name)
        if asked:
            _of_set(work, name, asked, pixels_of(name), encoder)
    return collectives.from_rank_zero(lambda: work.figures)


def _of_set(work: "_Work", name: str, asked: list[Questions], pixels: tuple[Pixels, int], encoder: TokenEncoder) -> None:
    """A function, so that the answers are gone before those of the next set come."""
    answers = late_scores(encoder, *pixels, asked)
    collectives.from_rank_zero_patiently(lambda: work.take(name, asked, answers), encoder.meanwhile)


class _Work:
    """What is asked of each set, and the figures so far, which rank 0 has."""

    def __init__(self, settings: Evaluation, sets: dict[str, EncodedSet]):
        self.sets, self.galleries = sets, galleries(sets, settings.gallery)
        self.waiting = dict(self.galleries)
        self.captioned = {asking.settings.name: asking for _, asking in self.galleries.values()}
        self.pairs: dict[str, Pairs] = {}
        self.figures: dict[str, float] = {}

    def _columns(self, name: str) -> dict[str, list[str]]:
        """The class columns of a set that have rows, with their classes."""
        held_out = self.sets[name]
        columns = {column: held_out.names(column) for column in held_out.classes}
        return {column: names for column, names in columns.items() if (targets_of(held_out.classes[column], names) >= 0).any()}

    def questions(self, name: str) -> list[Questions]:
        """One of each class column, then the captions of all galleries that the set is in."""
        asked = [questions_of_classes(names, self.sets[name].prompts_of) for names in self._columns(name).values()]
        if name in self.captioned:
            companions = [each for pooled, _ in self.galleries.values() if self.captioned[name] in pooled for each in pooled]
            texts = {text for each in companions for own in each.captions for text in own}
            asked.append(questions_of_texts(sorted(texts)))
        return asked

    def take(self, name: str, asked: list[Questions], answers: list[list[torch.Tensor]]) -> None:
        """A set's answers: its figures, and those of galleries that waited for it."""
        held_out, columns = self.sets[name], self._columns(name)
        for (column, names), (scores,) in zip(columns.items(), answers, strict=False):
            targets = torch.full((len(scores),), -1)
            targets[held_out.places] = targets_of(held_out.classes[column], names)
            found = late_zero_shot_figures(scores, targets, held_out.settings.chosen_metric)
            self.figures |= {f"{name}/zero_shot{TOKENS}/{column}/{key}": value for key, value in found.items()}
        if name not in self.captioned:
            return
        self.pairs[name] = Pairs(*answers[-1], {text: number for number, text in enumerate(asked[-1].texts)}, torch.tensor(self.captioned[name].places))
        for place, (pooled, asking) in list(self.waiting.items()):
            if all(each.settings.name in self.pairs for each in pooled):
                found = late_retrieval_figures(pooled, asking, self.pairs)
                self.figures |= {f"{place}/retrieval{TOKENS}/{key}": value for key, value in found.items()}
                del self.waiting[place]
        needed = {each.settings.name for pooled, _ in self.waiting.values() for each in pooled}
        self.pairs = {each: kept for each, kept in self.pairs.items() if each in needed}
