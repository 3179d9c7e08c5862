"""Real processes: what several ranks see together is what one sees, whatever the workers, resumes and worlds."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_hub import GROUP, TRAIN, VAL, write_set
from tests.loopback_hub import LoopbackHub, sometimes, status, truncated

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def launch(world: int, folder: Path, hub: LoopbackHub, *more: str) -> list[dict[str, Any]]:
    """The notes of each rank."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home")}
    env.pop("HF_TOKEN", None)
    command = [sys.executable, "-m", "tests.data.ddp_run", str(world), str(folder), *more]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"world {world} rank {rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("ddp")
    write_set(folder / "hub")
    with LoopbackHub(folder / "hub") as hub:
        notes = {}
        for world in (1, 2, 3):
            hub.faults[:] = [sometimes(4, status(503)), sometimes(7, truncated)] if world == 3 else []
            before = hub.requests["read"]
            notes[world] = launch(world, folder, hub)
            notes[world][0]["reads"] = hub.requests["read"] - before
        hub.faults.clear()
        launch(1, folder, hub, str(folder / "world 2 step 11.ckpt"))
        for accumulate in (1, 2):
            trace = json.loads((folder / f"moved to 1, accumulating {accumulate}.json").read_text())
            notes[1][0][f"moved, accumulating {accumulate}"] = {"train": trace}
        yield notes


def test_one_ranks_data_error_ends_all_ranks_with_the_same_sentence(tmp_path: Path) -> None:
    env = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "tests.data.ddp_run", "2", str(tmp_path), "corrupt"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0
    ends = [(tmp_path / f"end of rank {rank}").read_text() for rank in range(2)]
    assert ends[0] == ends[1]
    assert ends[0].startswith("DataError: 1 images of the train dataset given cannot be decoded")


def test_a_refusal_is_asked_for_by_rank_0_alone_and_ends_all_ranks_before_training(tmp_path: Path) -> None:
    write_set(tmp_path / "hub")
    asked = []
    for world in (1, 2):
        folder = tmp_path / f"world {world}"
        folder.mkdir()
        with LoopbackHub(tmp_path / "hub", token="hf_secret") as hub:
            env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_another"}
            command = [sys.executable, "-m", "tests.data.ddp_run", str(world), str(folder), "refused"]
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode != 0
        ends = {(folder / f"end of rank {rank}").read_text() for rank in range(world)}
        assert len(ends) == 1
        assert ends.pop().startswith(
            "SourceUnreachable: The token given has no access to the dataset ILSVRC/imagenet-1k"
        )
        assert hub.seen_tokens == {"hf_another"}
        assert "hf_another" not in done.stdout + done.stderr
        asked.append(hub.requests)
    assert asked[0] == asked[1]


def together(ranks: list[dict[str, Any]], name: str) -> list[list[int]]:
    """Global batches: the ranks' micro-batches side by side."""
    assert len({len(rank[name]["train"]) for rank in ranks}) == 1
    return [sum(parts, start=[]) for parts in zip(*(rank[name]["train"] for rank in ranks), strict=True)]  # noqa: RUF017


def test_the_sequence_of_global_batches_is_the_same_for_all_worlds_and_workers(runs: dict[int, Any]) -> None:
    alone = runs[1][0]["workers 0"]["train"]
    for epoch in (alone[:8], alone[8:]):
        ids = [i for batch in epoch for i in batch]
        assert len(ids) == len(set(ids)) == TRAIN // 24 * 24
    for world, ranks in runs.items():
        for workers in (0, 2, 3):
            assert together(ranks, f"workers {workers}") == alone, (world, workers)


def test_a_node_reads_each_row_group_once_and_in_a_storm_again(runs: dict[int, Any]) -> None:
    """Over seven runs, training and evaluation; three ranks saw the same as one, above, through the storm."""
    files = [
        -(-(stop * rows // shards - start * rows // shards) // GROUP)
        for rows, shards in ((TRAIN, 5), (VAL, 2))
        for start, stop in pairwise(range(shards + 1))
    ]
    calm = sum(files) + len(files)  # and their footers
    assert [runs[world][0]["reads"] for world in (1, 2)] == [calm, calm]
    assert runs[3][0]["reads"] >= calm * 4 / 3 - 1


def test_two_resumes_change_nothing_on_any_rank(runs: dict[int, Any]) -> None:
    for ranks in runs.values():
        for rank in ranks:
            assert rank["resumed twice"]["train"] == rank["workers 0"]["train"]


def test_a_run_of_two_ranks_goes_on_with_one_inside_the_epoch(runs: dict[int, Any]) -> None:
    alone = runs[1][0]
    rest = alone["workers 0"]["train"][11:]  # 11 steps are an epoch of 8 and three more
    assert alone["moved, accumulating 1"]["train"] == rest
    halves = alone["moved, accumulating 2"]["train"]
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == rest


def test_evaluation_counts_each_image_once_over_all_ranks(runs: dict[int, Any]) -> None:
    for ranks in runs.values():
        for workers in (0, 2, 3):
            counted = sorted(i for rank in ranks for i in rank[f"workers {workers}"]["val"])
            assert counted == sorted(2 * list(range(VAL)))
        assert [i for rank in ranks for i in rank["one image to evaluate"]["val"]] == [0, 0]
