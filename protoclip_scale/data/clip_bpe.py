"""CLIP's byte-level BPE from open_clip's tokenizer.py, run by itself: importing the open_clip package costs 7 s, this 0.2 s.

Importing this module reads the vocabulary, so a process that others are forked from does it once for all (``ClipTokenizer.modules``).
"""

import importlib.util
from pathlib import Path

MAX_CACHED_WORDS = 300_000  # some 100 MB; YFCC's captions have millions of distinct words


def _load_module():
    """open_clip/tokenizer.py as a module of its own, out of sys.modules; the package is located, not imported."""
    folder = Path(importlib.util.find_spec("open_clip").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", folder / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _clean(text: str) -> str:
    """What open_clip's cleaning (ftfy, HTML entities, white space, lower case) gives; it has nothing to mend in printable ASCII without '&'."""
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split()).lower()
    return _clean_any(text)


_module = _load_module()
_clean_any = _module.get_clean_fn("lower")
BPE = _module.SimpleTokenizer(clean="lower")
BPE.clean_fn = _clean
_SPECIAL = dict(BPE.cache)  # spelled out in a text, they are one token


def encode(text: str) -> list[int]:
    """Token ids of a text without start and end. About 10 microseconds."""
    if len(BPE.cache) > MAX_CACHED_WORDS:
        BPE.cache = dict(_SPECIAL)
    return BPE.encode(text)
