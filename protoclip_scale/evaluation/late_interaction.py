"""Zero-shot classification and retrieval for token-level models (methods 4.3, 7.4): similarities are compared and averaged, never token features.

Templates put a class name at different places, so a mean over templates of the features at one place would mix different words; that is what the published code
does, padding included. Here each prompt is asked as a whole.
"""

from collections.abc import Callable, Iterable

import torch

from protoclip_scale.evaluation.retrieval import figures_of_scores
from protoclip_scale.evaluation.zero_shot import accuracy_figures, constant_accuracy, shared_hits
from protoclip_scale.objectives.late_interaction import Tokens, late_similarities


def class_scores(images: Tokens, prompts: Iterable[Tokens]) -> torch.Tensor:
    """[n, C]: of each class the mean over its prompts of S^I(image, prompt). ``prompts``: the tokens of one class's prompts [P, T, D] after the other's, made when they are asked for.

    Costs 2 n C P T_image T D operations; beside the result one class's similarities [n, P] exist.
    """
    return torch.stack([late_similarities(images, of_class).mean(1) for of_class in prompts], dim=1)


def class_prompts(names: Iterable[str], prompts_of: Callable[[str], list[str]], tokens_of: Callable[[list[str]], Tokens]) -> Iterable[Tokens]:
    """The tokens of each class's prompts in turn: ``prompts_of`` a name are texts, ``tokens_of`` texts their tokens on the images' device."""
    return (tokens_of(prompts_of(name)) for name in names)


def late_zero_shot_figures(scores: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """``zero_shot_figures`` by ``class_scores`` [n, C]; rows with target -1 are left out."""
    scores, targets = scores[targets >= 0], targets[targets >= 0]
    return {**accuracy_figures(shared_hits(scores, targets), targets), "constant": constant_accuracy(targets), "classes": scores.shape[1], "n": len(targets)}


def late_retrieval_figures(images: Tokens, texts: Tokens, caption_text: torch.Tensor, caption_image: torch.Tensor, queries: torch.Tensor | None = None) -> dict[str, float]:
    """``retrieval_figures`` where images ask texts by S^I and texts ask images by S^T.

    ``images`` [n, T, D], ``texts`` [t, T', D]; caption c is the text ``caption_text[c]`` and belongs to the image ``caption_image[c]``.
    """
    return figures_of_scores(
        lambda tile: late_similarities(_those(images, tile), texts)[:, caption_text],
        lambda tile: late_similarities(_those(texts, caption_text[tile]), images),
        len(images.rows),
        caption_image,
        queries,
    )


def _those(tokens: Tokens, rows: torch.Tensor) -> Tokens:
    return Tokens(tokens.rows[rows], tokens.mask[rows])
