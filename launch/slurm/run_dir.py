"""Print the run directory of a launch line, absolute: ``python launch/slurm/run_dir.py --recipe FILE [--set KEY=VALUE ...] [--run-dir DIR]``.

Takes launch/pretrain.py's arguments and ignores those that say nothing of the directory; a bad recipe is one line on the error stream and exit code 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from protoclip_scale.engine.command import parse, run_directory
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import load_recipe

if __name__ == "__main__":
    try:
        options = parse(sys.argv[1:])
        print(run_directory(load_recipe(options.recipe, options.set), options.run_dir))
    except UserError as error:
        sys.exit(f"error: {error}")
