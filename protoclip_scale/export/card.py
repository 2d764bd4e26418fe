"""The model card: README.md of an export, as the Hub shows it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from protoclip_scale.export.snippets import snippets_of
from protoclip_scale.export.source import published
from protoclip_scale.objectives.compared import Compared
from protoclip_scale.recipe import schema
from protoclip_scale.report.evaluation_table import evaluation_rows


class DataSource(NamedTuple):
    """One set of pairs that was trained on."""

    name: str
    hub: str | None
    revision: str | None
    rows: int | None
    fingerprint: str
    licence: str


class Facts(NamedTuple):
    """What a card tells. ``figures``: of the evaluation, with its step; ``sets``: where they come from; ``training``: rows of a table; ``recipe``: YAML; ``repo``: name on the Hub."""

    name: str
    license: str
    settings: schema.Model
    weights: str
    sources: list[DataSource]
    figures: Mapping[str, Any]
    sets: Mapping[str, Mapping[str, Any]]
    baseline: Mapping[str, Any]
    objectives: tuple[str, ...]
    training: Mapping[str, str]
    recipe: str
    repo: str | None
    compared: Compared = Compared()


def write_card(facts: Facts, layout: str, folder: Path) -> str:
    """Markdown with YAML front matter. ``folder``: the export's other files, which the lines of code are written for."""
    facts = facts._replace(settings=published(facts.settings))
    parts = [f"---\n{yaml.safe_dump(_front_matter(facts, layout), sort_keys=False)}---", f"# {facts.name}", _summary(facts, layout)]
    parts += ["## Use", _use(facts, layout, folder), "## Data", _data(facts)]
    parts += ["## Training", _table(("", ""), list(facts.training.items())), "## Evaluation", _evaluation(facts), "## Limitations", _limitations(facts)]
    if facts.recipe:
        parts += ["## Recipe", f"<details><summary>Every setting, defaults written out</summary>\n\n```yaml\n{facts.recipe.strip()}\n```\n\n</details>"]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: Facts, layout: str) -> dict[str, Any]:
    front = {
        "license": facts.license,
        # without embeddings, other libraries' pipelines and the Hub's widgets would show what means nothing
        **({"library_name": layout, "pipeline_tag": "zero-shot-image-classification"} if facts.compared.embeddings else {"library_name": "protoclip-scale"}),
        "tags": ["clip", *(name for name in facts.objectives if name != "clip"), "protoclip-scale", facts.settings.image.name],
    }
    hub = [source.hub for source in facts.sources if source.hub]
    return front | ({"datasets": hub} if hub else {})


def _summary(facts: Facts, layout: str) -> str:
    image, text = facts.settings.image, facts.settings.text
    text_tower = f"CLIP's text transformer ({text.layers} layers, width {text.width}, {text.context_length} tokens)" if text.name == "clip" else f"{text.name} ({text.context_length} tokens)"
    embeddings = f"unit embeddings of {facts.settings.embed_dim} numbers for pictures and captions, to be compared by their cosine"
    tokens = "sets of token features of pictures and captions, to be compared by late interaction (FILIP), by way of token_heads.safetensors"
    kinds = [words for words, there in ((embeddings, facts.compared.embeddings), (tokens, facts.compared.tokens)) if there]
    warning = "" if facts.compared.embeddings else "The embeddings that other libraries compute with it were not trained and mean nothing. "
    return (
        f"An image-text model: {', and '.join(kinds)}. {warning}"
        f"Image tower: {image.name} of timm at {image.size} x {image.size} pixels ({image.normalization} normalisation). Text tower: {text_tower}. Layout: {layout}."
    )


def _use(facts: Facts, layout: str, folder: Path) -> str:
    return "\n\n".join(f"With {title}:\n\n```python\n{code.strip()}\n```" for title, code in snippets_of(layout, folder, facts.repo, facts.compared).items())


def _data(facts: Facts) -> str:
    if not facts.sources:
        return "Not known: the weights come from elsewhere."
    rows = [
        (source.name, f"{source.rows:,}" if source.rows else "?", source.licence or "not stated", (source.revision or source.fingerprint)[:12])
        for source in facts.sources
    ]
    return _table(("source", "pairs", "licence", "commit or fingerprint"), rows) + "\n\nThe licence of the data is not that of the weights; look at both before you publish either."


def _evaluation(facts: Facts) -> str:
    tables = evaluation_rows(facts.figures, facts.baseline)
    if not tables:
        return "None was made during the run."
    ways = "Zero-shot: cosine to the normalised mean of a class's prompts; " if facts.compared.embeddings else ""
    ways += "by tokens: late interaction; " if facts.compared.tokens else ""
    parts = [f"After {facts.figures.get('step', 0):,} steps. {ways}retrieval: ties count half; the last column is the best constant answer or chance."]
    for title, rows in tables.items():
        parts.append(f"**{title}**\n\n" + _table(("figure", "model", "untrained", "constant or chance"), [tuple(row) for row in rows]))
    if facts.sets:
        head = ("set", "rows", "prompts", "hash of templates", "hash of data", "preprocessing")
        parts.append("**Where the figures come from**\n\n" + _table(head, [_provenance(name, about) for name, about in facts.sets.items()]))
    return "\n\n".join(parts)


def _provenance(name: str, about: Mapping[str, Any]) -> tuple[str, ...]:
    prompts = f"{about['prompts']}, {about['templates']} templates" if "prompts" in about else "-"
    pixels = about["preprocessing"]
    seen = f"{pixels['resize']} to {pixels['size']} pixels, {pixels['interpolation']}; {about['precision']}"
    whole = about["rows_expected"] in (None, about["rows_found"])
    return name, f"{about['n']:,}" + ("" if whole else f" (the whole set has {about['rows_expected']:,})"), prompts, about.get("template_hash", "-")[:12], about["data"][:12], seen


def _limitations(facts: Facts) -> str:
    known = [
        "It answers with the nearest of the labels it is given, however far that is; a similarity is no probability.",
        "It has the biases of its captions and pictures, and knows nothing that they do not show. It was not tested for any use that affects people.",
        f"Captions behind {facts.settings.text.context_length} tokens are cut, pictures are cropped to their middle square.",
    ]
    if facts.sources:
        known.insert(0, f"It saw {sum(source.rows or 0 for source in facts.sources):,} pairs, so it knows the kinds of pictures that these show.")
    return "\n".join(f"- {line}" for line in known)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)
