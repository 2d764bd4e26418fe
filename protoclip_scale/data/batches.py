"""Batches of an episode: decoded, augmented, tokenised; equal for any number of workers and ranks.

A place whose row cannot be used is filled by another row of the same lane and episode; everything else stays where the plan put it.
"""

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from protoclip_scale.data.captions import choose_caption
from protoclip_scale.data.decode import BadImage, Limits, decode_image
from protoclip_scale.data.plan import EpisodePlan
from protoclip_scale.data.randomness import generator, permutation
from protoclip_scale.data.spool import Spool, SpooledLane
from protoclip_scale.data.transforms import augment
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

logger = logging.getLogger(__name__)
AUGMENTATION_OF_PURPOSE = {"train": lambda data: data.augmentation, "extract": lambda data: "none"}


@dataclass
class Batch:
    """A rank's part of a global batch, B = per_lane x own lanes rows, lane after lane."""

    step: int
    images: torch.Tensor  # uint8 [B, 3, S, S]
    token_ids: torch.Tensor  # int64 [B, C]
    token_lengths: torch.Tensor  # int64 [B], the end token stands at length - 1
    positions: torch.Tensor  # int64 [B], place in the episode: lane x lane_rows + slot
    row_ids: torch.Tensor  # int64 [B], the rows really used
    slots: torch.Tensor  # int64 [B], place in the lane
    replaced: list[tuple[int, str]] = field(default_factory=list)  # (row id, reason) of rows that could not be used

    def pin_memory(self) -> "Batch":
        """For faster copies to a GPU."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.pin_memory())
        return self


class EpisodeBatches(Dataset):
    """``batches[step]``: a pure function of the step, the plan, the rows and the seed.

    ``purpose``: train (``data.augmentation``) or extract (the evaluation transform); both use the same captions and the same substitutes, so that
    features and labels of a position belong to what is trained there.
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
    ):
        self.data = data
        self.image_size = image_size
        self.tokenizer = tokenizer
        self.episode_plan = episode_plan
        self.spool = spool
        self.lanes = list(lanes)
        self.seed = seed
        self.limits = Limits(data.max_pixels, data.max_bytes)
        self.augmentation = AUGMENTATION_OF_PURPOSE[purpose](data)
        self._spooled: dict[int, SpooledLane] = {}
        self._occurs_once: np.ndarray | None = None

    def __getstate__(self):
        return {**self.__dict__, "_spooled": {}, "_occurs_once": None}

    def __len__(self) -> int:
        return self.episode_plan.num_steps

    def __getitem__(self, step: int) -> Batch:
        slots = self.episode_plan.slots(step)
        images = torch.empty((len(self.lanes) * len(slots), 3, self.image_size, self.image_size), dtype=torch.uint8)
        row_ids, captions, replaced = np.empty(len(images), dtype=np.int64), [], []
        for lane in self.lanes:
            taken: set[int] = set()  # slots of substitutes in this batch; those of other lanes cannot be the same row
            for slot in slots:
                place = len(captions)
                try:
                    source_slot, (image, caption) = slot, self._load(lane, slot)
                except BadImage as error:
                    replaced.append((int(self.episode_plan.row_ids[lane, slot]), str(error)))
                    source_slot, (image, caption) = self._substitute(lane, slot, taken, str(error))
                images[place] = image
                row_ids[place] = self.episode_plan.row_ids[lane, source_slot]
                captions.append(caption)
        tokens = self.tokenizer(captions)
        positions = np.concatenate([lane * self.episode_plan.lane_rows + slots for lane in self.lanes])
        return Batch(
            step,
            images,
            tokens.ids,
            tokens.lengths,
            torch.from_numpy(positions),
            torch.from_numpy(row_ids),
            torch.from_numpy(np.tile(slots, len(self.lanes))),
            replaced,
        )

    def _load(self, lane: int, slot: int) -> tuple[torch.Tensor, str]:
        """(augmented image, caption) of the row at a slot; BadImage if it cannot be used."""
        if lane not in self._spooled:
            self._spooled[lane] = self.spool.open(self.episode_plan.number, lane)
        data, captions = self._spooled[lane].row(int(self.episode_plan.slot_to_read[lane, slot]))
        epoch, row_id = int(self.episode_plan.epochs[lane, slot]), int(self.episode_plan.row_ids[lane, slot])
        caption = choose_caption(captions, self.data.caption, generator(self.seed, "caption", epoch, row_id, 0))
        if not caption and self.data.empty_caption == "drop":
            raise BadImage("empty caption")
        image = decode_image(data, self.limits)
        return augment(self.augmentation)(image, self.image_size, generator(self.seed, "augmentation", epoch, row_id, 0)), caption

    def _substitute(self, lane: int, slot: int, taken: set[int], reason: str) -> tuple[int, tuple[torch.Tensor, str]]:
        """(slot, what was loaded) of the first usable row of the lane in an order f(seed, row id), outside this batch and once in the episode."""
        plan = self.episode_plan
        if self._occurs_once is None:
            self._occurs_once = plan.occurs_once()
        row_id = int(plan.row_ids[lane, slot])
        for candidate in permutation(plan.lane_rows, self.seed, "substitute", row_id).tolist():
            if candidate // plan.per_lane == slot // plan.per_lane or candidate in taken or not self._occurs_once[lane, candidate]:
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


class _ErrorsAsValues(Dataset):
    """Hands a UserError over as a value: raised in a worker, its one line would come back inside a traceback."""

    def __init__(self, batches: EpisodeBatches):
        self.batches = batches

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self.batches[step]
        except UserError as error:
            return error


def _leave_with_parent(worker: int) -> None:
    """Ends a worker when the training process is gone. torch watches the parent, which for a forked-from-server worker is the server, and the
    server lives as long as its workers: after a SIGKILL of the training process all of them would stay for ever."""

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
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__, *batches.tokenizer.modules])  # imported once, not in every worker
        loader = DataLoader(
            _ErrorsAsValues(batches),
            batch_size=None,
            sampler=range(first_step, len(batches)),
            num_workers=workers,
            multiprocessing_context=context,
            pin_memory=pin_memory,
            worker_init_fn=_leave_with_parent,
            generator=torch.Generator(),  # else the loader draws from, and so moves, the global generator
        )
        try:
            for value in loader:
                if isinstance(value, UserError):
                    raise value
                yield value
                step += 1
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            logger.warning("a loader process died; the batches from step %d on are made in the training process", step)
    while step < len(batches):
        batch = batches[step]
        yield batch.pin_memory() if pin_memory else batch
        step += 1
