"""One optimiser step on the demo towers at a global batch of 32,768 in one process: peak memory, seconds, and gradients against slow twins on subsets.

    python benchmarks/large_batch.py [--corpus train_corpus.parquet] [--rows 32768] [--microbatch 512] [--checked 2048] [--threads 2]

The model, the loss and the step are those of recipes/demo_clip.yaml with optim.microbatch; rows are real (a corpus with fewer is repeated). Its image tower has batch norm,
so run.allow_batchnorm_microbatches is set, and statistics are those of each micro-batch, in the twin too. Peak memory is resident memory (on a GPU: allocated
memory) above what the process holds after imports: rows, weights, gradients and AdamW's moments included, each told as well.

Twins: at full size, the loss's gradient in the embeddings of --checked rows by the textbook formula in fp64; and, for a batch of --checked rows, the gradient of every parameter
with all activations and both matrices of logits kept. Errors are differences over the largest value of each tensor.

Prints a table, and as the last line one JSON object with its figures.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from large_batch_parts.peak import Peak
from large_batch_parts.rows import read_batch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from protoclip_scale.data.batches import Batch
from protoclip_scale.engine import strategy as strategies
from protoclip_scale.engine.schedules import Schedule
from protoclip_scale.engine.trainer import Trainer
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives import build_objectives
from protoclip_scale.recipe import load_recipe
from protoclip_scale.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
CHUNK_ROWS = 512
NOTHING = 1e-9  # gradients that are zero but for rounding: a bias in front of batch norm, or of an attention's key


def recipe_of(rows: int, microbatch: int) -> Recipe:
    cut = [f"data.plan.global_batch={rows}", f"data.plan.episode_size={rows}", f"optim.microbatch={microbatch}", "run.allow_batchnorm_microbatches=true"]
    return load_recipe(ROOT / "recipes" / "demo_clip.yaml", cut)


def first_rows(batch: Batch, rows: int) -> Batch:
    return Batch(0, batch.images[:rows], batch.token_ids[:rows], batch.token_lengths[:rows], *[torch.arange(rows)] * 3)


def slow_embedding_gradients(image_ND: torch.Tensor, text_ND: torch.Tensor, scale: torch.Tensor, checked: int) -> dict[str, torch.Tensor]:
    """Of the first ``checked`` rows, fp64: s / 2N (sum_j (p_ij + q_ij) t_j - 2 t_i), with p the softmax over texts and q that over images; and the same for texts."""
    image_ND, text_ND, scale = (tensor.detach().double() for tensor in (image_ND, text_ND, scale))
    found = {}
    for name, own_ND, other_ND in (("image", image_ND, text_ND), ("text", text_ND, image_ND)):
        by_own_N = torch.cat([(scale * rows @ other_ND.T).logsumexp(1) for rows in own_ND[:checked].split(CHUNK_ROWS)])
        by_other_N = torch.cat([(scale * rows @ own_ND.T).logsumexp(1) for rows in other_ND.split(CHUNK_ROWS)])
        pieces = []
        for start in range(0, checked, CHUNK_ROWS):
            mine = slice(start, min(start + CHUNK_ROWS, checked))
            logits = scale * own_ND[mine] @ other_ND.T
            shares = (logits - by_own_N[mine, None]).exp_() + (logits - by_other_N).exp_()
            pieces.append(shares @ other_ND - 2 * other_ND[mine])
        found[name] = torch.cat(pieces) * scale / (2 * len(own_ND))
    return found


def slow_parameter_gradients(model: DualEncoder, batch: Batch, microbatch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """All activations of all micro-batches at once, and both matrices of logits."""
    pieces = zip(*(tensor.to(device).split(microbatch) for tensor in (batch.images, batch.token_ids, batch.token_lengths)), strict=True)
    image, text = map(torch.cat, zip(*((model.encode_image(images), model.encode_text(ids, lengths)) for images, ids, lengths in pieces), strict=True))
    logits, partners = model.logit_scale() * image @ text.T, torch.arange(len(image), device=device)
    loss = 0.5 * (F.cross_entropy(logits, partners) + F.cross_entropy(logits.T, partners))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def largest_error(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    counted = {name: tensor for name, tensor in expected.items() if tensor.abs().max() > NOTHING}
    return max(((found[name] - tensor).abs().max() / tensor.abs().max()).item() for name, tensor in counted.items())


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=ROOT / "recipes" / "demo_corpus", help="parquet file, or a folder with train*.parquet")
    parser.add_argument("--rows", type=int, default=32_768, help="of the global batch, a multiple of 4")
    parser.add_argument("--microbatch", type=int, default=512)
    parser.add_argument("--checked", type=int, default=2048, help="rows of the subsets")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args(argv)
    if chosen.checked > chosen.rows:
        parser.error(f"--checked {chosen.checked} is more than --rows {chosen.rows}")
    return chosen


def main(argv: list[str] | None = None) -> None:
    chosen = arguments(argv)
    torch.set_num_threads(chosen.threads)
    accelerator = strategies.start(timeout_minutes=30)
    device = accelerator.device
    peak, megabytes = Peak(device), {}
    recipe = recipe_of(chosen.rows, chosen.microbatch)
    batch = read_batch(chosen.corpus, chosen.rows, recipe.model.image.size, recipe.model.text.context_length)
    megabytes["rows"] = peak.now()
    trainer = Trainer(recipe, strategies.make_strategy(accelerator, strategies.Precision(recipe.optim.precision, device)), build_objectives(recipe), Schedule(recipe, 1, chosen.rows))
    trainer.build(episode=0)
    trainer.model.train()

    peak.forget()
    megabytes["rows and weights"] = peak.now()
    start = time.perf_counter()
    loss = trainer.loss(batch, 0, None)
    for name in ("image", "text"):
        loss.features[name].retain_grad()
    total = loss.total.item()
    update = trainer.step(loss, 0)
    seconds = time.perf_counter() - start
    megabytes["peak"] = peak.bytes()
    assert update.taken
    embeddings = {name: loss.features[name] for name in ("image", "text")}
    expected = slow_embedding_gradients(*embeddings.values(), loss.features["logit_scale"], chosen.checked)
    figures = {"embedding_gradient_error": largest_error(expected, {name: embedding.grad[: chosen.checked] for name, embedding in embeddings.items()})}
    del loss, embeddings, expected

    # Last, since what the twin held would count: a process does not give all of it back.
    few = first_rows(batch, chosen.checked)
    trainer.strategy.backward(trainer.loss(few, 0, None).total)
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    figures["parameter_gradient_error"] = largest_error(slow_parameter_gradients(trainer.model, few, chosen.microbatch, device), gradients)

    table = Table("figure", "value", title=f"One step at {chosen.rows:,} rows in micro-batches of {chosen.microbatch}, {chosen.threads} threads")
    for name, number in megabytes.items():
        table.add_row(f"{name}, MB above imports", f"{number / 1e6:,.0f}")
    table.add_row("seconds of the step", f"{seconds:.1f}")
    for name, error in figures.items():
        table.add_row(name.replace("_", " "), f"{error:.1e}")
    Console(soft_wrap=True).print(table)
    shown = {f"{name.replace(' ', '_')}_mb": round(number / 1e6, 1) for name, number in megabytes.items()}
    print(json.dumps({"rows": chosen.rows, "microbatch": chosen.microbatch, "loss": round(total, 5), "seconds": round(seconds, 2), **shown, **figures}))


if __name__ == "__main__":
    main()
