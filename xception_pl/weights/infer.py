"""The network that tensors belong to, where no description comes with them: read from names and shapes."""

import re
import warnings

from torch import nn

from xception_pl.nets.config import ModelConfig
from xception_pl.nets.convs import SegmentedConv2d
from xception_pl.nets.xception import Stem, Xception
from xception_pl.weights.layout import OURS, Layout
from xception_pl.weights.stored import Stored, WeightsError


def infer_model(stored: Stored, layout: Layout) -> ModelConfig:
    """The model section of a recipe that makes the network of these tensors, as far as shapes tell.

    What shapes do not tell is the paper's: no activation inside separable convolutions, stride 32; the numerics are
    those of the family of files.

    Raises:
        WeightsError: tensors that decide the layout are absent or of impossible shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()}

    def shape(our_name: str, dims: int) -> tuple[int, ...]:
        name = layout.rename(our_name)
        found = shapes.get(name, ())
        if len(found) != dims or 0 in found:
            there = f"of shape {found}" if name in shapes else "missing"
            raise WeightsError(f"{stored.source} is no Xception: its tensor {name} is {there}.")
        return found

    conv1 = layout.from_file("block1.conv1.weight", stored.tensors[layout.rename("block1.conv1.weight")])
    shape("block1.conv1.weight", 4)
    head = layout.rename("fc.bias")
    model = ModelConfig(
        num_classes=shapes[head][0] if len(shapes.get(head, ())) == 1 else 0,
        in_chans=conv1.shape[1],
        numerics=layout.numerics,
    )
    if layout is not OURS:  # the other families have no other networks
        return model
    blocks = [int(found[1]) for name in shapes if (found := re.match(r"block(\d+)\.", name))]
    model.middle_blocks = min(max(blocks), len(shapes)) - 6
    if model.middle_blocks < 0:
        raise WeightsError(f"{stored.source} is no whole Xception: its last block is {max(blocks)}.")
    last = max(blocks)
    layers_of_figure5 = {
        32: "block1.conv1.weight",
        64: "block1.conv2.weight",
        128: "block2.sepconv1.pointwise.weight",
        256: "block3.sepconv1.pointwise.weight",
        728: "block4.sepconv1.pointwise.weight",
        1024: f"block{last - 1}.sepconv2.pointwise.weight",
        1536: f"block{last}.sepconv1.pointwise.weight",
        2048: f"block{last}.sepconv2.pointwise.weight",
    }
    widths = {channels: shape(name, 4)[0] for channels, name in layers_of_figure5.items()}
    model.width, model.channel_multiple = _width(widths)
    channels, group = shape("block3.sepconv1.depthwise.weight", 4)[:2]
    model.segments = None if group == 1 else channels // group
    model.residual = "block2.shortcut.weight" in shapes
    layers = sum(bool(re.fullmatch(r"fc_layers\.\d+\.weight", name)) for name in shapes)
    model.fc_units = tuple(shape(f"fc_layers.{i}.weight", 2)[0] for i in range(layers))
    warnings.warn(
        f"{stored.source} has our names but no description: shapes decide the network, with Keras' numerics",
        stacklevel=4,
    )
    return model


def model_of(network: Xception) -> ModelConfig:
    """The model section of a recipe that makes an equal network. Widths that round to the same channels are equal.

    Raises:
        WeightsError: the network is no whole Xception: pruned, padded at the stem, pooled otherwise, or its batch norm folded.
    """
    stem, first = network.block1, network.get_submodule("block3.sepconv1")
    whole = isinstance(stem, Stem) and isinstance(first, SegmentedConv2d) and stem.conv1.padding == (0, 0)
    if not whole or not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        raise WeightsError(
            "this network is no whole Xception: it was pruned, padded or folded; take the one it was made from"
        )
    assert isinstance(first, SegmentedConv2d)
    if network.global_pool != "avg":
        raise WeightsError(
            f"this network's global_pool is {network.global_pool!r}, which our files cannot say: save its state_dict(), and "
            "load that with timm.create_model('xception_pl', global_pool=…)"
        )
    names = {nn.Identity: "none", nn.ReLU: "relu", nn.ELU: "elu"}
    stored = Stored("the network", "a network", network.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = infer_model(stored, OURS)
    model.dropout = network.dropout.p
    model.numerics = network.numerics
    model.intermediate_activation = names[type(first.activation)]  # type: ignore[assignment]
    model.output_stride = network.feature_info[-1]["reduction"]
    return model


def check_layout(network: Xception, whose: str, numerics: str, instead: str) -> None:
    """Refuses a network that another library's Xception, which has no options, could not compute.

    Raises:
        WeightsError: with what to do instead.
    """
    model, paper = model_of(network), ModelConfig()
    for key in (
        "width",
        "middle_blocks",
        "residual",
        "intermediate_activation",
        "segments",
        "fc_units",
        "output_stride",
    ):
        if getattr(model, key) != getattr(paper, key):
            raise WeightsError(f"{whose} has no {key} {getattr(model, key)}, only {getattr(paper, key)}: {instead}.")
    if model.numerics != numerics:
        raise WeightsError(
            f"{whose} computes with numerics {numerics}, these weights need {model.numerics}: {instead}."
        )


def _width(widths: dict[int, int]) -> tuple[float, int]:
    """`width` and `channel_multiple` that make these channel counts of Figure 5's; (1, 8) where none do.

    Xception rounds ``channels · width`` to the nearest multiple, at least one: each count gives an interval for the width.
    """
    if all(count == channels for channels, count in widths.items()):
        return 1.0, 8
    for multiple in (8, 1, 2, 3, 4, 6, 12, 16, 24, 32, 64):
        if any(count % multiple for count in widths.values()):
            continue
        low = max(0 if count == multiple else (count - multiple / 2) / channels for channels, count in widths.items())
        high = min((count + multiple / 2) / channels for channels, count in widths.items())
        if low < high:
            middle = (low + high) / 2
            return next((round(middle, d) for d in range(1, 9) if low <= round(middle, d) < high), middle), multiple
    return 1.0, 8
