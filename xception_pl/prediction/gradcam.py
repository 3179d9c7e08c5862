"""Grad-CAM (Selvaraju et al., ICCV 2017): where in the picture the network found its class."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from xception_pl.data.decode import Pixels

_OPACITY = 0.45


def grad_cam(network: Any, images: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, heat maps and features of images, in one pass and a backward one through the head alone.

    A map is `relu(sum over channels of w_c A_c)`, of the last feature map A with the weights `w_c`, the mean over A_c
    of the logit's gradient; then divided by its largest value. With the paper's head, a mean and a linear layer, w is
    that layer's row, and the map is CAM's (Zhou et al., 2016).

    Args:
        network: with timm's `forward_features` and `forward_head`, in evaluation mode.
        images: (B, C, H, W) in [-1, 1].
        classes: (B,) whose maps; None for the likeliest of each.

    Returns:
        Logits (B, K), heat maps (B, h, w) in [0, 1], feature maps (B, F, h, w); nowhere a graph behind them.
    """
    with torch.no_grad():
        features = network.forward_features(images)
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        logits = network.forward_head(features)
        chosen = logits.argmax(dim=1) if classes is None else classes
        (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), features)
    with torch.no_grad():
        heat = F.relu((gradient.mean((2, 3), keepdim=True) * features).sum(dim=1))
        heat = heat / heat.amax((1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
    return logits.detach(), heat, features.detach()


def overlay(pixels: Pixels, heat: Tensor) -> Image.Image:
    """The picture that the network saw, (S, S, C) uint8, under its heat map (h, w) in [0, 1]: blue is cold, red is hot."""
    from matplotlib import colormaps

    size = pixels.shape[:2]
    smooth = F.interpolate(heat[None, None], size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
    colours: npt.NDArray[Any] = colormaps["turbo"](smooth)[:, :, :3] * 255
    mixed = (1 - _OPACITY) * pixels.astype(np.float32) + _OPACITY * colours  # grey (S, S, 1) becomes three channels
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))
