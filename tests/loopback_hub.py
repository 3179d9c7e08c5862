"""A Hugging Face hub on this machine: its protocol over HTTP for one repository, with faults at will and requests counted.

`HF_ENDPOINT=hub.url` lets `load_dataset("ILSVRC/imagenet-1k", streaming=True)` run unchanged against it.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import huggingface_hub
import pytest

from xception_pl.data import fetch

Fault = Callable[[BaseHTTPRequestHandler, bytes], bool]
"""Given the request and the body that would be sent: answers it badly and returns True, or leaves it alone."""


@dataclass
class LoopbackHub:
    """Serves the files of a folder as the dataset `repo`, or as a model, which takes small files too.

    `earlier` holds the files of commits before `commit`, which `main` is; their files are served, not listed.
    `faults` are asked in turn for every read of a file. `token`, when set, is demanded as the hub does for a gated set.
    """

    folder: Path
    repo: str = "ILSVRC/imagenet-1k"
    kind: str = "dataset"
    commit: str = "a" * 40
    earlier: dict[str, Path] = field(default_factory=dict)
    token: str | None = None
    faults: list[Fault] = field(default_factory=list)
    bytes_read: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    seen_tokens: set[str] = field(default_factory=set)

    def __enter__(self) -> Self:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._lock = threading.Lock()
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def attract(self, patch: pytest.MonkeyPatch, home: Path) -> None:
        """Turn the hub's client of this process here: what HF_ENDPOINT does when it is set before the first import."""
        patch.setattr(huggingface_hub.constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home))
        patch.setattr(datasets.config, "HF_ENDPOINT", self.url)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home)
        patch.setattr(fetch, "_FIRST_WAIT", 0.01)
        patch.setattr(fetch, "_LONGEST_WAIT", 0.02)
        patch.delenv("HF_TOKEN", raising=False)
        huggingface_hub.HfFileSystem.clear_instance_cache()
        fetch.faults.clear()

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def counted(self, kind: str, name: str = "", size: int = 0) -> None:
        with self._lock:
            self.requests[kind] += 1
            if name:
                self.reads[name] += 1
                self.bytes_read[name] += size


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed or give up are what is tested here: no traceback."""


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        bearer = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if bearer:
            hub.seen_tokens.add(bearer)
        api = f"/api/{hub.kind}s/{hub.repo}"
        files = f"{'' if hub.kind == 'model' else f'/{hub.kind}s'}/{hub.repo}/resolve/"
        if path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            if self._refused(revision, needs_access=True):
                return
            self._file(name, hub.earlier.get(revision, hub.folder))
        elif path == api or path.startswith(f"{api}/"):
            kind, _, rest = path.removeprefix(api).strip("/").partition("/")
            hub.counted(f"api/{kind}")
            revision, _, folder = rest.partition("/")
            if kind in ("preupload", "commit"):
                self._take(kind, body)
                return
            if kind in ("revision", "tree", "paths-info") and self._refused(revision):
                return
            if kind in ("", "revision"):
                self._json(self._info())
            elif kind == "tree":
                self._tree(folder, recursive="recursive=true" in self.path.lower())
            elif kind == "paths-info":
                wanted = set(parse_qs(body.decode())["paths"])
                entries = [self._entry(file) for file in hub.files() if hub.name(file) in wanted]
                self._json(entries + [_folder(name) for name in sorted(wanted & self._folders())])
            else:
                self._error(404, "EntryNotFound")
        elif path in ("/api/repos/create", "/api/validate-yaml"):
            self._json({"url": f"{hub.url}/{hub.repo}", "id": hub.repo, "errors": [], "warnings": []})
        else:
            hub.counted("elsewhere")
            self._error(401 if "/api/" in path else 404, "RepoNotFound")

    def _take(self, kind: str, body: bytes) -> None:
        """An upload, each file as text in the commit itself."""
        if kind == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
            return
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                path = self.hub.folder / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        commit = f"{self.hub.url}/{self.hub.repo}/commit/{self.hub.commit}"
        self._json({"commitUrl": commit, "commitOid": self.hub.commit, "hookOutput": ""})

    def _refused(self, revision: str, needs_access: bool = False) -> bool:
        if revision not in ("main", self.hub.commit, self.hub.commit[:7], *self.hub.earlier):
            self._error(404, "RevisionNotFound")
            return True
        if needs_access and self.hub.token is not None:
            given = self.headers.get("Authorization")
            if given != f"Bearer {self.hub.token}":
                self._error(401 if given is None else 403, "GatedRepo")
                return True
        return False

    def _info(self) -> dict[str, object]:
        hub = self.hub
        return {
            "_id": "0" * 24,
            "id": hub.repo,
            "sha": hub.commit,
            "private": False,
            "gated": "auto" if hub.token else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": hub.name(file)} for file in hub.files()],
        }

    def _tree(self, folder: str, recursive: bool) -> None:
        inside = f"{folder}/" if folder else ""
        files = [self._entry(file) for file in self.hub.files() if self.hub.name(file).startswith(inside)]
        entries = files + [_folder(name) for name in sorted(self._folders()) if name.startswith(inside)]
        if folder and not entries:
            self._error(404, "EntryNotFound")
            return
        self._json([e for e in entries if recursive or "/" not in str(e["path"]).removeprefix(inside)])

    def _folders(self) -> set[str]:
        return {str(parent) for file in self.hub.files() for parent in Path(self.hub.name(file)).parents} - {"."}

    def _entry(self, file: Path) -> dict[str, object]:
        size, lfs = file.stat().st_size, {}
        if file.suffix == ".parquet":  # a large file: the hub keeps its SHA-256 beside git's hash of a pointer to it
            lfs = {"lfs": {"oid": _etag(file), "size": size, "pointerSize": 134}}
        oid = hashlib.sha1(f"blob {size}\0".encode() + file.read_bytes()).hexdigest()
        return {"type": "file", "path": self.hub.name(file), "size": size, "oid": oid, **lfs}

    def _file(self, name: str, folder: Path) -> None:
        hub, file = self.hub, folder / name
        if not file.is_file():
            self._error(404, "EntryNotFound")
            return
        size = file.stat().st_size
        start, stop, status = 0, size, 200
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop, status = int(span[1]), min(size, int(span[2] or size) + 1), 206
        with file.open("rb") as opened:
            opened.seek(start)
            data = opened.read(stop - start)
        if self.command == "HEAD":
            hub.counted("head")
        else:
            hub.counted("read", name, len(data))
            if any(fault(self, data) for fault in list(hub.faults)):
                return
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{_etag(file)}"')
        self.send_header("X-Repo-Commit", hub.commit)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, answer: object) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.end_headers()
        self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _folder(name: str) -> dict[str, object]:
    return {"type": "directory", "path": name, "oid": "0" * 40}


def _etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def sometimes(every: int, fault: Fault, at_most: int = 10**9) -> Fault:
    """A fault at each `every`-th read."""
    count, lock = [0, 0], threading.Lock()

    def maybe(request: BaseHTTPRequestHandler, data: bytes) -> bool:
        with lock:
            count[0] += 1
            hit = count[0] % every == 0 and count[1] < at_most
            count[1] += hit
        return hit and fault(request, data)

    return maybe


def status(code: int, **headers: str) -> Fault:
    """An answer of this status without a body."""

    def fault(request: BaseHTTPRequestHandler, data: bytes) -> bool:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", "0")
        request.end_headers()
        return True

    return fault


def truncated(request: BaseHTTPRequestHandler, data: bytes) -> bool:
    """Half of the promised body, then the connection ends."""
    request.send_response(206)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data[: len(data) // 2])
    request.close_connection = True
    return True


def short(request: BaseHTTPRequestHandler, data: bytes) -> bool:
    """Half of the range, sent as if it were the whole."""
    request.send_response(206)
    request.send_header("Content-Length", str(len(data) // 2))
    request.end_headers()
    request.wfile.write(data[: len(data) // 2])
    return True


def reset(request: BaseHTTPRequestHandler, data: bytes) -> bool:
    """The connection ends without an answer."""
    request.close_connection = True
    request.connection.close()
    return True


def stall(seconds: float) -> Fault:
    """The head of an answer, then silence."""

    def fault(request: BaseHTTPRequestHandler, data: bytes) -> bool:
        request.send_response(206)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.flush()
        time.sleep(seconds)
        request.close_connection = True
        return True

    return fault
