"""Rows: where they come from, their order, and how images and captions are prepared."""

import posixpath
from typing import Any, Literal

from pydantic import Field, model_validator

from protoclip_scale.recipe.schema.section import Fraction, Positive, Section

SUFFIX_FORMATS = {".parquet": "parquet", ".tar": "tar", ".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "jsonl"}
ANY_IMAGE = "image"  # in tar shards: the member with an image's suffix, whichever it is
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
