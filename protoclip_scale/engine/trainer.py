"""The model in training: what is built, one loss, one step."""

from dataclasses import dataclass

import torch

from protoclip_scale import collectives
from protoclip_scale.data.batches import Batch
from protoclip_scale.engine import checkpoint, state
from protoclip_scale.engine.optimizer import build_optimizer, set_learning_rates, skip_parameters
from protoclip_scale.engine.schedules import Schedule
from protoclip_scale.engine.strategy import Strategy
from protoclip_scale.models.build import build_model
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives import Objective, Targets, features_of
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.recipe.schema import Recipe


@dataclass(frozen=True)
class Loss:
    """The weighted sum that is differentiated, and the unweighted terms by objective (local means)."""

    total: torch.Tensor
    terms: dict[str, torch.Tensor]
    features: dict[str, torch.Tensor]


class Trainer:
    """Owns the dual encoder, its optimiser and their wrapping; rebuilt when what trains changes."""

    def __init__(self, recipe: Recipe, strategy: Strategy, objectives: dict[str, Objective], schedule: Schedule):
        self.recipe = recipe
        self.strategy = strategy
        self.objectives = objectives
        self.schedule = schedule
        self.features = features_of(objectives)
        self.frozen = False

    @property
    def model(self) -> DualEncoder:
        return self.strategy.bare_model

    def build(self, frozen: bool, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Make the model and optimiser and wrap them; with ``tensors`` (see ``state.collect``) they continue from there."""
        model = build_model(self.recipe, self.features, self.recipe.run.seed, fresh=tensors is None, read_run=checkpoint.read_weights).to(self.strategy.device)
        if tensors is not None:
            state.load_weights(model, tensors)
        if frozen:
            model.freeze_image()
        optimizer = build_optimizer(model, self.recipe.optim)
        if tensors is not None:
            state.load_moments(optimizer, tensors)
        self.frozen = frozen
        self.strategy.prepare(model, optimizer)

    def rebuild(self, frozen: bool) -> None:
        """Change what trains, by the way a resumed run is built."""
        if frozen != self.frozen:
            self.build(frozen, {name: tensor.cpu().clone() for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that training has changed, by name (see ``state.collect``)."""
        return state.collect(self.model, self.strategy.optimizer)

    def active(self, episode: int) -> dict[str, Objective]:
        return {name: objective for name, objective in self.objectives.items() if objective.active(episode)}

    def loss(self, batch: Batch, episode: int, prototypes: EpisodePrototypes | None, records: frozenset[str] = frozenset()) -> Loss:
        """One forward of the local rows and all active objectives; a collective. ``records``: features to compute besides, without gradient."""
        active = self.active(episode)
        wants = frozenset().union(*(objective.needs for objective in active.values()))
        device = self.strategy.device
        with self.strategy.precision.autocast():
            features = self.strategy.model(
                batch.images.to(device, non_blocking=True),
                batch.token_ids.to(device, non_blocking=True),
                batch.token_lengths.to(device, non_blocking=True),
                wants=wants,
                records=records,
            )
        rows = len(batch.positions)
        names = sorted(set().union(*(objective.gathers for objective in active.values())))
        gathered = {name: collectives.all_gather_with_grad(features[name]) for name in names}
        columns_B = torch.arange(rows, device=device) + collectives.rank() * rows
        targets = Targets(columns_B)
        if prototypes:
            targets = Targets(columns_B, prototypes.centroids, prototypes.labels_of(batch, features))
        terms = {name: objective.coupled(features, gathered, targets) for name, objective in active.items()}
        total = torch.stack([self.objectives[name].settings.weight * term for name, term in terms.items()]).sum()
        return Loss(total, {name: term.detach() for name, term in terms.items()}, features)

    def idle_parameters(self, episode: int) -> frozenset[str]:
        """Names of parameters that no active objective uses."""
        wants = frozenset().union(*(objective.needs for objective in self.active(episode).values()))
        return frozenset(self.model.head_parameters(self.features - wants))

    def step(self, loss: Loss, step: int, episode: int) -> tuple[float, bool]:
        """Backward, clip and update; returns the gradient norm and whether the update was taken."""
        optimizer = self.strategy.optimizer
        set_learning_rates(optimizer, self.schedule.learning_rates(step))
        self.strategy.backward(loss.total)
        skip_parameters(optimizer, self.idle_parameters(episode))
        norm = self.strategy.clip(self.recipe.optim.max_norm).item()
        finite = norm == norm and norm != float("inf")
        taken = self.strategy.step() if finite or self.strategy.precision.scaler else False
        optimizer.zero_grad(set_to_none=True)
        return norm, taken
