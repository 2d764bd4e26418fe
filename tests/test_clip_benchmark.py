"""An export scores in clip_benchmark, a program of others, what launch/evaluate.py says of it: zero-shot and retrieval, on the same real pictures."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.support import CORPUS, ROOT, TINY_PROTOTYPES, output, pretrain

pytest.importorskip("clip_benchmark", reason="pip install -e '.[bench]' brings it")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# Its own ``accuracy`` ends in float() of an array of one element, which numpy refuses since 2.4; everything before that line stays its own.
WITH_TODAYS_NUMPY = """
from clip_benchmark.cli import main
from clip_benchmark.metrics import zeroshot_classification

def accuracy(output, target, topk=(1,)):
    found = output.topk(max(topk), 1, True, True)[1].t().eq(target.view(1, -1))
    return [found[:k].sum().item() / len(target) for k in topk]

zeroshot_classification.accuracy = accuracy
main()
"""
TEMPLATES = ("{}", "a picture of {}")
THIRD_DECIMAL = 5e-4
TRAINED = (*(value for value in TINY_PROTOTYPES if not value.startswith("schedule.total")), "schedule.total=6 episodes", "optim.lr=0.003")


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """Of the demo recipe, made small and trained until it is better than chance."""
    folder = tmp_path_factory.mktemp("trained")
    assert pretrain(folder / "run", "demo.yaml", TRAINED) == [0], output(folder / "run")
    exported = folder / "export"
    subprocess.run([sys.executable, "launch/export.py", "--run", folder / "run", "--layout", "open_clip", "--out", exported], cwd=ROOT, check=True)
    return exported


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    """Drawings of a vendor that was not trained on, with a class, no two with a caption in common."""
    rows = [row for file in sorted(CORPUS.glob("eval_seen_concept-*.parquet")) for row in pq.read_table(file).to_pylist() if row["coarse"]]
    first: dict[str, dict] = {}
    for row in rows:
        first.setdefault(row["caption"][0], row | {"caption": row["caption"][0]})
    return list(first.values())[:600]


def write_tar(folder: Path, kind: str, rows: list[dict], text_of) -> None:
    """The layout that clip_benchmark calls wds."""
    (folder / "test").mkdir(parents=True)
    (folder / "dataset_type.txt").write_text(kind)
    (folder / "test/nshards.txt").write_text("1")
    suffix = "txt" if kind == "retrieval" else "cls"
    with tarfile.open(folder / "test/0.tar", "w") as archive:
        for number, row in enumerate(rows):
            for name, data in (("webp", row["image"]["bytes"]), (suffix, text_of(row).encode())):
                member = tarfile.TarInfo(f"{number:05d}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def theirs(export: Path, folder: Path, *options: str) -> dict[str, float]:
    """What ``clip_benchmark eval`` writes of a data set."""
    out = folder / "theirs.json"
    command = [sys.executable, "-c", WITH_TODAYS_NUMPY, "eval", "--model", f"local-dir:{export}", "--pretrained", "", "--dataset", "wds/demo"]
    command += ["--dataset_root", str(folder), "--no_amp", "--num_workers", "1", "--output", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())["metrics"]


@pytest.fixture(scope="module")
def ours(export, pairs, tmp_path_factory) -> dict[str, float]:
    """What ``launch/evaluate.py`` says of the same rows."""
    folder = tmp_path_factory.mktemp("suite")
    chosen = {row["caption"] for row in pairs}
    tables = [pq.read_table(file) for file in sorted(CORPUS.glob("eval_seen_concept-*.parquet"))]
    for number, table in enumerate(tables):
        keep = []
        for caption, coarse in zip(table["caption"].to_pylist(), table["coarse"].to_pylist(), strict=True):
            keep.append(bool(coarse) and caption[0] in chosen)
            chosen.discard(caption[0] if keep[-1] else None)
        captions = [[caption[0]] for caption in table["caption"].to_pylist()]
        table = table.set_column(table.schema.get_field_index("caption"), "caption", [captions])
        pq.write_table(table.filter(keep), folder / f"rows-{number}.parquet")
    suite = {"sets": [{"name": "demo", "files": "rows-*.parquet", "classify": ["coarse"], "templates": list(TEMPLATES)}]}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    out = folder / "ours.json"
    command = [sys.executable, "launch/evaluate.py", "--model", export, "--suite", folder / "suite.yaml", "--out", out]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    return json.loads(out.read_text())["results"][0]["figures"]


def test_zero_shot_is_what_clip_benchmark_finds(export, pairs, ours, tmp_path):
    names = sorted({row["coarse"] for row in pairs})
    write_tar(tmp_path / "demo", "classification", pairs, lambda row: str(names.index(row["coarse"])))
    (tmp_path / "demo/classnames.txt").write_text("\n".join(names))
    (tmp_path / "demo/zeroshot_classification_templates.txt").write_text("\n".join(template.replace("{}", "{c}") for template in TEMPLATES))
    found = theirs(export, tmp_path / "demo")
    assert ours["demo/zero_shot/coarse/n"] == len(pairs)
    assert ours["demo/zero_shot/coarse/top1"] == pytest.approx(found["acc1"], abs=THIRD_DECIMAL)
    assert ours["demo/zero_shot/coarse/class_mean"] == pytest.approx(found["mean_per_class_recall"], abs=THIRD_DECIMAL)
    assert found["acc1"] > 1.5 / len(names), "better than chance, so that equal figures say something"


def test_retrieval_is_what_clip_benchmark_finds(export, pairs, ours, tmp_path):
    write_tar(tmp_path / "demo", "retrieval", pairs, lambda row: row["caption"])
    found = theirs(export, tmp_path / "demo", "--task", "zeroshot_retrieval", "--recall_k", "1", "5", "10")
    for k in (1, 5, 10):
        assert ours[f"demo/retrieval/image_to_text/R@{k}"] == pytest.approx(found[f"text_retrieval_recall@{k}"], abs=THIRD_DECIMAL)
        assert ours[f"demo/retrieval/text_to_image/R@{k}"] == pytest.approx(found[f"image_retrieval_recall@{k}"], abs=THIRD_DECIMAL)
    assert found["text_retrieval_recall@10"] > 2 * 10 / len(pairs)
