"""A small Hugging Face Hub on loopback, so that tests run the real client: requests, caches, commits, errors.

It speaks the part of the wire protocol that huggingface_hub needs for model repositories, with classic LFS for large
files. Everything is kept in memory, and any bearer token may write. It fails on demand.
"""

import json
import math
import re
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Literal
from urllib.parse import parse_qs, unquote

from hub_routes import ROUTES, HubError, Repo, lfs_upload, validate_yaml


@dataclass
class Failure:
    """A failure of the next matching requests: an error instead of an answer, or a connection that is cut."""

    requests: re.Pattern[str]
    times: float
    error: HubError | None
    cut: Literal["request", "answer"] | None


class LoopbackHub:
    """`with LoopbackHub() as hub:` serves at `hub.url` until the block ends.

    `hub.requests` lists what was asked for ("GET /org/name/resolve/main/config.json"). `hub.bytes_served` counts the
    bytes of file content sent per "org/name/path". `hub.bytes_uploaded` counts those received: of large files per
    "org/name", of others per "org/name/path". `forget_traffic()` empties them, and forgets failures on demand.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.bytes_served: Counter[str] = Counter()
        self.bytes_uploaded: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self.lock = Lock()
        handler = type("Handler", (Call,), {"hub": self})
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

    def fail(
        self,
        requests: str,
        status: int | None = None,
        message: str = "",
        *,
        code: str = "",
        cut: Literal["request", "answer"] | None = None,
        times: float = math.inf,
        **headers: str,
    ) -> None:
        """Make matching requests fail from now on.

        Args:
            requests: A regular expression for the requests that fail: "PUT /lfs/", "POST .*/commit/".
            status: The status of the error that is answered.
            message: The message of the error.
            code: The error's X-Error-Code.
            cut: Where the connection is closed: in the middle of the "request", which then has no effect, or in the
                middle of the "answer", after the request took effect.
            times: How many requests fail.
            **headers: Headers of the error, with underscores for hyphens.
        """
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        error = HubError(status, code, message, headers) if status else None
        self.failures.append(Failure(re.compile(requests), times, error, cut))

    def forget_traffic(self) -> None:
        self.requests.clear()
        self.bytes_served.clear()
        self.bytes_uploaded.clear()
        self.failures.clear()


class Call(BaseHTTPRequestHandler):
    """The handler of one request."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: otherwise each answer waits for a delayed ACK

    def answer(self) -> None:
        path, _, query = self.path.partition("?")
        request = f"{self.command} {path}"
        failure = self.failure(unquote(request))
        if failure and failure.cut == "request":
            self.begin_reading()
            return self.hang_up()
        # The body is always read: on a kept-alive connection, the rest of it would be taken for the next request.
        self.body = b"".join(self.chunks())
        self.query = {k: v[-1] for k, v in parse_qs(query).items()}
        with self.hub.lock:
            self.hub.requests.append(unquote(request))
            try:
                if failure and failure.error:
                    raise failure.error
                route, groups = next((f, m.groups()) for how, f in ROUTES if (m := how.fullmatch(request)))
                needs_token = self.command == "POST" and route not in (validate_yaml, lfs_upload)
                if needs_token and "Authorization" not in self.headers:
                    raise HubError(401, "Unauthorized")
                result = route(self, *(unquote(g or "") for g in groups))
            except StopIteration:
                result = HubError(501, f"this hub has no {request}")
            except HubError as error:
                result = error
        self.send(result, cut=bool(failure and failure.cut))

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def begin_reading(self) -> None:
        if "Content-Length" in self.headers:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
        elif "Transfer-Encoding" in self.headers:
            next(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        """The body of the request. The client sends chunks if it does not know the size beforehand."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def failure(self, request: str) -> Failure | None:
        with self.hub.lock:
            found = next((f for f in self.hub.failures if f.times > 0 and f.requests.match(request)), None)
            if found:
                found.times -= 1
            return found

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, result: object, cut: bool) -> None:
        if isinstance(result, HubError):
            body, status, headers = json.dumps(result.body).encode(), result.status, result.headers
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
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.hang_up()

    def repo(self, repo_id: str, signed: bool = False) -> Repo:
        """Find a repository. No token is needed for a `signed` address, which is itself a secret."""
        repo = self.hub.repos.get(repo_id)
        known = signed or "Authorization" in self.headers
        if repo is None or (repo.private and not known):
            # Like the Hub, do not tell strangers whether a repository is private or missing.
            raise HubError(404 if known else 401, "RepoNotFound")
        return repo

    def log_message(self, *_: object) -> None:
        pass
