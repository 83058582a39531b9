"""A small Hugging Face Hub on loopback, so that tests run the real client: requests, caches, commits, errors.

It speaks the part of the wire protocol that huggingface_hub needs for model repositories. Everything is kept in memory,
every upload goes the "regular" way (base64 inside the commit), and any bearer token may write.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


class HubError(Exception):
    """An answer that is an error. `code` becomes the X-Error-Code header, from which the client picks its exception."""

    def __init__(self, status: int, code: str, **body: object):
        super().__init__(code)
        self.status, self.code, self.body = status, code, {"error": code, **body}


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str) -> str:
        history = f"{len(self.commits)} {branch} {sorted((p, etag(p, b)) for p, b in files.items())}"
        sha = hashlib.sha1(history.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound")
        return sha


def etag(path: str, data: bytes) -> str:
    """What the Hub reports: sha256 for large files, git's blob id for the others."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes) -> dict[str, object]:
    lfs = {"lfs": {"oid": etag(path, data), "sha256": etag(path, data), "size": len(data), "pointerSize": 134}}
    described = {"type": "file", "path": path, "rfilename": path, "size": len(data), "oid": etag(path, data)}
    return described | (lfs if path.endswith(LFS_SUFFIXES) else {})


class LoopbackHub:
    """`with LoopbackHub() as hub:` serves at `hub.url` until the block ends.

    `hub.requests` lists what was asked for ("GET /org/name/resolve/main/config.json"), `hub.bytes_served` counts the
    bytes of file content sent per "org/name/path". `forget_traffic()` empties both.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.bytes_served: Counter[str] = Counter()
        self.lock = Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_folder(self, repo_id: str, folder: str | Path, revision: str = "main", gated: bool = False) -> str:
        """Make `folder` the whole content of a branch (the repository and branch may be new). Returns the commit."""
        folder = Path(folder)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo())
            repo.gated = gated
            if not repo.branches:
                repo.commit({}, "main")
            return repo.commit(files, revision)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]

    def forget_traffic(self) -> None:
        self.requests.clear()
        self.bytes_served.clear()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: otherwise each answer waits for a delayed ACK

    def answer(self) -> None:
        # The body is always read: what is left of it would be taken for the next request of a kept-alive connection.
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        self.query = {k: v[-1] for k, v in parse_qs(query).items()}
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {unquote(path)}")
            try:
                call = f"{self.command} {path}"
                route, groups = next((f, m.groups()) for how, f in ROUTES if (m := how.fullmatch(call)))
                if self.command == "POST" and route is not validate_yaml and "Authorization" not in self.headers:
                    raise HubError(401, "Unauthorized")
                result = route(self, *(unquote(g or "") for g in groups))
            except StopIteration:
                result = HubError(501, f"this hub has no {self.command} {path}")
            except HubError as error:
                result = error
        self.send(result)

    do_GET = do_HEAD = do_POST = answer

    def send(self, result: object) -> None:
        if isinstance(result, HubError):
            body, status, headers = json.dumps(result.body).encode(), result.status, {"X-Error-Code": result.code}
            headers |= {"X-Repo-Commit": str(result.body["commit"])} if "commit" in result.body else {}
        elif isinstance(result, tuple):
            body, status, headers = result
        else:
            body, status, headers = json.dumps(result).encode(), 200, {}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def repo(self, repo_id: str) -> Repo:
        if repo_id not in self.hub.repos:
            # Like the Hub, tell strangers neither that a repository is private nor that it is missing.
            raise HubError(404 if "Authorization" in self.headers else 401, "RepoNotFound")
        return self.hub.repos[repo_id]

    def log_message(self, *_: object) -> None:
        pass


def create_repo(call: _Handler) -> object:
    asked = json.loads(call.body)
    repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
    url = {"url": f"{call.hub.url}/{repo_id}", "name": repo_id}
    if repo_id in call.hub.repos:
        raise HubError(409, "RepoExists", **url)
    call.hub.repos[repo_id] = Repo()
    call.hub.repos[repo_id].commit({}, "main")
    return url


def validate_yaml(call: _Handler) -> object:
    return {"errors": [], "warnings": []}


def model_info(call: _Handler, repo_id: str, revision: str) -> object:
    repo = call.repo(repo_id)
    sha = repo.resolve(revision or "main")
    readme = repo.commits[sha].get("README.md", b"").decode()
    front_matter = re.match(r"---\n(.*?)\n---", readme, re.S)
    card = (yaml.safe_load(front_matter[1]) if front_matter else {}) or {}
    siblings = [entry(*item) for item in repo.commits[sha].items()]
    return {
        "id": repo_id, "modelId": repo_id, "sha": sha, "siblings": siblings, "cardData": card,
        "tags": card.get("tags", []), "gated": "auto" if repo.gated else False, "private": False,
    }  # fmt: skip


def refs(call: _Handler, repo_id: str) -> object:
    repo = call.repo(repo_id)
    heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.tags.items()]
    return {"branches": heads, "tags": tags, "converts": []}


def tree(call: _Handler, repo_id: str, revision: str, folder: str) -> object:
    repo = call.repo(repo_id)
    sha = repo.resolve(revision)
    below = {p: b for p, b in repo.commits[sha].items() if not folder or p.startswith(f"{folder}/")}
    if folder and not below:
        raise HubError(404, "EntryNotFound", commit=sha)
    if call.query.get("recursive", "").lower() != "true":  # the Hub lists folders as well
        below = {p: b for p, b in below.items() if "/" not in p.removeprefix(f"{folder}/" if folder else "")}
    return [entry(p, b) for p, b in below.items()]


def preupload(call: _Handler, repo_id: str, revision: str) -> object:
    repo = call.repo(repo_id)
    files = repo.commits[repo.resolve(revision)]
    modes = {"uploadMode": "regular", "shouldIgnore": False}
    paths = [f["path"] for f in json.loads(call.body)["files"]]
    return {"files": [{"path": p, **modes} | ({"oid": etag(p, files[p])} if p in files else {}) for p in paths]}


def commit(call: _Handler, repo_id: str, revision: str) -> object:
    repo = call.repo(repo_id)
    parent = repo.resolve(revision)
    files = dict(repo.commits[parent])
    for line in map(json.loads, call.body.splitlines()):
        what, path = line["value"], line["value"].get("path", "")
        if line["key"] == "header" and what.get("parentCommit", parent) != parent:
            raise HubError(412, "StaleParent")
        if line["key"] == "file":
            files[path] = base64.b64decode(what["content"])
        elif line["key"] == "deletedFile":
            del files[path]
        elif line["key"] == "deletedFolder":
            files = {p: b for p, b in files.items() if not p.startswith(f"{path.rstrip('/')}/")}
    pull = f"refs/pr/{1 + sum(b.startswith('refs/pr/') for b in repo.branches)}" if "create_pr" in call.query else None
    sha = repo.commit(files, pull or revision)
    url = f"{call.hub.url}/{repo_id}"
    request = {"pullRequestUrl": f"{url}/discussions/{pull.rpartition('/')[2]}"} if pull else {}
    return {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **request}


def create_branch(call: _Handler, repo_id: str, name: str) -> object:
    repo = call.repo(repo_id)
    if name in repo.branches:
        raise HubError(409, "BranchExists")
    start = json.loads(call.body or "{}").get("startingPoint", "main")
    repo.branches[name] = repo.resolve(start)
    return {}


def create_tag(call: _Handler, repo_id: str, revision: str) -> object:
    repo = call.repo(repo_id)
    name = json.loads(call.body)["tag"]
    if name in repo.tags:
        raise HubError(409, "TagExists")
    repo.tags[name] = repo.resolve(revision)
    return {}


def download(call: _Handler, repo_id: str, revision: str, path: str) -> object:
    repo = call.repo(repo_id)
    if repo.gated:
        raise HubError(403 if "Authorization" in call.headers else 401, "GatedRepo")
    sha = repo.resolve(revision)
    if path not in repo.commits[sha]:
        raise HubError(404, "EntryNotFound", commit=sha)
    data, status = repo.commits[sha][path], 200
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
    headers = {"X-Repo-Commit": sha, "ETag": f'"{etag(path, data)}"', "Accept-Ranges": "bytes"}
    if asked:
        total, start, end = len(data), int(asked[1]), int(asked[2] or len(data) - 1)
        if start >= total:
            raise HubError(416, "RangeNotSatisfiable")
        data, status = data[start : end + 1], 206
        headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{total}"
    if call.command == "GET":
        call.hub.bytes_served[f"{repo_id}/{path}"] += len(data)
    return data, status, headers


_ID, _REV = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES = [
    (re.compile(pattern.replace("{id}", _ID).replace("{rev}", _REV)), route)
    for pattern, route in {
        "POST /api/repos/create": create_repo,
        "POST /api/validate-yaml": validate_yaml,
        "GET /api/models/{id}(?:/revision/{rev})?": model_info,
        "GET /api/models/{id}/refs": refs,
        "GET /api/models/{id}/tree/{rev}(?:/(.*))?": tree,
        "POST /api/models/{id}/preupload/{rev}": preupload,
        "POST /api/models/{id}/commit/{rev}": commit,
        "POST /api/models/{id}/branch/{rev}": create_branch,
        "POST /api/models/{id}/tag/{rev}": create_tag,
        "(?:GET|HEAD) /{id}/resolve/{rev}/(.+)": download,
    }.items()
]
