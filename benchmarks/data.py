"""Images a second and core from encoded bytes to a batch: this pipeline, PIL as open_clip uses it, and the webdataset package with both.

    python benchmarks/data.py [--corpus FILE_OR_FOLDER]             compares the three (needs the extra `bench`)
    python benchmarks/data.py --recipe FILE [--set key=value ...]   measures a recipe's own data and says what limits it

One process, one thread, contestants in turn in every round, medians over the rounds. Rates are per second of processor time, so that other work on
the machine counts little. A table is printed, and as the last line one JSON object with its figures.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from data_parts import own_data
from rich.console import Console
from rich.table import Table

from protoclip_scale.data.transforms import NORMALIZATION, normalize
from protoclip_scale.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
BLOCKS, FEED = 4, [250.0, 1000.0, 4000.0]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=ROOT / "recipes" / "demo_corpus", help="parquet file, or folder with train*.parquet")
    parser.add_argument("--images", type=int, default=256, help="images of each set in a round, at least 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224, help="side of the images in a batch")
    parser.add_argument("--augmentations", nargs="+", default=["clip", "protoclip_light", "slip_ssl"], choices=["clip", "protoclip_light", "slip", "slip_ssl", "declip"])
    parser.add_argument("--recipe", type=Path, help="measure this recipe's data instead")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the recipe")
    parser.add_argument("--blocks", type=int, help=f"with --recipe: blocks to read of each source (default: {BLOCKS})")
    parser.add_argument("--feed", type=float, nargs="+", help=f"with --recipe: samples a second and rank to be fed (default: {' '.join(map(str, FEED))})")
    chosen = parser.parse_args(argv)
    for name in ("set", "blocks", "feed") if chosen.recipe is None else ():
        if getattr(chosen, name) not in (None, []):
            raise UserError(f"--{name} has no effect without --recipe; leave it out")
    chosen.blocks, chosen.feed = BLOCKS if chosen.blocks is None else chosen.blocks, chosen.feed or FEED
    if chosen.images < 64 or chosen.rounds < 1 or chosen.blocks < 1 or chosen.size < 1 or min(chosen.feed) <= 0:
        parser.error("--images must be at least 64; --rounds, --blocks, --size and --feed positive")
    return chosen


def rates(runs: dict, rounds: int) -> dict[str, float]:
    """Images a second of processor time of each contestant: medians over interleaved rounds, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    counts = set()
    for number in range(rounds + 1):
        for name, batches in runs.items():
            started = time.process_time()
            counts.add(sum(len(batch) for batch in batches()))
            if number:
                seconds[name].append(time.process_time() - started)
    (count,) = counts  # all did the same work
    return {name: count / statistics.median(values) for name, values in seconds.items()}


def normalising(size: int, device: str) -> float:
    """Milliseconds an image for what the device does after the loader, in batches of 64."""
    batch = torch.zeros((64, 3, size, size), dtype=torch.uint8).contiguous(memory_format=torch.channels_last).to(device)
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = []
    for _ in range(11):
        started = clock()
        normalize(batch, *NORMALIZATION["clip"])
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return statistics.median(seconds[1:]) / len(batch) * 1000


def compare(chosen: argparse.Namespace, console: Console) -> dict:
    """The three ways on both sets of pictures; prints the table and returns its figures."""
    try:
        from data_parts import contestants
    except ImportError as error:
        raise UserError(f"benchmarks/data.py compares with packages that are not all installed ({error}); run: pip install 'protoclip-scale[bench]'") from None
    from data_parts import pictures

    sets = [pictures.from_corpus(chosen.corpus, chosen.images // 64 * 64), pictures.like_photographs(chosen.images // 64 * 64)]
    figures: dict = {"machine": machine(), "sets": {}, "images_per_second_and_core": {}}
    with tempfile.TemporaryDirectory() as folder:
        for each in sets:
            console.print(each.describe())
            figures["sets"][each.name] = each.describe()
            for augmentation in chosen.augmentations:
                runs = contestants.contestants(each, Path(folder) / each.name / augmentation, augmentation, chosen.size)
                figures["images_per_second_and_core"][f"{each.name}, {augmentation}"] = rates(runs, chosen.rounds)
    figures["normalise_ms_per_image"] = {device: normalising(chosen.size, device) for device in ("cpu", *["cuda"] * torch.cuda.is_available())}
    for columns in (("ours", "PIL", "webdataset, PIL", "webdataset, ours"),
                    ("ours + tokens", "ours, loader + tokens", "PIL + tokens", "webdataset, PIL + tokens", "webdataset, ours + tokens")):
        table = Table("images a second and core", *columns, "ours : PIL")
        for name, rate in figures["images_per_second_and_core"].items():
            ratio = rate["ours" + " + tokens" * ("+" in columns[0])] / rate["PIL" + " + tokens" * ("+" in columns[0])]
            table.add_row(name, *(f"{rate[column]:,.0f}" for column in columns), f"{ratio:.2f}")
        console.print(table)
    console.print("normalising on the device, not contained in ours: " + ", ".join(f"{value:.3f} ms an image on {name}" for name, value in figures["normalise_ms_per_image"].items()))
    return figures


def machine() -> str:
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, one thread"


def main(argv: list[str] | None = None) -> int:
    threads = torch.get_num_threads()
    console = Console(width=None if sys.stdout.isatty() else 160)
    torch.set_num_threads(1)
    try:
        chosen = arguments(argv)
        figures = own_data.measure(chosen.recipe, chosen.set, chosen.blocks, chosen.feed, console) if chosen.recipe else compare(chosen, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(threads)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
