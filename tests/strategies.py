"""A trainer under a strategy, in one of several processes, for the tests of strategies."""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from protoclip_scale import collectives
from protoclip_scale.data.batches import EpisodeBatches
from protoclip_scale.data.index import build_index, open_readers
from protoclip_scale.data.plan import Plan, lanes_of
from protoclip_scale.data.spool import Spool
from protoclip_scale.data.text_augmentation import text_augmentation
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.engine import checkpoint, state
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.schedules import Schedule
from protoclip_scale.engine.strategy import launch
from protoclip_scale.engine.strategy.fsdp import FullySharded
from protoclip_scale.engine.trainer import Loss, Trainer
from protoclip_scale.objectives import build_objectives, views_of
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.recipe import Recipe, load_recipe
from tests.support import RECIPES, TINY, TINY_PROTOTYPES, zero_environment

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
CLUSTERED = ("prototype", "teacher")
FOUR_PLACES = "model.image.size=64"  # of an image's tokens, where 32 pixels are one
# recipe and settings that further objectives are tested with, on the demo recipe's rows
FAMILY = {
    "simclr": ("demo_clip.yaml", "objectives={simclr: {hidden_dim: 32, dim: 16}}"),
    "mlm": ("demo_clip.yaml", "objectives={mlm: {}}", "model.text.mask_token=true"),
    "siglip": ("demo_clip.yaml", "objectives={siglip: {}}"),
    "filip": ("demo_filip.yaml", FOUR_PLACES, "objectives.filip.dim=16"),  # all tokens
    "filip_selected": ("demo_clip.yaml", FOUR_PLACES, "objectives={clip: {weight: 0}, filip: {dim: 16, groups: 4}}"),
    # multiview, simsiam, mlm and neighbour, whose queue is full from the start: an empty one gives no gradient in the first step
    "declip": ("demo_declip.yaml", "model.text.mask_token=true", "objectives.simsiam.dim=32", "objectives.simsiam.predictor_dim=16", "objectives.neighbour.size=100", "objectives.neighbour.start=random"),
    # clip, prototype and teacher with all of the above, in one step; a queue of 50 entries for each half of the batch, which gives it 64 rows in a step
    "together": (
        "demo.yaml", *TINY_PROTOTYPES[len(TINY) :], "episodes.warmup=0", "model.text.mask_token=true", "objectives.simclr={hidden_dim: 32, dim: 16}", "objectives.siglip={}",
        "objectives.multiview={masked_text: true}", "objectives.simsiam={dim: 32, predictor_dim: 16}", "objectives.mlm={}",
        "objectives.neighbour={size: 50, groups: 2, start: random, masked_text: true}", "objectives.filip={dim: 16, groups: 4}",
    ),
}  # fmt: skip
OBJECTIVES = ("clip", *CLUSTERED, "simclr", "mlm")
TOGETHER = "together"
FURTHER = tuple(name for name in FAMILY if name not in (*OBJECTIVES, TOGETHER))  # in the slow tests alone
REMEMBERING = ("declip", TOGETHER)  # which have a queue
SPOOL = "strategies"


def recipe_with(objective: str, *more: str) -> Recipe:
    """The demo recipe with one objective alone, or those of a method."""
    if objective not in CLUSTERED:
        file, *settings = FAMILY.get(objective, ("demo_clip.yaml",))
        return load_recipe(RECIPES / file, [*TINY, *settings, *more])
    weights = [f"objectives.{name}.weight={float(name == objective)}" for name in ("clip", *CLUSTERED)]
    return load_recipe(RECIPES / "demo.yaml", [*TINY_PROTOTYPES, "episodes.warmup=0", *weights, *more])


def without_kinks(objective: str) -> str:
    """The setting of an image tower without kinks and batch norm, where several ranks are compared in fp32: which side of a ReLU a value near zero falls on is decided by rounding. For all
    objectives together one that has four places at 32 pixels."""
    return f"model.image.name={'test_vit' if objective == TOGETHER else 'test_convnext'}"


def smooth(model: nn.Module) -> None:
    """Take the kinks out of the heads; where there are several one of them is too often hit."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())


def drawn_prototypes(recipe: Recipe, dtype: torch.dtype, episode: int, device: torch.device | str = "cpu") -> EpisodePrototypes:
    """Prototypes as an episode would hand them over, from a seed: the law is about what is done with them."""
    generator = torch.Generator().manual_seed(3)
    clusters, dim = recipe.prototypes.clusters, recipe.model.prototype_heads.dim
    names = ("image_centroids", "text_centroids", "image_from_text", "text_from_image", "image_from_teacher", "text_from_teacher")
    centroids = {name: (torch.randn(clusters, dim, generator=generator, dtype=torch.float64) * 0.3).to(device, dtype) for name in names}
    rows = recipe.data.plan.episode_size
    labels = {name: torch.randint(clusters, (rows,), generator=generator, dtype=torch.int32) for name in ("image", "text", "teacher")}
    return EpisodePrototypes(episode, centroids, labels)


def environment(strategy: str, ranks: int) -> dict[str, str]:
    """Of a process under one of ``STRATEGIES``. Accelerate has FSDP2 on GPUs only; over gloo the strategy itself runs all the same (see ``trainer_of``).

    Under ZeRO-3 every weight is gathered for each use and released: DeepSpeed would keep those of up to 100,000 values, and so all but one of these models'.
    """
    if strategy == "fsdp2":
        return {"TEST_FSDP2": "true"}
    if strategy.startswith("zero3"):
        if strategy.endswith("offload"):
            build_optimizer_for_cpu_memory()
        return zero_environment(3, ranks) | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": f"tests/{strategy}.json"}
    return zero_environment(int(strategy.removeprefix("zero")), ranks) if strategy.startswith("zero") else {}


@functools.cache
def build_optimizer_for_cpu_memory() -> None:
    """What DeepSpeed would else build in the ranks, whose time is limited."""
    launch.need_build_tools()
    subprocess.run([sys.executable, "-c", "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"], check=True, capture_output=True)


def fill_spool(folder: str | Path, recipe: Recipe, episode: int) -> str:
    """Beside the rows a WordNet for ``batches_of``."""
    plan = Plan(build_index(recipe.data), recipe.data.plan)
    Spool(folder, SPOOL).fill(plan.episode(episode), episode, range(recipe.data.plan.lanes), open_readers(recipe.data))
    small_wordnet(Path(folder) / "wordnet")
    return str(folder)


def small_wordnet(folder: Path) -> dict[str, str]:
    """The environment in which EDA knows synonyms of a few words of the demo corpus alone: all of WordNet takes each process more than a second."""
    folder.mkdir(exist_ok=True)
    synsets = [("face", "countenance"), ("woman", "adult_female"), ("man", "adult_male"), ("hand", "paw"), ("sign", "mark"), ("flag", "banner", "standard")]
    data = [f"{number:08} 00 n {len(names):02x} {' '.join(f'{name} 0' for name in names)} 000 | words" for number, names in enumerate(synsets)]
    index = [f"{name} n 1 0 1 0 {number:08}" for number, names in enumerate(synsets) for name in names if "_" not in name]
    for kind in ("noun", "verb", "adj", "adv"):
        for file, lines in ((f"data.{kind}", data), (f"index.{kind}", index), (f"{kind}.exc", [])):
            (folder / file).write_text("".join(f"{line}\n" for line in lines if kind == "noun"))
    return {"WNSEARCHDIR": str(folder)}


def trainer_of(recipe: Recipe, accelerator) -> Trainer:
    """Not built yet."""
    plan = Plan(build_index(recipe.data), recipe.data.plan)
    make = FullySharded if os.environ.get("TEST_FSDP2") else strategies.make_strategy
    strategy = make(accelerator, strategies.Precision(recipe.optim.precision, accelerator.device))
    return Trainer(recipe, strategy, build_objectives(recipe), Schedule(recipe, plan.steps_per_episode, plan.num_rows))


def batches_of(recipe: Recipe, spool_folder: str, episode: int) -> EpisodeBatches:
    """This rank's training batches of an episode in the spool."""
    plan = Plan(build_index(recipe.data), recipe.data.plan)
    lanes = lanes_of(collectives.rank(), collectives.world_size(), recipe.data.plan.lanes)
    tokenizer, spool, views = tokenizer_for(recipe.model.text), Spool(spool_folder, SPOOL), views_of(build_objectives(recipe))
    with mock.patch.dict(os.environ, WNSEARCHDIR=f"{spool_folder}/wordnet"):
        batches = EpisodeBatches(recipe.data, recipe.model.image.size, tokenizer, plan.episode(episode), spool, lanes, "train", 0, views)
    text_augmentation.cache_clear()
    return batches


def saved(trainer: Trainer, folder: Path) -> checkpoint.Reader:
    """A checkpoint of the trainer as it is now; a collective."""
    checkpoint.save(folder, trainer.pieces(), {"attempt": 1}, lambda: None)
    return checkpoint.Reader(folder, checkpoint.facts(folder))


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All weights and buffers; a collective."""
    return {name: tensor.detach().clone() for name, tensor in trainer.strategy.full_weights()}


def remembered(trainer: Trainer, loss: Loss) -> dict[str, torch.Tensor]:
    """What objectives remember after the step of a loss, by which it is advanced here as in ``Trainer.step``."""
    trainer._advance(loss)
    return {name: tensor.clone() for name, tensor in state.of_objectives(trainer.objectives).items()}


def assert_rows_were_pushed(objective: str, tensors: dict[str, torch.Tensor], steps: int) -> None:
    """Both texts of every row of so many steps, into the queue of each group; no queue where there is none to be."""
    pushed = [int(tensor) for name, tensor in tensors.items() if name.startswith(state.OBJECTIVE) and name.endswith("/pushed")]
    assert pushed == [steps * 2 * 64 // (2 if objective == TOGETHER else 1)] * (objective in REMEMBERING), objective


def largest_difference(expected: dict[str, torch.Tensor | None], found: dict[str, torch.Tensor | None]) -> float:
    """The largest difference of any tensor, relative to that tensor's largest value; infinite if it is missing.

    Tensors that are zero but for rounding (the gradient of a bias in front of batch norm, or of a key's bias in attention) must be so in both.
    """
    assert expected.keys() == found.keys()
    largest = {name: 0.0 if tensor is None else tensor.abs().max().item() for name, tensor in expected.items()}
    nothing = 1e-6 * max(value for name, value in largest.items() if name != "loss" and not name.startswith(state.OBJECTIVE))
    used = [name for name, value in largest.items() if value > nothing]
    assert len(used) > 20
    assert all(found[name] is None or found[name].abs().max() <= nothing for name in largest if name not in used)
    return max(((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item() if found[name] is not None else math.inf for name in used)


def whole_difference(expected: dict[str, torch.Tensor | None], found: dict[str, torch.Tensor | None]) -> float:
    """The length of the difference of all tensors, as one vector, over that of the expected ones."""
    pairs = [(tensor.double(), found[name].double()) for name, tensor in expected.items() if tensor is not None and name not in ("loss", "norm")]
    return math.sqrt(sum((one - other).square().sum().item() for one, other in pairs) / sum(one.square().sum().item() for one, _ in pairs))
