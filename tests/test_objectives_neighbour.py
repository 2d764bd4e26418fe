"""Nearest-neighbour supervision: D2, D4, D5 of the method specification, the ring, law 1 with groups of lanes, and the module from step to step."""

import pytest
import torch
from torch.nn import functional as F

from protoclip_scale.errors import UserError
from protoclip_scale.objectives import build_objectives
from protoclip_scale.objectives.base import Targets
from protoclip_scale.objectives.neighbour import neighbour_loss
from protoclip_scale.objectives.shared import feature_queue
from protoclip_scale.objectives.shared.feature_queue import nearest, push
from protoclip_scale.objectives.shared.tiled import Keys
from protoclip_scale.recipe import load_recipe
from tests.losses import angles, assert_law_1, difference, gradients, number, over_ranks, unit_rows
from tests.support import RECIPES

QUEUE, TEXT, EDITED = angles(5, 95, 185, 275), angles(0, 60), angles(30, 170)
U1, U2, SCALE, ROWS = angles(10, 70), angles(-10, 100), number(10.0), torch.arange(2)


def test_d2_neighbours_terms_and_loss():
    found = [nearest(QUEUE, texts, 1)[:, 0] for texts in (TEXT, EDITED)]
    assert [each.tolist() for each in found] == [[0, 1], [0, 2]]
    neighbours = [QUEUE[each] for each in found]
    parts = [neighbour_loss([image], [each], SCALE, ROWS).item() for image in (U1, U2) for each in neighbours]
    assert parts == [pytest.approx(each, abs=1e-7) for each in (0.0040065, 4.2262893, 0.0000123, 0.0806232)]
    assert neighbour_loss([U1, U2], neighbours, SCALE, ROWS).item() == pytest.approx(1.0777328, abs=1e-7)


def test_d4_the_ring_closes():
    entries, pushed = torch.zeros(1, 6, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    for start in (0, 4):
        push(entries, pushed, torch.arange(start, start + 4.0)[None, :, None])
    assert entries[0, :, 0].tolist() == [6, 7, 2, 3, 4, 5] and int(pushed) % 6 == 2


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_ring_holds_the_newest_rows_for_any_sizes_of_pushes(size):
    """Against a plain list, over pushes shorter, equal and longer than the ring, in two groups."""
    entries, pushed, expected = torch.full((2, size, 1), -1.0), torch.zeros(1, dtype=torch.int64), []
    for count in (2, 1, 4, 5, 9, 3):
        rows = torch.arange(len(expected), len(expected) + count, dtype=torch.float32)
        expected += rows.tolist()
        push(entries, pushed, torch.stack([rows, rows + 100])[..., None])
        ring = [-1.0] * size
        for place, value in enumerate(expected):
            ring[place % size] = value
        assert entries[0, :, 0].tolist() == ring
        assert [value - 100 for value in entries[1, :, 0].tolist() if value >= 0] == [value for value in ring if value >= 0]


@pytest.mark.parametrize("count", [1, 3])
def test_search_in_tiles_equals_a_whole_one(monkeypatch, count):
    monkeypatch.setattr(feature_queue, "TILE_ELEMENTS", {"cpu": 40})
    entries, queries = unit_rows(17, 6), unit_rows(11, 6, seed=1)
    assert torch.equal(nearest(entries, queries, count), (queries @ entries.T).argsort(1, descending=True)[:, :count])


def test_d5_gradient_reaches_images_and_scale_alone():
    tensors = U1, U2, QUEUE[[0, 1]], QUEUE[[0, 2]], SCALE
    _, *slopes = gradients(lambda *each: neighbour_loss([*each[:2]], [*each[2:4]], each[4], ROWS), tensors)
    assert [bool(each.any()) for each in slopes] == [True, True, False, False, True]


def test_d5_what_is_gathered_of_the_queue_is_constant():
    """Also where texts and images have a gradient."""
    made = objective("{size: 20, start: random}")
    rows = {name: each.requires_grad_() for name, each in features(0).items()}
    derived = made.derived(rows, Targets(torch.arange(8), num_columns=8))
    assert derived.keys() == {f"neighbour_{what}_{number}" for what in ("rows", "places") for number in range(2)}
    assert not any(each.requires_grad for each in (*derived.values(), *made.state().values()))
    step(made, rows, 1)
    assert not any(each.requires_grad for each in made.state().values())


def test_d5_a_queue_of_the_texts_themselves_gives_clips_image_half():
    found = nearest(TEXT, TEXT, 1)[:, 0]
    expected = sum(F.cross_entropy(10 * image @ TEXT.T, ROWS).item() for image in (U1, U2)) / 2
    assert neighbour_loss([U1, U2], [TEXT[found]] * 2, SCALE, ROWS).item() == pytest.approx(expected, rel=1e-12)


def plain_loss(u1, u2, n1, n2, scale):
    """The slow twin."""
    return sum(F.cross_entropy(scale * image @ each.T, torch.arange(len(image))) for image in (u1, u2) for each in (n1, n2)) / 4


def test_slow_twin_and_law_1():
    def of_rank(columns_B, local, gathered, scales):
        return neighbour_loss(local[:2], gathered[2:], *scales, columns_B)

    tensors = [*(unit_rows(8, 5, seed=seed) for seed in range(4)), number(9.0)]
    found = gradients(over_ranks(of_rank, 1), tensors)
    expected = gradients(plain_loss, tensors)
    assert difference([found[0], *found[1:3], found[5]], [expected[0], *expected[1:3], expected[5]]) <= 1e-12
    assert difference(gradients(over_ranks(of_rank, 4), tensors), found) <= 1e-9


def test_law_1_fails_where_neighbours_are_not_gathered():
    """The seeded break: a rank contrasts its images with the neighbours of its own rows alone."""
    tensors = [*(unit_rows(8, 5, seed=seed) for seed in range(4)), number(9.0)]

    def local_only(columns_B, local, gathered, scales):
        return neighbour_loss(local[:2], local[2:], *scales, torch.arange(len(columns_B)))

    with pytest.raises(AssertionError):
        assert_law_1(local_only, tensors)


def test_equal_neighbours_are_no_negatives():
    """Rows 0 and 2 have the same neighbour: as published row 0 counts it once for and once against itself."""
    entries, ids = unit_rows(4, 5), torch.tensor([1, 3, 1])
    images, keys = unit_rows(3, 5, seed=1), Keys(ids, ids, shared=False)
    masked = neighbour_loss([images], [entries[ids]], SCALE, torch.arange(3), [keys])
    logits = (10 * images @ entries[ids].T).masked_fill((ids[:, None] == ids) & ~torch.eye(3, dtype=torch.bool), -1e9)
    assert masked.item() == pytest.approx(F.cross_entropy(logits, torch.arange(3)).item(), rel=1e-12)
    assert neighbour_loss([images], [entries[ids]], SCALE, torch.arange(3)).item() > masked.item() + 0.1


TINY = ("data.augmentation=declip", "data.plan.lanes=32", "model.embed_dim=6")


def objective(settings: str):
    made = build_objectives(load_recipe(RECIPES / "demo_clip.yaml", [f"objectives.neighbour={settings}", *TINY]))["neighbour"]
    made.prepare(torch.device("cpu"))
    return made


def features(seed: int) -> dict[str, torch.Tensor]:
    names = ("image", "image@second", "text", "text@eda")
    return {name: unit_rows(8, 6, seed=10 * seed + place).float() for place, name in enumerate(names)} | {"logit_scale": torch.tensor([9.0])}


def step(made, rows: dict[str, torch.Tensor], world: int) -> torch.Tensor:
    """Loss of one step on simulated ranks, and the queue's advance."""
    parts = torch.arange(8).chunk(world)
    targets = [Targets(part, num_columns=8) for part in parts]
    local = [{name: each if name == "logit_scale" else each[part] for name, each in rows.items()} for part in parts]
    local = [own | made.derived(own, target) for own, target in zip(local, targets, strict=True)]
    gathered = {name: torch.cat([own[name] for own in local]) for name in made.gathers_constant}
    loss = torch.stack([made.coupled(own, gathered, target) for own, target in zip(local, targets, strict=True)]).mean()
    made.advance(local[0], gathered, targets[0])
    return loss


@pytest.mark.parametrize("settings", ["{size: 20}", "{size: 10, groups: 4}", "{size: 24, groups: 2, neighbours: 3, equal_neighbours: mask}", "{size: 20, start: random}"])
def test_law_1_of_the_module_over_steps(settings):
    """Losses of five steps and the queue they leave, over the ring's end, for 1, 2, 4 and 8 ranks."""
    found = []
    for world in (1, 2, 4, 8):
        made = objective(settings)
        losses = [step(made, features(seed), world) for seed in range(5)]
        found.append([torch.stack(losses), *made.state().values()])
    assert all(torch.allclose(one, other, rtol=1e-5) for each in found[1:] for one, other in zip(each, found[0], strict=True))
    assert found[0][0][1:].min() > 0 and (found[0][0][0] > 0) == ("random" in settings), "an empty queue gives zero"


def test_groups_ask_their_own_queue():
    made = objective("{size: 8, groups: 2}")
    rows = features(0)
    step(made, rows, 1)
    entries = made.state()["entries"]
    for group, part in enumerate((slice(0, 4), slice(4, 8))):
        assert torch.equal(entries[group], torch.cat([rows["text@eda"][part], rows["text"][part]])), "the edited texts first"
    derived = made.derived(rows, Targets(torch.arange(8), num_columns=8))
    assert derived["neighbour_places_0"][:, 0].tolist() == [4, 5, 6, 7, 12, 13, 14, 15], "each text finds itself in its group's queue"
    assert torch.equal(derived["neighbour_rows_0"][:, 0], rows["text"])
    with pytest.raises(UserError, match="objectives.neighbour.groups 2 does not divide the batch of 7 rows"):
        made.derived(rows, Targets(torch.arange(7), num_columns=7))


def test_d4_a_step_asks_the_queue_as_it_was_before():
    made, rows = objective("{size: 16}"), features(0)
    step(made, features(1), 1)
    before = made.state()["entries"].clone()
    derived = made.derived(rows, Targets(torch.arange(8), num_columns=8))
    assert all((row == before[0]).all(1).any() for row in derived["neighbour_rows_0"][:, 0])
    step(made, rows, 1)
    after = made.derived(rows, Targets(torch.arange(8), num_columns=8))
    assert torch.equal(after["neighbour_rows_0"][:, 0], rows["text"]) and torch.equal(after["neighbour_rows_1"][:, 0], rows["text@eda"])


def test_d4_state_round_trips_and_unwritten_entries_are_no_neighbours():
    one, other = objective("{size: 40}"), objective("{size: 40}")
    for seed in range(2):
        step(one, features(seed), 1)
    for name, tensor in other.state().items():
        tensor.copy_(one.state()[name])
    assert other.derived(features(5), Targets(torch.arange(8), num_columns=8))["neighbour_places_0"].max() < 32
    assert step(one, features(2), 1).item() == step(other, features(2), 1).item() > 0
    assert all(torch.equal(tensor, other.state()[name]) for name, tensor in one.state().items())


def test_first_step_of_an_empty_queue_is_an_exact_zero_in_the_graph():
    made, rows = objective("{size: 20}"), {name: each.requires_grad_() for name, each in features(0).items()}
    loss = step(made, rows, 1)
    loss.backward()
    assert loss.item() == 0 and all(not rows[name].grad.any() for name in ("image", "image@second", "logit_scale"))


def test_size_is_asked_for_on_meta():
    made = objective("{size: 65536, groups: 32}")
    made.prepare(torch.device("meta"))
    assert made.state()["entries"].shape == (32, 65536, 6)


def test_more_neighbours_than_entries_are_refused():
    with pytest.raises(UserError, match="objectives.neighbour.neighbours 9 is more than the entries"):
        objective("{size: 8, neighbours: 9}")
