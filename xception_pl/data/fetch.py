"""Byte ranges of local and remote files; remote reads are tried again for a bounded time.

The hub's client tries again by itself for about half a minute, uncounted, and takes a short answer for a whole one.
Training must outlast longer storms, must end before the process group's timeout, and must not decode half a row group.
So each read is one request here, its length is checked, and the waits between tries are ours.
"""

import importlib
import logging
import random
import time
from collections import Counter
from urllib.parse import unquote

import fsspec

from xception_pl.data.errors import DataError

RETRY_SECONDS = 300.0
"""How long a read is tried: below the process groups' timeouts (10 minutes for NCCL)."""
SILENCE_SECONDS = 30.0
"""A connection without a byte for so long is given up and made anew."""

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_FOR_A_WHILE = {408, 425, 429, 500, 502, 503, 504}

faults: Counter[str] = Counter()
"""Failed tries of this process by kind, since they were last asked for."""

_log = logging.getLogger(__name__)


class _Again(Exception):
    """This try failed, the next may not."""

    def __init__(self, kind: str, wait: float = 0.0) -> None:
        super().__init__(kind)
        self.kind, self.wait = kind, wait


def read_range(path: str, start: int, stop: int, retry_seconds: float = RETRY_SECONDS) -> bytes:
    """Bytes [start, stop) of a file, through the file system that `datasets` uses for it.

    Raises:
        DataError: when the file is not there or not for us, or every try for `retry_seconds` failed.
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
            if not faults[kind]:
                _log.warning("Reading %s failed (%s): trying again for up to %d s.", path, fault.kind, retry_seconds)
            faults[kind] += 1
            pause = max(
                fault.wait, wait * random.uniform(0.5, 1.0)
            )  # jitter: a node's readers must not come back at once
            spent = time.monotonic() - began
            if spent + pause > retry_seconds:
                raise DataError(
                    f"Cannot read {path}: {tries} tries in {spent:.0f} s failed, the last with {fault.kind}; "
                    "resume when the source answers again, or mirror the data and give the folder as data.source."
                ) from fault
            time.sleep(pause)
            wait = min(2 * wait, _LONGEST_WAIT)


def new_faults() -> dict[str, int]:
    """Failed tries of this process since the last call, by kind."""
    new = dict(faults)
    faults.clear()
    return new


def file_size(path: str) -> int:
    """Length of a file in bytes; raises DataError when it is not there."""
    fs, name = fsspec.core.url_to_fs(path)
    try:
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

    repo, revision, name = _hub_parts(path)
    url = hf_hub_url(repo, name, repo_type="dataset", revision=revision, endpoint=constants.ENDPOINT)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
    session = get_session()
    # the hub's client went from requests to httpx to httpx2: ask the session whose errors it raises
    library = importlib.import_module(type(session).__module__.partition(".")[0])
    transport_error = getattr(library, "TransportError", None) or library.RequestException
    try:
        response = session.get(url, headers=headers, timeout=SILENCE_SECONDS)
        hf_raise_for_status(response)
    except transport_error as error:
        raise _Again(type(error).__name__) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in _FOR_A_WHILE:
            raise _Again(str(status), _asked_wait(error.response.headers.get("Retry-After"))) from error
        raise DataError(refusal(path, status)) from error
    return bytes(response.content)


def refusal(path: str, status: int) -> str:
    """What to do when the hub refuses a file for good."""
    dataset = _hub_parts(path)[0]
    if status == 401:
        return (
            f"The dataset {dataset} is gated or private and no token was given: accept its terms at "
            f"https://huggingface.co/datasets/{dataset}, then run `hf auth login` or set HF_TOKEN."
        )
    if status == 403:
        return (
            f"The token given has no access to the dataset {dataset}: accept its terms at "
            f"https://huggingface.co/datasets/{dataset} with the same account."
        )
    return f"The hub refuses {path} with status {status}."


def _hub_parts(path: str) -> tuple[str, str, str]:
    """Repository, commit and file of hf://datasets/REPOSITORY@COMMIT/FILE, as `datasets` lists a hub set's files."""
    repo, _, rest = path.removeprefix("hf://datasets/").partition("@")
    revision, _, name = rest.partition("/")
    return repo, unquote(revision), name


def _asked_wait(retry_after: str | None) -> float:
    return float(retry_after) if retry_after is not None and retry_after.isdigit() else 0.0
