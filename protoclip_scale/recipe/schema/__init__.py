"""The sections of a recipe. Every key has a description: ``--help`` and docs/recipes.md are made from them.

Unknown keys are refused, values are checked where they stand, and contradictions between keys where both are in sight.
Objectives bring their own settings class (see ``protoclip_scale.objectives``), so a new one changes nothing here.
"""

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator

from protoclip_scale.recipe.names import objective_module
from protoclip_scale.recipe.schema.data import ANY_IMAGE, FORMAT_COLUMNS, SUFFIX_FORMATS, TABLES, Data, Plan, Source, SourceColumns
from protoclip_scale.recipe.schema.evaluation import Evaluation, EvaluationSet
from protoclip_scale.recipe.schema.model import LN_100, ImageTower, LogitScale, Model, PrototypeHeads, TextTower
from protoclip_scale.recipe.schema.run import Profile, Run
from protoclip_scale.recipe.schema.section import Section
from protoclip_scale.recipe.schema.task import PROMPTS, Columns, Task
from protoclip_scale.recipe.schema.training import Ema, Episodes, LayerDecay, Lit, ObjectiveSettings, Optim, Prototypes, Schedule

__all__ = ["Expected", "Recipe", "ANY_IMAGE", "Columns", "Data", "Ema", "Episodes", "Evaluation", "EvaluationSet", "FORMAT_COLUMNS", "ImageTower", "LN_100", "LayerDecay", "Lit", "LogitScale", "Model", "ObjectiveSettings", "Optim", "PROMPTS", "Plan", "Profile", "PrototypeHeads", "Prototypes", "Run", "SUFFIX_FORMATS", "Schedule", "Section", "Source", "SourceColumns", "TABLES", "Task", "TextTower"]


class Expected(Section):
    """A figure to compare the run with."""

    metric: str = Field(description="Name of a figure in the last evaluation, for instance eval_seen_concept/zero_shot/coarse/top1.")
    value: float = Field(description="The value to expect; accuracies and recalls are shares, 0 to 1.")
    protocol: str = Field(description="How it was measured.")
    source: str = Field(description="Where it was published.")


class Recipe(Section):
    """One YAML file: all that fixes a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="Name of the run.")
    notes: str = Field("", description="What the recipe is, and which of its values are choices of ours.")
    variant: Literal["paper", "reference"] = Field("paper", description="reference: may repeat a deviation of the published code, which the notes name.")
    data: Data = Field(description="Rows, their order and preparation.")
    model: Model = Field(description="Towers and heads.")
    objectives: dict[str, SerializeAsAny[ObjectiveSettings]] = Field(min_length=1, description="Named losses with their settings; any set combines.")
    episodes: Episodes = Field(Episodes(), description="Warm-up and ending.")
    prototypes: Prototypes | None = Field(None, description="Clustering; null if no objective needs it.")
    optim: Optim = Field(description="Optimiser and precision.")
    schedule: Schedule = Field(description="Length and learning rate.")
    evaluation: Evaluation = Field(Evaluation(), description="Held-out measurements.")
    run: Run = Field(Run(), description="Output and logging.")
    expected: tuple[Expected, ...] = Field((), description="Published or earlier figures shown beside those reached.")

    @field_validator("objectives", mode="before")
    @classmethod
    def _own_settings(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: settings if isinstance(settings, ObjectiveSettings) else objective_module(name).Settings.model_validate(settings or {}) for name, settings in value.items()}
