"""What a preparation did: report.json, lists of the rows that were left out, README.md with the lines for a recipe, and a table on the screen."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from protoclip_scale.files import publish_json, publish_text, sync
from protoclip_scale.preparation import decisions as decided
from protoclip_scale.preparation.decisions import EXACT, LEAKED, NEAR, REASONS
from protoclip_scale.preparation.leakage import EvaluationFiles
from protoclip_scale.preparation.work import DECISIONS, EMPTY_CAPTION, UNDECODABLE, UNDECODABLE_EVALUATION, Job
from protoclip_scale.report.plain import count, counted, duration, percent

REPORT, BAD_ROWS, DUPLICATES, LEAKS = "report.json", "bad_rows.jsonl", "duplicates.jsonl", "leaked.jsonl"


def reason_kind(reason: str) -> str:
    """What decoding problems are counted under: without details, and with # for numbers."""
    return re.sub(r"\d+", "#", reason.split(":")[0])


def write_report(job: Job, evaluation: EvaluationFiles, seconds: float, processes: int) -> dict[str, Any]:
    """Writes the files into the folder of the shards; the report. seconds: wall time of this command (the workers' seconds count all attempts)."""
    shards = range(job.final.num_shards(job.rows.num_rows))
    decisions = decided.load(job.reports / DECISIONS) if job.settings.drops_afterwards else None
    reasons = Counter(decisions.reason.tolist()) if decisions else Counter()
    unusable = json.loads((job.reports / UNDECODABLE_EVALUATION).read_text(encoding="utf-8")) if decisions else []
    sums: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    undecodable: Counter[str] = Counter()

    def bad_rows() -> Iterator[dict[str, str]]:
        for shard in shards:
            report = job.final.report(shard)
            sums.update({name: report[name] for name in ("read", "kept", "input_bytes", "seconds")})
            for row in report["dropped"]:
                dropped[row["kind"]] += 1
                undecodable.update([reason_kind(row["reason"])] if row["kind"] == UNDECODABLE else [])
                yield {"row": row["key"], **({"image": row["image"]} if "image" in row else {}), "reason": row["reason"] or row["kind"]}

    _write_lines(job.out / BAD_ROWS, bad_rows())
    if decisions is not None:
        _write_lines(job.out / DUPLICATES, decided.entries(decisions, (EXACT, NEAR), job.rows.key, job.rows.key))
        _write_lines(job.out / LEAKS, decided.entries(decisions, (LEAKED,), job.rows.key, evaluation.name))
    report = {
        "rows": {
            "read": int(sums["read"]),
            "kept": int(sums["kept"]) - sum(reasons.values()),
            "undecodable": dict(undecodable.most_common()),
            "empty_captions": dropped[EMPTY_CAPTION],
            "leaked": reasons[LEAKED],
            "exact_duplicates": reasons[EXACT],
            "near_duplicates": reasons[NEAR],
        },
        "bytes": {"input_images": int(sums["input_bytes"]), "shards": sum(job.final.path(shard).stat().st_size for shard in shards)},
        "shards": len(shards),
        "seconds": round(seconds, 1),
        "worker_seconds": round(sums["seconds"], 1),
        "rows_per_worker_second": round(sums["read"] / max(sums["seconds"], 1e-9), 1),
        "processes": processes,
        "settings": job.settings.facts(),
        "sources": [{"name": reader.name, "rows": int(reader.block_rows.sum()), "fingerprint": reader.fingerprint} for reader in job.rows.readers],
        "leakage": [facts | {"undecodable": number} for facts, number in zip(evaluation.facts(), unusable, strict=True)],
        "recipe": recipe_lines(job),
    }
    publish_text(job.out / "README.md", _readme(report))
    publish_json(job.out / REPORT, report)
    return report


def recipe_lines(job: Job) -> str:
    """The lines of a recipe that read the shards."""
    source: dict[str, Any] = {"files": "*.parquet"}
    if job.rows.extra.names:
        source["columns"] = {"extra": job.rows.extra.names}
    data = {"root": str(job.out.resolve()), "sources": [source]}
    if job.settings.empty_caption == "keep":
        data["empty_caption"] = "keep"
    return yaml.safe_dump({"data": data}, sort_keys=False, width=1000)


def report_table(report: dict[str, Any]) -> Table:
    """The counts as a table."""
    rows = report["rows"]
    table = Table(title="Rows", title_justify="left")
    for heading, justify in (("", "left"), ("rows", "right"), ("share", "right")):
        table.add_column(heading, justify=justify)
    for name, number in _lines(rows):
        table.add_row(name, count(number), percent(number / max(1, rows["read"]), 2), end_section=name in ("read", "kept"))
    return table


def summary_line(report: dict[str, Any]) -> str:
    """Bytes and time in one line."""
    size = report["bytes"]
    return (
        f"{size['input_images'] / 1e6:,.1f} MB of images in, {size['shards'] / 1e6:,.1f} MB in {count(report['shards'])} shards out, {duration(report['seconds'])} "
        f"with {counted(report['processes'], 'worker')} ({count(report['rows_per_worker_second'])} rows/s each)"
    )


def leakage_lines(report: dict[str, Any]) -> list[str]:
    """A line for each evaluation file with images that no row could be compared with."""
    return [
        f"{file['file']}: {count(file['undecodable'])} of {count(file['rows'])} evaluation images cannot be decoded; rows that show them were not found"
        for file in report["leakage"]
        if file["undecodable"]
    ]


def reasons_line(report: dict[str, Any]) -> str:
    """Why rows were left out, with their numbers, in one line."""
    return ", ".join(f"{name} {number:,}" for name, number in _lines(report["rows"])[2:] if number)


def _lines(rows: dict[str, Any]) -> list[tuple[str, int]]:
    undecodable = [(f"undecodable: {reason}", number) for reason, number in rows["undecodable"].items()] or [("undecodable", 0)]
    names = {"empty_captions": "empty captions", "leaked": REASONS[LEAKED] + " (shows an evaluation image)", "exact_duplicates": "exact duplicates", "near_duplicates": "near duplicates"}
    return [("read", rows["read"]), ("kept", rows["kept"]), *undecodable, *((text, rows[name]) for name, text in names.items())]


def _readme(report: dict[str, Any]) -> str:
    lines = "\n".join(f"| {name} | {number:,} |" for name, number in _lines(report["rows"]))
    sources = ", ".join(f"{source['name']} ({source['rows']:,} rows)" for source in report["sources"])
    return f"""# Image-text shards

Made by tools/prepare_data.py from {sources}. To train on them, put this into a recipe:

```yaml
{report["recipe"]}```

| rows | |
|---|---|
{lines}

Rows left out are listed in {BAD_ROWS}, {DUPLICATES} and {LEAKS}, where there are any; `file#n` is row n of a file, counted from 0. All figures and settings: {REPORT}.
The folder preparation/ holds what a further run of the same command needs; training does not read it, and it may be deleted.
"""


def _write_lines(path: Path, entries: Iterable[dict[str, str]]) -> None:
    """One JSON object a line; the file appears whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for entry in entries:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
