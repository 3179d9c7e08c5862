"""A Hugging Face hub on this machine: its protocol over HTTP for one repository, requests counted.

With HF_ENDPOINT set to its `url`, `load_dataset("ILSVRC/imagenet-1k", streaming=True)` and a recipe run against it unchanged.
"""

import functools
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class LoopbackHub:
    """Serves the files of a folder as the dataset, or model, `repo`, whose newest commit is `commit`.

    Tests override `folder_of`, `refusal`, `spoilt` and `taken`.
    """

    folder: Path
    repo: str = "ILSVRC/imagenet-1k"
    kind: str = "dataset"
    commit: str = "a" * 40
    bytes_read: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._lock = threading.Lock()
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def folder_of(self, revision: str) -> Path | None:
        """The files of a revision; None where there is no such revision."""
        return self.folder if revision in ("main", self.commit, self.commit[:7]) else None

    def refusal(self, bearer: str | None) -> tuple[int, str] | None:
        """Status and error code for one who wants a file with this token; None where it is given."""
        return None

    def spoilt(self, request: BaseHTTPRequestHandler, data: bytes) -> bool:
        """Whether a read was answered badly, here, instead of with `data`."""
        return False

    def taken(self, path: str, body: bytes) -> object:
        """The answer to a request that only a hub that takes files knows; None where this one does not."""
        return None

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
        """Clients end, are killed or give up: no traceback."""


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[LoopbackHub]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are written apart: a reused connection would wait for 40 ms

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
        bearer = self.headers.get("Authorization")
        refusal = hub.refusal(bearer.removeprefix("Bearer ") if bearer else None)
        api = f"/api/{hub.kind}s/{hub.repo}"
        files = f"{'' if hub.kind == 'model' else f'/{hub.kind}s'}/{hub.repo}/resolve/"
        if path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            folder = hub.folder_of(revision)
            if folder is None:
                self._error(404, "RevisionNotFound")
            elif refusal is not None:
                self._error(*refusal)
            else:
                self._file(name, folder)
        elif (answer := hub.taken(path, body)) is not None:
            self._json(answer)
        elif path == api or path.startswith(f"{api}/"):
            kind, _, rest = path.removeprefix(api).strip("/").partition("/")
            hub.counted(f"api/{kind}")
            revision, _, inside = rest.partition("/")
            if kind in ("revision", "tree", "paths-info") and hub.folder_of(revision) is None:
                self._error(404, "RevisionNotFound")
            elif kind in ("", "revision"):
                self._json(self._info())
            elif kind == "tree":
                self._tree(inside, recursive="recursive=true" in self.path.lower())
            elif kind == "paths-info":
                wanted = set(parse_qs(body.decode())["paths"])
                entries = [self._entry(file) for file in hub.files() if hub.name(file) in wanted]
                self._json(entries + [_folder(name) for name in sorted(wanted & self._folders())])
            else:
                self._error(404, "EntryNotFound")
        else:
            hub.counted("elsewhere")
            self._error(401 if "/api/" in path else 404, "RepoNotFound")

    def _info(self) -> dict[str, object]:
        hub = self.hub
        return {
            "_id": "0" * 24,
            "id": hub.repo,
            "sha": hub.commit,
            "private": False,
            "gated": "auto" if hub.refusal(None) else False,
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
            if hub.spoilt(self, data):
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
    stat = file.stat()
    return _sha256(file, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256(file: Path, size: int, changed: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
