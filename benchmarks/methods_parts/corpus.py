"""What is trained on and what is held out: the rows of benchmarks/overhead.py, and labelled training rows for the probe.

Held out are four vendors of which nothing is trained on (overhead_parts/corpus.py): Twemoji, which is no source of the train corpus, and the sources fxemoji, healthicons and temaki.
The split val is not used. Zero-shot and probe are judged on Twemoji's shared classes, flags left out; retrieval on all four.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from overhead_parts import corpus as shards

from methods_parts.recipes import ROOT
from protoclip_scale.recipe import load_recipe

CLASSES = "coarse"
JUDGED = "twemoji"
SETS = ("twemoji", *shards.HELD_OUT_SOURCES)


def prepare(corpus: Path, demo: Path, folder: Path) -> Path:
    """The folder with all files and suite.yaml, which launch/evaluate.py takes; written once. UserError for files that are not these corpora."""
    shards.prepare(corpus, demo, folder)
    probe, suite = folder / "probe.parquet", folder / "suite.yaml"
    if not probe.exists():
        train = pa.concat_tables(pq.read_table(file) for file in sorted(folder.glob("train-*.parquet")))
        labelled = train.filter(pc.and_(pc.not_equal(train[CLASSES], ""), pc.not_equal(train[CLASSES], "flag")))
        pq.write_table(labelled, probe, row_group_size=shards.GROUP_ROWS)
    suite.write_text(yaml.safe_dump(evaluation(), sort_keys=False))
    return folder


def evaluation() -> dict:
    """The demo recipes' prompts, which were chosen on another split and vendor."""
    demo = load_recipe(ROOT / "recipes" / "demo_clip.yaml").evaluation.sets[0]
    sets = [{"name": name, "files": f"{name}.parquet", "exclude": {CLASSES: ["flag"]}} for name in SETS]
    sets[SETS.index(JUDGED)] |= {"classify": [CLASSES], "templates": list(demo.prompt_templates), "class_words": {name: list(words) for name, words in demo.class_words.items()}}
    return {"sets": sets, "probe_train": {"name": "probe", "files": "probe.parquet", "classify": [CLASSES]}}
