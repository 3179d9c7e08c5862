"""A mirror of the loopback hub: the same bytes or smaller images, whole or not there, killed and gone on."""

import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem
from PIL import Image

from tests.data.test_hub import IMAGENET, TRAIN, VAL, write_set
from tests.data.tracing import CLASSES, png
from tests.loopback_hub import LoopbackHub, reset, short, sometimes, status, truncated
from xception_pl.data import copying, fetch
from xception_pl.data.copying import Encoding, smaller
from xception_pl.data.decode import DecodeError
from xception_pl.data.source import ParquetSplit, open_split
from xception_pl.data.stream import open_reader
from xception_pl.mirror import main

SHARDS = 7


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    write_set(tmp_path / "hub")
    with LoopbackHub(tmp_path / "hub") as running:
        running.attract(monkeypatch, tmp_path / "hf")
        yield running
    HfFileSystem.clear_instance_cache()


def same_rows(folder: Path) -> None:
    """The folder is a source as it stands, with the rows of the hub in their order."""
    for name, rows in (("train", TRAIN), ("validation", VAL)):
        split = open_split(str(folder), name)
        assert split.images == rows
        read = open_reader(split).rows(list(range(rows)))
        assert [(row.data, row.labels) for row in read] == [(png(i), (i % CLASSES,)) for i in range(rows)]


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command line is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("error: ")
    return text


def test_a_mirror_is_a_source_and_a_second_run_reads_nothing(
    tmp_path: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mirror"
    assert main([IMAGENET, str(folder)]) == 0
    out = capsys.readouterr().out.splitlines()
    size = sum(file.stat().st_size for file in hub.files())
    assert out[0] == f"{IMAGENET} at commit {hub.commit}: {SHARDS} files, {size:,} bytes."
    assert out[1].startswith(f"{TRAIN + VAL} images in {SHARDS} files, {size:,} bytes, verified: use ")
    same_rows(folder)
    copies = {file.name: file.read_bytes() for file in (folder / "data").iterdir()}
    assert copies == {file.name: file.read_bytes() for file in hub.files()}
    before = hub.requests["read"]
    assert main([IMAGENET, str(folder)]) == 0
    assert hub.requests["read"] == before


def test_splits_can_come_one_after_another(
    tmp_path: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mirror"
    assert main([IMAGENET, str(folder), "--split", "validation"]) == 0
    assert len(list((folder / "data").iterdir())) == 2
    assert main([IMAGENET, str(folder), "--split", "train"]) == 0
    same_rows(folder)
    assert "no split 'tset'" in refused([IMAGENET, folder, "--split", "tset"], capsys)


@pytest.mark.parametrize("fault", [status(429, Retry_After="0"), status(503), truncated, short, reset])
def test_a_storm_of_faults_changes_nothing(
    tmp_path: Path, hub: LoopbackHub, fault: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "PIECE_BYTES", 2000)
    hub.faults.append(sometimes(2, fault))  # type: ignore[arg-type]
    assert main([IMAGENET, str(tmp_path / "mirror")]) == 0
    same_rows(tmp_path / "mirror")
    assert fetch.faults.total() >= SHARDS


def slowly(request: BaseHTTPRequestHandler, data: bytes) -> bool:
    time.sleep(0.1)
    return False


KILLED = """
import sys
from xception_pl.data import copying
from xception_pl.mirror import main
copying.PIECE_BYTES = 1000
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="copied"),
        pytest.param(["--longest", "2"], id="re-encoded", marks=pytest.mark.slow),
    ],
)
def test_killed_in_the_middle_it_goes_on_where_it_was(tmp_path: Path, options: list[str]) -> None:
    write_set(tmp_path / "hub")
    folder = tmp_path / "mirror"
    with LoopbackHub(tmp_path / "hub", faults=[slowly]) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", KILLED, IMAGENET, str(folder), "--workers", "2", *options]
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
            while first.poll() is None and sum(hub.bytes_read.values()) < 12_000:
                time.sleep(0.02)
            first.kill()
        assert first.returncode == -9
        assert not (folder / "data").exists()  # no source before it is whole
        hub.faults.clear()
        time.sleep(0.3)  # answers under way when it was killed
        read = sum(hub.bytes_read.values())
        subprocess.run(command, env=env, check=True, capture_output=True)
        whole = sum(file.stat().st_size for file in hub.files())
        assert sum(hub.bytes_read.values()) - read <= whole - read + 2 * 2 * 1000  # a piece a worker is lost, no more
    assert open_split(str(folder), "train").images == TRAIN
    assert sorted(file.name for file in (folder / ".mirror").iterdir()) == ["lock", "state.json"]
    if not options:
        same_rows(folder)


def test_damage_left_by_a_crash_is_found_and_mended(tmp_path: Path, hub: LoopbackHub) -> None:
    folder = tmp_path / "mirror"
    assert main([IMAGENET, str(folder)]) == 0
    damaged = folder / "data" / "train-00001-of-00005.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    unrecorded = folder / "data" / "train-00002-of-00005.parquet"
    unrecorded.write_bytes(b"\0" * unrecorded.stat().st_size)
    state = folder / ".mirror" / "state.json"
    record = json.loads(state.read_text())
    del record["files"][unrecorded.name]
    state.write_text(json.dumps(record))
    assert main([IMAGENET, str(folder)]) == 0
    same_rows(folder)


def test_what_differs_from_the_hubs_checksum_is_refused(
    tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = copying.read_range
    monkeypatch.setattr(copying, "read_range", lambda *span: whole(*span)[:-1] + b"?")
    assert "differs from the checksum" in refused([IMAGENET, tmp_path / "mirror"], capsys)
    assert not (tmp_path / "mirror" / "data").exists()


def test_images_become_smaller_and_rows_stay(tmp_path: Path, hub: LoopbackHub) -> None:
    shutil.rmtree(hub.folder)
    made = []
    for number, (width, height) in enumerate([(40, 30), (30, 40), (8, 6), (90, 20)]):
        out = io.BytesIO()
        Image.fromarray(np.full((height, width, 3), 10 * number, np.uint8)).save(out, "JPEG")
        made.append(out.getvalue())
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("ab"))})
    rows = {"image": [{"bytes": data, "path": "x"} for data in [*made, b"junk"]], "label": [0, 1, 0, 1, 0]}
    (hub.folder / "data").mkdir(parents=True)
    table = datasets.Dataset.from_dict(rows, features).data.table
    pq.write_table(table, hub.folder / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    for option, sizes in (
        ("--longest", [(20, 15), (15, 20), (8, 6), (20, 4)]),
        ("--shortest", [(27, 20), (20, 27), (8, 6), (90, 20)]),
    ):
        folder = tmp_path / option.strip("-")
        assert main([IMAGENET, str(folder), option, "20"]) == 0
        split = open_split(str(folder), "train")
        assert isinstance(split, ParquetSplit)
        assert split.rows.tolist() == [2, 2, 1]
        assert split.labels.names == ("a", "b")
        read = open_reader(split).rows(list(range(5)))
        assert [row.labels for row in read] == [(0,), (1,), (0,), (1,), (0,)]
        assert [Image.open(io.BytesIO(row.data)).size for row in read[:4]] == sizes
        assert (read[2].data, read[4].data) == (made[2], b"junk")  # small enough; unreadable: as they were


def test_quality_counts_and_junk_is_told() -> None:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(out, "PNG")
    sizes = [len(smaller(out.getvalue(), Encoding(side="longest", pixels=32, quality=q))) for q in (50, 95)]
    assert 1.5 * sizes[0] < sizes[1]
    with pytest.raises(DecodeError):
        smaller(b"junk", Encoding(side="longest", pixels=32))


def test_the_token_is_sent_and_never_written(
    tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.token = "hf_secret"
    assert "hf auth login" in refused([IMAGENET, tmp_path / "mirror"], capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main([IMAGENET, str(tmp_path / "mirror")]) == 0
    said = capsys.readouterr()
    assert "hf_secret" in hub.seen_tokens
    assert "hf_secret" not in said.out + said.err
    assert not any(b"hf_secret" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_a_moved_branch_is_not_mixed_in(tmp_path: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mirror"
    assert main([IMAGENET, str(folder), "--split", "validation", "--revision", hub.commit]) == 0
    hub.commit, first = "b" * 40, hub.commit
    assert f"commit {first}" in refused([IMAGENET, folder, "--revision", "main"], capsys)
    assert "no revision" in refused([IMAGENET, folder], capsys)  # goes on with the first commit, which is gone here


def test_mistakes_are_one_sentence(
    tmp_path: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mirror"
    assert "--workers 0 is below 1" in refused([IMAGENET, folder, "--workers", "0"], capsys)
    assert "not within 1 to 100" in refused([IMAGENET, folder, "--longest", "9", "--quality", "0"], capsys)
    assert "no effect without" in refused([IMAGENET, folder, "--quality", "80"], capsys)
    assert "not allowed with" in refused([IMAGENET, folder, "--longest", "9", "--shortest", "9"], capsys)
    assert "does not exist on the hub" in refused(["nobody/nothing", folder], capsys)
    assert "is a local path" in refused([tmp_path, folder], capsys)
    assert "is not empty" in refused([IMAGENET, tmp_path], capsys)
    (tmp_path / "file").touch()
    assert "is not empty" in refused([IMAGENET, tmp_path / "file"], capsys)
    assert main([IMAGENET, str(folder), "--split", "validation"]) == 0
    assert "images as they are, not of" in refused([IMAGENET, folder, "--longest", "9"], capsys)
    with (folder / ".mirror" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "Another process is mirroring" in refused([IMAGENET, folder], capsys)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    assert "room for 0.0 GB" in refused([IMAGENET, folder], capsys)
