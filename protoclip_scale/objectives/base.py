"""The contract between an objective and the engine.

An objective sees tensors only: no ranks, no autocast, no optimiser. It says which features of which views it needs; the engine makes the union of what the active
objectives need, each view of a row in one pass of its tower, gathers what they ask for, and adds up their weighted losses. Parts of the model that only an
objective needs are its ``heads``, further views of the rows its ``views``, and what it remembers from step to step its ``state``; so an objective is one file.

Losses are coupled or row by row. A coupled loss compares the local rows with all rows of the batch, gathered with gradient. A row-local one (masked language modelling)
is a head that runs inside micro-batches and gives a number per row, such as a sum over selected tokens; the objective divides by a count over the whole batch.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch

from protoclip_scale.data.views import Views
from protoclip_scale.models.features import parse
from protoclip_scale.models.heads import Head
from protoclip_scale.recipe.schema import ObjectiveSettings, Recipe


@dataclass(frozen=True)
class Targets:
    """What a batch is trained towards, besides its features.

    ``columns_B``: for each local row, its column among the ``num_columns`` gathered rows, which stand in the plan's order. ``episode``: the episode's prototype tensors
    by name (centroids [K, P], constants); ``labels``: per local row cluster indices [B] by name.
    """

    columns_B: torch.Tensor
    episode: dict[str, torch.Tensor] = field(default_factory=dict)
    labels: dict[str, torch.Tensor] = field(default_factory=dict)
    num_columns: int = 0


class Objective(ABC):
    """One named loss.

    ``needs``: the features it reads, named ``KIND`` or ``KIND@VIEW``. Kinds are ``image``, ``text`` (unit rows [B, embed_dim]), ``logit_scale`` (1,), those of
    ``models.heads.PROTOTYPE_HEADS``, those of ``heads``, and those of ``objectives.shared.inputs.INPUT_FEATURES``, which are made of the batch alone. ``gathers``: those it needs from the whole
    batch, with gradient; ``gathers_constant``: those it needs without (any dtype). Both may name ``derived`` ones. ``clusters``: the labelings an episode must hand to it ("image", "text", "teacher"),
    empty if none. ``token_kinds``: the kinds of an image's and of a text's token features that the trained model is evaluated by, unit rows [B, T, D] with rows of zeros where no token
    counts, or None; exports know those of ``filip``. ``logits``: the kinds of the temperature, and of the bias if there is one, that make logits of the cosines of images and texts, or None. ``finds_partners``: it is ln N for who guesses
    each row's partner among the N of the batch, by which a run is known that learns nothing. ``stops_when_locked``: it trains the image tower alone, so it has no part in the locked-image ending.

    All of them may be set in ``__init__``, which knows the settings; ``clusters``, ``token_kinds``, ``logits``, ``finds_partners`` and ``stops_when_locked`` belong to the class.
    """

    needs: frozenset[str] = frozenset()
    gathers: tuple[str, ...] = ()
    gathers_constant: tuple[str, ...] = ()
    views: Views = Views()
    clusters: tuple[str, ...] = ()
    token_kinds: tuple[str, str] | None = None
    logits: tuple[str, str | None] | None = None
    finds_partners = False
    stops_when_locked = False

    def __init__(self, settings: ObjectiveSettings, recipe: Recipe):
        self.settings = settings
        self.recipe = recipe

    def active(self, episode: int) -> bool:
        """Whether the objective takes part in an episode (counted from 0)."""
        return self.settings.weight > 0 and not (self.stops_when_locked and is_locked(self.recipe, episode))

    def heads(self) -> dict[str, Head]:
        """Parts of the model that compute features for it, by kind. Two objectives may declare the same object; other parts need other kinds."""
        return {}

    def derived(self, features: dict[str, torch.Tensor], targets: Targets) -> dict[str, torch.Tensor]:
        """Further features of the local rows, made of theirs alone before anything is gathered; ``coupled`` finds them among ``features``. Names are the objective's own."""
        return {}

    @abstractmethod
    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        """The unweighted loss of the local rows, a mean over them; equal batches per rank make the mean of ranks global."""

    def check_ranks(self, world: int) -> None:  # noqa: B027 (most go with any number)
        """UserError where the loss cannot be computed by so many ranks; asked before anything is fetched."""

    def prepare(self, device: torch.device) -> None:  # noqa: B027 (most have no state)
        """Make the state as a run starts with it, a function of the recipe alone. Called before an episode is trained in a new process, and when what trains changes; a
        checkpoint's state is then copied over it. On the device ``meta`` its size is asked for."""

    def state(self) -> dict[str, torch.Tensor]:
        """What is remembered from step to step: the very tensors that ``advance`` changes in place, the same on all ranks. They are in every checkpoint, as
        ``objective/NAME/KEY``, and do not depend on the number of ranks: parts of the batch are groups of lanes, never ranks."""
        return {}

    def advance(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> None:  # noqa: B027
        """After a step that was taken, and not after a skipped one: change the state by what was gathered, which is the same on all ranks. Without gradient."""

    def soft_target_temperatures(self) -> dict[str, float]:
        """Labelings whose centroids are turned into soft targets, with the temperature; for the collapse warning."""
        return {}

    def derived_sizes(self, sizes: dict[str, int]) -> dict[str, int]:
        """Numbers that a row has of each ``derived`` feature that is gathered; ``sizes``: those of the model's features, by kind."""
        return {}

    def loss_products(self, batch: int, sizes: dict[str, int]) -> int:
        """Multiply-adds of the loss of one row of a global ``batch``, forward; ``sizes``: numbers that a row has of each feature, by kind. As it stands, every row meets all rows of
        each feature that is gathered with gradient once."""
        return batch * sum(sizes[parse(name).kind] for name in self.gathers)


def locked_from(recipe: Recipe) -> int | None:
    """The first episode (counted from 0) of the locked-image ending, or None."""
    return recipe.episodes.lit.start - 1 if recipe.episodes.lit else None


def is_locked(recipe: Recipe, episode: int) -> bool:
    """Whether an episode (counted from 0) belongs to the locked-image ending."""
    locked = locked_from(recipe)
    return locked is not None and episode >= locked


def between_warmup_and_ending(recipe: Recipe, episode: int) -> bool:
    """Whether prototypes are trained in this episode: after the warm-up, before the locked-image ending (methods 6.3, 6.4)."""
    return episode >= recipe.episodes.warmup and not is_locked(recipe, episode)
