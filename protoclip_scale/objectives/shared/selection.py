"""Which tokens of a sample are gathered as keys of a late interaction (methods 4.1); queries keep all of theirs. No gradient reaches the choice."""

import math

import torch

from protoclip_scale.objectives.shared.late_interaction import TILE_ELEMENTS, Tokens


def kept_tokens(share: float, num_tokens: int) -> int:
    """A share of the places for tokens, rounded up."""
    return max(1, min(num_tokens, math.ceil(share * num_tokens)))


@torch.no_grad()
def highest_scores(images: Tokens, texts: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's rule: each token's highest similarity to any token of any text (image) of the same group of rows; [b, T_image] and [b, T_text].

    Costs one product of all pairs of tokens, made in chunks of texts.
    """
    image_rows, text_rows = (each.rows.masked_fill(~each.mask[..., None], 0) for each in (images, texts))
    (b, width), num_tokens = (len(image_rows), image_rows.shape[2]), text_rows.shape[1]
    flat_images, image_absent = image_rows.reshape(-1, width), ~images.mask.reshape(-1, 1)
    of_images = torch.full(flat_images.shape[:1], -torch.inf, dtype=image_rows.dtype, device=image_rows.device)
    of_texts = []
    size = max(1, TILE_ELEMENTS.get(image_rows.device.type, TILE_ELEMENTS["cpu"]) // (len(flat_images) * num_tokens))
    for chunk in Tokens(text_rows, texts.mask).split(size):
        pairs = flat_images @ chunk.rows.reshape(-1, width).T
        of_images = torch.maximum(of_images, pairs.masked_fill(~chunk.mask.reshape(-1), -torch.inf).amax(1))
        of_texts.append(pairs.masked_fill_(image_absent, -torch.inf).amax(0).view(-1, num_tokens))
    return of_images.view(b, -1), torch.cat(of_texts)


@torch.no_grad()
def own_scores(images: Tokens, texts: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """The published code's rule: each token's sum of similarities to the tokens of its own partner; here to those that count, there to padding too."""
    image_rows, text_rows = (each.rows.masked_fill(~each.mask[..., None], 0) for each in (images, texts))
    return (image_rows @ text_rows.sum(1)[..., None])[..., 0], (text_rows @ image_rows.sum(1)[..., None])[..., 0]


def keep_best(tokens: Tokens, scores_BT: torch.Tensor, keep: int) -> torch.Tensor:
    """[B, keep, D]: the tokens with the highest scores, the earlier of equal ones; rows of zeros where a sample has fewer (see ``present``). Gradients reach the tokens."""
    order = scores_BT.masked_fill(~tokens.mask, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :keep]
    kept = tokens.rows.gather(1, order[..., None].expand(-1, -1, tokens.rows.shape[2]))
    return kept.masked_fill(~tokens.mask.gather(1, order)[..., None], 0)
