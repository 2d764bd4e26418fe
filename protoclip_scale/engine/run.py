"""An attempt's frame: process group, run directory, data; then training, and what is told of its end.

Only light imports stand here, so that a resumed run has its first batch within seconds.
"""

import argparse
import os
from pathlib import Path

import torch

from protoclip_scale import collectives
from protoclip_scale.data.index import index_of, open_readers
from protoclip_scale.data.plan import Plan, check_lanes, lanes_of
from protoclip_scale.data.quarantine import Quarantine
from protoclip_scale.data.spool import Spool
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.data.wordnet import open_wordnet
from protoclip_scale.engine import checkpoint
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.checkpoint import Cursor
from protoclip_scale.engine.context import BadRows, RunContext, lanes_of_this_node
from protoclip_scale.engine.disk import disk_told
from protoclip_scale.engine.ending import Ending
from protoclip_scale.engine.head_start import HeadStart
from protoclip_scale.engine.learning import LearningWatch
from protoclip_scale.engine.nonfinite import NonFiniteSteps
from protoclip_scale.engine.report_writer import ReportWriter
from protoclip_scale.engine.run_folder import Start, check_sources, open_run, pinned
from protoclip_scale.engine.run_log import PhaseClock, RunLog
from protoclip_scale.engine.schedules import Schedule
from protoclip_scale.engine.scratch import open_scratch
from protoclip_scale.engine.shared_folder import check_shared
from protoclip_scale.engine.signals import StopFlag
from protoclip_scale.engine.trace import RowTrace
from protoclip_scale.engine.watch import begin as begin_watch
from protoclip_scale.errors import Stopped, UserError
from protoclip_scale.files import publish_json
from protoclip_scale.objectives import build_objectives, check_ranks, views_of
from protoclip_scale.recipe import Recipe
from protoclip_scale.recipe.changes import against_base
from protoclip_scale.report.console import Console, make_console


def pretrain(recipe: Recipe, folder: Path, options: argparse.Namespace) -> int:
    """Train a recipe in a run directory; the exit code."""
    stop = StopFlag()
    strategies.refuse_foreign_settings()
    accelerator = None if strategies.alone() else strategies.start(recipe.run.timeout_minutes)
    torch.set_num_threads(recipe.run.threads or default_threads())  # after accelerate, which sets its own
    if options.expect_ranks and options.expect_ranks != collectives.world_size():
        raise UserError(f"--expect-ranks {options.expect_ranks}, but {collectives.world_size()} ranks run; check the launch line (docs/launching.md)")
    check_lanes(recipe.data.plan.lanes, collectives.world_size())
    check_ranks(build_objectives(recipe), collectives.world_size())
    watch = begin_watch(recipe.run)
    ending = Ending(folder, watch)
    try:
        # Copies may have to be brought from far away.
        start: Start = collectives.from_rank_zero_patiently(lambda: _opened(folder, recipe, options), meanwhile=lambda: None)
        is_main = collectives.rank() == 0
        log = RunLog(folder, start.attempt, is_main)
        console = make_console(is_main, folder / "log.txt", None)
        report = ReportWriter(folder, is_main and recipe.run.report, console.event)
        ending.report_to(log, console, report)
        if collectives.world_size() > 1:
            check_shared(folder, start.attempt)
        log.write_status("running")
        device = accelerator.device if accelerator else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        run = _context(recipe, folder, start, device, stop, log, console, report)
        head_start = HeadStart(run, _resumed_at(start)) if start.manifest else None
        from protoclip_scale.engine.attempt import train  # the models' libraries, seconds of imports

        accelerator = accelerator or strategies.start(recipe.run.timeout_minutes)
        torch.set_num_threads(recipe.run.threads or default_threads())
        train(run, accelerator, start, head_start)
    except Stopped:
        ending.stopped()
        raise
    except BaseException as error:
        told = ending.failed(error)
        if told is error:
            raise
        raise told from error
    ending.done()
    accelerator.end_training()
    return 0


def _opened(folder: Path, recipe: Recipe, options: argparse.Namespace) -> Start:
    """For rank 0."""
    with disk_told(folder):
        start = open_run(folder, recipe, options.resume, options.extend)
        publish_json(folder / "recipe_changes.json", against_base(options.recipe, options.set))
        return start


def _resumed_at(start: Start) -> Cursor:
    """Where the run will go on; a collective."""
    try:
        added = collectives.from_rank_zero(lambda: checkpoint.prototypes_manifest(start.checkpoint))
    except UserError:  # the machine tells it, and clusters again
        added = None
    return checkpoint.cursor_of(added or start.manifest)


def _context(recipe: Recipe, folder: Path, start: Start, device: torch.device, stop: StopFlag, log: RunLog, console: Console, report: ReportWriter) -> RunContext:
    readers = collectives.from_rank_zero_patiently(lambda: open_readers(pinned(recipe.data, folder)), meanwhile=stop.agree)
    views = views_of(build_objectives(recipe))
    wordnet = open_wordnet().digest if "eda" in {recipe.data.text_augmentation, *views.texts.values()} else None
    if len(set(collectives.all_gather_objects(wordnet))) > 1:
        raise UserError("text augmentation eda: the ranks' machines have different WordNets, which give different texts; install the same one on all")
    collectives.from_rank_zero(lambda: check_sources(folder, readers, wordnet))
    index = index_of(readers)
    plan = Plan(index, recipe.data.plan)
    if start.manifest and start.manifest["plan"] != plan.fingerprint:
        raise UserError(
            f"{folder}: the data or data.plan differ from those the checkpoint was trained on (plan {start.manifest['plan']}, now {plan.fingerprint}); "
            "restore the files under data.root, or choose another --run-dir"
        )
    scratch = open_scratch(Path(recipe.run.scratch_dir.format(dir=folder, name=recipe.name)).absolute(), start.run_id)
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
        views=views,
        schedule=Schedule(recipe, plan.steps_per_episode, plan.num_rows),
        device=device,
        trace=RowTrace(folder, start.attempt, enabled=recipe.run.trace_rows),
        learning=LearningWatch(log, console.event, recipe.run.learning_watch_steps, recipe.data.plan.global_batch),
        nonfinite=NonFiniteSteps(recipe.optim.nonfinite_skips, scales_loss=recipe.optim.precision == "fp16"),
        report=report,
    )


def default_threads() -> int:
    """CPU threads of a rank: its share of the cores where there is no GPU (launchers set one), torch's choice beside a GPU."""
    if torch.cuda.is_available():
        return torch.get_num_threads()
    usable_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable_cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
