"""Make the features of an external text teacher for every row of a recipe's sources; an interrupted extraction goes on.

python tools/extract_teacher.py --recipe recipes/demo.yaml --model minilm --caption first --dim 64 --out recipes/demo_corpus_teacher
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protoclip_scale.errors import UserError  # noqa: E402
from protoclip_scale.recipe.load import load_recipe  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="recipe whose data.sources are encoded")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--model", required=True, help="minilm (all-MiniLM-L6-v2, from PyPI), or a transformers encoder's name or folder")
    parser.add_argument("--caption", choices=("first", "join"), default="first", help="which of several captions (default: first)")
    parser.add_argument("--dim", type=int, default=64, help="width after PCA (default: 64)")
    parser.add_argument("--tokens", type=int, default=77, help="captions are cut to this many tokens (default: 77)")
    parser.add_argument("--variant", choices=("paper", "reference"), default="paper", help="reference also averages padding, as published")
    parser.add_argument("--out", required=True, help="folder of the features")
    options = parser.parse_args(arguments)
    try:
        data = load_recipe(options.recipe, options.set).data
        import transformers  # here: its import takes seconds, and the recipe may be wrong

        from protoclip_scale.prototypes.teacher_extraction import Settings, extract_teacher

        transformers.utils.logging.disable_progress_bar()
        settings = Settings(options.model, options.caption, options.dim, options.tokens, options.variant)
        store = extract_teacher(data, settings, options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{store.num_rows:,} rows of {options.dim} features in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
