"""An S3 API (moto, in memory) behind the fault layer, filled from a folder: ``python -m tests.servers.s3_server --root DIR --bucket NAME``.

Clients find it by AWS_ENDPOINT_URL; any key is taken.
"""

import logging
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from aiohttp import web
from moto.moto_server.threaded_moto_server import ThreadedMotoServer

from tests.servers.faults import FaultLayer, parser, serve

HOP_BY_HOP = {"connection", "transfer-encoding", "content-encoding", "keep-alive", "server", "date"}


def fill(endpoint: str, bucket: str, root: Path, only: str) -> None:
    """A bucket with the files under ``root`` that match."""
    for key in ("", *(str(path.relative_to(root)) for path in sorted(root.rglob(only)) if path.is_file())):
        body = (root / key).read_bytes() if key else None
        request = urllib.request.Request(f"{endpoint}/{bucket}/{urllib.parse.quote(key)}".rstrip("/"), data=body, method="PUT")
        request.add_header("Content-Type", "application/octet-stream")
        urllib.request.urlopen(request).close()


def application(endpoint: str) -> web.Application:
    layer = FaultLayer()
    session = web.AppKey("session", aiohttp.ClientSession)

    async def forward(request: web.Request) -> web.Response:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP | {"content-length"}}
        async with request.app[session].request(
            request.method, endpoint + request.raw_path, headers=headers, data=await request.read() or None, allow_redirects=False
        ) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
            return web.Response(status=answer.status, headers=kept, body=await answer.read())

    async def connect(app: web.Application) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(auto_decompress=False) as app[session]:
            yield

    app = web.Application(middlewares=[layer.middleware], client_max_size=1 << 30)
    app.cleanup_ctx.append(connect)
    app.router.add_route("*", "/{path:.*}", forward)
    return app


if __name__ == "__main__":
    arguments = parser()
    arguments.add_argument("--root", type=Path, required=True)
    arguments.add_argument("--bucket", required=True)
    arguments.add_argument("--only", default="*")
    options = arguments.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    behind = "http://{}:{}".format(*moto.get_host_and_port())
    fill(behind, options.bucket, options.root, options.only)
    serve(application(behind), options.port)
