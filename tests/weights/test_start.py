"""What a fine-tuning starts from: which tensors are the file's, which are new, and what fits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from xception_pl.module import XceptionModule
from xception_pl.nets.config import ModelConfig
from xception_pl.weights.safetensors import save_weights
from xception_pl.weights.start import adapted, start_from
from xception_pl.weights.stored import WeightsError

TINY: dict[str, Any] = {"num_classes": 3, "width": 0.125, "middle_blocks": 1}
NAMES = ["a", "b", "c"]


def saved(path: Path, names: list[str] | None = NAMES, **model: Any) -> tuple[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module = XceptionModule(TINY | model, {"ema_decay": 0}, class_names=names)
    for name, buffer in module.network.named_buffers():
        if name.endswith("running_mean"):
            torch.nn.init.normal_(buffer)
    save_weights(module, path)
    return str(path), module.network.state_dict()


def config(weights: str, **changes: Any) -> ModelConfig:
    return ModelConfig(**(TINY | {"weights": weights} | changes))


def test_all_is_the_files_but_the_head(tmp_path: Path) -> None:
    weights, theirs = saved(tmp_path / "w")
    start = start_from(config(weights, num_classes=5), ["v", "w", "x", "y", "z"])
    ours = start.network.state_dict()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {"fc.weight", "fc.bias"}
    assert ours["fc.weight"].shape == (5, ours["fc.weight"].shape[1])
    assert start.what == f"{weights}: new logistic layer for 5 classes (3 classes there)"


@pytest.mark.parametrize(
    ("known", "ours", "kept"),
    [(NAMES, NAMES, True), (None, NAMES, True), (NAMES, None, True), (NAMES, ["a", "c", "b"], False)],
)
def test_the_head_is_kept_for_the_same_classes(
    tmp_path: Path, known: list[str] | None, ours: list[str] | None, kept: bool
) -> None:
    weights, theirs = saved(tmp_path / "w", names=known)
    start = start_from(config(weights), ours)
    assert torch.equal(start.network.fc.weight, theirs["fc.weight"]) is kept  # type: ignore[arg-type, union-attr]
    assert ("logistic layer kept" if kept else "(other classes)") in start.what


def test_the_new_head_follows_the_seed(tmp_path: Path) -> None:
    weights, _ = saved(tmp_path / "w")
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(start_from(config(weights, num_classes=4)).network.fc.weight)  # type: ignore[union-attr]
    assert torch.equal(heads[0], heads[1])  # type: ignore[arg-type]
    assert not torch.equal(heads[0], heads[2])  # type: ignore[arg-type]


def test_grey_pictures_give_what_they_gave_in_colour(tmp_path: Path) -> None:
    weights, _ = saved(tmp_path / "w")
    grey = torch.randn(2, 1, 71, 71)
    colour = start_from(config(weights)).network.eval()
    summed = start_from(config(weights, in_chans=1))
    assert torch.allclose(summed.network.eval()(grey), colour(grey.expand(-1, 3, -1, -1)), atol=1e-5)
    assert "first convolution summed from 3 channels to 1" in summed.what
    grey_weights, _ = saved(tmp_path / "grey", in_chans=1)
    one = start_from(config(grey_weights, in_chans=1)).network.eval()
    divided = start_from(config(grey_weights)).network.eval()
    assert torch.allclose(divided(grey.expand(-1, 3, -1, -1)), one(grey), atol=1e-5)


def test_other_channels_do_not_fit() -> None:
    with pytest.raises(WeightsError, match="only one channel can be made of several"):
        adapted(torch.zeros(2, 4, 3, 3), 3, "w")


@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        ({"width": 0.25}, "--model.width=0.25"),
        ({"middle_blocks": 2, "residual": False}, "--model.middle_blocks=2 --model.residual=false"),
        ({"numerics": "torch"}, "--model.numerics=torch"),
        ({"intermediate_activation": "elu"}, "--model.intermediate_activation=elu"),
        ({"fc_units": (8, 4)}, "--model.fc_units=[8,4]"),
        ({"segments": 4}, "--model.segments=4"),
    ],
)
def test_another_architecture_is_refused_with_the_keys_to_set(
    tmp_path: Path, theirs: dict[str, Any], options: str
) -> None:
    weights, _ = saved(tmp_path / "w", **theirs)
    with pytest.raises(WeightsError) as refused:
        start_from(config(weights))
    assert str(refused.value).endswith(f"to train on from it, set {options}.")


def test_what_decides_no_weights_may_differ(tmp_path: Path) -> None:
    weights, theirs = saved(tmp_path / "w")
    start = start_from(config(weights, output_stride=8, dropout=0.1, bn_momentum=0.3, freeze=1))
    assert all(torch.equal(value, theirs[name]) for name, value in start.network.state_dict().items())


def test_timms_own_network_starts_a_timm_network(tmp_path: Path) -> None:
    """The other networks of timm: their own head and first convolution."""
    torch.manual_seed(0)
    module = XceptionModule({"name": "resnet10t", "num_classes": 3}, {"ema_decay": 0}, class_names=NAMES)
    save_weights(module, tmp_path / "w")
    start = start_from(ModelConfig(name="resnet10t", num_classes=4, weights=str(tmp_path / "w")))
    theirs = module.network.state_dict()
    differ = {n for n, v in start.network.state_dict().items() if not torch.equal(v, theirs[n])}
    assert differ == {"fc.weight", "fc.bias"}


def test_a_missing_file_is_a_sentence() -> None:
    with pytest.raises(WeightsError, match=r"no .*gone\.safetensors"):
        start_from(config("gone.safetensors"))
