"""What logits mean: probabilities, by the loss that the network was trained with."""

from torch import Tensor

from xception_pl.optim.config import Loss


def probabilities(logits: Tensor, loss: Loss) -> Tensor:
    """(B, K) float32: with `cross_entropy` softmax, one label an image; with `sigmoid` each class' own (Section 4.1, JFT)."""
    logits = logits.float()
    return logits.sigmoid() if loss == "sigmoid" else logits.softmax(dim=1)
