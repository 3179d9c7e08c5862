"""The real path, `datasets` and the hub's client included, against a hub on this machine."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem

from tests.data.tracing import CLASSES, SaveAt, Tracer, features, png, trainer
from tests.loopback_hub import LoopbackHub, changed, reset, short, sometimes, stall, status, truncated
from xception_pl.bench.loopback import _Handler
from xception_pl.data import fetch, stream
from xception_pl.data.config import DataConfig
from xception_pl.data.datamodule import ImageNetDataModule
from xception_pl.data.errors import DataError, SourceUnreachable
from xception_pl.data.source import open_split
from xception_pl.data.stream import open_reader

IMAGENET = "ILSVRC/imagenet-1k"
TRAIN, VAL, GROUP = 203, 41, 9


def write_set(folder: Path) -> None:
    """ImageNet in small: 5 shards for training, 2 for validation, 9 images a row group, named as on the hub."""
    for split, rows, shards in (("train", TRAIN, 5), ("validation", VAL, 2)):
        for shard in range(shards):
            ids = range(shard * rows // shards, (shard + 1) * rows // shards)
            made = datasets.Dataset.from_dict(
                {
                    "image": [{"bytes": png(i), "path": f"{i}.png"} for i in ids],
                    "label": [i % CLASSES for i in ids],
                },
                features=features(),
            )
            path = folder / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(made.data.table, path, row_group_size=GROUP)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    write_set(tmp_path / "hub")
    with LoopbackHub(tmp_path / "hub") as running:
        running.attract(monkeypatch, tmp_path / "hf")
        yield running
    HfFileSystem.clear_instance_cache()


def config(tmp_path: Path, **changes: Any) -> DataConfig:
    made = {
        "source": IMAGENET,
        "image_size": 71,
        "train_crop": "resize",
        "eval_crop": "resize",
        "flip": False,
        "global_batch": 20,
        "eval_batch": 8,
        "shuffle_window": 64,
        "workers": 0,
        "cache_dir": str(tmp_path / "cache"),
        "retry_seconds": 20.0,
    }
    return DataConfig(**{**made, **changes})


def fit(tmp_path: Path, changed: DataConfig, **options: Any) -> Tracer:
    tracer, data, ckpt = Tracer(), ImageNetDataModule(changed, seed=1), options.pop("ckpt_path", None)
    trainer(tmp_path, **options).fit(tracer, data, ckpt_path=ckpt)
    return tracer


@pytest.mark.slow
def test_load_dataset_itself_runs_against_the_loopback_hub(tmp_path: Path) -> None:
    """In a process of its own, with nothing but HF_ENDPOINT set."""
    write_set(tmp_path / "hub")
    code = (
        "import datasets\n"
        f"rows = datasets.load_dataset({IMAGENET!r}, streaming=True)['train']\n"
        "print([row['label'] for row in rows.cast_column('image', datasets.Image(decode=False))])\n"
        "from xception_pl.data.datamodule import ImageNetDataModule\n"
        "print(ImageNetDataModule().train_images)\n"
    )
    with LoopbackHub(tmp_path / "hub") as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [str([i % CLASSES for i in range(TRAIN)]), str(TRAIN)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_reads_each_byte_once_and_later_epochs_nothing(tmp_path: Path, hub: LoopbackHub, workers: int) -> None:
    tracer = fit(tmp_path, config(tmp_path, workers=workers), max_epochs=3, limit_val_batches=0)
    epochs = [sum(tracer.seen[10 * e : 10 * e + 10], start=[]) for e in range(3)]  # noqa: RUF017
    assert all(len(ids) == len(set(ids)) == 200 for ids in epochs)
    groups = sum(-(-(((s + 1) * TRAIN // 5) - s * TRAIN // 5) // GROUP) for s in range(5))
    footers = 5
    assert sum(n for name, n in hub.reads.items() if "train" in name) <= groups + footers
    assert len(list((tmp_path / "cache").glob("*/*.arrow"))) <= groups


def test_evaluation_on_the_hub_counts_each_image_once(tmp_path: Path, hub: LoopbackHub) -> None:
    tracer = fit(tmp_path, config(tmp_path), max_epochs=1)
    assert sorted(tracer.evaluated) == list(range(VAL))


def test_little_room_only_makes_it_read_again(tmp_path: Path, hub: LoopbackHub) -> None:
    plenty = fit(tmp_path, config(tmp_path), max_epochs=2, limit_val_batches=0)
    groups = [file.stat().st_size for file in (tmp_path / "cache").glob("*/*.arrow")]
    small = config(tmp_path, cache_dir=str(tmp_path / "small"), cache_gb=4 * max(groups) / 1e9)
    assert fit(tmp_path, small, max_epochs=2, limit_val_batches=0).seen == plenty.seen
    assert sum(file.stat().st_size for file in (tmp_path / "small").glob("*/*.arrow")) <= 4 * max(groups)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (status(429, Retry_After="0"), "429"),
        (status(503), "503"),
        (truncated, "RemoteProtocolError"),
        (short, "short answer"),
        (reset, "RemoteProtocolError"),
        (changed, "changed ETag"),
    ],
    ids=["429", "503", "truncated", "short", "reset", "changed"],
)
def test_a_storm_of_faults_changes_nothing_but_the_count(
    tmp_path: Path, hub: LoopbackHub, fault: Any, kind: str
) -> None:
    split = open_split(IMAGENET, "train")
    hub.faults.append(sometimes(2, fault))
    rows = open_reader(split).rows(list(range(TRAIN)))
    assert [row.data for row in rows] == [png(i) for i in range(TRAIN)]
    assert fetch.faults[kind] >= 10


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_through_a_storm_sees_the_same_and_counts_the_faults(
    tmp_path: Path, hub: LoopbackHub, workers: int
) -> None:
    calm = fit(tmp_path, config(tmp_path), max_epochs=1, limit_val_batches=0).seen
    hub.faults.append(sometimes(2, status(503)))
    data = ImageNetDataModule(config(tmp_path, cache_dir=str(tmp_path / "other"), workers=workers), seed=1)
    tracer = Tracer()
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(tracer, data)
    assert tracer.seen == calm
    assert data.faults["503"] >= 5


def test_a_file_that_has_become_another_ends_the_run_with_one_sentence(tmp_path: Path, hub: LoopbackHub) -> None:
    """Never a batch of two files' parts: what was read before and what comes now do not fit."""
    data = ImageNetDataModule(config(tmp_path, retry_seconds=0.3))
    data.prepare()
    for file in hub.folder.rglob("train*.parquet"):
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(DataError, match=r"^Cannot read .*tries in .* the last with changed ETag; .*\.$"):
        next(iter(data.train_dataloader()))


def test_a_redirect_to_a_storage_is_known_by_the_hubs_own_hash() -> None:
    def answer(**headers: str) -> Any:
        return SimpleNamespace(headers={name.replace("_", "-"): value for name, value in headers.items()})

    storages = [answer(ETag="one"), answer(ETag="two")]
    assert {fetch._etag([answer(X_Linked_ETag="sha", ETag="of the answer"), storage]) for storage in storages} == {
        "sha"
    }
    assert fetch._etag([answer(ETag="git")]) == "git"
    assert fetch._etag([answer()]) == ""


def test_a_disk_too_full_for_footers_only_costs_another_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(where: str) -> None:
        Path(where).write_bytes(b"torn")
        raise OSError(errno.ENOSPC, "No space left on device")

    footer = SimpleNamespace(write_metadata_file=full)
    monkeypatch.setattr(stream, "read_footer", lambda path: footer)
    assert stream.kept_footer("hf://datasets/a/b@c/d.parquet", tmp_path / "cache/footers") is footer
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_footers_are_read_once_and_kept(tmp_path: Path, hub: LoopbackHub) -> None:
    for _ in range(2):
        assert ImageNetDataModule(config(tmp_path)).train_images == TRAIN
    assert hub.requests["read"] == 5


def test_kept_footers_need_a_folder(tmp_path: Path, hub: LoopbackHub) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^Nothing can be kept in .*/file .*set data.cache_dir to a folder"):
        ImageNetDataModule(config(tmp_path, cache_dir=str(tmp_path / "file"))).prepare()


def test_torn_kept_footers_are_read_again_and_kept_anew(tmp_path: Path, hub: LoopbackHub) -> None:
    assert ImageNetDataModule(config(tmp_path)).train_images == TRAIN
    first, second, *_ = kept = sorted((tmp_path / "cache").rglob("*.footer"))
    whole = [file.read_bytes() for file in kept]
    first.write_bytes(b"")
    second.write_bytes(whole[1][:4] + b"\xff" * (len(whole[1]) - 12) + whole[1][-8:])
    assert ImageNetDataModule(config(tmp_path)).train_images == TRAIN
    assert hub.requests["read"] == 5 + 2
    assert [file.read_bytes() for file in kept] == whole


def test_a_stall_is_cut_and_read_again(tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "SILENCE_SECONDS", 0.2)
    split = open_split(IMAGENET, "validation")
    hub.faults.append(sometimes(3, stall(1.0), at_most=2))
    rows = open_reader(split).rows(list(range(VAL)))
    assert [row.data for row in rows] == [png(i) for i in range(VAL)]
    assert fetch.faults["ReadTimeout"] == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hub_that_stays_away_ends_the_run_with_one_sentence(tmp_path: Path, hub: LoopbackHub, workers: int) -> None:
    """And its workers at once, though they could go on trying."""
    data = ImageNetDataModule(config(tmp_path, retry_seconds=0.3, workers=workers))
    data.prepare()
    hub.faults.append(status(503))
    loader = data.train_dataloader()
    with pytest.raises(SourceUnreachable, match=r"tries in \d+ s failed, the last with 503; .*mirror.*\.$") as error:
        next(iter(loader))
    assert "\n" not in str(error.value)
    for worker in getattr(loader._iterator, "_workers", []):
        worker.join(2)
        assert worker.exitcode == 0
    data.teardown()


def test_a_gated_set_says_what_to_do_and_keeps_the_token(
    tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "hf_secret"
    with pytest.raises(SourceUnreachable, match=r"gated.*accept its terms.*hf auth login") as error:
        open_split(IMAGENET, "train")
    assert "\n" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(SourceUnreachable, match=r"accept its terms.*same account") as error:
        open_split(IMAGENET, "train")
    assert "hf_other" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fit(tmp_path, config(tmp_path), max_epochs=1, limit_train_batches=1)
    assert "hf_secret" in hub.seen_tokens
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert written
    assert not any(b"hf_secret" in file.read_bytes() for file in written)


@pytest.mark.parametrize(
    ("source", "revision", "split", "says"),
    [
        ("nobody/nothing", None, "train", "nobody/nothing .*does not exist on the hub, or is private"),
        (IMAGENET, "b" * 40, "train", "no revision .*bbbb"),
        (IMAGENET, None, "test", r"no split 'test' .*\(it has train, validation\)"),
    ],
)
def test_what_is_not_on_the_hub_is_told_in_one_sentence(
    hub: LoopbackHub, source: str, revision: str | None, split: str, says: str
) -> None:
    with pytest.raises(DataError, match=says) as error:
        open_split(source, split, revision=revision)
    assert not isinstance(error.value, SourceUnreachable)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


def test_no_network_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceUnreachable, match=r"cannot be reached.*\.$") as error:
        open_split(IMAGENET, "train")
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_told_from_a_wrong_source(
    monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub
) -> None:
    silence = fetch._transport_error()("silence")

    def no_builder(*_: Any, **__: Any) -> None:
        raise silence

    monkeypatch.setattr(datasets, "load_dataset_builder", no_builder)
    with pytest.raises(SourceUnreachable, match=rf"^The hub does not answer for {IMAGENET} .*\.$"):
        open_split(IMAGENET, "train")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, SourceUnreachable), (403, SourceUnreachable), (503, SourceUnreachable), (404, DataError), (400, DataError)],
)
def test_a_refusal_is_of_the_source_or_of_the_one_who_asks(status: int, kind: type[DataError]) -> None:
    assert type(fetch.refusal(f"hf://datasets/{IMAGENET}@main/data/file", status)) is kind


def test_a_hub_that_fails_is_no_wrong_source(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub) -> None:
    monkeypatch.setattr(_Handler, "_answer", lambda request: request._error(500, "Failure"))
    waits: list[float] = []  # the client itself tries again for a while
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=waits.append))
    with pytest.raises(SourceUnreachable, match=r"does not answer for .*\.$"):
        open_split(IMAGENET, "train")
    assert waits


def test_a_file_that_the_hub_does_not_hand_over_is_no_wrong_source(hub: LoopbackHub) -> None:
    split = open_split(IMAGENET, "validation")
    hub.faults.append(status(503))
    with pytest.raises(SourceUnreachable, match="the last with 503"):
        open_reader(split, retry_seconds=0.1).rows([0])


def move_the_branch(hub: LoopbackHub) -> None:
    """`main` becomes another commit, whose files have the same names and other rows."""
    before = hub.folder.with_name("before")
    hub.folder.rename(before)
    hub.earlier[hub.commit], hub.commit = before, "b" * 40
    for file in before.rglob("*.parquet"):
        changed = hub.folder / file.relative_to(before)
        changed.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(file).slice(1), changed, row_group_size=GROUP)


def test_a_branch_that_moves_under_a_run_changes_nothing(tmp_path: Path, hub: LoopbackHub) -> None:
    """The commit is fixed when the source is resolved, though no revision was asked for."""
    calm = fit(tmp_path, config(tmp_path), max_epochs=1, limit_val_batches=0).seen
    data, tracer = ImageNetDataModule(config(tmp_path, cache_dir=str(tmp_path / "other")), seed=1), Tracer()
    data.prepare()
    first = hub.commit
    move_the_branch(hub)
    saved = SaveAt(4, tmp_path / "4.ckpt")
    trainer(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[saved]).fit(tracer, data)
    assert tracer.seen == calm[:4]
    assert data.commit == first
    assert open_split(IMAGENET, "train").images == TRAIN - 5


def test_resuming_on_another_commit_is_refused(tmp_path: Path, hub: LoopbackHub) -> None:
    fit(tmp_path, config(tmp_path), max_epochs=1, callbacks=[SaveAt(4, tmp_path / "4.ckpt")])
    hub.earlier[hub.commit], hub.commit = hub.folder, "b" * 40
    with pytest.raises(DataError, match=rf"made with revision {'a' * 40}, now {'b' * 40}: resume with the same"):
        fit(tmp_path, config(tmp_path), max_epochs=1, ckpt_path=tmp_path / "4.ckpt")


def test_a_commit_that_goes_away_is_told_in_one_sentence(tmp_path: Path, hub: LoopbackHub) -> None:
    data = ImageNetDataModule(config(tmp_path))
    data.prepare()
    hub.commit = "b" * 40
    with pytest.raises(DataError, match=r"is gone from the hub: .*data\.revision\.$"):
        next(iter(data.train_dataloader()))


def test_a_set_of_several_configurations_is_refused_in_one_sentence(hub: LoopbackHub) -> None:
    configs = "".join(f"- config_name: {name}\n  data_files: data/{name}*\n" for name in ("train", "validation"))
    (hub.folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(DataError, match=r"cannot be opened: Config name is missing\.$"):
        open_split(IMAGENET, "train")


def test_a_pinned_revision_is_what_is_read(hub: LoopbackHub) -> None:
    split = open_split(IMAGENET, "train", revision=hub.commit)
    assert all(f"@{hub.commit}/" in file for file in split.files)  # type: ignore[attr-defined]
    ids = np.arange(TRAIN)[::-1]
    assert [row.labels[0] for row in open_reader(split).rows(ids.tolist())] == [i % CLASSES for i in ids]
