"""Byte ranges of local and remote files; remote reads are tried again for a bounded time.

The hub's client tries again by itself for about half a minute, uncounted, and takes a short answer for a whole one.
Training must outlast longer storms, must end before the process group's timeout, and must not decode half a row group.
So each read is one request here, its length is checked, and the waits between tries are ours.
"""

import contextlib
import hashlib
import importlib
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import fsspec

from xception_pl.data.config import SILENCE_SECONDS
from xception_pl.data.errors import DataError, SourceUnreachable

T = TypeVar("T")
R = TypeVar("R")
RETRY_SECONDS = 300.0
"""How long a read is tried: below the process groups' timeouts (10 minutes for NCCL)."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_NAMES_A_REQUEST = 500
_FOR_A_WHILE = {408, 425, 429, 500, 502, 503, 504}

faults: Counter[str] = Counter()
"""Failed tries of this process by kind, since they were last asked for."""

_etags: dict[str, str] = {}  # of each hub file that this process, or the one it was forked from, has read

_log = logging.getLogger(__name__)


class _Again(Exception):
    """This try failed, the next may not."""

    def __init__(self, kind: str, wait: float = 0.0) -> None:
        super().__init__(kind)
        self.kind, self.wait = kind, wait


def read_range(path: str, start: int, stop: int, retry_seconds: float = RETRY_SECONDS) -> bytes:
    """Bytes [start, stop) of a file, through the file system that `datasets` uses for it.

    Raises:
        DataError: when the file is not there or not for us, or every try for `retry_seconds` failed; of a remote file,
            the last two are SourceUnreachable.
    """
    began, wait, tries = time.monotonic(), _FIRST_WAIT, 0
    while True:
        tries += 1
        try:
            data = _read(path, start, stop)
            if len(data) == stop - start:
                return data
            raise _Again(f"{len(data)} of {stop - start} bytes")
        except _Again as fault:
            kind = fault.kind if "bytes" not in fault.kind else "short answer"
            faults[kind] += 1
            pause = max(
                fault.wait, wait * random.uniform(0.5, 1.0)
            )  # jitter: a node's readers must not come back at once
            spent = time.monotonic() - began
            if spent + pause > retry_seconds:
                kind_of_error = SourceUnreachable if "://" in path else DataError
                raise kind_of_error(
                    f"Cannot read {path}: {tries} tries in {spent:.0f} s failed, the last with {fault.kind}; "
                    "resume when the source answers again, or mirror the data and give the folder as data.source."
                ) from fault
            if faults[kind] == 1:
                _log.warning("Reading %s failed (%s): trying again for up to %d s.", path, fault.kind, retry_seconds)
            time.sleep(pause)
            wait = min(2 * wait, _LONGEST_WAIT)


def each(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`function` of each item, in order, in threads; after a failure no other is begun.

    Of a source that is away each thread's first read fails, after all its tries; a second one would double the time.
    """
    failed = threading.Event()

    def one(item: T) -> R:
        if failed.is_set():
            raise RuntimeError("not begun")  # the error of an item before this one is what is seen
        try:
            return function(item)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(one, items)


def new_faults() -> dict[str, int]:
    """Failed tries of this process since the last call, by kind."""
    new = dict(faults)
    faults.clear()
    return new


def file_size(path: str) -> int:
    """Length of a file in bytes; raises DataError when it is not there."""
    fs, name = fsspec.core.url_to_fs(path)
    try:
        with answered(path) if path.startswith("hf://") else contextlib.nullcontext():
            return int(fs.size(name))
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there.") from error


def _read(path: str, start: int, stop: int) -> bytes:
    if path.startswith("hf://"):
        return _read_hub(path, start, stop)
    fs, name = fsspec.core.url_to_fs(path)
    try:
        with fs.open(name, "rb", **({} if "file" in fs.protocol else {"cache_type": "none"})) as file:
            file.seek(start)
            return bytes(file.read(stop - start))
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"Cannot read {path}: {error.strerror or type(error).__name__}.") from error
    except (OSError, TimeoutError) as error:
        raise _Again(f"{type(error).__name__}: {error}") from error


def _read_hub(path: str, start: int, stop: int) -> bytes:
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    repo, revision, name = hub_parts(path)
    url = hf_hub_url(repo, name, repo_type="dataset", revision=revision, endpoint=constants.ENDPOINT)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
    try:
        response = get_session().get(url, headers=headers, timeout=SILENCE_SECONDS)
        hf_raise_for_status(response)
    except _transport_error() as error:
        raise _Again(type(error).__name__) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in _FOR_A_WHILE:
            raise _Again(str(status), _asked_wait(error.response.headers.get("Retry-After"))) from error
        raise refusal(path, status) from error
    etag = _etag([*response.history, response])
    if etag and _etags.setdefault(path, etag) != etag:
        raise _Again(
            "changed ETag"
        )  # parts of two files: a stale copy somewhere, or the commit's history was rewritten
    return bytes(response.content)


def _etag(responses: Sequence[Any]) -> str:
    """The hub's own hash of a file: of the answer that redirects to a storage, whose own ETag is another."""
    names = [response.headers.get("X-Linked-ETag") for response in responses] + [responses[0].headers.get("ETag")]
    return next((name for name in names if name), "")


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of one commit and what the hub says of it."""

    url: str
    size: int
    """Bytes."""
    sha256: str | None
    """Of the content; None for small files, of which the hub keeps git's hash alone."""
    git_hash: str
    """SHA-1 of git's blob, for files with no `sha256`."""

    def matches(self, path: Path) -> bool:
        """Whether a local file has this content."""
        if path.stat().st_size != self.size:
            return False
        head = b"" if self.sha256 else f"blob {self.size}\0".encode()
        digest = hashlib.new("sha256" if self.sha256 else "sha1", head, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest() == (self.sha256 or self.git_hash)


def hub_files(urls: Sequence[str]) -> tuple[str, list[HubFile]]:
    """The commit that hub files are of, and size and hash of each, in their order.

    Raises:
        DataError: the hub refuses.
        SourceUnreachable: it cannot be reached, or not with this token.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

    parts = [hub_parts(url) for url in urls]
    (repo, commit), *others = {(repo, commit) for repo, commit, _ in parts}
    assert not others, "the files of a split are of one commit"
    names = [name for _, _, name in parts]
    found: dict[str, RepoFile] = {}
    try:
        for start in range(0, len(names), _NAMES_A_REQUEST):
            asked = names[start : start + _NAMES_A_REQUEST]
            entries = HfApi().get_paths_info(repo, asked, revision=commit, repo_type="dataset")
            found |= {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    except HfHubHTTPError as error:
        raise refusal(urls[0], error.response.status_code) from error
    except _transport_error() as error:
        raise SourceUnreachable(
            f"The hub cannot be reached to list {repo} ({type(error).__name__}): try again."
        ) from error
    return commit, [
        HubFile(url=url, size=entry.size, sha256=entry.lfs.sha256 if entry.lfs else None, git_hash=entry.blob_id)
        for url, entry in zip(urls, (found[name] for name in names), strict=True)
    ]


def _transport_error() -> type[Exception]:
    """What the hub's client raises when there is no answer."""
    from huggingface_hub import get_session

    # it went from requests to httpx to httpx2: ask the session whose errors it raises
    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    kind: type[Exception] = getattr(library, "TransportError", None) or library.RequestException
    return kind


@contextlib.contextmanager
def answered(path: str) -> Iterator[None]:
    """Turns what the hub's client raises, when the hub does not answer or refuses, into one sentence."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except FileNotFoundError:
        raise
    except HfHubHTTPError as error:
        raise refusal(path, error.response.status_code) from error
    except _transport_error() as error:
        raise SourceUnreachable(f"The hub does not answer for {path} ({type(error).__name__}): try again.") from error


def refusal(path: str, status: int) -> DataError:
    """What to do when the hub refuses a file for good."""
    dataset = hub_parts(path)[0]
    if status == 401:
        return SourceUnreachable(
            f"The dataset {dataset} is gated or private and no token was given: accept its terms at "
            f"https://huggingface.co/datasets/{dataset}, then run `hf auth login` or set HF_TOKEN."
        )
    if status == 403:
        return SourceUnreachable(
            f"The token given has no access to the dataset {dataset}: accept its terms at "
            f"https://huggingface.co/datasets/{dataset} with the same account."
        )
    if status == 404:
        return DataError(
            f"{path} is gone from the hub: that commit's history was rewritten; name another in data.revision."
        )
    kind = SourceUnreachable if status in _FOR_A_WHILE else DataError
    return kind(f"The hub refuses {path} with status {status}.")


def hub_parts(path: str) -> tuple[str, str, str]:
    """Repository, commit and file of hf://datasets/REPOSITORY@COMMIT/FILE, as `datasets` lists a hub set's files."""
    repo, _, rest = path.removeprefix("hf://datasets/").partition("@")
    revision, _, name = rest.partition("/")
    return repo, unquote(revision), name


def _asked_wait(retry_after: str | None) -> float:
    return float(retry_after) if retry_after is not None and retry_after.isdigit() else 0.0
