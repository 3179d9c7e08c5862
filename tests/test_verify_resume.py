"""A user proves on their own machine that a killed run resumes exactly; and a run that does not is found out."""

import shutil
from pathlib import Path

import pytest
import torch

from xception_pl.run.compare import compare
from xception_pl.verify_resume import main

TINY = """
model: {num_classes: 10, width: 0.05, middle_blocks: 1, dropout: 0.5, bn_momentum: 0.1}
data: {source: sample, val_split: test, image_size: 71, global_batch: 8, workers: 0, shuffle_window: 512}
optim: {lr: 0.02, ema_decay: 0.9}
trainer: {limit_train_batches: 5, limit_val_batches: 2, log_every_n_steps: 2, enable_progress_bar: false}
"""


def test_a_killed_run_is_shown_to_resume_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    assert main(["tiny.yaml", "--kill-at", "4", "--keep", "kept"]) == 0
    printed = capsys.readouterr().out
    assert "it ended with exit code -9; resuming" in printed
    assert printed.rstrip().endswith(
        "EXACT: killed, and resumed from step 2, the run is the undisturbed one, to the bit."
    )
    assert printed.count("none: identical to the bit") == 6
    assert main(["tiny.yaml", "--kill-at", "4", "--keep", "kept"]) == 2

    whole, other = Path("kept/whole"), Path("other")
    shutil.copytree("kept/killed", other)
    checkpoint = torch.load(other / "checkpoints/last.ckpt", weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("weight"))
    checkpoint["state_dict"][name] *= 1.001
    torch.save(checkpoint, other / "checkpoints/last.ckpt")
    lines, exact = compare(whole, other, 0.0)
    assert not exact
    assert lines[-1].startswith("NOT EXACT: resumed from step 2")
    assert compare(whole, other, 0.01)[1]

    trace = (other / "trace-0.csv").read_text().splitlines()
    step, batch, ids, loss = trace[-1].split(",")
    swapped = " ".join(reversed(ids.split()))
    (other / "trace-0.csv").write_text("\n".join([*trace[:-1], ",".join([step, batch, swapped, loss])]) + "\n")
    lines, exact = compare(whole, other, 0.01)
    assert not exact
    assert lines[-1].endswith("Images differ first at step 8.")


@pytest.mark.slow
def test_two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    assert main(["tiny.yaml", "--kill-at=4", "--steps=7", "--devices=2"]) == 0
    printed = capsys.readouterr().out
    assert "it ended with exit code 75; resuming" in printed
    assert "14 batches, 2 ranks" in printed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--kill-at (needed)"),
        (["--kill-at=1"], "--kill-at 1 must be at least 2"),
        (["--kill-at=5", "--steps=5"], "below --steps 5"),
        (["--kil-at=5"], "Did you mean kill-at?"),
    ],
)
def test_what_cannot_be_shown_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "tiny.yaml"), *words])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
