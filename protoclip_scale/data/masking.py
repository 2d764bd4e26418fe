"""Tokens hidden for masked language modelling (methods 3.2, item 3)."""

from collections.abc import Sequence

import numpy as np
import torch

from protoclip_scale.data.tokenizers import Tokens

IGNORED = -100  # torch's cross-entropy leaves such labels out
SELECTED_SHARE, MASKED_SHARE, RANDOM_SHARE = 0.15, 0.8, 0.1  # of the tokens; of the selected ones; the rest of those is kept


def mask_tokens(tokens: Tokens, tokenizer, generators: Sequence[np.random.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), both int64 [B, C]: each token that is not special is selected with probability 0.15; of those 80% become the mask token, 10% a uniformly
    drawn ordinary token and 10% stay. Labels are the true ids where selected and -100 elsewhere, so -100 everywhere in a row without a selected token.

    ``generators``: one per row; a row's draws depend on its own length and nothing else. Start, end and other special tokens are never selected nor drawn, and
    what lies beyond a row's length is never selected, whatever its id. The tokenizer must have a mask token: ``tokenizer_for(text, mask=True)``. 20 microseconds a row.
    """
    assert len(generators) == len(tokens.ids) and tokenizer.mask_id is not None
    mask_id, ordinary_ids = tokenizer.mask_id, tokenizer.ordinary_ids
    ids = tokens.ids.numpy().copy()
    labels = np.full_like(ids, IGNORED)
    ordinary = np.isin(ids, tokenizer.special_ids, invert=True)
    for row, (length, rng) in enumerate(zip(tokens.lengths.tolist(), generators, strict=True)):
        selection, action = rng.random((2, length))
        drawn = ordinary_ids[rng.integers(len(ordinary_ids), size=length)]
        selected = ordinary[row, :length] & (selection < SELECTED_SHARE)
        labels[row, :length][selected] = ids[row, :length][selected]
        hidden = np.where(action < MASKED_SHARE, mask_id, np.where(action < MASKED_SHARE + RANDOM_SHARE, drawn, ids[row, :length]))
        ids[row, :length][selected] = hidden[selected]
    return torch.from_numpy(ids), torch.from_numpy(labels)
