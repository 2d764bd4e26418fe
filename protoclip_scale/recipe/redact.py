"""Secrets out of text that is written down: recipes in run directories, messages about them."""

import re
from typing import Any

from pydantic import BaseModel

_SECRET_KEY = re.compile(r"(^|_)(token|password|secret|api_key)$")
_SECRET_TEXT = (
    (re.compile(r"(\w+://)[^/\s@]+@"), r"\1***@"),
    (re.compile(r"([?&][^=&\s]*(?:token|sig|signature|credential|password|secret|key)[^=&\s]*=)[^&\s]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "***"),
)


def redacted(value: Any, key: str = "") -> Any:
    """Plain values with secrets replaced: URL credentials and signatures, Hub tokens, values of keys that name a secret."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return {name: redacted(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, key) for item in value]
    if value is not None and _SECRET_KEY.search(key):
        return "***"
    if isinstance(value, str):
        for pattern, replacement in _SECRET_TEXT:
            value = pattern.sub(replacement, value)
    return value
