"""The modules of Figures 1 to 4: from Inception V3's module, in four steps, to the edge of a separable convolution.

Every convolution in them is followed by batch normalisation and a ReLU, as in Inception V3. The ReLU after both
operations is one of the two differences to a separable convolution that section 1.2 names; the other is the order: here
the 1 × 1 comes first. All modules keep the spatial size: ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``.
"""

from math import gcd

import torch
from torch import Tensor, nn

from xception_pl.nets.convs import BatchNorm, initialize


class ConvUnit(nn.Module):
    """Convolution without bias, zero-padded to the same size; batch normalisation; ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False
        )
        self.bn = BatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class InceptionModule(nn.Module):
    """Figure 1, the canonical module of Inception V3: four towers over the same input, concatenated in this order.

    Args:
        in_channels: channels of the input.
        tower_1x1: channels of the tower 1 × 1.
        tower_3x3: channels of the tower 1 × 1, 3 × 3.
        tower_3x3_3x3: channels of the tower 1 × 1, 3 × 3, 3 × 3.
        tower_pool: channels of the tower average pooling, 1 × 1. Pixels of the padding do not count in the average.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        tower_1x1: int,
        tower_3x3: tuple[int, int],
        tower_3x3_3x3: tuple[int, int, int],
        tower_pool: int,
    ) -> None:
        super().__init__()
        self.tower_1x1 = ConvUnit(in_channels, tower_1x1, 1)
        a, b = tower_3x3
        self.tower_3x3 = nn.Sequential(ConvUnit(in_channels, a, 1), ConvUnit(a, b, 3))
        a, b, c = tower_3x3_3x3
        self.tower_3x3_3x3 = nn.Sequential(ConvUnit(in_channels, a, 1), ConvUnit(a, b, 3), ConvUnit(b, c, 3))
        self.tower_pool = nn.Sequential(
            nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), ConvUnit(in_channels, tower_pool, 1)
        )
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.tower_1x1(x), self.tower_3x3(x), self.tower_3x3_3x3(x), self.tower_pool(x)], dim=1)


class SimplifiedInceptionModule(nn.Module):
    """Figure 2: only towers of 1 × 1 then 3 × 3, all alike, concatenated.

    Args:
        in_channels: channels of the input.
        mid_channels: outputs of all 1 × 1 convolutions together.
        out_channels: outputs of all 3 × 3 convolutions together.
        towers: three in the figure; a divisor of `mid_channels` and of `out_channels`.

    Raises:
        ValueError: `towers` does not divide both.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, *, towers: int = 3) -> None:
        super().__init__()
        _check_divides("towers", towers, mid_channels, out_channels)
        self.towers = nn.ModuleList(
            nn.Sequential(
                ConvUnit(in_channels, mid_channels // towers, 1),
                ConvUnit(mid_channels // towers, out_channels // towers, 3),
            )
            for _ in range(towers)
        )
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([tower(x) for tower in self.towers], dim=1)


class GroupedInceptionModule(nn.Module):
    """Figure 3: one large 1 × 1, then 3 × 3 convolutions over segments of its output that do not overlap.

    Strictly equivalent to Figure 2 with ``towers = groups``: :meth:`from_simplified` carries its weights over.

    Args:
        in_channels: channels of the input.
        mid_channels: outputs of the 1 × 1.
        out_channels: outputs of the 3 × 3.
        groups: segments; a divisor of `mid_channels` and of `out_channels`.

    Raises:
        ValueError: `groups` does not divide both.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, *, groups: int = 3) -> None:
        super().__init__()
        _check_divides("groups", groups, mid_channels, out_channels)
        self.pointwise = ConvUnit(in_channels, mid_channels, 1)
        self.spatial = ConvUnit(mid_channels, out_channels, 3, groups=groups)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(x)
        x = self.spatial(x)
        return x

    @staticmethod
    def from_simplified(module: SimplifiedInceptionModule) -> "GroupedInceptionModule":
        """The module that computes the same function: the weights and statistics of the towers, one after another."""
        pointwise: list[ConvUnit] = [tower[0] for tower in module.towers]  # type: ignore[index, misc]
        spatial: list[ConvUnit] = [tower[1] for tower in module.towers]  # type: ignore[index, misc]
        weight = pointwise[0].conv.weight
        grouped = GroupedInceptionModule(
            in_channels=weight.shape[1],
            mid_channels=sum(unit.conv.out_channels for unit in pointwise),
            out_channels=sum(unit.conv.out_channels for unit in spatial),
            groups=len(module.towers),
        ).to(weight.device, weight.dtype)
        for joined, units in ((grouped.pointwise, pointwise), (grouped.spatial, spatial)):
            states = [unit.state_dict() for unit in units]
            for name, value in joined.state_dict().items():
                if value.dim() > 0:  # all but the count of batches
                    value.copy_(torch.cat([state[name] for state in states]))
        return grouped.train(module.training)


class ExtremeInceptionModule(GroupedInceptionModule):
    """Figure 4, the "extreme" module: a 1 × 1, then one 3 × 3 for each of its output channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, out_channels, groups=out_channels)


def _check_divides(name: str, count: int, mid_channels: int, out_channels: int) -> None:
    if count < 1 or mid_channels % count or out_channels % count:
        raise ValueError(
            f"{name}={count} does not divide both mid_channels={mid_channels} and out_channels={out_channels}: "
            f"use a divisor of {gcd(mid_channels, out_channels)}"
        )
