"""Files that mean harm or are broken: each gets one sentence, none executes, none takes more memory than it has bytes."""

import gzip
import io
import json
import os
import pickle
import random
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from tests.weights.conftest import SMALL
from xception_pl import Xception, load_network
from xception_pl.weights.described import describe
from xception_pl.weights.stored import WeightsError

pytestmark = pytest.mark.filterwarnings("ignore:.*no description:UserWarning")


def refusal(path: Path, **options: Any) -> str:
    """The sentence; its memory is that of the file, give or take."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError) as caught:
        load_network(path, **options)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert "Traceback" not in text
    return text


class Harm:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def state(small: Xception) -> dict[str, Any]:
    return dict(small.state_dict())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["beside", "inside", "whole"])
def test_pickles_that_execute(tmp_path: Path, state: dict[str, Any], zipped: bool, place: str) -> None:
    harm = Harm(tmp_path / "harmed")
    content: Any = {"beside": {"state_dict": state, "x": harm}, "inside": state | {"x": harm}, "whole": harm}[place]
    torch.save(content, tmp_path / "a", _use_new_zipfile_serialization=zipped)
    assert "is refused: it needs posix.system, and to make that means to run code of the file" in refusal(
        tmp_path / "a"
    )
    assert not (tmp_path / "harmed").exists()


def test_a_plain_pickle_that_executes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    refusal(tmp_path / "a")
    assert not (tmp_path / "harmed").exists()


def test_a_pickled_network(tmp_path: Path, small: Xception) -> None:
    torch.save(small, tmp_path / "a")
    assert "it needs xception_pl.nets.xception.Xception" in refusal(tmp_path / "a")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "a")
    assert "is a TorchScript program, which would run as code" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "is a file of torch.save without any weights."),
        ([torch.zeros(2)], "holds a list, no weights"),
        (torch.zeros(2), "holds a Tensor, no weights"),
        ({"state_dict": {"a": 1}}, "without any weights."),
        ({"state_dict": 5, "epoch": 1}, "without any weights."),
        ({"state_dict": 5, "hyper_parameters": {"model": {}}}, "is damaged: its state dict is a int."),
        ({"hyper_parameters": {"model": 5}, "state_dict": {}}, "what it says of its model is no mapping"),
        ({"layer1.0.conv1.weight": torch.zeros(2)}, "no Xception: its 1 tensors begin with layer1.0.conv1.weight. These are a ResNet's"),
    ],
    ids=range(8),
)  # fmt: skip
def test_pickles_of_something_else(tmp_path: Path, content: Any, sentence: str) -> None:
    torch.save(content, tmp_path / "a")
    assert sentence in refusal(tmp_path / "a")


def test_a_dictionary_in_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "a")
    assert "without any weights" in refusal(tmp_path / "a")


@pytest.mark.parametrize("kind", ["repeated", "sparse"])
def test_tensors_that_claim_more_than_they_hold(tmp_path: Path, state: dict[str, Any], kind: str) -> None:
    huge = torch.zeros(1).expand(2**40) if kind == "repeated" else torch.sparse_coo_tensor(size=(2**20, 2**20))
    torch.save(state | {"fc.bias": huge}, tmp_path / "a")
    assert "fc.bias is no plain array" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    ("value", "sentence"), [(torch.nan, "NaN or infinite numbers in 1 of"), (torch.inf, "NaN or infinite"), (-1.0, "variances below 0")]
)  # fmt: skip
def test_numbers_that_no_training_leaves(tmp_path: Path, state: dict[str, Any], value: float, sentence: str) -> None:
    state["block3.bn1.running_var"][0] = value
    save_file(state, tmp_path / "a")
    text = refusal(tmp_path / "a")
    assert sentence in text
    assert "block3.bn1.running_var" in text


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["torch", "old", "safetensors", "h5", "keras"])
def test_files_that_end_too_soon(tmp_path: Path, state: dict[str, Any], kind: str, part: float) -> None:
    whole = tmp_path / "whole"
    if kind == "safetensors":
        save_file(state, whole)
    elif kind == "h5":
        old_h5(whole)
    elif kind == "keras":
        keras_archive(whole, zipfile.ZIP_STORED)
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=kind == "torch")
    content = whole.read_bytes()
    (tmp_path / "a").write_bytes(content[: int(len(content) * part)])
    refusal(tmp_path / "a")


def test_an_archive_that_unpacks_to_more(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**28))
    assert "is refused: it is compressed, which torch.save never does" in refusal(tmp_path / "a")


def test_an_archive_whose_members_overlap(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a/data.pkl", bytes(2**16))
        first = archive.getinfo("a/data.pkl")
        for i in range(300):  # each claims the bytes of the first
            copy = zipfile.ZipInfo(f"a/data/{i}")
            copy.header_offset, copy.file_size, copy.compress_size = (
                first.header_offset,
                first.file_size,
                first.file_size,
            )
            copy.CRC = first.CRC
            archive.filelist.append(copy)
    (tmp_path / "a").write_bytes(content.getvalue())
    assert "its members claim more bytes than the file has" in refusal(tmp_path / "a")


def described(**changes: Any) -> dict[str, str]:
    """The metadata of a small network, and what an enemy made of it."""
    plain = describe(Xception(5, **SMALL))
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            plain[section][key] = value
        else:
            plain[section] = value
    return {name: json.dumps(value) for name, value in plain.items()}


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        (described(model__width=1e12), "beyond all use"),
        (described(model__width=float("nan")), "model.width cannot be 'nan'"),
        (described(model__middle_blocks=10**9), "more layers than the file's"),
        (described(model__fc_units=[8] * 5000), "more layers than the file's"),
        (described(model__num_classes=10**12), "beyond all use"),
        (described(model__num_classes="5"), "model.num_classes cannot be '5'"),
        (described(model__num_classes=True), "model.num_classes cannot be 'True'"),
        (described(model__name="hf-hub:evil/model"), "network 'hf-hub:evil/model' is unknown"),
        (described(model__name="/etc/passwd"), "network '/etc/passwd' is unknown"),
        (described(model__numerics="other"), "model.numerics cannot be 'other'"),
        (described(model__invented=1), "has the model key invented, which this version does not know"),
        (described(model=[1]), "what it says of its model is no mapping"),
        (described(loss="hinge"), "was trained with the loss 'hinge', which this version does not know"),
        (described(loss=["sigmoid"]), "was trained with the loss"),
        (described(preprocessing__image_size=-1), "images of -1 pixels"),
        (described(preprocessing__eval_crop="rm"), "preprocessing.eval_crop cannot be 'rm'"),
        (described(class_names=["a"]), "it names 1 classes and has 5 outputs"),
        (described(class_names=[1, 2, 3, 4, 5]), "its class names are no list of texts"),
        (described() | {"model": "{"}, "its metadata model is no JSON"),
        (described() | {"model": "[" * 100_000}, "its metadata model is no JSON"),
    ],
    ids=range(20),
)  # fmt: skip
def test_descriptions_that_lie(tmp_path: Path, state: dict[str, Any], metadata: dict[str, str], sentence: str) -> None:
    save_file(state, tmp_path / "a", metadata=metadata)
    assert sentence in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    "header", [b"{", b'{"a": 5}', b'{"a":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,4]}}', b"{}" * 9]
)
def test_safetensors_with_broken_headers(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "is no whole safetensors file" in refusal(tmp_path / "a")


def old_h5(path: Path, fill: Callable[[h5py.Group], None] | None = None) -> None:
    """A file of one layer, as Keras writes it; `fill` puts what it likes in the kernel's place."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"block1_conv1"]
        group = file.create_group("block1_conv1")
        group.attrs["weight_names"] = [b"block1_conv1/kernel:0"]
        inner = group.create_group("block1_conv1")
        if fill is None:
            inner["kernel:0"] = np.zeros((3, 3, 3, 32), np.float32)
        else:
            fill(inner)


def new_h5(path: Path, fill: Callable[[h5py.Group], None]) -> None:
    with h5py.File(path, "w") as file:
        fill(file.create_group("layers/conv2d/vars"))


def virtual(group: h5py.Group, name: str) -> None:
    layout = h5py.VirtualLayout((3, 3, 3, 32), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (3, 3, 3, 32))
    group.create_virtual_dataset(name, layout)


FILLS: dict[str, tuple[Callable[[h5py.Group, str], None], str]] = {
    "external link": (lambda g, n: g.__setitem__(n, h5py.ExternalLink("/etc/passwd", "/x")), "is refused|refused: "),
    "soft link": (lambda g, n: g.__setitem__(n, h5py.SoftLink("/layers")), "refused: "),
    "external storage": (
        lambda g, n: g.create_dataset(n, (3, 3, 3, 32), "f4", external=[("/etc/passwd", 0, 3456)]) and None,
        "the numbers of .* are in another file",
    ),
    "virtual": (virtual, "the numbers of .* are in another file"),
    "huge": (
        lambda g, n: g.create_dataset(n, (10**6, 10**6), "f4", chunks=(1, 1024)) and None,
        r"claims the shape \(1000000, 1000000\) and stores 0 bytes",
    ),
    "bomb": (
        lambda g, n: g.create_dataset(n, data=np.zeros(2**26, np.float32), compression="gzip") and None,
        "claims the shape .* and stores",
    ),
    "numbers of another kind": (
        lambda g, n: g.__setitem__(n, np.zeros(4, np.int64)),
        "holds int64, not floating-point",
    ),
    "texts": (lambda g, n: g.__setitem__(n, "text"), "holds object, not floating-point"),
    "a group": (lambda g, n: g.create_group(n) and None, "is no array|without any weights|no Xception"),
    "empty": (lambda g, n: g.__setitem__(n, h5py.Empty("f4")), "claims the shape None"),
}


@pytest.mark.parametrize("kind", FILLS)
@pytest.mark.parametrize("age", ["old", "new"])
def test_hdf5_that_reaches_out_or_grows(tmp_path: Path, kind: str, age: str) -> None:
    import re

    fill, sentence = FILLS[kind]
    if age == "old":
        old_h5(tmp_path / "a", lambda group: fill(group, "kernel:0"))
    else:
        new_h5(tmp_path / "a", lambda group: fill(group, "0"))
    text = refusal(tmp_path / "a")
    assert re.search(sentence, text), text


def test_hdf5_groups_in_a_circle(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a", "w") as file:
        layers = file.create_group("layers")
        layers["again"] = layers
    assert "or a circle of them" in refusal(tmp_path / "a")


def test_hdf5_models_elsewhere(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a", "w") as file:
        file["model_weights"] = h5py.ExternalLink("/etc/passwd", "/")
    assert "does not itself hold model_weights" in refusal(tmp_path / "a")


def test_hdf5_that_lists_what_it_has_not(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a", "w") as file:
        file.attrs["layer_names"] = [b"block1_conv1"]
    assert "does not itself hold block1_conv1" in refusal(tmp_path / "a")


def keras_archive(path: Path, how: int, content: bytes | None = None) -> None:
    if content is None:
        old_h5(path)
        content = path.read_bytes()
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Lambda", "config": {"function": "os.system"}}))
        archive.writestr("model.weights.h5", content)


def test_keras_archives(tmp_path: Path) -> None:
    keras_archive(tmp_path / "a", zipfile.ZIP_STORED)
    with pytest.raises(
        WeightsError, match="missing"
    ):  # read, and found to have one layer; its configuration is not looked at
        load_network(tmp_path / "a")
    keras_archive(tmp_path / "a", zipfile.ZIP_DEFLATED, bytes(2**28))
    assert "would unpack to 268435456 bytes" in refusal(tmp_path / "a")
    keras_archive(tmp_path / "a", zipfile.ZIP_STORED, b"no HDF5")
    assert "damaged or no HDF5 file" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"{", "its xception_pl.json is no JSON"),
        (b"[" * 200_000, "its xception_pl.json is no JSON"),
        (b"[]", "its xception_pl.json is no description"),
        (b'{"model": {"width": 1e12}}', "its xception_pl.json is no description"),
        (b'{"loss": "hinge"}', "was trained with the loss 'hinge'"),
        (b'{"class_names": [1]}', "its class names are no list of texts"),
    ],
)
@pytest.mark.parametrize("kind", ["h5", "keras"])
def test_descriptions_in_keras_files(tmp_path: Path, kind: str, text: bytes, sentence: str) -> None:
    if kind == "h5":
        old_h5(tmp_path / "a")
        with h5py.File(tmp_path / "a", "a") as file:
            file["xception_pl.json"] = np.frombuffer(text, np.uint8)
    else:
        keras_archive(tmp_path / "a", zipfile.ZIP_STORED)
        with zipfile.ZipFile(tmp_path / "a", "a") as archive:
            archive.writestr("xception_pl.json", text)
    assert sentence in refusal(tmp_path / "a")


def test_descriptions_that_unpack_to_more_than_they_may(tmp_path: Path) -> None:
    keras_archive(tmp_path / "a", zipfile.ZIP_STORED)
    with zipfile.ZipFile(tmp_path / "a", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xception_pl.json", bytes(2**28))
    assert "xception_pl.json in it would unpack to 268435456 bytes" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty."),
        (b"\x00" * 100, "that is known here"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS's pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "it is a web page"),
        (gzip.compress(b"weights"), "it is gzip's"),
        (b"a" * 257 + b"ustar" + b"\x00" * 200, "tar archive"),
        (b"PK\x03\x04" + b"\x00" * 50, "zip archive that is cut off"),
        (b"\x7fELF\x02\x01\x01", "that is known here"),
        (b"\x80\x02]q\x00.", "cannot be read as a file of torch.save"),
    ],
    ids=range(9),
)  # fmt: skip
def test_files_of_other_kinds(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "xception.pth").write_bytes(content)
    assert sentence in refusal(tmp_path / "xception.pth")


def test_archives_of_other_kinds(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    assert "zip archive without weights that are known here: it holds x.npy" in refusal(tmp_path / "a.npz")
    assert "has none of model.safetensors" in refusal(tmp_path)


def test_raw_weights_of_a_file_with_one_set(tmp_path: Path, state: dict[str, Any]) -> None:
    save_file(state, tmp_path / "a")
    assert "holds one set of weights: leave out raw" in refusal(tmp_path / "a", raw=True)


def test_two_networks_in_a_file(tmp_path: Path, state: dict[str, Any]) -> None:
    torch.save(
        {f"{who}.{name}": tensor for who in ("student", "teacher") for name, tensor in state.items()}, tmp_path / "a"
    )
    assert "holds 2 networks, under student. and teacher.: save one of them alone." in refusal(tmp_path / "a")


@pytest.mark.parametrize("kind", ["torch", "old", "safetensors"])
def test_flipped_bits_give_a_network_or_a_sentence(tmp_path: Path, state: dict[str, Any], kind: str) -> None:
    buffer = io.BytesIO()
    if kind == "safetensors":
        buffer.write(save(state, metadata=described()))
    else:
        torch.save(state, buffer, _use_new_zipfile_serialization=kind == "torch")
    content = buffer.getvalue()
    draw, path, refused = random.Random(kind), tmp_path / "a", 0
    for _ in range(40):
        broken = bytearray(content)
        for _ in range(draw.choice((1, 3, 30))):  # most of them where the structure is
            ends = draw.choice((range(2000), range(len(content) - 20_000, len(content)), range(len(content))))
            broken[draw.choice(ends)] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        try:
            load_network(path)
        except WeightsError as error:
            assert str(path) in str(error)  # noqa: PT017  # most, not all, have to be refused
            refused += 1
    assert refused > 5
