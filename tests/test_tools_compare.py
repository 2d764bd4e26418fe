"""Evaluation between steps, and tools/compare.py, on a real run, one that is killed inside such an evaluation, and one that evaluates nothing."""

import json
import runpy
import shutil

import numpy as np
import pandas as pd
import pytest

from protoclip_scale.evaluation import figures_csv
from protoclip_scale.recipe import load_recipe
from protoclip_scale.report.compare.runs import hours_of_work, method_of, read_runs
from protoclip_scale.report.compare.tables import HEADLINES, chosen_keys, curves, final_table, needs_table, seeds_table
from tests.runs import check_equal, check_tensors, once
from tests.support import CORPUS, RECIPES, ROOT, TINY, final_tensors, metrics, output, pretrain

SET = {"name": "val", "files": f"{CORPUS}/val-*.parquet", "classify": ["coarse"], "subset": 60, "templates": ["{}", "a {}"]}
SECTION = {"every_steps": 3, "sets": [SET], "gallery": {}, "probe_train": {**SET, "name": "train", "subset": 90}, "few_shot": {"shots": [1, 4], "draws": 2}, "knn": {"k": 5}, "diagnostics": {"restarts": 1}}
PLAIN = (*TINY, "schedule.total=2 episodes")
SETTINGS = (*(value for value in PLAIN if not value.startswith("evaluation")), f"evaluation={json.dumps(SECTION)}")
KEY = "val/zero_shot/coarse/top1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert pretrain(folder / "whole", "demo_clip.yaml", SETTINGS) == [0], output(folder / "whole")
    return folder


def test_evaluations_between_steps_are_logged_with_the_number_of_rows(runs):
    assert [line["step"] for line in metrics(runs / "whole", "eval")] == [3, 4, 6, 8]
    line = metrics(runs / "whole", "eval")[-1]
    assert line["val/rows"] == 60 and line["val/retrieval/n"] == 60
    assert {f"val/{key}" for key in ("few_shot/coarse/4shot/spread", "knn/coarse/top1", "image_effective_rank", "text_self_similarity", "kmeans/coarse/ami")} <= line.keys()


@pytest.mark.slow
def test_evaluations_between_steps_survive_a_kill(runs, tmp_path):
    """It comes after the checkpoint of the step that is evaluated: the resumed run has no step left to make that due."""
    killed, settings = tmp_path / "killed", (*SETTINGS, "run.checkpoint_steps=3")
    assert pretrain(killed, "demo_clip.yaml", settings, env={"PROTOCLIP_KILL_AT": "evaluate.start:1"}) == [-9]
    assert pretrain(killed, "demo_clip.yaml", settings) == [0], output(killed)
    assert {line["attempt"] for line in metrics(killed, "eval")} == {2}
    assert once(killed, "eval") == once(runs / "whole", "eval")
    check_equal(killed, runs / "whole")


@pytest.mark.slow
def test_evaluations_between_steps_change_nothing_in_training(runs, tmp_path):
    assert pretrain(tmp_path / "blind", "demo_clip.yaml", PLAIN) == [0], output(tmp_path / "blind")
    check_tensors(final_tensors(tmp_path / "blind"), final_tensors(runs / "whole"))


def line_of(kind, step, time, attempt=1, **more):
    return {"kind": kind, "step": step, "samples": 10 * step, "attempt": attempt, "time": time, **more}


def test_hours_leave_out_evaluations_pauses_and_what_was_done_again():
    lines = [
        line_of("train", 1, 110.0, samples_per_second=1.0),
        line_of("train", 2, 120.0, samples_per_second=1.0),
        line_of("eval", 2, 1120.0),  # 1,000 s of evaluation
        line_of("train", 3, 1130.0, samples_per_second=1.0),
        line_of("checkpoint", 3, 9000.0, attempt=2),  # what came between is lost, and so is the new start
        line_of("train", 5, 9300.0, attempt=2, samples_per_second=2.0),  # 20 samples since
        line_of("train", 6, 9305.0, attempt=2, samples_per_second=2.0),
    ]
    np.testing.assert_allclose(3600 * hours_of_work(lines, started=100.0), [10, 20, 20, 30, 30, 40, 45])
    assert hours_of_work(lines, started=None)[0] == 0


def test_figures_of_steps_that_were_taken_back_or_trained_again_do_not_count():
    rows = [figures_csv.Row(step, 10 * step, attempt, "val/x", value) for step, attempt, value in ((2, 1, 0.1), (4, 1, 0.2), (6, 1, 0.3), (4, 2, 0.25))]
    lines = [line_of("train", 1, 0.0), line_of("train", 2, 1.0), line_of("checkpoint", 2, 2.0), line_of("train", 3, 3.0, 2), line_of("checkpoint", 4, 4.0, 2)]
    assert [(row.step, row.attempt) for row in figures_csv.current(rows, lines)] == [(2, 1), (4, 2)]  # 6 lies ahead of the second attempt


def test_seeds_are_one_method_and_anything_else_is_another():
    recipe = load_recipe(RECIPES / "demo_clip.yaml", TINY)

    def other(*values):
        return method_of(load_recipe(RECIPES / "demo_clip.yaml", (*TINY, *values))) != method_of(recipe)

    assert not other("run.seed=7", "data.plan.seed=3", "run.log_steps=2", "optim.microbatch=16", "name=again")
    assert other("optim.lr=0.01") and other("data.plan.lanes=8") and other("model.embed_dim=16") and other("optim.ema={decay: 0.9}")


def copy_of(run, folder, seed, change):
    """A run whose accuracies differ by ``change``, as another seed's would."""
    shutil.copytree(run, folder)
    (folder / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("  seed: 0", f"  seed: {seed}"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps({key: value + change if key == KEY else value for key, value in line.items()}) + "\n" for line in lines))


@pytest.fixture
def three(runs, tmp_path):
    copy_of(runs / "whole", tmp_path / "better", 1, 0.1)
    copy_of(runs / "whole", tmp_path / "worse", 2, -1.0)
    return [runs / "whole", tmp_path / "better", tmp_path / "worse"]


def test_final_table_groups_seeds_with_their_spread(three):
    table = curves(read_runs(three))
    assert set(table["group"]) == {"demo_clip"} and set(table["plan_seed"]) == {0, 1, 2}
    final = final_table(table, [KEY])
    assert set(final["step"]) == {8} and len(final) == 3
    (row,) = seeds_table(final).to_dict("records")
    last = metrics(three[0], "eval")[-1][KEY]
    assert row["mean"] == pytest.approx(np.mean([last, last + 0.1, last - 1])) and row["spread"] == pytest.approx(np.std([last, last + 0.1, last - 1], ddof=1)) and row["runs"] == 3
    hours = table[(table["run"] == "whole") & (table["source"] == "train") & (table["key"] == "loss")]["hours"]
    assert (hours.diff().dropna() > 0).all()


def test_needs_are_of_the_first_evaluation_that_reaches_the_baseline(three):
    runs = read_runs(three)
    needs = needs_table(curves(runs), [KEY], "whole").set_index("run")
    values = [(line["samples"], line[KEY]) for line in metrics(three[0], "eval")]
    target = values[-1][1]
    assert needs.loc["whole", "samples"] == next(samples for samples, value in values if value >= target) and needs.loc["whole", "hours_ratio"] == 1
    assert needs.loc["better", "samples"] == next(samples for samples, value in values if value + 0.1 >= target)
    assert needs.loc["better", "exaflops"] == pytest.approx(needs.loc["better", "samples"] * runs[0].flops / 1e18) and runs[0].flops > 1e6
    assert np.isnan(needs.loc["worse", "samples"])


def test_the_tool_prints_writes_and_draws(three, tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "tools/compare.py"), run_name="tool")["main"]
    figures_csv.append(three[0], 8, 512, 1, {"val/knn/late/top1": 0.5}, "ab" * 32, "recipe@1")
    assert main([*map(str, three), "--baseline", str(three[0]), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "val/zero_shot/coarse/top1" in said and "±" in said and "(3)" in said and "not reached" in said and "val/knn/late/top1" in said
    for name in ("curves", "final", "seeds", "needs"):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / f"out/{name}.csv"), pd.read_parquet(tmp_path / f"out/{name}.parquet"), check_dtype=False)
    for name in ("curves_samples.png", "curves_hours.png", "few_shot.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000
    (three[0] / "evaluation.csv").unlink()


def test_bad_arguments_are_one_line(runs, tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "tools/compare.py"), run_name="tool")["main"]
    for arguments, message in (([tmp_path], "is no run directory"), ([runs / "whole", "--figures", "*/nothing"], "no evaluation has such a figure; there are val/")):
        assert main([str(argument) for argument in arguments]) == 1
        said = capsys.readouterr().err
        assert message in said and said.startswith("error: ") and said.count("\n") == 1
    assert chosen_keys(curves(read_runs([runs / "whole"])), HEADLINES)[0] == KEY
