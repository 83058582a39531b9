"""The answers of the loopback Hub to each request for a model repository."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from loopback_hub import Call

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
LARGEST_PICTURE = 10_000
"""Pictures with more bytes than this are stored as large files."""

LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "gpl-3.0", "llama3.2", "gemma", "openrail", "other"}


class HubError(Exception):
    """An answer with an error. `code` becomes the X-Error-Code header, from which the client picks its exception."""

    def __init__(self, status: int, code: str, message: str = "", headers: Mapping[str, str] = {}, **body: Any):
        super().__init__(code)
        self.status, self.body = status, {"error": message or code, **body}
        self.headers = {"X-Error-Code": code, "X-Error-Message": message or code, **headers}


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files that were uploaded, by their sha256
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str) -> str:
        history = f"{len(self.commits)} {branch} {sorted((p, etag(p, b)) for p, b in files.items())}"
        sha = hashlib.sha1(history.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.objects |= {etag(path, data): data for path, data in files.items() if is_large(path, len(data))}
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound")
        return sha


def is_large(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or (path.endswith(".png") and size > LARGEST_PICTURE)


def etag(path: str, data: bytes) -> str:
    """The ETag that the Hub reports: the sha256 of a large file, or git's blob id of another file."""
    if is_large(path, len(data)):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path: str, data: bytes) -> dict[str, object]:
    lfs = {"lfs": {"oid": etag(path, data), "sha256": etag(path, data), "size": len(data), "pointerSize": 134}}
    described = {"type": "file", "path": path, "rfilename": path, "size": len(data), "oid": etag(path, data)}
    return described | (lfs if is_large(path, len(data)) else {})


def whoami(call: "Call") -> object:
    return {"type": "user", "name": "user", "orgs": []}


def create_repo(call: "Call") -> object:
    asked = json.loads(call.body)
    repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
    url: dict[str, Any] = {"url": f"{call.hub.url}/{repo_id}", "name": repo_id}
    if repo_id in call.hub.repos:
        raise HubError(409, "RepoExists", "You already created this model repo", **url)
    repo = call.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
    repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "main")
    return url


def validate_yaml(call: "Call") -> object:
    """Answer as the Hub does: status 400 and the list of errors if the metadata are not valid."""
    front_matter = _front_matter(json.loads(call.body)["content"])
    if front_matter is None:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    try:
        metadata = yaml.safe_load(front_matter)
        errors = _metadata_errors(metadata) if isinstance(metadata, dict) else ["the metadata must be an object"]
    except yaml.YAMLError as error:
        errors = [f"bad YAML: {error}"]
    if errors:
        raise HubError(400, "", "Invalid metadata", errors=[{"message": error} for error in errors], warnings=[])
    return {"errors": [], "warnings": []}


def _front_matter(card: str) -> str | None:
    found = re.match(r"---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", card, re.S)
    return found[1] if found else None


def _metadata_errors(metadata: dict[str, Any]) -> list[str]:
    def listed(key: str) -> list[Any]:
        value = metadata.get(key, [])
        return value if isinstance(value, list) else [value]

    errors = [f'"{key}" must be a string' for key in ("base_model", "tags", "datasets", "language", "license")
              if not all(isinstance(value, str) for value in listed(key))]  # fmt: skip
    errors += [
        f'"base_model" with value "{value}" is not valid. Use a model id from https://hf.co/models.'
        for value in listed("base_model")
        if isinstance(value, str) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value)
    ]
    errors += [f'"license" must be one of {sorted(LICENSES)}' for name in listed("license") if name not in LICENSES]
    if metadata.get("base_model_relation", "merge") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    for model in listed("model-index"):
        for result in model["results"]:
            if not {"task", "dataset", "metrics"} <= result.keys() or "type" not in result["dataset"]:
                errors.append('"model-index[0].results[0].dataset.type" is required')
    return errors


def model_info(call: "Call", repo_id: str, revision: str) -> object:
    repo = call.repo(repo_id)
    sha = repo.resolve(revision or "main")
    card = yaml.safe_load(_front_matter(repo.commits[sha].get("README.md", b"").decode()) or "") or {}
    siblings = [entry(*item) for item in repo.commits[sha].items()]
    return {
        "id": repo_id, "modelId": repo_id, "sha": sha, "siblings": siblings, "cardData": card,
        "tags": card.get("tags", []), "gated": "auto" if repo.gated else False, "private": repo.private,
    }  # fmt: skip


def refs(call: "Call", repo_id: str) -> object:
    repo = call.repo(repo_id)
    heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.tags.items()]
    return {"branches": heads, "tags": tags, "converts": []}


def tree(call: "Call", repo_id: str, revision: str, folder: str) -> object:
    repo = call.repo(repo_id)
    sha = repo.resolve(revision)
    below = {p: b for p, b in repo.commits[sha].items() if not folder or p.startswith(f"{folder}/")}
    if folder and not below:
        raise HubError(404, "EntryNotFound", commit=sha)
    if call.query.get("recursive", "").lower() != "true":  # the Hub lists folders as well
        below = {p: b for p, b in below.items() if "/" not in p.removeprefix(f"{folder}/" if folder else "")}
    return [entry(p, b) for p, b in below.items()]


def preupload(call: "Call", repo_id: str, revision: str) -> object:
    repo = call.repo(repo_id)
    stored = repo.commits[repo.resolve(revision)]
    answer = []
    for file in json.loads(call.body)["files"]:
        path = file["path"]
        mode = {"uploadMode": "lfs" if is_large(path, file["size"]) else "regular", "shouldIgnore": False}
        oid = {"oid": etag(path, stored[path])} if path in stored else {}
        answer.append({"path": path, **mode, **oid})
    return {"files": answer}


def lfs_batch(call: "Call", repo_id: str) -> object:
    """Answer with the addresses to upload large files to. Files that are stored already get none."""
    repo = call.repo(repo_id)
    url = f"{call.hub.url}/lfs/{repo_id}"
    objects = []
    for asked in json.loads(call.body)["objects"]:
        actions = {"upload": {"href": f"{url}/{asked['oid']}"}, "verify": {"href": f"{url}/verify"}}
        objects.append(asked | ({} if asked["oid"] in repo.objects else {"actions": actions}))
    return {"transfer": "basic", "objects": objects}


def lfs_upload(call: "Call", repo_id: str, oid: str) -> object:
    call.hub.bytes_uploaded[repo_id] += len(call.body)
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise HubError(400, "", "The content does not have this sha256")
    call.repo(repo_id, signed=True).objects[oid] = call.body
    return {}


def lfs_verify(call: "Call", repo_id: str) -> object:
    asked = json.loads(call.body)
    if len(call.repo(repo_id).objects.get(asked["oid"], b"")) != asked["size"]:
        raise HubError(404, "", "The object is not stored")
    return {}


def commit(call: "Call", repo_id: str, revision: str) -> object:
    repo = call.repo(repo_id)
    lines = [json.loads(line) for line in call.body.splitlines()]
    create_pr = "create_pr" in call.query
    head = repo.resolve(revision)
    parent = lines[0]["value"].get("parentCommit", head)
    if parent != head and not create_pr:
        raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
    files = dict(repo.commits[repo.resolve(parent)])
    for line in lines:
        what, path = line["value"], line["value"].get("path", "")
        if line["key"] == "file":
            files[path] = base64.b64decode(what["content"])
            call.hub.bytes_uploaded[f"{repo_id}/{path}"] += len(files[path])
        elif line["key"] == "lfsFile":
            if what["oid"] not in repo.objects:
                raise HubError(400, "", f"LFS pointer of {path} points to a file that does not exist")
            files[path] = repo.objects[what["oid"]]
        elif line["key"] == "deletedFile":
            if path not in files:
                raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
            del files[path]
        elif line["key"] == "deletedFolder":
            files = {p: b for p, b in files.items() if not p.startswith(f"{path.rstrip('/')}/")}
    pull = f"refs/pr/{1 + sum(b.startswith('refs/pr/') for b in repo.branches)}" if create_pr else None
    sha = repo.commit(files, pull or revision)
    url = f"{call.hub.url}/{repo_id}"
    request = {"pullRequestUrl": f"{url}/discussions/{pull.rpartition('/')[2]}"} if pull else {}
    return {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **request}


def create_branch(call: "Call", repo_id: str, name: str) -> object:
    repo = call.repo(repo_id)
    if name in repo.branches:
        raise HubError(409, "BranchExists")
    start = json.loads(call.body or "{}").get("startingPoint", "main")
    repo.branches[name] = repo.resolve(start)
    return {}


def create_tag(call: "Call", repo_id: str, revision: str) -> object:
    repo = call.repo(repo_id)
    name = json.loads(call.body)["tag"]
    if name in repo.tags:
        raise HubError(409, "TagExists")
    repo.tags[name] = repo.resolve(revision)
    return {}


def download(call: "Call", repo_id: str, revision: str, path: str) -> object:
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
_ROUTES: dict[str, Callable[..., object]] = {
    "GET /api/whoami-v2": whoami,
    "POST /api/repos/create": create_repo,
    "POST /api/validate-yaml": validate_yaml,
    "GET /api/models/{id}(?:/revision/{rev})?": model_info,
    "GET /api/models/{id}/refs": refs,
    "GET /api/models/{id}/tree/{rev}(?:/(.*))?": tree,
    "POST /api/models/{id}/preupload/{rev}": preupload,
    "POST /([^/]+/[^/]+?)\\.git/info/lfs/objects/batch": lfs_batch,
    "PUT /lfs/{id}/([0-9a-f]{64})": lfs_upload,
    "POST /lfs/{id}/verify": lfs_verify,
    "POST /api/models/{id}/commit/{rev}": commit,
    "POST /api/models/{id}/branch/{rev}": create_branch,
    "POST /api/models/{id}/tag/{rev}": create_tag,
    "(?:GET|HEAD) /{id}/resolve/{rev}/(.+)": download,
}
ROUTES = [
    (re.compile(pattern.replace("{id}", _ID).replace("{rev}", _REV)), route) for pattern, route in _ROUTES.items()
]
