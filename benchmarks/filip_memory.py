"""Peak memory and seconds of FILIP's loss, forward and backward: all similarities of tokens at once, and streamed.

    python benchmarks/filip_memory.py [--recipe recipes/demo_filip.yaml] [--rows 128,512] [--threads 2]

Tokens have the shapes that the recipe's towers give, as many texts tokens as the recipe's context, of random lengths; every sample's tokens are keys, without a selection. On one rank
queries and keys are the same tensors. ``plain`` holds the similarities of all pairs of tokens; ``streamed`` is what the package trains with. Every line is a process of
its own; peak memory is that of one forward and backward pass, inputs and their gradients included, above what the process holds after imports (on a GPU: allocated
memory). ``difference`` is the largest one between both, of the loss and of any gradient, relative to the largest value of each.

Prints a table, and as the last line one JSON object with its figures.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable

import torch
from large_batch_parts.peak import Peak
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from protoclip_scale.models.image import ImageTower
from protoclip_scale.objectives.filip import filip_loss
from protoclip_scale.objectives.shared.late_interaction import Tokens
from protoclip_scale.recipe import load_recipe


def plain_direction(queries: Tokens, keys: Tokens, scale: torch.Tensor, partners_B: torch.Tensor) -> torch.Tensor:
    pairs = torch.einsum("bqd,nkd->bnqk", queries.rows, keys.rows).masked_fill(~keys.mask[None, :, None], -torch.inf)
    mask = queries.mask[:, None]
    return F.cross_entropy(scale * (pairs.amax(3) * mask).sum(2) / mask.sum(2), partners_B)


def plain_loss(images, texts, image_keys, text_keys, scale, columns_B) -> torch.Tensor:
    """filip_loss with all similarities of tokens."""
    return 0.5 * (plain_direction(images, text_keys, scale, columns_B) + plain_direction(texts, image_keys, scale, columns_B))


LOSSES: dict[str, Callable] = {"plain": plain_loss, "streamed": filip_loss}


def shapes(recipe_file: str) -> tuple[int, int, int]:
    """Tokens of an image, places for tokens of a text, and their width."""
    recipe = load_recipe(recipe_file)
    tower = ImageTower(recipe.model.image, pretrained=False).eval()
    size = recipe.model.image.size
    with torch.no_grad():
        tokens = tower(torch.zeros(1, 3, size, size)).tokens.shape[1] - tower.num_prefix_tokens
    return tokens, recipe.model.text.context_length, recipe.objectives["filip"].dim


def inputs(rows: int, shape: tuple[int, int, int], device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Image tokens, text tokens and the scale, which have gradients; and both masks."""
    draws, (of_image, of_text, width) = torch.Generator().manual_seed(0), shape
    image, text = (F.normalize(torch.randn(rows, tokens, width, generator=draws), dim=2).to(device).requires_grad_() for tokens in (of_image, of_text))
    lengths = torch.randint(3, of_text + 1, (rows, 1), generator=draws)
    masks = [torch.ones(rows, of_image, dtype=torch.bool), torch.arange(of_text) < lengths]
    return [image, text, torch.tensor([14.0], device=device, requires_grad=True)], [mask.to(device) for mask in masks]


def one_pass(loss_of: Callable, leaves: list[torch.Tensor], masks: list[torch.Tensor]) -> torch.Tensor:
    images, texts = map(Tokens, leaves[:2], masks)
    loss = loss_of(images, texts, images, texts, leaves[2], torch.arange(len(leaves[0]), device=leaves[0].device))
    loss.backward()
    if loss.device.type == "cuda":
        torch.cuda.synchronize(loss.device)
    return loss.detach()


def measure(name: str, rows: int, shape: tuple[int, int, int], threads: int) -> dict:
    """For a process of its own."""
    device = _device(threads)
    one_pass(LOSSES[name], *inputs(8, shape, device))  # libraries take their buffers at first use
    peak, start = Peak(device), time.perf_counter()
    one_pass(LOSSES[name], *inputs(rows, shape, device))
    return {"peak_mb": round(peak.bytes() / 1e6, 1), "seconds": round(time.perf_counter() - start, 3)}


def difference(rows: int, shape: tuple[int, int, int], threads: int) -> float:
    found = []
    for loss_of in LOSSES.values():
        leaves, masks = inputs(rows, shape, _device(threads))
        found.append([one_pass(loss_of, leaves, masks), *(leaf.grad for leaf in leaves)])
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in zip(*found, strict=True))


def _device(threads: int) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    torch.set_num_threads(threads)
    return torch.device("cpu")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/demo_filip.yaml", help="whose towers give the tokens")
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default="128,512", help="of the batch, comma-separated")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    chosen = arguments(argv)
    shape, lines, differences = shapes(chosen.recipe), [], {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for rows in chosen.rows:
            lines += [{"loss": name, "rows": rows, **fresh.apply(measure, (name, rows, shape, chosen.threads))} for name in LOSSES]
            differences[rows] = fresh.apply(difference, (rows, shape, chosen.threads))
    console, where = Console(soft_wrap=True), "GPU" if torch.cuda.is_available() else f"{chosen.threads} CPU threads"
    table = Table("loss", "rows", "peak MB", "seconds", title="FILIP's loss, {} image and {} text tokens of width {}, {}".format(*shape, where))
    for line in lines:
        table.add_row(line["loss"], f"{line['rows']:,}", f"{line['peak_mb']:,.1f}", f"{line['seconds']:.3f}")
    console.print(table)
    peaks = {(line["loss"], line["rows"]): line["peak_mb"] for line in lines}
    ratios = {rows: round(peaks["streamed", rows] / peaks["plain", rows], 4) for rows in chosen.rows}
    for rows in chosen.rows:
        console.print(f"at {rows:,} rows: streamed over plain {ratios[rows]} of the memory, largest difference {differences[rows]:.1e}")
    print(json.dumps({"recipe": chosen.recipe, "tokens": shape, "lines": lines, "streamed_over_plain": ratios, "difference": differences}))


if __name__ == "__main__":
    main()
