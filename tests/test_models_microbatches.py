"""Towers in micro-batches: the same gradients with the same dropout masks, activations of one micro-batch at a time, statistics that move once."""

import functools

import pytest
import torch

from protoclip_scale.engine.microbatches import refuse_batch_norm
from protoclip_scale.errors import UserError
from protoclip_scale.models import microbatches
from protoclip_scale.models.dual_encoder import FEATURES, DualEncoder
from protoclip_scale.models.image import ImageTower
from protoclip_scale.models.microbatches import in_microbatches, num_microbatches
from protoclip_scale.models.text import TextTower
from protoclip_scale.objectives.clip import clip_loss
from protoclip_scale.recipe import load_recipe, schema
from tests.support import RECIPES

ROWS, SIZE, DROPOUT = 20, 7, 0.3
CLIP = frozenset({"image", "text", "logit_scale"})
TEXT = {"width": 32, "heads": 2, "layers": 2, "context_length": 12}


def build(image: str = "test_vit", features: frozenset[str] = CLIP, dropout: float = DROPOUT, checkpointing: bool = False) -> DualEncoder:
    """Small towers in fp64 with dropout in both, which recipes have not."""
    torch.manual_seed(0)
    settings = schema.Model(
        embed_dim=16,
        image={"name": image, "size": 32, "grad_checkpointing": checkpointing},
        text=TEXT | {"grad_checkpointing": checkpointing},
        prototype_heads={"dim": 8, "hidden_dim": 24},
    )
    model = DualEncoder(settings, features).double().train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = dropout
        if hasattr(layer, "out_proj") and isinstance(getattr(layer, "dropout", None), float):
            layer.dropout = dropout
    return model


def batch(rows: int = ROWS) -> tuple[torch.Tensor, ...]:
    draws = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (rows, 3, 32, 32), generator=draws, dtype=torch.uint8)
    return images, torch.randint(1, 49_000, (rows, 12), generator=draws), torch.randint(3, 13, (rows,), generator=draws)


def loss_of(features: dict[str, torch.Tensor]) -> torch.Tensor:
    image, text = features["image"], features["text"]
    return clip_loss(image, text, image, text, features["logit_scale"], torch.arange(len(image)))


def gradients(model: DualEncoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def ours(microbatch: int | None, **options) -> dict[str, torch.Tensor]:
    model = build(**options)
    torch.manual_seed(5)
    return gradients(model, loss_of(model(*batch(), wants=CLIP, microbatch=microbatch)))


def slow_twin(size: int, **options) -> dict[str, torch.Tensor]:
    """All activations of all micro-batches at once."""
    model, (images, ids, lengths) = build(**options), batch()
    torch.manual_seed(5)
    features = {
        "image": torch.cat([model.encode_image(piece) for piece in images.split(size)]),
        "text": torch.cat([model.encode_text(*piece) for piece in zip(ids.split(size), lengths.split(size), strict=True)]),
        "logit_scale": model.logit_scale(),
    }
    return gradients(model, loss_of(features))


def as_open_clip_accumulates(size: int) -> dict[str, torch.Tensor]:
    """One loss and one backward pass per micro-batch, its features fresh and those of the others from a cache."""
    model, inputs = build(dropout=0), batch()
    with torch.no_grad():
        cached = model(*inputs, wants=CLIP)
    for start in range(0, ROWS, size):
        mine = slice(start, start + size)
        fresh = model(*(each[mine] for each in inputs), wants=CLIP)
        whole = {name: torch.cat([cached[name][:start], fresh[name], cached[name][start + size :]]) for name in ("image", "text")}
        loss_of(whole | {"logit_scale": fresh["logit_scale"]}).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def difference(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of each tensor, relative to its largest value. The bias of an attention's key has no gradient but rounding."""
    used = {name: tensor for name, tensor in expected.items() if tensor.abs().max() > 1e-12}
    assert len(used) > 30 and all(found[name].abs().max() < 1e-12 for name in expected.keys() - used.keys())
    return {name: ((found[name] - tensor).abs().max() / tensor.abs().max()).item() for name, tensor in used.items()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation checkpointing"])
def test_gradients_are_those_of_the_slow_twin_with_the_same_dropout_masks(checkpointing):
    expected = slow_twin(SIZE)
    assert max(difference(expected, ours(SIZE, checkpointing=checkpointing)).values()) < 1e-9
    assert max(difference(expected, ours(None)).values()) > 1e-3, "other masks give another gradient"


@pytest.mark.parametrize("size", [1, SIZE, 10, ROWS, 100])
def test_without_dropout_they_are_those_of_the_whole_batch(size):
    assert max(difference(ours(None, dropout=0), ours(size, dropout=0)).values()) < 1e-9


def test_other_masks_the_second_time_fail_the_law(monkeypatch):
    monkeypatch.setattr(microbatches, "checkpoint", functools.partial(microbatches.checkpoint, preserve_rng_state=False))
    assert max(difference(slow_twin(SIZE), ours(SIZE)).values()) > 1e-2


def test_a_logit_scale_counted_once_per_micro_batch_fails_the_law():
    wrong = difference(ours(None, dropout=0), as_open_clip_accumulates(5))
    assert wrong.pop("logit_scale.log") == pytest.approx(3, rel=1e-9), "4 times the gradient"
    assert max(wrong.values()) < 1e-9


def test_later_draws_are_as_if_nothing_had_been_replayed():
    draws = []
    for microbatch in (SIZE, None):
        model = build()
        torch.manual_seed(5)
        features = model(*batch(), wants=CLIP, microbatch=microbatch)
        state = torch.get_rng_state()
        loss_of(features).backward()
        draws.append(torch.equal(torch.get_rng_state(), state))
    assert draws == [True, True]


def test_towers_run_twice_and_only_where_something_trains(monkeypatch):
    calls = {ImageTower: 0, TextTower: 0}
    for tower, name in {ImageTower: "forward", TextTower: "pooled"}.items():
        run = getattr(tower, name)
        monkeypatch.setattr(tower, name, functools.partialmethod(lambda self, *inputs, tower, run, **more: calls.update({tower: calls[tower] + 1}) or run(self, *inputs, **more), tower=tower, run=run))
    pieces = num_microbatches(ROWS, SIZE)
    model = build()
    loss_of(model(*batch(), wants=CLIP, microbatch=SIZE)).backward()
    assert calls == {ImageTower: 2 * pieces, TextTower: 2 * pieces}
    calls.update(dict.fromkeys(calls, 0))
    model.train_only(frozenset(name for name, _ in model.named_parameters() if not name.startswith("image_")))
    loss_of(model(*batch(), wants=CLIP, microbatch=SIZE)).backward()
    assert calls == {ImageTower: pieces, TextTower: 2 * pieces}, "a frozen tower has no backward pass"
    calls.update(dict.fromkeys(calls, 0))
    with torch.no_grad():
        model(*batch(), wants=CLIP, microbatch=SIZE)
    assert calls == {ImageTower: pieces, TextTower: pieces}


def test_activations_of_one_micro_batch_live_at_once():
    alive, most = 0, 0

    class Keep(torch.autograd.Function):
        """The input; saves as many numbers for the backward pass as it has."""

        @staticmethod
        def forward(ctx, rows):
            ctx.save_for_backward(rows.clone())
            return rows.clone()

        @staticmethod
        def backward(ctx, gradient):
            nonlocal alive
            (saved,) = ctx.saved_tensors  # runs ``encode`` again
            alive -= len(saved)
            return gradient

    def encode(rows):
        nonlocal alive, most
        if torch._C._current_graph_task_id() != -1:  # the run whose activations are kept
            alive += len(rows)
            most = max(most, alive)
        return Keep.apply(rows * weight)

    weight = torch.ones(3, requires_grad=True)
    rows = torch.arange(60.0).view(20, 3)
    in_microbatches(encode, SIZE, rows).square().sum().backward()
    assert most == SIZE and alive == 0
    assert torch.equal(weight.grad, 2 * rows.square().sum(0))


# --- batch norm


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation checkpointing"])
def test_running_statistics_move_once_per_micro_batch_and_those_of_heads_once(checkpointing):
    model = build("test_resnet", FEATURES, checkpointing=checkpointing)
    features = model(*batch(), wants=FEATURES, microbatch=SIZE)
    (loss_of(features) + features["image_prototype"].sum() + features["text_prototype"].sum()).backward()
    found = model.state_dict()
    assert {int(found[name]) for name in found if name.startswith("image_tower") and name.endswith("num_batches_tracked")} == {3}
    assert {int(found[name]) for name in found if "prototype_head" in name and name.endswith("num_batches_tracked")} == {1}
    twin = build("test_resnet", FEATURES)
    with torch.no_grad():
        for piece in batch()[0].split(SIZE):
            twin.encode_image(piece)
    expected = twin.state_dict()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-12) for name in found if name.startswith("image_tower") and "running" in name)


def recipe(*values: str):
    return load_recipe(RECIPES / "demo_clip.yaml", ["model.image.name=test_resnet", "data.plan.global_batch=128", *values])


def test_batch_norm_is_refused_where_the_batch_is_cut():
    resnet, vit = build("test_resnet"), build("test_vit")
    cut = recipe("optim.microbatch=32")
    with pytest.raises(UserError, match="optim.microbatch 32 cuts the 64 rows of a rank, but model.image.name test_resnet has batch norm.* run.allow_batchnorm_microbatches true"):
        refuse_batch_norm(resnet, cut, 2)
    refuse_batch_norm(vit, cut, 2)
    refuse_batch_norm(resnet, cut, 4)
    refuse_batch_norm(resnet, recipe(), 1)
    refuse_batch_norm(resnet, recipe("optim.microbatch=32", "run.allow_batchnorm_microbatches=true"), 2)
