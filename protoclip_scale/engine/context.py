"""What every phase of a run needs, in one place."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from protoclip_scale import collectives
from protoclip_scale.data.batches import Batch
from protoclip_scale.data.index import Index
from protoclip_scale.data.plan import Plan
from protoclip_scale.data.quarantine import Quarantine
from protoclip_scale.data.rows import unpack_row_ids
from protoclip_scale.data.sources import BlockReader
from protoclip_scale.data.spool import Spool
from protoclip_scale.data.tokenizers import ClipTokenizer, EncoderTokenizer
from protoclip_scale.data.views import Views
from protoclip_scale.engine.learning import LearningWatch
from protoclip_scale.engine.nonfinite import NonFiniteSteps
from protoclip_scale.engine.report_writer import ReportWriter
from protoclip_scale.engine.run_log import PhaseClock, RunLog
from protoclip_scale.engine.schedules import Schedule
from protoclip_scale.engine.signals import StopFlag
from protoclip_scale.engine.trace import RowTrace
from protoclip_scale.errors import UserError
from protoclip_scale.recipe.schema import Recipe
from protoclip_scale.report.console import Console

BAD_ROWS_ALWAYS_ALLOWED = 10
EMPTY_CAPTION = "empty caption"


class BadRows:
    """Lists replaced rows once in the quarantine file and stops the run when they are too many."""

    def __init__(self, quarantine: Quarantine, readers: list[BlockReader], max_fraction: float):
        self.quarantine = quarantine
        self.readers = readers
        self.max_fraction = max_fraction
        self.rows_seen = 0
        self.rows_bad = 0

    def add(self, batch: Batch) -> None:
        """Take note of a local batch."""
        self.rows_seen += len(batch.positions)
        for row_id, reason in batch.replaced:
            source, block, row = (int(part) for part in unpack_row_ids(row_id))
            file, block_in_file = self.readers[source].file_of_block(block)
            self.quarantine.record(row_id, file, block_in_file, row, reason)
            self.rows_bad += reason != EMPTY_CAPTION

    def check(self) -> None:
        """Raise UserError on all ranks when the share of undecodable rows is past the limit; a collective."""
        bad, seen = (sum(counts) for counts in zip(*collectives.all_gather_objects((self.rows_bad, self.rows_seen)), strict=True))
        if bad > max(BAD_ROWS_ALWAYS_ALLOWED, self.max_fraction * seen):
            raise UserError(
                f"data: {bad} of {seen} rows could not be decoded, more than data.max_bad_fraction {self.max_fraction}; "
                f"see {self.quarantine.path}, then clean the data or raise the limit"
            )


def lanes_of_this_node(lanes: int) -> range:
    """The lanes of all ranks on this machine, whose spool its first rank fills."""
    per_rank = lanes // collectives.world_size()
    first_rank = collectives.rank() - collectives.local_rank()
    return range(first_rank * per_rank, (first_rank + collectives.local_world_size()) * per_rank)


@dataclass
class RunContext:
    """A started run. ``lanes``: those this rank owns. ``scratch``: node-local."""

    recipe: Recipe
    folder: Path
    scratch: Path
    run_id: str
    attempt: int
    console: Console
    log: RunLog
    clock: PhaseClock
    stop: StopFlag
    index: Index
    plan: Plan
    readers: list[BlockReader]
    lanes: range
    lanes_of_node: range
    spool: Spool
    bad_rows: BadRows
    tokenizer: ClipTokenizer | EncoderTokenizer
    views: Views
    schedule: Schedule
    device: torch.device
    trace: RowTrace
    nonfinite: NonFiniteSteps
    learning: LearningWatch
    report: ReportWriter
    samples_trained: int = 0

    def samples_per_second(self) -> float | None:
        """Over all train phases of this attempt, waiting included."""
        seconds = self.clock.seconds.get("train", 0.0)
        return self.samples_trained / seconds if seconds and self.samples_trained else None

    def log_phases(self, step: int) -> None:
        """A line with the seconds that each phase of this attempt has taken so far."""
        samples = step * self.recipe.data.plan.global_batch
        self.log.metrics("phases", step=step, samples=samples, **{f"seconds/{name}": round(seconds, 3) for name, seconds in self.clock.seconds.items()})

    @contextlib.contextmanager
    def phase(self, name: str, episode: int, total: int | None, unit: str, done: int = 0) -> Iterator[None]:
        """Show and time a phase of an episode (counted from 0)."""
        self.console.phase(name, episode + 1, self.schedule.num_episodes, total, unit, done)
        with self.clock.measure(name):
            yield
