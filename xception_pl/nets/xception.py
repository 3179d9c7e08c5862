"""Xception as Figure 5 draws it, in the numerics of its author's Keras implementation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from math import gcd
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xception_pl.nets.convs import Activation, BatchNorm, SegmentedConv2d, SeparableConv2d, divisors, initialize
from xception_pl.nets.pooling import POOLS, global_pooling
from xception_pl.nets.preprocessing import Preprocessing
from xception_pl.optim.config import Loss

Numerics = Literal["keras", "torch"]


def same_max_pool(x: Tensor, stride: int, dilation: int = 1) -> Tensor:
    """3 × 3 max pooling with the padding that TensorFlow's SAME gives to a stride of 2.

    SAME pads one pixel after an even size, one before and one after an odd one, always with -inf; PyTorch's
    ``padding=1`` would start every window of an even size one pixel earlier.

    With stride 1 this is the same pooling computed at every pixel: if only every `dilation`-th pixel of `x` exists in
    the network that is not dilated, then every ``2 · dilation``-th pixel of the result is that network's result, at
    the borders too.

    Shape: ``(B, C, H, W)`` to ``(B, C, ceil(H / stride), ceil(W / stride))``.
    """
    if stride == 2 and torch.compiler.is_exporting():  # no padding that depends on a size: the program takes them all
        # SAME pads by parity at the start and by one pixel at the end; seen from the end, by one pixel always.
        return padded_max_pool(x.flip(2, 3), stride, dilation).flip(2, 3)
    height, width = x.shape[-2:]
    # Whether the size is odd in the network that is not dilated decides where the windows start.
    top = dilation * (-(-height // dilation) % 2)
    left = dilation * (-(-width // dilation) % 2)
    if stride == 2:
        # ceil_mode lets the last window reach one pixel over the end: the padding after, without a copy.
        return F.max_pool2d(x, 3, stride=2, padding=(top, left), ceil_mode=True)
    padded = F.pad(x, (left, 2 * dilation - left, top, 2 * dilation - top), value=-torch.inf)
    return F.max_pool2d(padded, 3, stride=1, dilation=dilation)


def padded_max_pool(x: Tensor, stride: int, dilation: int = 1) -> Tensor:
    """3 × 3 max pooling with one pixel of padding on every side: PyTorch's, which timm's port of Xception uses.

    Arguments and shape are those of :func:`same_max_pool`, from which it differs at even sizes.
    """
    return F.max_pool2d(x, 3, stride=stride, padding=dilation, dilation=dilation)


class Stem(nn.Module):
    """Block 1: two regular convolutions without padding, each followed by batch normalisation and ReLU."""

    def __init__(self, in_channels: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, stride=2, bias=False)
        self.bn1 = BatchNorm(widths[0])
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, bias=False)
        self.bn2 = BatchNorm(widths[1])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return x


class Block(nn.Module):
    """A module of Figure 5: ReLU, separable convolution, batch normalisation, repeated; pooling; plus a shortcut.

    Args:
        in_channels: channels of the input.
        widths: output channels of each separable convolution, for example (728, 728, 728) or (728, 1024).
        conv: makes a separable convolution (or another of the spectrum) from its input channels, its output channels
            and ``dilation=``.
        relu_first: whether a ReLU precedes the first convolution. The shortcut reads the input before it.
        pool_stride: stride of the 3 × 3 max pooling at the end and of the shortcut's 1 × 1 convolution; None for no
            pooling and an identity shortcut.
        shortcut: whether there is one.
        dilation: of convolutions and pooling.
        numerics: "keras" pools as TensorFlow's SAME does, "torch" with one pixel of padding on every side.

    Shape: ``(B, in_channels, H, W)`` to ``(B, widths[-1], ceil(H / pool_stride), ceil(W / pool_stride))``.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...],
        conv: Callable[..., nn.Module],
        *,
        relu_first: bool = True,
        pool_stride: int | None = None,
        shortcut: bool = True,
        dilation: int = 1,
        numerics: Numerics = "keras",
    ) -> None:
        super().__init__()
        self.depth = len(widths)
        self.relu_first = relu_first
        self.pool_stride = pool_stride
        self.has_shortcut = shortcut
        self.dilation = dilation
        self.numerics = numerics
        for i, (channels, width) in enumerate(zip((in_channels, *widths), widths, strict=False), start=1):
            self.add_module(f"sepconv{i}", conv(channels, width, dilation=dilation))
            self.add_module(f"bn{i}", BatchNorm(width))
        self.shortcut: nn.Module | None = None
        if shortcut and pool_stride is not None:
            self.shortcut = nn.Conv2d(in_channels, widths[-1], 1, stride=pool_stride, bias=False)
            self.shortcut_bn = BatchNorm(widths[-1])
        assert in_channels == widths[-1] or pool_stride or not shortcut, "an identity shortcut keeps the channels"

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs
        for i in range(1, self.depth + 1):
            if i > 1 or self.relu_first:
                x = F.relu(x)  # never in place: the shortcut reads the same tensor
            x = self.get_submodule(f"sepconv{i}")(x)
            x = self.get_submodule(f"bn{i}")(x)
        if self.pool_stride is not None:
            pool = same_max_pool if self.numerics == "keras" else padded_max_pool
            x = pool(x, self.pool_stride, self.dilation)
        if self.shortcut is not None:
            x = x + self.shortcut_bn(self.shortcut(inputs))
        elif self.has_shortcut:
            x = x + inputs
        return x


class Xception(nn.Module):
    """Xception: Deep Learning with Depthwise Separable Convolutions (Chollet, CVPR 2017), Figure 5.

    With its defaults: 22,855,952 parameters (Table 3), 36 convolutions in 14 modules. It takes images scaled to
    [-1, 1], 299 × 299 in the paper. Any size of 7 pixels or more computes; Keras refuses sizes below 71, whose last
    feature map would be smaller than 3 × 3, and so does a recipe; the network itself does not check. `torch.export` may
    leave batch, height and width open.

    Blocks have the paper's numbers as names (`block1` … `block14`), and inside them the layers have those of Keras'
    `keras.applications.Xception` (`sepconv1` …). With other than eight middle blocks the numbers go on without a gap.
    Method names are timm's.

    Args:
        num_classes: outputs of the logistic layer; 0 for none (`forward` then gives the features before it).
        in_chans: channels of the image.
        dropout: probability of dropping a feature before the logistic layer.
        width: multiplies every channel count.
        channel_multiple: channel counts are rounded to the nearest multiple of this, at least one.
        middle_blocks: blocks of the middle flow.
        residual: shortcut connections on or off (section 4.6, Figure 9). Off, their 1 × 1 convolutions are absent too.
        intermediate_activation: none, relu or elu between depthwise and pointwise convolution (section 4.7, Figure 10).
        segments: channel segments of the spatial convolutions, :class:`~xception_pl.nets.convs.SegmentedConv2d`;
            None for one a channel, as in the paper.
        fc_units: units of the fully-connected layers between pooling and logistic layer, (4096, 4096) in the paper's
            second JFT network. The paper does not state their details; here each is a linear layer with bias and a
            ReLU, without batch normalisation, and dropout acts once, before the logistic layer.
        output_stride: image pixels per pixel of the last feature map: 32, or 16 or 8 by dilation. The weights stay the
            same, and every ``32 / output_stride``-th pixel of the last map is the map at stride 32.
        grad_checkpointing: recompute each block's activations in the backward pass.
        numerics: "keras" for the author's epsilon and momentum of batch norm and TensorFlow's padding of the pooling;
            "torch" for PyTorch's defaults of all three, with which timm's and Cadene's weights were trained. Weights
            of the one give other outputs under the other.

    Attributes:
        preprocessing: how the images that the weights know were prepared,
        class_names: what the outputs are called,
        loss: by which of `optim.loss` logits become probabilities, and
        results: what was measured with them; all set by :func:`xception_pl.load_network`.

    Shape: ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``.

    Raises:
        ValueError: an option is out of its range, or `segments` does not divide the channels of every layer.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        dropout: float = 0.5,
        width: float = 1.0,
        channel_multiple: int = 8,
        middle_blocks: int = 8,
        residual: bool = True,
        intermediate_activation: Activation = "none",
        segments: int | None = None,
        fc_units: Sequence[int] = (),
        output_stride: Literal[8, 16, 32] = 32,
        grad_checkpointing: bool = False,
        numerics: Numerics = "keras",
    ) -> None:
        super().__init__()
        self.preprocessing = Preprocessing()
        self.class_names: list[str] | None = None
        self.loss: Loss = "cross_entropy"
        self.results: dict[str, float | str] | None = None
        _check_options(
            num_classes=num_classes,
            in_chans=in_chans,
            dropout=dropout,
            width=width,
            channel_multiple=channel_multiple,
            middle_blocks=middle_blocks,
            fc_units=fc_units,
            output_stride=output_stride,
            numerics=numerics,
        )
        # channel counts, by their names in Figure 5
        c32, c64, c128, c256, c728, c1024, c1536, c2048 = (
            max(1, int(channels * width / channel_multiple + 0.5)) * channel_multiple
            for channels in (32, 64, 128, 256, 728, 1024, 1536, 2048)
        )
        if segments is not None:
            _check_segments(segments, (c64, c128, c256, c728, c1024, c1536), channel_multiple)

        def conv(in_channels: int, out_channels: int, *, dilation: int) -> nn.Module:
            if segments is None:
                return SeparableConv2d(in_channels, out_channels, activation=intermediate_activation, dilation=dilation)
            return SegmentedConv2d(
                in_channels, out_channels, segments=segments, activation=intermediate_activation, dilation=dilation
            )

        # Below stride 32 the last one or two poolings move one pixel at a time and what follows is dilated instead.
        stride4 = 2 if output_stride >= 16 else 1
        stride13 = 2 if output_stride >= 32 else 1
        dilation5 = 2 // stride4
        dilation14 = dilation5 * 2 // stride13

        block = partial(Block, numerics=numerics)
        # entry flow
        self.block1 = Stem(in_chans, (c32, c64))
        self.block2 = block(c64, (c128, c128), conv, pool_stride=2, shortcut=residual, relu_first=False)
        self.block3 = block(c128, (c256, c256), conv, pool_stride=2, shortcut=residual)
        self.block4 = block(c256, (c728, c728), conv, pool_stride=stride4, shortcut=residual)
        # middle flow
        for number in range(5, 5 + middle_blocks):
            self.add_module(
                f"block{number}", block(c728, (c728, c728, c728), conv, shortcut=residual, dilation=dilation5)
            )
        # exit flow
        block13 = block(c728, (c728, c1024), conv, pool_stride=stride13, shortcut=residual, dilation=dilation5)
        block14 = block(c1024, (c1536, c2048), conv, relu_first=False, shortcut=False, dilation=dilation14)
        self.add_module(f"block{5 + middle_blocks}", block13)
        self.add_module(f"block{6 + middle_blocks}", block14)
        # head
        self.fc_layers = nn.ModuleList(
            nn.Linear(before, units) for before, units in zip((c2048, *fc_units), fc_units, strict=False)
        )
        self.dropout = nn.Dropout(dropout)
        self.num_features = c2048
        self.head_hidden_size = fc_units[-1] if fc_units else c2048
        self.global_pool = "avg"
        self.num_classes = num_classes
        self.fc = self._logistic_layer(num_classes)

        if numerics == "torch":
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps, module.momentum = 1e-5, 0.1
        self.numerics = numerics
        self.middle_blocks = middle_blocks
        self.grad_checkpointing = grad_checkpointing
        # the maps of a feature extractor: the numbers of the blocks that end in them, and what timm tells of them
        self.feature_ends = (1, 2, 3, 4 + middle_blocks, 6 + middle_blocks)
        channels = (c64, c128, c256, c728, c2048)
        strides = (2, 4, 8, min(16, output_stride), output_stride)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": count, "reduction": stride, "module": f"block{number}"}
            for count, stride, number in zip(channels, strides, self.feature_ends, strict=True)
        ]
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``."""
        x = self.forward_features(x)
        return self.forward_head(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last feature map, ``(B, num_features, H', W')``; in comments, for images of 299 × 299."""
        run = self._recomputed if self.grad_checkpointing and torch.is_grad_enabled() else _called
        x = run(self.block1, x)  # (B, 64, 147, 147)
        x = run(self.block2, x)  # (B, 128, 74, 74)
        x = run(self.block3, x)  # (B, 256, 37, 37)
        x = run(self.block4, x)  # (B, 728, 19, 19)
        *middle, block13, block14 = self._blocks()[4:]
        for block in middle:
            x = run(block, x)  # (B, 728, 19, 19)
        x = run(block13, x)  # (B, 1024, 10, 10)
        x = run(block14, x)  # (B, 2048, 10, 10)
        return F.relu(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last feature map to logits, or to what the logistic layer reads, ``(B, head_hidden_size)``."""
        x = global_pooling(x, self.global_pool)  # (B, 2048)
        for layer in self.fc_layers:
            x = F.relu(layer(x))
        x = self.dropout(x)
        return x if pre_logits else self.fc(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps at several strides, as timm's method of this name, which `FeatureGetterNet` calls.

        Args:
            x: images ``(B, in_chans, H, W)``.
            indices: which of the five maps of `feature_info`; an int for the last so many, None for all.
            norm: no effect: there is no norm after the last layer to apply.
            stop_early: end after the last wanted map; the first result is then that map.
            output_fmt: NCHW.
            intermediates_only: return the list of maps alone.

        Returns:
            The last feature map and the list of maps, each after a ReLU, as the next block would read it.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is not supported: feature maps are NCHW")
        run = self._recomputed if self.grad_checkpointing and torch.is_grad_enabled() else _called
        taps = [self.feature_ends[i] for i in self._map_indices(indices)]
        maps = []
        blocks = self._blocks()[: max(taps) if stop_early or intermediates_only else None]
        for number, block in enumerate(blocks, start=1):
            x = run(block, x)
            if number in taps:
                maps.append(F.relu(x))
        if intermediates_only:
            return maps
        return F.relu(x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks that no map of `indices` needs, and the head, as timm does. Returns the maps' indices."""
        kept = self._map_indices(indices)
        last, end = self.feature_ends[max(kept)], self.feature_ends[-1]
        for number in range(last + 1, end + 1):
            setattr(self, f"block{number}", nn.Identity())
        if prune_head or last < end:
            self.num_features = self.head_hidden_size = self.feature_info[max(kept)]["num_chs"]
            self.fc_layers = nn.ModuleList()
            self.reset_classifier(0, "")
        return kept

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new logistic layer, or for 0 classes none; `global_pool` is one of `POOLS`, or "" for none; None leaves it."""
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool not in (*POOLS, ""):
            raise ValueError(
                f"global_pool={global_pool!r} is unknown: use {', '.join(map(repr, POOLS))}, or '' for none"
            )
        if global_pool == "" and (num_classes or self.fc_layers):
            raise ValueError("global_pool='' leaves feature maps, which fully-connected layers cannot read: use 'avg'")
        if global_pool == "catavgmax" and self.fc_layers:
            raise ValueError(
                "global_pool='catavgmax' gives twice the features that fc_units were made for: use 'avgmax'"
            )
        self.global_pool = global_pool
        if not self.fc_layers:
            self.head_hidden_size = self.num_features * (2 if global_pool == "catavgmax" else 1)
        weight = next(self.parameters())
        self.num_classes = num_classes
        self.fc = self._logistic_layer(num_classes).to(weight.device, weight.dtype)

    def get_classifier(self) -> nn.Module:
        """The logistic layer."""
        return self.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm numbers parameters by depth: block 1 is 0, the head comes last; `coarse` makes no difference."""
        return {"stem": r"^block1\.", "blocks": [(r"^block(\d+)\.", None)]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether to recompute each block's activations in the backward pass. Results do not change."""
        self.grad_checkpointing = enable

    def _logistic_layer(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        layer = nn.Linear(self.head_hidden_size, num_classes)
        initialize(layer)
        return layer

    def _blocks(self) -> list[nn.Module]:
        return [getattr(self, f"block{number}") for number in range(1, 7 + self.middle_blocks)]

    def _map_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Which of the maps of `feature_info` timm's `indices` mean, counted from 0."""
        maps = len(self.feature_info)
        if indices is None:
            return list(range(maps))
        wanted = range(-indices, 0) if isinstance(indices, int) else indices
        if not wanted or not all(-maps <= i < maps for i in wanted):
            raise ValueError(f"indices={indices} are not among the {maps} feature maps: use 0 to {maps - 1}")
        return [i % maps for i in wanted]

    def _recomputed(self, block: nn.Module, x: Tensor) -> Any:
        if torch.compiler.is_compiling():  # a compiled graph updates the running statistics once by itself
            return checkpoint(block, x, use_reentrant=False)
        return checkpoint(block, x, use_reentrant=False, context_fn=partial(_recompute_contexts, block))


def _called(block: nn.Module, x: Tensor) -> Any:
    return block(x)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch normalisation still normalises by the batch, but adds nothing to its running statistics."""
    kept = [
        (norm, norm.momentum, norm.num_batches_tracked) for norm in block.modules() if isinstance(norm, nn.BatchNorm2d)
    ]
    for norm, _, _ in kept:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count


def _recompute_contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of the first and the second pass; the second must not count the batch in the statistics again."""
    return nullcontext(), _statistics_kept(block)


def _check_options(
    *,
    num_classes: int,
    in_chans: int,
    dropout: float,
    width: float,
    channel_multiple: int,
    middle_blocks: int,
    fc_units: Sequence[int],
    output_stride: int,
    numerics: str,
) -> None:
    if num_classes < 0:
        raise ValueError(
            f"num_classes={num_classes} is negative: give the number of classes, or 0 for no logistic layer"
        )
    if in_chans < 1:
        raise ValueError(f"in_chans={in_chans} is no image: use 3 for colour, 1 for grayscale")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is no probability of dropping: use 0 or more, and less than 1")
    if not width > 0:
        raise ValueError(f"width={width} leaves no channels: use a number above 0, such as 1.0 for the paper's widths")
    if channel_multiple < 1:
        raise ValueError(f"channel_multiple={channel_multiple} is no multiple: use 1 or more, such as 8")
    if middle_blocks < 0:
        raise ValueError(f"middle_blocks={middle_blocks} is negative: use 0 or more, such as the paper's 8")
    if any(units < 1 for units in fc_units):
        raise ValueError(f"fc_units={tuple(fc_units)} has a layer without units: use 1 or more each, or no layer: ()")
    if output_stride not in (8, 16, 32):
        raise ValueError(f"output_stride={output_stride} is not possible: use 8, 16 or 32")
    if numerics not in get_args(Numerics):
        raise ValueError(f"numerics={numerics!r} is unknown: use 'keras', or 'torch' for weights of timm's port")


def _check_segments(segments: int, layers: tuple[int, ...], channel_multiple: int) -> None:
    if segments >= 1 and all(channels % segments == 0 for channels in layers):
        return
    counts = ", ".join(map(str, divisors(gcd(*layers))))
    raise ValueError(
        f"segments={segments} does not divide the channels of every layer ({', '.join(map(str, layers))}): use one of "
        f"{counts}, or none for one segment a channel, or make channel_multiple ({channel_multiple}) a multiple of it"
    )
