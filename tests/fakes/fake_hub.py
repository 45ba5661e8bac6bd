"""A Hugging Face hub on loopback: serves local folders as model repos to the real client.

    with FakeHub({"suno/bark": toy_dir}, advertised={"text_2.pt": 5_350_000_000}) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}

It answers what huggingface_hub 2.4 asks when downloading: GET /api/models/ID[/revision/REV],
GET /api/models/ID/tree/REV, HEAD and GET /ID/resolve/REV/PATH with ranges. Large files are LFS
files (sha256 etag), sent without the redirect to a CDN and without xet. Every request is recorded.
Each repo has one commit, whatever revision is asked for, unless it is a commit hash unknown here.
"""

import hashlib
import json
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS_THRESHOLD = 1 << 20  # bytes; the hub stores larger files by LFS
CHUNK = 1 << 16
ERROR_CODES = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}  # X-Error-Code
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFile:
    """A file of a repo. `local` is None for an advertised file that cannot be served."""

    path: str
    size: int
    git_oid: str
    sha256: str | None
    local: Path | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.git_oid

    def tree_entry(self) -> dict[str, object]:
        entry = {"type": "file", "path": self.path, "size": self.size, "oid": self.git_oid}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry

    def sibling(self, with_size: bool) -> dict[str, object]:
        if not with_size:
            return {"rfilename": self.path}
        lfs = {"lfs": {"sha256": self.sha256, "size": self.size, "pointerSize": 134}}
        sized = {"rfilename": self.path, "size": self.size, "blobId": self.git_oid}
        return sized | (lfs if self.sha256 else {})


@dataclass(frozen=True)
class Request:
    """What the client asked: `path` is unquoted, without the query; `range` is the raw header."""

    method: str
    path: str
    query: str
    range: str | None


@dataclass(frozen=True)
class Repo:
    name: str
    files: dict[str, HubFile]
    commit: str


@dataclass
class _Faults:
    """What goes wrong. Keys are paths inside a repo; `cut` entries are used up by one GET."""

    status: int | None = None
    cut: dict[str, int] = field(default_factory=dict)
    hold: dict[str, tuple[int, threading.Event]] = field(default_factory=dict)
    hang: threading.Event | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take_cut(self, path: str) -> int | None:
        with self.lock:
            return self.cut.pop(path, None)


class FakeHub:
    """Serves `repos` (id -> folder) on a free loopback port while used as a context manager.

    `advertised` (path -> bytes) adds files to every repo that are listed but must not be asked
    for: a GET of one answers 500. Faults may be set and lifted at any time.
    """

    def __init__(self, repos: dict[str, Path], advertised: dict[str, int] | None = None) -> None:
        self.repos = {name: _repo(name, folder, advertised or {}) for name, folder in repos.items()}
        self.requests: list[Request] = []
        self.faults = _Faults()
        self._events: list[threading.Event] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for event in self._events:
            event.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, status: int | None) -> None:
        """Answer every request with this status (401, 403, 404, 503, ...); None heals.

        401 is what the hub answers a stranger who asks for a repo that is private or does not
        exist, 403 for a gated one.
        """
        self.faults.status = status

    def cut(self, path: str, after: int) -> None:
        """Close the connection of the next GET of `path` at byte `after` of the file, once."""
        self.faults.cut[path] = after

    def hold(self, path: str, after: int = 0) -> threading.Event:
        """Send no byte of `path` from position `after` on until the returned event is set.

        The client gives up a silent connection after HF_HUB_DOWNLOAD_TIMEOUT (10 s) and asks again
        from where it was; the hold still applies.
        """
        event = self._event()
        self.faults.hold[path] = (after, event)
        return event

    def hang(self) -> threading.Event:
        """Accept requests but answer none until the returned event is set."""
        self.faults.hang = self._event()
        return self.faults.hang

    def downloads(self, path: str) -> list[Request]:
        """The GET requests for one file, in order."""
        suffix = f"/{path}"
        return [r for r in list(self.requests) if r.method == "GET" and r.path.endswith(suffix)]

    def _event(self) -> threading.Event:
        self._events.append(threading.Event())
        return self._events[-1]


def _repo(name: str, folder: Path, advertised: dict[str, int]) -> Repo:
    local = sorted(p for p in folder.rglob("*") if p.is_file())
    files = [_local_file(path, path.relative_to(folder).as_posix()) for path in local]
    for path, size in advertised.items():
        digest = hashlib.sha256(path.encode()).hexdigest()
        files.append(HubFile(path, size, digest[:40], digest, None))
    commit = hashlib.sha1("".join(f.path + f.etag for f in files).encode()).hexdigest()
    return Repo(name, {file.path: file for file in files}, commit)


def _local_file(local: Path, path: str) -> HubFile:
    """Git's blob id for every file; a sha256 as well for those that LFS would hold."""
    content = local.read_bytes()
    git_oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    sha256 = hashlib.sha256(content).hexdigest() if len(content) > LFS_THRESHOLD else None
    return HubFile(path, len(content), git_oid, sha256, local)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: FakeHub

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error here."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub: FakeHub = self.server.hub
        url = urlsplit(self.path)
        path = unquote(url.path)
        asked = Request(self.command, path, url.query, self.headers.get("Range"))
        hub.requests.append(asked)
        if hub.faults.hang:
            hub.faults.hang.wait()
        if hub.faults.status:
            self._error(hub.faults.status, ERROR_CODES.get(hub.faults.status, ""))
        elif path == "/api/agent-harnesses":
            self._json({"standardEnvVars": [], "harnesses": {}})
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"), url.query)
        else:
            self._resolve(path)

    do_HEAD = do_GET

    def _api(self, path: str, query: str) -> None:
        name, what, rest = _split(path, r"revision|tree")
        repo = self._find_repo(name, rest.split("/")[0])
        if repo is None:
            return
        if what == "tree":
            self._tree(repo, rest.partition("/")[2])
            return
        sized = "blobs=" in query
        siblings = [file.sibling(sized) for file in repo.files.values()]
        info = {"id": name, "modelId": name, "sha": repo.commit, "siblings": siblings}
        self._json({**info, "private": False, "gated": False, "tags": []}, repo)

    def _tree(self, repo: Repo, folder: str) -> None:
        """All files below `folder`, always recursive and without entries for folders."""
        inside = f"{folder}/" if folder else ""
        entries = [f.tree_entry() for path, f in repo.files.items() if path.startswith(inside)]
        if entries:
            self._json(entries, repo)
        else:
            self._error(404, "EntryNotFound", repo)

    def _resolve(self, path: str) -> None:
        name, what, rest = _split(path.removeprefix("/"), "resolve")
        revision, _, filename = rest.partition("/")
        repo = self._find_repo(name, revision) if what else self._error(404, "RepoNotFound")
        if repo is None:
            return
        file = repo.files.get(filename)
        if file is None:
            self._error(404, "EntryNotFound", repo)
        elif file.local is None and self.command == "GET":
            self._error(500, "", repo)
        else:
            self._send_file(file, repo)

    def _find_repo(self, name: str, revision: str) -> Repo | None:
        """The repo, or None after answering 404 as the hub does."""
        repo = self.server.hub.repos.get(name)
        if repo is None:
            self._error(404, "RepoNotFound")
        elif COMMIT.fullmatch(revision) and revision != repo.commit:
            self._error(404, "RevisionNotFound", repo)
            return None
        return repo

    def _send_file(self, file: HubFile, repo: Repo) -> None:
        start = _range_start(self.headers.get("Range"))
        if start and start >= file.size:
            self._error(416, "", repo)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{file.size - 1}/{file.size}")
        if file.sha256:
            self.send_header("X-Linked-Size", str(file.size))
            self.send_header("X-Linked-Etag", f'"{file.sha256}"')
        self.send_header("ETag", f'"{file.etag}"')
        self.send_header("X-Repo-Commit", repo.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(file.size - start))
        self.end_headers()
        if self.command == "GET":
            self._send_body(file, start)

    def _send_body(self, file: HubFile, start: int) -> None:
        """Bytes from `start` on; a hold and a cut are positions in the file."""
        faults: _Faults = self.server.hub.faults
        cut = faults.take_cut(file.path)
        held, event = faults.hold.get(file.path, (0, None))
        end = file.size if cut is None else max(cut, start)
        content = memoryview(file.local.read_bytes())
        if event:
            self._write(content[start : min(held, end)])
            event.wait()
            start = max(start, min(held, end))
        self._write(content[start:end])
        if cut is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _write(self, content: memoryview) -> None:
        """In small pieces, so that a client that hangs up ends it early."""
        try:
            for at in range(0, len(content), CHUNK):
                self.wfile.write(content[at : at + CHUNK])
        except ConnectionError:
            self.close_connection = True

    def _json(self, content: object, repo: Repo | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        if repo:
            self.send_header("X-Repo-Commit", repo.commit)
        self._finish(body)

    def _error(self, status: int, code: str, repo: Repo | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
        if repo:
            self.send_header("X-Repo-Commit", repo.commit)
        self._finish(json.dumps({"error": code or str(status)}).encode())

    def _finish(self, body: bytes) -> None:
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the hub's `requests` tell."""


def _split(path: str, words: str) -> tuple[str, str, str]:
    """'suno/bark/tree/main' at one of `words` -> ('suno/bark', 'tree', 'main')."""
    match = re.fullmatch(rf"(.+?)/({words})/(.*)", path)
    return match.groups() if match else (path, "", "")


def _range_start(header: str | None) -> int:
    """0 without a Range; the client only ever asks for 'bytes=N-'."""
    match = re.fullmatch(r"bytes=(\d+)-\d*", header or "")
    return int(match[1]) if match else 0
