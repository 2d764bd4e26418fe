"""Published CLIP-like weights as an export that every tool here takes.

    python tools/import_checkpoint.py clip_yfcc15m.pth --family slip --out exported
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protoclip_scale.errors import UserError
from protoclip_scale.redact import redact_errors

FAMILIES = {
    "openai": "OpenAI's CLIP: its TorchScript archives, of which only the tensors are read, or a state dict",
    "open_clip": "open_clip's own towers; timm's with --image-name",
    "slip": "facebookresearch/SLIP: SLIP, SimCLR + CLIP and CLIP with ViT-B and ViT-L",
    "declip": "Sense-GVT/DeCLIP: DeCLIP, and the CLIP of the same code, with ViT-B/32 (ResNets only where the bias of their text projection can be folded)",
    "protoclip": "megvii-research/protoclip: towers with CLIP's text transformer",
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    epilog = "families:\n" + "\n".join(f"  {name:10} {about}" for name, about in FAMILIES.items())
    parser = argparse.ArgumentParser(prog="tools/import_checkpoint.py", description=__doc__, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="checkpoint of torch.save, read without running code, or safetensors")
    parser.add_argument("--family", required=True, choices=FAMILIES, help="who published it; see below")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; must be empty or not exist")
    parser.add_argument("--layout", default="open_clip", choices=("open_clip", "transformers"), help="who shall load it besides this package (default: open_clip)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of the weights' file (default: float32)")
    parser.add_argument("--image-name", metavar="NAME", help="timm's name of the image tower, where the weights' sizes do not tell it")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the images, where the position embeddings do not tell it")
    parser.add_argument("--activation", choices=("gelu", "quick_gelu"), help="of the transformers; no weight tells it (default: quick_gelu, for open_clip gelu; its -quickgelu models need quick_gelu)")
    parser.add_argument("--license", default="unknown", metavar="ID", help="of the weights, for the model card (default: unknown)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    from protoclip_scale.export.card import write_card
    from protoclip_scale.export.facts import facts_of_import
    from protoclip_scale.export.source import source_of_model
    from protoclip_scale.export.writing import Extras, export
    from protoclip_scale.models.checkpoint_files import read_state
    from protoclip_scale.models.published import import_model

    state = read_state(options.file)
    settings, model = import_model(state, options.family, str(options.file), options.image_name, options.image_size, options.activation)
    facts, origin = facts_of_import(options.file, options.family, settings, options.license)
    folder = export(source_of_model(model, settings), options.layout, options.out, options.dtype, Extras(lambda layout, draft: write_card(facts, layout, draft), None, origin))
    print(f"{options.layout} export of {options.file}: {folder} ({settings.image.name}, {settings.image.size} pixels, {settings.text.layers} text layers, {settings.embed_dim} numbers)")


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 the user's error, in one line."""
    redact_errors()
    try:
        run(parse(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
