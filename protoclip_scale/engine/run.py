"""One attempt of a run, from the first screen to the last."""

import argparse
import contextlib
import os
import shutil
import time
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from protoclip_scale import collectives
from protoclip_scale.data.index import index_of, open_readers
from protoclip_scale.data.plan import Plan, check_lanes, lanes_of
from protoclip_scale.data.quarantine import Quarantine
from protoclip_scale.data.spool import Spool
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.context import BadRows, RunContext, lanes_of_this_node
from protoclip_scale.engine.machine import EpisodeMachine
from protoclip_scale.engine.nonfinite import NonFiniteSteps
from protoclip_scale.engine.run_folder import Start, open_run
from protoclip_scale.engine.run_log import PhaseClock, RunLog
from protoclip_scale.engine.schedules import Schedule
from protoclip_scale.engine.screens import last_facts, start_facts
from protoclip_scale.engine.signals import STOPPED_EXIT_CODE, StopFlag, Stopped
from protoclip_scale.engine.trace import RowTrace
from protoclip_scale.engine.trainer import Trainer
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.run import baseline
from protoclip_scale.export.open_clip_layout import check_open_clip, export_open_clip
from protoclip_scale.files import publish_json
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives import build_objectives
from protoclip_scale.prototypes.teacher import open_teacher
from protoclip_scale.recipe import Recipe
from protoclip_scale.report.console import make_console


def pretrain(recipe: Recipe, folder: Path, options: argparse.Namespace) -> int:
    """Train a recipe in a run directory; the exit code."""
    memory_after_imports = _peak_memory_gb()
    stop = StopFlag()
    accelerator = strategies.start(recipe.run.timeout_minutes)
    torch.set_num_threads(recipe.run.threads or default_threads())  # after accelerate, which sets its own
    if options.expect_ranks and options.expect_ranks != collectives.world_size():
        raise UserError(f"--expect-ranks {options.expect_ranks}, but {collectives.world_size()} ranks run; check the launch line (docs/launching.md)")
    check_lanes(recipe.data.plan.lanes, collectives.world_size())
    start: Start = collectives.from_rank_zero(lambda: open_run(folder, recipe, options.resume, options.extend))
    is_main = collectives.rank() == 0
    log = RunLog(folder, start.attempt, is_main)
    console = make_console(is_main, folder / "log.txt", None)
    try:
        log.write_status("running")
        run = _context(recipe, folder, start, accelerator.device, stop, log, console)
        _train(run, accelerator, start, memory_after_imports)
    except Stopped:
        console.close()
        log.write_status("stopped", STOPPED_EXIT_CODE, "stopped by a signal after a checkpoint was saved")
        console.event("stopped by a signal; the same command goes on from the checkpoint")
        raise
    except UserError as error:
        console.failure(str(error))
        console.close()
        log.write_status("failed", 1, str(error), any_rank=True)
        error.told = True
        raise
    except BaseException as error:
        console.close()
        log.write_status("failed", 1, f"{type(error).__name__}: {error}", any_rank=True)
        raise
    log.write_status("done", 0, resumable=False)
    console.close()
    accelerator.end_training()
    return 0


def _context(recipe: Recipe, folder: Path, start: Start, device: torch.device, stop: StopFlag, log: RunLog, console) -> RunContext:
    readers = collectives.from_rank_zero(lambda: open_readers(recipe.data))
    index = index_of(readers)
    plan = Plan(index, recipe.data.plan)
    if start.manifest and start.manifest["plan"] != plan.fingerprint:
        raise UserError(
            f"{folder}: the data or data.plan differ from those the checkpoint was trained on (plan {start.manifest['plan']}, now {plan.fingerprint}); "
            "restore the files under data.root, or choose another --run-dir"
        )
    # Of this run and this machine alone, since scratch may be shared by both others; removed at the end.
    machine = collectives.rank() // collectives.local_world_size()
    scratch = Path(recipe.run.scratch_dir.format(dir=folder, name=recipe.name)).absolute() / f"{start.run_id}-{machine:04d}"
    quarantine = Quarantine(folder / "quarantine" / f"rank-{collectives.rank():05d}.jsonl")
    return RunContext(
        recipe=recipe,
        folder=folder,
        scratch=scratch,
        run_id=start.run_id,
        attempt=start.attempt,
        console=console,
        log=log,
        clock=PhaseClock(),
        stop=stop,
        index=index,
        plan=plan,
        readers=readers,
        lanes=lanes_of(collectives.rank(), collectives.world_size(), recipe.data.plan.lanes),
        lanes_of_node=lanes_of_this_node(recipe.data.plan.lanes),
        spool=Spool(scratch / "spool", start.run_id),
        bad_rows=BadRows(quarantine, readers, recipe.data.max_bad_fraction),
        tokenizer=tokenizer_for(recipe.model.text),
        schedule=Schedule(recipe, plan.steps_per_episode, plan.num_rows),
        device=device,
        trace=RowTrace(folder, start.attempt, enabled=recipe.run.trace_rows),
        nonfinite=NonFiniteSteps(recipe.optim.nonfinite_skips, scales_loss=recipe.optim.precision == "fp16"),
    )


def _train(run: RunContext, accelerator: Accelerator, start: Start, memory_after_imports: float) -> None:
    recipe = run.recipe
    began = time.monotonic()
    objectives = build_objectives(recipe)
    strategy = strategies.Strategy(accelerator, strategies.Precision(recipe.optim.precision, run.device))
    trainer = Trainer(recipe, strategy, objectives, run.schedule)
    teacher_settings = recipe.objectives.get("teacher")
    teacher = open_teacher(teacher_settings.features, run.index) if teacher_settings and teacher_settings.weight else None
    machine = EpisodeMachine(run, trainer, teacher)
    if start.checkpoint:
        machine.resume(start.checkpoint, start.manifest)
    else:
        trainer.build(frozen=machine.frozen(0))
        run.log.discard_after(0)
    run.log.write_environment(ranks=collectives.world_size())
    run.console.start(start_facts(run, trainer.model, start.checkpoint))
    for warning in (*start.warnings, *(check_open_clip(recipe) if recipe.run.export else ())):
        run.console.event(f"warning: {warning}")
    untrained = run.folder / "baseline.json"
    if recipe.evaluation.sets and not collectives.broadcast_object(untrained.exists()):
        with run.phase("evaluate", machine.cursor.episode, total=None, unit="sets"):
            figures = baseline(recipe, run.tokenizer, run.device)
        if collectives.rank() == 0:
            publish_json(untrained, figures)
    machine.train()
    export = run.folder / "export" / "open_clip"
    if recipe.run.export:
        collectives.from_rank_zero(lambda: _export(trainer.model, recipe, export))
    run.trace.close()
    collectives.on_each_machine(lambda: _remove_scratch(run.scratch))
    facts = {"memory_gb": _peak_memory_gb(), "memory_after_imports_gb": memory_after_imports, "seconds": time.monotonic() - began, "export": export if recipe.run.export else None}
    run.console.save_svg(run.folder / "pictures" / "console.svg")
    run.console.finish(last_facts(run, **facts))


def _export(model: DualEncoder, recipe: Recipe, folder: Path) -> None:
    """Replace the run's export by one of these weights."""
    shutil.rmtree(folder, ignore_errors=True)
    export_open_clip(model, recipe, folder)


def _remove_scratch(folder: Path) -> None:
    """The run's own scratch, and the folder around it if nothing else is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def default_threads() -> int:
    """CPU threads of a rank: its share of the cores where there is no GPU (launchers set one), torch's choice beside a GPU."""
    if torch.cuda.is_available():
        return torch.get_num_threads()
    usable_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable_cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _peak_memory_gb() -> float:
    """Peak resident memory of this rank in GiB."""
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return psutil.Process().memory_info().rss / 2**30
