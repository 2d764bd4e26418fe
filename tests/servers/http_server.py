"""Files of a folder over HTTP, with ranges and directory listings as nginx gives them: ``python -m tests.servers.http_server --root DIR``."""

import html
import urllib.parse
from pathlib import Path

from aiohttp import web

from tests.servers.faults import FaultLayer, parser, part_of_file, serve


def listing(folder: Path, shown: str) -> web.Response:
    """A page of links, relative to the folder."""
    names = ["../", *sorted(child.name + ("/" if child.is_dir() else "") for child in folder.iterdir())]
    links = "\n".join(f'<a href="{urllib.parse.quote(name)}">{html.escape(name)}</a>' for name in names)
    title = f"Index of {html.escape(shown)}"
    return web.Response(text=f"<html><head><title>{title}</title></head><body><pre>\n{links}\n</pre></body></html>", content_type="text/html")


def application(root: Path) -> web.Application:
    layer = FaultLayer()

    async def answer(request: web.Request) -> web.Response:
        path = (root / request.path.lstrip("/")).resolve()
        if not path.is_relative_to(root) or not path.exists():
            raise web.HTTPNotFound
        if path.is_file():
            return part_of_file(request, path)
        if not request.path.endswith("/"):
            raise web.HTTPMovedPermanently(request.path + "/")
        return listing(path, request.path)

    app = web.Application(middlewares=[layer.middleware])
    app.router.add_get("/{path:.*}", answer)  # HEAD too
    app.router.add_post("/{path:.*}", answer)
    return app


if __name__ == "__main__":
    arguments = parser()
    arguments.add_argument("--root", type=Path, required=True)
    options = arguments.parse_args()
    serve(application(options.root.resolve()), options.port)
