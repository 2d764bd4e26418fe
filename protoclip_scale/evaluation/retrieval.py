"""Image-text retrieval with several captions per image and fair ties (methods 7.4)."""

from collections.abc import Callable

import torch

Scores = Callable[[torch.Tensor], torch.Tensor]  # numbers of queries -> their scores [q, everything that may answer]
RECALLS = (1, 5, 10)
TOLERANCE = 1e-6  # cosines closer than this are ties: the kernels of a matrix product round equal rows differently
TILE_SCORES = 1 << 24


def hit_probability(greater: torch.Tensor, ties: torch.Tensor, own: torch.Tensor, k: int) -> torch.Tensor:
    """Probability that a correct item is among the first k when tied items stand in random order; float64, any shape.

    ``greater`` items score strictly more than the best correct one, ``ties`` wrong ones score the same, and ``own`` >= 1 correct
    ones do. Without ties this is the usual 0 or 1.
    """
    places = (k - greater).clamp(min=0)
    miss = torch.ones_like(greater, dtype=torch.float64)
    for place in range(k):
        wrong_left = (ties - place).clamp(min=0).double()
        miss = torch.where(place < places, miss * wrong_left / (ties + own - place).clamp(min=1), miss)
    return 1 - miss


def image_to_text_counts(scores_of: Scores, caption_image: torch.Tensor, queries: torch.Tensor):
    """``(greater, ties, own)`` of each query image against all captions, judged at its best caption; int64 [q] each. ``scores_of``: [q, captions] of some images."""
    rows = []
    for tile in queries.split(max(1, TILE_SCORES // len(caption_image))):
        scores = scores_of(tile)
        correct = caption_image[None, :] == tile[:, None]
        best = scores.masked_fill(~correct, -torch.inf).amax(dim=1, keepdim=True)
        tied = (scores - best).abs() <= TOLERANCE
        rows.append(torch.stack([(scores > best + TOLERANCE).sum(1), (tied & ~correct).sum(1), (tied & correct).sum(1)]))
    return torch.cat(rows, dim=1).unbind()


def text_to_image_counts(scores_of: Scores, caption_image: torch.Tensor, num_images: int, queries: torch.Tensor):
    """``(greater, ties, own)`` of each query caption's image among all images; int64 [q] each. ``scores_of``: [q, images] of some captions."""
    rows = []
    for tile in queries.split(max(1, TILE_SCORES // num_images)):
        scores = scores_of(tile)
        correct = scores.gather(1, caption_image[tile][:, None])
        ties = ((scores - correct).abs() <= TOLERANCE).sum(1) - 1
        rows.append(torch.stack([(scores > correct + TOLERANCE).sum(1), ties, torch.ones_like(ties)]))
    return torch.cat(rows, dim=1).unbind()


def retrieval_figures(images: torch.Tensor, texts: torch.Tensor, caption_text: torch.Tensor, caption_image: torch.Tensor, queries: torch.Tensor | None = None) -> dict[str, float]:
    """R@1, R@5 and R@10 both ways and their mean, as shares in [0, 1], among all the images and captions given.

    ``images`` [n, D] and ``texts`` [t, D] are unit rows; caption c is the text ``caption_text[c]`` and belongs to the image
    ``caption_image[c]``; every image has a caption. ``queries`` (image numbers; default all) and their captions ask, everything answers.

    An image finds its best caption, a caption its one image. Ties are broken at random, in expectation: the rank of a correct item is
    the number of items strictly above it plus a uniform draw among those level with it, and R@k is the expected share of hits. So a
    collapsed model scores chance, where argsort may give it anything. Two images with the same caption text have one caption each:
    the other's counts as wrong but always ties, so that a perfect model gets half a hit at 1 for such a pair.

    ``chance_R@10`` is 10/n, n the number of images in the gallery; ``chance_mean_recall`` is exactly what a collapsed model scores,
    which is more where images have several captions. Cost: both products of q queries with the gallery, in tiles of 2**24 scores.
    """
    return figures_of_scores(lambda tile: (images[tile] @ texts.T)[:, caption_text], lambda tile: texts[caption_text[tile]] @ images.T, len(images), caption_image, queries)


def figures_of_scores(scores_of_images: Scores, scores_of_captions: Scores, num_images: int, caption_image: torch.Tensor, queries: torch.Tensor | None = None) -> dict[str, float]:
    """``retrieval_figures`` by any scores, which may differ by direction: those [q, captions] of some images, and those [q, images] of some captions."""
    queries = torch.arange(num_images) if queries is None else queries
    asking = torch.zeros(num_images, dtype=torch.bool)
    asking[queries] = True
    directions = {
        "image_to_text": image_to_text_counts(scores_of_images, caption_image, queries),
        "text_to_image": text_to_image_counts(scores_of_captions, caption_image, num_images, asking[caption_image].nonzero()[:, 0]),
    }
    figures = {f"{direction}/R@{k}": hit_probability(*counts, k).mean().item() for direction, counts in directions.items() for k in RECALLS}
    captions_of = torch.bincount(caption_image, minlength=num_images)[queries]
    nothing = torch.zeros_like(captions_of)
    by_captions = [hit_probability(nothing, len(caption_image) - captions_of, captions_of, k).mean().item() for k in RECALLS]
    by_images = [min(1.0, k / num_images) for k in RECALLS]
    return {
        **figures,
        "mean_recall": sum(figures.values()) / len(figures),
        "chance_R@10": by_images[-1],
        "chance_mean_recall": sum(by_captions + by_images) / len(figures),
        "n": num_images,
        "captions": len(caption_image),
    }
