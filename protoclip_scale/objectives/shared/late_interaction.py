"""Late interaction between sets of tokens (FILIP, methods 4.1), without the similarities of all pairs of tokens.

A query i has tokens Q_ik (k in M_i), a key sample j tokens K_jr (r in M_j). Their similarity is  S(i, j) = 1/|M_i| sum_k max_r Q_ik K_jr , tokens outside the masks
being none. S(i, j) is not symmetric: images asking texts and texts asking images are two matrices.

As in ``tiled``, queries go through in tiles that hold all key samples, so that a tile's softmax is final: what the gradients need is formed with the loss and the
rest forgotten. Within a tile key samples go through in chunks; of a chunk's similarities remain the maxima's mean and places, one byte each, from which the
backward products are made without the similarities being computed again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # token pairs of a chunk, and places that a tile keeps


class Tokens(NamedTuple):
    """Unit rows [B, T, D] and a mask [B, T], true where a token counts. What stands elsewhere, NaN included, changes nothing."""

    rows: torch.Tensor
    mask: torch.Tensor

    def split(self, size: int) -> Iterator["Tokens"]:
        return map(Tokens, self.rows.split(size), self.mask.split(size))


def present(rows_BTD: torch.Tensor) -> Tokens:
    """Tokens of which those that do not count are rows of zeros: in this form they are gathered, the mask with them."""
    return Tokens(rows_BTD, (rows_BTD.detach() != 0).any(-1))


def _tile_sizes(queries: Tokens, keys: Tokens) -> tuple[int, int]:
    """(queries of a tile, key samples of a chunk)."""
    elements = TILE_ELEMENTS.get(queries.rows.device.type, TILE_ELEMENTS["cpu"])
    asking, answering = queries.rows.shape[1], keys.rows.shape[1]
    num_queries = max(1, min(len(queries.rows), elements // (asking * max(1, len(keys.rows)))))
    return num_queries, max(1, min(len(keys.rows), elements // (num_queries * asking * answering)))


def _clean(tokens: Tokens) -> Tokens:
    return Tokens(tokens.rows.masked_fill(~tokens.mask[..., None], 0), tokens.mask)


def _maxima(queries: Tokens, keys: Tokens) -> torch.return_types.max:
    """Values and places [b, Q, n] of each query token's best key token."""
    (b, asking, width), (n, answering, _) = queries.rows.shape, keys.rows.shape
    pairs = (queries.rows.reshape(-1, width) @ keys.rows.reshape(-1, width).T).view(b, asking, n, answering)
    return pairs.masked_fill_(~keys.mask, -torch.inf).max(-1)


def _weights(queries: Tokens, dtype: torch.dtype) -> torch.Tensor:
    """[b, Q]: each token's share of its query's mean."""
    mask = queries.mask.to(dtype)
    return mask / mask.sum(1, keepdim=True).clamp(min=1)


def _mean(values_bQn: torch.Tensor, weights_bQ: torch.Tensor) -> torch.Tensor:
    return torch.bmm(weights_bQ[:, None], values_bQn.to(weights_bQ.dtype))[:, 0]


def late_similarities(queries: Tokens, keys: Tokens) -> torch.Tensor:
    """S [B, N], fp32 at least, without gradient; 0 for samples without any token. Costs 2 B Q N K D operations; never more than ``TILE_ELEMENTS`` pairs of tokens exist."""
    dtype = torch.promote_types(queries.rows.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(queries.rows.device.type, enabled=False):
        queries, keys = _clean(queries), _clean(keys)
        num_queries, num_keys = _tile_sizes(queries, keys)
        tiles = []
        for tile in queries.split(num_queries):
            weights = _weights(tile, dtype)
            tiles.append(torch.cat([_mean(_maxima(tile, chunk).values, weights) for chunk in keys.split(num_keys)], dim=1))
        return torch.cat(tiles).masked_fill_(~keys.mask.any(1), 0)


class _LateCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_rows_BQD, query_mask_BQ, key_rows_NKD, key_mask_NK, scale, partners_B):
        dtype = torch.promote_types(query_rows_BQD.dtype, torch.float32)
        wanted = any(ctx.needs_input_grad)
        with torch.autocast(query_rows_BQD.device.type, enabled=False):
            queries, keys = _clean(Tokens(query_rows_BQD, query_mask_BQ)), _clean(Tokens(key_rows_NKD, key_mask_NK))
            num_queries, num_keys = _tile_sizes(queries, keys)
            empty_N = ~keys.mask.any(1)
            loss = torch.zeros((), dtype=dtype, device=scale.device)
            query_slopes = torch.zeros(queries.rows.shape, dtype=dtype, device=scale.device) if wanted else None
            key_slopes = torch.zeros(keys.rows.shape, dtype=dtype, device=scale.device) if wanted else None
            scale_slope = torch.zeros_like(loss)
            for start, tile in zip(range(0, len(queries.rows), num_queries), queries.split(num_queries), strict=True):
                of_tile = slice(start, start + num_queries)
                partners, weights = partners_B[of_tile, None], _weights(tile, dtype)
                similarities, places = _streamed(tile, keys, weights, num_keys, wanted)
                log_shares = torch.log_softmax(similarities.masked_fill_(empty_N, 0) * scale, dim=1)
                loss -= log_shares.gather(1, partners).sum()
                if not wanted:
                    continue
                slopes = log_shares.exp_().scatter_add_(1, partners, log_shares.new_full(partners.shape, -1.0))
                scale_slope += (slopes * similarities).sum()
                _spread(slopes.masked_fill_(empty_N, 0), places, weights, tile, keys, num_keys, query_slopes[of_tile], key_slopes)
            if wanted:
                ctx.save_for_backward(query_slopes, key_slopes, scale, scale_slope)
                ctx.dtypes, ctx.num_rows = (query_rows_BQD.dtype, key_rows_NKD.dtype), len(query_rows_BQD)
            return loss / len(query_rows_BQD)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query_slopes, key_slopes, scale, scale_slope = ctx.saved_tensors
        gradient = gradient / ctx.num_rows
        of_tokens = gradient * scale
        return (
            (query_slopes * of_tokens).to(ctx.dtypes[0]),
            None,
            (key_slopes * of_tokens).to(ctx.dtypes[1]),
            None,
            (gradient * scale_slope).to(scale.dtype).expand_as(scale),
            None,
        )


def _streamed(tile: Tokens, keys: Tokens, weights_bQ: torch.Tensor, num_keys: int, keep_places: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Similarities [b, N] of a tile of queries, and by chunk the place [b, Q, n] of each maximum, in as few bytes as there are key tokens."""
    smallest = torch.uint8 if keys.rows.shape[1] <= 256 else torch.int16
    similarities, places = [], []
    for chunk in keys.split(num_keys):
        maxima = _maxima(tile, chunk)
        similarities.append(_mean(maxima.values, weights_bQ))
        if keep_places:
            places.append(maxima.indices.to(smallest))
    return torch.cat(similarities, dim=1), places


def _spread(slopes_bN, places, weights_bQ, tile: Tokens, keys: Tokens, num_keys: int, query_slopes, key_slopes) -> None:
    """Add what the slopes of a tile's similarities give to its query tokens and to all key tokens: each maximum has one token of either."""
    width, answering, start = keys.rows.shape[2], keys.rows.shape[1], 0
    flat_queries = tile.rows.reshape(-1, width)
    for chunk, places_bQn in zip(keys.split(num_keys), places, strict=True):
        stop = start + len(chunk.rows)
        of_maxima = (weights_bQ[:, :, None] * slopes_bN[:, None, start:stop]).to(chunk.rows.dtype)
        of_pairs = of_maxima.new_zeros((*of_maxima.shape, answering)).scatter_(-1, places_bQn[..., None].long(), of_maxima[..., None])
        of_pairs = of_pairs.view(len(flat_queries), -1)
        query_slopes += (of_pairs @ chunk.rows.reshape(-1, width)).view(query_slopes.shape)
        key_slopes[start:stop] += (of_pairs.T @ flat_queries).view(chunk.rows.shape)
        start = stop


def late_cross_entropy(queries: Tokens, keys: Tokens, scale: torch.Tensor, partners_B: torch.Tensor) -> torch.Tensor:
    """Mean over the B queries of the cross-entropy of s S(i, .) with the key samples ``partners_B`` (int64, in [0, N)).

    Products in the tokens' dtype, their mean, softmax and sums in fp32 at least, whatever autocast is on. Gradients reach query tokens, key tokens (those that were a
    maximum) and the scale, one number. Samples without any token have similarity 0 and give none. Costs 6 B Q N K D operations; holds [B, Q, D] and [N, K, D] for the backward pass and, while
    it runs, a few chunks of ``TILE_ELEMENTS`` values.
    """
    return _LateCrossEntropy.apply(queries.rows, queries.mask, keys.rows, keys.mask, scale, partners_B)
