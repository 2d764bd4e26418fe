"""Pretrain from a recipe: ``accelerate launch launch/pretrain.py --recipe recipes/demo.yaml``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protoclip_scale.engine.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
