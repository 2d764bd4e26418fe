"""How fast cluster labels age in training: what labels from older features, or from older centroids, have in common with those of the present model.

    python benchmarks/label_age.py RUN [--rows 10000] [--class-column coarse]

RUN is the folder of a finished run with prototypes that kept its checkpoints (run.keep_checkpoints 0). The same rows of its corpus are encoded under every checkpoint, in
evaluation mode, and clustered by the run's own settings. For each checkpoint and modality, as adjusted mutual information (AMI; 1 is equal, 0 is chance):

    again     its clusters with those of another random start: the ceiling, since k-means finds another optimum each time
    nearest   with the centroids of the checkpoint before, each row to its nearest: the labels of prototypes.refresh online
    age N     with the clusters of the features N checkpoints before, from the same start rows: the labels of prototypes.refresh recorded
    class     its clusters with the classes of a column
    cross     its clusters with the other modality's

The last line is one JSON object with the table's figures.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from protoclip_scale.data.captions import clean_caption
from protoclip_scale.data.decode import decode_image
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.data.transforms import eval_transform
from protoclip_scale.engine import checkpoint
from protoclip_scale.engine.encoding import FEATURES
from protoclip_scale.engine.saved_model import load_model
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes import kmeans
from protoclip_scale.prototypes.agreement import adjusted_mutual_information
from protoclip_scale.prototypes.assign_torch import nearest_rows
from protoclip_scale.recipe import Recipe, load_recipe

AGES = (1, 2, 4)
BATCH = 256


def read_rows(recipe: Recipe, rows: int, column: str) -> pa.Table:
    """A random subset of the rows of the recipe's first source, which must be parquet files on this machine."""
    source = recipe.data.sources[0]
    files = [file for pattern in source.patterns for file in sorted(Path(recipe.data.root).glob(pattern))]
    if source.format != "parquet" or not files:
        raise UserError(f"label_age.py reads local parquet files, and {source.label} under {recipe.data.root} is none")
    columns = [source.columns.image, *source.columns.captions, column]
    table = pa.concat_tables(pq.read_table(file, columns=columns) for file in files)
    chosen = np.sort(np.random.default_rng(0).permutation(len(table))[:rows])
    return table.take(chosen).rename_columns(["image", *(f"caption{n}" for n in range(len(columns) - 2)), "class"])


@torch.inference_mode()
def encode(run: Path, step: str, recipe: Recipe, images: torch.Tensor, captions: list[str]) -> dict[str, np.ndarray]:
    """float32 [N, P] by modality."""
    model = load_model(run, step, "live").model  # what labels its rows in training
    tokens = tokenizer_for(recipe.model.text)(captions)
    parts: dict[str, list[torch.Tensor]] = {modality: [] for modality in FEATURES}
    for start in range(0, len(images), BATCH):
        some = slice(start, start + BATCH)
        features = model(images[some], tokens.ids[some], tokens.lengths[some], wants=frozenset(FEATURES.values()))
        for modality, name in FEATURES.items():
            parts[modality].append(features[name])
    return {modality: torch.cat(values).numpy() for modality, values in parts.items()}


def measure(run: Path, rows: int, column: str) -> list[dict]:
    """One line for each checkpoint and modality."""
    recipe = load_recipe(run / "recipe.yaml")
    torch.set_num_threads(1)  # threads of several libraries that wait for each other are slower than one
    if not recipe.prototypes:
        raise UserError(f"{run} has no prototypes: label_age.py looks at clusters")
    steps = [folder.name.removeprefix("step-") for folder in checkpoint.list_checkpoints(run)]
    if len(steps) <= max(AGES):
        raise UserError(f"{run} has {len(steps)} checkpoints, {max(AGES) + 1} are needed at least: train it with --set run.keep_checkpoints=0")
    table = read_rows(recipe, rows, column)
    images = torch.stack([eval_transform(decode_image(image["bytes"] if isinstance(image, dict) else image), recipe.model.image.size) for image in table["image"].to_pylist()])
    texts = [text if isinstance(text, str) else text[0] for text in table["caption0"].to_pylist()]
    classes = np.unique(np.array(table["class"].to_pylist(), dtype=str), return_inverse=True)[1]
    positions = [np.arange(len(images))]
    lines, past = [], []
    for step in steps:
        features = encode(run, step, recipe, images, [clean_caption(text) for text in texts])
        found = {modality: kmeans.fit([values], positions, recipe.prototypes, (0, 1)) for modality, values in features.items()}
        labels = {modality: result.labels[0] for modality, result in found.items()}
        for modality, values in features.items():
            line = {"step": int(step), "modality": modality}
            again = kmeans.fit([values], positions, recipe.prototypes, (0, 2)).labels[0]
            line["again"] = adjusted_mutual_information(labels[modality], again)
            if past:
                nearest = nearest_rows(torch.from_numpy(values), torch.from_numpy(past[-1][0][modality].centroids)).numpy()
                line["nearest"] = adjusted_mutual_information(labels[modality], nearest)
            for age in AGES:
                if len(past) >= age:
                    line[f"age {age}"] = adjusted_mutual_information(labels[modality], past[-age][1][modality])
            line["class"] = adjusted_mutual_information(labels[modality], classes)
            line["cross"] = adjusted_mutual_information(labels["image"], labels["text"])
            lines.append(line)
            print(f"step {step}, {modality}: clusters {labels[modality].max() + 1}, again {line['again']:.3f}", file=sys.stderr, flush=True)
        past.append((found, labels))
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--rows", type=int, default=10_000, help="rows that are clustered (default: 10000)")
    parser.add_argument("--class-column", default="coarse", help="column with class names (default: coarse)")
    chosen = parser.parse_args(argv)
    lines = measure(chosen.run, chosen.rows, chosen.class_column)
    columns = ["step", "modality", "again", "nearest", *(f"age {age}" for age in AGES), "class", "cross"]
    drawn = Table(title="What labels have in common with those of the present model (AMI)")
    for name in columns:
        drawn.add_column(name, justify="right")
    for line in lines:
        drawn.add_row(*(f"{line[name]:.3f}" if isinstance(line.get(name), float) else str(line.get(name, "-")) for name in columns))
    Console(width=120).print(drawn)
    print(json.dumps({"run": chosen.run.name, "rows": chosen.rows, "lines": lines}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
