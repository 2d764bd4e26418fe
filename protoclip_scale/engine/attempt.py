"""What an attempt does once its data stands ready: build or resume, train, export. Importing this module imports the models' libraries."""

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from accelerate import Accelerator

from protoclip_scale import collectives, standing
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine import trackers
from protoclip_scale.engine.checkpoint.copying import STOPPED_SECONDS, Copier
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.head_start import HeadStart
from protoclip_scale.engine.machine import EpisodeMachine
from protoclip_scale.engine.restore import copies_of
from protoclip_scale.engine.run_folder import Start
from protoclip_scale.engine.scratch import remove_scratch
from protoclip_scale.engine.screens import last_facts, start_facts
from protoclip_scale.engine.trackers import Trackers
from protoclip_scale.engine.trainer import Trainer
from protoclip_scale.errors import Stopped, UserError
from protoclip_scale.evaluation.run import baseline
from protoclip_scale.export.facts import Checkpoint, extras_of_run
from protoclip_scale.export.logits import logits_of
from protoclip_scale.export.source import source_of_model
from protoclip_scale.export.token_heads import token_heads_of
from protoclip_scale.export.writing import check_layout, export
from protoclip_scale.files import publish_json
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives import build_objectives
from protoclip_scale.prototypes.teacher import open_teacher
from protoclip_scale.recipe import Recipe

ABOUT_THE_RUN = (  # facts of the first screen that environment.json keeps
    "ranks", "hosts", "device", "strategy", "precision", "image_tower", "text_tower", "parameters", "rows", "total_steps", "steps_per_episode", "episodes", "global_batch", "objectives",
)  # fmt: skip


def train(run: RunContext, accelerator: Accelerator, start: Start, head_start: HeadStart | None) -> None:
    """Build or resume, train to the end of the schedule, export, and show what came out."""
    recipe = run.recipe
    if line := trackers.missing(recipe.run.trackers):
        raise UserError(line)
    memory_after_imports = _peak_memory_gb()
    began = time.monotonic()
    objectives = build_objectives(recipe)
    strategy = strategies.make_strategy(accelerator, strategies.Precision(recipe.optim.precision, run.device))
    trainer = Trainer(recipe, strategy, objectives, run.schedule)
    teacher_settings = recipe.objectives.get("teacher")
    teacher = open_teacher(teacher_settings.features, run.index) if teacher_settings and teacher_settings.weight else None
    machine = EpisodeMachine(run, trainer, teacher, head_start)
    if start.checkpoint:
        machine.resume(start.checkpoint, start.manifest)
    else:
        trainer.build(episode=0)
        run.log.discard_after(0)
    facts = start_facts(run, strategy, start.checkpoint)
    run.log.write_environment(**{name: value for name, value in facts.items() if name in ABOUT_THE_RUN})
    run.console.start(facts)
    for note in start.notes:
        run.console.event(note)
    for warning in (*start.warnings, *(check_layout(recipe.run.export, recipe.model) if recipe.run.export else ())):
        run.console.event(f"warning: {warning}")
    if head_start and head_start.seconds is not None:
        run.console.event(f"the spool survived: the first batch was ready {head_start.seconds:.1f} s after the process started")
    untrained = run.folder / "baseline.json"
    if recipe.evaluation.sets and not collectives.from_rank_zero(untrained.exists):
        with run.phase("evaluate", machine.cursor.episode, total=None, unit="sets"):
            figures = baseline(recipe, run.tokenizer, run.device, meanwhile=run.stop.agree)
        if collectives.rank() == 0:
            publish_json(untrained, figures)
    machine.copier = _copier(run)
    tracked = Trackers(run.folder, recipe, () if collectives.rank() else recipe.run.trackers, run.run_id, run.attempt, run.console.event)
    tracked.begin(machine.cursor.step)
    try:
        machine.train()
    except BaseException as error:
        tracked.finish(trackers.STOPPED_SECONDS)
        if isinstance(error, Stopped):
            _finish_copies(run, machine, STOPPED_SECONDS, meanwhile=lambda: None)
        raise
    exported = run.folder / "export" / recipe.run.export if recipe.run.export else None
    if exported:
        point = Checkpoint(machine.cursor.step, machine.cursor.step * recipe.data.plan.global_batch, "ema" if recipe.optim.ema else "live")
        with standing.inside("export"), trainer.averaged(), trainer.whole_model() as model:
            collectives.from_rank_zero(lambda: _export(model, recipe, exported, run.folder, point))
    _finish_copies(run, machine, None, meanwhile=run.stop.agree)
    run.log_phases(machine.cursor.step)
    tracked.finish()
    run.trace.close()
    collectives.on_each_machine(lambda: remove_scratch(run.scratch))
    facts = {"memory_gb": _peak_memory_gb(), "memory_after_imports_gb": memory_after_imports, "seconds": time.monotonic() - began, "export": exported}
    if collectives.rank() == 0:
        run.console.save_svg(run.folder / "pictures" / "console.svg")
        run.console.finish(last_facts(run, **facts))


def _copier(run: RunContext) -> Copier | None:
    """The thread that copies checkpoints, on rank 0."""
    settings = run.recipe.run
    if not settings.copy_to or collectives.rank():
        return None
    return Copier(run.folder, copies_of(run.recipe), run.attempt, run.run_id, settings.keep_checkpoints, settings.keep_every_steps)


def _finish_copies(run: RunContext, machine: EpisodeMachine, seconds: float | None, meanwhile: Callable[[], None]) -> None:
    """Wait for checkpoints that are still being copied, all ranks together: a launcher takes the first that leaves for the end."""
    if run.recipe.run.copy_to:
        with standing.inside("copy"):
            collectives.from_rank_zero_patiently(lambda: machine.copier.finish(seconds), meanwhile)
        machine.tell_of_copies()


def _export(model: DualEncoder, recipe: Recipe, folder: Path, run_dir: Path, point: Checkpoint) -> None:
    """Replace the run's export by one of these weights."""
    shutil.rmtree(folder, ignore_errors=True)
    export(source_of_model(model, recipe.model, logits_of(recipe), token_heads_of(recipe)), folder.name, folder, extras=extras_of_run(run_dir, recipe, point))


def _peak_memory_gb() -> float:
    """Peak resident memory of this rank in GiB."""
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return psutil.Process().memory_info().rss / 2**30
