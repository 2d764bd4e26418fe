"""What is trained on: objectives, episodes, clustering, optimiser and schedule."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from protoclip_scale.recipe.schema.section import Positive, Section


class ObjectiveSettings(Section):
    """What every objective has."""

    weight: float = Field(1.0, ge=0, description="Factor of this loss in the sum.")


class Lit(Section):
    """The locked-image ending: CLIP's loss alone, with the image tower frozen."""

    start: Positive = Field(description="First locked episode, counted from 1 as in the published commands.")
    variant: Literal["paper", "reference"] = Field("paper", description="paper: the image tower is frozen, batch norm too. reference: only its learning rate is 0, as in the published code.")
    lr: float | None = Field(None, gt=0, description="Peak learning rate of a fresh cosine over the locked episodes; null goes on with the text side's schedule.")

    @model_validator(mode="after")
    def _reference_keeps_its_schedule(self):
        if self.variant == "reference" and self.lr is not None:
            raise ValueError("episodes.lit.lr has no effect with episodes.lit.variant reference; remove it or set variant to paper")
        return self


class Episodes(Section):
    """What changes from episode to episode."""

    warmup: int = Field(1, ge=0, description="First episodes that train the contrastive loss alone; they are not clustered.")
    lit: Lit | None = Field(None, description="The locked-image ending, or null.")


class Prototypes(Section):
    """Clustering between episodes (methods 6.2)."""

    clusters: Positive = Field(20_000, description="K, the number of prototypes of each modality.")
    iterations: Positive = Field(20, description="k-means iterations at most.")
    restarts: Positive = Field(3, description="k-means starts; the one with the best objective is kept.")
    start: Literal["random", "kmeans++"] = Field("random", description="random: distinct rows, as the paper; kmeans++: distinct rows drawn far from those drawn before, in a few rounds.")
    warm_start: bool | None = Field(None, description="The first start is the last episode's centroids; null is true with refresh online, false otherwise.")
    settled: float = Field(0.0, ge=0, lt=1, description="k-means stops when at most this share of rows changes its cluster in an iteration; 0 stops when none does.")
    spherical: bool = Field(False, description="Centroids are scaled to unit length in every iteration; the paper's are plain means.")
    engine: Literal["faiss", "torch"] = Field("faiss", description="Which library searches the nearest centroid.")
    distances: Literal["fp32", "tf32", "bf16"] = Field("fp32", description="Products of the torch engine, summed in fp32; tf32 needs a GPU. Distances in the objective are fp32 always.")
    refresh: Literal["episode", "recorded", "online"] = Field(
        "episode",
        description="Where student features come from. episode: an extraction pass before each episode, the paper's method. recorded: what training recorded at each row's "
        "previous visit. online: what training recorded in the episode before; labels are each batch's nearest centroids.",
    )
    normalize_centroids: bool = Field(False, description="Scale centroids to unit length before targets are formed; the reference does not.")
    quality_rows: int = Field(2000, ge=0, description="Rows of a fixed sample on which each clustering's silhouette and feature diagnostics are measured; 0 measures none.")
    pictures: int = Field(12, ge=0, description="Prototypes drawn as an image grid in episodes that end with an evaluation; 0 draws none.")

    @property
    def starts_warm(self) -> bool:
        return self.refresh == "online" if self.warm_start is None else self.warm_start

    @model_validator(mode="after")
    def _precision_has_an_effect(self):
        if self.distances != "fp32" and self.engine != "torch":
            raise ValueError(f"prototypes.distances {self.distances} has no effect with prototypes.engine {self.engine}, which searches in fp32; set engine to torch")
        return self


class Ema(Section):
    """An exponential moving average of the weights, batch norm's running statistics included."""

    decay: float = Field(0.9998, gt=0, lt=1, description="Share of the average that a step leaves; the new weights are the rest.")
    warmup: bool = Field(True, description="After t steps at most (1 + t) / (10 + t) is left, so that the first weights are soon forgotten.")


class LayerDecay(Section):
    """Learning rates that fall from the top of a tower to its stem: projections and heads have the group's own, every layer below one this factor of the layer above it."""

    image: float = Field(1.0, gt=0, le=1, description="Factor from layer to layer of the image tower; layers are timm's own.")
    text: float = Field(1.0, gt=0, le=1, description="Factor from layer to layer of the text tower.")

    @model_validator(mode="after")
    def _decays(self):
        if self.image == self.text == 1:
            raise ValueError("optim.layer_decay has no effect: image and text are 1; set one of them below 1, or optim.layer_decay to null")
        return self


class Sgd(Section):
    """SGD with momentum for the text side: its tower, projection and heads (methods 3.3)."""

    lr: float = Field(gt=0, description="Peak learning rate; it follows the schedule in proportion to optim.lr.")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay, an L2 term of the gradient; none where AdamW would have none.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum.")
    nesterov: bool = Field(False, description="Nesterov's form of momentum.")

    @model_validator(mode="after")
    def _nesterov_has_momentum(self):
        if self.nesterov and not self.momentum:
            raise ValueError("optim.sgd.nesterov true has no effect with optim.sgd.momentum 0; raise the momentum or remove it")
        return self


class Optim(Section):
    """AdamW or another optimiser, precision and clipping."""

    name: Literal["adamw", "adamw_sgd", "lamb"] = Field("adamw", description="adamw; adamw_sgd: AdamW, and SGD for the text side, as in DeCLIP's paper; lamb: LAMB, as in FILIP's. The last two train in one process or under DDP.")
    lr: float = Field(gt=0, description="Peak learning rate.")
    sgd: Sgd | None = Field(None, description="The text side's optimiser, for name adamw_sgd.")
    betas: tuple[float, float] = Field((0.9, 0.98), description="Decay rates of AdamW and LAMB.")
    eps: float = Field(1e-6, gt=0, description="Epsilon of AdamW and LAMB.")
    weight_decay: float = Field(0.2, ge=0, description="Decoupled weight decay; none for gains, biases, batch norm, logit scales and prototype heads.")
    max_norm: float | None = Field(None, gt=0, description="Gradients are clipped to this total norm; null never clips.")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Towers' arithmetic; weights and losses stay fp32. fp16 scales the loss dynamically and needs a GPU.")
    microbatch: Positive | None = Field(None, description="Rows per rank that the towers take at once; the step is that of the whole batch all the same, at the cost of one more forward pass of the towers. null takes all local rows.")
    layer_decay: LayerDecay | None = Field(None, description="Layer-wise decay of the learning rate; null gives all layers the same.")
    ema: Ema | None = Field(None, description="Keep averaged weights, each rank its share; evaluations and exports are of them. null keeps none. May change on resume.")
    compile_blocks: bool = Field(False, description="Compile the towers' repeated blocks with torch.compile, each where it stands; those with batch norm stay as they are. Not under ZeRO-3. May change on resume.")
    nonfinite_skips: int = Field(10, ge=0, description="Steps in a row that may be skipped for a non-finite loss before the run stops.")

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"optim.betas {list(betas)}: each must be at least 0 and less than 1")
        return betas

    @model_validator(mode="after")
    def _text_side_has_its_settings(self):
        if self.name == "adamw_sgd" and self.sgd is None:
            raise ValueError("optim.name adamw_sgd needs optim.sgd with a learning rate; DeCLIP's paper has {lr: 0.02, weight_decay: 1e-4}")
        if self.name != "adamw_sgd" and self.sgd is not None:
            raise ValueError(f"optim.sgd has no effect with optim.name {self.name}; remove it, or set name to adamw_sgd")
        return self


class Schedule(Section):
    """How long to train, and the learning rate as a pure function of the step."""

    total: str = Field(description="Length of the run: '100 episodes', '32 epochs' or '5000 steps'.")
    warmup_steps: int = Field(2000, ge=0, description="Steps of linear warm-up; less than the run's steps.")
    warmup_lr: float = Field(0.0, ge=0, description="Learning rate at which the forms declip and slip start.")
    final_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the cosine.")
    form: Literal["protoclip", "declip", "slip"] = Field("protoclip", description="protoclip: lr (step+1)/warmup; declip, slip: from warmup_lr to lr over warmup-1 steps; the cosine begins in the last of them (declip) or after the next (slip).")

    @field_validator("total", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> str:
        if not re.fullmatch(r"\s*(\d+|(\d+\.\d+)(?=\s*epochs))\s*(episodes?|epochs?|steps?)\s*", str(value)):
            raise ValueError(f"schedule.total is {value!r}; write for instance '100 episodes', '32 epochs' or '5000 steps'")
        return " ".join(str(value).split())

    @model_validator(mode="after")
    def _used(self):
        if self.form == "protoclip" and self.warmup_lr:
            raise ValueError("schedule.warmup_lr has an effect only with schedule.form declip or slip; remove it or change the form")
        return self

    def length(self) -> tuple[float, str]:
        """The number and its unit: 'episodes', 'epochs' or 'steps'."""
        number, unit = self.total.split()
        return float(number), unit.rstrip("s") + "s"
