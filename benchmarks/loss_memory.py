"""Peak memory and seconds of the contrastive loss, forward and backward: all logits at once, and in row tiles.

    python benchmarks/loss_memory.py [--width 512] [--plain 1024,2048,4096,8192,16384] [--tiled 1024,...,32768] [--threads 2]

Both take local rows against all columns, twice (images to texts, texts to images), in fp32, on one rank: rows and columns are the same tensors. ``plain`` is two products
and torch's cross_entropy; ``tiled`` is what the package trains with. Every line is a process of its own; peak memory is that of one forward and backward pass, inputs
and their gradients included, above what the process holds after imports (on a GPU: allocated memory). Seconds are the best of some passes. The ratio at
--compared rows is measured apart, in one process in which both take turns: the median of the rounds' ratios.

Prints a table, and as the last line one JSON object with its figures.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable

import torch
from large_batch_parts.peak import Peak
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from protoclip_scale.objectives.clip import clip_loss

SECONDS_EACH, MOST_PASSES = 5.0, 5


def plain_loss(image, text, all_image, all_text, scale, columns):
    """clip_loss with both matrices of logits."""
    return 0.5 * (F.cross_entropy(scale * image @ all_text.T, columns) + F.cross_entropy(scale * text @ all_image.T, columns))


LOSSES: dict[str, Callable] = {"plain": plain_loss, "tiled": clip_loss}


def inputs(rows: int, width: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    draws = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(rows, width, generator=draws), dim=1).to(device).requires_grad_() for _ in range(2))
    return image, text, torch.tensor([14.0], device=device, requires_grad=True), torch.arange(rows, device=device)


def one_pass(loss_of: Callable, rows: tuple[torch.Tensor, ...]) -> float:
    """Seconds of a forward and backward pass."""
    image, text, scale, columns = rows
    image.grad = text.grad = scale.grad = None
    start = time.perf_counter()
    loss_of(image, text, image, text, scale, columns).backward()
    if image.device.type == "cuda":
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - start


def measure(name: str, num_rows: int, width: int, threads: int) -> dict:
    """For a process of its own."""
    device = _device(threads)
    one_pass(LOSSES[name], inputs(64, width, device))  # libraries take their buffers at first use
    peak = Peak(device)
    rows = inputs(num_rows, width, device)
    seconds = [one_pass(LOSSES[name], rows)]
    found = peak.bytes()
    while sum(seconds) < SECONDS_EACH and len(seconds) < MOST_PASSES:
        seconds.append(one_pass(LOSSES[name], rows))
    return {"peak_mb": round(found / 1e6, 1), "seconds": round(min(seconds), 4)}


def compare(num_rows: int, width: int, threads: int, rounds: int) -> float:
    """Time of tiled over plain, taking turns."""
    rows = inputs(num_rows, width, _device(threads))
    taken = [{name: one_pass(loss_of, rows) for name, loss_of in LOSSES.items()} for _ in range(rounds + 1)][1:]
    return statistics.median(each["tiled"] / each["plain"] for each in taken)


def _device(threads: int) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    torch.set_num_threads(threads)
    return torch.device("cpu")


def _sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="of the embedding")
    parser.add_argument("--plain", type=_sizes, default="1024,2048,4096,8192,16384", help="rows, comma-separated")
    parser.add_argument("--tiled", type=_sizes, default="1024,2048,4096,8192,16384,32768", help="rows, comma-separated")
    parser.add_argument("--compared", type=_sizes, default="128,1024,4096", help="rows of the comparison of times")
    parser.add_argument("--rounds", type=int, default=7, help="of the comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    chosen = arguments(argv)
    lines, ratios = [], {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for name in LOSSES:
            for rows in getattr(chosen, name):
                lines.append({"loss": name, "rows": rows, **fresh.apply(measure, (name, rows, chosen.width, chosen.threads))})
        for rows in chosen.compared:
            ratios[rows] = round(fresh.apply(compare, (rows, chosen.width, chosen.threads, chosen.rounds)), 3)
    console, where = Console(soft_wrap=True), "GPU" if torch.cuda.is_available() else f"{chosen.threads} CPU threads"
    table = Table("loss", "rows", "peak MB", "kB per row", "seconds", title=f"Contrastive loss, width {chosen.width}, {where}")
    for line in lines:
        table.add_row(line["loss"], f"{line['rows']:,}", f"{line['peak_mb']:,.1f}", f"{1e3 * line['peak_mb'] / line['rows']:.1f}", f"{line['seconds']:.3f}")
    console.print(table)
    for rows, ratio in ratios.items():
        console.print(f"time of tiled over plain at {rows:,} rows: {ratio}")
    print(json.dumps({"width": chosen.width, "threads": chosen.threads, "lines": lines, "tiled_over_plain": ratios}))


if __name__ == "__main__":
    main()
