"""Lines of code that load an export, for its card: each runs as it stands, in the export's folder or with its name on the Hub."""

from pathlib import Path

from protoclip_scale.models.text import pooling_of
from protoclip_scale.models.transformers_folder import TEXT, form_of
from protoclip_scale.objectives.compared import Compared

_OPEN_CLIP = """
import open_clip, torch
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained("{open_clip}")
model.eval()  # open_clip loads for training
tokenizer = open_clip.get_tokenizer("{open_clip}")
labels = ["a cat", "a red car"]
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("photo.jpg")).unsqueeze(0), normalize=True)
    text = model.encode_text(tokenizer(labels), normalize=True)
print(dict(zip(labels, (image @ text.T)[0].tolist())))
"""

_WHOLE = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("{plain}").eval(), AutoProcessor.from_pretrained("{plain}")
labels = ["a cat", "a red car"]
inputs = processor(text=labels, images=Image.open("photo.jpg"), padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
print(dict(zip(labels, (outputs.image_embeds @ outputs.text_embeds.T)[0].tolist())))
"""

_FOLDERS = """
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

{fetched}image_model = AutoModel.from_pretrained(f"{{folder}}/image").eval()
text_model = AutoModel.from_pretrained(f"{{folder}}/text").eval()
projections = load_file(f"{{folder}}/projections.safetensors")
labels = ["a cat", "a red car"]
pixels = AutoImageProcessor.from_pretrained(f"{{folder}}/image")(Image.open("photo.jpg"), return_tensors="pt")
tokens = AutoTokenizer.from_pretrained(f"{{folder}}/text")(labels, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    states, mask = text_model(**tokens).last_hidden_state, tokens["attention_mask"][:, :, None]
    text = ({pooled}) @ projections["text_projection.weight"].T
    image = image_model(**pixels).pooler_output @ projections["visual_projection.weight"].T
similarities = torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T
print(dict(zip(labels, similarities[0].tolist())))
"""

_OURS = """
import protoclip_scale
from PIL import Image

model = protoclip_scale.load("{plain}")
labels = ["a cat", "a red car"]
similarities = model.encode_image([Image.open("photo.jpg")]) @ model.encode_text(labels).T
print(dict(zip(labels, similarities[0].tolist())))
"""

_OURS_TOKENS = """
import protoclip_scale
from PIL import Image

{fetched}model = protoclip_scale.load(folder)
labels = ["a cat", "a red car"]
similarities = model.late_interaction(model.encode_image_tokens([Image.open("photo.jpg")]), model.encode_text_tokens(labels))
print(dict(zip(labels, similarities[0].tolist())))
"""

_POOLED = {"mean": "(states * mask).sum(1) / mask.sum(1)", "first": "states[:, 0]"}


def snippets_of(layout: str, folder: Path, repo: str | None, compared: Compared) -> dict[str, str]:
    """{library: code} for what is ``compared``. ``folder``: of the export; ``repo``: its name on the Hub, or None for code that is run in the folder."""
    fetched = f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repo}")\n' if repo else 'folder = "."\n'
    tokens = {"protoclip-scale, by tokens": _OURS_TOKENS.format(fetched=fetched)} if compared.tokens else {}
    return (_of_embeddings(layout, folder, repo, fetched) if compared.embeddings else {}) | tokens


def _of_embeddings(layout: str, folder: Path, repo: str | None, fetched: str) -> dict[str, str]:
    places = {"plain": repo or ".", "open_clip": f"hf-hub:{repo}" if repo else "local-dir:."}
    ours = {} if repo else {"protoclip-scale": _OURS.format(**places)}
    if layout == "open_clip":
        return {"open_clip": _OPEN_CLIP.format(**places)} | ours
    if form_of(folder) != "folders":
        return {"transformers": _WHOLE.format(**places)} | ours
    return {"transformers": _FOLDERS.format(fetched=fetched, pooled=_POOLED[pooling_of(str(folder / TEXT))])} | ours
