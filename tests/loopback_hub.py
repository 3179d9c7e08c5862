"""The loopback hub with what tests need: faults at will, a gated set, commits before the newest, small uploads.

The hub itself is `xception_pl.bench.loopback`: the data benchmark reads from it too.
"""

import base64
import itertools
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from xception_pl.bench import loopback
from xception_pl.data import fetch

Fault = Callable[[BaseHTTPRequestHandler, bytes], bool]
"""Given the request and the body that would be sent: answers it badly and returns True, or leaves it alone."""


@dataclass
class LoopbackHub(loopback.LoopbackHub):
    """`earlier` holds the files of commits before `commit`, which `main` is; their files are served, not listed.
    `faults` are asked in turn for every read of a file. `token`, when set, is demanded as the hub does for a gated set.
    """

    earlier: dict[str, Path] = field(default_factory=dict)
    token: str | None = None
    faults: list[Fault] = field(default_factory=list)
    seen_tokens: set[str] = field(default_factory=set)

    def folder_of(self, revision: str) -> Path | None:
        return self.earlier.get(revision) or super().folder_of(revision)

    def refusal(self, bearer: str | None) -> tuple[int, str] | None:
        if bearer is not None:
            self.seen_tokens.add(bearer)
        if self.token is None or bearer == self.token:
            return None
        return 401 if bearer is None else 403, "GatedRepo"

    def spoilt(self, request: BaseHTTPRequestHandler, data: bytes) -> bool:
        return any(fault(request, data) for fault in list(self.faults))

    def taken(self, path: str, body: bytes) -> object:
        """An upload, each file as text in the commit itself."""
        if path in ("/api/repos/create", "/api/validate-yaml"):
            return {"url": f"{self.url}/{self.repo}", "id": self.repo, "errors": [], "warnings": []}
        action = path.removeprefix(f"/api/{self.kind}s/{self.repo}/").partition("/")[0]
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
        if action != "commit":
            return None
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                file = self.folder / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
        commit = f"{self.url}/{self.repo}/commit/{self.commit}"
        return {"commitUrl": commit, "commitOid": self.commit, "hookOutput": ""}

    def attract(self, patch: pytest.MonkeyPatch, home: Path) -> None:
        """Turn the hub's client of this process here."""
        attract(self.url, patch, home)


def attract(url: str, patch: pytest.MonkeyPatch, home: Path) -> None:
    """Turn the hub's client of this process to a hub: what HF_ENDPOINT does when it is set before the first import."""
    patch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home))
    patch.setattr(datasets.config, "HF_ENDPOINT", url)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", home)
    patch.setattr(fetch, "_FIRST_WAIT", 0.01)
    patch.setattr(fetch, "_LONGEST_WAIT", 0.02)
    patch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    fetch.faults.clear()
    fetch._etags.clear()


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


def of(token: str, part: str, fault: Fault, after: int = 0) -> Fault:
    """A fault for those alone who come with this token, at each of their reads, after so many, of files with this in their names."""
    count = itertools.count()

    def maybe(request: BaseHTTPRequestHandler, data: bytes) -> bool:
        hit = request.headers["Authorization"] == f"Bearer {token}" and part in request.path and next(count) >= after
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


def changed(request: BaseHTTPRequestHandler, data: bytes) -> bool:
    """Bytes of another file, with its ETag: the lengths are the same."""
    request.send_response(206)
    request.send_header("Content-Length", str(len(data)))
    request.send_header("ETag", '"another"')
    request.end_headers()
    request.wfile.write(bytes(len(data)))
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
