"""Datasets and models of the Hugging Face Hub, read only, from folders: one folder per commit, the last one is ``main``.

``python -m tests.servers.hub_server --repo org/name --commit DIR_1 --commit DIR_2``; clients find it by HF_ENDPOINT, with HF_HUB_DISABLE_XET=1.
Commit number n has the id ``commit_id(n)``. Parquet files are served as the Hub serves LFS files: by a redirect to another address.
"""

import hashlib
from pathlib import Path

from aiohttp import web

from tests.servers.faults import FaultLayer, parser, part_of_file, serve

LFS_SUFFIX = ".parquet"


def commit_id(number: int) -> str:
    """Of the commit ``number``, from 0."""
    return hashlib.sha1(f"commit {number}".encode()).hexdigest()


def blob_id(path: Path) -> str:
    """Name of a file's content: sha256 as LFS has it, else git's sha1."""
    data = path.read_bytes()
    if path.suffix == LFS_SUFFIX:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(root: Path, path: Path) -> dict:
    """What the API says of a file or folder."""
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
    blob, size = blob_id(path), path.stat().st_size
    about = {"type": "file", "path": name, "size": size, "oid": blob[:40]}
    return about | ({"lfs": {"oid": blob, "size": size, "pointerSize": 130}} if path.suffix == LFS_SUFFIX else {})


class Repository:
    """One dataset or model and its commits."""

    def __init__(self, name: str, folders: list[Path]):
        self.name = name
        self.commits = {commit_id(number): folder.resolve() for number, folder in enumerate(folders)}

    def find(self, request: web.Request) -> tuple[str, Path]:
        """(commit, its folder) of a request; 404 as the Hub says it."""
        if f"{request.match_info['owner']}/{request.match_info['name']}" != self.name:
            raise web.HTTPNotFound(headers={"X-Error-Code": "RepoNotFound"}, text="Repository not found")
        revision = request.match_info.get("revision", "main")
        commit = next((sha for sha in self.commits if sha.startswith(revision) and len(revision) >= 7), None)
        if revision in ("main", "refs/heads/main"):
            commit = list(self.commits)[-1]
        if commit is None:
            raise web.HTTPNotFound(headers={"X-Error-Code": "RevisionNotFound"}, text=f"Invalid rev id: {revision}")
        return commit, self.commits[commit]

    def file(self, request: web.Request, folder: Path, name: str) -> Path:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder) or not path.exists():
            raise web.HTTPNotFound(headers={"X-Error-Code": "EntryNotFound"}, text="Entry not found")
        return path

    async def info(self, request: web.Request) -> web.Response:
        commit, folder = self.find(request)
        siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in sorted(folder.rglob("*")) if path.is_file()]
        common = {"_id": "0" * 24, "author": self.name.split("/")[0], "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return web.json_response(common | {"id": self.name, "sha": commit, "lastModified": "2026-01-01T00:00:00.000Z", "siblings": siblings})

    async def tree(self, request: web.Request) -> web.Response:
        _, folder = self.find(request)
        top = self.file(request, folder, request.match_info.get("path", ""))
        if not top.is_dir():
            raise web.HTTPNotFound(headers={"X-Error-Code": "EntryNotFound"}, text="not a folder")
        recursive = request.query.get("recursive", "").lower() in ("1", "true")
        return web.json_response([entry(folder, path) for path in sorted(top.rglob("*") if recursive else top.iterdir())])

    async def paths(self, request: web.Request) -> web.Response:
        _, folder = self.find(request)
        form = await request.json() if request.content_type == "application/json" else await request.post()
        names = form["paths"] if isinstance(form, dict) else form.getall("paths", [])
        return web.json_response([entry(folder, folder / name) for name in names if (folder / name).exists() and name])

    async def refs(self, request: web.Request) -> web.Response:
        commit, _ = self.find(request)
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit}
        return web.json_response({"branches": [branch], "tags": [], "converts": []})

    async def resolve(self, request: web.Request) -> web.Response:
        commit, folder = self.find(request)
        path = self.file(request, folder, request.match_info["path"])
        blob = blob_id(path)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{blob}"'}
        if path.suffix != LFS_SUFFIX:
            return part_of_file(request, path, **headers)
        headers |= {"X-Linked-ETag": f'"{blob}"', "X-Linked-Size": str(path.stat().st_size)}
        raise web.HTTPFound(f"http://{request.host}/lfs/{blob}", headers=headers)

    async def blob(self, request: web.Request) -> web.Response:
        wanted = request.match_info["blob"]
        files = (path for folder in self.commits.values() for path in folder.rglob(f"*{LFS_SUFFIX}"))
        path = next((path for path in files if blob_id(path) == wanted), None)
        if path is None:
            raise web.HTTPNotFound
        return part_of_file(request, path, ETag=f'"{wanted}"')


def application(repository: Repository) -> web.Application:
    app = web.Application(middlewares=[FaultLayer().middleware])
    api, dataset = "/api/datasets/{owner}/{name}", "/datasets/{owner}/{name}"
    app.router.add_get(api, repository.info)
    app.router.add_get(api + "/revision/{revision:[^/]+}", repository.info)
    app.router.add_get(api + "/refs", repository.refs)
    app.router.add_get(api + "/tree/{revision:[^/]+}", repository.tree)
    app.router.add_get(api + "/tree/{revision:[^/]+}/{path:.*}", repository.tree)
    app.router.add_post(api + "/paths-info/{revision:[^/]+}", repository.paths)
    app.router.add_get(dataset + "/resolve/{revision:[^/]+}/{path:.+}", repository.resolve)
    app.router.add_get("/api/models/{owner}/{name}", repository.info)
    app.router.add_get("/api/models/{owner}/{name}/revision/{revision:[^/]+}", repository.info)
    app.router.add_get("/api/models/{owner}/{name}/tree/{revision:[^/]+}", repository.tree)
    app.router.add_get("/api/models/{owner}/{name}/tree/{revision:[^/]+}/{path:.*}", repository.tree)
    app.router.add_get("/{owner}/{name}/resolve/{revision:[^/]+}/{path:.+}", repository.resolve)
    app.router.add_get("/lfs/{blob}", repository.blob)

    async def unknown(request: web.Request) -> web.Response:
        raise web.HTTPNotFound(text=f"the stand-in has no {request.method} {request.path}")

    app.router.add_route("*", "/{path:.*}", unknown)  # the log shows what was asked
    return app


if __name__ == "__main__":
    arguments = parser()
    arguments.add_argument("--repo", required=True)
    arguments.add_argument("--commit", type=Path, action="append", required=True)
    options = arguments.parse_args()
    serve(application(Repository(options.repo, options.commit)), options.port)
