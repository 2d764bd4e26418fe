"""The cross-entropy between rows and prototypes (methods 6.3), without a matrix of rows x prototypes or prototypes x prototypes.

Of a row z with logits A_j = s z C_j and target P_j the loss is  lse_j(A_j) - sum_j P_j A_j  =  lse_j(A_j) - s z Q  with
Q = sum_j P_j C_j, the prototype that the target expects. A target depends on the row's label only, so Q is made once for each label of
an episode, and a step is left with a log-sum-exp. Its gradient in s z is  sum_j softmax(A)_j C_j - Q. Both it and Q are
softmax-weighted means of prototypes: attention, which ``softmax_mean`` streams over tiles.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

TILE_ROWS = 512
TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # a tile stays in a CPU's cache; a GPU needs large ones to be busy


def _tile_columns(rows: int, device: str) -> int:
    return max(1, TILE_ELEMENTS.get(device, TILE_ELEMENTS["cpu"]) // rows)


def tile_elements(num_rows: int, num_keys: int, device: str) -> int:
    """Logits of the largest tile; as many softmax values stand beside them."""
    rows = min(num_rows, TILE_ROWS)
    return rows * min(num_keys, _tile_columns(rows, device))


def softmax_mean(queries_BP: torch.Tensor, keys_KP: torch.Tensor, values_KP: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """sum_j softmax_j(q k_j) v_j [B, P] (None without values) and lse_j(q k_j) [B], without gradient.

    Costs 4 B K P operations (2 without values); never more than ``TILE_ELEMENTS`` logits exist. Fully in the dtype of the arguments.
    """
    pieces = [_row_tile(tile, keys_KP, values_KP) for tile in queries_BP.split(TILE_ROWS)]
    if len(pieces) == 1:
        return pieces[0]
    means, sums = zip(*pieces, strict=True)
    return None if values_KP is None else torch.cat(means), torch.cat(sums)


def _row_tile(queries_BP: torch.Tensor, keys_KP: torch.Tensor, values_KP: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """``softmax_mean`` of few rows: each tile of keys has a softmax and a mean of its own, weighted by the tile's share of all mass."""
    columns = _tile_columns(len(queries_BP), queries_BP.device.type)
    top_B1 = mass_B1 = mean_BP = None  # sum_j exp(A_j) = mass exp(top), of the tiles so far
    for start in range(0, len(keys_KP), columns):
        logits = queries_BP @ keys_KP[start : start + columns].T
        shares = logits.softmax(1)
        tile_top_B1, tile_mass_B1 = logits.amax(1, keepdim=True), shares.amax(1, keepdim=True).reciprocal_()
        tile_mean_BP = None if values_KP is None else shares @ values_KP[start : start + columns]
        if top_B1 is None:
            top_B1, mass_B1, mean_BP = tile_top_B1, tile_mass_B1, tile_mean_BP
            continue
        highest_B1 = torch.maximum(top_B1, tile_top_B1)
        mass_B1.mul_((top_B1 - highest_B1).exp_())
        tile_mass_B1.mul_((tile_top_B1 - highest_B1).exp_())
        top_B1, both_B1 = highest_B1, mass_B1 + tile_mass_B1
        if mean_BP is not None:
            mean_BP.mul_(mass_B1 / both_B1).addcmul_(tile_mean_BP, tile_mass_B1 / both_B1)
        mass_B1 = both_B1
    return mean_BP, (top_B1 + mass_B1.log_()).squeeze(1)


@dataclass(frozen=True)
class Contrast:
    """What the rows of an episode are held against, of one student and one labeling; constants.

    ``rivals_MP``: the prototypes of the softmax; ``positives_KP``: for each label the prototype that its target expects; ``counted_K``: 1 for
    labels whose rows count, 0 for others, or None if all do.
    """

    rivals_MP: torch.Tensor
    positives_KP: torch.Tensor
    counted_K: torch.Tensor | None = None


@torch.no_grad()
def make_contrast(
    prototypes_KP: torch.Tensor, teacher_KP: torch.Tensor | None = None, temperature: float = 0.01, mask_empty: bool = False
) -> Contrast:
    """The contrast of a student's prototypes. Targets are hard without ``teacher_KP``, else softmax_j(T_y T_j / temperature) [K, K], in fp32.

    Centroids are means, not unit vectors: the argmax of a soft target need not be y. A zero row (empty cluster) keeps its
    place in both softmaxes with logit 0, as in the reference; with ``mask_empty`` it is in neither, and rows of its label do not
    count. Costs 4 K K P operations with a teacher, once an episode: a share of 1 / rows per cluster of one direction's loss.
    """
    dtype = torch.promote_types(prototypes_KP.dtype, torch.float32)
    prototypes_KP = rivals_MP = prototypes_KP.detach().to(dtype)
    present = ...
    counted_K = None
    if mask_empty:
        filled_K = prototypes_KP.any(dim=1)
        present, counted_K = filled_K.nonzero().squeeze(1), filled_K.to(dtype)
        if not len(present):
            present = present.new_zeros(1)  # no row counts then, whatever it is held against
        rivals_MP = prototypes_KP[present]
    if teacher_KP is None:
        return Contrast(rivals_MP, prototypes_KP, counted_K)
    with _without_autocast(prototypes_KP.device.type):
        teacher_KP = teacher_KP.to(dtype)
        positives_KP, _ = softmax_mean(teacher_KP / temperature, teacher_KP[present], rivals_MP)
    return Contrast(rivals_MP, positives_KP, counted_K)


class Contrasts:
    """An episode's contrasts by name: each is made when its tensors are first seen, and again when they are others or have changed.

    They follow from the centroids alone, so no checkpoint holds them.
    """

    def __init__(self, mask_empty: bool = False):
        self._mask_empty = mask_empty
        self._sources: dict[str, list[tuple[torch.Tensor, int]]] = {}
        self._contrasts: dict[str, Contrast] = {}

    def of(self, name: str, prototypes_KP: torch.Tensor, teacher_KP: torch.Tensor | None = None, temperature: float = 0.01) -> Contrast:
        """``make_contrast`` of these tensors; a name always comes with the same temperature."""
        sources = [(tensor, tensor._version) for tensor in (prototypes_KP, teacher_KP) if tensor is not None]
        known = self._sources.get(name, [])
        if len(known) != len(sources) or any(old is not new or was != now for (old, was), (new, now) in zip(known, sources, strict=True)):
            self._sources[name] = sources
            self._contrasts[name] = make_contrast(prototypes_KP, teacher_KP, temperature, self._mask_empty)
        return self._contrasts[name]


class _CrossEntropy(torch.autograd.Function):
    """Mean over rows of lse_j(s z C_j) - s z Q; the gradient is formed with the loss, so the backward pass makes no product with prototypes."""

    @staticmethod
    def forward(ctx, student_BP, scale, rivals_MP, positives_BP, counted_B):
        dtype = torch.promote_types(student_BP.dtype, torch.float32)
        with _without_autocast(student_BP.device.type):
            rows_BP, positives_BP, rivals_MP = student_BP.to(dtype), positives_BP.to(dtype), rivals_MP.to(dtype)
            queries_BP = rows_BP * scale
            expected_BP, lse_B = softmax_mean(queries_BP, rivals_MP, rivals_MP if any(ctx.needs_input_grad) else None)
            loss_B = lse_B.sub_(queries_BP.mul_(positives_BP).sum(1))
            if counted_B is not None:
                loss_B *= counted_B
            if expected_BP is not None:
                slope_BP = expected_BP.sub_(positives_BP)
                if counted_B is not None:
                    slope_BP *= counted_B[:, None]
                ctx.save_for_backward(slope_BP, scale, (slope_BP * rows_BP).sum())
                ctx.dtype = student_BP.dtype
            return loss_B.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        slope_BP, scale, slope_of_scale = ctx.saved_tensors
        gradient = gradient / len(slope_BP)
        return (slope_BP * (gradient * scale)).to(ctx.dtype), (gradient * slope_of_scale).to(scale.dtype).expand_as(scale), None, None, None


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def prototype_loss(student_BP: torch.Tensor, scale: torch.Tensor, contrast: Contrast, labels_B: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of s Z C' with the contrast's targets, a mean over the B rows: fp32 at least, whatever autocast is on.

    ``student_BP``: unit rows; ``scale``: one number; ``labels_B``: int64, each in [0, K). Gradients reach the student and the scale only.
    Costs 4 B K P operations forward, 3 B P backward; keeps [B, P] for the backward pass.
    """
    counted_B = None if contrast.counted_K is None else contrast.counted_K[labels_B]
    return _CrossEntropy.apply(student_BP, scale, contrast.rivals_MP, contrast.positives_KP[labels_B], counted_B)
