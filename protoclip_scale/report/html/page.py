"""The page itself: everything a run directory says, in one file that needs no network and no other file."""

import base64
import io
import time
from pathlib import Path
from typing import Any

import jinja2
import yaml
from PIL import Image

from protoclip_scale import __version__
from protoclip_scale.files import publish_text
from protoclip_scale.redact import redact_text
from protoclip_scale.report import plain
from protoclip_scale.report.html import chart, sections
from protoclip_scale.report.html.curves import training_figures
from protoclip_scale.report.html.evaluation import evaluated
from protoclip_scale.report.html.reduce import MAX_POINTS
from protoclip_scale.report.html.run_files import RunFiles, read_run
from protoclip_scale.report.html.timeline import Timeline

NAME = "report.html"
MAX_PICTURE_WIDTH = 1300
PICTURES = {"map": "A map of the prototypes: two principal axes of each space, a dot for each cluster, the largest with a word of their captions", "sizes": "How many clusters there are of each size"}


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write ``out`` (default: report.html in the run directory) by one atomic rename; gives its path. Reads about 100,000 lines of metrics a second or two.

    Raises:
        UserError: there is no run in ``run_dir``.
    """
    run = read_run(Path(run_dir))
    out = Path(out) if out else run.folder / NAME
    publish_text(out, render(run))
    return out


def render(run: RunFiles) -> str:
    """The page as text. Whatever comes from data (captions, names of files, messages) is escaped by the template."""
    timeline = Timeline(run)
    environment, status = run.json("environment.json"), run.json("status.json")
    recipe = run.recipe()
    settings = _settings(recipe)
    figures = training_figures(run.train, timeline)
    templates = jinja2.Environment(loader=jinja2.PackageLoader("protoclip_scale.report.html"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return templates.get_template("report.html").render(
        version=__version__,
        name=str(settings.get("name") or run.folder.name),
        notes=str(settings.get("notes") or "").strip(),
        folder=redact_text(str(run.folder)),
        written=sections.when(time.time()),
        state=str(status.get("state", "not known")),
        state_text=sections.STATES.get(status.get("state"), "state not known"),
        message=redact_text(str(status.get("message") or "")),
        facts=sections.facts(run, timeline, environment),
        figures=figures,
        reduced_to=max((drawing.lines for figure in figures for drawing in figure.drawings.values()), default=1),
        max_points=MAX_POINTS,
        restarts=timeline.restarts(),
        attempts=sections.attempts(timeline),
        phases=sections.phases(run),
        evaluation=evaluated(run.evaluations(), run.json("baseline.json"), settings.get("expected") or [], timeline),
        prototypes=sections.prototypes(run),
        pictures=_pictures(run),
        unusable=sections.unusable(run),
        warnings=run.warnings(),
        hangs=run.hangs(),
        environment=sections.environment_rows(environment),
        recipe=recipe,
        changes=sections.recipe_changes(run),
        chart=chart,
        plain=plain,
    )


def _settings(recipe: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _pictures(run: RunFiles) -> list[tuple[str, str, str]]:
    """(kind, what it shows, WebP as base64) of the newest clustering's pictures that are no cards."""
    found = sorted(run.folder.glob("pictures/prototypes-[0-9]*-*.png"))
    newest = [path for path in found if path.name.split("-")[1] == found[-1].name.split("-")[1]]
    return [(kind, PICTURES[kind], _webp(path)) for path in newest if (kind := path.stem.split("-", 2)[2]) in PICTURES]


def _webp(path: Path) -> str:
    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((MAX_PICTURE_WIDTH, 4 * MAX_PICTURE_WIDTH))
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
