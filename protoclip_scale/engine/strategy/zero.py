"""ZeRO stages 1, 2 and 3: DeepSpeed's engine, in its fp32 mode, with our state and our settings.

DeepSpeed clips, steps and skips in one call, and the same one on all ranks: a norm that is not finite skips the step. Stage 1 shares out AdamW's moments and
the weights that it steps on, stage 2 the gradients too, stage 3 (experimental) also the weights the towers run with, which hooks put together module by module.
"""

import contextlib
import copy
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import groups as process_groups
from deepspeed.utils import safe_get_full_grad
from torch import nn
from torch.distributed import distributed_c10d

from protoclip_scale import collectives
from protoclip_scale.engine.checkpoint.pieces import Piece, replicated_pieces, replicated_views
from protoclip_scale.engine.optimizer import Groups, adamw_settings
from protoclip_scale.engine.strategy.base import MOMENTS, Held, Strategy, Update, spoilt_if_not_finite
from protoclip_scale.engine.strategy.launch import forget_deepspeed_in_transformers, need_build_tools, quiet_deepspeed
from protoclip_scale.engine.strategy.memory import BUCKET_ELEMENTS
from protoclip_scale.recipe.schema import Optim

if TYPE_CHECKING:
    from protoclip_scale.engine.checkpoint.reading import Reader


class Fragment(NamedTuple):
    """Values [start, start + numel) of a flattened parameter: on this rank they stand at ``offset`` in ``flat``, a tensor of the inner AdamW. ``numel`` may be 0."""

    name: str
    start: int
    numel: int
    flat: torch.Tensor
    offset: int

    def within(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.detach().narrow(0, self.offset, self.numel)


class Zero(Strategy):
    """A model and AdamW in a DeepSpeed engine; the stage and offloading are those of accelerate's configuration."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.config = copy.deepcopy(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        self.zero = self.config["zero_optimization"]
        self.stage = int(self.zero["stage"])
        self.whole = self.compiles = self.stage < 3
        self.engine: deepspeed.DeepSpeedEngine | None = None
        forget_deepspeed_in_transformers()

    def _offloads(self, what: str) -> bool:
        return (self.zero.get(f"offload_{what}") or {}).get("device", "none") not in ("none", None)

    @property
    def title(self) -> str:
        offloaded = [text for what, text in (("optimizer", "optimiser"), ("param", "weights")) if self._offloads(what)]
        return f"ZeRO-{self.stage}" + (f", {' and '.join(offloaded)} in CPU memory" if offloaded else "")

    def prepare(self, model: nn.Module, groups: Groups, settings: Optim) -> None:
        self.bare_model = model
        model.compute_dtype = self.precision.dtype
        config = self._settings(settings)
        if not self.whole:
            _cut_up(model, config, self.device)
        if self._offloads("optimizer"):
            need_build_tools()
            inner = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **adamw_settings(settings), adamw_mode=True)
        else:
            inner = torch.optim.AdamW(groups, **adamw_settings(settings), fused=True)
        self.names = [group["names"] for group in groups]
        with quiet_deepspeed():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=inner, config=config)
        # DeepSpeed's own group would wait as long as torch's default says
        set_timeout = getattr(distributed_c10d, "set_timeout", distributed_c10d._set_pg_timeout)  # public since torch 2.15
        set_timeout(self.accelerator.init_handler.timeout, process_groups._get_data_parallel_group())
        self._announce_scale()

    def _settings(self, settings: Optim) -> dict[str, Any]:
        """The engine's configuration: accelerate's strategy, our precision, clipping and batches."""
        own = copy.deepcopy(self.config)
        zero = own["zero_optimization"]
        trained = sum(parameter.numel() for parameter in self.bare_model.parameters() if parameter.requires_grad)
        for key in ("reduce_bucket_size", "allgather_bucket_size"):
            zero.setdefault(key, min(BUCKET_ELEMENTS, trained + trained % 2))  # DeepSpeed asserts that it is even
        if self.stage == 3:
            zero.setdefault("stage3_max_reuse_distance", BUCKET_ELEMENTS)  # DeepSpeed's would keep a model of 500,000,000 weights whole
        return own | {
            "zero_allow_untested_optimizer": True,
            "train_batch_size": collectives.world_size(),  # must be given, and decide nothing: losses are means already
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": settings.max_norm or 0.0,
            "fp16": {"enabled": False},
            "bf16": {"enabled": False},
        }

    def release(self) -> None:
        super().release()
        if self.engine:
            with quiet_deepspeed():
                self.engine.destroy()
            self.engine = None
            parameter_offload.FWD_MODULE_STACK.clear()  # DeepSpeed never takes a model off it
            gc.collect()

    def num_parameters(self) -> int:
        return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.bare_model.parameters())

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self.engine(*inputs, **options)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(spoilt_if_not_finite(loss))

    def _announce_scale(self) -> None:
        if self.precision.scale:
            with quiet_deepspeed():
                self.optimizer.override_loss_scale(self.precision.scale.value)

    def update(self, stop: bool = False) -> Update:
        """DeepSpeed's norm costs one small reduction per group besides."""
        self.engine.step()
        taken = self.engine.was_step_applied()
        if self.precision.scale:
            self.precision.scale.update(overflowed=not taken)
            self._announce_scale()
        return Update(float(self.engine.get_global_grad_norm()), taken, collectives.any_rank(stop))

    def gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for name, parameter in self.bare_model.named_parameters():
            yield name, safe_get_full_grad(parameter) if parameter.requires_grad else None

    def full_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        parameters = dict(self.bare_model.named_parameters())
        for name, tensor in self.bare_model.state_dict().items():
            if self.whole or name not in parameters:
                yield name, tensor
                continue
            with deepspeed.zero.GatheredParameters([parameters[name]]):
                gathered = parameters[name].detach().clone()
            yield name, gathered

    def _fragments(self) -> Iterator[Fragment]:
        """This rank's fragment of every parameter that trains; by DeepSpeed's own maps of them."""
        for number, names in enumerate(self.names):
            for name in names:
                parameter = self.bare_model.get_parameter(name)
                if self.stage == 3:
                    group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
                    yield Fragment(name, *_range_of_rank(parameter), self.optimizer.fp32_partitioned_groups_flat[group], offset)
                    continue
                flat = self.optimizer.param_groups[number]["params"][0]
                mapping = parameter._hp_mapping
                if mapping is None:
                    yield Fragment(name, 0, 0, flat, 0)
                else:
                    address = mapping.lp_fragment_address
                    yield Fragment(name, address.start, address.numel, flat, mapping.get_hp_fragment_address().start)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in self.bare_model.named_parameters()}

    def weight_pieces(self) -> Iterator[Piece]:
        replicated, trained, shapes = {}, set(), self._shapes()
        for fragment in self._fragments():
            trained.add(fragment.name)
            if fragment.numel:
                yield Piece(f"model/{fragment.name}", fragment.start, fragment.within(fragment.flat), shapes[fragment.name])
        for name, held in self._held().items():
            if name in trained:
                continue
            if not held.part:
                replicated[f"model/{name}"] = held.values
            elif held.values.numel():
                yield Piece(f"model/{name}", _range_of_rank(self.bare_model.get_parameter(name))[0], held.values, shapes[name])
        yield from replicated_views(replicated)

    def optimizer_pieces(self) -> Iterator[Piece]:
        replicated, shapes = {}, self._shapes()
        for fragment in self._fragments():
            state = self.optimizer.state.get(fragment.flat, {})
            if state:
                replicated[f"optimizer/{fragment.name}/step"] = torch.as_tensor(float(state["step"]))
            if state and fragment.numel:
                for moment in MOMENTS:
                    yield Piece(f"optimizer/{fragment.name}/{moment}", fragment.start, fragment.within(state[moment]), shapes[fragment.name])
        yield from replicated_pieces(replicated)

    def _held(self) -> dict[str, Held]:
        if self.whole:
            return super()._held()
        parameters, held = dict(self.bare_model.named_parameters()), {}
        for name, tensor in self.bare_model.state_dict().items():
            if name in parameters:
                held[name] = Held(parameters[name].ds_tensor.detach().narrow(0, 0, _range_of_rank(parameters[name])[1]), part=True)
            else:
                held[name] = Held(tensor, part=False)
        return held

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Stage 3 keeps small weights together between passes: they are let go of, and put together anew."""
        if self.whole:
            yield
            return
        self.optimizer.checkpoint_event_prologue()
        yield
        self.optimizer.checkpoint_event_epilogue()

    def load(self, reader: "Reader") -> None:
        by_flat: dict[torch.Tensor, list[Fragment]] = {}
        for fragment in self._fragments():
            by_flat.setdefault(fragment.flat, []).append(fragment)
        for flat, fragments in by_flat.items():
            steps = {fragment.name: reader.tensor(key).item() for fragment in fragments if (key := f"optimizer/{fragment.name}/step") in reader}
            if not steps:
                continue
            assert len(steps) == len(fragments) and len(set(steps.values())) == 1, f"parameters of one group have taken different numbers of steps: {steps}"
            step = next(iter(steps.values()))
            state = {moment: torch.zeros_like(flat.detach()) for moment in MOMENTS}
            for fragment in fragments:
                for moment in MOMENTS:
                    values = reader.slice(f"optimizer/{fragment.name}/{moment}", fragment.start, fragment.start + fragment.numel)
                    fragment.within(state[moment]).copy_(values)
            # AdamW makes no state of its own where it finds one; DeepSpeed's counts in an int
            state["step"] = int(step) if self._offloads("optimizer") else torch.tensor(step, dtype=torch.float32, device=flat.device)
            self.optimizer.state[flat] = state


def _cut_up(model: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Take a model from the CPU to the device one weight after the other, of each of which a rank keeps its part; DeepSpeed's engine would take all of it there first."""
    with quiet_deepspeed():
        deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=torch.float32)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _range_of_rank(parameter: torch.Tensor) -> tuple[int, int]:
    """First value and number of values of a stage 3 parameter on this rank: its padded, flattened tensor is cut evenly."""
    part = parameter.partition_numel()
    start = min(collectives.rank() * part, parameter.ds_numel)
    return start, min(part, parameter.ds_numel - start)
