"""What became of a gathered list: report.json, failures.csv, and the same for people."""

import csv
from collections import Counter
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from protoclip_scale.files import publish_json
from protoclip_scale.preparation.gather import Gathered
from protoclip_scale.report.plain import count, counted, percent


def write_report(gathered: Gathered) -> dict[str, Any]:
    """report.json and failures.csv (url, reason, detail, captions) beside the shards; what report.json holds."""
    passes = []
    for each in gathered.passes:
        kept = num_bytes = 0
        reasons: Counter[str] = Counter()
        for shard in each.shards:
            found = gathered.writer.report(shard)
            kept += found["kept"]
            num_bytes += found["image_bytes"]
            reasons.update(entry["kind"] for entry in found["dropped"])
        shards = [each.shards.start, each.shards.stop]
        passes.append(
            {
                "shards": shards,
                "tried": kept + reasons.total(),
                "kept": kept,
                "image_bytes": num_bytes,
                "failed": dict(reasons.most_common()),
            }
        )
    report = {
        "list": gathered.listed["facts"],
        "prepared": gathered.listed["summary"],
        "passes": passes,
        "shards": passes[-1]["shards"][1],
        "kept": sum(each["kept"] for each in passes),
        "image_bytes": sum(each["image_bytes"] for each in passes),
        "failed": passes[-1]["failed"],
    }
    out = gathered.writer.folder
    writing = out / ".failures.csv.writing"
    with writing.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["url", "reason", "detail", "captions"])
        table.writerows([row.url, entry["kind"], entry["reason"], "\n".join(row.captions)] for row, entry in gathered.failures())
    writing.replace(out / "failures.csv")
    publish_json(out / "report.json", report)
    return report


def report_screen(report: dict[str, Any]) -> RenderableType:
    """The figures of report.json for people."""
    prepared, pairs = report["prepared"], report["prepared"]["pairs"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("list", f"{report['list']['list']} ({report['list']['layout']})")
    facts.add_row("sha256", report["list"]["list_sha256"])
    for reason, number in prepared["lines_left_out"].items():
        facts.add_row("left out", f"{count(number)}: {reason}")
    if prepared["repeated_urls"]:
        facts.add_row("merged", f"{count(prepared['repeated_urls'])} rows into the first one of their URL")
    if "queries" in prepared:
        found = prepared["queries"]
        facts.add_row(
            "queries",
            f"{count(found['queries_found'])} of {count(found['queries'])} found; {count(found['pairs_kept'])} pairs kept by them",
        )
    images = f"{count(report['kept'])} of {count(pairs)} ({percent(report['kept'] / pairs)})"
    facts.add_row("images", f"{images} in {counted(report['shards'], 'shard')}, {report['image_bytes'] / 1e9:.3g} GB")
    if not report["failed"]:
        return facts
    table = Table(title="without an image", title_justify="left")
    table.add_column("reason")
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    for reason, number in report["failed"].items():
        table.add_row(Text(reason), count(number), percent(number / pairs))
    return Group(facts, table)
