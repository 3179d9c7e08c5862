"""Ranks in processes of their own, as torchrun would start them, forked from one that has imported everything once."""

import multiprocessing
import os
import pickle
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["xception_pl.training", "tests.processes"])
TIMEOUT = 300


def free_port() -> int:
    """Below those that the system gives to whoever asks for any: no other test's connection takes it before it is used."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def torchrun_environment(rank: int, world: int, port: int, nodes: int = 1) -> dict[str, str]:
    """What torchrun tells its processes, apart from its own store."""
    on_node = world // nodes
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(on_node),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % on_node),
        "GROUP_RANK": str(rank // on_node),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def on_ranks(world: int, function: Callable[..., Any], folder: Path, *arguments: Any, nodes: int = 1) -> list[Any]:
    """`function(rank, *arguments)` on each rank, in `folder`; what they returned, or the code they left with.

    What a rank prints is in `folder`/out RANK and err RANK.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    started = [
        _FORKS.Process(
            target=_rank, args=(rank, torchrun_environment(rank, world, port, nodes), folder, function, arguments)
        )
        for rank in range(world)
    ]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(TIMEOUT)
    finally:
        for process in started:
            process.kill()
    results = []
    for rank, process in enumerate(started):
        path = folder / f"result {rank}"
        results.append(pickle.loads(path.read_bytes()) if path.exists() else process.exitcode)
    return results


def printed(folder: Path, stream: str) -> str:
    """What all ranks printed to `out` or `err`, one after the other."""
    return "".join(path.read_text() for path in sorted(folder.glob(f"{stream} *")))


def _rank(
    rank: int, environment: Mapping[str, str], folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        opened = os.open(f"{name} {rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, stream.fileno())
    import torch

    multiprocessing.set_start_method(None, force=True)  # loader workers are forked, as in a process that nobody forked
    torch.set_num_threads(1)
    result = folder / f"result {rank}"
    result.unlink(missing_ok=True)
    result.write_bytes(pickle.dumps(function(rank, *arguments)))
