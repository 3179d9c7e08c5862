"""timm's `legacy_xception`, Cadene's and tstandley's port: one set of names, PyTorch's numerics."""

import re

from xception_pl.nets.preprocessing import Preprocessing
from xception_pl.weights.layout import Layout, unchanged

_HEADS = ("last_linear.1.", "last_linear.", "classifier.")
"""Other names of `fc.`: with dropout before it (FaceForensics++), Cadene's in memory."""


def timm_name(name: str) -> str:
    """Our name to timm's: `block2.sepconv1.depthwise.weight` is `block1.rep.0.conv1.weight`.

    Block N of theirs is block N + 1 of ours; only the first block has no ReLU at index 0 of `rep`.
    """
    block, _, rest = name.partition(".")
    if block == "fc":
        return name
    number = int(block.removeprefix("block"))
    if number == 1:
        return rest
    if number == 14:  # they call its two separable convolutions conv3 and conv4
        layer, rest = re.match(r"(sepconv|bn)", rest), re.sub(r"^(sepconv|bn)", "", rest)
        index, _, leaf = rest.partition(".")
        assert layer is not None
        leaf = leaf.replace("depthwise", "conv1")
        return f"{'bn' if layer[0] == 'bn' else 'conv'}{int(index) + 2}.{leaf}"
    rest = re.sub(r"^shortcut_bn\.", "skipbn.", rest)
    rest = re.sub(r"^shortcut\.", "skip.", rest)
    if found := re.match(r"(sepconv|bn)(\d)\.(.*)", rest):
        kind, index, leaf = found.groups()
        place = 3 * (int(index) - 1) + (number != 2) + (kind == "bn")
        rest = f"rep.{place}.{leaf.replace('depthwise', 'conv1')}"
    return f"block{number - 1}.{rest}"


def common_name(name: str) -> str:
    """A port's name of a tensor to the one that timm has for it."""
    for head in _HEADS:
        if name.startswith(head):
            return "fc." + name.removeprefix(head)
    return name


TIMM = Layout("timm's names", timm_name, unchanged, unchanged, "torch", Preprocessing(eval_crop="timm"))
