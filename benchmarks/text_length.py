"""What trimming and length buckets save the text tower: seconds of forward and backward passes over real captions, and that nothing else changes (law 7).

    python benchmarks/text_length.py [--corpus train_corpus.parquet] [--rows 256] [--batches 4] [--context 77] [--width 512] [--layers 12] [--threads 2]

The same tower runs three ways over the same batches, in turns: ``padded``, all captions at the whole context; ``trimmed``, at the longest caption of the batch; ``buckets``,
as training does, in groups of rows of like length. Tokens are those computed per caption, padding included. Differences are the largest against ``padded``:
of pooled features over their largest value, and of gradients over each tensor's.

Prints a table, and as the last line one JSON object with its figures.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from large_batch_parts.rows import read_captions
from rich.console import Console
from rich.table import Table

from protoclip_scale.data.tokenizers import Tokens
from protoclip_scale.models.text import TextTower, bucket_sizes
from protoclip_scale.recipe import schema

ROOT = Path(__file__).resolve().parent.parent


def padded(tower: TextTower, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    states = tower.encoder(input_ids=ids).last_hidden_state
    return states[torch.arange(len(ids), device=ids.device), lengths.to(ids.device) - 1]


WAYS: dict[str, Callable] = {"padded": padded, "trimmed": lambda tower, ids, lengths: tower(ids, lengths).pooled, "buckets": TextTower.pooled}


def computed_tokens(lengths: torch.Tensor, context: int, device: str) -> dict[str, float]:
    """Per caption."""
    buckets = lengths.sort().values.split(bucket_sizes(len(lengths), device))
    return {"padded": context, "trimmed": lengths.max().item(), "buckets": sum(len(each) * each.max().item() for each in buckets) / len(lengths)}


def one_pass(way: Callable, tower: TextTower, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[float, torch.Tensor, list[torch.Tensor]]:
    """Seconds, pooled features, and gradients of a sum that weighs every feature differently."""
    start = time.perf_counter()
    pooled = way(tower, ids, lengths)
    weights = torch.linspace(-1, 1, pooled.numel(), device=pooled.device).view_as(pooled)
    gradients = torch.autograd.grad((pooled * weights).sum(), list(tower.parameters()))
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, pooled.detach(), gradients


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def measured(tower: TextTower, tokens: Tokens, rows: int, context: int) -> dict[str, dict[str, float]]:
    device = next(tower.parameters()).device
    batches = [(ids.to(device), lengths) for ids, lengths in zip(tokens.ids.split(rows), tokens.lengths.split(rows), strict=True)]
    found = {name: {"seconds": 0.0, "tokens": 0.0, "feature_difference": 0.0, "gradient_difference": 0.0} for name in WAYS}
    one_pass(padded, tower, batches[0][0][:8], batches[0][1][:8])
    for ids, lengths in batches:
        counts, expected = computed_tokens(lengths, context, device.type), None
        for name, way in WAYS.items():
            seconds, pooled, gradients = one_pass(way, tower, ids, lengths)
            figures = found[name]
            figures["seconds"] += seconds / len(batches)
            figures["tokens"] += counts[name] / len(batches)
            expected = expected or (pooled, gradients)
            largest = max(relative(one, other) for one, other in zip(gradients, expected[1], strict=True) if other.abs().max() > 1e-6 * max(each.abs().max() for each in expected[1]))
            figures["feature_difference"] = max(figures["feature_difference"], relative(pooled, expected[0]))
            figures["gradient_difference"] = max(figures["gradient_difference"], largest)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=ROOT / "recipes" / "demo_corpus", help="parquet file, or a folder with train*.parquet")
    parser.add_argument("--rows", type=int, default=256, help="captions of a batch")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--context", type=int, default=77)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    settings = schema.TextTower(context_length=chosen.context, width=chosen.width, heads=chosen.width // 64, layers=chosen.layers)
    tower = TextTower(settings).to("cuda" if torch.cuda.is_available() else "cpu")
    tokens = read_captions(chosen.corpus, chosen.rows * chosen.batches, chosen.context)
    found = measured(tower, tokens, chosen.rows, chosen.context)
    table = Table("", "tokens a caption", "seconds a batch", "times faster", "features differ by", "gradients differ by", title=f"Text tower {chosen.width} x {chosen.layers}, {chosen.rows} captions of {tokens.lengths.float().mean():.1f} tokens")
    for name, figures in found.items():
        faster = found["padded"]["seconds"] / figures["seconds"]
        table.add_row(name, f"{figures['tokens']:.1f}", f"{figures['seconds']:.3f}", f"{faster:.1f}", f"{figures['feature_difference']:.1e}", f"{figures['gradient_difference']:.1e}")
    Console(soft_wrap=True).print(table)
    rounded = {name: {key: float(f"{value:.4g}") for key, value in figures.items()} for name, figures in found.items()}
    print(json.dumps({"context": chosen.context, "width": chosen.width, "layers": chosen.layers, "rows": chosen.rows, "mean_length": round(tokens.lengths.float().mean().item(), 2), "ways": rounded}))


if __name__ == "__main__":
    main()
