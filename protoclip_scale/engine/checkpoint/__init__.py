"""Checkpoints: safetensors shards of named tensor ranges, a manifest with digests, and one atomic rename to publish.

Every rank writes its ranges; whoever loads puts the ranges together, so the number of ranks and the strategy may change.
"""

from protoclip_scale.engine.checkpoint.finding import (
    find,
    folder_of,
    list_checkpoints,
    prototypes_folder,
    prototypes_manifest,
    set_aside,
)
from protoclip_scale.engine.checkpoint.manifest import Cursor, cursor_of, describe, facts, read_manifest
from protoclip_scale.engine.checkpoint.pieces import Piece, replicated_pieces, replicated_views
from protoclip_scale.engine.checkpoint.reading import Reader, Weights, open_weights, read_tensors, read_weights
from protoclip_scale.engine.checkpoint.retention import prune
from protoclip_scale.engine.checkpoint.writing import save

__all__ = [
    "Cursor",
    "Piece",
    "Reader",
    "Weights",
    "cursor_of",
    "describe",
    "facts",
    "find",
    "folder_of",
    "list_checkpoints",
    "open_weights",
    "prototypes_folder",
    "prototypes_manifest",
    "prune",
    "read_manifest",
    "read_tensors",
    "read_weights",
    "replicated_pieces",
    "replicated_views",
    "save",
    "set_aside",
]
