"""Law 7 for prototypes: the streamed cross-entropy is that of the whole matrices, forward and backward, and never makes them."""

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from protoclip_scale.prototypes import loss as streamed
from protoclip_scale.prototypes.loss import Contrasts, make_contrast, prototype_loss, softmax_mean

EMPTY = (3, 11, 36)


def plain_targets(teacher_KP: torch.Tensor, labels_B: torch.Tensor, temperature: float) -> torch.Tensor:
    """The slow twin of soft targets: softmax(C_y C' / temperature) [B, K]."""
    return torch.softmax(teacher_KP[labels_B] @ teacher_KP.T / temperature, dim=-1)


def plain_loss(student_BP: torch.Tensor, scale: torch.Tensor, prototypes_KP: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The slow twin of the loss: [B, K] logits against class indices [B] or probabilities [B, K]."""
    return F.cross_entropy(scale * student_BP @ prototypes_KP.T, target)


def masked_loss(student_BP, scale, prototypes_KP, labels_B, teacher_KP=None, temperature=None) -> torch.Tensor:
    """The slow twin without empty clusters, row by row."""
    filled = [k for k in range(len(prototypes_KP)) if prototypes_KP[k].any()]
    total = torch.zeros((), dtype=student_BP.dtype)
    for row, label in zip(student_BP, labels_B.tolist(), strict=True):
        if label in filled:
            logits = (scale * prototypes_KP[filled] @ row)[None]
            target = torch.tensor([filled.index(label)]) if teacher_KP is None else torch.softmax(teacher_KP[filled] @ teacher_KP[label] / temperature, 0)[None]
            total = total + F.cross_entropy(logits, target)
    return total / len(student_BP)


def case(dtype: torch.dtype, scale: float = 30.0, rows: int = 29, clusters: int = 37, dim: int = 5, empty: tuple[int, ...] = EMPTY):
    """(student, scale, prototypes with zero rows, teacher's centroids, labels); a third of the labels is that of empty clusters."""
    generator = torch.Generator().manual_seed(0)
    student, prototypes, teacher = (F.normalize(torch.randn(size, dim, generator=generator, dtype=torch.float64), dim=1) for size in (rows, clusters, clusters))
    prototypes = (0.9 * prototypes).index_fill(0, torch.tensor(empty, dtype=torch.int64), 0.0)
    labels = torch.randint(clusters, (rows,), generator=generator)
    if empty:
        labels[::3] = torch.tensor(empty)[torch.arange(len(labels[::3])) % len(empty)]
    return student.to(dtype), torch.tensor([scale], dtype=dtype), prototypes.to(dtype), (0.8 * teacher).to(dtype), labels


def with_gradients(loss_of, student: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
    """The loss and its gradients; a factor makes sure that the incoming gradient is used."""
    student, scale = student.clone().requires_grad_(), scale.clone().requires_grad_()
    loss = loss_of(student, scale)
    return [loss.detach(), *torch.autograd.grad(2.5 * loss, (student, scale))]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1)


TILES = pytest.mark.parametrize(("tile_rows", "elements"), [(512, 1 << 18), (512, 29 * 7), (8, 40), (4, 1)], ids=["one tile", "columns", "rows and columns", "single logits"])
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["fp64", "fp32"])


@TILES
@PRECISIONS
@pytest.mark.parametrize("temperature", [None, 0.01, 0.3], ids=["hard", "soft 0.01", "soft 0.3"])
def test_tiled_loss_equals_full_loss(monkeypatch, tile_rows, elements, dtype, tolerance, temperature):
    monkeypatch.setattr(streamed, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(streamed, "TILE_ELEMENTS", {"cpu": elements})
    student, scale, prototypes, teacher, labels = case(dtype)
    target = labels if temperature is None else plain_targets(teacher, labels, temperature)
    contrast = make_contrast(prototypes, None if temperature is None else teacher, temperature or 0.01)
    expected = with_gradients(lambda z, s: plain_loss(z, s, prototypes, target), student, scale)
    assert_equal(with_gradients(lambda z, s: prototype_loss(z, s, contrast, labels), student, scale), expected, tolerance)


@TILES
@pytest.mark.parametrize("temperature", [None, 0.05], ids=["hard", "soft"])
def test_masked_clusters_are_in_no_softmax_and_their_rows_do_not_count(monkeypatch, tile_rows, elements, temperature):
    monkeypatch.setattr(streamed, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(streamed, "TILE_ELEMENTS", {"cpu": elements})
    student, scale, prototypes, teacher, labels = case(torch.float64)
    teacher = None if temperature is None else teacher
    contrast = make_contrast(prototypes, teacher, temperature or 0.01, mask_empty=True)
    expected = with_gradients(lambda z, s: masked_loss(z, s, prototypes, labels, teacher, temperature), student, scale)
    found = with_gradients(lambda z, s: prototype_loss(z, s, contrast, labels), student, scale)
    assert_equal(found, expected, 1e-12)
    assert not found[1][::3].any() and found[1][1].any()


def test_masking_changes_nothing_where_no_cluster_is_empty():
    student, scale, prototypes, teacher, labels = case(torch.float64, empty=())
    losses = [prototype_loss(student, scale, make_contrast(prototypes, teacher, 0.01, mask), labels) for mask in (False, True)]
    assert torch.equal(*losses)


def test_logits_of_any_size_stay_finite():
    """exp(1000) is infinite, and the largest logit may come in any tile."""
    queries = torch.tensor([[1.0], [-1.0]])
    keys = torch.linspace(-1000, 1000, 51)[:, None]
    mean, lse = softmax_mean(queries, keys, keys)
    assert lse.tolist() == [1000, 1000] and mean.flatten().tolist() == [1000, -1000]


class Largest(TorchFunctionMode):
    """Elements of the largest tensor that any call of torch inside the context gave, backward passes included."""

    elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(each.numel() for each in (result if isinstance(result, tuple) else (result,)) if isinstance(each, torch.Tensor))])
        return result


def test_neither_rows_by_prototypes_nor_prototypes_by_prototypes_exist():
    student, scale, prototypes, teacher, labels = case(torch.float32, rows=512, clusters=20_000, dim=8)
    budget = max(streamed.TILE_ELEMENTS["cpu"], prototypes.numel())
    contrast = make_contrast(prototypes)
    with Largest() as of_loss:
        prototype_loss(student.requires_grad_(), scale, contrast, labels).backward()
    assert 0 < of_loss.elements <= budget < 512 * 20_000 / 30
    with Largest() as of_targets:
        make_contrast(prototypes[:3000], teacher[:3000], 0.01)
    assert 0 < of_targets.elements <= budget < 3000**2 / 30
    with Largest() as of_twin:
        plain_loss(student, scale, prototypes, labels).backward()
    assert of_twin.elements == 512 * 20_000, "the slow twin's matrix is seen"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_fp32_whatever_autocast_is_on(dtype):
    student, scale, prototypes, teacher, labels = case(torch.float32)
    contrast = make_contrast(prototypes, teacher, 0.01)
    expected = with_gradients(lambda z, s: prototype_loss(z, s, contrast, labels), student.to(dtype).float(), scale)
    with torch.autocast("cpu", torch.bfloat16):
        inside = make_contrast(prototypes, teacher, 0.01)
        assert torch.equal(inside.positives_KP, contrast.positives_KP)
        loss, student_gradient, scale_gradient = with_gradients(lambda z, s: prototype_loss(z, s, inside, labels), student.to(dtype), scale)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected[0]) and torch.equal(scale_gradient, expected[2])
    assert student_gradient.dtype == dtype and torch.equal(student_gradient, expected[1].to(dtype))


def test_contrasts_are_made_once_for_the_same_tensors():
    _, _, prototypes, teacher, _ = case(torch.float32)
    contrasts = Contrasts()
    first = contrasts.of("image", prototypes, teacher)
    assert contrasts.of("image", prototypes, teacher) is first
    assert contrasts.of("text", prototypes, teacher) is not first, "another name"
    other = contrasts.of("image", prototypes, teacher + 0.1)
    assert not torch.equal(other.positives_KP, first.positives_KP), "the next episode's tensors"
    hard = contrasts.of("image", prototypes)
    assert hard.positives_KP is hard.rivals_MP is not None
    prototypes.mul_(0.5)
    assert torch.equal(contrasts.of("image", prototypes, teacher).positives_KP, make_contrast(prototypes, teacher, 0.01).positives_KP), "changed in place"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@PRECISIONS
def test_gpu_gives_the_same(dtype, tolerance):
    student, scale, prototypes, teacher, labels = case(dtype, rows=700, clusters=3000, dim=128)
    expected = with_gradients(lambda z, s: prototype_loss(z, s, make_contrast(prototypes, teacher, 0.01), labels), student, scale)
    on_gpu = [tensor.cuda() for tensor in (student, scale, prototypes, teacher, labels)]
    contrast = make_contrast(on_gpu[2], on_gpu[3], 0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = with_gradients(lambda z, s: prototype_loss(z, s, contrast, on_gpu[4]), *on_gpu[:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal([tensor.cpu() for tensor in found], expected, 10 * tolerance)


def test_nothing_counts_where_all_prototypes_are_masked():
    contrast = make_contrast(torch.zeros(4, 3), torch.randn(4, 3), 0.1, mask_empty=True)
    student = torch.nn.functional.normalize(torch.randn(5, 3), dim=1).requires_grad_()
    loss = prototype_loss(student, torch.tensor([10.0]), contrast, torch.tensor([0, 1, 2, 3, 0]))
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()
