"""The model in training: what is built, one loss, one step."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import record_function

from protoclip_scale import collectives
from protoclip_scale.data.batches import Batch
from protoclip_scale.data.randomness import raw_keys
from protoclip_scale.engine import checkpoint, state
from protoclip_scale.engine.checkpoint import Piece, Reader, replicated_pieces
from protoclip_scale.engine.compilation import compile_blocks
from protoclip_scale.engine.ema import WeightAverage
from protoclip_scale.engine.freezing import active_objectives, features_wanted, trained_parameters
from protoclip_scale.engine.microbatches import refuse_batch_norm
from protoclip_scale.engine.optimizer import parameter_groups
from protoclip_scale.engine.schedules import Schedule
from protoclip_scale.engine.strategy import Strategy, Update
from protoclip_scale.errors import UserError
from protoclip_scale.export.token_heads import heads_beside
from protoclip_scale.models.build import build_model
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.features import Feature, parse
from protoclip_scale.models.passes import views_needed
from protoclip_scale.models.row_dropout import row_keys
from protoclip_scale.objectives import Objective, Targets, features_of, heads_of
from protoclip_scale.objectives.shared.inputs import INPUT_FEATURES, is_input
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.recipe.schema import Recipe


@dataclass(frozen=True)
class Loss:
    """The weighted sum that is differentiated, the unweighted terms by objective (local means), and what they were computed from: features of the local rows, those that were
    gathered, and targets."""

    total: torch.Tensor
    terms: dict[str, torch.Tensor]
    features: dict[str, torch.Tensor]
    gathered: dict[str, torch.Tensor] = field(default_factory=dict)
    targets: Targets | None = None


class Trainer:
    """Owns the dual encoder, its optimiser and their wrapping; rebuilt when what trains changes."""

    def __init__(self, recipe: Recipe, strategy: Strategy, objectives: dict[str, Objective], schedule: Schedule):
        self.recipe = recipe
        self.strategy = strategy
        self.objectives = objectives
        self.schedule = schedule
        self.features = features_of(objectives)
        self.heads = heads_of(objectives)
        self.trained: frozenset[str] = frozenset()
        self.average: WeightAverage | None = None

    @property
    def model(self) -> DualEncoder:
        return self.strategy.bare_model

    def build(self, episode: int, reader: Reader | None = None) -> None:
        """Make the model and optimiser for an episode and wrap them; with a checkpoint's ``reader`` they continue from there."""
        self.average = None  # it holds the model's memory
        self.strategy.release()
        model = build_model(self.recipe, self.features, self.recipe.run.seed, fresh=reader is None, read_run=weights_of_run, heads=self.heads, read_heads=heads_beside)
        if self.strategy.whole:  # otherwise it goes there in parts: whole it may not fit
            model = model.to(self.strategy.device)
        if reader:
            state.load_weights(model, reader)
        state.begin_objectives(self.objectives, self.strategy.device, reader)
        refuse_batch_norm(model, self.recipe, collectives.world_size())
        self.trained = trained_parameters(model, self.recipe, self.objectives, episode)
        model.train_only(self.trained)
        if self.recipe.optim.name not in self.strategy.optimizers:
            raise UserError(f"optim.name {self.recipe.optim.name} does not go with {self.strategy.title}, which steps on flattened parts of weights; launch with launch/accelerate/ddp.yaml, or set it to adamw")
        if self.recipe.optim.compile_blocks:
            if not self.strategy.compiles:
                raise UserError(f"optim.compile_blocks true does not go with {self.strategy.title}, whose hooks inside blocks cannot be compiled; set it to false, or launch with another of launch/accelerate/")
            compile_blocks(model, self.strategy.device)
        self.strategy.prepare(model, parameter_groups(model, self.recipe.optim), self.recipe.optim)
        if reader:
            self.strategy.load(reader)
        if self.recipe.optim.ema:
            self.average = WeightAverage(self.recipe.optim.ema, self.strategy.weight_pieces(), reader)

    def rebuild(self, episode: int, open_reader: Callable[[], Reader]) -> None:
        """Change what trains, if the episode asks for that, by the way a resumed run is built; ``open_reader``: a checkpoint of the weights as they are now."""
        if trained_parameters(self.model, self.recipe, self.objectives, episode) != self.trained:
            self.build(episode, open_reader())

    def pieces(self) -> Iterator[Piece]:
        """This rank's share of all that a checkpoint keeps of model, optimiser and objectives."""
        yield from itertools.chain(self.strategy.weight_pieces(), self.strategy.optimizer_pieces(), self.average.pieces() if self.average else ())
        yield from replicated_pieces(state.of_objectives(self.objectives))

    def averaged(self) -> contextlib.AbstractContextManager:
        """The model with its averaged weights, if ``optim.ema`` keeps any: what is evaluated and exported. A collective; see ``Strategy.holding``."""
        return self.strategy.holding(self.average.weights()) if self.average else contextlib.nullcontext()

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[DualEncoder | None]:
        """The model with all its weights in evaluation mode and fp32, for rank 0; a collective."""
        if self.strategy.whole:
            with self.strategy.evaluating() as model:
                yield model
            return
        weights = {name: tensor.cpu() for name, tensor in self.strategy.full_weights() if collectives.rank() == 0}
        model = None
        if weights:
            model = build_model(self.recipe, self.features, self.recipe.run.seed, fresh=False, heads=self.heads).eval()
            model.load_state_dict(weights, strict=True)
        yield model

    def active(self, episode: int) -> dict[str, Objective]:
        return active_objectives(self.objectives, episode)

    def wants(self, episode: int) -> frozenset[str]:
        """Features that a step of the episode computes with the model."""
        return features_wanted(self.active(episode))

    def loss(self, batch: Batch, episode: int, prototypes: EpisodePrototypes | None, records: frozenset[str] = frozenset()) -> Loss:
        """One forward of the local rows and all active objectives; a collective. ``records``: features to compute besides, without gradient."""
        inputs, wants = batch.inputs(), self.wants(episode)
        needed = views_needed(wants, self.model.heads) - {"image", "text"}
        images, token_ids = (inputs[side][0].to(self.strategy.device, non_blocking=True) for side in ("image", "text"))
        views = {name: (each[0].to(self.strategy.device, non_blocking=True), *each[1:]) for name, each in inputs.items() if name in needed}
        with record_function("towers"):
            options = {"wants": wants, "records": records, "microbatch": self.recipe.optim.microbatch}
            if self.model.image_tower.draws:
                drawn = int(raw_keys(1, self.recipe.data.plan.seed, "dropout", episode, batch.step)[0]) >> 1
                options["row_keys"] = row_keys(batch.row_ids, drawn).to(self.strategy.device, non_blocking=True)
            features = self.strategy(images, token_ids, batch.token_lengths, **options, **({"views": views} if views else {}))
        with record_function("losses"):
            return self._losses(features | self._of_inputs(inputs, episode), batch, episode, prototypes)

    def _of_inputs(self, inputs: dict[str, tuple[torch.Tensor, ...]], episode: int) -> dict[str, torch.Tensor]:
        """Features that no tower is run for."""
        needed = sorted(frozenset().union(*(objective.needs for objective in self.active(episode).values())))
        asked = [(name, parse(name)) for name in needed if is_input(name)]
        found = {name: INPUT_FEATURES[kind](*inputs[Feature("text", view).name]) for name, (kind, view) in asked}
        return {name: values.to(self.strategy.device, non_blocking=True) for name, values in found.items()}

    def _losses(self, features: dict[str, torch.Tensor], batch: Batch, episode: int, prototypes: EpisodePrototypes | None) -> Loss:
        active, rows = self.active(episode), len(batch.positions)
        columns_B = torch.arange(rows, device=self.strategy.device) + collectives.rank() * rows
        targets = Targets(columns_B, num_columns=rows * collectives.world_size())
        if prototypes:
            targets = dataclasses.replace(targets, episode=prototypes.centroids, labels=prototypes.labels_of(batch, features))
        for objective in active.values():
            features = features | objective.derived(features, targets)
        with_gradient = set().union(*(objective.gathers for objective in active.values()))
        names = with_gradient.union(*(objective.gathers_constant for objective in active.values()))
        gathered = {name: (collectives.all_gather_with_grad if name in with_gradient else collectives.all_gather)(features[name]) for name in sorted(names)}
        terms = {name: objective.coupled(features, gathered, targets) for name, objective in active.items()}
        total = torch.stack([self.objectives[name].settings.weight * term for name, term in terms.items()]).sum()
        return Loss(total, {name: term.detach() for name, term in terms.items()}, features, gathered, targets)

    def step(self, loss: Loss, step: int, stop: bool = False) -> Update:
        """Backward, clip and update, also what objectives remember; ``stop``: this rank was asked to stop."""
        self.strategy.set_learning_rates(self.schedule.learning_rates(step))
        with record_function("backward"):
            self.strategy.backward(loss.total)
        with record_function("update"):
            update = self.strategy.update(stop)
            if update.taken and self.average:
                self.average.update()
            if update.taken:
                self._advance(loss)
        return update

    @torch.no_grad()
    def _advance(self, loss: Loss) -> None:
        features, gathered = ({name: tensor.detach() for name, tensor in tensors.items()} for tensors in (loss.features, loss.gathered))
        for name in loss.terms:
            self.objectives[name].advance(features, gathered, loss.targets)


def weights_of_run(run_dir: Path) -> dict[str, torch.Tensor]:
    """What ``model.init_from`` takes of a run: the averaged weights of its latest checkpoint, if there are any."""
    return checkpoint.read_weights(run_dir)[1]
