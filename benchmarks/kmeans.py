"""Seconds of k-means: ours with 1 and 2 processes, faiss.Kmeans and scikit-learn's, from the same start; and law 6 at full size.

    python benchmarks/kmeans.py [--features FILE_OR_STORE | --captions PARQUET_OR_FOLDER] [--rows 38000] [--clusters 4000] [--iterations 10]

Rows are those of an .npy or .safetensors file or a feature store; by default MiniLM's features (128 principal components, unit length) of the demo corpus's captions,
made larger by moved copies where they are fewer than --rows. Contestants take turns in every round, all others waiting; figures are medians of wall time, and of processor
time over all processes. faiss.Kmeans is timed without the search that gives labels, ours with it. Labels, centroids and objectives of ours are compared over 1, 2 and 4
processes and 1 and 2 threads. With a GPU, the same at 200,000 rows and 20,000 clusters, 20 iterations, 3 restarts, is timed there too.

Prints a table, and as the last line one JSON object with its figures.
"""

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path

import faiss
import numpy as np
import torch
from kmeans_parts import contestants, features
from kmeans_parts.groups import Group
from rich.console import Console
from rich.table import Table

from protoclip_scale.recipe.schema import Prototypes

ROOT = Path(__file__).resolve().parent.parent
GROUPS = ((1, 1), (1, 2), (2, 1))  # (processes, threads) that are timed
LAW = ((2, 2), (4, 1), (4, 2))  # those that are run once besides, to compare labels
GPU = {"clusters": 20_000, "iterations": 20, "restarts": 3}
GPU_ROWS = 200_000


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, help=".npy, .safetensors or a feature store's folder")
    parser.add_argument("--column", help="which tensor or column of --features")
    parser.add_argument("--captions", type=Path, default=ROOT / "recipes" / "demo_corpus", help="parquet file with a column caption, or a folder with train*.parquet")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "protoclip_kmeans", help="folder where embedded captions are kept")
    parser.add_argument("--rows", type=int, default=38_000)
    parser.add_argument("--dim", type=int, default=128, help="of embedded captions")
    parser.add_argument("--clusters", type=int, default=4_000)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-paper", action="store_true", help="leave out 20 iterations x 3 restarts")
    chosen = parser.parse_args(argv)
    if min(chosen.rows, chosen.clusters, chosen.iterations, chosen.rounds, chosen.dim) < 1:
        parser.error("--rows, --dim, --clusters, --iterations and --rounds must be positive")
    return chosen


def rows_of(chosen: argparse.Namespace) -> np.ndarray:
    if chosen.features:
        return features.read(chosen.features, chosen.column)
    return features.embed(chosen.captions, chosen.dim, chosen.cache / f"{chosen.captions.stem}-{chosen.dim}.npy")


class Bench:
    """Groups of processes, and what each contestant took in each round."""

    def __init__(self, rows: np.ndarray, folder: Path, seed: int):
        self.file, self.seed = folder / f"rows-{len(rows)}.npy", seed
        np.save(self.file, rows)
        self.groups: dict[tuple[int, int], Group] = {}
        self.found: dict[tuple[str, int, int], list[dict]] = {}

    def group(self, size: tuple[int, int]) -> Group:
        if size not in self.groups:
            self.groups[size] = Group(*size, str(self.file))
        return self.groups[size]

    def time(self, name: str, size: tuple[int, int], work, settings: Prototypes, *more) -> dict:
        found = self.group(size).run(work, settings, self.seed, *more)
        self.found.setdefault((name, *size), []).append(found)
        return found

    def close(self) -> None:
        for group in self.groups.values():
            group.close()
        self.groups = {}


def on_cpu(bench: Bench, chosen: argparse.Namespace) -> tuple[dict, np.ndarray]:
    """Timed rounds, then law 6; (figures, the common start)."""
    ours = {engine: Prototypes(clusters=chosen.clusters, iterations=chosen.iterations, restarts=1, engine=engine) for engine in ("faiss", "torch")}
    start = bench.group((1, 1)).run(contestants.starts, ours["faiss"], chosen.seed)["start"]
    for _ in range(chosen.rounds):
        for size in GROUPS:
            for engine, settings in ours.items():
                bench.time(f"ours, {engine}", size, contestants.ours, settings, start)
            if size[0] == 1:
                bench.time("faiss.Kmeans", size, contestants.faiss_kmeans, ours["faiss"], start)
                bench.time("scikit-learn", size, contestants.sklearn_kmeans, ours["faiss"], start)
    first = bench.found["ours, faiss", 1, 1][0]
    law = {}
    for size in (*GROUPS, *LAW):
        for engine, settings in ours.items():
            found = bench.found[f"ours, {engine}", *size][0] if size in GROUPS else bench.group(size).run(contestants.ours, settings, chosen.seed, start)
            law[f"{engine}, {size[0]} processes x {size[1]} threads"] = {
                "equal_labels": float((found["labels"] == first["labels"]).mean()),
                "objective_difference": found["objective"] / first["objective"] - 1,
            }
    peer = bench.found["faiss.Kmeans", 1, 1][0]
    return {
        "law6": law,
        "objective": first["objective"],
        "objective_over_faiss": first["objective"] / peer["objective"],
        "moved": first["moved"],
        "empty": {"ours": first["empty"], "faiss": peer["empty"]},
        "pbt_seconds": statistics.median(found["pbt"] for found in bench.found["ours, faiss", 1, 1]),
    }, start


def ratios(bench: Bench, suffix: str = "") -> dict[str, float]:
    """Of medians of processor and wall time to faiss.Kmeans's."""
    def of(key: tuple[str, int, int], figure: str, baseline: tuple[int, int]) -> float:
        return median(bench.found[key], figure) / median(bench.found[f"faiss.Kmeans{suffix}", *baseline], figure)

    found = {}
    for engine in ("faiss", "torch"):
        for threads in (1, 2):
            found[f"{engine}, 1 process, {threads} threads"] = of((f"ours, {engine}{suffix}", 1, threads), "seconds", (1, threads))
        found[f"{engine}, 2 processes, 1 thread"] = of((f"ours, {engine}{suffix}", 2, 1), "seconds", (1, 1))
    return found


def median(found: list[dict], figure: str) -> float:
    return statistics.median(line[figure] for line in found)


def paper(bench: Bench, chosen: argparse.Namespace) -> None:
    """20 iterations x 3 restarts, once."""
    settings = Prototypes(clusters=chosen.clusters, iterations=20, restarts=3)
    for size in GROUPS:
        bench.time("ours, faiss, 20 x 3", size, contestants.ours, settings, None)
        if size[0] == 1:
            bench.time("faiss.Kmeans, 20 x 3", size, contestants.faiss_kmeans, settings, None)


def on_gpu(rows: np.ndarray, folder: Path, chosen: argparse.Namespace) -> dict[str, float]:
    """Seconds on one GPU by contestant; medians over the rounds, after one to warm up."""
    bench = Bench(features.enlarge(rows, GPU_ROWS), folder, chosen.seed)
    for _ in range(chosen.rounds + 1):
        for distances in ("fp32", "tf32", "bf16"):
            bench.time(f"ours, torch, {distances}", (1, 2), contestants.ours, Prototypes(**GPU, engine="torch", distances=distances), None)
        if faiss.get_num_gpus():
            bench.time("faiss.Kmeans on the GPU", (1, 2), contestants.faiss_kmeans, Prototypes(**GPU), None, True)
    bench.close()
    return {name: median(found[1:], "seconds") for (name, _, _), found in bench.found.items()}


def main(argv: list[str] | None = None) -> None:
    chosen = arguments(argv)
    rows = rows_of(chosen)
    used = features.enlarge(rows, chosen.rows) if len(rows) < chosen.rows else np.ascontiguousarray(rows[: chosen.rows])
    figures = {"machine": platform.processor() or platform.machine(), "rows": len(used), "dim": used.shape[1], "distinct": len(np.unique(used, axis=0)), "clusters": chosen.clusters, "iterations": chosen.iterations}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(used, Path(folder), chosen.seed)
        measured, _ = on_cpu(bench, chosen)
        if not chosen.skip_paper:
            paper(bench, chosen)
        bench.close()
        figures |= measured
        figures["times"] = {
            f"{name}, {processes} x {threads}": {figure: median(found, figure) for figure in ("seconds", "cpu")} | {"objective": found[0]["objective"]}
            for (name, processes, threads), found in bench.found.items()
        }
        figures["of_faiss"] = ratios(bench)
        figures["pbt_share"] = figures["pbt_seconds"] / median(bench.found["ours, faiss", 1, 1], "seconds")
        figures["pbt_share_of_faiss"] = figures["pbt_seconds"] / median(bench.found["faiss.Kmeans", 1, 1], "seconds")
        if torch.cuda.is_available():
            figures["gpu"] = {"device": torch.cuda.get_device_name(), "rows": GPU_ROWS, **GPU, "seconds": on_gpu(rows, Path(folder), chosen)}
    show(figures)
    print(json.dumps(figures))


def show(figures: dict) -> None:
    console = Console()
    table = Table(title=f"k-means: {figures['rows']:,} rows x {figures['dim']}, {figures['clusters']:,} clusters, {figures['iterations']} iterations")
    for column in ("contestant, processes x threads", "seconds", "processor seconds", "objective"):
        table.add_column(column, justify="left" if column.startswith("c") else "right")
    for name, found in figures["times"].items():
        table.add_row(name, f"{found['seconds']:.2f}", f"{found['cpu']:.2f}", f"{found['objective']:.4f}")
    console.print(table)
    for name, ratio in figures["of_faiss"].items():
        console.print(f"ours, {name}: {ratio:.2f} of faiss.Kmeans's seconds")
    console.print(f"back translation: {figures['pbt_seconds']:.3f} s, {figures['pbt_share']:.1%} of our k-means, {figures['pbt_share_of_faiss']:.1%} of faiss.Kmeans")
    console.print(f"objective over faiss.Kmeans's: {figures['objective_over_faiss']:.8f}; rows moved: {figures['moved']}")
    equal = min(found["equal_labels"] for found in figures["law6"].values())
    console.print(f"law 6: at least {equal:.4%} of labels equal over {len(figures['law6'])} engines, processes and threads")
    for name, seconds in figures.get("gpu", {}).get("seconds", {}).items():
        console.print(f"{figures['gpu']['device']}: {name}: {seconds:.2f} s")


if __name__ == "__main__":
    main()
