"""The spectrum from a regular to a depthwise separable convolution, by number of channel segments (sections 1.2, 5)."""

from functools import partial
from typing import Literal, get_args

from torch import Tensor, nn

Activation = Literal["none", "relu", "elu"]

# Keras' BatchNormalization: epsilon 1e-3, and momentum 0.99, which weighs the old statistics; PyTorch's weighs the new.
BatchNorm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


def activation_layer(name: Activation) -> nn.Module:
    """The layer that `name` stands for: none, relu or elu (alpha 1)."""
    if name == "none":
        return nn.Identity()
    if name == "relu":
        return nn.ReLU()
    if name == "elu":
        return nn.ELU()
    raise ValueError(f"activation {name!r} is unknown: choose one of {', '.join(get_args(Activation))}")


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, in increasing order."""
    return [d for d in range(1, number + 1) if number % d == 0]


class SegmentedConv2d(nn.Module):
    """A spatial convolution inside each of `segments` groups of channels, then a 1 × 1 convolution across all of them.

    The paper's discrete spectrum: `segments=1` is a regular convolution with a 1 × 1, three or four is an Inception
    module, `segments=in_channels` is :class:`SeparableConv2d`, weight for weight. Only the number of groups changes
    along the spectrum: widths, order and receptive field stay, and the spatial convolution has
    ``in_channels² · kernel_size² / segments`` weights.

    Order: the paper's Inception modules do the 1 × 1 first, a separable convolution does it last, and the paper holds
    the difference to be unimportant in a stack (section 1.2), where the 1 × 1 of one layer precedes the spatial
    convolution of the next. Here the 1 × 1 is always last, so that the end of the spectrum is exactly the layer that
    Xception uses; the other order is in :mod:`xception_pl.nets.inception`.

    The spatial convolution is named `depthwise` at every segment count: weights keep their names along the spectrum.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd, of the spatial convolution.
        segments: groups of channels, a divisor of `in_channels`.
        activation: between the spatial and the 1 × 1 convolution: none, relu or elu (section 4.7, Figure 10).
        dilation: of the spatial convolution.

    Shape: ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``: stride 1, zero-padded to the same size, no bias.

    Raises:
        ValueError: `segments` does not divide `in_channels`, or `kernel_size` is even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        segments: int,
        activation: Activation = "none",
        dilation: int = 1,
    ) -> None:
        super().__init__()
        if segments < 1 or in_channels % segments:
            counts = ", ".join(map(str, divisors(in_channels)))
            raise ValueError(
                f"segments={segments} does not divide a layer's {in_channels} channels: use one of {counts}"
            )
        if kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size={kernel_size} is even: use an odd one, so that the output keeps the input's size"
            )
        padding = dilation * (kernel_size // 2)
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, kernel_size, padding=padding, dilation=dilation, groups=segments, bias=False
        )
        self.activation = activation_layer(activation)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(x)
        x = self.activation(x)
        x = self.pointwise(x)
        return x


class SeparableConv2d(SegmentedConv2d):
    """A depthwise separable convolution: one spatial kernel a channel, then a 1 × 1; nothing between them by default.

    The extreme of the spectrum (section 1.3); Keras' `SeparableConv2D` with depth multiplier 1 and no bias.
    Arguments, shapes and errors are those of :class:`SegmentedConv2d`, less `segments`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        activation: Activation = "none",
        dilation: int = 1,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, segments=in_channels, activation=activation, dilation=dilation
        )


def initialize(network: nn.Module) -> None:
    """Keras' defaults (keras/src/layers/convolutional): Glorot uniform kernels, zero biases.

    Keras counts a depthwise kernel (3, 3, C, 1) as 9·C units in and 9 out, PyTorch its (C, 1, 3, 3) as 9 in and 9·C
    out; Glorot's limit, sqrt(6 / (in + out)), is the same, here and for every other kernel.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
