"""Captions that are equal within a batch: keys to find them by."""

import torch

_MULTIPLIERS = (-7046029254386353131, -4417276706812531889, 1609587929392839161)  # odd, so that no information is lost modulo 2**64 (those of xxHash)


def caption_keys(token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """int64 [B]: equal for equal tokens before ``lengths`` [B], whatever stands behind them in ``token_ids`` [B, C]; different else, but for one pair in 2**64.

    A hash rather than the tokens: it is gathered in every step.
    """
    first, second, third = _MULTIPLIERS
    places = torch.arange(token_ids.shape[1], device=token_ids.device)
    mixed = (token_ids + 1) * first + (places + 1) * second
    mixed = (mixed ^ (mixed >> 29)) * third
    mixed = mixed ^ (mixed >> 32)
    inside = places < lengths.to(token_ids.device)[:, None]
    return (mixed * second).masked_fill_(~inside, 0).sum(1) * first
