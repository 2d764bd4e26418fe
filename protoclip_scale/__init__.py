"""Pretraining of image-text models: CLIP, ProtoCLIP and their relatives, from one machine to a cluster."""

import importlib
from typing import Any

__version__ = "0.1.0"
_LAZY = {"load": "protoclip_scale.loading", "Encoder": "protoclip_scale.loading"}  # importing the package imports no model libraries
__all__ = ["Encoder", "load"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
