"""Masked language modelling: the head against a slow twin, the count over the whole batch, and what the text tower sees (methods 3.2, D6)."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from protoclip_scale.data.masking import IGNORED
from protoclip_scale.models.build import build_model
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives import Targets, build_objectives, features_of, heads_of, views_of
from protoclip_scale.recipe import Recipe, load_recipe
from tests.support import RECIPES, TINY

ROWS, LENGTH = 70, 16  # more rows than a bucket of captions holds
MLM = frozenset({"mlm@masked"})


def recipe(*values: str) -> Recipe:
    return load_recipe(RECIPES / "demo_clip.yaml", [*TINY, "objectives.mlm={}", "model.text.mask_token=true", *values])


def model_of(chosen: Recipe) -> DualEncoder:
    objectives = build_objectives(chosen)
    return build_model(chosen, features_of(objectives), 0, heads=heads_of(objectives)).double().train()


def masked() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, lengths and labels; some rows have no selected token."""
    draws = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, LENGTH + 1, (ROWS,), generator=draws)
    ids = torch.randint(1, 49_000, (ROWS, LENGTH), generator=draws)
    selected = (torch.rand(ROWS, LENGTH, generator=draws) < 0.2) & (torch.arange(LENGTH) < lengths[:, None])
    return ids, lengths, torch.where(selected, torch.randint(1, 49_000, (ROWS, LENGTH), generator=draws), IGNORED)


def given(model: DualEncoder, view: tuple[torch.Tensor, ...], microbatch: int | None = None) -> torch.Tensor:
    return model(None, *view[:2], wants=MLM, views={"text@masked": view}, microbatch=microbatch)["mlm@masked"]


def gradients(model: DualEncoder) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("microbatch", [None, 33])
def test_rows_and_gradients_are_those_of_the_slow_twin(causal, microbatch):
    """All logits of all places, one row after the other, without buckets."""
    model, (ids, lengths, labels) = model_of(recipe(f"model.text.causal={causal}")), masked()
    found = given(model, (ids, lengths, labels), microbatch)
    found.sum().backward()
    ours = gradients(model)
    model.zero_grad()
    expected = []
    for row, length in enumerate(lengths.tolist()):
        states = model.text_tower(ids[row : row + 1, :length], lengths[row : row + 1]).tokens[0]
        expected.append(F.cross_entropy(model.mlm_head.words(states), labels[row, :length], reduction="sum", ignore_index=IGNORED))
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-12)
    assert (labels == IGNORED).all(1).any() and (found == 0).any()
    torch.stack(expected).sum().backward()
    slow = gradients(model)
    assert ours.keys() == slow.keys() and {name.split(".")[0] for name in slow} == {"text_tower", "mlm_head"}
    for name, gradient in slow.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def assert_law_1(coupled: Callable[..., torch.Tensor]) -> None:
    """The mean over two ranks, with other numbers of selected tokens, is the mean over the selected tokens of the whole batch."""
    _, _, labels = masked()
    counts, sums = (labels != IGNORED).sum(1), torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parts = torch.arange(ROWS).chunk(2)
    assert len({int(counts[part].sum()) for part in parts}) == 2
    gathered, expected = {"selected@masked": counts}, (sums.sum() / counts.sum()).item()
    for ranks in ([torch.arange(ROWS)], parts):
        losses = [coupled({"mlm@masked": sums[part], "selected@masked": counts[part]}, gathered, Targets(part, num_columns=ROWS)).item() for part in ranks]
        assert sum(losses) / len(losses) == pytest.approx(expected, rel=1e-9)


def test_the_mean_is_over_the_selected_tokens_of_the_whole_batch():
    assert_law_1(build_objectives(recipe())["mlm"].coupled)


def test_a_mean_over_what_a_rank_has_selected_fails_law_1():
    """The seeded break: the published code divides by the count of the local batch."""

    def local_mean(features, gathered, targets):
        return features["mlm@masked"].sum() / features["selected@masked"].sum().clamp(min=1)

    with pytest.raises(AssertionError):
        assert_law_1(local_mean)


def test_nothing_selected_is_a_loss_of_zero_with_a_gradient_of_zero():
    model, (ids, lengths, labels) = model_of(recipe()), masked()
    objective = build_objectives(recipe())["mlm"]
    sums = given(model, (ids, lengths, torch.full_like(labels, IGNORED)), microbatch=20)
    loss = objective.coupled({"mlm@masked": sums}, {"selected@masked": torch.zeros(ROWS, dtype=torch.int64)}, Targets(torch.arange(ROWS), num_columns=ROWS))
    loss.backward()
    assert loss.item() == 0 and all(not gradient.any() for gradient in gradients(model).values())
    assert model.mlm_head.words.weight.grad is not None, "DDP waits for it"


def test_a_causal_tower_sees_what_stands_before_and_the_other_one_everything_but_padding():
    ids, lengths, _ = masked()
    row = lengths.argmax()
    length = int(lengths[row]) - 4
    one, lengths = ids[row : row + 1].clone(), torch.tensor([length])
    for causal in (True, False):
        tower = model_of(recipe(f"model.text.causal={causal}")).text_tower.eval()
        before = tower(one, lengths).tokens
        behind, padding = one.clone(), one.clone()
        behind[0, 5] += 1
        padding[0, length:] += 1
        wider = torch.cat((padding, ids[:1])), torch.tensor([length, LENGTH])
        torch.testing.assert_close(tower(*wider).tokens[:1, :length], before)
        torch.testing.assert_close(tower.pooled(*wider)[:1], tower.pooled(one, lengths))
        moved = (tower(behind, lengths).tokens - before).abs().amax(-1)[0] > 1e-9
        assert moved[5:].all() and moved[:5].any() == (not causal)


def test_the_towers_start_as_without_it_but_for_one_more_token():
    plain = load_recipe(RECIPES / "demo_clip.yaml", TINY)
    without, with_it = model_of(plain).state_dict(), model_of(recipe()).state_dict()
    table = "text_tower.encoder.embeddings.token_embedding.weight"
    assert all(torch.equal(tensor, with_it[name]) for name, tensor in without.items() if name != table)
    kept = [*range(49_406), 49_407, 49_408]
    assert len(with_it[table]) == 49_409 and torch.equal(with_it[table][kept], without[table])


def test_it_asks_for_a_masked_text():
    assert views_of(build_objectives(recipe())).masked == ("masked",) and views_of(build_objectives(recipe("objectives.mlm.weight=0"))).masked == ()
