"""Law 7 for the contrastive loss: in row tiles it is the loss of the whole matrix, forward and backward, and never makes that matrix."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from protoclip_scale.objectives.shared import tiled
from protoclip_scale.objectives.shared.tiled import tile_rows, tiled_cross_entropy
from tests.test_prototypes_loss import Largest

ROWS, COLUMNS, WIDTH = 37, 111, 16


def plain_cross_entropy(rows_BD: torch.Tensor, columns_ND: torch.Tensor, scale: torch.Tensor, partners_B: torch.Tensor) -> torch.Tensor:
    """The slow twin: all logits at once."""
    return F.cross_entropy(scale * rows_BD @ columns_ND.T, partners_B)


def case(dtype: torch.dtype, rows: int = ROWS, columns: int = COLUMNS, width: int = WIDTH, scale: float = 30.0):
    """(rows, columns, scale, partners): unit rows that are near their partners, as in training, and a rank's rows in the middle of the columns."""
    draws = torch.Generator().manual_seed(0)
    columns_ND = F.normalize(torch.randn(columns, width, generator=draws, dtype=torch.float64), dim=1)
    partners_B = torch.arange(rows) + (columns - rows) // 2
    rows_BD = F.normalize(columns_ND[partners_B] + 0.3 * torch.randn(rows, width, generator=draws, dtype=torch.float64), dim=1)
    return rows_BD.to(dtype), columns_ND.to(dtype), torch.tensor([scale], dtype=dtype), partners_B


def with_gradients(loss_of, tensors, partners_B, wanted=(True, True, True)) -> list[torch.Tensor]:
    """The loss and the gradients that are wanted; a factor makes sure that the incoming gradient is used."""
    leaves = [tensor.clone().requires_grad_(asked) for tensor, asked in zip(tensors, wanted, strict=True)]
    loss = loss_of(*leaves, partners_B)
    return [loss.detach(), *torch.autograd.grad(2.5 * loss, [leaf for leaf, asked in zip(leaves, wanted, strict=True) if asked])]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    """Relative to each tensor's largest value."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.fixture(params=[(256, 1 << 20), (5, 1), (1, 1), (1, 3 * COLUMNS)], ids=["one tile", "last tile shorter", "single rows", "three rows"])
def tiles(request, monkeypatch):
    fewest, elements = request.param
    monkeypatch.setattr(tiled, "FEWEST_ROWS", fewest)
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", {"cpu": elements})


PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])


@PRECISIONS
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_tiled_loss_equals_full_loss(tiles, dtype, tolerance, scale):
    *tensors, partners = case(dtype, scale=scale)
    assert_equal(with_gradients(tiled_cross_entropy, tensors, partners), with_gradients(plain_cross_entropy, tensors, partners), tolerance)


@pytest.mark.parametrize("wanted", [each for each in itertools.product([False, True], repeat=3) if any(each)])
def test_gradients_are_formed_for_those_who_want_them(tiles, wanted):
    *tensors, partners = case(torch.float64)
    assert_equal(with_gradients(tiled_cross_entropy, tensors, partners, wanted), with_gradients(plain_cross_entropy, tensors, partners, wanted), 1e-12)


def test_without_gradient_it_is_the_same_loss(tiles):
    *tensors, partners = case(torch.float64)
    assert_equal([tiled_cross_entropy(*tensors, partners)], [plain_cross_entropy(*tensors, partners)], 1e-12)
    with torch.no_grad():
        assert not tiled_cross_entropy(*(tensor.requires_grad_() for tensor in tensors), partners).requires_grad


def test_logits_of_any_size_stay_finite():
    rows, columns = torch.tensor([[1.0], [-1.0]], requires_grad=True), torch.linspace(-1, 1, 51)[:, None]
    loss = tiled_cross_entropy(rows, columns, torch.tensor([1e4]), torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 1e4 and rows.grad.isfinite().all()


def test_no_matrix_of_rows_by_columns_exists(monkeypatch):
    monkeypatch.setattr(tiled, "FEWEST_ROWS", 16)
    monkeypatch.setattr(tiled, "TILE_ELEMENTS", {"cpu": 1 << 15})
    *tensors, partners = case(torch.float32, rows=2048, columns=2048, width=8)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert tile_rows(2048, 2048, "cpu") == 16 == tile_rows(2048, 1 << 20, "cpu")
    with Largest() as found:
        tiled_cross_entropy(*leaves, partners).backward()
    assert found.elements == 16 * 2048
    with Largest() as twin:
        plain_cross_entropy(*leaves, partners).backward()
    assert twin.elements == 2048**2, "the slow twin's matrix is seen"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_fp32_whatever_autocast_is_on(dtype):
    *tensors, partners = case(torch.float32)
    rounded = [tensor.to(dtype) for tensor in tensors[:2]]
    expected = with_gradients(plain_cross_entropy, [*(tensor.float() for tensor in rounded), tensors[2]], partners)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(tiled_cross_entropy, [*rounded, tensors[2]], partners)
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
    assert_equal(found, [each.to(one.dtype) for one, each in zip(found, expected, strict=True)], 1e-5 if dtype == torch.float32 else 1e-2)
    assert_equal([found[0], found[3]], [expected[0], expected[3]], 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@PRECISIONS
def test_gpu_gives_the_same(dtype, tolerance):
    *tensors, partners = case(dtype, rows=700, columns=3000, width=64)
    expected = with_gradients(plain_cross_entropy, tensors, partners)
    on_gpu = [tensor.cuda() for tensor in tensors]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = with_gradients(tiled_cross_entropy, on_gpu, partners.cuda())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal([tensor.cpu() for tensor in found], expected, 10 * tolerance)
