"""Random numbers on the device as a pure function of each image's seed.

A generator would tie an image's draws to its place in a batch. Here each image hashes (its seed, the name of the draw),
so the result is the same whatever the batch, the rank or the device.
"""

import math
import zlib

import torch
from torch import Tensor


def uniform(seed: Tensor, name: str, count: int) -> Tensor:
    """Numbers in [0, 1), float32, (B, count), from `seed` (B,) int64; another `name` gives independent numbers.

    SplitMix64 (Steele, Lea and Flood, 2014): its output function applied to a counter that starts at a hash of the
    seed and the name.
    """
    start = _mix(_mix(seed) ^ zlib.crc32(name.encode()))
    counter = torch.arange(1, count + 1, device=seed.device, dtype=torch.int64)
    bits = _mix(start[:, None] + counter * _GOLDEN)
    return (bits >> 40 & 0xFFFFFF).to(torch.float32) * 2.0**-24


def beta(seed: Tensor, name: str, alpha: float) -> Tensor:
    """One draw of the symmetric Beta(alpha, alpha) for each seed: float64 (B,) in [0, 1].

    The ratio of two Gamma draws, in logarithms so that a small alpha does not underflow to 0/0.
    """
    first, second = _log_gamma_draw(seed, f"{name}/1", alpha), _log_gamma_draw(seed, f"{name}/2", alpha)
    return torch.sigmoid(first - second)


def _log_gamma_draw(seed: Tensor, name: str, alpha: float) -> Tensor:
    """Log of a Gamma(alpha) draw by Marsaglia and Tsang (2000), float64 (B,).

    Their loop is unrolled to 12 attempts; each succeeds with more than 95 %, so all fail once in 10^15 draws.
    """
    attempts = 12
    u = uniform(seed, name, 3 * attempts + 1).to(torch.float64) + 2.0**-25  # never 0
    normal = (-2 * u[:, :attempts].log()).sqrt() * torch.cos(2 * torch.pi * u[:, attempts : 2 * attempts])
    d = alpha + 1 - 1 / 3  # Gamma(alpha) = Gamma(alpha + 1) · U^(1 / alpha)
    v = (1 + normal / (9 * d) ** 0.5).pow(3)
    log_v = v.clamp_min(1e-300).log()
    accepted = (v > 0) & (u[:, 2 * attempts : 3 * attempts].log() < 0.5 * normal.square() + d * (1 - v + log_v))
    first = accepted.to(torch.uint8).argmax(1, keepdim=True)
    log_v = log_v.gather(1, first).squeeze(1)
    log_draw: Tensor = log_v + math.log(d) + u[:, -1].log() / alpha
    return log_draw


_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser. int64 wraps; the masks turn arithmetic shifts into logical ones."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & 0x1FFFFFFFF)
