"""Pictures as the web serves them: ``python -m tests.servers.picture_server --root DIR``. Its files, and places where something is wrong."""

import asyncio
from pathlib import Path

from aiohttp import web

from tests.servers import CONTROL
from tests.servers.faults import FaultLayer, parser, serve

MOST = "/-most"  # pictures under way at once, the most since the faults were set


def application(root: Path) -> web.Application:
    layer = FaultLayer()
    under_way = most = 0

    @web.middleware
    async def counted(request: web.Request, handler) -> web.StreamResponse:
        nonlocal under_way, most
        if request.path == MOST:
            return web.json_response(most)
        if not request.path.startswith("/pictures/"):
            most = 0 if (request.path, request.method) == (CONTROL, "POST") else most
            return await handler(request)
        under_way += 1
        most = max(most, under_way)
        try:
            await asyncio.sleep(0.002)  # so that requests meet
            return await handler(request)
        finally:
            under_way -= 1

    async def picture(request: web.Request) -> web.Response:
        path = root / request.match_info["name"]
        if not path.is_file():
            raise web.HTTPNotFound
        return web.Response(body=path.read_bytes(), content_type="image/webp")

    async def page(request: web.Request) -> web.Response:
        return web.Response(text="<html><body>this picture has moved</body></html>", content_type="text/html")

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:  # until the client goes away
            await response.write(b"\xff\xd8" * 20_000)

    async def said_long(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(10**9)})
        await response.prepare(request)
        await asyncio.sleep(60)
        return response

    async def redirect(request: web.Request) -> web.Response:
        raise web.HTTPFound(request.query["url"])

    async def loop(request: web.Request) -> web.Response:
        raise web.HTTPFound(request.path)

    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    async def opted_out(request: web.Request) -> web.Response:
        return web.Response(body=b"picture", headers={"X-Robots-Tag": "noindex, noai"})

    async def empty(request: web.Request) -> web.Response:
        return web.Response()

    async def status(request: web.Request) -> web.Response:
        return web.Response(status=int(request.match_info["code"]))

    app = web.Application(middlewares=[counted, layer.middleware])
    places = {
        "page": page,
        "endless": endless,
        "said-long": said_long,
        "redirect": redirect,
        "loop": loop,
        "hang": hang,
        "opted-out": opted_out,
        "empty": empty,
    }
    app.router.add_routes([web.get(f"/{name}", handler) for name, handler in places.items()])
    app.router.add_routes(
        [web.get("/pictures/{name}", picture), web.get("/status/{code}", status), web.get(CONTROL, page), web.post(CONTROL, page)]
    )
    return app


if __name__ == "__main__":
    arguments = parser()
    arguments.add_argument("--root", type=Path, required=True)
    options = arguments.parse_args()
    serve(application(options.root.resolve()), options.port)
