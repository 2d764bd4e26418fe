"""The cross-entropy between local rows and the columns of the whole batch, without their matrix of logits.

Of a row x with partner y the loss is  lse_j(s x C_j) - s x C_y , and its slope in the logits is  G = softmax - onehot(y). Rows go through in
tiles that hold all columns, so a tile's softmax is final: G is formed with the loss, multiplied into what the gradients need, and
forgotten. Three products per direction, as the plain loss makes with its backward pass; what stays is [B, D] and [N, D].
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # a tile stays near a CPU's cache; a GPU needs large ones to be busy
FEWEST_ROWS = 256  # with fewer the products wait for memory


def tile_rows(num_rows: int, num_columns: int, device: str) -> int:
    """Rows of a tile; its logits and as many softmax values stand beside each other."""
    rows = TILE_ELEMENTS.get(device, TILE_ELEMENTS["cpu"]) // num_columns
    return max(1, min(num_rows, max(FEWEST_ROWS, rows)))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_BD, columns_ND, scale, partners_B, row_keys_B, column_keys_N, shared):
        dtype = torch.promote_types(rows_BD.dtype, torch.float32)
        of_rows, of_columns, of_scale, *_ = ctx.needs_input_grad
        with torch.autocast(rows_BD.device.type, enabled=False):
            rows, columns = rows_BD.to(dtype), columns_ND.to(dtype)
            loss = rows.new_zeros(())
            row_slopes = torch.empty_like(rows) if of_rows or of_scale else None
            column_slopes = torch.zeros_like(columns) if of_columns else None
            step = tile_rows(len(rows), len(columns), rows.device.type)
            for start in range(0, len(rows), step):
                tile = slice(start, start + step)
                queries, partners = rows[tile] * scale, partners_B[tile, None]
                logits, positives = queries @ columns.T, None
                if row_keys_B is not None:
                    equal = row_keys_B[tile, None] == column_keys_N
                    if shared:
                        positives = equal.to(dtype).div_(equal.sum(1, keepdim=True))
                    else:
                        logits.masked_fill_(equal.scatter_(1, partners, False), -torch.inf)
                log_shares = torch.log_softmax(logits, dim=1)
                loss -= log_shares.gather(1, partners).sum() if positives is None else (log_shares * positives).sum()
                if not any(ctx.needs_input_grad):
                    continue
                slopes = log_shares.exp_()
                if positives is None:
                    slopes.scatter_add_(1, partners, slopes.new_full(partners.shape, -1.0))
                else:
                    slopes -= positives
                if row_slopes is not None:
                    torch.mm(slopes, columns, out=row_slopes[tile])
                if column_slopes is not None:
                    column_slopes.addmm_(slopes.T, queries)
            if any(ctx.needs_input_grad):
                scale_slope = (row_slopes * rows).sum() if of_scale else None
                ctx.save_for_backward(row_slopes if of_rows else None, column_slopes, scale, scale_slope)
                ctx.dtypes, ctx.num_rows = (rows_BD.dtype, columns_ND.dtype), len(rows)
            return loss / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        row_slopes, column_slopes, scale, scale_slope = ctx.saved_tensors
        gradient = gradient / ctx.num_rows
        return (
            None if row_slopes is None else (row_slopes * (gradient * scale)).to(ctx.dtypes[0]),
            None if column_slopes is None else (column_slopes * gradient).to(ctx.dtypes[1]),
            None if scale_slope is None else (gradient * scale_slope).to(scale.dtype).expand_as(scale),
            *[None] * 4,
        )


class Keys(NamedTuple):
    """What makes a column equal to a row's partner: the same int64 key. ``rows`` [B]: those of the partners; ``columns`` [N].

    ``shared`` false: equal columns other than the partner are left out of the row's softmax, being no negatives. True: all equal columns are positives, with equal
    shares of the target: the loss of a row is  lse_j(A_j) - mean over its equal columns of A_j .
    """

    rows: torch.Tensor
    columns: torch.Tensor
    shared: bool


def tiled_cross_entropy(rows_BD: torch.Tensor, columns_ND: torch.Tensor, scale: torch.Tensor, partners_B: torch.Tensor, keys: Keys | None = None) -> torch.Tensor:
    """Mean over the B rows of the cross-entropy of s X C' with the columns ``partners_B`` (int64, in [0, N)): fp32 at least, whatever autocast is on.

    ``scale``: one number. Gradients reach rows, columns and scale. Costs 6 B N D operations where all three are wanted, 2 B N D where none
    is; holds [B, D] and [N, D] for the backward pass and, while it runs, two tiles of ``tile_rows`` x N. ``keys`` add a comparison of B N numbers
    and another tile.
    """
    return _CrossEntropy.apply(rows_BD, columns_ND, scale, partners_B, *(keys or (None, None, False)))
