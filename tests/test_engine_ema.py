"""Averaged weights in one process, in files and on the command line; tests/test_engine_strategy_state.py has them under every strategy, test_law3_survival.py after kills."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.engine import checkpoint
from protoclip_scale.engine.checkpoint import Piece, Reader, replicated_pieces
from protoclip_scale.engine.checkpoint.copies import _files
from protoclip_scale.engine.ema import WeightAverage, share_left
from protoclip_scale.engine.saved_model import load_model
from protoclip_scale.engine.strategy import Update
from protoclip_scale.engine.trainer import Loss, Trainer, weights_of_run
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.run import evaluate
from protoclip_scale.models.build import build_model
from protoclip_scale.recipe import diff, dump, load_recipe
from protoclip_scale.recipe.schema import Ema
from tests.support import CORPUS, RECIPES, TINY, final_tensors, metrics, output, pretrain

EMA = "optim.ema={decay: 0.9, warmup: true}"
EVALUATION = f"evaluation={{every_episodes: 0, sets: [{{name: val, files: {CORPUS}/val-*.parquet}}]}}"


def test_the_share_that_is_left_grows_to_the_decay():
    warm, plain = Ema(decay=0.9), Ema(decay=0.9, warmup=False)
    assert [share_left(warm, updates) for updates in (0, 1, 8, 79, 80, 10**6)] == [0.1, 2 / 11, 0.5, 80 / 89, 0.9, 0.9]
    assert share_left(plain, 0) == share_left(plain, 5) == 0.9


def model_pieces(*tensors: torch.Tensor) -> list[Piece]:
    return [Piece(f"model/{number}", 0, tensor.view(-1), tuple(tensor.shape)) for number, tensor in enumerate(tensors)]


def test_an_average_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    """In fp64, and cut anywhere; counters are copied."""
    draws = torch.Generator().manual_seed(0)
    weights, counter = torch.randn(5, 3, dtype=torch.float64, generator=draws), torch.tensor(7)
    average = WeightAverage(Ema(decay=0.9), model_pieces(weights, counter))
    expected = weights.clone()
    for updates in range(40):
        weights += torch.randn(5, 3, dtype=torch.float64, generator=draws)
        counter += 1
        average.update()
        left = min(0.9, (1 + updates) / (10 + updates))
        expected = left * expected + (1 - left) * weights
        if updates == 20:
            checkpoint.save(tmp_path / "saved", average.pieces(), {"attempt": 1}, lambda: None)
            reader = Reader(tmp_path / "saved", checkpoint.facts(tmp_path / "saved"))
            part = Piece("model/0", 4, weights.view(-1)[4:9], (5, 3))  # of another rank, elsewhere
            again = WeightAverage(Ema(decay=0.9), [part, *model_pieces(weights, counter)[1:]], reader)
        elif updates > 20:
            again.update()
    found, counted = (piece.values for piece in average.weights())
    torch.testing.assert_close(found.view(5, 3), expected, rtol=1e-12, atol=0)
    assert counted == 47 and again.updates == average.updates == 40
    assert [torch.equal(one.values, other) for one, other in zip(again.weights(), (found[4:9], counted), strict=True)] == [True, True]


def test_a_step_that_was_skipped_does_not_count():
    counted = []
    for taken in (True, False, True):
        strategy = SimpleNamespace(set_learning_rates=lambda rates: None, backward=lambda loss: None, update=lambda stop, taken=taken: Update(1.0, taken, False))
        trainer = Trainer(load_recipe(RECIPES / "demo_clip.yaml", TINY), strategy, {}, SimpleNamespace(learning_rates=lambda step: {}))
        trainer.average = SimpleNamespace(update=lambda taken=taken: counted.append(taken))
        trainer.step(Loss(torch.zeros(()), {}, {}), 0)
    assert counted == [True, True]


def test_weights_are_averaged_where_they_lie():
    with pytest.raises(AssertionError, match="would be a copy"):
        checkpoint.replicated_views({"model/a": torch.ones(4, 3).t()})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory whose checkpoint has the weights of seed 1 and, as their average, those of seed 2."""
    folder = tmp_path_factory.mktemp("run")
    recipe = load_recipe(RECIPES / "demo_clip.yaml", [*TINY, EMA])
    (folder / "recipe.yaml").write_text(dump(recipe))
    tensors = {}
    for seed, prefix in ((1, "model/"), (2, "ema/")):
        state = build_model(recipe, frozenset({"image", "text", "logit_scale"}), seed).state_dict()
        tensors |= {prefix + name: tensor for name, tensor in state.items()}
    about = checkpoint.describe(checkpoint.Cursor(0, "train", 0, 1), samples=0, attempt=1)
    checkpoint.save(checkpoint.folder_of(folder, 1), replicated_pieces(tensors), about, lambda: None, weights=True)
    return folder


def of_seed(seed: int, found: dict[str, torch.Tensor]) -> bool:
    recipe = load_recipe(RECIPES / "demo_clip.yaml", TINY)
    expected = build_model(recipe, frozenset({"image", "text", "logit_scale"}), seed).state_dict()
    return expected.keys() == found.keys() and all(torch.equal(each, found[name]) for name, each in expected.items())


def test_a_saved_model_is_the_average_unless_the_live_one_is_asked_for(run_dir):
    for asked, kind, seed in ((None, "ema", 2), ("ema", "ema", 2), ("live", "live", 1)):
        saved = load_model(run_dir, weights=asked)
        assert saved.weights == kind and of_seed(seed, saved.model.state_dict())
    assert of_seed(2, build_model_from(run_dir))


def build_model_from(run_dir) -> dict[str, torch.Tensor]:
    """``model.init_from`` a run."""
    recipe = load_recipe(RECIPES / "demo_clip.yaml", [*TINY, f"model.init_from={run_dir}"])
    return build_model(recipe, frozenset({"image", "text", "logit_scale"}), 3, read_run=weights_of_run).state_dict()


def test_whole_weights_of_both_kinds_lie_beside_each_other(run_dir):
    folder = checkpoint.folder_of(run_dir, 1)
    assert of_seed(1, load_file(folder / "weights.safetensors")) and of_seed(2, load_file(folder / "weights_ema.safetensors"))
    assert {"weights.safetensors", "weights_ema.safetensors"} <= set(_files(checkpoint.facts(folder)))


def test_the_average_may_change_on_resume():
    """The weights that train do not depend on it."""
    plain, averaged, other = (load_recipe(RECIPES / "demo_clip.yaml", [*TINY, *values]) for values in ((), (EMA,), (EMA, "optim.ema.decay=0.5")))
    assert not diff(plain, averaged) and not diff(averaged, plain) and not diff(averaged, other)


def test_an_average_starts_ends_and_is_said_on_resume(tmp_path):
    """None, then one from the checkpoint's weights, then none again: the weights that train never notice. The average is evaluated and exported."""
    run, settings = tmp_path / "run", (*TINY, EVALUATION, "schedule.total=8 steps")
    assert pretrain(run, "demo_clip.yaml", settings, env={"PROTOCLIP_STOP_AT": "train.step:2"}) == [75]
    assert pretrain(run, "demo_clip.yaml", (*settings, EMA, "run.export=open_clip")) == [0], output(run)
    assert (run / "log.txt").read_text().count("the average starts from its weights") == 1
    assert final_tensors(run)["ema_updates"] == 8 - metrics(run, "checkpoint")[0]["step"] > 0
    assert metrics(run, "eval")[-1]["weights"] == "ema" and "evaluated and exported are the averaged weights" in output(run)
    recipe = load_recipe(run / "recipe.yaml")
    gap = {kind: evaluate(load_model(run, weights=kind).model, recipe, tokenizer_for(recipe.model.text), torch.device("cpu"))["val/modality_gap"] for kind in ("ema", "live")}
    assert metrics(run, "eval")[-1]["val/modality_gap"] == pytest.approx(gap["ema"], abs=1e-6) and abs(gap["ema"] - gap["live"]) > 1e-4
    tensors = final_tensors(run)
    exported = load_file(run / "export/open_clip/open_clip_model.safetensors")["visual.head.proj.weight"]
    assert torch.equal(exported, tensors["ema/image_projection.weight"]) and not torch.equal(exported, tensors["model/image_projection.weight"])
    assert pretrain(run, "demo_clip.yaml", (*settings, "schedule.total=9 steps"), "--extend") == [0], output(run)
    assert "averaged weights of the checkpoint are not carried on" in (run / "log.txt").read_text()
    assert not any(name.startswith("ema") for name in final_tensors(run)) and "weights" not in metrics(run, "eval")[-1]
    assert "weights_ema" not in checkpoint.facts(checkpoint.folder_of(run, 9))
    with pytest.raises(UserError, match="--weights ema: .* holds no averaged weights"):
        load_model(run, weights="ema")
