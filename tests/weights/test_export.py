"""Exports: what others read computes what the network does, or is not written."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.weights.conftest import SMALL, outputs, randomise, relative_error, smooth_images
from tests.weights.test_load import NAMES, assert_same_weights
from xception_pl import Xception, load_network
from xception_pl.evaluate import main as evaluate
from xception_pl.export import main
from xception_pl.nets.preprocessing import Preprocessing
from xception_pl.weights import exports
from xception_pl.weights.exports import export
from xception_pl.weights.hub import write_hub_folder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras with NumPy 2


@pytest.fixture
def weights(small: Xception, tmp_path: Path) -> Path:
    """A file of weights as a run leaves it, with the run's numbers."""
    small.class_names, small.preprocessing = NAMES, Preprocessing(image_size=75, eval_crop="resize")
    small.loss = "sigmoid"
    run = tmp_path / "run"
    write_hub_folder(small, run / "checkpoints", {"images": 8.0, "top1": 0.75, "data": "split 'test' of ants"})
    (run / "checkpoints" / "model.safetensors").rename(run / "checkpoints" / "averaged.safetensors")
    return run / "checkpoints" / "averaged.safetensors"


def run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def test_onnx_takes_any_batch_and_size(weights: Path, small: Xception, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    assert main([str(weights), "--to", "onnx", "--fold-bn"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("batch norm folded: largest relative difference ")
    assert "loaded back by ONNX Runtime (opset 18)" in said
    path = weights.with_suffix(".onnx")
    for batch, height, width in ((1, 71, 71), (3, 75, 76), (2, 76, 75), (2, 96, 96), (5, 97, 99)):
        images = smooth_images(112)[:1, :, :height, :width].repeat(batch, 1, 1, 1)
        assert relative_error(run_onnx(path, images), outputs(small, images)) < 1e-4, (batch, height, width)
    model = onnx.load(path)
    assert model.opset_import[0].version == 18
    kept = {item.key: json.loads(item.value) for item in model.metadata_props}
    assert kept["class_names"] == NAMES
    assert kept["preprocessing"] == {"image_size": 75, "eval_crop": "resize"}
    assert kept["loss"] == "sigmoid"
    assert sorted(item.name for item in weights.parent.iterdir()) == [
        "README.md", "averaged.onnx", "averaged.safetensors", "config.json",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"numerics": "torch"}, {"output_stride": 16}], ids=str)
def test_programs_of_other_networks(options: dict[str, Any], tmp_path: Path) -> None:
    network = randomise(Xception(5, **SMALL | options))
    assert isinstance(network, Xception)
    network.preprocessing = Preprocessing(image_size=75)
    export(network, "torch-export", tmp_path / "a.pt2")
    beside = {"xception_pl.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=beside).module()
    assert json.loads(beside["xception_pl.json"])["preprocessing"]["image_size"] == 75
    for batch, height, width in ((1, 71, 72), (4, 76, 99)):
        images = smooth_images(112)[:1, :, :height, :width].repeat(batch, 1, 1, 1)
        assert relative_error(program(images), outputs(network, images)) < 1e-5


def test_a_hub_folder_has_the_runs_numbers(weights: Path, small: Xception, tmp_path: Path) -> None:
    assert main([str(weights.parents[1]), "--to", "hub-folder", "--output", str(tmp_path / "hub")]) == 0
    assert_same_weights(load_network(tmp_path / "hub"), small)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| top-1 | 75.00% |" in card
    assert "Measured on 8 images of split 'test' of ants." in card
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert "Trained with sigmoid: probabilities are the sigmoid of each output" in card
    assert sorted(item.name for item in (tmp_path / "hub").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_numbers_travel_with_the_weights(weights: Path, tmp_path: Path) -> None:
    main([str(weights), "--to", "safetensors", "--output", str(tmp_path / "a.safetensors")])
    main([str(tmp_path / "a.safetensors"), "--to", "hub-folder", "--output", str(tmp_path / "hub")])
    assert load_network(tmp_path / "hub").results == {"images": 8.0, "top1": 0.75, "data": "split 'test' of ants"}


@pytest.mark.parametrize(
    "metadata",
    [
        "[1]",
        '{"top1": true}',
        '{"top1": [0.5]}',
        '{"images": "many"}',
        '{"data": 5}',
        '{"data": "a\\n# b"}',
        json.dumps({"data": "x" * 500}),
    ],
)
def test_results_that_are_none(weights: Path, tmp_path: Path, metadata: str) -> None:
    save_file(load_file(weights), tmp_path / "a", {"preprocessing": "{}", "results": metadata})
    with pytest.raises(ValueError, match="is damaged: its results are no numbers and texts"):
        load_network(tmp_path / "a")


def test_an_evaluation_gives_the_numbers_of_its_own_weights(
    weights: Path, small: Xception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = Xception(10, **SMALL)  # as many classes as the shipped images have
    network.preprocessing = Preprocessing(image_size=75, eval_crop="resize")
    write_hub_folder(network, tmp_path / "ten")
    write_hub_folder(Xception(10, **SMALL), tmp_path / "other")
    source = ["--data", "sample", "--batch", "250", "--data.workers=0", "--output", str(tmp_path / "report")]
    assert evaluate([str(tmp_path / "other"), "--compare", str(tmp_path / "ten"), "--image-size", "71", *source]) == 0
    (tmp_path / "ten").rename(tmp_path / "moved")  # what they are, not where they were
    report = tmp_path / "report" / "evaluation.json"
    arguments = [str(tmp_path / "moved"), "--to", "hub-folder", "--output", str(tmp_path / "hub")]
    assert main([*arguments, "--results", str(report)]) == 0
    found = json.loads(report.read_text())["networks"][1]
    low, high = found["top1_interval"]
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"| top-1 | {found['top1']:.2%} (95 % interval {low:.2%} to {high:.2%}) |" in card
    assert f"| loss | {found['loss']:.4f} |" in card
    assert f"1,000 images of split 'test' of sample, prepared as {found['preprocessing']}." in card
    assert "resized to 71 × 71" in card

    for content, sentence in (
        (report.read_text(), "was measured with other weights: "),
        ("{}", "is no evaluation.json of this version: write one with evaluate --output."),
        ("no", "is no evaluation.json of this version"),
    ):
        report.write_text(content)
        with pytest.raises(SystemExit):
            main([str(weights), "--to", "hub-folder", "--output", str(tmp_path / "no"), "--results", str(report)])
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_safetensors_of_other_weights(small: Xception, tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {f"module.{name}": tensor for name, tensor in small.state_dict().items()}}, tmp_path / "old.pth"
    )
    with pytest.warns(UserWarning, match="no description"):
        assert main([str(tmp_path / "old.pth"), "--to", "safetensors"]) == 0
    assert_same_weights(load_network(tmp_path / "old.safetensors"), small)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "safetensors"], "averaged.safetensors is the file of weights itself: name another --output."),
        (["--to", "timm", "--fold-bn"], "--to timm holds weights that need their batch norm: --fold-bn is for onnx and torch-export."),
        (["--to", "keras"], "Keras' Xception has no width 0.125, only 1.0: export to onnx or torch-export."),
        (["--to", "timm"], "timm's legacy_xception has no width 0.125, only 1.0: --to hub-folder is for timm too, through"),
        (["--to", "hub-folder", "--output", "{there}"], "is a folder that exists: name another one."),
        (["--to", "onnx", "--output", "/proc/no/a.onnx"], "/proc/no/a.onnx cannot be written: No such file or directory."),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_a_sentence(
    weights: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(weights), *(text.replace("{there}", str(weights.parent)) for text in arguments)])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: ")
    assert sentence in said
    assert said.count("\n") == 1


def test_a_missing_package_is_named(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("xception_pl.weights.stored.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main([str(weights), "--to", "onnx"])
    assert "needs onnx and onnxscript: pip install 'xception_pl[export]'" in capsys.readouterr().err


def test_a_file_that_computes_something_else_is_not_written(
    small: Xception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.preprocessing = Preprocessing(image_size=75)
    other = randomise(Xception(5, **SMALL))
    with torch.no_grad():
        other.fc.bias[0] += 0.01  # type: ignore[index,operator,union-attr]
    monkeypatch.setattr(exports, "load_network", lambda path: other)
    (tmp_path / "a.safetensors").write_text("before")
    with pytest.raises(
        ValueError, match=r"a.safetensors was not written: loaded back by load_network, its outputs differ"
    ):
        export(small, "safetensors", tmp_path / "a.safetensors")
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_text() == "before"


def test_help_imports_no_torch() -> None:
    code = "import sys; from xception_pl.export import main\ntry: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr


def full(numerics: Any, size: int) -> Xception:
    network = randomise(Xception(11, numerics=numerics))
    assert isinstance(network, Xception)
    network.preprocessing = Preprocessing(image_size=size)
    network.class_names, network.loss = list("abcdefghijk"), "sigmoid"
    return network


def assert_same_use(network: Xception, other: Xception) -> None:
    for name in ("preprocessing", "class_names", "loss"):
        assert getattr(network, name) == getattr(other, name)


@pytest.mark.slow
@pytest.mark.parametrize("size", [150, 97])
def test_timm_computes_what_it_is_given(size: int, tmp_path: Path) -> None:
    network = full("torch", size)
    export(network, "timm", tmp_path / "a.safetensors")
    theirs = timm.create_model("legacy_xception", num_classes=11, checkpoint_path=tmp_path / "a.safetensors").eval()
    for side in (size, 299):
        images = smooth_images(side)
        assert relative_error(outputs(theirs, images), outputs(network, images)) < 1e-4, side
    again = load_network(tmp_path / "a.safetensors")
    assert_same_use(again, network)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in network.state_dict().items())
    with pytest.raises(ValueError, match="computes with numerics torch, these weights need keras"):
        export(full("keras", size), "timm", tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("a.keras", 150), ("a.weights.h5", 97), ("a.h5", 97)])
def test_keras_computes_what_it_is_given(name: str, size: int, tmp_path: Path) -> None:
    network = full("keras", size)
    export(network, "keras", tmp_path / name)
    import keras

    if name == "a.weights.h5":  # into Keras' own network, with its head
        theirs: Any = keras.applications.Xception(
            weights=None, classes=11, classifier_activation=None, input_shape=(size, size, 3)
        )
        theirs.load_weights(tmp_path / name)
    else:
        theirs = keras.saving.load_model(tmp_path / name, compile=False)
    for side in (size, 299) if name == "a.keras" else (size,):
        images = smooth_images(side)
        logits = theirs(images.permute(0, 2, 3, 1).numpy(), training=False)
        found = torch.from_numpy(np.array(keras.ops.convert_to_numpy(logits)))
        assert relative_error(found, outputs(network, images)) < 1e-4, side
    again = load_network(tmp_path / name)
    assert_same_use(again, network)
    assert all(
        torch.equal(again.state_dict()[key], tensor)
        for key, tensor in network.state_dict().items()
        if "batches" not in key
    )


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["keras", "torch"])
def test_onnx_at_full_size(numerics: str, tmp_path: Path) -> None:
    network = full(numerics, 150)
    done = export(network, "onnx", tmp_path / "a.onnx", fold=True)
    assert done.folded is not None
    assert done.folded.largest < 1e-5
    assert done.against.largest < 1e-5
    images = smooth_images(299)
    assert relative_error(run_onnx(tmp_path / "a.onnx", images), outputs(network, images)) < 1e-4


def test_the_pins_are_those_that_are_tested() -> None:
    pins = dict(line.strip().split("==") for line in Path("constraints.txt").read_text().splitlines() if "==" in line)
    for package in ("onnx", "onnxruntime", "onnxscript", "h5py"):
        assert version(package) == pins[package]


def test_only_xceptions_are_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only an Xception is exported, not a Linear"):
        export(nn.Linear(2, 2), "onnx", tmp_path / "a")  # type: ignore[arg-type]
