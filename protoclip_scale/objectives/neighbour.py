"""DeCLIP's nearest-neighbour supervision: images are contrasted with captions of earlier steps that lie nearest to their own (methods 3.2.4)."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch.nn import functional as F

from protoclip_scale.objectives.base import Objective, Targets
from protoclip_scale.objectives.shared.feature_queue import nearest, push
from protoclip_scale.objectives.shared.pairs import IMAGES, group_size, main_text, two_views
from protoclip_scale.objectives.shared.tiled import Keys, tiled_cross_entropy
from protoclip_scale.recipe.schema import ObjectiveSettings, Recipe
from protoclip_scale.recipe.schema.section import Positive


class Settings(ObjectiveSettings):
    """Contrast of both image views with the nearest neighbours, in a queue of earlier captions, of both text views; image to text only, as published."""

    size: Positive = Field(65_536, description="Entries of a queue; a step adds both texts of each row.")
    groups: Positive = Field(1, description="Queues: the rows of each of this many equal groups of lanes feed and ask their own. 1 is one queue for the whole batch; 32 are those of the published 32 GPUs. Each rank holds them all.")
    neighbours: Positive = Field(1, description="Nearest neighbours of each text, each a contrast with those of the same rank of all other rows; the mean of their losses.")
    equal_neighbours: Literal["ignore", "mask"] = Field("ignore", description="Rows whose text has the same neighbour. ignore: one is the other's negative, as published; mask: left out of the softmax.")
    start: Literal["empty", "random"] = Field("empty", description="empty: entries that were never written are no neighbours; random: they are random unit vectors, as in the published code.")
    masked_text: bool = Field(False, description="The text masked for objectives.mlm stands for the main one, as in the published code: one text pass less.")

    @model_validator(mode="after")
    def _neighbours_exist(self):
        if self.neighbours > self.size:
            raise ValueError(f"objectives.neighbour.neighbours {self.neighbours} is more than the entries of a queue, objectives.neighbour.size {self.size}; lower it")
        return self


def neighbour_loss(images: list[torch.Tensor], neighbours: list[torch.Tensor], scale: torch.Tensor, columns_B: torch.Tensor, keys: list[Keys] | None = None) -> torch.Tensor:
    """The mean of CE(s u_a NN_b*', y) over image views a and neighbours b: with two views and NN of two texts  1/2 sum_a 1/2 [CE(s u_a NN', y) + CE(s u_a NN'', y)] .

    ``images``: local rows [B, D] by view, of unit length; ``neighbours``: by text view and place in the ranking, those of all rows [N, D], constants; ``columns_B``: where a local row's own
    stand. ``keys``: for each of ``neighbours``, equal ones to be masked. No gradient but to images and scale.
    """
    all_keys = keys or [None] * len(neighbours)
    terms = [
        tiled_cross_entropy(image, columns.detach(), scale, columns_B, equal)
        for image in images
        for columns, equal in zip(neighbours, all_keys, strict=True)
    ]
    return torch.stack(terms).mean()


class NearestNeighbour(Objective):
    """Active while the image tower trains; an exact zero until a queue holds enough neighbours, which it does after one step."""

    stops_when_locked = True

    def __init__(self, settings: Settings, recipe: Recipe):
        super().__init__(settings, recipe)
        self._texts = (main_text(settings.masked_text), "text@eda")
        self.needs = frozenset({*IMAGES, *self._texts, "logit_scale"})
        self.gathers_constant = (*self._texts, *(f"neighbour_{what}_{number}" for number in range(2) for what in ("rows", "places")))
        self.views = two_views(recipe, settings.masked_text)

    def prepare(self, device: torch.device) -> None:
        settings, width = self.settings, self.recipe.model.embed_dim
        self._entries = torch.zeros(settings.groups, settings.size, width, device=device)
        # on the CPU: how much is filled decides what is computed
        self._pushed = torch.zeros(1, dtype=torch.int64, device="meta" if device.type == "meta" else "cpu")
        if settings.start == "random" and device.type != "meta":
            draws = torch.Generator().manual_seed(self.recipe.run.seed)
            self._entries.copy_(F.normalize(torch.randn(self._entries.shape, generator=draws), dim=2))

    def state(self) -> dict[str, torch.Tensor]:
        return {"entries": self._entries, "pushed": self._pushed}

    def _filled(self) -> int:
        return self.settings.size if self.settings.start == "random" else min(self.settings.size, int(self._pushed))

    def derived(self, features: dict[str, torch.Tensor], targets: Targets) -> dict[str, torch.Tensor]:
        """Of both local texts the neighbours [B, k, D] and their places [B, k] among the entries of all queues."""
        settings, filled, derived = self.settings, self._filled(), {}
        group_rows = group_size(targets.num_columns, settings.groups, "neighbour")
        first = int(targets.columns_B[0]) if settings.groups > 1 else 0  # a GPU is waited for only where it matters which rows these are
        for number, text in enumerate(self._texts):
            rows = features[text].detach().to(self._entries)
            places = torch.zeros(len(rows), settings.neighbours, dtype=torch.int64, device=rows.device)
            if filled >= settings.neighbours:
                for group in range(first // group_rows, (first + len(rows) - 1) // group_rows + 1):
                    own = slice(max(0, group * group_rows - first), (group + 1) * group_rows - first)
                    places[own] = nearest(self._entries[group, :filled], rows[own], settings.neighbours) + group * settings.size
            derived[f"neighbour_rows_{number}"] = self._entries.flatten(0, 1)[places].to(features[text].dtype)
            derived[f"neighbour_places_{number}"] = places
        return derived

    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        images = [features[name] for name in IMAGES]
        if self._filled() < self.settings.neighbours:
            return sum(image.sum() for image in images) * 0 + features["logit_scale"].sum() * 0
        ranked = [(number, place) for number in range(2) for place in range(self.settings.neighbours)]
        neighbours = [gathered[f"neighbour_rows_{number}"][:, place] for number, place in ranked]
        keys = None
        if self.settings.equal_neighbours == "mask":
            keys = [Keys(*(each[f"neighbour_places_{number}"][:, place] for each in (features, gathered)), shared=False) for number, place in ranked]
        return neighbour_loss(images, neighbours, features["logit_scale"], targets.columns_B, keys)

    @torch.no_grad()
    def advance(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> None:
        """The edited texts, then the main ones, as published."""
        groups = self.settings.groups
        push(self._entries, self._pushed, torch.cat([gathered[text].unflatten(0, (groups, -1)) for text in reversed(self._texts)], dim=1))

    def derived_sizes(self, sizes: dict[str, int]) -> dict[str, int]:
        count = self.settings.neighbours
        return {f"neighbour_{what}_{number}": size for number in range(2) for what, size in (("rows", count * sizes["text"]), ("places", count))}

    def loss_products(self, batch: int, sizes: dict[str, int]) -> int:
        """Each text meets a queue, each image the neighbours of all rows."""
        width = sizes["image"]
        return 2 * self.settings.size * width + 4 * self.settings.neighbours * batch * width


build = NearestNeighbour
