"""``--check``: what a recipe amounts to on this machine, and every problem that can be found without training."""

import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from protoclip_scale.data.caption_statistics import caption_statistics, sample_captions
from protoclip_scale.data.decode import Limits, problem_of
from protoclip_scale.data.index import index_of, open_readers
from protoclip_scale.data.plan import Plan, check_lanes
from protoclip_scale.data.samples import draw_sample, read_sample
from protoclip_scale.data.sources import BlockReader
from protoclip_scale.data.spool import lane_bytes, lane_schema
from protoclip_scale.data.text_augmentation import text_augmentation
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.engine import cost, refresh
from protoclip_scale.engine.compilation import need_compilable_blocks, need_compilers
from protoclip_scale.engine.memory import size_text
from protoclip_scale.engine.memory_report import memory_tables, place_of
from protoclip_scale.engine.microbatches import refuse_batch_norm
from protoclip_scale.engine.model_cost import measure
from protoclip_scale.engine.optimizer import rate_factors
from protoclip_scale.engine.restore import ask_once, copies_of
from protoclip_scale.engine.schedules import Schedule
from protoclip_scale.engine.trackers import missing
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.sets import checked_set
from protoclip_scale.evaluation.suites import suite_of_recipe
from protoclip_scale.export.writing import LAYOUTS, try_layout
from protoclip_scale.models.build import build_model
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.parts import parameters_of
from protoclip_scale.objectives import build_objectives, check_ranks, features_of, heads_of, used, views_of
from protoclip_scale.prototypes import recording
from protoclip_scale.prototypes.teacher import open_teacher
from protoclip_scale.recipe import Recipe, dump
from protoclip_scale.recipe.remarks import remarks_on
from protoclip_scale.redact import redact_text

IMAGES_LOOKED_AT = 32  # of each source
T = TypeVar("T")
EPISODES_ON_DISK = 2


class Check:
    """Collects tables, problems (exit code 1) and remarks about one recipe."""

    def __init__(self, recipe: Recipe, world: int, memory_per_rank: int | None = None, recipe_file: str = "RECIPE"):
        self.recipe = recipe
        self.world = world
        self.memory_per_rank = memory_per_rank
        self.recipe_file = recipe_file
        self.problems: list[str] = []
        self.remarks: list[str] = []
        self.tables: list[Table] = []
        self.index = self.plan = self.command = None
        self.needed_bytes: dict[str, int] = {}  # in scratch
        self.recorded_bytes: dict[str, int] = {}  # in the run directory

    def attempt(self, work: Callable[[], T], fix: str = "") -> T | None:
        """The result of ``work``, or None and one more problem."""
        try:
            return work()
        except UserError as error:
            self.problems.append(f"{error}{fix}")
            return None

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*(escape(redact_text(cell)) for cell in row))
        self.tables.append(table)

    def data(self) -> None:
        """Rows per source, the plan and the length of the run, and bytes on disk."""
        recipe, settings = self.recipe, self.recipe.data.plan
        self.attempt(lambda: check_lanes(settings.lanes, self.world))
        rows = [
            ("global batch", f"{settings.global_batch:,}: {settings.global_batch // self.world:,} on each of {self.world} ranks, {settings.global_batch // settings.lanes:,} from each of {settings.lanes} lanes")
        ]
        readers = self.attempt(lambda: open_readers(recipe.data), f"; prepare it with: {recipe.data.prepare}" if recipe.data.prepare else "")
        if readers:
            self.index = index_of(readers)
            rows += [(f"rows of {name}", self._rows_of(number)) for number, name in enumerate(self.index.source_names)]
            self.attempt(lambda: lane_schema(readers))
            self.plan = self.attempt(lambda: Plan(self.index, settings))
        if self.plan:
            schedule = Schedule(recipe, self.plan.steps_per_episode, self.plan.num_rows)
            total_steps = self.attempt(lambda: schedule.total_steps)
            rows += [
                ("rows of an epoch", f"{self.plan.num_rows:,}"),
                ("rows of an episode", f"{self.plan.episode_size:,}: {self.plan.steps_per_episode:,} steps"),
            ]
            if total_steps:
                rows.append(("steps in all", f"{total_steps:,} in {schedule.num_episodes:,} episodes, {total_steps * settings.global_batch:,} samples"))
            episode = self.plan.episode(0)
            self.needed_bytes["spool"] = EPISODES_ON_DISK * sum(lane_bytes(episode, lane, readers) for lane in range(settings.lanes))
        self.table("Data", rows)
        tokenizer = self.attempt(lambda: tokenizer_for(recipe.model.text))
        if readers:
            self._images(readers)
        if readers and tokenizer:
            captions = self.attempt(lambda: sample_captions(readers))
            if captions is not None:
                self.table("Captions of a sample", caption_statistics(captions, tokenizer, recipe.data.caption).table())
        self.attempt(lambda: text_augmentation(recipe.data.text_augmentation))

    def _images(self, readers: list[BlockReader]) -> None:
        """Decodes some images of every source: a wrong image_root or column shows here, not after the first fetch."""
        limits, rows = Limits(self.recipe.data.max_pixels, self.recipe.data.max_bytes), []
        for reader in readers:
            for sample, table in self.attempt(lambda reader=reader: list(read_sample([reader], draw_sample([reader], IMAGES_LOOKED_AT)))) or ():
                file, _ = reader.file_of_block(sample.block)
                rows += [(reader.name, file, problem_of(image, limits)) for image in table.column("image").to_pylist()]
            reasons = [(file, problem) for name, file, problem in rows if name == reader.name and problem]
            looked_at = sum(name == reader.name for name, _, _ in rows)
            if reasons:
                file, problem = reasons[0]
                found = self.problems if 2 * len(reasons) > looked_at else self.remarks  # few bad ones are replaced in training
                found.append(f"data.sources {reader.name}: {len(reasons)} of {looked_at} sampled images cannot be used, the first in {file}: {problem}; check columns.image and image_root")
        if rows:
            usable = sum(problem is None for _, _, problem in rows)
            self.table("Images of a sample", [("usable", f"{usable} of {len(rows)}")])

    def _rows_of(self, source: int) -> str:
        """How many rows a source has, and how many of them count."""
        index, text = self.index, f"{self.index.source_rows(source):,}"
        if index.row_limits and index.row_limits[source]:
            text += f", of which {index.row_limits[source]:,} are used"
        if index.weights:
            text += f"; {index.weights[source] / sum(index.weights):.1%} of every episode"
        return text

    def model(self) -> None:
        """Parameters, FLOPs, memory, and bytes of features."""
        recipe = self.recipe
        objectives = used(build_objectives(recipe))
        self.attempt(lambda: check_ranks(objectives, self.world))
        self.attempt(lambda: views_of(objectives))
        model = self.attempt(lambda: build_model(recipe, features_of(objectives), recipe.run.seed, fresh=False, heads=heads_of(objectives)))
        if model:
            self.attempt(lambda: refuse_batch_norm(model, recipe, self.world))
            if recipe.optim.compile_blocks:
                self.attempt(lambda: need_compilable_blocks(model))
                self.attempt(lambda: need_compilers(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
        teacher_dim = self._teacher_dim()
        if self.plan and recipe.prototypes:
            self.needed_bytes["features"] = cost.feature_store_bytes(recipe, self.plan.episode_size, teacher_dim)
            self._recorded_bytes(recipe)
        if model is None:
            return
        for layout in LAYOUTS:  # with the random weights that the model has here
            self.remarks += [f"{layout} cannot express this model, so it cannot be exported there: {reason}" for reason in try_layout(layout, model, recipe.model)]
        if not self._trained(model):
            return
        counted = measure(recipe, objectives)
        self.table("Parameters", [(part, f"{number:,}") for part, number in counted.parameters.items()] + [("all", f"{counted.num_parameters:,}")])
        flops = cost.flops_per_sample(counted, recipe, objectives, self.world)
        self.table("FLOPs per sample", [(part, f"{number:.3g}") for part, number in flops.items()] + [("all", f"{sum(flops.values()):.3g}")])
        place = place_of(self.world, self.memory_per_rank)
        tables, self.command = memory_tables(counted, recipe, objectives, self.world, place, self.recipe_file)
        for title, rows in tables.items():
            self.table(title, rows)

    def _trained(self, model: DualEncoder) -> bool:
        """Frozen parts, and learning rates that differ from layer to layer; whether the model has all the parts."""
        recipe = self.recipe
        parts = self.attempt(lambda: [parameters_of(model, part) for part in recipe.model.frozen])
        factors = self.attempt(lambda: rate_factors(model, recipe.optim))
        if factors and recipe.optim.layer_decay:
            rows = []
            for side in ("image", "text"):
                own = {factor for name, factor in factors.items() if name.startswith(f"{side}_tower.")}
                rows.append((f"{side} tower", f"{min(own):.3g} to {max(own):.3g}, {len(own)} layers" if len(own) > 1 else f"{max(own):.3g}"))
            self.table("Learning-rate factors", [*rows, ("projections, heads, temperatures", "1")])
        for side, tower in (("image", recipe.model.image), ("text", recipe.model.text)):
            random = not tower.pretrained and recipe.model.init_from is None
            for part in {"image": ("image_tower",), "text": ("text_tower", "token_embedding")}[side]:
                if random and part in recipe.model.frozen:
                    self.remarks.append(f"model.frozen {part} keeps random weights: neither model.{side}.pretrained nor model.init_from gives it any")
        if {"image_tower", "text_tower"} <= set(recipe.model.frozen):
            self.remarks.append("model.frozen leaves projections, heads and temperatures to train")
        return parts is not None

    def _recorded_bytes(self, recipe: Recipe) -> None:
        """What clusterings leave in the run directory: recorded features, of as many episodes as a checkpoint counts on, and the labels of a teacher clustered once."""
        looks_back = refresh.looks_back(recipe, self.plan)
        if looks_back:
            episode = self.plan.episode_size * recording.bytes_per_row(recipe.model.prototype_heads.dim)
            episodes = math.ceil(Schedule(recipe, self.plan.steps_per_episode, self.plan.num_rows).num_episodes)
            kept = looks_back + max(1, recipe.run.keep_checkpoints) if recipe.run.keep_checkpoints else episodes
            self.recorded_bytes["recorded features"] = min(kept, episodes) * episode
            if not recipe.run.keep_checkpoints and episodes > looks_back + 1:
                self.remarks.append(f"run.keep_checkpoints 0 keeps the recorded features that every checkpoint counts on, those of all {episodes} episodes; a number keeps those of {looks_back} and some more")
        teacher = recipe.objectives.get("teacher")
        if teacher is not None and teacher.refresh == "once":
            self.recorded_bytes["teacher's labels"] = 4 * self.index.num_rows

    def _teacher_dim(self) -> int:
        settings = self.recipe.objectives.get("teacher")
        if settings is None or self.index is None:
            return 0
        teacher = self.attempt(lambda: open_teacher(settings.features, self.index), "; tools/extract_teacher.py makes them")
        return teacher.dim if teacher else 0

    def disk(self) -> None:
        """What the run writes beside checkpoints, against the free space where it will be: scratch and the run directory may be on one disk."""
        run = self.recipe.run
        folder = Path(run.dir.format(name=self.recipe.name)).absolute()
        scratch = Path(run.scratch_dir.format(dir=folder, name=self.recipe.name)).absolute()
        disks: dict[int, list[tuple[str, Path, dict[str, int]]]] = {}
        for key, path, needed in (("scratch_dir", scratch, self.needed_bytes), ("dir", folder, self.recorded_bytes)):
            existing = next(each for each in (path, *path.parents) if each.exists())
            disks.setdefault(existing.stat().st_dev, []).append((f"run.{key} {path}", existing, needed))
        for places in disks.values():
            (name, existing, _), parts = places[0], {part: number for _, _, needed in places for part, number in needed.items()}
            free = shutil.disk_usage(existing).free
            if parts:
                self.table("Disk", [*((f"{part}, all lanes", size_text(number)) for part, number in parts.items()), ("free", f"{size_text(free)} at {existing}")])
            if sum(parts.values()) > free:
                self.problems.append(f"{name}: {' and '.join(parts)} need {size_text(sum(parts.values()))}, {size_text(free)} are free; name another disk, or lower data.plan.episode_size")

    def evaluation(self) -> None:
        """Rows of the held-out sets."""
        suite = self.attempt(lambda: suite_of_recipe(self.recipe))
        rows = []
        for each in suite.every_set if suite else ():
            held_out = self.attempt(lambda each=each: checked_set(each, suite))
            rows.append((each.name, f"{len(held_out):,} rows" if held_out else "not usable"))
        if rows:
            self.table("Held-out sets", rows)

    def remark(self) -> None:
        """What is allowed but worth knowing, and what this machine lacks."""
        recipe = self.recipe
        self.remarks += remarks_on(recipe)
        if recipe.optim.precision == "fp16" and not torch.cuda.is_available():
            self.remarks.append("optim.precision fp16 needs a GPU, and this machine shows none; bf16 and fp32 train on a CPU")
        if recipe.prototypes and recipe.prototypes.engine == "faiss" and importlib.util.find_spec("faiss") is None:
            self.problems.append("prototypes.engine faiss: faiss is not installed; install faiss-cpu or faiss-gpu, or set prototypes.engine to torch")
        if copies := self.attempt(lambda: copies_of(recipe)):
            self.remarks += ask_once(copies)[1]
            if self.plan and refresh.looks_back(recipe, self.plan):
                self.remarks.append("run.copy_to takes no recorded features along: with this prototypes.refresh a run cannot go on from the copies alone")
        if line := missing(recipe.run.trackers):
            self.problems.append(line)
        start = recipe.model.init_from
        if start is not None and not start.startswith("open_clip:") and not Path(start).exists():
            self.problems.append(f"model.init_from {start}: there is no such folder; name a run, an export, a transformers CLIP, or open_clip:NAME/TAG")


def run_check(recipe: Recipe, world: int, memory_per_rank: int | None = None, recipe_file: str = "RECIPE") -> int:
    """Print the report on rank 0; the number of problems found. Reads footers and captions, builds the model, trains nothing."""
    if int(os.environ.get("RANK", "0")):
        return 0
    check = Check(recipe, world, memory_per_rank, recipe_file)
    for part in (check.data, check.model, check.disk, check.evaluation, check.remark):
        part()
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold]Resolved recipe[/bold]\n\n{escape(dump(recipe))}")
    for table in check.tables:
        console.print(table)
        console.print()
    for remark in check.remarks:
        console.print(f"[yellow]note[/yellow] {escape(redact_text(remark))}")
    for problem in check.problems:
        console.print(f"[red]problem[/red] {escape(redact_text(problem))}")
    if check.command:
        console.print(f"launch with: {escape(check.command)}\n")
    found = len(check.problems)
    console.print(f"{found or 'no'} problem{'' if found == 1 else 's'} found")
    return found
