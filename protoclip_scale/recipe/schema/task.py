"""What makes rows a task: where they lie, which classes and prompts it has, and which figure counts."""

from typing import Any, Literal

from pydantic import Field, model_validator

from protoclip_scale.recipe.schema.section import Positive, Section

Metric = Literal["top1", "class_mean", "roc_auc", "top1_top5", "mean_recall"]
PROMPTS = ("names", "single", "ensemble")


class Columns(Section):
    """Names of the columns of a held-out set."""

    image: str = Field("image", description="Column with the encoded image: bytes, or a struct with `bytes`; in tables and folders the path of a file.")
    caption: str = Field("caption", description="Column with the caption: a string, or a list of strings. Empty (\"\"): the rows have none.")


class Task(Section):
    """Keys of a held-out set that a task of the package (`task`) fills in where they are not given."""

    task: str | None = Field(None, description="A task of the package, for instance cifar10: it gives files, classes, prompts, metric and number of rows. Keys written beside it hold.")
    name: str = Field(description="Name in tables and metrics; by default the task's.")
    files: str | tuple[str, ...] | None = Field(None, description="Files as in `data.sources`, relative to `data.root`: parquet, tar, csv, tsv, json, jsonl, or a folder of images (`format: folder`).")
    hub: str | None = Field(None, description="Instead of files: the id of a dataset on the Hub. No code from it is run.")
    revision: str | None = Field(None, description="Branch, tag or commit of the Hub dataset.")
    config: str | None = Field(None, description="Configuration of the Hub dataset.")
    split: str | None = Field(None, description="Split of the Hub dataset; by default test.")
    format: Literal["parquet", "tar", "csv", "tsv", "json", "jsonl", "folder"] | None = Field(None, description="Layout of the files; by default what their suffix says, parquet without one.")
    columns: Columns = Field(Columns(), description="Image and caption columns.")
    classify: tuple[str, ...] = Field((), description="Columns with class names, or with their numbers, for zero-shot classification and the linear probe; rows with an empty one are left out. In a folder without metadata, `folder` is the name of the folder that an image lies in.")
    exclude: dict[str, tuple[str, ...]] = Field({}, description="Rows left out: column to values; for instance {coarse: [flag]}.")
    label_names: tuple[str, ...] = Field((), description="What the numbers in a class column stand for, from 0 on; by default the names that the files carry (ClassLabel of `datasets`).")
    classes: tuple[str, ...] = Field((), description="All classes of the one column in `classify`, in the classifier's order; a row of another class is an error. By default those that occur.")
    class_words: dict[str, tuple[str, ...]] = Field({}, description="Words that stand for a class in the prompts, by class name; by default the name itself.")
    templates: tuple[str, ...] | Literal["openai_imagenet", "simple_imagenet"] = Field(("{}",), description="Prompts around a class name; their embeddings are averaged. openai_imagenet, simple_imagenet: the 80 and the 7 that open_clip carries.")
    single_template: str = Field("a photo of a {}.", description="The prompt of `prompts: single`.")
    prompts: Literal["names", "single", "ensemble"] = Field("ensemble", description="names: the bare class name; single: in `single_template`; ensemble: in all of `templates`.")
    metric: Metric | None = Field(None, description="The figure that stands for the set in a suite's average; by default top1, or mean_recall where nothing is classified. top1_top5: the mean of both.")
    num_rows: Positive | None = Field(None, description="How many rows there must be; another number is an error.")
    num_captions: Positive | None = Field(None, description="How many captions there must be in all, with none of the rows without one; another number is an error.")

    @model_validator(mode="before")
    @classmethod
    def _named_by_its_task(cls, values: Any) -> Any:
        return values | {"name": values["task"]} if isinstance(values, dict) and values.get("task") and not values.get("name") else values

    @model_validator(mode="after")
    def _consistent(self):
        if (self.files is not None) + (self.hub is not None) != 1 and not (self.task and self.hub is None):
            raise ValueError(f"evaluation.sets {self.name}: give either files or hub")
        unused = [key for key in ("revision", "config", "split") if getattr(self, key) is not None and self.hub is None]
        if unused:
            raise ValueError(f"evaluation.sets {self.name}: {unused[0]} has no effect without hub; remove it")
        if self.classes and len(self.classify) != 1:
            raise ValueError(f"evaluation.sets {self.name}: classes are those of one column, but classify names {len(self.classify)}; name one")
        if not self.columns.caption and not self.classify and not self.task:
            raise ValueError(f"evaluation.sets {self.name}: columns.caption is empty and classify names no column, so there is nothing to measure; name one")
        twice = sorted({name for name in self.classes if self.classes.count(name) > 1}) if len(set(self.classes)) < len(self.classes) else []
        if twice:
            raise ValueError(f"evaluation.sets {self.name}: classes names {twice[0]!r} twice; give each class its own name, and its words in class_words")
        if self.metric and not (self.task and not self.classify) and (self.metric == "mean_recall") == bool(self.classify):
            raise ValueError(f"evaluation.sets {self.name}: metric {self.metric} is a figure of {'retrieval' if self.classify else 'classification'}, but classify {'names columns' if self.classify else 'names none'}; choose another")
        return self

    @property
    def prompt_templates(self) -> tuple[str, ...]:
        """The templates in use; those of an ensemble after ``tasks.with_task`` has written them out."""
        assert not isinstance(self.templates, str), f"templates {self.templates} of {self.name} are not written out"
        return {"names": ("{}",), "single": (self.single_template,), "ensemble": self.templates}[self.prompts]

    @property
    def chosen_metric(self) -> str:
        return self.metric or ("top1" if self.classify else "mean_recall")
