"""The sections of a recipe. Every key has a description: ``--help`` and docs/recipes.md are made from them.

Unknown keys are refused, values are checked where they stand, and contradictions between keys where both are in sight.
Objectives bring their own settings class (see ``protoclip_scale.objectives``), so a new one changes nothing here.
"""

import math
import posixpath
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from protoclip_scale.recipe.names import objective_module

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
LN_100 = math.log(100)


class Section(BaseModel):
    """A part of a recipe: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        """A file that extends another takes a key back by setting it to null."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {key: value for key, value in values.items() if value is not None or key not in fields or fields[key].is_required() or fields[key].default is None}


class Columns(Section):
    """Names of the columns of a held-out set."""

    image: str = Field("image", description="Column with the encoded image: bytes, or a struct with `bytes`.")
    caption: str = Field("caption", description="Column with the caption: a string, or a list of strings.")


SUFFIX_FORMATS = {".parquet": "parquet", ".tar": "tar", ".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "jsonl"}
ANY_IMAGE = "image" # in tar shards: the member with an image's suffix, whichever it is
FORMAT_COLUMNS = {
    "parquet": ("image", "caption"),
    "tar": (ANY_IMAGE, "txt"),
    "csv": ("filepath", "title"),
    "tsv": ("filepath", "title"),
    "json": ("image", "caption"),
    "jsonl": ("image", "caption"),
    "folder": ("file_name", "text"),
    "hub": ("image", "caption"),
}
TABLES = ("csv", "tsv", "json", "jsonl")  # images are files that a column names


class SourceColumns(Section):
    """Names of the columns of a source. Defaults: image and caption in parquet, JSON and on the Hub; filepath and title in CSV and TSV, as open_clip reads
    them; the image and txt members of a tar shard; file_name and text of a folder's metadata."""

    image: str = Field(description="Column with the image: encoded bytes, a struct with `bytes`, or, in CSV, TSV, JSON and folders, the path of a file. In tar shards the members' suffix, or several (jpg;png); image takes any.")
    caption: str | tuple[str, ...] = Field(description="Column with the caption, a string or a list of strings; or several columns, whose captions are put in one list. In tar shards a member's suffix, or a key of the json member, as json.caption.")
    extra: tuple[str, ...] = Field((), description="Further columns that ride with each row to the loader: ids, lists of strings, a second image.")

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption,) if isinstance(self.caption, str) else self.caption


class Source(Section):
    """One set of image-text pairs."""

    files: str | tuple[str, ...] | None = Field(None, description="Path, glob or URL (s3://, http(s)://, hf://; or a list of them), relative to `data.root`.")
    hub: str | None = Field(None, description="Instead of files: the id of a dataset on the Hub, for instance org/name. No code from it is run.")
    revision: str | None = Field(None, description="Branch, tag or commit of the Hub dataset; the commit it stands for is kept in the run directory.")
    config: str | None = Field(None, description="Configuration of the Hub dataset; null takes its only or default one.")
    split: str = Field("train", description="Split of the Hub dataset.")
    format: Literal["parquet", "tar", "csv", "tsv", "json", "jsonl", "folder", "hub"] = Field(description="Layout of the files; by default what their suffix says. tar: shards as webdataset writes them. csv, tsv, json, jsonl: image paths with captions. folder: images with metadata.csv, metadata.jsonl, metadata.parquet, or a .txt beside each.")
    columns: SourceColumns = Field(description="Which columns to read.")
    image_root: str | None = Field(None, description="Folder or URL that the image paths of a table are relative to, itself relative to `data.root`; by default the table's own folder.")
    separator: str | None = Field(None, min_length=1, max_length=1, description="Character between the columns of csv and tsv files; by default comma and tab.")
    header: tuple[str, ...] | None = Field(None, description="Column names of csv and tsv files that have no line with them, in order.")
    weight: float | None = Field(None, gt=0, description="Share of the rows in every episode, relative to the other sources' weights; set it for all sources or none. Without weights each source counts with all its rows.")
    rows: Positive | None = Field(None, description="Use a seeded random subset of so many rows; null takes all.")
    name: str = Field("", description="Name used in messages; by default the files' pattern or the Hub id.")

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, values: Any) -> Any:
        """The format that the suffix tells, and the columns that belong to the format."""
        if not isinstance(values, dict):
            return values
        values = {key: value for key, value in values.items() if value is not None}
        files = values.get("files") or ""
        first = files[0] if isinstance(files, (list, tuple)) else files
        values.setdefault("format", "hub" if "hub" in values else SUFFIX_FORMATS.get(posixpath.splitext(str(first).partition("?")[0])[1], "parquet"))
        image, caption = FORMAT_COLUMNS.get(str(values["format"]), ("image", "caption"))
        if isinstance(values.get("columns", {}), dict):
            values["columns"] = {"image": image, "caption": caption} | values.get("columns", {})
        return values

    @model_validator(mode="after")
    def _consistent(self):
        empty = [key for key, value in (("files", self.files), ("columns.caption", self.columns.caption), ("header", self.header)) if value is not None and not value]
        if empty:
            raise ValueError(f"data.sources {self.label or self.format}: {empty[0]} is empty; name at least one, or leave the key out")
        if self.separator is not None and (self.separator in "\"\r\n" or not self.separator.isprintable() and self.separator != "\t"):
            raise ValueError(f"data.sources {self.label}: separator {self.separator!r} cannot separate columns; use a comma, a tab or the like")
        if (self.files is None) == (self.hub is None):
            raise ValueError(f"data.sources{f' {self.name}' if self.name else ''}: give either files or hub")
        if (self.format == "hub") != (self.hub is not None):
            raise ValueError(f"data.sources {self.label}: format {self.format} and hub {self.hub} contradict each other; leave format out")
        unused = [
            *(key for key in ("revision", "config") if getattr(self, key) is not None and self.hub is None),
            *(["split"] if self.split != "train" and self.hub is None else []),
            *(["image_root"] if self.image_root is not None and self.format not in TABLES else []),
            *(key for key in ("separator", "header") if getattr(self, key) is not None and self.format not in ("csv", "tsv")),
        ]
        if unused:
            raise ValueError(f"data.sources {self.label}: {unused[0]} has no effect with format {self.format}; remove it")
        names = (self.columns.image, *self.columns.captions, *self.columns.extra)
        twice = sorted({name for name in names if names.count(name) > 1})
        reserved = sorted({"image", "captions", "row_id"} & set(self.columns.extra))
        if twice or reserved:
            raise ValueError(f"data.sources {self.label}: columns names {(twice or reserved)[0]} {'twice' if twice else 'in extra, which stands for something else'}; give each column one use")
        return self

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.files,) if isinstance(self.files, str) else self.files or ()

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.name or self.hub or ", ".join(self.patterns)


class Plan(Section):
    """What alone fixes which rows stand in which batch (together with the sources)."""

    seed: int = Field(0, ge=0, description="Seed of the order of rows and of the subset.")
    epoch_rows: Positive | None = Field(None, description="Rows of an epoch: a seeded random subset if fewer than the sources hold; null takes all.")
    episode_size: Positive = Field(200_000, description="Rows between two clusterings, rounded down to whole global batches; without prototypes the shuffle window.")
    lanes: Positive = Field(8, description="Contiguous parts of an episode; the number of ranks must divide it.")
    global_batch: Positive = Field(description="Rows of one optimiser step over all ranks; a multiple of `lanes`.")

    @model_validator(mode="after")
    def _whole_batches(self):
        if self.global_batch % self.lanes:
            raise ValueError(f"data.plan.global_batch {self.global_batch} is not a multiple of data.plan.lanes {self.lanes}; use {self.global_batch // self.lanes * self.lanes or self.lanes}, or other lanes")
        if self.episode_size < self.global_batch:
            raise ValueError(f"data.plan.episode_size {self.episode_size} is smaller than one global batch: raise it to at least data.plan.global_batch {self.global_batch}")
        return self


class Data(Section):
    """Where rows come from, their order, and how images and captions are prepared."""

    root: str = Field(".", description="Folder or URL that `files` are relative to; a relative one starts from the folder of the file that says it, under --set from the working directory.")
    sources: tuple[Source, ...] = Field(min_length=1, description="What to train on; sources of any kind can be mixed.")
    plan: Plan = Field(description="The order of rows.")
    augmentation: Literal["clip", "protoclip_light", "slip", "slip_ssl", "declip", "none"] = Field("clip", description="Training transform: clip (random crop of 90-100%), protoclip_light (methods 6.5), slip (crop of 50-100%, methods 2.1), slip_ssl (its self-supervised views), declip (methods 3.1), none (centre crop). slip, slip_ssl and declip resize bilinearly, the others bicubically.")
    text_augmentation: Literal["none", "eda"] = Field("none", description="Training text: none, or eda (one of synonym replacement, swap, deletion; methods 3.1), which needs the extra wordnet.")
    caption: Literal["first", "random", "join"] = Field("first", description="Which of several captions a row uses; random is a function of seed, epoch and row.")
    empty_caption: Literal["drop", "keep"] = Field("drop", description="drop: rows without a caption are replaced and listed in the quarantine file; keep: they train as the empty text.")
    max_bad_fraction: Fraction = Field(0.02, description="The run stops when a larger share of the rows seen could not be decoded.")
    max_pixels: Positive = Field(100_000_000, description="Images with more pixels are quarantined unread.")
    max_bytes: Positive = Field(50_000_000, description="Images with more encoded bytes are quarantined unread.")
    max_members: Positive = Field(1_000_000, description="A tar shard with more members is refused.")
    workers: int = Field(2, ge=0, description="Loader processes per rank; they change speed only, never a batch.")
    retry_seconds: float = Field(300, ge=0, description="How long remote reads are retried before the run stops.")
    prepare: str | None = Field(None, description="The command that makes the files; --check quotes it when there are none.")

    @model_validator(mode="after")
    def _weights_for_all_or_none(self):
        weights = [source.weight for source in self.sources]
        if None in weights and any(weight is not None for weight in weights):
            without = self.sources[weights.index(None)].label
            raise ValueError(f"data.sources {without} has no weight, but others have: give every source a weight, or none of them")
        limited = [source for source in self.sources if source.rows is not None]
        if limited and self.plan.epoch_rows is not None and weights[0] is None:
            raise ValueError(f"data.plan.epoch_rows {self.plan.epoch_rows} and rows {limited[0].rows} of data.sources {limited[0].label} both choose a subset; set one of them")
        return self


class ImageTower(Section):
    """The image encoder, a timm model."""

    name: str = Field(description="Any timm model, for instance resnet50_clip or vit_base_patch32_clip_224.")
    pretrained: bool = Field(False, description="Start from timm's published weights.")
    size: Positive = Field(224, description="Side of the square input, in pixels.")
    normalization: Literal["clip", "imagenet"] = Field("clip", description="Channel means and deviations; they travel with the export.")
    grad_checkpointing: bool = Field(False, description="Recompute activations in the backward pass to save memory.")


class TextTower(Section):
    """The text encoder: CLIP's causal transformer, or any transformers encoder."""

    name: str = Field("clip", description="clip, or the name or folder of a transformers text encoder, which brings its own tokenizer, pooling and length.")
    pretrained: bool = Field(False, description="For a transformers encoder: start from its published weights.")
    context_length: Positive = Field(77, description="Tokens per caption, start and end included; longer ones are cut, the end token kept.")
    width: Positive = Field(512, description="Width of CLIP's text transformer.")
    heads: Positive = Field(8, description="Attention heads of CLIP's text transformer.")
    layers: Positive = Field(12, description="Layers of CLIP's text transformer.")
    activation: Literal["gelu", "quick_gelu"] = Field("gelu", description="Activation of CLIP's text transformer; the original used quick_gelu.")
    grad_checkpointing: bool = Field(False, description="Recompute activations in the backward pass to save memory.")

    @model_validator(mode="after")
    def _divisible(self):
        if self.name == "clip" and self.width % self.heads:
            raise ValueError(f"model.text.width {self.width} is not a multiple of model.text.heads {self.heads}")
        return self


class PrototypeHeads(Section):
    """The MLPs that map both towers' outputs into the space of the prototypes (methods 6.1)."""

    dim: Positive = Field(128, description="Width of the prototype space.")
    hidden_dim: Positive = Field(2048, description="Width of the hidden layers.")
    hidden_layers: int = Field(1, ge=0, description="Hidden layers, each with batch norm and ReLU; 0 is one linear map.")


class LogitScale(Section):
    """The learned inverse temperatures, as logarithms; bounded in the forward pass."""

    init: float = Field(math.log(1 / 0.07), description="Initial value of the logarithm.")
    minimum: float = Field(0.0, description="Lower bound of the logarithm.")
    maximum: float = Field(LN_100, description="Upper bound of the logarithm; ln 100.")

    @model_validator(mode="after")
    def _ordered(self):
        if not self.minimum <= self.init <= self.maximum:
            raise ValueError(f"model.logit_scale.init {self.init:.4g} lies outside model.logit_scale.minimum {self.minimum:.4g} and model.logit_scale.maximum {self.maximum:.4g}")
        return self


class Model(Section):
    """Towers, projections and heads."""

    embed_dim: Positive = Field(512, description="Width of the shared embedding.")
    image: ImageTower = Field(description="The image encoder.")
    text: TextTower = Field(TextTower(), description="The text encoder.")
    prototype_heads: PrototypeHeads = Field(PrototypeHeads(), description="Heads used by the objectives prototype and teacher.")
    logit_scale: LogitScale = Field(LogitScale(), description="Start and bounds of both temperatures.")
    norm_groups: Positive = Field(1, description="Batch-norm statistics are taken over this many equal groups of lanes; 1 is the whole global batch.")
    init_from: str | None = Field(None, description="Start from the weights of a run directory, an export, an open_clip tag (open_clip:NAME/TAG) or a transformers CLIP; the optimiser starts fresh.")


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


class Optim(Section):
    """AdamW, precision and clipping."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW's decay rates.")
    eps: float = Field(1e-6, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.2, ge=0, description="Decoupled weight decay; none for gains, biases, batch norm, logit scales and prototype heads.")
    max_norm: float | None = Field(None, gt=0, description="Gradients are clipped to this total norm; null never clips.")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="Towers' arithmetic; weights and losses stay fp32. fp16 scales the loss dynamically and needs a GPU.")
    microbatch: Positive | None = Field(None, description="Rows per rank that the towers take at once; the step is that of the whole batch all the same, at the cost of one more forward pass of the towers. null takes all local rows.")
    nonfinite_skips: int = Field(10, ge=0, description="Steps in a row that may be skipped for a non-finite loss before the run stops.")

    @field_validator("betas")
    @classmethod
    def _below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"optim.betas {list(betas)}: each must be at least 0 and less than 1")
        return betas


class Schedule(Section):
    """How long to train, and the learning rate as a pure function of the step."""

    total: str = Field(description="Length of the run: '100 episodes', '32 epochs' or '5000 steps'.")
    warmup_steps: int = Field(2000, ge=0, description="Steps of linear warm-up; less than the run's steps.")
    warmup_lr: float = Field(0.0, ge=0, description="Learning rate at which the declip form starts.")
    final_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the cosine.")
    form: Literal["protoclip", "declip"] = Field("protoclip", description="protoclip: lr (step+1)/warmup; declip: from warmup_lr to lr over warmup-1 steps, counted from 1.")

    @field_validator("total", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> str:
        if not re.fullmatch(r"\s*(\d+|(\d+\.\d+)(?=\s*epochs))\s*(episodes?|epochs?|steps?)\s*", str(value)):
            raise ValueError(f"schedule.total is {value!r}; write for instance '100 episodes', '32 epochs' or '5000 steps'")
        return " ".join(str(value).split())

    @model_validator(mode="after")
    def _used(self):
        if self.form != "declip" and self.warmup_lr:
            raise ValueError("schedule.warmup_lr has an effect only with schedule.form declip; remove it or change the form")
        return self

    def length(self) -> tuple[float, str]:
        """The number and its unit: 'episodes', 'epochs' or 'steps'."""
        number, unit = self.total.split()
        return float(number), unit.rstrip("s") + "s"


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


class Run(Section):
    """Where things are written, and how often. May change on resume."""

    dir: str = Field("runs/{name}", description="Run directory, relative to the working directory; {name} is the recipe's.")
    scratch_dir: str = Field("{dir}/scratch", description="Node-local folder for the spool and the episode's features; {dir} is the run directory.")
    seed: int = Field(0, ge=0, description="Seed of the initial weights.")
    checkpoint_steps: int = Field(0, ge=0, description="Save every n steps besides episode ends; 0 saves at episode ends only.")
    keep_checkpoints: int = Field(0, ge=0, description="Newest checkpoints kept; 0 keeps all.")
    keep_every_steps: int = Field(0, ge=0, description="Checkpoints kept for ever besides the newest: those whose step is a multiple of this; 0 keeps none besides.")
    weights: bool = Field(True, description="Write the model's whole weights into each checkpoint as weights.safetensors too, for any safetensors reader; 4 bytes per parameter, a third more, which rank 0 writes while the others wait.")
    copy_to: str | None = Field(None, description="Folder or fsspec URL (s3://, gs://, ...) that published checkpoints are copied to in the background; where the run directory is empty the run goes on from there. {name} is the recipe's.")
    log_steps: Positive = Field(10, description="Steps between lines of the log and of metrics.jsonl.")
    export: Literal["open_clip"] | None = Field(None, description="Layout of the export written to the run directory at the end; null writes none (launch/export.py can later).")
    trace_rows: bool = Field(False, description="Write which row stood in which step to trace/.")
    threads: int = Field(0, ge=0, description="CPU threads per rank; 0 gives each rank its share of the cores on a machine without a GPU.")
    allow_batchnorm_microbatches: bool = Field(False, description="Let optim.microbatch cut the batch of towers with batch norm: its statistics are then those of each micro-batch over all ranks, so the step is not that of the whole batch, and running statistics move once per micro-batch.")
    timeout_minutes: float = Field(30, gt=0, description="How long a collective may wait before the run fails. Half a minute is 0.5.")
    hang_seconds: float = Field(300, gt=0, description="With several ranks: when none of them gets on for so long, the log names those that are late, which write their stacks to hangs/.")
    learning_watch_steps: int = Field(1000, ge=0, description="From this step on, a CLIP loss within 1% of ln(global batch) is warned about, once; 0 never.")


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
