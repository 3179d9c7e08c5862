"""`python -m xception_pl.bench train`: training steps of this package and of timm and Keras, side by side."""

from xception_pl.bench.speed import main as compare

SUMMARY = (
    "Training steps (forward, loss, backward, SGD with momentum) of this package in each of its modes and of the peers "
    "that are installed: same weights, same batch, in turns in one run. Each is first checked against float64, loss and "
    "every gradient. Beside them what this machine's matrix product and copy allow."
)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code: 0 done, 1 one of ours was wrong, 2 a mistake in the options."""
    return compare("train", SUMMARY, arguments)
