"""The lines that users type, under every CPU twin of the sharded configurations: a run with prototypes and a locked ending to its end, and on under another strategy;
recipes of further methods."""

import numpy as np
import pytest

from tests.support import CORPUS, TINY_PROTOTYPES, final_tensors, launch, metrics, overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# two episodes with prototypes, then a locked ending; evaluated on a small held-out set, exported
EVALUATION = f"evaluation={{sets: [{{name: val, files: {CORPUS}/val-*.parquet, classify: [coarse]}}], gallery: {{}}, probe_train: null, batch: 32}}"
SETTINGS = (
    *(value for value in TINY_PROTOTYPES if not value.startswith(("evaluation", "run.export", "schedule.total", "model.image.name"))),
    "model.image.name=test_convnext",
    "episodes={warmup: 0, lit: {start: 3, variant: paper}}",
    "schedule.total=3 episodes",
    "schedule.warmup_steps=2",
    "optim.max_norm=1.0",
    EVALUATION,
)


def run(folder, config: str, *more: str, ranks: int = 2, recipe: str = "demo", settings: tuple[str, ...] = SETTINGS) -> None:
    done = launch("--recipe", f"recipes/{recipe}.yaml", "--run-dir", folder, "--expect-ranks", ranks, *overrides(settings), *more, ranks=ranks, config=config, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def losses(folder) -> list[float]:
    return [line["loss"] for line in metrics(folder, "train")]


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp") / "run"
    run(folder, "cpu")
    return losses(folder)


@pytest.mark.parametrize(("config", "then"), [("cpu_zero1", "cpu_zero3"), ("cpu_zero2", "cpu"), ("cpu_zero3", "cpu_zero2")])
def test_a_run_to_its_end_and_on_under_another_strategy(tmp_path, under_ddp, config, then):
    folder = tmp_path / "run"
    run(folder, config)
    found = losses(folder)
    steps = len(found)
    assert np.allclose(found[: steps // 3], under_ddp[: steps // 3], rtol=1e-4)  # before rounding can move a row to another cluster
    assert np.allclose(found, under_ddp, rtol=0.05)
    assert (folder / "export" / "open_clip" / "open_clip_model.safetensors").is_file()
    first = {name: value for name, value in metrics(folder, "eval")[-1].items() if name.startswith("val/")}
    assert len(first) > 4 and all(np.isfinite(value) for value in first.values())
    locked = final_tensors(folder)
    run(folder, then, "--set", "schedule.total=4 episodes", "--extend")
    assert len(losses(folder)) == steps * 4 // 3 and losses(folder)[:steps] == found
    after = final_tensors(folder)
    assert all(after[name].equal(tensor) for name, tensor in locked.items() if name.startswith("model/image_tower"))
    assert any(not after[name].equal(tensor) for name, tensor in locked.items() if name.startswith("model/text_tower"))
    assert {tensor.item() for name, tensor in after.items() if name.endswith("/step")} == {float(len(losses(folder)))}


@pytest.mark.parametrize("recipe", ["demo_declip", "demo_filip"])
def test_recipes_of_other_methods_under_zero_2(tmp_path, recipe):
    """One episode with their own towers and heads: as under DDP, until rounding has grown."""
    settings = ("schedule.total=1 episodes", "schedule.warmup_steps=2", "run.threads=1", "run.log_steps=1", EVALUATION)
    found = {}
    for config in ("cpu", "cpu_zero2"):
        run(tmp_path / config, config, recipe=recipe, settings=settings)
        found[config] = np.array(losses(tmp_path / config))
        assert (tmp_path / config / "export" / "open_clip" / "open_clip_model.safetensors").is_file()
    assert len(found["cpu"]) == 20 and found["cpu"][-5:].mean() < found["cpu"][:5].mean()
    assert np.allclose(found["cpu_zero2"][:4], found["cpu"][:4], rtol=1e-4) and np.allclose(found["cpu_zero2"], found["cpu"], rtol=0.02)
