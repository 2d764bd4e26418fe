"""Batches of an episode: decoded, augmented, tokenised; equal for any number of workers and ranks.

A place whose row cannot be used is filled by another row of the same lane and episode; everything else stays where the plan put it.
"""

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from protoclip_scale.data import loader_server
from protoclip_scale.data.decode import BadImage
from protoclip_scale.data.plan import EpisodePlan
from protoclip_scale.data.randomness import permutation
from protoclip_scale.data.spool import Spool, SpooledLane
from protoclip_scale.data.tokenizers import Tokens
from protoclip_scale.data.views import MAIN, MaskedTokens, RowViews, Viewer, Views, Visit
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

logger = logging.getLogger(__name__)
DYING_SECONDS = 5.0  # from the end of a worker's connections to its own
AUGMENTATIONS_OF_PURPOSE = {"train": lambda data: (data.augmentation, data.text_augmentation), "extract": lambda data: ("none", "none")}


@dataclass
class Batch:
    """A rank's part of a global batch, B = per_lane x own lanes rows, lane after lane."""

    step: int
    images: torch.Tensor  # uint8 [B, 3, S, S], channels last in memory
    token_ids: torch.Tensor  # int64 [B, C]
    token_lengths: torch.Tensor  # int64 [B], the end token stands at length - 1
    positions: torch.Tensor  # int64 [B], place in the episode: lane x lane_rows + slot
    row_ids: torch.Tensor  # int64 [B], the rows really used
    slots: torch.Tensor  # int64 [B], place in the lane
    replaced: list[tuple[int, str]] = field(default_factory=list)  # (row id, reason) of rows that could not be used
    image_views: dict[str, torch.Tensor] = field(default_factory=dict)  # further views by name, like images
    text_views: dict[str, Tokens] = field(default_factory=dict)  # further texts by name
    masked_views: dict[str, MaskedTokens] = field(default_factory=dict)  # the main text, masked, by name
    extra: dict[str, list] = field(default_factory=dict)  # columns.extra of the sources, by name

    def inputs(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """What towers take, by side and view: ``image``, (images,); ``text@VIEW``, (ids, lengths), and labels if it is masked."""
        inputs = {"image": (self.images,), "text": (self.token_ids, self.token_lengths)}
        inputs |= {f"image@{name}": (images,) for name, images in self.image_views.items()}
        inputs |= {f"text@{name}": (tokens.ids, tokens.lengths) for name, tokens in self.text_views.items()}
        return inputs | {f"text@{name}": (tokens.ids, self.token_lengths, tokens.labels) for name, tokens in self.masked_views.items()}

    def pin_memory(self) -> "Batch":
        """For faster copies to a GPU."""
        for name, value in vars(self).items():
            setattr(self, name, _pinned(value))
        return self


def _pinned(value):
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if isinstance(value, (Tokens, MaskedTokens)):
        return type(value)(*map(_pinned, value))
    return {name: _pinned(each) for name, each in value.items()} if isinstance(value, dict) else value


class EpisodeBatches(Dataset):
    """``batches[step]``: a pure function of the step, the plan, the rows and the seed.

    ``purpose``: train (``data.augmentation``) or extract (the evaluation transform); both use the same captions and the same substitutes, so that
    features and labels of a position belong to what is trained there. ``views``: what to make beside the main image and text.
    """

    def __init__(
        self,
        data: schema.Data,
        image_size: int,
        tokenizer,
        episode_plan: EpisodePlan,
        spool: Spool,
        lanes: Sequence[int],
        purpose: str = "train",
        seed: int = 0,
        views: Views = Views(),  # noqa: B008 (never changed)
    ):
        self.data = data
        self.image_size = image_size
        self.tokenizer = tokenizer
        self.episode_plan = episode_plan
        self.spool = spool
        self.lanes = list(lanes)
        self.seed = seed
        self.viewer = Viewer(data, image_size, seed, *AUGMENTATIONS_OF_PURPOSE[purpose](data), views)
        self._spooled: dict[int, SpooledLane] = {}
        self._other_places: np.ndarray | None = None

    def __getstate__(self):
        return {**self.__dict__, "_spooled": {}, "_other_places": None}

    def __len__(self) -> int:
        return self.episode_plan.num_steps

    def __getitem__(self, step: int) -> Batch:
        slots = self.episode_plan.slots(step)
        num_rows = len(self.lanes) * len(slots)
        shape = num_rows, 3, self.image_size, self.image_size
        images = {name: torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last) for name in self.viewer.images}
        texts: dict[str, list[str]] = {name: [] for name in self.viewer.texts}
        visits, extra, replaced = [], [], []
        for lane in self.lanes:
            taken: set[int] = set()  # slots of substitutes in this batch; those of other lanes cannot be the same row
            for slot in slots.tolist():
                source_slot, reason = slot, None
                try:
                    views = self._load(lane, slot)
                except BadImage as error:
                    reason = str(error)
                    source_slot, views = self._substitute(lane, slot, taken, reason)
                    replaced.append((int(self.episode_plan.row_ids[lane, slot]), reason))
                for name, image in views.images.items():
                    images[name][len(visits)] = image
                for name, text in views.texts.items():
                    texts[name].append(text)
                visits.append(self._visit(lane, source_slot))
                extra.append(self._extra(lane, source_slot))
        tokens = {name: self.tokenizer(each) for name, each in texts.items()}
        positions = np.concatenate([lane * self.episode_plan.lane_rows + slots for lane in self.lanes])
        return Batch(
            step=step,
            images=images.pop(MAIN),
            token_ids=tokens[MAIN].ids,
            token_lengths=tokens[MAIN].lengths,
            positions=torch.from_numpy(positions),
            row_ids=torch.tensor([visit.row_id for visit in visits], dtype=torch.int64),
            slots=torch.from_numpy(np.tile(slots, len(self.lanes))),
            replaced=replaced,
            image_views=images,
            masked_views=self.viewer.mask(tokens.pop(MAIN), self.tokenizer, visits),
            text_views=tokens,
            extra={name: [row[name] for row in extra] for name in extra[0]},
        )

    def _visit(self, lane: int, slot: int) -> Visit:
        return Visit(int(self.episode_plan.epochs[lane, slot]), int(self.episode_plan.row_ids[lane, slot]))

    def _spooled_lane(self, lane: int) -> SpooledLane:
        if lane not in self._spooled:
            self._spooled[lane] = self.spool.open(self.episode_plan.number, lane)
        return self._spooled[lane]

    def _extra(self, lane: int, slot: int) -> dict:
        return self._spooled_lane(lane).extra(int(self.episode_plan.slot_to_read[lane, slot]))

    def _load(self, lane: int, slot: int) -> RowViews:
        """The views of the row at a slot; BadImage if it cannot be used."""
        encoded, captions = self._spooled_lane(lane).row(int(self.episode_plan.slot_to_read[lane, slot]))
        visit = self._visit(lane, slot)
        caption = self.viewer.caption(captions, visit)
        if not caption and self.data.empty_caption == "drop":
            raise BadImage("empty caption")
        return self.viewer.load(encoded, caption, visit)

    def _substitute(self, lane: int, slot: int, taken: set[int], reason: str) -> tuple[int, RowViews]:
        """(slot, its views) of the first usable row among the candidates."""
        plan = self.episode_plan
        row_id = int(plan.row_ids[lane, slot])
        for candidate in self._candidates(lane, slot):
            if candidate in taken:
                continue
            try:
                loaded = self._load(lane, candidate)
            except BadImage:
                continue
            taken.add(candidate)
            return candidate, loaded
        raise UserError(
            f"lane {lane} of episode {plan.number} holds no usable row that could stand for row {row_id} ({reason}); check the images and captions of data.sources"
        )

    def _candidates(self, lane: int, slot: int) -> list[int]:
        """Slots of the lane whose rows may stand in a batch for the row at ``slot``, in an order f(seed, row id): rows outside the batch.

        Last come rows that have a second place in the episode. That must be outside the batch too, and only one of the two places lends the row to a
        batch (which of them changes with the step), so that two lanes never choose the same row.
        """
        plan, step = self.episode_plan, slot // self.episode_plan.per_lane
        if self._other_places is None:
            self._other_places = plan.other_places()
        order = permutation(plan.lane_rows, self.seed, "substitute", int(plan.row_ids[lane, slot]))
        order = order[order // plan.per_lane != step]
        other = self._other_places[lane, order]
        is_first = lane * plan.lane_rows + order < other
        lends = is_first == ((plan.row_ids[lane, order] + step) % 2 == 0)
        twice = (other >= 0) & (other % plan.lane_rows // plan.per_lane != step) & lends
        return np.concatenate([order[other < 0], order[twice]]).tolist()


class _ErrorsAsValues(Dataset):
    """Hands a UserError over as a value: raised in a worker, its one line would come back inside a traceback."""

    def __init__(self, batches: EpisodeBatches):
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self.batches[step]
        except UserError as error:
            return error


def _begin_worker(worker: int) -> None:
    """Lets a signal end a worker, and the end of the training process. torch watches the parent, which for a forked-from-server worker is the server,
    and the server lives as long as its workers: after a SIGKILL of the training process all of them would stay for ever."""
    loader_server.within_reach()

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_loader(batches: EpisodeBatches, first_step: int = 0, workers: int = 0, pin_memory: bool = False) -> Iterator[Batch]:
    """Yields the batches of steps first_step, first_step + 1, ... to the end of the episode, made ahead by ``workers`` processes.

    Workers are forked from a clean server process, since this one may have threads and a process group; scripts need the usual ``__main__`` guard.
    A worker that dies (a signal to the whole process group, out of memory) costs time only: the remaining batches are made here.
    """
    step = first_step
    if workers:
        loader = DataLoader(
            _ErrorsAsValues(batches),
            batch_size=None,
            sampler=range(first_step, len(batches)),
            num_workers=workers,
            multiprocessing_context=loader_server.context(batches.tokenizer.modules),
            pin_memory=pin_memory,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else the loader draws from, and so moves, the global generator
        )
        with loader_server.out_of_reach():
            values = iter(loader)
        try:
            for value in values:
                if isinstance(value, UserError):
                    raise value
                yield value
                step += 1
        except (RuntimeError, EOFError, OSError) as error:
            # A batch's memory is asked of the worker that made it; torch may find that one alive while it dies.
            told = isinstance(error, RuntimeError) and "exited unexpectedly" in str(error)
            if not told and (isinstance(error, RuntimeError) or not connection.wait([worker.sentinel for worker in values._workers], DYING_SECONDS)):
                raise
            logger.warning("a loader process died; the batches from step %d on are made in the training process", step)
    while step < len(batches):
        batch = batches[step]
        yield batch.pin_memory() if pin_memory else batch
        step += 1
