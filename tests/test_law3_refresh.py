"""Law 3 for the refreshes that live on what training recorded: killed and resumed equals never killed, and what is recorded is what was trained on."""

import numpy as np
import pytest

from protoclip_scale.data.index import index_of, open_readers
from protoclip_scale.data.plan import Plan
from protoclip_scale.engine import checkpoint, refresh
from protoclip_scale.prototypes import recording
from protoclip_scale.recipe import load_recipe
from tests.runs import check_equal, once, rows_of_final_weights
from tests.support import RECIPES, TINY_PROTOTYPES, final_tensors, output, pretrain

SETTINGS = (*TINY_PROTOTYPES, "run.checkpoint_steps=2", "run.keep_checkpoints=2", "objectives.teacher.refresh=once")
POLICIES = {
    "online": ("schedule.total=3 episodes", "prototypes.refresh=online"),
    "recorded": ("schedule.total=4 episodes", "prototypes.refresh=recorded", "data.plan.epoch_rows=512"),  # an epoch of two episodes
}
KILLS = {
    ("online", 1): (
        "cluster.iteration:2",  # the teacher's, before the first episode
        "train.step:3",  # in the warm-up, whose features are recorded too; one step after a checkpoint
        "records.sealed:1",  # before the checkpoint that counts on them
        "cluster.translate:2",
        "cluster.labels:1",
    ),
    ("recorded", 2): ("records.sealed:1", "cluster.translate:1"),
}


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("whole")
    for policy, ranks in KILLS:
        assert pretrain(folder / policy, "demo.yaml", (*SETTINGS, *POLICIES[policy]), ranks=ranks) == [0] * ranks, output(folder / policy)
    return {policy: folder / policy for policy, _ in KILLS}


@pytest.mark.parametrize(("policy", "ranks"), KILLS)
def test_a_run_killed_while_it_records_equals_one_never_killed(tmp_path, never_killed, policy, ranks):
    whole, killed, settings = never_killed[policy], tmp_path / "killed", (*SETTINGS, *POLICIES[policy])
    for number, event in enumerate(KILLS[policy, ranks]):
        on_rank = number % ranks
        codes = pretrain(killed, "demo.yaml", settings, ranks=ranks, env={"PROTOCLIP_KILL_AT": f"{event}@{on_rank}"})
        assert codes[on_rank] == -9, f"{event} never fired: {codes} {output(killed, on_rank)[-2000:]}"
    assert pretrain(killed, "demo.yaml", settings, ranks=ranks) == [0] * ranks, output(killed)

    check_equal(killed, whole)
    for kind in ("episode", "kmeans"):
        assert once(killed, kind) == once(whole, kind) and once(whole, kind)
    assert "extract" not in (killed / "log.txt").read_text()


def test_what_is_recorded_are_the_features_and_rows_of_the_steps(never_killed):
    run = never_killed["online"]
    manifest = checkpoint.read_manifest(checkpoint.list_checkpoints(run)[-1])
    assert manifest["recorded"] == [2] and recording.recorded_episodes(run) == [2], "older ones nobody counts on"
    store = recording.open_recorded(run, 2)
    trained = rows_of_final_weights(run)
    per_lane = 64 // 4
    for step in range(4):
        slots = slice(step * per_lane, (step + 1) * per_lane)
        recorded = np.concatenate([np.asarray(store.row_ids(lane))[slots] for lane in range(4)])
        assert recorded.tolist() == trained[8 + step]
    norms = np.concatenate([np.linalg.norm(block, axis=1) for _, block in store.blocks("text", 2)])
    np.testing.assert_allclose(norms, 1, atol=2e-3)


def test_rows_have_a_label_beforehand_where_their_last_visit_was_recorded(never_killed):
    """From the second epoch on; online they are labelled batch by batch, and a teacher's labels go by row."""
    assert [figures["records/found"] for _, figures in once(never_killed["recorded"], "episode")] == [0, 1, 1]
    inside_the_last_episode = {policy: final_tensors(run, step) for (policy, run), step in zip(never_killed.items(), ("10", "14"), strict=True)}
    labelled = {policy: {name for name in tensors if name.startswith("prototypes/labels/")} for policy, tensors in inside_the_last_episode.items()}
    assert labelled == {"online": set(), "recorded": {"prototypes/labels/image", "prototypes/labels/text"}}
    for name in labelled["recorded"]:
        labels = inside_the_last_episode["recorded"][name]
        assert len(labels) == 256 and (labels >= 0).all() and len(labels.unique()) > 8
    assert {"clustering/centroids/image", "clustering/centroids/text"} <= inside_the_last_episode["online"].keys(), "to start the next k-means from"


def test_a_lost_record_ends_a_resumed_run_with_one_line(tmp_path):
    run = tmp_path / "run"
    settings = (*SETTINGS, *POLICIES["online"])
    assert pretrain(run, "demo.yaml", settings, env={"PROTOCLIP_STOP_AT": "train.step:6"}) == [75], output(run)
    (run / "recorded/episode-000001").rename(tmp_path / "elsewhere")
    assert pretrain(run, "demo.yaml", settings) == [1]
    assert "episode-000001 is missing" in output(run)
    (tmp_path / "elsewhere").rename(run / "recorded/episode-000001")
    assert pretrain(run, "demo.yaml", settings) == [0], output(run)


@pytest.mark.parametrize(("rows", "episode_size"), [(4949, 256), (4949, 1024), (4949, 4864), (1000, 448)])
def test_two_epochs_of_records_hold_every_rows_previous_visit(rows, episode_size):
    """One would not: a row that is early in an epoch may be late in the next."""
    settings = load_recipe(RECIPES / "demo.yaml", (*SETTINGS, *POLICIES["recorded"], f"data.plan={{seed: 0, episode_size: {episode_size}, lanes: 4, global_batch: 64, epoch_rows: {rows}}}"))
    plan = Plan(index_of(open_readers(settings.data)), settings.data.plan)
    last_visit: dict[int, int] = {}
    farthest = 0
    for episode in range(4 * rows // plan.episode_size):
        row_ids = plan.episode(episode).row_ids.reshape(-1).tolist()
        farthest = max([farthest, *(episode - last_visit[row_id] for row_id in row_ids if row_id in last_visit)])
        last_visit |= dict.fromkeys(row_ids, episode)
    assert 1.5 * rows / plan.episode_size < farthest <= refresh.looks_back(settings, plan)
