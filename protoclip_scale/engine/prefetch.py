"""``--check --fetch``: what a recipe needs from model hubs, put into their cache on a machine that has a network, and proved to load without one."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from protoclip_scale.errors import UserError
from protoclip_scale.recipe import Recipe
from protoclip_scale.redact import redact_text


class Need(NamedTuple):
    """One thing that training loads from a hub: what it is, and the name of its loader."""

    what: str
    loader: str


def needs(recipe: Recipe) -> list[Need]:
    """What ``recipe`` loads from hubs; nothing for what lies in folders, comes with a package or stands in the recipe."""
    model, found = recipe.model, []
    if model.image.pretrained and model.init_from is None:
        found.append(Need(f"model.image {model.image.name}: weights from timm's hub", "image"))
    if model.text.name != "clip" and not Path(model.text.name).exists():
        weights = " and weights" if model.text.pretrained and model.init_from is None else ""
        found.append(Need(f"model.text {model.text.name}: configuration, tokenizer{weights}", "text"))
    if model.init_from is not None and not Path(model.init_from).exists():
        found.append(Need(f"model.init_from {model.init_from}: configuration and weights", "init_from"))
    return found


def fetch(recipe: Recipe) -> None:
    """Cache what is missing and print a line for each; for rank 0.

    Everything is loaded by processes that have no network, as a job will load it. UserError: it cannot be fetched, or loads
    only with a network.
    """
    if int(os.environ.get("RANK", "0")):
        return
    console = Console(soft_wrap=True, highlight=False)
    found = needs(recipe)
    offline = _load(recipe, found, offline=True)
    missing = [need for need, problem in zip(found, offline, strict=True) if problem]
    online = dict(zip(missing, _load(recipe, missing, offline=False), strict=True))
    for need in found:
        if problem := online.get(need):
            raise UserError(f"--fetch: {need.what}: {problem}")
        console.print(f"[bold]{'fetched' if need in online else 'already there'}[/bold] {escape(need.what)}")
    for need, problem in zip(missing, _load(recipe, missing, offline=True), strict=True):
        if problem:
            raise UserError(f"--fetch: {need.what}: it was fetched, but does not load without a network: {problem}; check that HF_HOME keeps files")
    for line in _without_a_hub(recipe):
        console.print(line, markup=False)


def _without_a_hub(recipe: Recipe) -> list[str]:
    """What else a user may expect here: the tokenizer and texts that need no hub, and rows that jobs read over the network."""
    from protoclip_scale.evaluation.suites import suite_of_recipe

    lines = ["nothing to fetch for CLIP's tokenizer: it is packaged"] if recipe.model.text.name == "clip" else []
    if prompts := sum(len(each.prompt_templates) for each in suite_of_recipe(recipe).evaluation.sets if each.classify):
        lines.append(f"nothing to fetch for prompts: {prompts} stand{'s' * (prompts == 1)} in the recipe or in the package's tasks")
    for source in recipe.data.sources:
        if source.hub or any("://" in place for place in (*source.patterns, recipe.data.root)):
            lines.append(f"not fetched: data.sources {redact_text(source.label)} is read over the network while training" + ("; start jobs with HF_HUB_OFFLINE=0" if source.hub else ""))
    return lines


def _load(recipe: Recipe, found: list[Need], offline: bool) -> list[str]:
    """The problem of each, '' if it loads; in a process of its own, since libraries read HF_HUB_OFFLINE when they are imported."""
    if not found:
        return []
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1" if offline else "0"
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_problems, (recipe, [need.loader for need in found]))
    finally:
        os.environ.pop("HF_HUB_OFFLINE") if before is None else os.environ.update(HF_HUB_OFFLINE=before)


def _problems(recipe: Recipe, loaders: list[str]) -> list[str]:
    problems = []
    for loader in loaders:
        try:
            _LOADERS[loader](recipe)
            problems.append("")
        except UserError as error:
            problems.append(str(error))
    return problems


def _load_image(recipe: Recipe) -> None:
    from protoclip_scale.models.image import ImageTower

    ImageTower(recipe.model.image)


def _load_text(recipe: Recipe) -> None:
    from protoclip_scale.data.tokenizers import tokenizer_for
    from protoclip_scale.models.text import TextTower

    tokenizer_for(recipe.model.text)
    TextTower(recipe.model.text, pretrained=None if recipe.model.init_from is None else False)


def _load_initial_weights(recipe: Recipe) -> None:
    from protoclip_scale.models.build import build_model

    build_model(recipe, frozenset({"image", "text", "logit_scale"}), recipe.run.seed)


_LOADERS: dict[str, Callable[[Recipe], None]] = {"image": _load_image, "text": _load_text, "init_from": _load_initial_weights}
