"""What is measured during and after training."""

from pydantic import Field

from protoclip_scale.recipe.schema.section import Positive, Section


class Columns(Section):
    """Names of the columns of a held-out set."""

    image: str = Field("image", description="Column with the encoded image: bytes, or a struct with `bytes`.")
    caption: str = Field("caption", description="Column with the caption: a string, or a list of strings.")


class EvaluationSet(Section):
    """Held-out rows."""

    name: str = Field(description="Name in tables and metrics.")
    files: str | tuple[str, ...] = Field(description="Parquet files, relative to `data.root`.")
    columns: Columns = Field(Columns(), description="Image and caption columns.")
    classify: tuple[str, ...] = Field((), description="Columns with class names, for zero-shot classification and the linear probe; rows with an empty one are left out.")
    exclude: dict[str, tuple[str, ...]] = Field({}, description="Rows left out: column to values; for instance {coarse: [flag]}.")
    templates: tuple[str, ...] = Field(("{}",), description="Prompts around a class name; their embeddings are averaged.")
    class_words: dict[str, tuple[str, ...]] = Field({}, description="Words that stand for a class in the prompts, by class name; by default the name itself.")


class Evaluation(Section):
    """What is measured during and after training."""

    every_episodes: int = Field(1, ge=0, description="Evaluate after every n-th episode and at the end; 0 only at the end.")
    sets: tuple[EvaluationSet, ...] = Field((), description="The held-out sets.")
    gallery: dict[str, tuple[str, ...]] = Field({}, description="Further retrieval tests: a name to the sets whose images and captions are pooled.")
    probe_train: EvaluationSet | None = Field(None, description="Labelled rows the linear probe is fitted on; null runs no probe.")
    batch: Positive = Field(256, description="Images or captions encoded at once, per rank.")
