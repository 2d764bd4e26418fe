"""Zero-shot classification and retrieval for token-level models (methods 4.3, 7.4): similarities are compared and averaged, never token features.

Templates put a class name at different places, so a mean over templates of the features at one place would mix different words; that is what the published code
does, padding included. Here each prompt is asked as a whole.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from protoclip_scale.evaluation.encoded import EncodedSet, Gallery, by_length
from protoclip_scale.evaluation.ranking import ranking_figures_of_scores
from protoclip_scale.evaluation.retrieval import figures_of_scores
from protoclip_scale.evaluation.zero_shot import accuracy_figures, constant_accuracy, shared_hits
from protoclip_scale.objectives.shared.late_interaction import Tokens, late_similarities


class Questions(NamedTuple):
    """Texts [t] that all images of a set are compared with. The similarity with text p counts ``shares[p]`` times in column ``columns[p]`` of ``num_columns``.
    ``both``: those by which texts ask images (S^T) are wanted besides those by which images ask texts (S^I)."""

    texts: list[str]
    columns: torch.Tensor
    shares: torch.Tensor
    num_columns: int
    both: bool = False


def questions_of_classes(names: Sequence[str], prompts_of: Callable[[str], list[str]]) -> Questions:
    """A column for each class: the mean over its prompts of S^I(image, prompt)."""
    of_classes = enumerate(map(prompts_of, names))
    asked = sorted(((prompt, place, 1 / len(own)) for place, own in of_classes for prompt in own), key=lambda each: (len(each[0]), each))
    prompts, columns, shares = zip(*asked, strict=True)
    return Questions(list(prompts), torch.tensor(columns), torch.tensor(shares), len(names))


def questions_of_texts(texts: Sequence[str]) -> Questions:
    """A column for each distinct text, in both directions."""
    ordered = by_length(set(texts))
    return Questions(ordered, torch.arange(len(ordered)), torch.ones(len(ordered)), len(ordered), both=True)


def add_similarities(answers: Sequence[torch.Tensor], images: Tokens, texts: Tokens, columns: torch.Tensor, shares: torch.Tensor) -> None:
    """Add to ``answers``, one or two [r, num_columns] on the CPU, the similarities of the last r of b images with some texts of ``Questions``: S^I(image, text), then S^T(text, image).

    Costs 2 b t T_image T_text D operations for each.
    """
    for answer, similarities in zip(answers, (lambda: late_similarities(images, texts), lambda: late_similarities(texts, images).T), strict=False):
        answer.index_add_(1, columns, similarities()[-len(answer) :].cpu() * shares)  # on the CPU: a GPU would add in any order


def late_zero_shot_figures(scores: torch.Tensor, targets: torch.Tensor, metric: str = "top1") -> dict[str, float]:
    """``zero_shot_figures`` and ``ranking_figures`` by the scores [n, C] of ``questions_of_classes``; rows with target -1 are left out. Holds up to three times the
    memory of the scores besides."""
    if (targets < 0).any():
        scores, targets = scores[targets >= 0], targets[targets >= 0]
    figures = {**accuracy_figures(shared_hits(scores, targets), targets), "constant": constant_accuracy(targets), "classes": scores.shape[1], "n": len(targets)}
    return figures | ranking_figures_of_scores(scores, targets, figures["top1"], metric)


class Pairs(NamedTuple):
    """Similarities of a set's images with the texts of ``numbers`` (text -> column), [images, t] each: S^I, by which images ask texts, and S^T, by which texts ask images.
    ``rows``: those of its captioned images."""

    of_images: torch.Tensor
    of_texts: torch.Tensor
    numbers: Mapping[str, int]
    rows: torch.Tensor

    def columns(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([self.numbers[text] for text in texts])


def late_retrieval_figures(pooled: list[EncodedSet], asking: EncodedSet, pairs: Mapping[str, Pairs]) -> dict[str, float]:
    """``retrieval_figures`` where images ask texts by S^I and texts ask images by S^T. ``pairs``: of each of the ``pooled`` sets, by its name, with the texts of all;
    nothing of their size is held besides."""
    gallery, own = Gallery(pooled, asking), pairs[asking.settings.name]
    captions = own.columns(gallery.texts)[gallery.caption_text]
    columns = [(pairs[held_out.settings.name], pairs[held_out.settings.name].columns(gallery.texts)) for held_out in pooled]
    return figures_of_scores(
        lambda tile: own.of_images[own.rows[tile - gallery.first_image][:, None], captions],
        lambda tile: torch.cat([of_set.of_texts[of_set.rows[:, None], places[gallery.caption_text[tile]]].T for of_set, places in columns], dim=1),
        sum(len(held_out.images) for held_out in pooled),
        gallery.caption_image,
        gallery.queries,
    )
