"""From accelerate's configuration to a process group, and the refusal of what it may not decide.

Some launches silently come to fewer processes, to a model that is not wrapped, or to another strategy than they say; so the world is checked against the
launcher's promise, and what a yaml or json of accelerate or DeepSpeed says about precision, clipping, batches or schedule is an error: the recipe owns these.
"""

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import socket
import sysconfig
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from protoclip_scale.errors import NoGpus, UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

CONFIGS = "launch/accelerate/"
WATCHDOG_SECONDS = 60  # by which NCCL, whose watchdog ends a process without a word, is more patient than a rank's watch

# key of a DeepSpeed json -> key of the recipe that decides it, and the values that decide nothing
OWNED = {
    "gradient_clipping": ("optim.max_norm", (0, 0.0)),
    "gradient_accumulation_steps": ("optim.microbatch", (1, "auto")),
    "train_batch_size": ("data.plan.global_batch", ("auto",)),
    "train_micro_batch_size_per_gpu": ("data.plan.global_batch", ("auto",)),
    "optimizer": ("optim", ()),
    "scheduler": ("schedule", ()),
    "fp16.enabled": ("optim.precision", (False,)),
    "bf16.enabled": ("optim.precision", (False,)),
    "amp.enabled": ("optim.precision", (False,)),
    "torch_autocast.enabled": ("optim.precision", (False,)),
    "communication_data_type": ("optim.precision", ("fp32",)),
    "data_types.grad_accum_dtype": ("optim.precision", ("fp32",)),
}


def alone() -> bool:
    """Whether this is the only process: it can look at its data before accelerate is imported."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def _says(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"


def asks_for_deepspeed() -> bool:
    return _says("ACCELERATE_USE_DEEPSPEED")


def asks_for_fsdp() -> bool:
    return _says("ACCELERATE_USE_FSDP")


def refuse_foreign_settings() -> None:
    """UserError if accelerate's configuration sets what the recipe owns, or a way of launching that comes to something else."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "fp32"):
        raise UserError(f"mixed_precision is {asked} in accelerate's configuration, but the recipe's optim.precision owns it; set mixed_precision: 'no'")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise UserError(f"dynamo_backend is {backend} in accelerate's configuration, where it has no effect; set dynamo_backend: 'NO'")
    for variable, key in (("ACCELERATE_USE_MEGATRON_LM", "megatron_lm_config"), ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config")):
        if _says(variable):
            raise UserError(f"{key} is set in accelerate's configuration, which is not supported; launch with a file of {CONFIGS}")
    if asks_for_deepspeed():
        _refuse_for_deepspeed()
    if asks_for_fsdp():
        _refuse_for_fsdp()
    if not alone():
        _refuse_missing_gpus()


def _refuse_missing_gpus() -> None:
    """Several ranks are launched for GPUs unless the launch says otherwise: on processors they would train all the same, for months."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if torch.cuda.is_available() or chosen.startswith("-1") or _says("ACCELERATE_USE_CPU"):  # -1: the gpu_ids of our files for processors
        return
    if torch.version.cuda or torch.version.hip:
        given = f"CUDA_VISIBLE_DEVICES is {chosen!r}" if "CUDA_VISIBLE_DEVICES" in os.environ else "CUDA_VISIBLE_DEVICES is not set"
        why = f"its driver is too old for torch {torch.__version__}, the container was started without --nv, or the job was given none ({given})"
    else:
        why = f"torch {torch.__version__} is a build for processors alone"
    raise NoGpus(f"{socket.gethostname()} shows no GPU to ranks that are launched for GPUs: {why}; to train on processors launch with {CONFIGS}cpu.yaml or cpu_zero*.yaml")


def _refuse_for_deepspeed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"accelerate's configuration asks for DeepSpeed, which is not installed; pip install deepspeed, or launch with {CONFIGS}ddp.yaml")
    for variable, key, owner, allowed in (
        ("ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping", "optim.max_norm", ("none", "0", "0.0")),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", "optim.microbatch", ("1", "auto")),
    ):
        value = os.environ.get(variable)
        if value is not None and value not in allowed:
            raise UserError(f"{key} is {value} in accelerate's configuration, but the recipe's {owner} owns it; remove {key}")
    if _says("ACCELERATE_USE_CPU"):
        raise UserError(f"use_cpu is true in accelerate's configuration, with which it silently trains without DeepSpeed; remove it, or launch with {CONFIGS}cpu.yaml")
    if "CROSS_SIZE" in os.environ:  # DeepSpeed's own launcher, which without a hostfile starts on this machine alone and says so to nobody
        raise UserError("deepspeed_multinode_launcher is not 'standard' in accelerate's configuration; with several machines set deepspeed_multinode_launcher: standard")
    for what in ("OPTIMIZER", "PARAM"):
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE") == "nvme":
            raise UserError(f"offload_{what.lower()}_device is nvme in accelerate's configuration, which is not supported; set it to cpu or none")
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        _refuse_in_json(file)
    elif os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") not in ("1", "2", "3"):
        raise UserError(f"zero_stage is {os.environ['ACCELERATE_DEEPSPEED_ZERO_STAGE']} in accelerate's configuration; stages 1, 2 and 3 are known, for 0 launch with {CONFIGS}ddp.yaml")


def _refuse_in_json(file: str) -> None:
    try:
        with open(file, encoding="utf-8") as stream:
            settings = json.load(stream)
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed_config_file {file} in accelerate's configuration cannot be read ({error})") from None
    for key, (owner, allowed) in OWNED.items():
        value = _nested(settings, key)
        if value is not None and value not in allowed:
            raise UserError(f"{key} is {_short(value)} in {file}, but the recipe's {owner} owns it; remove {key}")
    for key in ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device"):
        if _nested(settings, key) == "nvme":
            raise UserError(f"{key} is nvme in {file}, which is not supported; set it to cpu or none")
    stage = _nested(settings, "zero_optimization.stage")
    if stage not in (1, 2, 3):
        raise UserError(f"zero_optimization.stage is {stage} in {file}; stages 1, 2 and 3 are known, for 0 launch with {CONFIGS}ddp.yaml")


def _nested(settings: dict[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _short(value: Any) -> str:
    return "set" if isinstance(value, dict) else str(value)


def _refuse_for_fsdp() -> None:
    if not torch.cuda.is_available():
        raise NoGpus(f"fsdp_config in accelerate's configuration needs GPUs, and this machine shows none; launch with {CONFIGS}cpu_zero3.yaml or cpu.yaml")
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("fsdp_version is 1 in accelerate's configuration; set fsdp_version: 2")
    if _says("FSDP_OFFLOAD_PARAMS"):
        raise UserError(f"fsdp_offload_params is true in accelerate's configuration, which is not supported; launch with {CONFIGS}zero3_offload.yaml")
    if _says("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError("fsdp_activation_checkpointing is true in accelerate's configuration, but the recipe's model.image.grad_checkpointing owns it; set it to false")


def start(timeout_minutes: float) -> "Accelerator":
    """The process group, on GPUs, or on CPUs over gloo where the launch says so or there is one process and no GPU.

    Raises:
        UserError: the launcher promised more processes than accelerate made, the configuration asks for what the recipe owns, DeepSpeed
            lacks what it needs, or this machine shows no GPU.
    """
    refuse_foreign_settings()
    from accelerate import Accelerator  # a second
    from accelerate.utils import InitProcessGroupKwargs

    on_cpu, deepspeed = not torch.cuda.is_available(), asks_for_deepspeed()
    options: dict[str, Any] = {"timeout": timedelta(minutes=timeout_minutes, seconds=0 if on_cpu else WATCHDOG_SECONDS)}
    if deepspeed:
        _import_deepspeed()
        if on_cpu:
            options["backend"] = "gloo"  # without it accelerate makes each process a world of its own
    # cpu=True would drop DeepSpeed, and without it several processes on CPUs are not joined
    with quiet_deepspeed() if deepspeed else contextlib.nullcontext():
        accelerator = Accelerator(cpu=on_cpu and not deepspeed, kwargs_handlers=[InitProcessGroupKwargs(**options)])
    promised = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != promised:
        raise UserError(f"the launcher promised {promised} ranks but {accelerator.num_processes} run; launch with --config_file {CONFIGS}cpu.yaml or ddp.yaml")
    if deepspeed:
        forget_deepspeed_in_transformers()
    return accelerator


def forget_deepspeed_in_transformers() -> None:
    """Under ZeRO-3 transformers cuts up a tower while it is built, with other initial weights than elsewhere; we hand over whole models."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _import_deepspeed() -> None:
    """With its loggers quiet, and without the collective that it would build with a compiler on CPUs: only its inference uses that one."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with quiet_deepspeed():
        import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def need_build_tools() -> None:
    """DeepSpeed builds its optimiser for CPU memory when that is first used. Puts the folder of this Python's programs on PATH, since ninja may be there."""
    folder = sysconfig.get_path("scripts")
    if not shutil.which("ninja") and shutil.which("ninja", path=folder):
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
    for tool, fix in (("ninja", "pip install ninja"), (os.environ.get("CXX", "c++"), "install g++ or set CXX")):
        if not shutil.which(tool):
            raise UserError(f"offload_optimizer_device cpu: DeepSpeed builds its optimiser with {tool}, which is not on PATH: {fix}, or launch with {CONFIGS}zero3.yaml")


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """The console is ours: nothing below a warning of DeepSpeed's."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)
        for name in ("DeepSpeed", "deepspeed"):
            logger = logging.getLogger(name)
            logger.setLevel(logging.WARNING)
