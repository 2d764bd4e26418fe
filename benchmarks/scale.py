"""Index, plan, --check and resumption at YFCC15M's size: 15,388,848 rows in 1,540 parquet shards, on this machine.

The rows' number, shards, row groups and footers are those of the real thing; captions are the demo corpus's, and its pictures are shared by all rows,
so that the shards take some hundred MB. Every figure is of a process of its own. Run: ``python benchmarks/scale.py --folder DIR`` (DIR is kept, and
made if it is not there; about five minutes). The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
ROWS, SHARDS, ROW_GROUP = 15_388_848, 1_540, 1_000
RECIPE = """\
extends: {root}/recipes/yfcc15m_clip.yaml
name: scale
data:
  root: {data}
  workers: 1
  plan: {{global_batch: 512}} # what each of eight ranks makes of the recipe's 4,096
model:
  embed_dim: 32
  image: {{name: test_resnet, size: 32}}
  text: {{width: 64, heads: 2, layers: 1, context_length: 32}}
optim: {{precision: fp32}}
evaluation: null
run: {{dir: {folder}/run, checkpoint_steps: 2, log_steps: 1, export: null, threads: 1}}
"""


def write_shards(folder: Path) -> None:
    """1,540 shards; those that are there already are left."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = pa.concat_tables([pq.read_table(file, columns=["image", "caption"]) for file in sorted((ROOT / "recipes/demo_corpus").glob("train-*"))])
    pictures = corpus.column("image").combine_chunks().field("bytes").slice(0, 64).to_pylist()
    captions = corpus.column("caption").to_pylist()
    base, longer = divmod(ROWS, SHARDS)
    for shard in range(SHARDS):
        path = folder / f"yfcc15m-{shard:05d}.parquet"
        if path.exists():
            continue
        rows = range(base + (shard < longer))
        images = pa.array([{"bytes": pictures[(shard + row) % len(pictures)], "path": None} for row in rows], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        texts = pa.array([captions[(31 * shard + row) % len(captions)] for row in rows])
        unfinished = path.with_suffix(".unfinished")
        pq.write_table(pa.table({"image": images, "caption": texts}), unfinished, row_group_size=ROW_GROUP, compression="zstd")
        unfinished.rename(path)


MEASURE = """
import json, resource, sys, time, pathlib
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
resident = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
from protoclip_scale.recipe import load_recipe
from protoclip_scale.data.index import index_of, open_readers
from protoclip_scale.data.plan import Plan
recipe = load_recipe(sys.argv[1])
imports = peak()
began = time.perf_counter(); readers = open_readers(recipe.data); index = index_of(readers); listed = time.perf_counter() - began
began = time.perf_counter(); plan = Plan(index, recipe.data.plan); planned = time.perf_counter() - began
times, memory = [], []
for number in range(-(-plan.num_rows // plan.episode_size)):
    began = time.perf_counter(); plan.episode(number); times.append(time.perf_counter() - began); memory.append(resident())
print(json.dumps({"rows": index.num_rows, "blocks": len(index.block_rows), "index_seconds": listed, "plan_seconds": planned, "episodes": len(times),
  "episode_plan_seconds": sorted(times)[len(times) // 2], "peak_mb_above_imports": peak() - imports,
  "resident_mb_after_a_tenth": memory[len(memory) // 10], "resident_mb_at_the_end": memory[-1]}))
"""


def measured(recipe: Path, environment: dict[str, str]) -> dict[str, float]:
    """Index and plan of a whole epoch, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(recipe)], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def timed_check(recipe: Path, environment: dict[str, str]) -> dict[str, float]:
    """``launch/pretrain.py --check``: seconds and peak resident memory of the process."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "launch/pretrain.py", "--recipe", str(recipe), "--check"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, output
    return {"check_seconds": time.perf_counter() - began, "check_peak_mb": usage.ru_maxrss / 1024}


def resumed(recipe: Path, folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """A run is killed in the middle of an episode and started again: seconds to its first batch, with its spool and without."""
    command = [sys.executable, "launch/pretrain.py", "--recipe", str(recipe)]
    shutil.rmtree(folder / "run", ignore_errors=True)
    killed = subprocess.run(command, cwd=ROOT, env=environment | {"PROTOCLIP_KILL_AT": "train.step:5"}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    log = folder / "run" / "log.txt"
    fetched = re.search(r"fetch ended: (\S+) blocks in (\S+)", log.read_text())
    figures: dict[str, float] = {"fetch_blocks": float(fetched[1].split("/")[0].replace(",", "")), "fetch_duration": fetched[2]}
    ready = [float(_wait_for(command, environment, log, r"the first batch was ready ([\d.]+) s")[1]) for _ in range(3)]
    figures["first_batch_seconds"], figures["first_batch_seconds_slowest"] = sorted(ready)[1], max(ready)
    shutil.rmtree(folder / "run" / "scratch")
    began = time.perf_counter()
    eta = _wait_for(command, environment, log, r"fetch: .*eta", appear="train begins")
    figures["first_step_without_spool_seconds"] = time.perf_counter() - began
    figures["fetch_eta_shown"] = bool(eta)
    return figures


def _wait_for(command: list[str], environment: dict[str, str], log: Path, pattern: str, appear: str = "") -> re.Match | None:
    """Start the run, wait for a line of its log (and for ``appear``), stop it; the match."""
    start = log.stat().st_size
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None:
            text = log.read_bytes()[start:].decode()
            found = re.search(pattern, text)
            if (found and not appear) or (appear and appear in text):
                return found
            time.sleep(0.05)
        raise AssertionError(process.stderr.read())
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the shards are made and kept (about 200 MB); default: a temporary folder")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = folder.absolute()
        console = Console(soft_wrap=True)
        console.print(f"writing {SHARDS:,} shards under {folder}")
        write_shards(folder / "shards")
        recipe = folder / "scale.yaml"
        recipe.write_text(RECIPE.format(root=ROOT, data=folder / "shards", folder=folder))
        environment = os.environ | {"PROTOCLIP_CACHE": str(folder / "cache")}
        shutil.rmtree(folder / "cache", ignore_errors=True)
        first = measured(recipe, environment)
        again = measured(recipe, environment)
        figures = first | {"index_again_seconds": again["index_seconds"]} | timed_check(recipe, environment) | resumed(recipe, folder, environment)
    table = Table("figure", "value", title="15,388,848 rows in 1,540 shards")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)
    print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}))


if __name__ == "__main__":
    main()
