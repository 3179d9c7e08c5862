"""Xception as an encoder: decoders written for timm's networks take it as they take timm's own."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

import xception_pl.nets.as_timm  # noqa: F401  # makes the name known to timm
from xception_pl.nets.xception import Xception
from xception_pl.weights.hub import write_hub_folder

SMALL = {"width": 0.25, "middle_blocks": 1}


class UNet(nn.Module):
    """A U-Net's decoder over any timm encoder; it knows no more of it than `feature_info` and its list of maps."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        *skips, deepest = encoder.feature_info.channels()
        self.steps = nn.ModuleList()
        channels = deepest
        for skip in reversed(skips):
            self.steps.append(nn.Conv2d(channels + skip, skip, 3, padding=1))
            channels = skip
        self.head = nn.Conv2d(channels, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        *skips, x = self.encoder(image)
        for step, skip in zip(self.steps, reversed(skips), strict=True):
            x = F.interpolate(x, size=skip.shape[-2:])
            x = F.relu(step(torch.cat([x, skip], dim=1)))
        return F.interpolate(self.head(x), size=image.shape[-2:])


class Pyramid(nn.Module):
    """A feature pyramid's decoder, which scales by the encoder's reductions and needs maps of exactly those sizes."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.reductions = encoder.feature_info.reduction()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, 8, 1) for channels in encoder.feature_info.channels())
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        maps = [lateral(x) for lateral, x in zip(self.lateral, self.encoder(image), strict=True)]
        x = maps[-1]
        for i in range(len(maps) - 2, -1, -1):
            x = maps[i] + F.interpolate(x, scale_factor=self.reductions[i + 1] // self.reductions[i])
        return F.interpolate(self.head(x), scale_factor=self.reductions[0])


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet10t", {}), ("xception_pl", SMALL), ("xception_pl", SMALL | {"output_stride": 8})],
    ids=["timm", "ours", "ours, stride 8"],
)
def test_a_unet_decoder(name: str, options: dict[str, object]) -> None:
    network = UNet(timm.create_model(name, features_only=True, **options), classes=3)
    y = network(torch.randn(2, 3, 96, 80))
    assert y.shape == (2, 3, 96, 80)
    y.square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []  # DistributedDataParallel would stop


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet10t", {}), ("xception_pl", SMALL), ("xception_pl", SMALL | {"output_stride": 16})],
    ids=["timm", "ours", "ours, stride 16"],
)
def test_a_pyramid_decoder_with_a_padded_stem(name: str, options: dict[str, object]) -> None:
    if name == "xception_pl":
        options = options | {"pad_stem": True}
    network = Pyramid(timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4), **options), classes=3)
    assert network(torch.randn(2, 3, 96, 64)).shape == (2, 3, 96, 64)


def test_channels_reductions_and_maps_are_those_of_timms_xception() -> None:
    theirs = timm.create_model("legacy_xception", features_only=True).eval()
    ours = timm.create_model("xception_pl", features_only=True).eval()
    assert ours.feature_info.channels() == theirs.feature_info.channels() == [64, 128, 256, 728, 2048]
    assert ours.feature_info.reduction() == theirs.feature_info.reduction() == [2, 4, 8, 16, 32]
    x = torch.randn(1, 3, 97, 130)
    assert [y.shape for y in ours(x)] == [y.shape for y in theirs(x)]


@pytest.mark.parametrize(
    ("output_stride", "reduction"), [(32, [2, 4, 8, 16, 32]), (16, [2, 4, 8, 16, 16]), (8, [2, 4, 8, 8, 8])]
)
def test_reductions_are_true(output_stride: int, reduction: list[int]) -> None:
    encoder = timm.create_model("xception_pl", features_only=True, pad_stem=True, output_stride=output_stride, **SMALL)
    assert encoder.feature_info.reduction() == reduction
    assert [64 // y.shape[-1] for y in encoder(torch.randn(1, 3, 64, 64))] == reduction
    assert [y.shape[1] for y in encoder(torch.randn(1, 3, 64, 64))] == encoder.feature_info.channels()


@pytest.mark.parametrize(("out_indices", "kept"), [((0, 1, 2, 3, 4), 7), ((1, 3), 5), ((0,), 1), ((-1,), 7), (2, 7)])
def test_only_the_blocks_that_the_maps_need_are_kept(out_indices: int | tuple[int, ...], kept: int) -> None:
    network = Xception(num_classes=7, **SMALL).eval()  # type: ignore[arg-type]
    encoder = timm.create_model("xception_pl", features_only=True, out_indices=out_indices, **SMALL).eval()
    encoder.model.load_state_dict(network.state_dict(), strict=False)
    blocks = {name.split(".")[0] for name, _ in encoder.model.named_parameters()}
    assert blocks == {f"block{n}" for n in range(1, kept + 1)}
    x = torch.randn(1, 3, 71, 71)
    last, maps = network.forward_intermediates(x)
    wanted = maps[-out_indices:] if isinstance(out_indices, int) else [maps[i] for i in out_indices]
    for y, expected in zip(encoder(x), wanted, strict=True):
        assert torch.equal(y, expected)
    assert torch.equal(last, network.forward_features(x))


def test_stop_early_ends_with_the_last_wanted_map() -> None:
    network = Xception(**SMALL).eval()  # type: ignore[arg-type]
    last, maps = network.forward_intermediates(torch.randn(1, 3, 71, 71), indices=(0, 2), stop_early=True)
    assert torch.equal(last, maps[1])
    with pytest.raises(ValueError, match="output_fmt='NHWC' is not supported"):
        network.forward_intermediates(torch.randn(1, 3, 71, 71), output_fmt="NHWC")


def test_maps_that_do_not_exist_are_refused() -> None:
    for indices in ((0, 5), (-6,), 6, 0, ()):
        with pytest.raises(ValueError, match="are not among the 5 feature maps: use 0 to 4"):
            timm.create_model("xception_pl", features_only=True, out_indices=indices, **SMALL)


def test_as_a_classifier() -> None:
    network = timm.create_model("xception_pl", num_classes=5, in_chans=1, drop_rate=0.3, **SMALL)
    assert isinstance(network, Xception)
    assert network.dropout.p == 0.3
    assert network(torch.randn(2, 1, 71, 71)).shape == (2, 5)
    assert timm.data.resolve_data_config(model=network)["mean"] == (0.5, 0.5, 0.5)
    assert network.get_submodule(network.default_cfg["classifier"]) is network.get_classifier()


def test_importing_the_package_is_enough_before_or_after_timm() -> None:
    for imports in ("import xception_pl, timm", "import timm, xception_pl"):
        code = f"{imports}; print(timm.is_model('xception_pl'), timm.create_model('xception_pl.xception', width=0.125).num_classes)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "True 1000\n", done.stderr


def test_the_package_alone_imports_neither_timm_nor_torch() -> None:
    code = "import sys, xception_pl; print({'timm', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_timms_arguments_do_what_they_say(tmp_path: Path) -> None:
    network = Xception(5, **SMALL).eval()  # type: ignore[arg-type]
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    at = {"file": str(tmp_path / "weights.pth"), "num_classes": 5}
    images = torch.randn(2, 3, 71, 71)
    same = timm.create_model("xception_pl.xception", pretrained=True, pretrained_cfg_overlay=at, **SMALL).eval()
    assert torch.equal(same(images), network(images))
    whole = {**same.default_cfg, **at}
    same = timm.create_model("xception_pl", pretrained=True, pretrained_cfg=whole, **SMALL).eval()
    assert torch.equal(same(images), network(images))
    other = timm.create_model(
        "xception_pl", pretrained=True, pretrained_cfg_overlay=at, num_classes=7, in_chans=1, drop_rate=0.4, **SMALL
    ).eval()
    assert other(images[:, :1]).shape == (2, 7)
    assert other.dropout.p == 0.4
    assert torch.equal(other.block1.conv1.weight, network.block1.conv1.weight.sum(1, keepdim=True))  # timm's adaptation
    assert torch.equal(other.block3.sepconv1.pointwise.weight, network.block3.sepconv1.pointwise.weight)
    maps = timm.create_model(
        "xception_pl", pretrained=True, pretrained_cfg_overlay=at, features_only=True, **SMALL
    ).eval()
    for y, expected in zip(maps(images), network.forward_intermediates(images)[1], strict=True):
        assert torch.equal(y, expected)
    unpooled = timm.create_model("xception_pl", num_classes=0, global_pool="", **SMALL).eval()
    unpooled.load_state_dict(network.state_dict(), strict=False)
    assert torch.equal(unpooled(images), network.forward_features(images))
    with pytest.raises(ValueError, match="global_pool='mean' is unknown"):
        timm.create_model("xception_pl", global_pool="mean", **SMALL)


@pytest.mark.parametrize("kind", ["avg", "max", "avgmax", "catavgmax"])
def test_global_pools_are_timms(kind: str, tmp_path: Path) -> None:
    network = timm.create_model("xception_pl", num_classes=5, global_pool=kind, **SMALL).eval()
    images = torch.randn(2, 3, 71, 96)
    features = network.forward_features(images)
    pooled = SelectAdaptivePool2d(pool_type=kind, flatten=True)(features)
    assert network.head_hidden_size == pooled.shape[1] == network.fc.in_features
    torch.testing.assert_close(network.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(network(images), network.fc(pooled))
    network.reset_classifier(0, "avg")
    assert network(images).shape == (2, network.num_features)
    if kind != "avg":  # load_network would pool by the mean
        network.reset_classifier(5, kind)
        with pytest.raises(ValueError, match=f"this network's global_pool is '{kind}', which our files cannot say"):
            write_hub_folder(network, tmp_path / "hub")
