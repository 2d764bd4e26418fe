"""Secrets out of whatever is written down or shown: recipes and manifests, logs, status, error lines, tracebacks."""

import os
import re
import sys
from typing import Any, TextIO

from pydantic import BaseModel

STARS = "***"
_SECRET_KEY = re.compile(r"(^|_)(token|password|secret|api_key|access_key|credentials?)$")
_SECRET_VARIABLE = re.compile(
    r"(^|_)(TOKEN|JWT|PASSWD|SECRET|CREDENTIALS?|CONNECTION_STRING|(API|ACCESS|ACCOUNT|STORAGE|PRIVATE|SECRET)_?KEY)(_|$)"
    r"|PASSWORD(_|$)|_(KEY|PAT|PWD)$|(_|SSH)PASS(PHRASE)?$|(^|_)AUTH(_CONFIG)?$",  # not PWD and OLDPWD, which are folders
    re.IGNORECASE,
)
_SHORTEST = 8  # characters of an environment variable's value that is looked for: shorter ones stand in innocent words
_QUERY = re.compile(r"\?([^\s'\"<>?=&]+=[^\s'\"<>?]*)")
_PARAMETER = re.compile(r"([^=&]+)=([^&]*)")
_SECRET_PARAMETER = re.compile(r"token|sig$|signature|credential|password|passwd|secret|key|auth", re.IGNORECASE)
# What a signing service adds beside the signature, new with each one: in a signed query only.
_SIGNED_PARAMETER = re.compile(r"(x-(amz|goog|oss|cos|obs)-.*|expires?|policy|googleaccessid|s[eprstv]|ss|srt|spr|sk[oitesv]\w*)$", re.IGNORECASE)
_SECRET_TEXT = (
    (re.compile(r"(\w+://)[^/\s?#'\"]*@"), r"\1***@"),
    (re.compile(r"\b(AccountKey|SharedAccessSignature)=[^;\s'\"]+"), r"\1=***"),
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{16,}", re.IGNORECASE), r"\1 ***"),
    (re.compile(r"\b(hf_[A-Za-z0-9]{16,}|(AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,})"), STARS),
)


def redact_text(text: str) -> str:
    """``text`` without passwords and signatures of URLs, without tokens that look like one, and without the values of this process's secret environment
    variables (HF_TOKEN, AWS_SECRET_ACCESS_KEY, WANDB_API_KEY, ...)."""
    for secret in _secrets_of_environment():
        text = text.replace(secret, STARS)
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return _QUERY.sub(lambda found: "?" + _redact_query(found[1]), text) if "?" in text else text


def _redact_query(query: str) -> str:
    """Parameters that are secret become ***; in a query that holds one also those that change with every signature."""
    signed = any(_SECRET_PARAMETER.search(name) for name, _ in _PARAMETER.findall(query))

    def shown(found: re.Match) -> str:
        name, value = found.groups()
        if _SECRET_PARAMETER.search(name) or (signed and _SIGNED_PARAMETER.match(name)):
            return f"{name}={STARS}{_punctuation(value)}"
        return found[0]

    return _PARAMETER.sub(shown, query)


def _punctuation(value: str) -> str:
    """What ends a URL in a sentence and is not part of it."""
    return value[len(value.rstrip(".,;:)]}")) :]


def _secrets_of_environment() -> list[str]:
    """Longest first: one may be part of another."""
    values = {value for name, value in os.environ.items() if len(value) >= _SHORTEST and _SECRET_VARIABLE.search(name)}
    return sorted((value for value in values if not os.path.exists(value)), key=len, reverse=True)  # a path to a secret is none


def redacted(value: Any, key: str = "") -> Any:
    """Plain values with their secrets replaced: ``redact_text`` of all text, and ``***`` for keys that name a secret."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return {name: redacted(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, key) for item in value]
    if not (value is None or isinstance(value, bool)) and _SECRET_KEY.search(key):  # a switch such as mask_token holds no secret
        return STARS
    return redact_text(value) if isinstance(value, str) else value


def stars_in(value: Any, place: str = "") -> str | None:
    """The dotted key of the first value in which a secret was replaced, or None."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        return next(filter(None, (stars_in(part, f"{place}.{name}" if place else str(name)) for name, part in parts)), None)
    return place if isinstance(value, str) and (value == STARS or f"={STARS}" in value or f"://{STARS}@" in value) else None


class _Redacting:
    """A text stream that redacts what is written to it, line by line as its writers give it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(redact_text(text))

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redact_errors() -> None:
    """From now on the error stream is redacted: also warnings of libraries and tracebacks, which carry the URLs they were about."""
    if not isinstance(sys.stderr, _Redacting):
        sys.stderr = _Redacting(sys.stderr)
