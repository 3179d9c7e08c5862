"""Ranks that watch each other: one that dies, hangs or fails is named, and ends the others. Imports no library.

Each rank has a thread and a connection to rank 0, over which it says every half second that it lives and where it is;
rank 0 says the same to each. A process that is killed closes its connection, which is known at once; one that is stopped,
or whose machine is gone, is silent; one that hangs in a call goes on talking and makes no progress.
"""

import ctypes
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

LOST = 75
"""Exit code of a run that lost a rank: EX_TEMPFAIL of sysexits.h, try again."""
FAILED = 1
_BEAT_SECONDS = 0.5
_GRACE_SECONDS = 10.0
"""For which a rank whose connections broke waits to hear which other rank is the cause."""


@dataclass
class _Peer:
    """A rank as the one that watches it sees it. Silence is counted in beats of the watcher, which may be suspended too."""

    name: str
    connection: socket.socket
    received: bytes = b""
    silent: float = 0.0
    progress: int = 0
    where: str = "its start"
    done: bool = False
    unsaid: bytes = field(default=b"", repr=False)


class Watch:
    """One rank's part of the watch. Rank 0 calls `listen`, then every other rank `connect`; all call `close` at the end.

    Args:
        rank: This process among `world`.
        silence_seconds: After so long without a sign of life a rank counts as lost.
        stall_seconds: After so long without any rank's progress the one furthest behind counts as hung.
        children: Processes that this one started for other ranks; they end with it.
        at_loss: Called with the sentence before this process ends, on one rank of those that live.
        last_good: Rank 0's sentence on where a run that failed can go on.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        *,
        silence_seconds: float,
        stall_seconds: float,
        children: Callable[[], Sequence[subprocess.Popen[bytes]]] = lambda: (),
        at_loss: Callable[[str], None] = lambda sentence: None,
        last_good: Callable[[], str] = lambda: "",
    ) -> None:
        self.rank, self.world = rank, world
        self.silence_seconds, self.stall_seconds = silence_seconds, stall_seconds
        self._children, self._at_loss, self._last_good = children, at_loss, last_good
        self._name = f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"
        self._progress, self._where = 0, "its start"
        self._moved, self._still = 0, 0.0
        self._failure: str | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._listener: socket.socket | None = None
        self._peers: dict[int, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        os.register_at_fork(after_in_child=self._forget)  # loader workers must not hold a dead rank's connection open

    def listen(self) -> int:
        """Rank 0: starts to watch; returns the port that the others connect to."""
        self._listener = socket.create_server(("", 0), backlog=self.world)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._start()
        return int(self._listener.getsockname()[1])

    def connect(self, host: str, port: int) -> None:
        """Another rank: starts to watch and be watched."""
        connection = socket.create_connection((host, port), timeout=self.silence_seconds)
        self._add(0, "rank 0", connection)
        self._start()

    def at(self, where: str) -> None:
        """Notes progress: the main thread has come to `where`."""
        self._progress += 1
        self._where = where

    def fail(self, sentence: str) -> None:
        """Ends all ranks with one sentence, said once. Does not return."""
        self._failure = sentence
        time.sleep(_GRACE_SECONDS)
        self._exit(f"error: {self._name}: {sentence}", FAILED)

    def wait_for_cause(self) -> None:
        """Called when this rank's connections to others broke: does not return where another rank is the cause."""
        time.sleep(_GRACE_SECONDS)

    def close(self) -> None:
        """This rank is done, and needs no watching any more; children get half a minute to end."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        end = time.monotonic() + 30
        for child in self._children():
            try:
                child.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()

    # The thread

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        before = time.monotonic()
        beat = before
        while not self._closing.is_set():
            for key, _ in self._selector.select(max(0.0, beat - time.monotonic())):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._hear(key.data)
            now = time.monotonic()
            if now < beat:
                continue
            beat = now + _BEAT_SECONDS
            # While this process was suspended, with its terminal or its job, so were the others.
            self._judge(min(now - before, 2 * _BEAT_SECONDS))
            before = now
            self._tell_where()
        self._tell({"done": True})
        for peer in self._peers.values():
            peer.connection.close()
        if self._listener is not None:
            self._listener.close()

    def _accept(self) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        connection.settimeout(self.silence_seconds)
        hello = json.loads(connection.makefile().readline())
        self._add(hello["rank"], hello["name"], connection)
        self._tell_where()  # now, not at the next beat: should this process die before, its name is known

    def _add(self, rank: int, name: str, connection: socket.socket) -> None:
        if self.rank:
            connection.sendall(json.dumps({"rank": self.rank, "name": self._name}).encode() + b"\n")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self._peers[rank] = _Peer(name, connection)
        self._selector.register(connection, selectors.EVENT_READ, rank)

    def _hear(self, rank: int) -> None:
        peer = self._peers[rank]
        try:
            data = peer.connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(peer.connection)
            if not peer.done and not self._closing.is_set():
                self._lose(f"{peer.name} is gone; it was at {peer.where}.")
            return
        peer.silent = 0.0
        *lines, peer.received = (peer.received + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "progress" in said:
                peer.progress, peer.where = said["progress"], said["where"]
                peer.name = said.get("name", peer.name)
            elif "done" in said:
                peer.done = True
                if rank == 0:
                    self._closing.set()
            elif "failure" in said:
                self._fail(f"{peer.name}: {said['failure']}")
            elif "end" in said:
                self._exit("", said["code"])

    def _tell_where(self) -> None:
        self._tell({"progress": self._progress, "where": self._where, "name": self._name})

    def _tell(self, said: dict[str, object]) -> None:
        for peer in self._peers.values():
            try:
                peer.unsaid += json.dumps(said).encode() + b"\n"
                peer.unsaid = peer.unsaid[peer.connection.send(peer.unsaid) :]
            except OSError:  # full, or closed: both are heard of elsewhere
                pass

    def _judge(self, passed: float) -> None:
        """What a beat's worth of silence and standstill means."""
        if self._failure is not None:
            if self.rank:
                self._tell({"failure": self._failure})
            else:
                self._fail(f"{self._name}: {self._failure}")
        for child in self._children():
            if child.poll():
                self._lose(
                    f"process {child.pid}, which this one started for another rank, ended with {child.returncode}."
                )
        watched = {rank: peer for rank, peer in self._peers.items() if not peer.done}
        for peer in watched.values():
            peer.silent += passed
            if peer.silent > self.silence_seconds:
                self._lose(f"{peer.name} has been silent for {self.silence_seconds:g} s; it was at {peer.where}.")
        moved = self._progress + sum(peer.progress for peer in watched.values())
        self._still = 0.0 if moved != self._moved else self._still + passed
        self._moved = moved
        if self.rank == 0 and watched and self._still > self.stall_seconds:
            behind = min(watched.values(), key=lambda peer: peer.progress)
            name, where = (behind.name, behind.where)
            if self._progress < behind.progress:
                name, where = self._name, self._where
            self._lose(f"no rank made progress for {self.stall_seconds:g} s; furthest behind is {name}, at {where}.")

    def _lose(self, sentence: str) -> None:
        self._end(f"error: {sentence} The run ends, to go on from its last checkpoint.", LOST)

    def _fail(self, sentence: str) -> None:
        """On rank 0."""
        self._end(f"error: {sentence} {self._last_good()}".rstrip(), FAILED)

    def _end(self, sentence: str, code: int) -> None:
        """Rank 0 ends all ranks; where it is rank 0 that is lost, each rank ends itself and the first of each node says so."""
        if self.rank == 0:
            self._tell({"end": True, "code": code})
            time.sleep(2 * _BEAT_SECONDS)
        elif self.rank > 1 and os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID")) != "0":
            self._exit("", code)
        if code == LOST:
            print(sentence, file=sys.stderr, flush=True)
            self._at_loss(sentence)
            sentence = ""
        self._exit(sentence, code)

    def _exit(self, sentence: str, code: int) -> None:
        """Ends this process whatever its main thread waits for, and those that it started, which may be stopped."""
        if sentence:
            print(sentence, file=sys.stderr, flush=True)
        for child in self._children():
            if child.poll() is None:
                child.kill()
        sys.stdout.flush()
        os._exit(code)

    def _forget(self) -> None:
        for peer in self._peers.values():
            peer.connection.close()
        if self._listener is not None:
            self._listener.close()


def end_with_parent(number: int) -> None:
    """Has the kernel send this process a signal when the one that started it ends.

    SIGKILL ends it too; SIGCONT continues it, should it be stopped, so that it hears of the end.
    """
    try:
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    except (AttributeError, OSError):  # Linux alone
        return
