"""The streamed late interaction against its slow twin: values, gradients, padding, chunks and what is never held (methods 4.6: F3, F4, F6, F7)."""

import pytest
import torch
from torch.nn import functional as F

from protoclip_scale.objectives.shared import late_interaction
from protoclip_scale.objectives.shared.late_interaction import Tokens, late_cross_entropy, late_similarities, present
from tests.losses import difference, gradients, number, unit_rows
from tests.test_prototypes_loss import Largest

QUERIES, KEYS = (6, 5, 8), (10, 4, 8)  # samples, tokens, width
PARTNERS = torch.tensor([3, 0, 7, 7, 1, 9])


def masks(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample has a token at least; one sample of each has all."""
    draws = torch.Generator().manual_seed(seed)
    found = []
    for samples, tokens, _ in (QUERIES, KEYS):
        lengths = torch.randint(1, tokens + 1, (samples,), generator=draws)
        lengths[2] = tokens
        found.append(torch.arange(tokens) < lengths[:, None])
    return tuple(found)


def plain_similarities(queries: Tokens, keys: Tokens) -> torch.Tensor:
    """The slow twin: all pairs of tokens at once."""
    pairs = torch.einsum("bqd,nkd->bnqk", queries.rows, keys.rows).masked_fill(~keys.mask[None, :, None], -torch.inf)
    mask = queries.mask[:, None]
    return (pairs.amax(3) * mask).sum(2) / mask.sum(2)


def plain_cross_entropy(queries: Tokens, keys: Tokens, scale: torch.Tensor, partners_B: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scale * plain_similarities(queries, keys), partners_B)


def of_tensors(loss_of):
    query_mask, key_mask = masks()
    return lambda queries, keys, scale: loss_of(Tokens(queries, query_mask), Tokens(keys, key_mask), scale, PARTNERS)


TENSORS = unit_rows(*QUERIES), unit_rows(*KEYS, seed=1), number(12.0)


@pytest.fixture(params=[1 << 20, 600, 200, 1], ids=["one chunk", "chunks", "a few keys", "single pairs"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(late_interaction, "TILE_ELEMENTS", {"cpu": request.param})


def test_f7_chunked_equals_the_slow_twin_forward_and_backward(chunks):
    assert difference(gradients(of_tensors(late_cross_entropy), TENSORS), gradients(of_tensors(plain_cross_entropy), TENSORS)) <= 1e-12
    tokens = [Tokens(rows, mask) for rows, mask in zip(TENSORS[:2], masks(), strict=True)]
    assert torch.allclose(late_similarities(*tokens), plain_similarities(*tokens), rtol=0, atol=1e-12)


def test_f3_padding_changes_nothing_whatever_it_holds(chunks):
    clean = gradients(of_tensors(late_cross_entropy), TENSORS)
    for filler in (0.0, 1e30, torch.nan, torch.inf):
        filled = [rows.masked_fill(~mask[..., None], filler) for rows, mask in zip(TENSORS[:2], masks(), strict=True)]
        found = gradients(of_tensors(late_cross_entropy), (*filled, TENSORS[2]))
        assert all(torch.equal(one, other) for one, other in zip(found, clean, strict=True)), filler
        tokens = [Tokens(rows, mask) for rows, mask in zip(filled, masks(), strict=True)]
        assert late_similarities(*tokens).isfinite().all()


def test_f4_order_and_copies_of_tokens_do_not_matter():
    queries, keys = (Tokens(rows, mask) for rows, mask in zip(TENSORS[:2], masks(), strict=True))
    expected = late_similarities(queries, keys)
    order, key_order = torch.randperm(QUERIES[1], generator=torch.Generator().manual_seed(3)), torch.randperm(KEYS[1], generator=torch.Generator().manual_seed(4))
    permuted = Tokens(queries.rows[:, order], queries.mask[:, order]), Tokens(keys.rows[:, key_order], keys.mask[:, key_order])
    twice = [Tokens(torch.cat([each.rows] * 2, 1), torch.cat([each.mask] * 2, 1)) for each in (queries, keys)]
    for asking, answering in (permuted, (twice[0], keys), (queries, twice[1])):
        assert torch.allclose(late_similarities(asking, answering), expected, rtol=0, atol=1e-12)


def test_f6_the_gradient_reaches_one_key_token_for_each_query_token_and_sample():
    """Also where several key tokens are equally near: here each key sample holds its tokens twice."""
    queries = Tokens(unit_rows(1, 1, 8), torch.ones(1, 1, dtype=torch.bool))
    rows = torch.cat([unit_rows(10, 4, 8, seed=1)] * 2, dim=1).requires_grad_()
    late_cross_entropy(queries, Tokens(rows, torch.ones(10, 8, dtype=torch.bool)), number(5.0), torch.tensor([0])).backward()
    assert (rows.grad != 0).any(-1).sum(1).tolist() == [1] * 10


def test_a_sample_without_tokens_is_similar_to_nothing():
    query_mask, key_mask = masks()
    query_mask[1], key_mask[3] = False, False
    queries, keys = Tokens(TENSORS[0], query_mask), Tokens(TENSORS[1], key_mask)
    similarities = late_similarities(queries, keys)
    assert not similarities[1].any() and not similarities[:, 3].any() and similarities.isfinite().all()
    loss, *slopes = gradients(lambda *each: late_cross_entropy(Tokens(each[0], query_mask), Tokens(each[1], key_mask), each[2], PARTNERS), TENSORS)
    assert loss.isfinite() and all(each.isfinite().all() for each in slopes)
    assert not slopes[0][1].any() and not slopes[1][3].any()


def test_no_samples_on_either_side():
    tokens, none = present(TENSORS[0]), present(TENSORS[0][:0])
    for queries, keys in ((tokens, none), (none, tokens), (none, none)):
        assert late_similarities(queries, keys).shape == (len(queries.rows), len(keys.rows))


def test_zero_rows_stand_for_no_token():
    mask = masks()[1]
    found = present(TENSORS[1].masked_fill(~mask[..., None], 0))
    assert torch.equal(found.mask, mask)


def test_more_than_256_key_tokens():
    tensors = unit_rows(2, 3, 8), unit_rows(4, 300, 8, seed=1), number(12.0)
    whole = [torch.ones(each.shape[:2], dtype=torch.bool) for each in tensors[:2]]

    def loss(loss_of):
        return lambda queries, keys, scale: loss_of(Tokens(queries, whole[0]), Tokens(keys, whole[1]), scale, torch.tensor([1, 3]))

    assert difference(gradients(loss(late_cross_entropy), tensors), gradients(loss(plain_cross_entropy), tensors)) <= 1e-12


def test_pairs_of_tokens_are_never_all_there(monkeypatch):
    monkeypatch.setattr(late_interaction, "TILE_ELEMENTS", {"cpu": 1 << 13})
    queries, keys = unit_rows(64, 6, 8).requires_grad_(), unit_rows(64, 5, 8, seed=1).requires_grad_()
    masks = torch.ones(64, 6, dtype=torch.bool), torch.ones(64, 5, dtype=torch.bool)
    with Largest() as found:
        late_cross_entropy(Tokens(queries, masks[0]), Tokens(keys, masks[1]), number(9.0), torch.arange(64)).backward()
    assert found.elements <= 1 << 13 < 64 * 6 * 64 * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_and_fp32_sums(dtype):
    """Rounded tokens go through their own products; what comes of them is fp32, autocast or not."""
    query_mask, key_mask = masks()
    tensors = [each.float().requires_grad_() for each in TENSORS]
    with torch.autocast("cpu", torch.bfloat16):
        loss = late_cross_entropy(Tokens(tensors[0].to(dtype), query_mask), Tokens(tensors[1].to(dtype), key_mask), tensors[2], PARTNERS)
    expected = gradients(of_tensors(plain_cross_entropy), TENSORS)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected[0].item(), abs=2e-2)
    loss.backward()
    assert difference([each.grad.double() for each in tensors], [each / 2.5 for each in expected[1:]]) < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same():
    expected = gradients(of_tensors(late_cross_entropy), TENSORS)
    query_mask, key_mask = (each.cuda() for each in masks())

    def on_gpu(queries, keys, scale):
        return late_cross_entropy(Tokens(queries, query_mask), Tokens(keys, key_mask), scale, PARTNERS.cuda())

    assert difference([each.cpu() for each in gradients(on_gpu, [each.cuda() for each in TENSORS])], expected) <= 1e-10
