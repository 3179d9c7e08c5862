"""What does not fit is shown in a table, with the nearest names and whose weights they likely are."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.weights.conftest import SMALL
from xception_pl import Xception, load_network
from xception_pl.weights.described import describe
from xception_pl.weights.mismatch import likely_cause, mismatch_table
from xception_pl.weights.safetensors import write_safetensors


def test_a_table_of_everything_that_differs() -> None:
    expected = {"a.weight": (3, 3), "block1.conv.weight": (8, 3), "fc.bias": (10,)}
    found = {"a.weight": (3, 4), "block1.conv1.weight": (8, 3), "epoch": (), "fc.bias": (10,)}
    assert mismatch_table(expected, found) == (
        "of its tensors 1 missing, 2 unexpected, 1 of another shape.\n"
        "  other shape  a.weight             (3, 4)  the network has (3, 3)\n"
        "  missing      block1.conv.weight   (8, 3)  nearest: block1.conv1.weight (8, 3)\n"
        "  unexpected   block1.conv1.weight  (8, 3)  nearest: block1.conv.weight (8, 3)\n"
        "  unexpected   epoch                ()"
    )
    assert mismatch_table(expected, expected) is None


def test_a_long_table_is_cut() -> None:
    expected = {f"block{i}.weight": (i,) for i in range(100)}
    table = mismatch_table(expected, {})
    assert table is not None
    assert table.startswith(
        "of its tensors 100 missing; likely a part of a network, or a file that was written in part.\n"
    )
    assert table.endswith("\n  and 88 more")


def save(path: Path, state: dict[str, Any], **options: Any) -> Path:
    write_safetensors(path, state, describe(Xception(5, **SMALL | options)))
    return path


def test_loading_shows_the_table_in_the_files_own_names(small: Xception, tmp_path: Path) -> None:
    state = dict(small.state_dict())
    state["block3.sepconv9.weight"] = state.pop("block3.sepconv1.pointwise.weight")
    with pytest.raises(ValueError, match="does not fit xception by our names") as caught:
        load_network(save(tmp_path / "a", state))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("of its tensors 1 missing, 1 unexpected.")
    assert lines[1].split()[:2] == ["missing", "block3.sepconv1.pointwise.weight"]

    theirs = timm.create_model("legacy_xception").state_dict()
    del theirs["block7.rep.4.pointwise.weight"]
    torch.save(theirs, tmp_path / "b")
    with pytest.raises(
        ValueError, match=r"by timm's names: of its tensors 1 missing; likely a part of a network"
    ) as caught:
        load_network(tmp_path / "b")
    assert "block7.rep.4.pointwise.weight  (728, 728, 1, 1)" in str(caught.value)


def test_other_widths(small: Xception, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of another shape; likely a network of other widths"):
        load_network(save(tmp_path / "a", dict(small.state_dict()), width=0.25))


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("xception41", "aligned Xception-41"),
        ("xception65", "aligned Xception-65"),
        ("xception71", "aligned Xception-71"),
        ("resnet10t", "a ResNet's"),
        ("inception_v3", "Inception V3's"),
        ("vgg11", "a VGG's"),
        ("vit_tiny_patch16_224", "a vision transformer's"),
        ("efficientnet_b0", "an EfficientNet's"),
    ],
)
def test_other_networks_are_recognised(name: str, cause: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    found = likely_cause(list(network.state_dict()))
    assert found is not None
    assert found.startswith(cause)
    state = {key: torch.zeros(1) for key, tensor in network.state_dict().items()}
    torch.save(state, tmp_path / "a")
    with pytest.raises(
        ValueError,
        match=rf"is a file of torch.save, but no Xception: its \d+ tensors begin with .*\. These are {cause}",
    ):
        load_network(tmp_path / "a")


def test_deeplabs_common_port_is_recognised() -> None:
    names = [f"block{i}.rep.0.{leaf}.weight" for i in range(1, 21) for leaf in ("conv1", "bn", "pointwise")]
    assert likely_cause(names) == "aligned Xception-65 weights, a later network of other layers: timm has it"
    assert likely_cause(list(timm.create_model("legacy_xception").state_dict())) is None
