"""Contradictions between the sections of a recipe; those inside one section are in the schema.

Each rule yields lines that name both keys, what they say, and what to change. A rule may compare values only: a resolved
recipe has every default written out, so that nobody wrote a key proves nothing.
"""

from collections.abc import Callable, Iterator

from protoclip_scale.recipe.names import nearest, objective_module
from protoclip_scale.recipe.schema import Recipe


def contradictions(recipe: Recipe) -> Iterator[str]:
    """Every contradiction, one line each; the first is the one worth reading."""
    for rule in RULES:
        yield from rule(recipe)


def clustered_objectives(recipe: Recipe) -> list[str]:
    """Names of the objectives with a weight that need an episode's clusters."""
    return [name for name in _weighted(recipe) if _clusters(name)]


def steps_per_episode(recipe: Recipe) -> int:
    """Whole global batches in an episode."""
    return recipe.data.plan.episode_size // recipe.data.plan.global_batch


def total_steps(recipe: Recipe) -> int | None:
    """Optimiser steps of the run; None if it is told in epochs and only the sources know how many rows there are."""
    number, unit = recipe.schedule.length()
    if unit == "epochs" and recipe.data.plan.epoch_rows is None:
        return None
    rows_or_steps = {
        "episodes": lambda: number * steps_per_episode(recipe),
        "epochs": lambda: number * recipe.data.plan.epoch_rows // recipe.data.plan.global_batch,
        "steps": lambda: number,
    }
    return int(rows_or_steps[unit]())


def _weighted(recipe: Recipe) -> list[str]:
    return [name for name, settings in recipe.objectives.items() if settings.weight > 0]


def _clusters(name: str) -> tuple[str, ...]:
    return objective_module(name).build.clusters


def _something_trains(recipe: Recipe) -> Iterator[str]:
    contrastive = [name for name in _weighted(recipe) if not _clusters(name)]
    if not _weighted(recipe):
        yield f"objectives: all weights are 0 ({', '.join(recipe.objectives)}), so nothing trains; give one of them a weight"
    elif not contrastive and recipe.episodes.warmup:
        yield (
            f"episodes.warmup {recipe.episodes.warmup} trains the contrastive loss alone, but objectives names none with a weight; "
            "add objectives.clip or set episodes.warmup to 0"
        )
    elif recipe.episodes.lit and not [name for name in contrastive if not objective_module(name).build.stops_when_locked]:
        yield (
            f"episodes.lit.start {recipe.episodes.lit.start} ends with the contrastive loss alone, but objectives names none with a weight; "
            "add objectives.clip or set episodes.lit to null"
        )


def _masked_texts_have_a_mask(recipe: Recipe) -> Iterator[str]:
    for name in _weighted(recipe):
        if not recipe.model.text.mask_token and objective_module(name).build(recipe.objectives[name], recipe).views.masked:
            yield f"objectives.{name} masks tokens of the caption, but model.text.mask_token is false; set it to true, or the weight of {name} to 0"


def _neighbours_are_of_trained_texts(recipe: Recipe) -> Iterator[str]:
    """It reads texts without gradient, so another objective must train them from the first episode on."""
    others = [name for name in _weighted(recipe) if name != "neighbour" and not _clusters(name)]
    needs = frozenset().union(*(objective_module(name).build(recipe.objectives[name], recipe).needs for name in others))
    if "neighbour" in _weighted(recipe) and not any(name.split("@")[0] == "text" for name in needs):
        yield "objectives.neighbour draws images to the neighbours of their texts, but no other objective trains the text embedding; add objectives.clip or objectives.multiview, or set its weight to 0"


def _clustering_is_used(recipe: Recipe) -> Iterator[str]:
    clustered = clustered_objectives(recipe)
    if clustered and recipe.prototypes is None:
        yield f"objectives.{clustered[0]} needs clusters, but prototypes is missing; add a section prototypes, for instance with clusters: {max(2, recipe.data.plan.episode_size // 10)}"
    if not clustered and recipe.prototypes is not None:
        yield (
            f"prototypes.clusters {recipe.prototypes.clusters} has no effect: nothing in objectives ({', '.join(recipe.objectives)}) uses clusters "
            "with a weight; add objectives.prototype or set prototypes to null"
        )


def _recorded_features_exist(recipe: Recipe) -> Iterator[str]:
    """Without an extraction pass the first clustering has what the warm-up recorded, and no teacher's features of the rows before they are trained on."""
    if recipe.prototypes is None or recipe.prototypes.refresh == "episode":
        return
    refresh = recipe.prototypes.refresh
    if clustered_objectives(recipe) and not recipe.episodes.warmup:
        yield f"prototypes.refresh {refresh} clusters what earlier episodes recorded, but episodes.warmup is 0: set it to at least 1, or refresh to episode"
    teacher = recipe.objectives.get("teacher")
    if teacher is not None and teacher.weight > 0 and teacher.refresh == "episode":
        yield (
            f"objectives.teacher.refresh episode clusters the teacher's features of each episode's rows, which only prototypes.refresh episode extracts (found {refresh}); "
            "set objectives.teacher.refresh to once"
        )


def _searched_each_episode(recipe: Recipe) -> bool:
    """Whether any labeling is clustered episode by episode; a teacher's may be clustered once for all."""
    return any(labeling != "teacher" or recipe.objectives[name].refresh == "episode" for name in clustered_objectives(recipe) for labeling in _clusters(name))


def _episode_clusterings_exist(recipe: Recipe) -> Iterator[str]:
    """Settings of clusterings from one episode to the next."""
    if recipe.prototypes is None:
        return
    refresh = recipe.prototypes.refresh
    if recipe.prototypes.warm_start and clustered_objectives(recipe) and not _searched_each_episode(recipe):
        yield "prototypes.warm_start true has no effect: objectives.teacher.refresh once leaves no clustering that follows another; remove it"
    if recipe.prototypes.normalize_centroids and refresh != "episode" and "prototype" in clustered_objectives(recipe):
        yield (
            f"prototypes.normalize_centroids true would label rows by other centroids than prototypes.refresh {refresh} clustered them with; "
            "set it to false, prototypes.spherical to true, or refresh to episode"
        )


def _clusters_fit_the_episode(recipe: Recipe) -> Iterator[str]:
    plan = recipe.data.plan
    rows = steps_per_episode(recipe) * plan.global_batch
    if recipe.prototypes and recipe.prototypes.clusters > rows and (_searched_each_episode(recipe) or not clustered_objectives(recipe)):
        yield (
            f"prototypes.clusters {recipe.prototypes.clusters} is larger than an episode: data.plan.episode_size {plan.episode_size} is {rows} rows "
            f"in whole batches; use at most {rows} clusters (about {max(2, rows // 10)} is healthy), or longer episodes"
        )


def _episode_fits_the_epoch(recipe: Recipe) -> Iterator[str]:
    plan = recipe.data.plan
    rows = steps_per_episode(recipe) * plan.global_batch
    if plan.epoch_rows is not None and rows > plan.epoch_rows:
        yield f"data.plan.episode_size {plan.episode_size} is larger than data.plan.epoch_rows {plan.epoch_rows}; use at most {plan.epoch_rows}, or more rows"


def _groups_divide_lanes(recipe: Recipe) -> Iterator[str]:
    lanes = recipe.data.plan.lanes
    groups_of = {"model.norm_groups": recipe.model.norm_groups}
    groups_of |= {f"objectives.{name}.{key}": getattr(recipe.objectives[name], key, None) or 1 for name in _weighted(recipe) for key in ("groups", "norm_groups")}
    usable = ", ".join(str(number) for number in range(1, lanes + 1) if lanes % number == 0)
    for key, groups in groups_of.items():
        if lanes % groups:
            yield f"{key} {groups} does not divide data.plan.lanes {lanes}; use one of {usable}, or other lanes"


def _warmup_ends(recipe: Recipe) -> Iterator[str]:
    steps, warmup = total_steps(recipe), recipe.schedule.warmup_steps
    if steps is not None and steps < 1:
        yield f"schedule.total '{recipe.schedule.total}' is less than one step; make it longer"
    elif steps is not None and warmup >= steps:
        yield f"schedule.warmup_steps {warmup} is not less than the {steps} steps of schedule.total '{recipe.schedule.total}'; shorten the warm-up or lengthen the run"


def _episodes_in_order(recipe: Recipe) -> Iterator[str]:
    """Warm-up, then prototypes, then the locked ending; each inside the run."""
    steps, per_episode, warmup, lit = total_steps(recipe), steps_per_episode(recipe), recipe.episodes.warmup, recipe.episodes.lit
    episodes = None if steps is None else -(-steps // per_episode)
    clustered = clustered_objectives(recipe)
    if clustered and episodes is not None and warmup >= episodes:
        yield (
            f"episodes.warmup {warmup} leaves no episode for objectives.{clustered[0]}: schedule.total '{recipe.schedule.total}' is {episodes} "
            "episodes; shorten the warm-up or lengthen the run"
        )
    if lit is None:
        return
    if episodes is not None and lit.start > episodes:
        yield (
            f"episodes.lit.start {lit.start} lies beyond the end: schedule.total '{recipe.schedule.total}' is {episodes} episodes; "
            f"use at most {episodes}, or set episodes.lit to null"
        )
    if clustered and lit.start <= warmup + 1:
        yield (
            f"episodes.lit.start {lit.start} leaves no episode for objectives.{clustered[0]} after episodes.warmup {warmup}; "
            f"start the ending at {warmup + 2} or later"
        )
    if recipe.schedule.warmup_steps >= (lit.start - 1) * per_episode:
        yield (
            f"schedule.warmup_steps {recipe.schedule.warmup_steps} is not less than the {(lit.start - 1) * per_episode} steps before "
            f"episodes.lit.start {lit.start}; shorten the warm-up or start the ending later"
        )


def _weights_from_one_place(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if model.text.pretrained and model.text.name == "clip":
        yield (
            "model.text.pretrained true has no published weights to load for model.text.name clip; name a transformers encoder, "
            "or start from a whole model with model.init_from"
        )
    for side in ("image", "text"):
        if model.init_from is not None and getattr(model, side).pretrained:
            yield f"model.{side}.pretrained true has no effect with model.init_from {model.init_from}, which brings all weights; set one of them only"


def _frozen_parts_differ(recipe: Recipe) -> Iterator[str]:
    """What is frozen is named once, and nothing else asks for it to train or to be frozen later."""
    frozen, lit, decay = recipe.model.frozen, recipe.episodes.lit, recipe.optim.layer_decay
    for part in sorted({part for part in frozen if frozen.count(part) > 1}):
        yield f"model.frozen names {part} twice; name it once"
    for part, whole in (("patch_embedding", "image_tower"), ("token_embedding", "text_tower")):
        if {part, whole} <= set(frozen):
            yield f"model.frozen: {part} has no effect beside {whole}, which freezes it too; remove it"
    if lit and "image_tower" in frozen:
        yield f"episodes.lit.start {lit.start} locks the image tower, which model.frozen image_tower does from the first step; remove one of them"
    if lit and lit.variant == "paper" and "text_tower" in frozen:
        yield f"episodes.lit.start {lit.start} locks the image side, and model.frozen text_tower leaves of the other a projection only; remove one of them"
    for side in ("image", "text"):
        if f"{side}_tower" in frozen and getattr(decay, side, 1) < 1:
            yield f"optim.layer_decay.{side} {getattr(decay, side)} has no effect with model.frozen {side}_tower; remove it"


def _rates_below_the_peak(recipe: Recipe) -> Iterator[str]:
    for key in ("warmup_lr", "final_lr"):
        value = getattr(recipe.schedule, key)
        if value > recipe.optim.lr:
            yield f"schedule.{key} {value} is above the peak optim.lr {recipe.optim.lr}; lower it"


def _evaluation_sets_exist(recipe: Recipe) -> Iterator[str]:
    evaluation = recipe.evaluation
    names = [each.name for each in evaluation.sets]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"evaluation.sets names {name} twice; give each set its own name, it is part of the figures' names"
    for gallery, members in evaluation.gallery.items():
        for member in members:
            if member not in names:
                yield f"evaluation.gallery.{gallery} names {member}, which is not in evaluation.sets{nearest(member, names)}"
    for key in ("few_shot", "knn"):
        if getattr(evaluation, key) is not None and evaluation.probe_train is None:
            yield f"evaluation.{key} has no effect without evaluation.probe_train, the rows it learns from; name them, or set {key} to null"
    if evaluation.every_steps and not evaluation.sets:
        yield f"evaluation.every_steps {evaluation.every_steps} has no effect without evaluation.sets; name some, or set it to 0"
    probe = evaluation.probe_train
    tasks = any(each.task for each in (*evaluation.sets, *([probe] if probe else [])))  # which name their own columns
    if probe is not None and not tasks and not {column for each in evaluation.sets for column in each.classify} & set(probe.classify):
        yield "evaluation.probe_train.classify shares no column with classify of evaluation.sets, so nothing is probed; name the same column, or set probe_train to null"


def _folders_use_known_names(recipe: Recipe) -> Iterator[str]:
    for key, names in (("dir", ("name",)), ("scratch_dir", ("dir", "name")), ("copy_to", ("name",))):
        text = getattr(recipe.run, key) or ""
        try:
            text.format(**dict.fromkeys(names, "x"))
        except (KeyError, IndexError, ValueError):
            usable = " and ".join(f"{{{name}}}" for name in names)
            yield f"run.{key} {text!r} holds braces that mean nothing; only {usable} can stand in it"


def _microbatches_exist(recipe: Recipe) -> Iterator[str]:
    if recipe.run.allow_batchnorm_microbatches and recipe.optim.microbatch is None:
        yield "run.allow_batchnorm_microbatches true has no effect with optim.microbatch null: no batch is cut; remove it, or set optim.microbatch"


def _profiled_steps_exist(recipe: Recipe) -> Iterator[str]:
    steps, profile = total_steps(recipe), recipe.run.profile
    if profile is not None and steps is not None and profile.steps[0] > steps:
        yield f"run.profile.steps {list(profile.steps)} begin after the {steps} steps of schedule.total '{recipe.schedule.total}'; choose earlier ones"


def _kept_checkpoints_exist(recipe: Recipe) -> Iterator[str]:
    run, episode = recipe.run, steps_per_episode(recipe)
    if not run.keep_every_steps:
        return
    if not run.keep_checkpoints:
        yield f"run.keep_every_steps {run.keep_every_steps} has no effect with run.keep_checkpoints 0, which keeps all; remove it, or name how many of the newest to keep"
    elif run.keep_every_steps % episode and (not run.checkpoint_steps or run.keep_every_steps % run.checkpoint_steps):
        yield (
            f"run.keep_every_steps {run.keep_every_steps} is a multiple neither of run.checkpoint_steps {run.checkpoint_steps} nor of the {episode} steps of an episode, "
            "so no checkpoint may have such a step; choose a multiple"
        )


RULES: tuple[Callable[[Recipe], Iterator[str]], ...] = (
    _something_trains,
    _masked_texts_have_a_mask,
    _neighbours_are_of_trained_texts,
    _clustering_is_used,
    _recorded_features_exist,
    _episode_clusterings_exist,
    _clusters_fit_the_episode,
    _episode_fits_the_epoch,
    _groups_divide_lanes,
    _warmup_ends,
    _episodes_in_order,
    _weights_from_one_place,
    _frozen_parts_differ,
    _rates_below_the_peak,
    _evaluation_sets_exist,
    _folders_use_known_names,
    _microbatches_exist,
    _profiled_steps_exist,
    _kept_checkpoints_exist,
)
