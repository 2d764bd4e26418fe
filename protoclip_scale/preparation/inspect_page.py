"""The contact sheet as one self-contained HTML file, with the statistics and with captions in any script."""

import base64
import io
import os
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from PIL import Image

from protoclip_scale.preparation.inspect_rows import Column, Inspection, ShownRow
from protoclip_scale.preparation.inspect_statistics import MEASURES, SourceStatistics

STYLE = """
:root { color-scheme: light dark; --page: #f3f4f6; --card: #fff; --line: #d5d8de; --ink: #1d2433; --grey: #667085; --accent: #3b5bdb; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --page: #14161b; --card: #1d2028; --line: #343946; --ink: #e6e8ee; --grey: #98a2b3; --accent: #91a7ff; --bad: #f97066; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 24px; background: var(--page); color: var(--ink); font: 14px/1.45 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 2px; } h2 { font-size: 17px; margin: 28px 0 8px; } h3 { font-size: 14px; margin: 0 0 6px; }
p { margin: 0 0 12px; color: var(--grey); }
.tables { display: flex; flex-wrap: wrap; gap: 12px; }
.box { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px; max-width: 100%; overflow-wrap: anywhere; }
table { border-collapse: collapse; } td, th { padding: 2px 14px 2px 0; text-align: left; vertical-align: top; font-weight: normal; }
th { color: var(--grey); white-space: nowrap; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } .sheet { min-width: max-content; }
.strip { display: flex; gap: 10px; } .strip > * { flex: none; width: 152px; } .strip > :first-child { width: 200px; }
.heads { padding: 0 15px 6px; align-items: end; } .heads b { display: block; font-size: 15px; min-height: 22px; } .heads span { color: var(--grey); font-size: 12px; }
.row { margin-bottom: 10px; } .frame { height: 152px; border: 1px solid var(--line); border-radius: 4px; background: #fff; display: flex; }
.frame img { width: 100%; height: 100%; object-fit: contain; } .small { image-rendering: pixelated; } .frame.bad { background: color-mix(in srgb, var(--bad) 15%, var(--card)); }
.words { margin-top: 10px; align-items: start; } .words > .text { width: 100%; flex: 1; display: grid; grid-template-columns: 1fr 1fr; gap: 24px; max-width: 1100px; }
.facts { color: var(--grey); font-size: 12px; overflow-wrap: anywhere; } ul { margin: 0; padding-left: 16px; } li { overflow-wrap: anywhere; }
.label { color: var(--accent); white-space: nowrap; width: 1%; } .problem { color: var(--bad); font-weight: 600; }
"""


def write_page(path: str | Path, inspection: Inspection, title: str) -> None:
    """Writes the file by one atomic rename; pictures are inside it, about 10 kB each at 224 px."""
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p>A look at the data: statistics of a sample of rows, and rows beside the views that training makes of them.</p>",
        *(_source(source) for source in inspection.statistics),
        f"<h2>Rows and their views</h2><div class='scroll'><div class='sheet'>{_heads(inspection.columns)}",
        *(_row(row) for row in inspection.rows),
        "</div></div></body></html>",
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("\n".join(parts), encoding="utf-8")
    os.replace(temporary, path)


def _source(source: SourceStatistics) -> str:
    measured = [("", *MEASURES), *source.image_table()]
    boxes = [
        _box("In all", _table(source.totals())),
        _box("Images of the sample", _table(source.image_facts())),
        _box("Sizes of those that can be decoded", _table(measured, numbers=True)) if len(measured) > 1 else "",
        _box("Captions of the sample", _table(source.captions.table())),
    ]
    return f"<h2>{escape(source.name)}</h2><div class='tables'>{''.join(boxes)}</div>"


def _box(title: str, content: str) -> str:
    return f"<div class='box'><h3>{escape(title)}</h3>{content}</div>"


def _table(rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    kind = " class='number'" if numbers else ""
    return "<table>" + "".join(f"<tr><th>{escape(row[0])}</th>{''.join(f'<td{kind}>{escape(cell)}</td>' for cell in row[1:])}</tr>" for row in rows) + "</table>"


def _heads(columns: Sequence[Column]) -> str:
    heads = ["<div><b>original</b><span>as it is stored</span></div>"]
    for title, group in groupby(columns, key=lambda column: column.title):
        heads += [f"<div><b>{escape(title) if number == 0 else ''}</b><span>{escape(column.note)}</span></div>" for number, column in enumerate(group)]
    return f"<div class='strip heads'>{''.join(heads)}</div>"


def _row(row: ShownRow) -> str:
    size = f"{row.facts.width} × {row.facts.height}, " if row.facts.width else ""
    facts = f"{escape(f'{size}{row.facts.kind}, {row.facts.num_bytes / 1000:.1f} kB')}<br>{escape(row.file)}<br>row {row.row:,}"
    original = "<div class='frame bad'></div>" if row.original is None else f"<div class='frame'>{_image(row.original, 'the original')}</div>"
    views = "".join(f"<div class='frame'>{_image(picture, 'a view')}</div>" for picture in row.pictures)
    problem = f"<div><span class='problem'>cannot be used</span><br>{escape(row.problem)}</div>" if row.problem is not None else ""
    captions = "".join(f"<li>{escape(caption)}</li>" for caption in row.captions) or "<li>(no caption)</li>"
    texts = "".join(f"<tr><td class='label'>{escape(label)}</td><td>{escape(text)}</td></tr>" for label, text in row.texts)
    words = f"<div class='text'><ul>{captions}</ul><table>{texts}</table></div>"
    return f"<div class='box row'><div class='strip'>{original}{views}{problem}</div><div class='strip words'><div class='facts'>{facts}</div>{words}</div></div>"


def _image(picture: Image.Image, alternative: str) -> str:
    encoded = io.BytesIO()
    picture.save(encoded, format="WEBP", quality=90)
    kind = " class='small'" if max(picture.size) < 100 else ""
    return f"<img{kind} alt='{alternative}' src='data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}'>"
