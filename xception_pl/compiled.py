"""C files as shared libraries, compiled once for this machine on first use, a second or two.

The result is kept in the user's cache folder, where other processes find it.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC")


class Unavailable(Exception):
    """Why native code cannot be used here, in a few words."""


def compiled(source: Path, flags: tuple[str, ...] = ()) -> Path:
    """Path of the shared library of one C file for this processor, compiled now if it is not in the cache.

    Args:
        source: the C file.
        flags: for the compiler, besides those for any shared library.

    Raises:
        Unavailable: no C compiler, one that refuses the file, or no folder to keep the result in.
    """
    flags = (*FLAGS, *flags)
    key = hashlib.sha256(source.read_bytes() + repr((flags, _processor())).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xception_pl"
    target = cache / f"{source.stem}-{key}.so"
    if target.exists():
        return target
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("there is no C compiler (cc, gcc or clang)")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / target.name
            for attempt in ((*flags, "-march=native"), flags):  # not every compiler knows the processor
                command = [compiler, *attempt, str(source), "-o", str(built), "-lm", "-ldl"]
                done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
                if done.returncode == 0:
                    built.replace(target)  # whole or not at all, for processes that do the same now
                    return target
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{source.name} cannot be compiled in {cache}: {error}") from error
    raise Unavailable(f"{compiler} does not compile {source.name}: {done.stderr.strip()[:200]}")


def _processor() -> str:
    """What -march=native depends on; a home folder may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return platform.machine() + next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.processor()
    )
