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
from protoclip_scale.engine.checkpoint.copying import STOPPED_SECONDS, Copier
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.head_start import HeadStart
from protoclip_scale.engine.machine import EpisodeMachine
from protoclip_scale.engine.restore import copies_of
from protoclip_scale.engine.run_folder import Start
from protoclip_scale.engine.scratch import remove_scratch
from protoclip_scale.engine.screens import last_facts, start_facts
from protoclip_scale.engine.trainer import Trainer
from protoclip_scale.errors import Stopped
from protoclip_scale.evaluation.run import baseline
from protoclip_scale.export.open_clip_layout import check_open_clip, export_open_clip
from protoclip_scale.files import publish_json
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives import build_objectives
from protoclip_scale.prototypes.teacher import open_teacher
from protoclip_scale.recipe import Recipe


def train(run: RunContext, accelerator: Accelerator, start: Start, head_start: HeadStart | None) -> None:
    """Build or resume, train to the end of the schedule, export, and show what came out."""
    recipe = run.recipe
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
    run.log.write_environment(ranks=collectives.world_size())
    run.console.start(start_facts(run, strategy, start.checkpoint))
    for note in start.notes:
        run.console.event(note)
    for warning in (*start.warnings, *(check_open_clip(recipe) if recipe.run.export else ())):
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
    try:
        machine.train()
    except Stopped:
        _finish_copies(run, machine, STOPPED_SECONDS, meanwhile=lambda: None)
        raise
    export = run.folder / "export" / "open_clip"
    if recipe.run.export:
        with standing.inside("export"), trainer.averaged(), trainer.whole_model() as model:
            collectives.from_rank_zero(lambda: _export(model, recipe, export))
    _finish_copies(run, machine, None, meanwhile=run.stop.agree)
    run.trace.close()
    collectives.on_each_machine(lambda: remove_scratch(run.scratch))
    facts = {"memory_gb": _peak_memory_gb(), "memory_after_imports_gb": memory_after_imports, "seconds": time.monotonic() - began, "export": export if recipe.run.export else None}
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


def _export(model: DualEncoder, recipe: Recipe, folder: Path) -> None:
    """Replace the run's export by one of these weights."""
    shutil.rmtree(folder, ignore_errors=True)
    export_open_clip(model, recipe, folder)


def _peak_memory_gb() -> float:
    """Peak resident memory of this rank in GiB."""
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return psutil.Process().memory_info().rss / 2**30
