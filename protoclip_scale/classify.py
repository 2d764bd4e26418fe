"""The most similar labels for pictures: ``python -m protoclip_scale.classify EXPORT photo.jpg --classes "a cat,a red car"``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from protoclip_scale.errors import UserError
from protoclip_scale.redact import redact_errors


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m protoclip_scale.classify", description="The most similar labels for pictures, with their share of the softmax (of a model that SigLIP's loss trained, the probability of each alone) and their cosine (of one that is trained by tokens alone, their similarity by late interaction).")
    parser.add_argument("model", metavar="EXPORT", help="export of either layout, run directory, or transformers CLIP directory")
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="image files")
    parser.add_argument("--classes", required=True, metavar="A,B,C|FILE", help="labels between commas, or a text file with one in each line")
    parser.add_argument("--template", action="append", metavar="TEXT", help="text around a label, with {} in its place; given several times, their normalised embeddings are averaged, or their similarities by tokens (default: the label alone)")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="labels shown (default: 5)")
    return parser.parse_args(arguments)


def labels_of(classes: str) -> list[str]:
    """Raises UserError if there are none."""
    file = Path(classes).expanduser()
    parts = file.read_text(encoding="utf-8").splitlines() if file.is_file() else classes.split(",")
    labels = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not labels:
        raise UserError(f"--classes {classes}: it names no label; write them between commas, or name a file with one in each line")
    return labels


def run(options: argparse.Namespace) -> None:
    templates = options.template or ["{}"]
    if wrong := next((template for template in templates if "{}" not in template), None):
        raise UserError(f"--template {wrong!r} has no {{}} for the label; write for instance 'a photo of a {{}}.'")
    if options.top < 1:
        raise UserError(f"--top {options.top}: it must be at least 1")
    labels = labels_of(options.classes)
    from protoclip_scale.loading import load

    model = load(options.model)
    bias = None
    prompts = [template.replace("{}", label) for label in labels for template in templates]
    if model.compared.embeddings:
        classes_CD = model.encode_text(prompts).view(len(labels), len(templates), -1).mean(1)
        classes_CD /= classes_CD.norm(dim=-1, keepdim=True)
        scores, scale, bias = model.encode_image(options.pictures) @ classes_CD.T, model.logit_scale, model.logit_bias
    else:  # tokens alone were trained
        similarities = model.late_interaction(model.encode_image_tokens(options.pictures), model.encode_text_tokens(prompts))
        scores, scale = similarities.view(len(similarities), len(labels), len(templates)).mean(2), model.token_scale
    for picture, row in zip(options.pictures, scores, strict=True):
        print(picture)
        shares = (row * scale).softmax(0) if bias is None else (row * scale + bias).sigmoid()
        for place in row.argsort(descending=True, stable=True)[: options.top].tolist():
            print(f"  {shares[place]:6.1%}  {row[place]:+.3f}  {labels[place]}")


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
