"""The spectrum of segmented convolutions: its two ends, and what lies between them."""

import pytest
import torch
from torch import nn

from xception_pl.nets.convs import SegmentedConv2d, SeparableConv2d


def test_one_segment_a_channel_is_the_separable_convolution() -> None:
    separable, segmented = SeparableConv2d(12, 7), SegmentedConv2d(12, 7, segments=12)
    segmented.load_state_dict(separable.state_dict())
    x = torch.randn(2, 12, 6, 5)
    assert torch.equal(segmented(x), separable(x))
    assert sum(p.numel() for p in segmented.parameters()) == 12 * 9 + 12 * 7


def test_one_segment_is_a_regular_convolution_with_a_1x1() -> None:
    segmented = SegmentedConv2d(12, 7, segments=1)
    regular = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.Conv2d(12, 7, 1, bias=False))
    regular.load_state_dict(dict(zip(regular.state_dict(), segmented.state_dict().values(), strict=True)))
    x = torch.randn(2, 12, 6, 5)
    assert torch.equal(segmented(x), regular(x))


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 6, 12])
def test_segments_do_not_see_each_other_before_the_1x1(segments: int) -> None:
    conv = SegmentedConv2d(12, 7, segments=segments)
    x = torch.randn(1, 12, 5, 5, requires_grad=True)
    conv.depthwise(x)[:, 0].sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum((0, 2, 3)) > 0).sum() == 12 // segments
    assert sum(p.numel() for p in conv.parameters()) == 12 * 12 * 9 // segments + 12 * 7


@pytest.mark.parametrize(("name", "function"), [("relu", nn.functional.relu), ("elu", nn.functional.elu)])
def test_the_activation_is_between_the_two_convolutions(name: str, function: torch.nn.Module) -> None:
    conv = SeparableConv2d(4, 5, activation=name)  # type: ignore[arg-type]
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(conv(x), conv.pointwise(function(conv.depthwise(x))))
    assert not torch.allclose(conv(x), conv.pointwise(conv.depthwise(x)))


def test_dilation_spreads_the_kernel_and_keeps_the_size() -> None:
    conv = SeparableConv2d(3, 3, dilation=2)
    x = torch.randn(1, 3, 8, 8)
    assert conv(x).shape == x.shape
    dense = SeparableConv2d(3, 3)
    dense.load_state_dict(conv.state_dict())
    torch.testing.assert_close(conv(x)[..., ::2, ::2], dense(x[..., ::2, ::2]))


def test_bad_options_are_refused_in_one_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"segments=5 does not divide a layer's 12 channels: use one of 1, 2, 3, 4, 6, 12$"
    ):
        SegmentedConv2d(12, 12, segments=5)
    with pytest.raises(ValueError, match="segments=0 does not divide"):
        SegmentedConv2d(12, 12, segments=0)
    with pytest.raises(ValueError, match="kernel_size=2 is even"):
        SeparableConv2d(12, 12, 2)
    with pytest.raises(ValueError, match="activation 'gelu' is unknown: choose one of none, relu, elu"):
        SeparableConv2d(12, 12, activation="gelu")  # type: ignore[arg-type]
