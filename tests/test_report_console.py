"""The console: plain lines, the live panel on recorded terminals, the two screens, and that no drawing stops a run."""

import io
import re
import subprocess
import sys

import pytest

from protoclip_scale.report import plain
from protoclip_scale.report.console import Console, DrawingConsole, make_console
from protoclip_scale.report.evaluation_table import evaluation_lines, evaluation_rows
from protoclip_scale.report.panel import LEVELS, LivePanel, sparkline
from protoclip_scale.report.progress import LossHistory
from protoclip_scale.report.screens import first_screen
from protoclip_scale.report.terminal import Terminal, as_text

FACTS = {
    "name": "demo_protoclip",
    "ranks": 2,
    "hosts": 1,
    "device": "cpu",
    "precision": "fp32",
    "image_tower": "resnet18",
    "parameters": 12_345_678,
    "rows": {"demo": 2048, "more": 100},
    "total_steps": 320,
    "steps_per_episode": 16,
    "episodes": 20,
    "global_batch": 128,
    "objectives": {"clip": 1.0, "prototype": 0.5},
    "run_dir": "runs/demo",
}
STEP = {
    "step": 1234,
    "total_steps": 5000,
    "loss": 3.12345,
    "loss/clip": 2.1,
    "loss/prototype": 1.02345,
    "scale/logit": 14.2857,
    "lr": 4.9e-4,
    "gradient_norm": 1.2345,
    "samples_per_second": 512.3,
    "data_wait_share": 0.031,
    "memory_gb": 1.239,
    "eta_seconds": 753,
    "target_entropy": 0.93,
}
EVALUATION = {
    "seen/zero_shot/coarse/top1": 0.312,
    "seen/zero_shot/coarse/class_mean": 0.29,
    "seen/zero_shot/coarse/constant": 0.12,
    "seen/zero_shot/coarse/classes": 10,
    "seen/zero_shot/coarse/n": 512,
    "seen/retrieval/image_to_text/R@10": 0.21,
    "seen/retrieval/text_to_image/R@10": 0.22,
    "seen/retrieval/mean_recall": 0.1,
    "seen/retrieval/chance_R@10": 10 / 512,
    "seen/retrieval/n": 512,
    "seen/probe/coarse/top1": 0.61,
    "seen/modality_gap": 0.72,
    "pooled/seen/retrieval/image_to_text/R@10": 0.05,
}
SUMMARY = {
    "evaluation": EVALUATION,
    "baseline": {key: value / 2 for key, value in EVALUATION.items()},
    "expected": [{"metric": "seen/zero_shot/coarse/top1", "value": 0.3, "protocol": "seed 0", "source": "docs"}, {"metric": "seen/absent", "value": 0.4}],
    "phase_shares": {"train": 0.7, "extract": 0.2, "cluster": 0.1},
    "seconds": 700,
    "samples_per_second": 500.0,
    "memory_gb": 1.25,
    "run_dir": "runs/" + "long/" * 30 + "demo",
    "export_command": "python launch/export.py --run runs/demo --layout open_clip --out exported",
    "pictures": ["runs/demo/prototypes.png"],
}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def console_on(tmp_path, live=False, width=80, clock=None, file=None) -> tuple[DrawingConsole, Terminal]:
    terminal = Terminal(file=file or io.StringIO(), width=width, height=60, force_terminal=live, force_jupyter=False, legacy_windows=False)
    return DrawingConsole(terminal, tmp_path / "log.txt", live, clock or Clock()), terminal


def play(console: Console) -> None:
    """A short run with every call."""
    console.start(FACTS)
    console.phase("extract", 3, 20, 2048, "rows")
    console.advance(2048)
    console.phase("train", 3, 20, 16, "steps")
    console.advance(4, "after a pause")
    console.step(STEP)
    console.event("checkpoint written: checkpoints/step-00001234")
    console.evaluation(EVALUATION)
    console.finish(SUMMARY)
    console.close()


def test_step_line_holds_every_figure_and_leaves_no_gap_for_missing_ones():
    line = plain.step_line(STEP, "episode 3/20")
    assert line == (
        "episode 3/20 step 1,234/5,000 (24.7%) | loss 3.1235 (clip 2.1000, prototype 1.0234) | scale logit 14.29 | lr 4.90e-04 | grad 1.234"
        " | 512 samples/s | wait 3% | mem 1.24 GB | target_entropy 0.93 | eta 12m33s"
    )
    assert plain.step_line({"step": 7}) == "step 7"
    assert plain.step_line({"step": 7, "total_steps": None, "loss": float("nan"), "lr": None}) == "step 7 | loss nan | lr -"


@pytest.mark.parametrize(("seconds", "text"), [(4.24, "4.2s"), (9.96, "10s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (273600, "3d04h"), (None, "-"), (float("nan"), "-"), (-1, "-")])
def test_durations(seconds, text):
    assert plain.duration(seconds) == text


def test_plain_run_reads_well_in_a_file_and_log_has_the_same_lines(tmp_path):
    console, terminal = console_on(tmp_path)
    play(console)
    shown, logged = terminal.file.getvalue(), (tmp_path / "log.txt").read_text()
    assert console.problem is None
    assert "\x1b" not in shown + logged
    for text in ("2 ranks on 1 host", "demo 2,048, more 100", "320 in all, 16 per episode, 20 episodes", "clip x 1, prototype x 0.5", "12,345,678"):
        assert text in shown and text in logged
    for text in (
        "episode 3/20 extract ended: 2,048/2,048 rows in",
        plain.step_line(STEP, "episode 3/20"),
        "checkpoint written: checkpoints/step-00001234",
        f"{'run:':<16}{SUMMARY['run_dir']}",
        f"{'export it with:':<16}{SUMMARY['export_command']}",
        "runs/demo/prototypes.png",
    ):
        assert text in shown and text in logged
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line) for line in logged.splitlines())
    screens = [line for line in shown.splitlines() if line.startswith(("│", "╭", "╰"))]
    assert screens and max(map(len, screens)) == 80


def test_last_screen_shows_model_untrained_reference_and_expected_figures(tmp_path):
    console, terminal = console_on(tmp_path)
    console.finish(SUMMARY)
    lines = {line.strip("│ ").split("  ")[0]: re.findall(r"[\d.]+%|(?<= )-(?= )", line.split("  ", 3)[-1]) for line in terminal.file.getvalue().splitlines() if line.startswith("│")}
    assert lines["zero-shot coarse, class mean"] == ["29.0%", "14.5%", "10.0%"]
    assert lines["image to text, R@10 (n 512)"] == ["21.0%", "10.5%", "2.0%"]
    assert lines["linear probe coarse, top 1"] == ["61.0%", "30.5%", "12.0%"]
    shown = terminal.file.getvalue()
    assert re.search(r"31\.2% +15\.6% +12\.0%", shown) and re.search(r"30\.0% +31\.2% +seed 0; docs", shown)
    assert re.search(r"seen/absent +40\.0% +- ", shown)
    assert "extract 20%, cluster 10%, train 70%" in shown and "11m40s" in shown and "1.25 GB" in shown


@pytest.mark.parametrize("width", [80, 120])
def test_live_panel_holds_the_figures_within_the_width(tmp_path, width):
    clock = Clock()
    console, terminal = console_on(tmp_path, live=True, width=width, clock=clock)
    console.start(FACTS)
    console.phase("extract", 3, 20, 2048, "rows")
    clock.now = 12
    console.phase("train", 3, 20, 16, "steps")
    clock.now = 20
    console.advance(4)
    for loss in (5.0, 4.0, 3.12345):
        console.step(STEP | {"loss": loss})
    console.evaluation(EVALUATION)
    panel = as_text(LivePanel(console.progress), width)
    for text in ("demo_protoclip, 2 ranks on 1 host", "episode 3/20 train", "4/16 steps", "24s left", "1,234/5,000 steps", "12m33s left", "extract 12s", "train 8.0s", "loss 3.1235", "clip 2.1000"):
        assert text in panel
    for text in ("prototype 1.0234", "logit scale 14.29", "learning rate 4.90e-04", "gradient norm 1.234", "samples/s 512", "waiting for data 3.1%", "memory 1.24 GB", "target_entropy 0.93", "█▄▁"):
        assert text in panel
    assert {len(line) for line in panel.splitlines()} == {width}
    console.close()
    assert console.problem is None
    assert "waiting for data" in terminal.file.getvalue() and "\x1b[?25h" in terminal.file.getvalue(), "the cursor must come back"


def test_live_run_draws_and_logs_without_a_problem(tmp_path):
    console, terminal = console_on(tmp_path, live=True)
    play(console)
    assert console.problem is None
    assert SUMMARY["run_dir"] in terminal.file.getvalue(), "paths are not wrapped"
    assert plain.step_line(STEP, "episode 3/20") in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("width", [1, 5, 20, 40])
@pytest.mark.parametrize("live", [False, True])
def test_narrow_terminals(tmp_path, width, live):
    console, _ = console_on(tmp_path, live=live, width=width)
    play(console)
    assert console.problem is None


@pytest.mark.parametrize("live", [False, True])
def test_terminals_without_unicode(tmp_path, live):
    raw = io.BytesIO()
    console, _ = console_on(tmp_path, live=live, file=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    play(console)
    console.event("a caption: café")
    assert (console.problem is None) != live, "a panel gives way to lines"
    assert b"checkpoint written" in raw.getvalue() and b"caf" in raw.getvalue()
    assert "café" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("live", [False, True])
def test_a_terminal_that_fails_does_not_stop_the_run(tmp_path, live):
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError("terminal gone")

    console, _ = console_on(tmp_path, live=live, file=Broken())
    play(console)
    assert "terminal gone" in console.problem
    assert plain.step_line(STEP, "episode 3/20") in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("live", [False, True])
def test_a_reader_that_leaves_changes_neither_the_run_nor_its_exit_code(tmp_path, live):
    code = f"""
import sys
from protoclip_scale.report.console import make_console
console = make_console(True, None, {live})
for step in range(3000):
    console.event("x" * 100)
console.finish({{}})
print("the run went on", file=sys.stderr)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert (process.wait(timeout=60), errors) == (0, "the run went on\n")


def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    (tmp_path / "log.txt").mkdir()
    console, terminal = console_on(tmp_path)
    play(console)
    assert console.problem.startswith("log: ") and "checkpoint written" in terminal.file.getvalue()


def test_missing_and_odd_figures_are_drawn_as_dashes(tmp_path):
    for live in (False, True):
        console, _ = console_on(tmp_path, live=live)
        console.start({})
        console.advance(3)
        console.step({})
        console.step({"loss": None, "loss/clip": "?", "lr": float("inf"), "step": None, "samples_per_second": object()})
        console.phase("fetch", 1, 0, None, "blocks")
        console.evaluation({"seen/zero_shot/coarse/top1": None, "seen/retrieval/chance_R@10": 0.1, "other": 3})
        console.finish({"evaluation": {"seen/zero_shot/coarse/top1": float("nan")}, "expected": [{"metric": "x"}], "phase_shares": {}})
        console.finish({})
        console.failure("data.root:\nno such folder")
        assert console.problem is None
    assert (tmp_path / "log.txt").read_text().splitlines()[-1].endswith(" data.root: no such folder")


def test_long_phases_report_progress_now_and_then(tmp_path):
    clock = Clock()
    console, terminal = console_on(tmp_path, clock=clock)
    console.phase("extract", 1, 4, 1000, "rows", done=200)
    for done in range(210, 1001, 10):
        clock.now += 1
        console.advance(done, "shard")
    lines = [line for line in terminal.file.getvalue().splitlines() if "eta" in line]
    assert [line.split(" ", 1)[1] for line in lines] == ["episode 1/4 extract: 500/1,000 rows (50%) | eta 50s | shard", "episode 1/4 extract: 800/1,000 rows (80%) | eta 20s | shard"]


def test_svg_shows_the_run_and_loads_nothing_from_the_network(tmp_path):
    console, _ = console_on(tmp_path)
    play(console)
    console.save_svg(tmp_path / "pictures" / "console.svg")
    svg = (tmp_path / "pictures" / "console.svg").read_text()
    assert "demo_protoclip" in svg and "3.1235" in svg
    assert "url(http" not in svg and '"https://cdn' not in svg


def test_other_ranks_are_silent_and_a_pipe_gets_lines(tmp_path, capsys):
    play(make_console(is_main=False, log_path=tmp_path / "log.txt", live=True))
    assert not (tmp_path / "log.txt").exists() and capsys.readouterr().out == ""
    console = make_console(is_main=True, log_path=tmp_path / "log.txt", live=None)
    console.event("hello")
    assert re.fullmatch(r"\d\d:\d\d:\d\d hello\n", capsys.readouterr().out)


def test_evaluation_rows_of_galleries_and_lines():
    rows = evaluation_rows(EVALUATION, {})
    assert list(rows) == ["seen", "pooled/seen"]
    assert rows["pooled/seen"][0][:3] == ("image to text, R@10", "5.0%", "-")
    line = evaluation_lines(EVALUATION)[0]
    assert line.startswith("seen: zero-shot coarse, top 1 31.2% (vs 12.0%) | zero-shot coarse, class mean 29.0% (vs 10.0%) | image to text, R@10 21.0% (vs 2.0%)")


def test_sparkline_and_loss_history():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == LEVELS
    assert sparkline([1.0, 1.0], 8) == "▁▁" and sparkline([], 8) == ""
    assert len(sparkline(list(range(1000)), 50)) == 50
    history = LossHistory(capacity=8)
    for value in range(100):
        history.add(value)
    history.add(float("nan"))
    assert len(history.values) < 8 and history.stride == 16
    assert history.values == [sum(range(start, start + 16)) / 16 for start in range(0, 96, 16)]


def test_first_screen_names_the_checkpoint_it_resumes_from_and_unknown_facts():
    screen = as_text(first_screen(FACTS | {"resuming_from": "runs/demo/checkpoints/step-00000160", "step": 160, "trace_rows": True}), 100)
    assert "step-00000160 at step 160" in screen and re.search(r"trace rows +True", screen)


def test_a_phase_without_a_total_says_what_is_left_as_soon_as_it_knows(tmp_path):
    """A fetch learns how many blocks it has from its thread; its estimate must not wait for the usual half minute."""
    clock = Clock()
    console, _ = console_on(tmp_path, clock=clock)
    console.phase("fetch", 3, 10, None, "blocks")
    console.advance(0, total=200)
    for done in range(1, 100):
        clock.now += 0.5
        console.advance(done, total=200)
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "eta" in line]
    assert "2/200 blocks (1%) | eta 1m39s" in lines[0] and len(lines) == 2  # then one in half a minute
