"""Law 3 for what further objectives bring: views, heads, and a state, which is a queue here; killed and resumed equals never killed, at two ranks, under DDP and ZeRO-2."""

import pytest
import torch

from tests.runs import check_equal, history, save_again
from tests.strategies import FAMILY, environment, small_wordnet
from tests.support import TINY, final_tensors, output, pretrain

OBJECTIVES = "objectives={clip: null, simclr: {hidden_dim: 32, dim: 16}, mlm: {}, neighbour: {size: 100}}"  # the batch of 64 does not divide the queue
SETTINGS = (*TINY, "model.image.name=test_convnext", "run.checkpoint_steps=2", "model.text.mask_token=true", "schedule.total=2 episodes", OBJECTIVES)
KILLS = ("train.step:3", "checkpoint.written:1", "train.forward:2")
RANKS = 2

# every method's recipe, with small heads, and what no recipe of the demo has
_, *DECLIP = FAMILY["declip"]
_, *FILIP = FAMILY["filip"]
METHODS = {
    "declip": ("demo_declip.yaml", (*TINY, *DECLIP, "objectives.neighbour.start=empty")),
    "filip": ("demo_filip.yaml", (*TINY, *FILIP)),
    "siglip": ("demo_clip.yaml", (*TINY, "objectives={siglip: {}, filip: {dim: 16, groups: 4}, simsiam: {dim: 32, predictor_dim: 16}}", "model.norm_groups=2")),
}


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory):
    return small_wordnet(tmp_path_factory.mktemp("wordnet") / "files")


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory, wordnet):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert pretrain(run, "demo_clip.yaml", SETTINGS, ranks=RANKS, env=wordnet) == [0] * RANKS, output(run)
    return run


def remembered(run) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in final_tensors(run).items() if name.startswith("objective/")}


def test_a_killed_run_equals_one_never_killed(tmp_path, never_killed, wordnet):
    run = tmp_path / "run"
    for number, event in enumerate(KILLS):
        codes = pretrain(run, "demo_clip.yaml", SETTINGS, ranks=RANKS, env=wordnet | {"PROTOCLIP_KILL_AT": f"{event}@{number % RANKS}"})
        assert codes[number % RANKS] == -9, f"{event} never fired: {codes} {output(run)[-2000:]}"
    assert pretrain(run, "demo_clip.yaml", SETTINGS, ranks=RANKS, env=wordnet) == [0] * RANKS, output(run)
    check_equal(run, never_killed)
    state = remembered(never_killed)
    assert state.keys() == {"objective/neighbour/entries", "objective/neighbour/pushed"}
    assert int(state["objective/neighbour/pushed"]) == 8 * 2 * 64 and state["objective/neighbour/entries"].any(-1).all()
    torch.testing.assert_close(state["objective/neighbour/entries"].norm(dim=-1), torch.ones(1, 100))


@pytest.mark.slow
def test_the_same_with_another_number_of_ranks(tmp_path, never_killed, wordnet):
    """The queue of one rank is that of two, to rounding, and a run goes on from either."""
    run = tmp_path / "run"
    assert pretrain(run, "demo_clip.yaml", SETTINGS, ranks=RANKS, env=wordnet | {"PROTOCLIP_STOP_AT": "train.step:2"}) == [75] * RANKS, output(run)
    assert pretrain(run, "demo_clip.yaml", SETTINGS, env=wordnet) == [0], output(run)
    expected, found = history(never_killed), history(run)
    assert expected.keys() == found.keys()
    assert all(found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-4) for step in expected)
    queue, state = remembered(never_killed), remembered(run)
    assert state.keys() == queue.keys() and torch.equal(state["objective/neighbour/pushed"], queue["objective/neighbour/pushed"])
    torch.testing.assert_close(state["objective/neighbour/entries"], queue["objective/neighbour/entries"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_resumption_with_an_empty_queue_fails_the_law(tmp_path, never_killed, wordnet):
    run = tmp_path / "run"
    pretrain(run, "demo_clip.yaml", SETTINGS, ranks=RANKS, env=wordnet | {"PROTOCLIP_KILL_AT": "train.step:3@0"})
    save_again(run, lambda name, tensor: torch.zeros_like(tensor) if name.startswith("objective/") else tensor)
    pretrain(run, "demo_clip.yaml", SETTINGS, ranks=RANKS, env=wordnet)
    assert history(run) != history(never_killed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_killed_and_resumed_under_both_strategies(tmp_path, wordnet, method, strategy):
    recipe, settings = METHODS[method]
    settings = (*settings, "model.image.name=test_convnext", "run.checkpoint_steps=2", "schedule.total=2 episodes")
    env, run, whole = environment(strategy, RANKS) | wordnet, tmp_path / "run", tmp_path / "whole"
    assert pretrain(whole, recipe, settings, ranks=RANKS, env=env) == [0] * RANKS, output(whole)[-3000:]
    for number, event in enumerate(KILLS):
        codes = pretrain(run, recipe, settings, ranks=RANKS, env=env | {"PROTOCLIP_KILL_AT": f"{event}@{number % RANKS}"})
        assert codes[number % RANKS] == -9, f"{event} never fired: {codes} {output(run)[-2000:]}"
    assert pretrain(run, recipe, settings, ranks=RANKS, env=env) == [0] * RANKS, output(run)[-3000:]
    check_equal(run, whole)
    assert len(history(run)) == 8 and "resuming from" in (run / "log.txt").read_text()
    queue = [name for name in final_tensors(whole) if name.startswith("objective/")]
    assert len(queue) == (2 if method == "declip" else 0)
