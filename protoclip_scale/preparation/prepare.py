"""Any source into parquet shards for training: read, check, make smaller, leave out repeats, report. Killed at any point, the same command goes on.

First pass: every shard is read, decoded, hashed and encoded. Where rows are compared with each other (or with evaluation images), the shards lie in
OUT/preparation/shards until all hashes are known; the second pass publishes them without the rows to be left out.
"""

import contextlib
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from protoclip_scale.data.sources.filesystems import is_remote
from protoclip_scale.data.sources.formats import SourceLimits
from protoclip_scale.data.sources.reader import BlockReader
from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_json
from protoclip_scale.preparation import decisions as decided
from protoclip_scale.preparation import pool
from protoclip_scale.preparation.decisions import EvaluationHashes
from protoclip_scale.preparation.inputs import InputRows
from protoclip_scale.preparation.leakage import EvaluationFiles, hash_file, open_evaluation_files
from protoclip_scale.preparation.progress import ProgressBar
from protoclip_scale.preparation.report import REPORT, reasons_line, write_report
from protoclip_scale.preparation.settings import Settings, claim_folder, refuse_foreign
from protoclip_scale.preparation.shards import remove_unfinished
from protoclip_scale.preparation.work import DECISIONS, UNDECODABLE_EVALUATION, Job, encode_shards, finish_shards
from protoclip_scale.recipe import schema

BYTES_PER_PIXEL = 0.35  # of a photograph as JPEG or WebP at quality 90, for the check of free space


def prepare(
    sources: Sequence[schema.Source],
    root: str,
    out: str | os.PathLike,
    settings: Settings,
    *,
    processes: int = 1,
    retry_seconds: float = 300.0,
    max_members: int = SourceLimits().max_members,
    stream: TextIO | None = None,
) -> dict[str, Any]:
    """Prepare the sources into the folder ``out``; the report, which is in OUT/report.json too. Progress goes to ``stream`` (default: stderr).

    UserError: input that is missing or unusable, or of which nothing is kept, a folder that holds something else, a disk that is full. After any of them, and after a kill, the same call goes on.
    Memory: per process one block of the input and one row group; with de-duplication about 100 bytes a row in all beside that.
    """
    if not retry_seconds >= 0:
        raise UserError(f"--retry-seconds {retry_seconds:g}: must be at least 0")
    started = time.monotonic()
    out, stream = Path(out), stream or sys.stderr
    limits = SourceLimits(max_bytes=settings.limits.max_bytes, max_members=max_members)
    readers = [BlockReader(_whole(source), root, retry_seconds, limits) for source in sources]
    _check_place(out, readers)
    refuse_foreign(out)
    evaluation = open_evaluation_files(settings, retry_seconds)
    job = Job(InputRows(readers, settings.limit), settings, out)
    with _only_user_of(out):
        claim_folder(out, settings, readers, evaluation.facts())
        for folder in (out, job.reports, job.first.folder):
            remove_unfinished(folder)
        shards = range(job.final.num_shards(job.rows.num_rows))
        _encode(job, [shard for shard in shards if not (job.first.is_complete(shard) or job.final.is_complete(shard))], processes, stream)
        if settings.drops_afterwards:
            if not all((job.reports / name).exists() for name in (DECISIONS, UNDECODABLE_EVALUATION)):
                _decide(job, shards, evaluation, processes, stream)
            _finish(job, [shard for shard in shards if not job.final.is_complete(shard)], processes, stream)
            shutil.rmtree(job.first.folder, ignore_errors=True)
        report = write_report(job, evaluation, time.monotonic() - started, processes)
    if not report["rows"]["kept"]:
        raise UserError(f"--out {out}: none of {report['rows']['read']:,} rows was kept ({reasons_line(report)}); {out / REPORT} says more")
    return report


def _whole(source: schema.Source) -> schema.Source:
    if source.weight is not None or source.rows is not None:
        key = "weight" if source.weight is not None else "rows"
        raise UserError(f"data.sources {source.label}: {key} has no effect here, all rows are prepared; prepare the source with --source, and set {key} in the recipe that trains on the shards")
    return source


def _encode(job: Job, missing: list[int], processes: int, stream: TextIO) -> None:
    total, rows_per_shard = job.rows.num_rows, job.settings.rows_per_shard
    left = sum(len(job.first.rows_of(shard, total)) for shard in missing)
    if not missing:
        return
    _check_space(job, left)
    shards_per_block = -(-job.rows.largest_block // rows_per_shard)  # a block is read by few workers
    runs = _runs(missing, max(1, min(shards_per_block, len(missing) // processes)))
    _run_all(encode_shards, job, runs, processes, ProgressBar("encoding", total, done=total - left, stream=stream))


def _decide(job: Job, shards: range, evaluation: EvaluationFiles, processes: int, stream: TextIO) -> None:
    hashes = decided.gather([job.first.arrays(shard) for shard in shards])
    print(f"{time.strftime('%H:%M:%S')} comparing the hashes of {len(hashes['row']):,} rows", file=stream, flush=True)
    known = _evaluation_hashes(job, evaluation, processes, stream)
    decided.save(decided.decide(hashes, known, job.settings), job.reports / DECISIONS)


def _evaluation_hashes(job: Job, evaluation: EvaluationFiles, processes: int, stream: TextIO) -> EvaluationHashes:
    """Of the evaluation images that can be decoded. Read again after a kill: it is one read of small sets."""
    files: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    if evaluation.places:
        with ProgressBar("hashing evaluation images", sum(evaluation.rows), stream=stream) as bar:
            for number, hashes, usable in pool.run(hash_file, evaluation, range(len(evaluation.places)), processes, bar.advance):
                files[number] = hashes, usable
    publish_json(job.reports / UNDECODABLE_EVALUATION, [int((~files[number][1]).sum()) for number in sorted(files)])
    hashes, usable = (np.concatenate([np.empty(0, dtype), *(files[number][part] for number in sorted(files))]) for part, dtype in ((0, np.uint64), (1, bool)))
    return EvaluationHashes(hashes[usable], np.flatnonzero(usable))


def _finish(job: Job, missing: list[int], processes: int, stream: TextIO) -> None:
    rows = sum(len(job.first.arrays(shard)["row"]) for shard in missing)
    _run_all(finish_shards, job, _runs(missing, 1), processes, ProgressBar("leaving out repeats", rows, stream=stream))


def _run_all(function: Callable, job: Job, runs: list[list[int]], processes: int, bar: ProgressBar) -> None:
    with bar:
        for _ in pool.run(function, job, runs, processes, bar.advance):
            pass


def _runs(shards: list[int], length: int) -> list[list[int]]:
    return [shards[start : start + length] for start in range(0, len(shards), length)]


def _check_place(out: Path, readers: Sequence[BlockReader]) -> None:
    """UserError if the output would become part of the input."""
    here = out.resolve()
    for reader in readers:
        for file in (file for file in reader.files if not is_remote(file)):
            path = Path(file.removeprefix("file://")).resolve()
            if here == path or here == path.parent or (path.is_dir() and path in here.parents):
                raise UserError(f"--out {out} lies in the input {path if path.is_dir() else path.parent} of {reader.name}; choose a folder outside it")


def _check_space(job: Job, rows: int) -> None:
    """Roughly, before anything is read: the smaller of what comes in and what images of this size take."""
    side = job.settings.images.short_side
    needed = int(rows * min(job.rows.bytes_per_row, 1.4 * side * side * BYTES_PER_PIXEL))
    free = shutil.disk_usage(job.out).free
    if needed > free:
        raise UserError(f"disk full: {rows:,} rows need about {needed / 1e9:.1f} GB, {job.out} has {free / 1e9:.1f} GB; free space, choose another --out, or a smaller --short-side or --limit")


@contextlib.contextmanager
def _only_user_of(out: Path) -> Iterator[None]:
    """Holds OUT/preparation/lock, which goes with the process, however it ends. Filesystems without locks go without."""
    folder = out / "preparation"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; choose another folder") from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(f"another command is preparing {out}; wait for it, or choose another --out") from None
        yield
