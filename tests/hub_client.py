"""Opens sources and says what they hold: ``python -m tests.hub_client`` with one JSON list of sources on stdin. A process of its own, since HF_ENDPOINT counts at import."""

import hashlib
import json
import sys

from protoclip_scale.data.sources import BlockReader
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema


def about(source: dict, root: str = ".", retry_seconds: float = 30) -> dict:
    """Facts and a hash of the first and the last block of a source, or its error."""
    try:
        reader = BlockReader(schema.Source(**source), root, retry_seconds)
        digest = hashlib.sha256()
        for block in (0, len(reader.block_rows) - 1):
            for row in reader.read(block).to_pylist():
                digest.update(repr(sorted(row.items())).encode())
        rows, files = reader.block_rows.tolist(), reader.files
        return {"fingerprint": reader.fingerprint, "block_rows": rows, "files": files, "commit": reader.commit, "hash": digest.hexdigest()}
    except UserError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    json.dump([about(source) for source in json.load(sys.stdin)], sys.stdout)
