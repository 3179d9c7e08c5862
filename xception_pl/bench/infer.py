"""`python -m xception_pl.bench infer`: inference with this package, timm, Keras, ONNX Runtime and OpenVINO, side by side."""

from xception_pl.bench.speed import main as compare

SUMMARY = (
    "Inference with this package in each of its modes and with the peers that are installed: same weights, same batch, in "
    "turns in one run. Each one's logits are first checked against float64. Beside them what this machine's matrix product "
    "and copy allow."
)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code: 0 done, 1 one of ours was wrong, 2 a mistake in the options."""
    return compare("infer", SUMMARY, arguments)
