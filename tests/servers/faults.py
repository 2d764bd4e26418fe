"""What the test servers share: faults by the number of the request, a log, and the life of the process."""

import argparse
import asyncio
import os
import re
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from aiohttp import web

from tests.servers import CONTROL


@dataclass(frozen=True)
class Faults:
    """Which requests go wrong, counted from 1 among those that ``counted`` finds in "METHOD path"; 0 is never. A request meets the first fault that fits it."""

    down_from: int = 0  # this one and all later ones are answered 503
    unavailable_every: int = 0  # 503, every second one of them with Retry-After
    half_every: int = 0  # half of the body, then the connection is dropped
    hang_every: int = 0  # an answer after hang_seconds
    hang_seconds: float = 0.0
    status: int = 503  # of the first two
    counted: str = ""  # a regular expression; the requests that it does not find go well

    def of(self, number: int) -> str | None:
        """Name of the fault that a request meets."""
        if self.down_from and number >= self.down_from:
            return "down"
        every = {"unavailable": self.unavailable_every, "half": self.half_every, "hang": self.hang_every}
        return next((name for name, count in every.items() if count and number % count == 0), None)


class FaultLayer:
    """aiohttp middleware around every handler, and the control page that tests talk to."""

    def __init__(self):
        self.faults = Faults()
        self.log: list[dict] = []
        self.num_counted = 0

    @web.middleware
    async def middleware(self, request: web.Request, handler) -> web.StreamResponse:
        if request.path == CONTROL:
            return await self._control(request)
        entry = {"method": request.method, "path": request.path_qs, "range": request.headers.get("Range"), "answer": None}
        self.log.append(entry)
        faults, is_counted = self.faults, re.search(self.faults.counted, f"{request.method} {request.path}") is not None
        self.num_counted += is_counted
        number = self.num_counted
        fault = faults.of(number) if is_counted else None
        if fault in ("down", "unavailable"):
            entry["answer"] = faults.status
            wait = {"Retry-After": "1"} if fault == "unavailable" and number // faults.unavailable_every % 2 == 0 else {}
            return web.Response(status=faults.status, headers=wait, text="try again later")
        if fault == "hang":
            entry["answer"] = "hang"
            await asyncio.sleep(faults.hang_seconds)
        try:
            response = await handler(request)
        except web.HTTPException as error:
            entry["answer"] = entry["answer"] or error.status
            raise
        entry["answer"] = entry["answer"] or response.status
        if fault == "half" and response.body and request.method == "GET":
            entry["answer"] = "half"
            return await _half(request, response)
        return response

    async def _control(self, request: web.Request) -> web.Response:
        if request.method == "POST":
            self.faults, self.log, self.num_counted = Faults(**await request.json()), [], 0
            return web.json_response(asdict(self.faults))
        return web.json_response(self.log)


async def _half(request: web.Request, response: web.Response) -> web.StreamResponse:
    """The headers of the whole answer and half of its body."""
    cut = web.StreamResponse(status=response.status, headers=response.headers)
    cut.content_length = len(response.body)
    await cut.prepare(request)
    await cut.write(response.body[: len(response.body) // 2])
    request.transport.close()  # sends what is written, then ends the connection
    return cut


def part_of_file(request: web.Request, path: Path, **headers: str) -> web.Response:
    """A file, or the range of it that is asked for, with HEAD as with GET."""
    size = path.stat().st_size
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{size:x}-{path.stat().st_mtime_ns:x}"'} | headers
    try:
        asked = request.http_range
    except ValueError as error:
        raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{size}"}) from error
    start, stop, _ = asked.indices(size)
    if "Range" in request.headers and start >= stop:
        raise web.HTTPRequestRangeNotSatisfiable(headers={"Content-Range": f"bytes */{size}"})
    with path.open("rb") as file:
        file.seek(start)
        body = file.read(stop - start)
    if "Range" not in request.headers:
        return web.Response(body=body, headers=headers, content_type="application/octet-stream")
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return web.Response(status=206, body=body, headers=headers, content_type="application/octet-stream")


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--port", type=int, default=0)
    return arguments


def serve(app: web.Application, port: int) -> None:
    """Serve until the standard input ends, as it does when the test process dies; prints the port once it listens."""

    async def run() -> None:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

    def leave() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=leave, daemon=True).start()
    asyncio.run(run())
