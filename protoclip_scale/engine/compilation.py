"""torch.compile block by block (``optim.compile_blocks``): each repeated block of the towers is compiled where it stands, so no name, state dict, checkpoint or export changes.

Equal blocks share a graph. Text blocks are compiled for any number of rows and tokens, since captions are trimmed; image blocks for the shapes they see. What evaluates
runs as it is: see ``Strategy.evaluating``.
"""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import nn

from protoclip_scale.errors import UserError
from protoclip_scale.models.batch_norm import GroupBatchNorm
from protoclip_scale.models.blocks import blocks
from protoclip_scale.models.dual_encoder import DualEncoder

ANY_LENGTH = {"image_tower": None, "text_tower": True}  # torch.compile's ``dynamic``


def compile_blocks(model: DualEncoder, device: torch.device) -> None:
    """Compile a model's blocks in place, at their first call. Blocks with batch norm stay as they are: it talks to other ranks in the middle of them.

    Raises UserError if this machine lacks what compilation needs, or the model has no block that can be compiled.
    """
    chosen = need_compilable_blocks(model)
    need_compilers(device)
    for part, block in chosen:
        block.compile(dynamic=ANY_LENGTH[part])
    model.compiled = True


def need_compilable_blocks(model: DualEncoder) -> list[tuple[str, nn.Module]]:
    """The part and the block, for all blocks without batch norm; UserError if there are none."""
    found = [(part, block) for part in ANY_LENGTH for block in blocks(getattr(model, part))]
    chosen = [(part, block) for part, block in found if not any(isinstance(layer, GroupBatchNorm) for layer in block.modules())]
    if not chosen:
        raise UserError(
            "optim.compile_blocks true has no effect: all repeated blocks of these towers have batch norm, which is not compiled, or there are none; set it to false, or choose a transformer"
        )
    return chosen


def need_compilers(device: torch.device) -> None:
    """UserError if inductor could not build its kernels here."""
    on_gpu = device.type == "cuda"
    compilers = [os.environ[name]] if (name := "CC" if on_gpu else "CXX") in os.environ else ["gcc", "clang"] if on_gpu else ["g++"]
    missing = None
    if on_gpu and importlib.util.find_spec("triton") is None:
        missing = "Triton, which is not installed: pip install triton"
    elif not any(shutil.which(compiler) for compiler in compilers):
        missing = f"a compiler, and {' and '.join(compilers)} are not on PATH: install one, or set {name}" if len(compilers) > 1 else f"{compilers[0]}, which is not on PATH: install it, or set {name}"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing = "Python.h, which this Python came without: install its headers (python3-dev)"
    if missing:
        raise UserError(f"optim.compile_blocks true needs {missing}; or set it to false")


def num_graphs() -> int:
    """Graphs compiled in this process so far; a number that goes on growing tells of recompilations."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
