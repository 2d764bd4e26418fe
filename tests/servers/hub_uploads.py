"""The part of the Hugging Face Hub's HTTP interface that uploads use: repositories, LFS in one or several parts, commits.

``python -m tests.servers.hub_uploads --root DIR --token TOKEN``. Contents lie under DIR/objects, one file for each sha256, and are kept when no commit follows;
the files of a repository's last commit under DIR/repos/ORG/NAME; repositories with their visibility in DIR/repos.json. A file of more than
``INLINE`` bytes is LFS's, of more than ``PART`` in parts.
"""

import base64
import hashlib
import json
from pathlib import Path

from aiohttp import web

from tests.servers.faults import FaultLayer, parser, serve

INLINE, PART = 2_000, 1_000_000
_API = "/api/models/{owner}/{name}"


def git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Uploads:
    """What was sent so far."""

    def __init__(self, root: Path, token: str):
        self.root, self.token = root, token
        (root / "objects").mkdir(parents=True, exist_ok=True)

    def _repositories(self) -> dict[str, dict]:
        path = self.root / "repos.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _name(self, request: web.Request) -> str:
        name = f"{request.match_info['owner']}/{request.match_info['name']}"
        if name not in self._repositories():
            raise web.HTTPNotFound(headers={"X-Error-Code": "RepoNotFound"}, text="Repository not found")
        return name

    @web.middleware
    async def authorised(self, request: web.Request, handler) -> web.StreamResponse:
        if request.path.startswith("/api/") and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"error": "Invalid credentials"}, status=401)
        return await handler(request)

    async def create(self, request: web.Request) -> web.Response:
        asked, found = await request.json(), self._repositories()
        name = f"{asked['organization']}/{asked['name']}"
        if name in found:
            return web.json_response({"error": "You already created this model repo", "url": f"http://{request.host}/{name}"}, status=409)
        (self.root / "repos.json").write_text(json.dumps(found | {name: asked}))
        return web.json_response({"url": f"http://{request.host}/{name}", "name": name, "id": "0" * 24})

    async def info(self, request: web.Request) -> web.Response:
        return web.json_response({"_id": "0" * 24, "id": self._name(request), "sha": "0" * 40, "private": True, "tags": [], "downloads": 0, "likes": 0, "siblings": []})

    async def validate(self, request: web.Request) -> web.Response:
        return web.json_response({"errors": [], "warnings": []})

    async def preupload(self, request: web.Request) -> web.Response:
        folder, files = self.root / "repos" / self._name(request), (await request.json())["files"]
        return web.json_response({"files": [self._mode(folder / file["path"], file) for file in files]})

    def _mode(self, present: Path, file: dict) -> dict:
        mode = "lfs" if file["size"] > INLINE else "regular"
        data = present.read_bytes() if present.exists() else None
        known = None if data is None else hashlib.sha256(data).hexdigest() if mode == "lfs" else git_blob_id(data)
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known}

    async def batch(self, request: web.Request) -> web.Response:
        return web.json_response({"transfer": "multipart", "objects": [self._actions(request, each) for each in (await request.json())["objects"]]})

    def _actions(self, request: web.Request, wanted: dict) -> dict:
        if (self.root / "objects" / wanted["oid"]).exists():
            return wanted
        url, parts = f"http://{request.host}/objects/{wanted['oid']}", -(-wanted["size"] // PART)
        header = {"chunk_size": str(PART)} | {str(part): f"{url}/{part}?X-Amz-Signature=secret" for part in range(1, parts + 1)} if parts > 1 else {}
        return wanted | {"actions": {"upload": {"href": url, "header": header}, "verify": {"href": f"{url}/verify"}}}

    async def put(self, request: web.Request) -> web.Response:
        part = request.match_info.get("part")
        data = await request.read()
        if part:
            (self.root / "objects" / f"{request.match_info['oid']}.{part}").write_bytes(data)
            return web.Response(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})
        return self._keep(request.match_info["oid"], data)

    async def complete(self, request: web.Request) -> web.Response:
        oid, parts = request.match_info["oid"], (await request.json())["parts"]
        files = [self.root / "objects" / f"{oid}.{part['partNumber']}" for part in parts]
        response = self._keep(oid, b"".join(file.read_bytes() for file in files))
        for file in files:
            file.unlink()
        return response

    def _keep(self, oid: str, data: bytes) -> web.Response:
        if hashlib.sha256(data).hexdigest() != oid:
            return web.json_response({"error": "content does not have its sha256"}, status=400)
        (self.root / "objects" / oid).write_bytes(data)
        return web.json_response({})

    async def verify(self, request: web.Request) -> web.Response:
        path = self.root / "objects" / request.match_info["oid"]
        right = path.exists() and path.stat().st_size == (await request.json())["size"]
        return web.json_response({}, status=200 if right else 404)

    async def commit(self, request: web.Request) -> web.Response:
        name = self._name(request)
        lines = [json.loads(line) for line in (await request.text()).splitlines()]
        for line in lines:
            if line["key"] not in ("file", "lfsFile"):
                continue
            value, path = line["value"], self.root / "repos" / name / line["value"]["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(value["content"]) if line["key"] == "file" else (self.root / "objects" / value["oid"]).read_bytes())
        oid = hashlib.sha1((await request.text()).encode()).hexdigest()
        return web.json_response({"success": True, "commitOid": oid, "commitUrl": f"http://{request.host}/{name}/commit/{oid}", "hookOutput": ""})


def application(uploads: Uploads) -> web.Application:
    app = web.Application(middlewares=[FaultLayer().middleware, uploads.authorised], client_max_size=1 << 30)
    app.router.add_post("/api/repos/create", uploads.create)
    app.router.add_post("/api/validate-yaml", uploads.validate)
    app.router.add_get(_API, uploads.info)
    app.router.add_get(_API + "/revision/{revision:[^/]+}", uploads.info)
    app.router.add_post(_API + "/preupload/{revision:[^/]+}", uploads.preupload)
    app.router.add_post(_API + "/commit/{revision:[^/]+}", uploads.commit)
    app.router.add_post("/{owner}/{name}.git/info/lfs/objects/batch", uploads.batch)
    app.router.add_put("/objects/{oid}", uploads.put)
    app.router.add_put("/objects/{oid}/{part}", uploads.put)
    app.router.add_post("/objects/{oid}", uploads.complete)
    app.router.add_post("/objects/{oid}/verify", uploads.verify)

    async def unknown(request: web.Request) -> web.Response:
        raise web.HTTPNotFound(text=f"the stand-in has no {request.method} {request.path}")

    app.router.add_route("*", "/{path:.*}", unknown)  # the log shows what was asked
    return app


if __name__ == "__main__":
    arguments = parser()
    arguments.add_argument("--root", type=Path, required=True)
    arguments.add_argument("--token", required=True)
    options = arguments.parse_args()
    serve(application(Uploads(options.root, options.token)), options.port)
