"""A Hub of one's own, over HTTP: repositories with commits, branches and large files, kept in memory.

Only what the client library asks for is answered, the way the real Hub answers it (headers and error codes pick the
client's exception class). Every request is logged, and answers can be made to fail. The client reads its settings when
it is imported, so it runs in a process of its own: ``hub.client(home)``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import warm

LARGE = (".parquet", ".gz", ".zst", ".png")  # what the Hub would keep in LFS, behind a redirect
TOKEN = "hf_of_the_local_hub"


@dataclass
class Repo:
    """A repository: commits by sha, each a whole tree, and what branches and tags point to."""

    kind: str  # "dataset" | "model"
    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branches
    tags: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)  # of commits, oldest first

    def resolve(self, revision: str) -> str | None:
        named = self.refs.get(revision) or self.tags.get(revision)
        return named or (revision if revision in self.commits else None)

    @property
    def head(self) -> str:
        return self.refs["main"]


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # decoded, without the query
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass
class Answer:
    """What goes back. ``body`` is sent whole or, asked with Range, in part."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any) -> Answer:
        return cls(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    @classmethod
    def error(cls, status: int, code: str, message: str) -> Answer:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        return cls(status, json.dumps({"error": message}).encode(), headers)


@dataclass
class Fault:
    """What is to go wrong with the next ``times`` requests whose ``METHOD path`` the pattern is found in.

    With ``seconds`` it lasts as long from the first of them, however many there are.
    ``kind`` is "status" (with ``status`` and ``headers``), "drop" (the connection closes without an answer), "lost" (it
    is done, then the connection closes without an answer), "truncate" (half of the body, then it closes) or "garble"
    (one byte of what is sent or received is another).
    """

    pattern: str
    kind: str
    status: int = 503
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    seconds: float | None = None
    until: float | None = None


class LocalHub:
    """The server and what it serves. ``with LocalHub() as hub: hub.commit("org/name", {"a.jsonl": ...})``."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.objects: dict[str, bytes] = {}  # what was uploaded, by the sha256 that the client gave
        self.before_commit: Callable[[str], None] | None = None  # called once with a repository's name
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # -- what a test does to it --

    def create(self, name: str, kind: str = "dataset", **settings: Any) -> Repo:
        return self.repos.setdefault((kind, name), Repo(kind, name, **settings))

    def commit(
        self,
        name: str,
        files: Mapping[str, bytes | None],
        *,
        kind: str = "dataset",
        branch: str = "main",
        title: str = "a commit",
    ) -> str:
        """Put files (None deletes) on a branch; returns the new commit's sha."""
        with self.lock:
            repo = self.create(name, kind)
            parent = repo.refs.get(branch, "")
            tree = {**repo.commits.get(parent, {}), **files}
            tree = {path: content for path, content in tree.items() if content is not None}
            seed = repr((name, parent, sorted(tree.items()), len(repo.commits))).encode()
            sha = hashlib.sha1(seed).hexdigest()
            repo.commits[sha], repo.refs[branch], repo.titles[sha] = tree, sha, title
            return sha

    def fail(self, pattern: str, kind: str = "status", *, status: int = 503, times: int = 1, **more: Any) -> None:
        self.faults.append(Fault(pattern, kind, status, times, **more))

    def asked(self, pattern: str) -> list[str]:
        """The ``METHOD path`` of logged requests that a pattern is found in."""
        with self.lock:
            return [text for r in self.log if re.search(pattern, text := f"{r.method} {r.path}")]

    def settings(self, home: Path, *, offline: bool = False, token: str | None = None) -> dict[str, str]:
        """The environment in which the client library finds this Hub, and its cache below ``home``."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_TOKEN": token or "",
        }

    @contextmanager
    def client(self, home: Path, *, offline: bool = False, token: str | None = None) -> Iterator[Client]:
        """A process in which the client library talks to this Hub."""
        environment = {**os.environ, **self.settings(home, offline=offline, token=token)}
        ours, theirs = Pipe()
        with ours:
            code, path = "import local_hub; local_hub.serve_calls()", os.pathsep.join(filter(None, sys.path))
            running = warm.warm().start(
                "python", "-c", code, cwd=Path.cwd(), env={**environment, "PYTHONPATH": path},
                streams=[theirs.fileno(), 1, 2],
            )  # fmt: skip
            theirs.close()
            yield Client(ours)
        assert running.wait(60) == 0

    @contextmanager
    def writer(self, home: Path) -> Iterator[Client]:
        """A process of somebody who may write, and who does not wait long before the next try."""
        with self.client(home, token=TOKEN) as process:
            process(hurry)
            yield process

    # -- what a request does --

    def answer(self, request: Request) -> Answer:
        for method, pattern, function in ROUTES:
            if request.method in method and (found := re.fullmatch(pattern, request.path)):
                return function(self, request, **found.groupdict())
        return Answer.error(404, "NotFound", f"no {request.method} {request.path} here")

    def fault(self, request: Request) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, f"{request.method} {request.path}"):
                    if fault.seconds is None:
                        fault.times -= 1
                        return fault
                    fault.until = fault.until or time.monotonic() + fault.seconds
                    if time.monotonic() < fault.until:
                        return fault
        return None

    def find(self, request: Request, kind: str, name: str, revision: str | None) -> tuple[Repo, str] | Answer:
        """The repository and the commit, or the error that the Hub answers with."""
        repo = self.repos.get((kind, name))
        known = request.headers.get("authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not known):
            return Answer.error(401 if not known else 404, "RepoNotFound", "Repository not found")
        sha = repo.resolve(revision or "main")
        if sha is None:
            return Answer.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, sha


class Client:
    """Calls module-level functions in the client's process."""

    def __init__(self, process: Connection) -> None:
        self._process, self._lock = process, threading.Lock()

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with self._lock:
            self._process.send((function, args, options))
            assert self._process.poll(120)
            result, error, where = self._process.recv()
        if error is not None:
            raise error from Exception(where)
        return result


def serve_calls() -> None:
    """Answer what a ``Client`` calls, until it is closed."""
    calls = Connection(os.dup(0))
    while True:
        try:
            function, args, options = calls.recv()
        except EOFError:
            return
        try:
            answer = function(*args, **options), None, None
        except BaseException as error:
            answer = None, error, traceback.format_exc()
        calls.send(answer)


def hurry(seconds: float = 0.02) -> None:
    """Called in a client's process: shorter waits before it asks or publishes again."""
    from calset.io import hub as hubfiles
    from calset.io.retry import Backoff

    hubfiles.BACKOFF = Backoff(first=seconds, longest=seconds)


# --- the endpoints ----------------------------------------------------------------------------------------------

Route = Callable[..., Answer]
ROUTES: list[tuple[str, str, Route]] = []
KIND = r"(?P<kinds>datasets|models)"
NAME = r"(?P<name>[^/]+/[^/]+)"


def route(methods: str, pattern: str) -> Callable[[Route], Route]:
    def add(function: Route) -> Route:
        ROUTES.append((methods, pattern, function))
        return function

    return add


@route("GET", r"/api/whoami-v2")
def whoami(hub: LocalHub, request: Request) -> Answer:
    if request.headers.get("authorization") != f"Bearer {TOKEN}":
        return Answer.error(401, "", "Invalid credentials in Authorization header")
    return Answer.json({"type": "user", "name": "tester", "orgs": []})


@route("GET", rf"/api/{KIND}/{NAME}(/revision/(?P<revision>.+))?")
def info(hub: LocalHub, request: Request, kinds: str, name: str, revision: str | None) -> Answer:
    found = hub.find(request, kinds[:-1], name, revision)
    if isinstance(found, Answer):
        return found
    repo, sha = found
    siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
    facts = {"id": name, "sha": sha, "private": repo.private, "gated": "auto" if repo.gated else False}
    return Answer.json({**facts, "siblings": siblings, "tags": []})


@route("GET", rf"/api/{KIND}/{NAME}/refs")
def refs(hub: LocalHub, request: Request, kinds: str, name: str) -> Answer:
    found = hub.find(request, kinds[:-1], name, None)
    if isinstance(found, Answer):
        return found
    branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in found[0].refs.items()]
    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in found[0].tags.items()]
    return Answer.json({"branches": branches, "converts": [], "tags": tags})


@route("GET", rf"/api/{KIND}/{NAME}/tree/(?P<revision>refs/[^/]+/[^/]+|[^/]+)(/(?P<folder>.*))?")
def tree(hub: LocalHub, request: Request, kinds: str, name: str, revision: str, folder: str | None) -> Answer:
    found = hub.find(request, kinds[:-1], name, revision)
    if isinstance(found, Answer):
        return found
    repo, sha = found
    prefix = f"{folder}/" if folder else ""
    inside = {path: content for path, content in sorted(repo.commits[sha].items()) if path.startswith(prefix)}
    if request.query.get("recursive") in (["true"], ["True"]):
        return Answer.json([_entry(path, content) for path, content in inside.items()])
    if not inside:
        return Answer.error(404, "EntryNotFound", f"{folder} does not exist")
    entries = {}
    for path, content in inside.items():
        first, _, rest = path.removeprefix(prefix).partition("/")
        folder_entry = {"type": "directory", "path": prefix + first, "size": 0, "oid": _blob_id(first.encode())}
        entries[first] = folder_entry if rest else _entry(path, content)
    return Answer.json(list(entries.values()))


@route("POST", rf"/api/{KIND}/{NAME}/paths-info/(?P<revision>.+)")
def paths_info(hub: LocalHub, request: Request, kinds: str, name: str, revision: str) -> Answer:
    found = hub.find(request, kinds[:-1], name, revision)
    if isinstance(found, Answer):
        return found
    asked = (
        json.loads(request.body)["paths"] if request.body.startswith(b"{") else parse_qs(request.body.decode())["paths"]
    )
    there = found[0].commits[found[1]]
    files = [_entry(path, there[path]) for path in asked if path in there]
    folders = [
        {"type": "directory", "path": path, "size": 0, "oid": _blob_id(path.encode())}
        for path in asked
        if any(file.startswith(f"{path}/") for file in there)
    ]
    return Answer.json([*files, *folders])


@route("GET", rf"/api/{KIND}/{NAME}/commits/(?P<revision>.+)")
def commits(hub: LocalHub, request: Request, kinds: str, name: str, revision: str) -> Answer:
    found = hub.find(request, kinds[:-1], name, revision)
    if isinstance(found, Answer):
        return found
    made = [
        {"id": sha, "title": title, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
        for sha, title in found[0].titles.items()
    ]
    return Answer.json(made[::-1])


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


@route("GET HEAD", rf"/({KIND}/)?{NAME}/resolve/(?P<revision>[^/]+|refs/[^/]+/[^/]+)/(?P<path>.+)")
def resolve(hub: LocalHub, request: Request, kinds: str | None, name: str, revision: str, path: str) -> Answer:
    found = hub.find(request, (kinds or "models")[:-1], name, revision)
    if isinstance(found, Answer):
        return found
    repo, sha = found
    if repo.gated and path not in ("README.md", ".gitattributes"):
        token = request.headers.get("authorization")
        if token != f"Bearer {TOKEN}":  # 403: logged in, as somebody who did not accept the conditions
            return Answer.error(403 if token else 401, "GatedRepo", f"Access to dataset {name} is restricted.")
    content = repo.commits[sha].get(path)
    if content is None:
        return Answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
    headers = {"X-Repo-Commit": sha, "ETag": f'"{_blob_id(content)}"'}
    if path.endswith(LARGE):
        digest = hashlib.sha256(content).hexdigest()
        large = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        # Another host, as the real Hub's: the client follows a redirect within its host itself and loses these headers.
        location = f"{hub.url.replace('127.0.0.1', 'localhost')}/lfs/{digest}/{quote(path)}"
        return Answer(302, b"", {**headers, **large, "Location": location})
    return Answer(200, content, headers)


@route("GET HEAD", r"/lfs/(?P<digest>[0-9a-f]{64})/.+")
def large_file(hub: LocalHub, request: Request, digest: str) -> Answer:
    """Where the redirect of a large file leads: on the real Hub another host, which knows no repositories."""
    for repo in hub.repos.values():
        for files in repo.commits.values():
            for content in files.values():
                if hashlib.sha256(content).hexdigest() == digest:
                    return Answer(200, content, {"ETag": f'"{digest}"'})
    return Answer(404)


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# --- writing ----------------------------------------------------------------------------------------------------


def _refused(request: Request) -> Answer | None:
    token = request.headers.get("authorization")
    if token == f"Bearer {TOKEN}":
        return None
    if token:
        return Answer.error(403, "", "You don't have the rights to do that")
    return Answer.error(401, "", "Invalid username or password.")


@route("POST", r"/api/repos/create")
def create(hub: LocalHub, request: Request) -> Answer:
    if refused := _refused(request):
        return refused
    asked = json.loads(request.body)
    name, kind = f"{asked['organization']}/{asked['name']}", asked["type"]
    with hub.lock:
        if (kind, name) in hub.repos:
            answer = Answer.error(409, "", "You already created this dataset repo")
            answer.body = json.dumps({"error": "it exists", "url": f"{hub.url}/{kind}s/{name}"}).encode()
            return answer
        hub.create(name, kind, private=asked.get("visibility") == "private")
        hub.commit(name, {".gitattributes": b"*.parquet filter=lfs\n"}, kind=kind, title="initial commit")
    return Answer.json({"url": f"{hub.url}/{kind}s/{name}", "name": name})


@route("POST", r"/api/validate-yaml")
def validate_yaml(hub: LocalHub, request: Request) -> Answer:
    import yaml

    content = json.loads(request.body)["content"]
    found = re.match(r"---\n(.*?)\n---\n", content, re.S)
    errors = []
    if found:
        metadata = yaml.safe_load(found[1])
        licences = metadata.get("license", [])
        for licence in [licences] if isinstance(licences, str) else licences:
            if not re.fullmatch(r"[a-z0-9.+-]+", licence):
                errors.append({"message": f'"license" must be one of the known identifiers, not {licence}'})
        names = [config["config_name"] for config in metadata.get("configs", [])]
        if len(set(names)) < len(names):
            errors.append({"message": "two configs of one name"})
    answer = Answer.json({"errors": errors, "warnings": [] if found else [{"message": "empty or missing yaml"}]})
    answer.status = 400 if errors else 200
    return answer


@route("POST", rf"/api/{KIND}/{NAME}/preupload/(?P<revision>.+)")
def preupload(hub: LocalHub, request: Request, kinds: str, name: str, revision: str) -> Answer:
    found = _refused(request) or hub.find(request, kinds[:-1], name, revision)
    if isinstance(found, Answer):
        return found
    there = found[0].commits[found[1]]

    def describe(path: str) -> dict[str, Any]:
        entry = _entry(path, there[path]) if path in there else {}
        oid = entry.get("lfs", entry).get("oid")
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
            "shouldIgnore": False,
            "oid": oid,
        }

    return Answer.json({"files": [describe(file["path"]) for file in json.loads(request.body)["files"]]})


@route("POST", rf"/({KIND}/)?{NAME}\.git/info/lfs/objects/batch")
def lfs_batch(hub: LocalHub, request: Request, kinds: str | None, name: str) -> Answer:
    if refused := _refused(request):
        return refused
    objects = []
    for item in json.loads(request.body)["objects"]:
        entry = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in hub.objects:
            entry["actions"] = {
                "upload": {"href": f"{hub.url}/lfs-upload/{item['oid']}"},
                "verify": {"href": f"{hub.url}/lfs-verify"},
            }
        objects.append(entry)
    return Answer.json({"transfer": "basic", "objects": objects})


@route("PUT", r"/lfs-upload/(?P<oid>[0-9a-f]{64})")
def lfs_upload(hub: LocalHub, request: Request, oid: str) -> Answer:
    hub.objects[oid] = request.body
    return Answer()


@route("POST", r"/lfs-verify")
def lfs_verify(hub: LocalHub, request: Request) -> Answer:
    asked = json.loads(request.body)
    stored = hub.objects.get(asked["oid"], b"")
    if len(stored) == asked["size"] and hashlib.sha256(stored).hexdigest() == asked["oid"]:
        return Answer.json({})
    hub.objects.pop(asked["oid"], None)
    return Answer.error(400, "", "The uploaded object has another sha256")


@route("POST", rf"/api/{KIND}/{NAME}/commit/(?P<revision>.+)")
def commit(hub: LocalHub, request: Request, kinds: str, name: str, revision: str) -> Answer:
    found = _refused(request) or hub.find(request, kinds[:-1], name, revision)
    if isinstance(found, Answer):
        return found
    if hub.before_commit:
        interlude, hub.before_commit = hub.before_commit, None
        interlude(name)
    items = [json.loads(line) for line in request.body.splitlines()]
    header = next(item["value"] for item in items if item["key"] == "header")
    files: dict[str, bytes | None] = {}
    for item in items:
        value = item["value"]
        if item["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            if value["oid"] not in hub.objects:
                return Answer.error(400, "", f"LFS object {value['oid']} was not uploaded")
            files[value["path"]] = hub.objects[value["oid"]]
        elif item["key"] == "deletedFile":
            files[value["path"]] = None
    with hub.lock:
        if header.get("parentCommit") not in (None, found[0].refs[revision]):
            return Answer.error(412, "", "A commit has happened since. Please refresh and try again.")
        sha = hub.commit(name, files, kind=kinds[:-1], branch=revision, title=header["summary"])
    url = f"{hub.url}/{kinds}/{name}/commit/{sha}"
    return Answer.json({"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": None})


@route("POST", rf"/api/{KIND}/{NAME}/tag/(?P<revision>.+)")
def tag(hub: LocalHub, request: Request, kinds: str, name: str, revision: str) -> Answer:
    found = _refused(request) or hub.find(request, kinds[:-1], name, revision)
    if isinstance(found, Answer):
        return found
    repo, sha = found
    wanted = json.loads(request.body)["tag"]
    with hub.lock:
        if wanted in repo.tags:
            return Answer.error(409, "", f"Tag reference exists already: {wanted}")
        repo.tags[wanted] = sha
    return Answer.json({})


@route("PUT", rf"/api/{KIND}/{NAME}/settings")
def settings(hub: LocalHub, request: Request, kinds: str, name: str) -> Answer:
    found = _refused(request) or hub.find(request, kinds[:-1], name, None)
    if isinstance(found, Answer):
        return found
    found[0].private = json.loads(request.body)["visibility"] == "private"
    return Answer.json({})


@route("GET", r"/api/datasets")
def listing(hub: LocalHub, request: Request) -> Answer:
    import yaml

    query = {key: values[0] for key, values in request.query.items()}
    rows = []
    for (kind, name), repo in hub.repos.items():
        known = request.headers.get("authorization") == f"Bearer {TOKEN}"
        if kind != "dataset" or (repo.private and not known):
            continue
        text = repo.commits[repo.head].get("README.md", b"").decode()
        found = re.match(r"---\n(.*?)\n---\n", text, re.S)
        metadata = (yaml.safe_load(found[1]) if found else None) or {}
        wanted = (
            set(request.query.get("filter", [])) <= set(metadata.get("tags", []))
            and query.get("search", "") in name
            and query.get("author", name.split("/")[0]) == name.split("/")[0]
        )
        if wanted:
            facts = {"id": name, "private": repo.private, "downloads": 0, "lastModified": "2026-01-01T00:00:00.000Z"}
            rows.append({**facts, "cardData": metadata, "tags": metadata.get("tags", [])})
    return Answer.json(rows[: int(query.get("limit", 1000))])


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(parts.path), parse_qs(parts.query), headers, self._body(headers))
        with self.hub.lock:
            self.hub.log.append(request)
        fault = self.hub.fault(request)
        if fault and fault.kind == "drop":
            self._hang_up()
            return
        if fault and fault.kind == "garble":
            request = replace(request, body=_garbled(request.body))
        if fault and fault.kind == "status":
            answer = Answer(fault.status, fault.body, dict(fault.headers))
        else:
            answer = self.hub.answer(request)
        if fault and fault.kind == "lost":
            self._hang_up()
            return
        if fault and fault.kind == "garble":
            answer.body = _garbled(answer.body)
        self._send(answer, headers.get("range"), cut=fault is not None and fault.kind == "truncate")

    def _body(self, headers: Mapping[str, str]) -> bytes:
        if "chunked" not in headers.get("transfer-encoding", ""):
            return self.rfile.read(int(headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _send(self, answer: Answer, asked: str | None, *, cut: bool) -> None:
        body, status = answer.body, answer.status
        if status == 200 and asked and (found := re.fullmatch(r"bytes=(\d+)-(\d*)", asked)):
            start, end = int(found[1]), int(found[2] or len(body) - 1)
            answer.headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
            body, status = body[start : end + 1], 206
        self.send_response(status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """The log is ``hub.log``."""


def _garbled(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else content
