"""Fine-tuning through the fit command: what stays, what moves, and that it goes on after an interruption."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import timm
import torch

from tests.nets.test_keras_parity import random_weights
from tests.weights.conftest import randomise
from xception_pl import XceptionModule, load_network
from xception_pl.fit import main
from xception_pl.run.log import RunLog
from xception_pl.weights.safetensors import save_weights

RECIPE = """
model: {num_classes: 2, width: 0.125, middle_blocks: 0, dropout: 0.0, freeze: 2, freeze_statistics: true, weights: first.safetensors}
data: {source: images, val_split: test, image_size: 71, global_batch: 4, workers: 0, shuffle_window: 64, train_crop: resize}
optim: {lr: 0.05, layer_decay: 0.5, ema_decay: 0.9, schedule: constant, decay_every_epochs: 2.0}
trainer: {max_epochs: 2, log_every_n_steps: 2, enable_progress_bar: false}
run: {tensorboard: false}
"""
CLASSES = {"boot": 9, "bag": 8}


def _write_first(path: Path) -> None:
    """Weights whose statistics are those of some images: with fresh ones the features would vanish."""
    torch.manual_seed(0)
    first = XceptionModule({"num_classes": 3, "width": 0.125, "middle_blocks": 0, "bn_momentum": 1.0}, {"ema_decay": 0})
    first.network(torch.randn(16, 3, 71, 71))
    save_weights(first, path)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of sixteen images of two classes, and weights that know others."""
    table = pq.read_table("xception_pl/data/sample/test.parquet").to_pylist()
    for split, first in (("train", 0), ("test", 8)):
        for name, label in CLASSES.items():
            (tmp_path / "images" / split / name).mkdir(parents=True)
            rows = [row for row in table if row["label"] == label][first : first + 8]
            for i, row in enumerate(rows):
                (tmp_path / "images" / split / name / f"{i}.png").write_bytes(row["image"]["bytes"])
    _write_first(tmp_path / "first.safetensors")
    (tmp_path / "tune.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def fit(*arguments: str) -> dict[str, Any]:
    assert main(["tune.yaml", *arguments]) == 0
    return last()


def last(name: str = "tune") -> dict[str, Any]:
    (checkpoint,) = Path("runs", name).glob("*/checkpoints/last.ckpt")
    loaded: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    return loaded


def test_what_is_frozen_stays_and_the_plan_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    tuned = fit()["state_dict"]
    first = load_network("first.safetensors").state_dict()
    for name, value in first.items():
        frozen = name.startswith(("block1.", "block2.")) or name.endswith(("running_mean", "running_var", "tracked"))
        for prefix in ("network.", "average.network."):
            now = tuned[prefix + name]
            assert (now.shape == value.shape and torch.equal(now, value)) == frozen, prefix + name
    printed = capsys.readouterr().out
    assert "weights   first.safetensors: new logistic layer for 2 classes (3 classes there)" in printed
    assert "frozen    blocks 1 to 2 and the statistics of every batch norm; " in printed
    (weights,) = Path("runs/tune").glob("*/checkpoints/averaged.safetensors")
    assert load_network(weights).class_names == ["bag", "boot"]


def test_grey_images_from_weights_that_know_colour(capsys: pytest.CaptureFixture[str]) -> None:
    tuned = fit("--model.in_chans=1", "--trainer.max_steps=1")["state_dict"]
    colour = load_network("first.safetensors").block1.conv1.weight
    assert torch.equal(tuned["network.block1.conv1.weight"], colour.sum(1, keepdim=True))  # and then frozen
    assert "first convolution summed from 3 channels to 1" in capsys.readouterr().out
    (weights,) = Path("runs/tune").glob("*/checkpoints/averaged.safetensors")
    picture = next(Path("images/test/boot").iterdir())
    assert load_network(weights).predict(picture).shape == (1, 2)  # type: ignore[operator]


def test_each_depth_has_its_rate() -> None:
    (optimizer,) = fit()["optimizer_states"]
    rates = {group["name"]: group["lr"] for group in optimizer["param_groups"]}
    assert rates["l2.6"] == rates["no_l2.6"] == 0.05
    assert rates["l2.5"] == 0.025
    assert rates["no_l2.2"] == 0.05 / 16
    assert "l2.1" not in rates


def test_a_stopped_run_goes_on_to_the_same_bits_without_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit()
    shutil.rmtree("runs")
    original = RunLog.on_train_batch_end

    def stopping(self: RunLog, trainer: Any, *arguments: Any) -> None:
        original(self, trainer, *arguments)
        if trainer.global_step == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "on_train_batch_end", stopping)
        assert main(["tune.yaml"]) == 130
    Path("first.safetensors").unlink()
    assert main(["tune.yaml", "--resume", "last"]) == 0
    resumed = last()
    assert resumed["global_step"] == whole["global_step"]
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name


def keras_file(path: Path) -> None:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    random_weights(keras.applications.Xception(weights=None, input_shape=(71, 71, 3))).save(path)


def timm_file(path: Path) -> None:
    torch.save({"state_dict": randomise(timm.create_model("legacy_xception")).state_dict()}, path)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras with NumPy 2
@pytest.mark.parametrize(
    ("write", "name", "options"),
    [(keras_file, "xception.keras", []), (timm_file, "xception.pth", ["--model.numerics=torch"])],
    ids=["keras", "timm"],
)
def test_the_recipe_trains_on_from_files_of_others(
    write: Callable[[Path], None], name: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write(Path(name))
    arguments = [
        "--data.source=images", f"--model.weights={name}", "--model.num_classes=2", "--data.image_size=71", "--data.workers=0",
        "--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--run.tensorboard=false", *options,
    ]  # fmt: skip
    assert main(["recipes/finetune.yaml", *arguments]) == 0
    assert f"{name}: new logistic layer for 2 classes (1000 classes there)" in capsys.readouterr().out
    (averaged,) = Path("runs/finetune").glob("*/checkpoints/averaged.safetensors")
    tuned, theirs = load_network(averaged), load_network(name)
    assert (tuned.class_names, tuned.numerics) == (["bag", "boot"], theirs.numerics)
    before = theirs.state_dict()
    moved = {key for key, value in tuned.state_dict().items() if not torch.equal(value, before[key])}
    trained = {
        key
        for key, _ in tuned.named_parameters()
        if int(key.split(".")[0].removeprefix("block").replace("fc", "15")) > 4
    }
    assert moved == trained  # all above the four frozen blocks, and no statistics
    assert all(0 < (tuned.get_parameter(key) - before[key]).abs().max() < 1 for key in moved - {"fc.weight", "fc.bias"})
    shutil.rmtree("runs")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--model.width=0.25"], "set --model.width=0.125."),
        (["--model.weights=gone.ckpt"], "gone.ckpt"),
        (["--model.weights=null"], "model.freeze keeps what was loaded, and model.weights is null"),
        (["--model.freeze=7"], "model.freeze must be 0 to the 6 blocks of xception, not 7."),
        (["--optim.layer_decay=0"], "optim.layer_decay is 0.0, but must be above 0 and at most 1."),
    ],
)
def test_mistakes_are_sentences(capsys: pytest.CaptureFixture[str], changes: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tune.yaml", *changes])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
