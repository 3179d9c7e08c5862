"""A hub that goes away for good for some ranks of a run: all end soon, with one sentence that names rank and file."""

import os
import re
from pathlib import Path

import pytest
import torch

from tests.data.test_hub import write_set
from tests.loopback_hub import LoopbackHub, attract, of, status
from tests.processes import on_ranks, printed

TINY = """
model: {num_classes: 10, width: 0.05, middle_blocks: 1}
data: {image_size: 71, global_batch: 8, eval_batch: 4, shuffle_window: 512, retry_seconds: 1}
trainer: {accelerator: cpu, max_epochs: 2, limit_val_batches: 1, enable_progress_bar: false}
run: {tensorboard: false, save_every_steps: 1}
"""


def fit(rank: int, url: str, workers: int) -> int:
    """The command on a node of its own: a cache of its own, and the hub knows it by its token."""
    from xception_pl.fit import main

    with pytest.MonkeyPatch.context() as patch:
        attract(url, patch, Path("home"))
        os.environ["HF_TOKEN"] = f"hf_rank{rank}"
        return main(["tiny.yaml", "--into=run", f"--data.cache_dir=cache {rank}", f"--data.workers={workers}"])


@pytest.mark.parametrize(
    ("failing", "files", "workers", "step"),
    [([1], "train-00004", 0, 1), ([0], "train-00004", 2, 3), ([0, 1], "validation", 0, 24)],
)
def test_all_ranks_end_with_one_sentence(
    tmp_path: Path, failing: list[int], files: str, workers: int, step: int
) -> None:
    """After `step`, the last saved before those files are needed; long before the watch's bounds and the process group's."""
    write_set(tmp_path / "hub")
    (tmp_path / "tiny.yaml").write_text(TINY)
    with LoopbackHub(tmp_path / "hub") as hub:
        footers = len(list((tmp_path / "hub").rglob(f"{files}*")))  # rank 0 reads them, before training
        hub.faults += [of(f"hf_rank{rank}", files, status(503), 0 if rank else footers) for rank in failing]
        codes = on_ranks(2, fit, tmp_path, hub.url, workers, nodes=2)
    errors = printed(tmp_path, "err")
    assert codes == [1, 1], errors
    assert "Traceback" not in errors
    (said,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(
        rf"error: rank {failing} \(.+, process \d+\): Cannot read hf://datasets/ILSVRC/imagenet-1k@a{{40}}/data/{files}"
        r".*-of-0000\d\.parquet: \d+ tries in \d+ s failed, the last with 503; resume when .+ as data\.source\. "
        r"The last good checkpoint is run/checkpoints/last\.ckpt\.",
        said,
    )
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert not any(b"hf_rank" in file.read_bytes() for file in written)  # tokens
    assert "hf_rank" not in errors + printed(tmp_path, "out")
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == step
