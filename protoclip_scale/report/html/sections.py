"""What stands on the page beside the charts: facts, phases, attempts, the recipe, prototypes, rows that could not be used."""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import yaml

from protoclip_scale.redact import redacted
from protoclip_scale.report import plain
from protoclip_scale.report.html.run_files import RunFiles
from protoclip_scale.report.html.timeline import Timeline
from protoclip_scale.report.progress import PHASES

QUARANTINE_SHOWN = 25
VALUE_CHARACTERS = 240  # of a changed key; the whole recipe stands below
STATES = {"done": "done", "running": "running", "stopped": "stopped, can go on", "failed": "failed"}
ORDER = (*PHASES, "checkpoint", "records", "pictures")


@dataclass(frozen=True)
class Phase:
    """Seconds that a phase took over all attempts, and its share of all phases' seconds."""

    name: str
    seconds: float
    share: float

    @property
    def time(self) -> str:
        return plain.duration(self.seconds)

    @property
    def percent(self) -> str:
        return plain.percent(self.share)


def when(seconds: float | None) -> str:
    """'2026-11-22 03:41 UTC'."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)) if seconds else plain.DASH


def phases(run: RunFiles) -> list[Phase]:
    """The newest sums of each attempt, added up; work that was taken back took its time, too."""
    newest: dict[int, dict[str, Any]] = {}
    for line in (*run.lines["phases"], *run.lost_phases):
        if line["time"] >= newest.get(line["attempt"], line)["time"]:
            newest[line["attempt"]] = line
    sums: Counter = Counter()
    for line in newest.values():
        sums.update({name.removeprefix("seconds/"): value for name, value in line.items() if name.startswith("seconds/") and plain.as_number(value) is not None})
    total = sum(sums.values())
    names = [*(name for name in ORDER if name in sums), *sorted(sums.keys() - set(ORDER))]
    return [Phase(name, sums[name], sums[name] / total) for name in names if total]


def facts(run: RunFiles, timeline: Timeline, environment: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, text) of the head of the page: what ran and how far it got."""
    train, found = run.train, []
    step = int(train["step"][-1]) if train.length else 0
    total = environment.get("total_steps")
    found.append(("steps", f"{plain.count(step)} of {plain.count(total)}" if total else plain.count(step)))
    found.append(("samples", plain.count(train["samples"][-1] if train.length else 0)))
    found.append(("work", plain.duration(3600 * timeline.hours) + (f" in {len(timeline.attempts)} attempts" if len(timeline.attempts) > 1 else "")))
    if "ranks" in environment:
        found.append(("ranks", f"{plain.counted(environment['ranks'], 'rank')} on {plain.counted(environment.get('hosts', 1), 'host')}"))
    for key, label in (("device", "device"), ("strategy", "strategy"), ("precision", "precision"), ("parameters", "parameters"), ("global_batch", "global batch"), ("image_tower", "image tower"), ("text_tower", "text tower")):
        if environment.get(key) is not None:
            found.append((label, plain.count(environment[key]) if isinstance(environment[key], int) else str(environment[key])))
    if isinstance(environment.get("rows"), dict):
        found.append(("rows", ", ".join(f"{name} {plain.count(number)}" for name, number in environment["rows"].items())))
    if isinstance(environment.get("objectives"), dict):
        found.append(("objectives", ", ".join(f"{name} × {plain.number(weight)}" for name, weight in environment["objectives"].items())))
    return found


def attempts(timeline: Timeline) -> list[tuple[str, ...]]:
    """A row for each: number, start, from step, to step, hours of work, logged lines taken back."""
    return [
        (str(each.number), when(each.started), plain.count(each.from_step), plain.count(each.to_step), plain.duration(3600 * each.hours), plain.count(each.lines_taken_back))
        for each in timeline.attempts
    ]


def environment_rows(environment: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Hardware and versions as (name, value)."""
    hardware = {name.replace("_", " "): ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in (environment.get("hardware") or {}).items()}
    code = {"protoclip-scale commit": environment.get("git_commit")}
    tables = {"Hardware": hardware, "Versions": (environment.get("versions") or {}) | code}
    shown = {title: [(name, str(value)) for name, value in rows.items() if value not in (None, "")] for title, rows in tables.items()}
    return {title: rows for title, rows in shown.items() if rows}


def recipe_changes(run: RunFiles) -> dict[str, Any]:
    """What the engine noted of the recipe's files: {base, rows (key, base's value, this run's, who said it)}; {} for a run that has no note."""
    note = run.json("recipe_changes.json")
    if not note:
        return {}
    rows = [(str(each["key"]), _as_yaml(each["base"]) if "base" in each else "(default)", _as_yaml(each.get("value")), str(each.get("said_by", ""))) for each in note.get("changes", [])]
    return {"base": note.get("base"), "rows": rows}


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf")).removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= VALUE_CHARACTERS else text[:VALUE_CHARACTERS] + " ..."


def unusable(run: RunFiles) -> dict[str, Any]:
    """Quarantined rows: how many, why, and some of them; {} if there are none."""
    entries = run.quarantine()
    if not entries:
        return {}
    reasons = Counter(str(entry["reason"]).split(":")[0] for entry in entries)
    shown = [tuple(str(entry.get(name, "")) for name in ("file", "block", "row", "reason")) for entry in entries[:QUARANTINE_SHOWN]]
    return {"count": len(entries), "reasons": [(reason, plain.count(count)) for reason, count in reasons.most_common()], "rows": redacted(shown)}


def prototypes(run: RunFiles) -> list[dict[str, Any]]:
    """The labelings of the last clustering that was drawn: {labeling, episode, sections {heading: cards}, sizes [K]}."""
    order = {"text": 0, "image": 1, "teacher": 2}
    return sorted(run.newest_prototypes(), key=lambda entry: order.get(entry.get("labeling"), 3))
