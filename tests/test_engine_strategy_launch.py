"""Accelerate's configurations: what ships is read by accelerate itself and comes to the strategy its name says; what the recipe owns is refused there."""

import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.torch_version import TorchVersion

from protoclip_scale.engine import command
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.strategy import launch
from protoclip_scale.engine.strategy.fsdp import FullySharded
from protoclip_scale.errors import NoGpus, UserError
from protoclip_scale.recipe.schema import Optim
from tests.support import ROOT, fsdp2_environment, zero_environment

CONFIGS = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
TYPES = {"single": "NO", "ddp": "MULTI_GPU", "cpu": "MULTI_GPU", "fsdp2": "FSDP"}  # others are DEEPSPEED


def launched(config: Path, *more: str) -> dict[str, str]:
    """What ``accelerate launch --config_file CONFIG`` sets in its processes, by accelerate's own code."""
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(config), "--main_process_port", "0", *more, "x.py"]))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, env = prepare_deepspeed_cmd_env(arguments)
    else:
        env = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in env.items() if os.environ.get(name) != value}


def accelerate_says(monkeypatch, **variables: str) -> None:
    for name in [each for each in os.environ if each.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def asks(monkeypatch, **variables: str) -> None:
    accelerate_says(monkeypatch, ACCELERATE_USE_DEEPSPEED="true", **variables)


def test_the_promised_configurations_ship():
    gpu, cpu = {"single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"}, {"cpu", "cpu_zero1", "cpu_zero2", "cpu_zero3"}
    assert {path.stem for path in CONFIGS} == gpu | cpu


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration(monkeypatch, config):
    assert config.read_text().startswith("# ")
    read = load_config_from_file(str(config))
    assert isinstance(read, ClusterConfig) and read.distributed_type == DistributedType(TYPES.get(config.stem, "DEEPSPEED"))
    if config.stem == "single":
        return
    accelerate_says(monkeypatch)
    env = launched(config)
    accelerate_says(monkeypatch, **env)
    if config.stem == "fsdp2":
        expected = fsdp2_environment(ranks=2)
        assert {name: env.get(name, "false").lower() for name in expected} == expected  # what tests on GPUs set themselves
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    strategies.refuse_foreign_settings()
    if read.distributed_type == DistributedType.DEEPSPEED:
        stage, offload = config.stem.removeprefix("cpu_")[4], "cpu" if config.stem.endswith("offload") else "none"
        assert (env["ACCELERATE_DEEPSPEED_ZERO_STAGE"], env["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"]) == (stage, offload)
        expected = zero_environment(int(stage), ranks=2) | ({} if config.stem.startswith("cpu") else {"CUDA_VISIBLE_DEVICES": "false"})
        assert {name: env.get(name, "false").lower() for name in expected} == expected  # what other tests of this suite set themselves


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_several_ranks_launched_for_gpus_do_not_train_on_processors(monkeypatch, config):
    """A driver that is too old, a container without --nv, a build of torch for processors: training would go on at a hundredth of the speed."""
    accelerate_says(monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if config.stem == "single":
        strategies.refuse_foreign_settings()
        return
    accelerate_says(monkeypatch, **launched(config))
    strategies.refuse_foreign_settings() if config.stem != "fsdp2" else None  # one process may train anywhere
    monkeypatch.setenv("WORLD_SIZE", "2")
    if config.stem.startswith("cpu"):
        strategies.refuse_foreign_settings()
        return
    said = "needs GPUs, and this machine shows none" if config.stem == "fsdp2" else f"{socket.gethostname()} shows no GPU to ranks that are launched for GPUs: .*; to train on"
    with pytest.raises(UserError, match=said):
        strategies.refuse_foreign_settings()


def test_a_host_without_its_gpus_says_so_itself(monkeypatch, capsys):
    """Other machines may have theirs, and wait for it: the first rank of each tells its own error, no other one does."""
    def refuse(*_: object) -> None:
        raise NoGpus("h1 shows no GPU")

    monkeypatch.setattr(command, "load_recipe", refuse)
    monkeypatch.setattr(command.time, "sleep", lambda seconds: None)
    for rank, local_rank, said in (("8", "0", "error: rank 8: h1 shows no GPU\n"), ("9", "1", "")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert command.main(["--recipe", "any.yaml"]) == 1 and capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0 in accelerate's configuration, but the recipe's optim.max_norm owns it"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4 in accelerate's configuration, but the recipe's optim.microbatch owns it"),
        ({"zero_stage": 0}, "zero_stage is 0 in accelerate's configuration"),
        ({"offload_optimizer_device": "nvme"}, "offload_optimizer_device is nvme in accelerate's configuration"),
    ],
)
def test_a_yaml_that_sets_what_the_recipe_owns_is_refused(monkeypatch, tmp_path, change, said):
    settings = yaml.safe_load((ROOT / "launch/accelerate/cpu_zero2.yaml").read_text())
    settings["deepspeed_config"] |= change
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(settings))
    accelerate_says(monkeypatch)
    accelerate_says(monkeypatch, **launched(tmp_path / "changed.yaml"))
    with pytest.raises(UserError, match=said):
        strategies.refuse_foreign_settings()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0 in .*, but the recipe's optim.max_norm owns it"),
        ({"gradient_clipping": "auto"}, "gradient_clipping is auto in .*, but the recipe's optim.max_norm owns it"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2 in .*, but the recipe's optim.microbatch owns it"),
        ({"train_batch_size": 64}, "train_batch_size is 64 in .*, but the recipe's data.plan.global_batch owns it"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer is set in .*, but the recipe's optim owns it"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is set in .*, but the recipe's schedule owns it"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True in .*, but the recipe's optim.precision owns it"),
        ({"fp16": {"enabled": "auto"}}, "fp16.enabled is auto in .*, but the recipe's optim.precision owns it"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled is True in .*, but the recipe's optim.precision owns it"),
        ({"communication_data_type": "bf16"}, "communication_data_type is bf16 in .*, but the recipe's optim.precision owns it"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0 in .*; stages 1, 2 and 3 are known"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "zero_optimization.offload_param.device is nvme in .*, which is not supported"),
    ],
)
def test_a_json_that_sets_what_the_recipe_owns_is_refused(monkeypatch, tmp_path, settings, said):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | settings))
    asks(monkeypatch, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file))
    with pytest.raises(UserError, match=said):
        strategies.refuse_foreign_settings()


def test_a_json_of_the_strategy_alone_is_taken(monkeypatch, tmp_path):
    file = tmp_path / "deepspeed.json"
    own = {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True}
    file.write_text(json.dumps({"zero_optimization": own, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 1, "fp16": {"enabled": False}}))
    asks(monkeypatch, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file))
    strategies.refuse_foreign_settings()
    file.write_text("{")
    with pytest.raises(UserError, match="deepspeed_config_file .* cannot be read"):
        strategies.refuse_foreign_settings()


def test_launches_that_come_to_something_else_are_refused(monkeypatch):
    accelerate_says(monkeypatch, ACCELERATE_MIXED_PRECISION="bf16")
    with pytest.raises(UserError, match="mixed_precision is bf16 in accelerate's configuration, but the recipe's optim.precision owns it"):
        strategies.refuse_foreign_settings()
    asks(monkeypatch, CROSS_SIZE="1")  # DeepSpeed's own launcher sets it
    with pytest.raises(UserError, match="set deepspeed_multinode_launcher: standard"):
        strategies.refuse_foreign_settings()
    monkeypatch.delenv("CROSS_SIZE")
    asks(monkeypatch, ACCELERATE_USE_CPU="true")
    with pytest.raises(UserError, match="use_cpu is true in accelerate's configuration, with which it silently trains without DeepSpeed"):
        strategies.refuse_foreign_settings()
    accelerate_says(monkeypatch, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="fsdp_config in accelerate's configuration needs GPUs"):
            strategies.refuse_foreign_settings()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    strategies.refuse_foreign_settings()
    for variable, value, said in (
        ("FSDP_VERSION", "1", "set fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params is true"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing is true in accelerate's configuration, but the recipe's"),
    ):
        accelerate_says(monkeypatch, **{"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", variable: value})
        with pytest.raises(UserError, match=said):
            strategies.refuse_foreign_settings()


def test_without_deepspeed_one_line_says_so(monkeypatch):
    asks(monkeypatch)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="DeepSpeed, which is not installed; pip install deepspeed, or launch with launch/accelerate/ddp.yaml"):
        strategies.refuse_foreign_settings()


def test_build_tools_are_found_or_asked_for(monkeypatch, tmp_path):
    scripts, tools = tmp_path / "scripts", tmp_path / "tools"
    for folder, name in ((scripts, "ninja"), (tools, "c++")):
        folder.mkdir()
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(launch.sysconfig, "get_path", lambda name: str(scripts))
    monkeypatch.setenv("PATH", str(tools))
    launch.need_build_tools()
    assert shutil.which("ninja") == str(scripts / "ninja")  # this Python's own, though its folder was not on PATH
    monkeypatch.setenv("PATH", str(scripts))
    with pytest.raises(UserError, match="builds its optimiser with c[+][+], which is not on PATH: install g[+][+] or set CXX"):
        launch.need_build_tools()
    (scripts / "ninja").unlink()
    with pytest.raises(UserError, match="builds its optimiser with ninja, which is not on PATH: pip install ninja"):
        launch.need_build_tools()


def test_microbatches_under_an_fsdp2_that_was_never_tried_with_them_are_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    strategy = FullySharded(SimpleNamespace(device=torch.device("cpu")), None)
    with pytest.raises(UserError, match="optim.microbatch 64 under FSDP2 needs torch 2.15, this is 2.11.0[+]cu130; set it to null, or launch with launch/accelerate/zero3.yaml"):
        strategy.prepare(None, [], Optim(lr=1e-3, microbatch=64))
