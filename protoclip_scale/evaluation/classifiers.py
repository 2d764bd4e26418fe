"""Zero-shot classifiers as files: class embeddings in safetensors, with hashes of what they were made from, so that no text is encoded twice."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.provenance import class_hash, template_hash
from protoclip_scale.files import sync
from protoclip_scale.recipe.schema import EvaluationSet

NOT_OF_TEXTS = ("image_", "visual", "vision_model.", "logit_", "prototype_", "text_prototype_")  # weights that no text embedding depends on
PROBE = ["a photo of a cat.", "Zwölf große Hunde, 3 of them asleep!"]


def model_hash(model: torch.nn.Module, tokenizer: Callable, precision: str) -> str:
    """Of what text embeddings depend on: the weights of the text side, what the tokenizer does with two sentences, and the precision."""
    digest = hashlib.sha256(precision.encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.removeprefix("model.").startswith(NOT_OF_TEXTS):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(str(tokenizer(PROBE).ids.tolist()).encode())
    return digest.hexdigest()[:32]


class ClassifierFiles:
    """FOLDER/MODEL/SET.COLUMN.safetensors: ``classes`` [C, D] unit rows of one model, in the order of the class names.

    Files of other classes, templates or models are refused. Only rank 0 reads and writes.
    """

    def __init__(self, folder: str | os.PathLike, model: str):
        self.model = model
        self.folder = Path(folder).expanduser() / model

    def path(self, held_out: EvaluationSet, column: str) -> Path:
        return self.folder / f"{held_out.name}.{column}.safetensors"

    def _facts(self, held_out: EvaluationSet, names: Sequence[str]) -> dict[str, str]:
        return {"templates": template_hash(held_out), "classes": class_hash(names, held_out.class_words), "model": self.model}

    def load(self, held_out: EvaluationSet, column: str, names: Sequence[str]) -> torch.Tensor | None:
        """[C, D], or None if there is no such file. UserError for a damaged one, and for one of other classes, templates or model."""
        path = self.path(held_out, column)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                facts, rows = file.metadata() or {}, file.get_tensor("classes")
        except (SafetensorError, OSError) as error:
            raise UserError(f"--classifiers: {path} cannot be read ({' '.join(str(error).split())[:200]}); remove it, it is made again") from error
        for what, expected in self._facts(held_out, names).items():
            if facts.get(what) != expected:
                of = {"model": "of another model, tokenizer or precision"}.get(what, f"of other {what}")
                raise UserError(f"--classifiers: {path} is {of} than this evaluation; remove it, or name another folder")
        if rows.dim() != 2 or len(rows) != len(names) or not torch.isfinite(rows).all():
            raise UserError(f"--classifiers: {path} does not hold {len(names)} finite rows; remove it, it is made again")
        return rows

    def save(self, held_out: EvaluationSet, column: str, names: Sequence[str], rows: torch.Tensor) -> None:
        """The file appears whole. UserError if it cannot be written."""
        path = self.path(held_out, column)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"classes": rows.contiguous()}, temporary, metadata=self._facts(held_out, names))
            sync(temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--classifiers: {path} cannot be written ({error}); choose another folder") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
