"""The recipe of each matched method at small size: recipes/matched/METHOD.yaml, under small.yaml, with heads and queues as small as the towers."""

from pathlib import Path

import yaml

from protoclip_scale.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent.parent
MATCHED, SMALL = ROOT / "recipes" / "matched", Path(__file__).parent / "small.yaml"
METHODS = ("clip", "siglip", "protoclip", "protoclip_teacher", "slip", "declip", "filip", "defilip")
BASELINE = "clip"

# By objective, so that it is the same size for all methods that have it.
SMALLER = {
    "simclr": {"hidden_dim": 512, "dim": 128},
    "simsiam": {"dim": 256, "predictor_dim": 128},
    "neighbour": {"size": 2048},  # eight steps, as 65,536 are of 4,096 rows
    "filip": {"dim": 128, "keep": 1, "groups": 1},  # all four places of a picture
}
CLUSTERING = {"clusters": 500, "iterations": 10, "restarts": 1, "pictures": 0, "quality_rows": 0}  # ten rows a cluster, as published


def write_recipe(method: str, corpus: Path, episodes: int, extra: dict, folder: Path) -> Path:
    """``folder``/METHOD.yaml, for the rows in ``corpus``. ``extra`` is laid over all."""
    published = load_recipe(MATCHED / f"{method}.yaml")
    sections = {
        "data": {"root": str(corpus)},
        "objectives": {name: SMALLER[name] for name in published.objectives if name in SMALLER},
        "schedule": {"total": f"{episodes} episodes"},
        **({"prototypes": CLUSTERING} if published.prototypes else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f"{method}-small.yaml"
    own.write_text(yaml.safe_dump(sections, sort_keys=False))
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump({"name": f"methods_{method}", "extends": [str(MATCHED / f"{method}.yaml"), str(SMALL), own.name], **extra}, sort_keys=False))
    return path


def seeded(seed: int) -> list[str]:
    """``--set`` values: initial weights, order of rows and augmentation, the same for every method of a seed."""
    return [f"run.seed={seed}", f"data.plan.seed={seed}"]


def same(one: Recipe, other: Recipe) -> bool:
    """Whether two runs are of one recipe, wherever they are written."""
    place = {"run": {"dir", "scratch_dir"}}
    return one.model_dump(exclude=place) == other.model_dump(exclude=place)
