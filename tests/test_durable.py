"""Files are the old ones or the new ones, never anything between."""

import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xception_pl import XceptionModule
from xception_pl.durable import CannotWrite, durable_write, write_text
from xception_pl.run.checkpoints import DurableCheckpointIO
from xception_pl.run.metrics_csv import MetricsCsv, read_metrics
from xception_pl.weights.safetensors import save_weights

KILL = """
import os, signal, sys, xception_pl.durable as durable
from pathlib import Path
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
at = sys.argv[1]
if at == "in a write":
    def half(self, data, write=durable._File.write):
        write(self, bytes(data)[: len(data) // 2])
        die()
    durable._File.write = half
else:
    setattr(os, at, die)
with durable.durable_write(Path("file")) as file:
    file.write(b"new" * 100_000)
"""


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow above 100 kB: writes fail as on a full disk, with another reason."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder with one file `kept`, on a file system mounted read-only (root may write to any other)."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    (folder / "kept").write_text("old")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_write_replaces_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "file"
    write_text(target, "é")
    write_text(target, "ü")
    assert target.read_bytes() == "ü".encode()
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_the_folder_is_flushed_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    fsync, replace = os.fsync, os.replace
    names = lambda number: os.readlink(f"/proc/self/fd/{number}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(names(number)), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    write_text(tmp_path / "file", "x")
    assert done == [str(tmp_path / "file.partial"), "rename", str(tmp_path)]


@pytest.mark.parametrize("moment", ["in a write", "fsync", "replace"])
def test_kill_9_leaves_the_old_file(tmp_path: Path, moment: str) -> None:
    (tmp_path / "file").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILL, moment], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_bytes() == b"old"
    write_text(tmp_path / "file", "next")  # what the killed one left is no hindrance
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(CannotWrite) as caught, durable_write(target) as file:
        file.write(bytes(200_000))
    assert str(caught.value) == f"{target} cannot be written: File too large; what was there before is untouched."
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_a_read_only_folder_is_said(read_only: Path) -> None:
    with pytest.raises(CannotWrite, match="kept cannot be written: Read-only file system; what was there"):
        write_text(read_only / "kept", "new")
    with pytest.raises(CannotWrite, match="Read-only file system"):
        write_text(read_only / "folder" / "file", "new")
    assert (read_only / "kept").read_text() == "old"


def test_an_error_of_the_writer_itself_passes_through(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), durable_write(tmp_path / "file") as file:
        file.write(b"new" * (1 // 0))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_a_checkpoint_that_does_not_read_back_never_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "last.ckpt"
    checkpoints = DurableCheckpointIO()
    checkpoints.save_checkpoint({"weight": torch.arange(1000)}, target)

    def flip_a_bit(content: dict[str, torch.Tensor], file: io.BufferedWriter, save=torch.save) -> None:
        inside = io.BytesIO()
        save(content, inside)
        raw = bytearray(inside.getvalue())
        raw[raw.index(content["weight"].numpy().tobytes()) + 17] ^= 4
        file.write(raw)

    monkeypatch.setattr(torch, "save", flip_a_bit)
    with pytest.raises(CannotWrite, match="does not read back"):
        checkpoints.save_checkpoint({"weight": torch.arange(1000, 2000)}, target)
    assert torch.equal(torch.load(target)["weight"], torch.arange(1000))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_that_a_resume_would_refuse_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="does not read back"):
        DurableCheckpointIO().save_checkpoint({"hook": io.StringIO}, tmp_path / "last.ckpt")


def test_each_writer_of_a_run_keeps_the_old_file_on_a_full_disk(tmp_path: Path, small_disk: None) -> None:
    small, large = torch.zeros(10), torch.zeros(100_000)
    checkpoints = DurableCheckpointIO()
    checkpoints.save_checkpoint({"weight": small}, tmp_path / "last.ckpt")
    with pytest.raises(CannotWrite, match=r"last\.ckpt cannot be written: File too large"):
        checkpoints.save_checkpoint({"weight": large}, tmp_path / "last.ckpt")
    assert torch.equal(torch.load(tmp_path / "last.ckpt")["weight"], small)

    module = XceptionModule({"num_classes": 2, "width": 0.05, "middle_blocks": 1})
    (tmp_path / "averaged.safetensors").write_bytes(b"old")
    with pytest.raises(CannotWrite, match=r"averaged\.safetensors cannot be written: File too large"):
        save_weights(module, tmp_path / "averaged.safetensors")
    assert (tmp_path / "averaged.safetensors").read_bytes() == b"old"


@pytest.mark.parametrize("columns", ["the same columns", "new columns"])
def test_rows_of_metrics_wait_for_room(tmp_path: Path, columns: str) -> None:
    """Neither a full disk nor half a row: training goes on, and the rows come when there is room again."""
    log, limits = MetricsCsv(tmp_path / "metrics.csv"), resource.getrlimit(resource.RLIMIT_FSIZE)
    log.log_metrics({"loss": 1.0}, step=1)
    second = {"loss": 2.0} if columns == "the same columns" else {"loss": 2.0, "top1": 0.5}
    room = (tmp_path / "metrics.csv").stat().st_size + 3
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.warns(UserWarning, match="Rows are kept until it can be"):
            log.log_metrics(second, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 1, "loss": 1}]
    log.log_metrics({"loss": 3.0}, step=3)
    assert read_metrics(tmp_path / "metrics.csv") == [
        {"step": 1, "loss": 1},
        {"step": 2, **second},
        {"step": 3, "loss": 3},
    ]


def test_weights_are_read_back_as_written(tmp_path: Path) -> None:
    module = XceptionModule({"num_classes": 2, "width": 0.05, "middle_blocks": 1})
    save_weights(module, tmp_path / "w.safetensors")
    stored = load_file(tmp_path / "w.safetensors")
    for name, value in module.evaluated.state_dict().items():
        assert torch.equal(stored[name], value)
