"""What a recipe may say about the network. Imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class ModelConfig:
    """The network and how it is laid out in memory. Defaults are the paper's Xception on ImageNet."""

    name: str = "xception"
    """`xception`, or the name of any timm model, for example `inception_v3`, `resnet152`, `vgg16`."""
    num_classes: int = 1000
    """Outputs of the logistic layer."""
    in_chans: int = 3
    """Channels of the input image: 3 for colour, 1 for grayscale."""
    dropout: float = 0.5
    """Probability of dropping a feature before the logistic layer (section 4.3)."""
    width: float = 1.0
    """Multiplies every channel count of Figure 5 (xception only)."""
    channel_multiple: int = 8
    """Channel counts are rounded to the nearest multiple of this; more than 8 segments need one (xception only)."""
    middle_blocks: int = 8
    """Blocks of the middle flow (xception only)."""
    residual: bool = True
    """Shortcut connections on or off, Figure 9 (xception only)."""
    intermediate_activation: Literal["none", "relu", "elu"] = "none"
    """Between depthwise and pointwise convolution, Figure 10 (xception only)."""
    segments: int | None = None
    """Channel segments of the spatial convolution: 1 is a regular convolution, null one a channel (xception only)."""
    fc_units: tuple[int, ...] = ()
    """Units of the fully-connected layers before the logistic layer, for JFT [4096, 4096]; each is followed by a ReLU."""
    output_stride: Literal[8, 16, 32] = 32
    """Input pixels per pixel of the last feature map, by dilation (xception only)."""
    grad_checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass, to save memory."""
    bn_momentum: float | None = None
    """Weight of the newest batch in the running statistics; null keeps the network's own (0.01; numerics torch: 0.1)."""
    numerics: Literal["keras", "torch"] = "keras"
    """Batch norm and padding of the pooling as Keras has them, or `torch` as timm's port: converted weights need theirs
    (xception only)."""
    channels_last: bool = True
    """NHWC memory layout of weights and activations."""
    compile: bool = False
    """Run the network through torch.compile."""
    kernels: Literal["auto", "torch", "fused"] = "auto"
    """How training computes the network: `torch` plainly, `fused` by kernels of our own, `auto` by the faster (xception only)."""
    weights: str | None = None
    """File or hub id of the weights that training starts from, in any format that `load_network` reads; where the classes
    are others the logistic layer is new. null starts from random ones."""
    freeze: int = 0
    """Blocks that stay as loaded, statistics too, counted from the input; 14 trains only the head (xception only)."""
    freeze_statistics: bool = False
    """Batch norm everywhere keeps the loaded means and variances and normalises by them, in training too."""


def check(config: ModelConfig) -> list[str]:
    """What is impossible in these values: one sentence each. Whether a timm name exists is known when the network is built."""
    problems = []
    least = {"num_classes": 1, "in_chans": 1, "middle_blocks": 0, "channel_multiple": 1}
    for name, lowest in least.items():
        if getattr(config, name) < lowest:
            problems.append(f"model.{name} must be at least {lowest}, not {getattr(config, name)}.")
    if not 0 <= config.dropout < 1:
        problems.append(f"model.dropout must be at least 0 and below 1, not {config.dropout}.")
    if config.bn_momentum is not None and not 0 < config.bn_momentum <= 1:
        problems.append(f"model.bn_momentum must be above 0 and at most 1, or null, not {config.bn_momentum}.")
    if config.width <= 0:
        problems.append(f"model.width must be above 0, not {config.width}.")
    blocks = 6 + config.middle_blocks if config.name == "xception" else 0
    if not 0 <= config.freeze <= max(blocks, 0):
        problems.append(f"model.freeze must be 0 to the {blocks} blocks of {config.name}, not {config.freeze}.")
    if config.weights is None:
        problems += [
            f"model.{name} keeps what was loaded, and model.weights is null: name the weights, or leave it out."
            for name in ("freeze", "freeze_statistics")
            if getattr(config, name)
        ]
    elif not config.weights:
        problems.append("model.weights is empty: name a file or a hub id, or leave it out.")
    if config.segments is not None and config.segments < 1:
        problems.append(f"model.segments must be at least 1, or null for one a channel, not {config.segments}.")
    if config.kernels == "fused":
        others = {
            "name": ("xception", "other networks have no fused kernels"),
            "compile": (False, "torch.compile cannot see into the fused kernels"),
            "grad_checkpointing": (False, "the fused kernels recompute what pays already"),
        }
        for name, (needed, reason) in others.items():
            value = getattr(config, name)
            if value != needed:
                plain = str(value).lower() if isinstance(value, bool) else value
                problems.append(f"model.kernels fused does not go with model.{name} {plain}: {reason}.")
    problems += [
        f"model.fc_units must hold sizes of at least 1, not {units}." for units in config.fc_units if units < 1
    ]
    return problems
