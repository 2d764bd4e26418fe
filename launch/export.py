"""Write a trained run in a layout that other libraries load.

    python launch/export.py --run runs/demo --layout open_clip --out exported
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protoclip_scale.engine.saved_model import load_model  # noqa: E402
from protoclip_scale.errors import UserError  # noqa: E402
from protoclip_scale.export.open_clip_layout import export_open_clip  # noqa: E402
from protoclip_scale.redact import redact_errors  # noqa: E402

LAYOUTS: dict[str, Callable[..., Path]] = {"open_clip": export_open_clip}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="run directory")
    parser.add_argument("--checkpoint", default="latest", help="step of the checkpoint, or latest")
    parser.add_argument("--layout", default="open_clip", choices=sorted(LAYOUTS), help="who shall load it")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must be empty or not exist")
    parser.add_argument("--weights", choices=("live", "ema"), help="of a run: those that train, or their average (default: the average, if optim.ema kept one)")
    arguments = parser.parse_args()
    redact_errors()
    try:
        recipe, model, weights = load_model(arguments.run, arguments.checkpoint, arguments.weights)
        folder = LAYOUTS[arguments.layout](model, recipe, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.layout} export of {arguments.run}{', averaged weights' if weights == 'ema' else ''}: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
