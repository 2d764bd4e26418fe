"""What a run has left in its directory, for the laws that are about whole runs: history, figures and rows of its final weights, and what two runs must share."""

from collections import Counter
from collections.abc import Callable, Set
from pathlib import Path

import numpy as np
import torch

from protoclip_scale.data.index import build_index
from protoclip_scale.data.plan import Plan
from protoclip_scale.data.quarantine import read_quarantine
from protoclip_scale.data.rows import pack_row_ids, unpack_row_ids
from protoclip_scale.engine import checkpoint
from protoclip_scale.engine.trace import read_trace
from protoclip_scale.recipe import load_recipe
from tests.support import final_tensors, metrics


def history(run_dir: Path) -> dict[int, dict]:
    """What was said of each step; a step that was said twice fails."""
    lines = metrics(run_dir, "train")
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: {k: v for k, v in line.items() if k.startswith(("loss", "lr", "grad", "scale"))} for line in lines}


def once(run_dir: Path, kind: str) -> list[tuple]:
    """(step, figures) of the lines of a kind, without times and places."""
    skipped = ("time", "attempt", "path")
    return [(line["step"], {k: v for k, v in line.items() if k not in skipped}) for line in metrics(run_dir, kind)]


def rows_of_final_weights(run_dir: Path) -> dict[int, list[int]]:
    """Row ids of each step, over all attempts: of a step that was repeated, those of the last attempt."""
    steps: dict[int, dict[str, list[int]]] = {}
    for path in sorted((run_dir / "trace").glob("rows-*.arrows")):
        _, attempt, rank = path.stem.split("-")
        table = read_trace(path)
        step, row = table["step"].to_numpy(), table["row_id"].to_numpy()
        for number in np.unique(step):
            kept = steps.setdefault(int(number), {"attempt": attempt})
            if kept["attempt"] != attempt:
                kept.clear()
                kept["attempt"] = attempt
            kept[rank] = row[step == number].tolist()
    return {number: sum((rows for rank, rows in sorted(kept.items()) if rank != "attempt"), []) for number, kept in steps.items()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, or of the prototypes beside one."""
    return checkpoint.read_tensors(folder, checkpoint.read_manifest(folder))


def check_equal(run_dir: Path, expected: Path, step: int | None = None) -> None:
    """Law 3: the rows and figures of every step and the final weights, bit by bit; with ``step`` those up to its checkpoint, and what is in that."""
    rows, figures = rows_of_final_weights(expected), history(expected)
    if step is not None:
        rows = {number: each for number, each in rows.items() if number < step}  # counted from 0
        figures = {number: each for number, each in figures.items() if number <= step}
    assert rows and rows_of_final_weights(run_dir) == rows
    assert figures and history(run_dir) == figures
    name = "latest" if step is None else str(step)
    check_tensors(final_tensors(run_dir, name), final_tensors(expected, name))


def check_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def save_again(run_dir: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None] = lambda name, tensor: tensor, **cursor: object) -> None:
    """Replace a run's newest checkpoint by one with other tensors (None: without them), or with a ``cursor`` that stands elsewhere."""
    folder, manifest, _ = checkpoint.find(run_dir, "latest")
    tensors = {name: change(name, tensor) for name, tensor in checkpoint.read_tensors(folder, manifest).items()}
    written = ("schema", "files", "tensors", "weights", "weights_ema", "manifest_sha256")
    about = {key: value for key, value in manifest.items() if key not in written}
    about["cursor"] = about["cursor"] | cursor
    checkpoint.save(folder, checkpoint.replicated_pieces({name: tensor for name, tensor in tensors.items() if tensor is not None}), about, lambda: None)


def check_epochs(run_dir: Path, bad: Set[int] = frozenset()) -> Plan:
    """Law 4 of the final weights of a finished run, from its traces and quarantine; its plan. ``bad``: numbers of the rows that cannot be decoded, counted
    through all files."""
    recipe = load_recipe(run_dir / "recipe.yaml")
    plan = Plan(build_index(recipe.data), recipe.data.plan)
    index = plan.index
    everything = np.concatenate([pack_row_ids(s, b, np.arange(rows)) for s, b, rows in zip(index.block_source, index.block_number, index.block_rows, strict=True)])
    steps = rows_of_final_weights(run_dir)
    assert sorted(steps) == list(range(len(metrics(run_dir, "train"))))
    trained = []
    for step in sorted(steps):
        slots = plan.episode(0).slots(step % plan.steps_per_episode)
        positions = np.concatenate([lane * plan.lane_rows + slots for lane in range(plan.settings.lanes)])
        trained.append((positions, np.array(steps[step])))
    check_rows(plan, trained, set(everything[sorted(bad)].tolist()), set(read_quarantine(run_dir / "quarantine")))
    return plan


def check_rows(plan: Plan, batches: list[tuple[np.ndarray, np.ndarray]], bad: set[int], listed: set[int]) -> None:
    """Law 4 on the (positions, row ids really used) of all global batches, the row ids that are bad, and those in the quarantine."""
    visits: dict[tuple[int, int], Counter] = {}  # (stream, epoch) -> rows; sources with weights have a stream each
    seen_bad: set[int] = set()
    for step, (positions, used) in enumerate(batches):
        number, step_in_episode = divmod(step, plan.steps_per_episode)
        if not step_in_episode:
            episode = plan.episode(number)
        planned = episode.row_ids.reshape(-1)[positions]
        assert sorted(planned.tolist()) == sorted(episode.batch_row_ids(step_in_episode).tolist()), step
        assert len(set(used.tolist())) == len(used) == plan.settings.global_batch and not set(used.tolist()) & bad, step
        moved = planned != used
        assert set(planned[moved].tolist()) == set(planned.tolist()) & bad, step
        lanes = positions // episode.lane_rows
        assert all(row in episode.row_ids[lane] for lane, row in zip(lanes[moved], used[moved], strict=True)), step
        seen_bad |= set(planned[moved].tolist())
        streams = unpack_row_ids(planned)[0] if plan.index.weights else np.zeros_like(planned)
        for stream, epoch, row in zip(streams.tolist(), episode.epochs.reshape(-1)[positions].tolist(), planned.tolist(), strict=True):
            visits.setdefault((stream, epoch), Counter())[row] += 1
    assert listed == seen_bad
    for stream in {stream for stream, _ in visits}:
        everything = set(visits[stream, 0])
        assert len(everything) == rows_of_stream(plan, stream)
        total = sum(rows.total() for (other, _), rows in visits.items() if other == stream)
        whole = total // len(everything)
        assert whole >= 1
        for (other, epoch), rows in visits.items():
            assert other != stream or set(rows.values()) == {1} and (epoch >= whole or set(rows) == everything), (stream, epoch)
        # The same without the plan's word for which epoch a place belongs to: no row is ahead of another by more than the epoch that is not over.
        counts = Counter(row for (other, _), rows in visits.items() if other == stream for row in rows.elements())
        assert set(counts.values()) <= {whole, whole + 1} and len(counts) == len(everything), stream


def rows_of_stream(plan: Plan, stream: int) -> int:
    """Rows of an epoch, or with weights of a source."""
    if not plan.index.weights:
        return plan.num_rows
    limit = plan.index.row_limits[stream] if plan.index.row_limits else None
    return limit or plan.index.source_rows(stream)
