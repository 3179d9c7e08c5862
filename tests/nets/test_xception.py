"""Xception against the paper's numbers and its own claims."""

import copy
import inspect
import math
from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from xception_pl.nets.config import ModelConfig
from xception_pl.nets.convs import SegmentedConv2d
from xception_pl.nets.xception import Xception, same_max_pool


def small(**options: object) -> Xception:
    """Narrow and short, with batch norms away from their identity."""
    options = {"num_classes": 7, "width": 0.25, "middle_blocks": 1, "dropout": 0.0} | options
    network = Xception(**options)  # type: ignore[arg-type]
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                assert tensor is not None
                tensor.data.copy_(0.5 + torch.rand(tensor.shape))
    return network


def on_meta(**options: object) -> Xception:
    """The network without its numbers: enough to count."""
    with torch.device("meta"):
        return Xception(**options)  # type: ignore[arg-type]


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_defaults_are_those_of_the_recipe() -> None:
    recipe = {field.name: field.default for field in fields(ModelConfig)}
    of_any_network = ("name", "bn_momentum", "channels_last", "compile", "kernels")
    of_training = ("weights", "freeze", "freeze_statistics")
    for other in (*of_any_network, *of_training):
        del recipe[other]
    assert {name: p.default for name, p in inspect.signature(Xception).parameters.items()} == recipe


# The paper's numbers


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 22_855_952),  # Table 3
        ({"num_classes": 0}, 20_806_952),  # Keras' include_top=False
        ({"num_classes": 17_000}, 55_639_952),  # JFT
        ({"num_classes": 17_000, "fc_units": (4096, 4096)}, 115_629_968),  # JFT with two fully-connected layers
    ],
)
def test_parameters(options: dict[str, object], count: int) -> None:
    assert parameters(on_meta(**options)) == count


def test_parameters_with_running_statistics() -> None:
    network = on_meta()
    statistics = sum(b.numel() for name, b in network.named_buffers() if name.endswith(("running_mean", "running_var")))
    assert parameters(network) + statistics == 22_910_480


def test_modules_and_convolutions_of_section_3() -> None:
    network = on_meta()
    names = [name for name, _ in network.named_children() if name.startswith("block")]
    assert names == [f"block{n}" for n in range(1, 15)]
    stem = [network.block1.conv1, network.block1.conv2]
    separable = [module for module in network.modules() if isinstance(module, SegmentedConv2d)]
    assert len(stem) + len(separable) == 36
    without_shortcut = [name for name in names[1:] if not (network.get_submodule(name).has_shortcut)]
    assert without_shortcut == ["block14"]
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert (norm.eps, norm.momentum) == (1e-3, 0.01)


@pytest.mark.parametrize(("size", "last"), [(71, 3), (150, 5), (299, 10), (331, 11)])
def test_shapes(size: int, last: int) -> None:
    network = on_meta()
    x = torch.empty(2, 3, size, size, device="meta")
    features = network.forward_features(x)
    assert features.shape == (2, 2048, last, last)
    assert network.forward_head(features, pre_logits=True).shape == (2, 2048)
    assert network(x).shape == (2, 1000)


def test_shapes_of_a_299_image_after_each_block() -> None:
    network, shapes = on_meta(), []
    for n in range(1, 15):
        block = network.get_submodule(f"block{n}")
        block.register_forward_hook(lambda module, args, y: shapes.append((y.shape[1], y.shape[2])))
    network(torch.empty(1, 3, 299, 299, device="meta"))
    assert shapes == [(64, 147), (128, 74), (256, 37), *[(728, 19)] * 9, (1024, 10), (2048, 10)]


def test_the_smallest_image_is_7_pixels() -> None:
    network = small().eval()
    assert network.forward_features(torch.zeros(1, 3, 7, 7)).shape[-2:] == (1, 1)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        network(torch.zeros(1, 3, 6, 6))


@pytest.mark.parametrize("size", range(3, 12))
def test_pooling_pads_as_tensorflow_does(size: int) -> None:
    x = torch.randn(2, 3, size, size + 1)
    windows = [[], []]
    for axis, length in enumerate(x.shape[2:]):
        outputs = math.ceil(
            length / 2
        )  # TensorFlow's definition of SAME: outputs, then padding, the smaller half first
        before = max((outputs - 1) * 2 + 3 - length, 0) // 2
        windows[axis] = [slice(max(0, 2 * i - before), 2 * i - before + 3) for i in range(outputs)]
    expected = [[x[:, :, rows, columns].amax((2, 3)) for columns in windows[1]] for rows in windows[0]]
    assert torch.equal(same_max_pool(x, 2), torch.stack([torch.stack(row, -1) for row in expected], -2))


# Training


def test_every_parameter_gets_a_gradient() -> None:
    network = Xception(num_classes=10, fc_units=(16,)).train()
    network(torch.randn(2, 3, 71, 71)).square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_dropout_acts_in_training_only_and_on_the_last_features_only() -> None:
    network = small(dropout=0.75, fc_units=(400,))
    features = torch.rand(8, network.num_features, 2, 2)
    network.eval()
    kept = network.forward_head(features, pre_logits=True)
    assert torch.equal(network.forward_head(features, pre_logits=True), kept)
    network.train()
    dropped = network.forward_head(features, pre_logits=True)
    alive = kept > 0
    torch.testing.assert_close(dropped[dropped > 0], 4 * kept[dropped > 0])
    assert (dropped[alive] == 0).float().mean().item() == pytest.approx(0.75, abs=0.05)
    network.dropout.p = 0.0
    assert torch.equal(network.forward_head(features, pre_logits=True), kept)


def test_initialisation_has_glorots_limits() -> None:
    network = Xception(num_classes=5, width=0.25, fc_units=(64,))
    for name, weight in network.named_parameters():
        if weight.dim() == 4:  # Keras' fans: of a kernel (h, w, in, out), or of a depthwise one (h, w, channels, 1)
            outputs, inputs = (1, weight.shape[0]) if "depthwise" in name else weight.shape[:2]
            area = weight.shape[2] * weight.shape[3]
            limit = math.sqrt(6 / (area * (inputs + outputs)))
        elif weight.dim() == 2:
            limit = math.sqrt(6 / sum(weight.shape))
        else:
            assert torch.equal(weight, torch.full_like(weight, 1.0 if name.endswith("weight") else 0.0)), name
            continue
        assert 0.97 * limit < weight.abs().max() <= limit, name
        assert abs(weight.std() / (limit / math.sqrt(3)) - 1) < 0.1, name


@pytest.mark.parametrize("recompute", ["eager", "compiled"])
def test_gradient_checkpointing_changes_no_number(recompute: str) -> None:
    plain = small().train()
    recomputed = copy.deepcopy(plain)
    recomputed.set_grad_checkpointing()
    x = torch.randn(2, 3, 71, 71)
    plain(x).square().sum().backward()
    run = recomputed if recompute == "eager" else torch.compile(recomputed, fullgraph=True, backend="aot_eager")
    run(x).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    for (name, a), b in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_gradient_checkpointing_saves_memory() -> None:
    def saved(network: Xception) -> int:
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
        ):
            network(torch.randn(2, 3, 71, 71))
        return sum(sizes.values())

    network = small(middle_blocks=8).train()
    before = saved(network)
    network.set_grad_checkpointing()
    assert saved(network) < 0.5 * before


# How it runs


class ConvolutionLayouts(TorchDispatchMode):
    """Records whether each convolution reads NHWC."""

    def __init__(self) -> None:
        super().__init__()
        self.channels_last: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten.convolution.default:
            self.channels_last.append(args[0].is_contiguous(memory_format=torch.channels_last))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("output_stride", [8, 32])
def test_channels_last_stays_through_the_network(output_stride: int) -> None:
    network = small(output_stride=output_stride).eval()
    x = torch.randn(2, 3, 96, 96)
    expected = network(x)
    network.to(memory_format=torch.channels_last)
    with ConvolutionLayouts() as layouts:
        y = network(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected)
    assert len(layouts.channels_last) == 2 + 2 * 13 + 4
    assert all(layouts.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    network = small().train()
    x = torch.randn(4, 3, 71, 71)
    with torch.autocast("cpu", dtype=dtype):
        y = network(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters()
    )
    y, expected = y.float().detach(), network(x).detach()
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()


def test_compiles_to_one_graph() -> None:
    network = small().eval()
    x = torch.randn(2, 3, 71, 71)
    torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(x), network(x))


@pytest.mark.parametrize("output_stride", [8, 32])
def test_exports_with_any_batch(output_stride: int) -> None:
    network = small(output_stride=output_stride).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (torch.randn(2, 3, 80, 71),), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(5, 3, 80, 71)
    torch.testing.assert_close(program.module()(x), network(x))


# Options


def blocks(network: Xception) -> list[nn.Module]:
    return [module for name, module in network.named_children() if name.startswith("block")]


def test_width_multiplies_and_rounds_to_a_multiple() -> None:
    def widths(**options: object) -> list[int]:
        return [info["num_chs"] for info in on_meta(**options).feature_info]

    assert widths() == [64, 128, 256, 728, 2048]
    assert widths(width=0.25) == [16, 32, 64, 184, 512]  # 182 is no multiple of 8
    assert widths(width=0.25, channel_multiple=1) == [16, 32, 64, 182, 512]
    assert widths(channel_multiple=64) == [64, 128, 256, 704, 2048]
    assert widths(width=0.01) == [8, 8, 8, 8, 24]


@pytest.mark.parametrize("middle", [0, 3, 9])
def test_middle_blocks(middle: int) -> None:
    network = on_meta(middle_blocks=middle)
    assert len(blocks(network)) == 6 + middle
    per_block = 3 * (9 * 728 + 728 * 728 + 2 * 728)
    assert parameters(network) == 22_855_952 + (middle - 8) * per_block
    assert network(torch.empty(1, 3, 71, 71, device="meta")).shape == (1, 1000)


def test_without_residual_connections_the_shortcuts_are_gone() -> None:
    network = small(residual=False).eval()
    assert not [name for name, _ in network.named_modules() if "shortcut" in name]
    zeroed = network.get_submodule("block5")
    for norm in (zeroed.bn3,):
        norm.weight.data.zero_()
        norm.bias.data.zero_()
    x = torch.randn(1, network.feature_info[3]["num_chs"], 4, 4)
    assert not zeroed(x).any()
    with_residual = small().eval().get_submodule("block5")
    with_residual.bn3.weight.data.zero_()
    with_residual.bn3.bias.data.zero_()
    assert torch.equal(with_residual(x), x)
    gone = sum(i * o + 2 * o for i, o in ((64, 128), (128, 256), (256, 728), (728, 1024)))
    assert parameters(on_meta(residual=False)) == 22_855_952 - gone


@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_intermediate_activation_changes_every_separable_convolution(activation: str) -> None:
    network = small(intermediate_activation=activation)
    layers = [m for m in network.modules() if isinstance(m, SegmentedConv2d)]
    assert [type(layer.activation).__name__.lower() for layer in layers] == [activation] * 13
    assert parameters(network) == parameters(small())


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_segments_change_only_the_spatial_weights(segments: int) -> None:
    network = small(segments=segments)
    for name, module in network.named_modules():
        if name.endswith("depthwise"):
            assert module.groups == segments
    spatial = sum(m.depthwise.weight.numel() for m in network.modules() if isinstance(m, SegmentedConv2d))
    inputs = (16, 32, 32, 64, 64, 184, 184, 184, 184, 184, 184, 256, 384)
    layers = [m.depthwise.in_channels for m in network.modules() if isinstance(m, SegmentedConv2d)]
    assert set(layers) == set(inputs)
    assert spatial == sum(9 * c * c // segments for c in layers)
    assert network(torch.randn(2, 3, 71, 71)).shape == (2, 7)


def test_more_segments_need_a_channel_multiple() -> None:
    message = (
        r"segments=16 does not divide the channels of every layer \(64, 128, 256, 728, 1024, 1536\): use one of "
        r"1, 2, 4, 8, or none for one segment a channel, or make channel_multiple \(8\) a multiple of it$"
    )
    with pytest.raises(ValueError, match=message):
        on_meta(segments=16)
    assert on_meta(segments=16, channel_multiple=16).block3.sepconv1.depthwise.groups == 16


def test_fully_connected_layers_are_linear_with_bias_and_relu() -> None:
    network = small(fc_units=(6, 5)).eval()
    features = torch.rand(3, network.num_features, 2, 2)
    first, second = network.fc_layers
    hidden = torch.relu(second(torch.relu(first(features.mean((2, 3))))))
    assert torch.equal(network.forward_head(features, pre_logits=True), hidden)
    assert torch.equal(network.forward_head(features), network.fc(hidden))
    assert (first.bias.shape, second.bias.shape, network.head_hidden_size) == ((6,), (5,), 5)


def test_in_chans() -> None:
    assert small(in_chans=1)(torch.randn(2, 1, 71, 71)).shape == (2, 7)


def test_reset_classifier() -> None:
    network = small().eval().double()
    x = torch.randn(2, 3, 71, 71, dtype=torch.float64)
    features = network.forward_features(x)
    network.reset_classifier(3)
    assert network(x).shape == (2, 3)
    assert network.get_classifier() is network.fc
    network.reset_classifier(0)
    assert torch.equal(network(x), features.mean((2, 3)))
    network.reset_classifier(0, "")
    assert torch.equal(network(x), features)
    with pytest.raises(ValueError, match="global_pool='' leaves feature maps"):
        network.reset_classifier(3)
    with pytest.raises(
        ValueError, match="global_pool='mean' is unknown: use 'avg', 'max', 'avgmax', 'catavgmax', or '' for none"
    ):
        network.reset_classifier(3, "mean")
    with pytest.raises(ValueError, match="twice the features that fc_units were made for"):
        small(fc_units=(4,)).reset_classifier(3, "catavgmax")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": -1}, "num_classes=-1 is negative"),
        ({"in_chans": 0}, "in_chans=0 is no image"),
        ({"dropout": 1.0}, r"dropout=1.0 is no probability"),
        ({"width": 0.0}, "width=0.0 leaves no channels"),
        ({"channel_multiple": 0}, "channel_multiple=0 is no multiple"),
        ({"middle_blocks": -1}, "middle_blocks=-1 is negative"),
        ({"intermediate_activation": "gelu"}, "activation 'gelu' is unknown"),
        ({"segments": 0}, "segments=0 does not divide"),
        ({"fc_units": (4096, 0)}, r"fc_units=\(4096, 0\) has a layer without units"),
        ({"output_stride": 5}, "output_stride=5 is not possible: use 8, 16 or 32"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(**options)


# Dense features


@pytest.mark.parametrize("size", [71, 96, 97, 130])
@pytest.mark.parametrize("output_stride", [16, 8])
def test_a_smaller_output_stride_computes_the_same_function_densely(output_stride: int, size: int) -> None:
    """In evaluation, every pixel of the map at stride 32 is one of the denser map, borders included."""
    network = small().double().eval()
    dense = small(output_stride=output_stride).double().eval()
    dense.load_state_dict(network.state_dict())
    x = torch.randn(1, 3, size, size + 5, dtype=torch.float64)
    step = 32 // output_stride
    torch.testing.assert_close(dense.forward_features(x)[..., ::step, ::step], network.forward_features(x))


@pytest.mark.parametrize("output_stride", [16, 8])
def test_between_those_pixels_lies_the_map_of_the_moved_image(output_stride: int) -> None:
    """Away from the borders, the dense map one pixel on is the map of the image moved by that one pixel's stride."""
    network = small(width=0.1, middle_blocks=0).double().eval()
    dense = small(width=0.1, middle_blocks=0, output_stride=output_stride).double().eval()
    dense.load_state_dict(network.state_dict())
    image = torch.randn(1, 3, 448 + output_stride, 448 + output_stride, dtype=torch.float64)
    step = 32 // output_stride
    between = dense.forward_features(image[..., :448, :448])[..., 1::step, 1::step]
    moved = network.forward_features(image[..., output_stride:, output_stride:])
    torch.testing.assert_close(between[..., 6:8, 6:8], moved[..., 6:8, 6:8])
