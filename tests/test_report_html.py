"""The HTML report: of a real run in a real browser, of odd run directories, and the parts that it is made of."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from protoclip_scale.engine.report_writer import ReportWriter
from protoclip_scale.engine.run_log import RunLog
from protoclip_scale.errors import UserError
from protoclip_scale.report.html import NAME, write_report
from protoclip_scale.report.html.__main__ import main
from protoclip_scale.report.html.chart import percent_tick, plain_tick, ticks
from protoclip_scale.report.html.reduce import MAX_POINTS, reduced
from protoclip_scale.report.html.run_files import read_run
from protoclip_scale.report.html.timeline import Timeline
from tests.support import TINY_PROTOTYPES, output, pretrain

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
HOSTILE = "<script>document.title='taken over'</script><img src=http://127.0.0.1:9/x onerror=\"document.title='taken over'\">"
WITH_REPORT = (
    *(value for value in TINY_PROTOTYPES if not value.startswith(("run.report", "evaluation=", "prototypes.pictures"))),
    "prototypes.pictures=3",
    "evaluation={every_episodes: 1, sets: [{name: val, files: val-*.parquet, classify: [coarse]}]}",
    "schedule.total=2 episodes",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of seconds, with evaluations and pictures."""
    run = tmp_path_factory.mktemp("report") / "run"
    assert pretrain(run, "demo.yaml", WITH_REPORT) == [0], output(run)
    return run


def line(kind: str, step: int, attempt: int = 1, at: float = 1000.0, **figures) -> str:
    return json.dumps({"kind": kind, "step": step, "samples": step * 64, "attempt": attempt, "time": at, **figures}) + "\n"


def crashed(folder: Path) -> Path:
    """Two attempts, the second of which took five steps back; it was killed while it wrote."""
    for number, started in ((1, 1000.0), (2, 100_000.0)):
        (folder / "attempts").mkdir(parents=True, exist_ok=True)
        (folder / "attempts" / f"{number:04d}").write_text(json.dumps({"run_id": "r", "started": started}))
    kept = [line("train", step, 1, 1000.0 + 36 * step, loss=9.0 - step) for step in range(1, 6)]
    lost = [line("train", step, 1, 1000.0 + 36 * step, loss=9.0 - step) for step in range(6, 11)]
    again = [line("train", step, 2, 100_000.0 + 36 * (step - 5), loss=9.0 - step) for step in range(6, 9)]
    (folder / "metrics.jsonl").write_text("".join([*kept, *again]) + '{"kind": "train", "st')
    (folder / "metrics.discarded.jsonl").write_text("".join(lost) + json.dumps({"torn": "{", "attempt": 1}) + "\n")
    (folder / "status.json").write_text('{"state": "runn')
    (folder / "recipe.yaml").write_text("name: [torn")
    return folder


def test_a_run_writes_its_report_itself(trained):
    page = (trained / NAME).read_text()
    assert len(page) < 3_000_000 and "done" in page
    for words in ("Loss of prototype", "Logit scales", "Throughput", "Zero-shot accuracy, top 1", "Retrieval R@10", "Text clusters of episode 2", "What differs from demo.yaml"):
        assert words in page, words
    assert re.search(r"train [\dms.]+ \(\d", page), "times of phases"
    assert page.count("data:image/webp") > 20 and "1 rank on 1 host" in page and "torchvision" in page
    assert "report:" in (trained / "log.txt").read_text() and f"{NAME} was not written" not in (trained / "log.txt").read_text()
    assert json.loads((trained / "recipe_changes.json").read_text())["base"] == "demo.yaml, demo_prototypes.yaml"
    assert "schedule.total" in page and "--set" in page
    about = json.loads((trained / "evaluated_sets.json").read_text())["recipe"]["val"]
    assert about["n"] == read_run(trained).evaluations()[-1]["val/rows"] and about["template_hash"] and about["data"]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_in_a_browser_nothing_is_missing_nothing_is_asked_for_and_captions_are_only_text(trained, tmp_path):
    from playwright.sync_api import sync_playwright

    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints", "scratch", NAME))
    cards = sorted(run.glob("pictures/*-text.json"))[-1]
    content = json.loads(cards.read_text())
    content["sections"][0]["cards"][0]["captions"][0] = HOSTILE
    cards.write_text(json.dumps(content))
    (run / "quarantine").mkdir()
    (run / "quarantine" / "rank-00000.jsonl").write_text(json.dumps({"row_id": 1, "file": HOSTILE, "block": 0, "row": 0, "reason": "truncated: x"}) + "\n")
    (run / "log.txt").open("a").write("2026-01-01 00:00:00 warning: " + HOSTILE + "\n")
    (run / "attempts" / "0002").write_text(json.dumps({"run_id": "r", "started": time.time()}))
    RunLog(run, 2, True).metrics("train", 9, 576, **{"loss": 3.0, "loss/clip": 3.0})
    assert main([str(run)]) == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for width, scheme in ((1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page, said, asked = context.new_page(), [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto((run / NAME).as_uri())
            place = f"{width} px, {scheme}"
            assert said == [] and [url for url in asked if not url.startswith("data:")] == [(run / NAME).as_uri()], place
            assert page.title() == "demo: report of a run" and page.locator("script").count() == 1, place
            assert page.evaluate("document.documentElement.scrollWidth") <= width, place
            assert all(page.locator("img").evaluate_all("all => all.map(image => image.complete && image.naturalWidth > 0 && image.alt !== '')")), place
            shown = page.locator("figure svg[role=img]:visible").evaluate_all("all => all.map(svg => [svg.getBoundingClientRect(), svg.querySelector('.curve')?.getTotalLength(), svg.ariaLabel])")
            assert len(shown) >= 14 and all(box["width"] > 250 and box["height"] > 120 and box["left"] >= 0 and box["right"] <= width and label for box, _, label in shown), place
            assert sum(length > 50 for _, length, _ in shown) >= 10, f"{place}: curves are drawn"
            assert page.locator("table").evaluate_all("all => all.every(table => table.caption && table.querySelector('th[scope=col]'))"), place
            back, ink, curve = page.evaluate("['body', 'h1', '.curve'].map((name, n) => getComputedStyle(document.querySelector(name))[['backgroundColor', 'color', 'stroke'][n]])")
            brightness = {name: sum(int(part) for part in re.findall(r"\d+", color)[:3]) for name, color in (("back", back), ("ink", ink), ("curve", curve))}
            assert (brightness["back"] > 600 > brightness["ink"]) if scheme == "light" else (brightness["back"] < 150 and brightness["ink"] > 600), place
            page.locator("#theme").click()
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") != back, f"{place}: the button switches"
            assert page.evaluate("getComputedStyle(document.querySelector('.curve')).stroke") != curve, f"{place}: curves follow"
            over_samples = page.locator(".over-samples:visible").count()
            assert over_samples >= 10 and page.locator(".over-hours:visible").count() == 0, place
            page.get_by_role("button", name="hours of work").click()
            assert page.locator(".over-hours:visible").count() == over_samples and page.locator(".over-samples:visible").count() == 0, place
            assert page.locator("line.restart").count() > 10, "the second attempt is marked"
            context.close()
        browser.close()
    assert HOSTILE not in (run / NAME).read_text() and "&lt;script&gt;document.title" in (run / NAME).read_text()


def test_hours_are_those_of_work_and_what_was_taken_back_counts(tmp_path):
    run = read_run(crashed(tmp_path))
    timeline = Timeline(run)
    assert [(each.number, each.from_step, each.to_step, each.lines_taken_back) for each in timeline.attempts] == [(1, 0, 10, 5), (2, 5, 8, 0)]
    hours = timeline.hours_at(run.train["attempt"], run.train["time"])
    np.testing.assert_allclose(hours, [0.01, 0.02, 0.03, 0.04, 0.05, 0.11, 0.12, 0.13])
    assert [(each.from_samples, round(each.before, 9)) for each in timeline.restarts()] == [(320, 0.1)]


def test_of_a_crashed_run_of_the_smallest_and_of_none(tmp_path, capsys):
    page = write_report(crashed(tmp_path / "crashed")).read_text()
    assert "state not known" in page and "2 attempts" in page and "The times of its phases were not recorded" in page
    smallest = tmp_path / "smallest"
    smallest.mkdir()
    (smallest / "metrics.jsonl").write_text(line("train", 1, loss=4.2, **{"loss/clip": 4.2}))
    assert main([str(smallest), "--out", str(tmp_path / "new" / "page.html")]) == 0 and "4.2000" in (tmp_path / "new" / "page.html").read_text()
    (tmp_path / "begun" / "attempts").mkdir(parents=True)
    assert "No step has been logged yet" in write_report(tmp_path / "begun").read_text()
    for folder in (tmp_path / "none", tmp_path / "new"):
        assert main([str(folder)]) == 1
        assert re.fullmatch(r"error: .*(no such folder|holds no run).*; name a run directory|error: .* holds no run .*\n?", capsys.readouterr().err.strip())
        with pytest.raises(UserError):
            write_report(folder)


def test_evaluations_of_the_run_and_of_watch_stand_in_one_chart(tmp_path):
    evaluated = [line("eval", step, **{"val/zero_shot/c/top1": 0.5, "val/zero_shot/c/constant": 0.2}) for step in (10, 30)]
    trained = [line("train", step, attempt) for attempt, step in ((1, 20), (1, 25), (2, 21), (2, 30))]
    (tmp_path / "metrics.jsonl").write_text("".join([*evaluated, *trained, *(line("checkpoint", step) for step in (20, 25, 30))]))
    watched = ["20,1280,1,val/zero_shot/c/top1,0.375", "25,1600,1,val/zero_shot/c/top1,0.9", "30,1920,2,val/knn/c/top1,0.625", "30,1920,2,watch/suite@1,77", "40,25"]
    (tmp_path / "evaluation.csv").write_text("\n".join(["step,samples,attempt,key,value", *watched]))  # the second attempt trained step 25 again
    found = read_run(tmp_path).evaluations()
    assert [(entry["step"], entry.get("val/zero_shot/c/top1"), entry.get("val/knn/c/top1")) for entry in found] == [(10, 0.5, None), (20, 0.375, None), (30, 0.5, 0.625)]
    page = write_report(tmp_path).read_text()
    assert "constant answer or chance 20.0%" in page and "k-NN, top 1" in page and "62.5%" in page


def test_a_hundred_thousand_lines_become_few_points_and_none_is_lost(tmp_path):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            file.write(line("train", step, at=1000.0 + step, loss=5.0 if step != 77_777 else 50.0))
    page = write_report(tmp_path).read_text()
    assert len(page) < 300_000 and "the mean of up to 417 neighbouring logged lines" in page and "100,000" in page
    x = np.arange(100_000.0)
    y = np.where(x == 77_777, 50.0, np.sin(x / 9000))
    y[5] = np.nan
    points = reduced(x, y)
    assert len(points.x) <= MAX_POINTS and points.high.max() == 50.0 and points.low.min() >= -1
    np.testing.assert_allclose((points.mean * np.minimum(points.lines, 99_999 - points.lines * np.arange(len(points.x)))).sum(), np.nansum(y))
    few = reduced(x[:10], y[:10])
    np.testing.assert_array_equal(few.mean, y[[0, 1, 2, 3, 4, 6, 7, 8, 9]])


def test_ticks_hold_the_values_and_can_be_told_apart():
    for low, high in ((0, 1), (0.9971, 0.9983), (3, 3), (0, 4.096e9), (-2, 7), (0, 5e-4), (14.19, 14.29), (0, 0)):
        values, step = ticks(low, high)
        assert values[0] <= low and values[-1] >= high and 2 <= len(values) <= 9, (low, high)
        labels = [plain_tick(value, step) for value in values]
        assert len(set(labels)) == len(labels) and all(len(label) <= 7 for label in labels), labels
    assert [percent_tick(value, 0.05) for value in (0, 0.05, 1)] == ["0%", "5%", "100%"] and plain_tick(1_500_000, 500_000) == "1.5M"


def test_a_report_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path):
    said = []
    writer = ReportWriter(tmp_path / "gone", True, said.append)
    for _ in range(3):
        writer.ask()
        writer.finish()
    assert len(said) == 1 and "there is no such folder" in said[0] and "tools/report.py" in said[0]
    (tmp_path / "off").mkdir()
    ReportWriter(tmp_path / "off", False, said.append).finish()
    assert len(said) == 1 and not list((tmp_path / "off").iterdir())
