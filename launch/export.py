"""Write a trained run in a layout that other libraries load, and push it to the Hugging Face Hub.

    python launch/export.py --run runs/demo --layout open_clip --out exported
    python launch/export.py --run runs/demo --layout transformers --out exported --push ORG/NAME
    python launch/export.py --push ORG/NAME --out exported            an export that lies there already; an interrupted push goes on
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protoclip_scale.errors import UserError
from protoclip_scale.redact import redact_errors

LAYOUTS, DTYPES = ("open_clip", "transformers"), ("float32", "float16", "bfloat16")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch/export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="DIR", help="run directory")
    parser.add_argument("--checkpoint", default="latest", metavar="STEP", help="step of the checkpoint, or latest (default)")
    parser.add_argument("--weights", choices=("live", "ema"), help="those that train, or their average (default: the average, if optim.ema kept one)")
    parser.add_argument("--layout", default="open_clip", choices=LAYOUTS, help="who shall load it (default: open_clip)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights' file; running statistics and the temperature stay float32 (default: float32)")
    parser.add_argument("--prototypes", action="store_true", help="also write prototypes.safetensors: the centroids that training used last, and the heads they are compared with")
    parser.add_argument("--license", default="unknown", metavar="ID", help="of the weights, for the model card: an identifier of the Hub, for instance apache-2.0 (default: unknown)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write, which must be empty or not exist; or, with --verify, and with --push without --run, the export that lies there")
    parser.add_argument("--verify", action="store_true", help="write nothing: compare the export in --out, all sizes, digests and weights, with the run's checkpoint")
    parser.add_argument("--push", metavar="ORG/NAME", help="upload the export to this repository of the Hugging Face Hub, made private if it does not exist; the token is HF_TOKEN's or `hf auth login`'s")
    parser.add_argument("--public", action="store_true", help="with --push: a repository that is made is public")
    parser.add_argument("--dry-run", action="store_true", help="with --push: say what would be sent, and send nothing")
    options = parser.parse_args(arguments)
    if options.run is None and (options.verify or not options.push):
        parser.error("--run is missing")
    if (options.public or options.dry_run) and not options.push:
        parser.error("--public and --dry-run go with --push")
    return options


def write(options: argparse.Namespace) -> None:
    """Export a run, or compare an export with it."""
    from protoclip_scale.engine.checkpoint import open_weights
    from protoclip_scale.engine.saved_model import prototypes_of, recipe_of, source_of_run
    from protoclip_scale.export.facts import Checkpoint, extras_of_run
    from protoclip_scale.export.writing import export, verify

    recipe = recipe_of(options.run)
    weights = open_weights(options.run, options.checkpoint, options.weights)
    source = source_of_run(recipe, weights)
    if options.verify:
        manifest = verify(source, options.out)
        print(f"{options.out} is the {manifest['layout']} export ({manifest['dtype']}) of {options.run}, step {weights.manifest['cursor']['step']}: {len(manifest['files'])} files")
        return
    point = Checkpoint(weights.manifest["cursor"]["step"], weights.manifest["samples"], weights.kind)
    prototypes = prototypes_of(weights) if options.prototypes else None
    extras = extras_of_run(options.run, recipe, point, options.license, options.push, prototypes)
    folder = export(source, options.layout, options.out, options.dtype, extras)
    print(f"{options.layout} export of {options.run}{', averaged weights' if weights.kind == 'ema' else ''}: {folder}")


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 the user's error, in one line."""
    options = parse(arguments)
    redact_errors()
    try:
        if options.run is not None:
            write(options)
        if options.push:
            from protoclip_scale.export.hub import push

            for line in push(options.out, options.push, private=not options.public, dry_run=options.dry_run):
                print(line, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
