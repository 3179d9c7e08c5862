"""The network that a recipe names: Xception, or any network of timm, such as the other rows of Table 1."""

from dataclasses import fields
from difflib import get_close_matches

from torch import nn

from xception_pl.nets.config import ModelConfig
from xception_pl.nets.convs import initialize
from xception_pl.nets.xception import Xception

XCEPTION_ONLY = (
    "width",
    "channel_multiple",
    "middle_blocks",
    "residual",
    "intermediate_activation",
    "segments",
    "output_stride",
    "numerics",
)


def create_network(config: ModelConfig) -> nn.Module:
    """A freshly initialised network: images ``(B, in_chans, H, W)`` to logits ``(B, num_classes)``. Loads no weights.

    Inside ``torch.device("meta")`` it costs next to nothing, which is enough to check a configuration or to count.

    timm's networks keep timm's initialisation and batch-norm settings. timm's Inception V3 has 23,834,568 parameters;
    the 23,626,728 of Table 3 are those of an early variant in Keras, which the test of this file rebuilds.

    Raises:
        ValueError: the name is unknown, an option is out of its range, or it is none that this network has.
    """
    network = _named(config)
    if config.bn_momentum is not None:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = config.bn_momentum
    return network


def _named(config: ModelConfig) -> nn.Module:
    if config.name == "xception":
        return Xception(
            config.num_classes,
            config.in_chans,
            dropout=config.dropout,
            width=config.width,
            channel_multiple=config.channel_multiple,
            middle_blocks=config.middle_blocks,
            residual=config.residual,
            intermediate_activation=config.intermediate_activation,
            segments=config.segments,
            fc_units=config.fc_units,
            output_stride=config.output_stride,
            grad_checkpointing=config.grad_checkpointing,
            numerics=config.numerics,
        )
    import timm  # 2 s, and only other networks need it

    if not timm.is_model(config.name):
        near = get_close_matches(config.name, ["xception", *timm.list_models()], n=3, cutoff=0.5)
        hint = f": did you mean {' or '.join(near)}?" if near else ": use xception or the name of a timm model"
        raise ValueError(f"network {config.name!r} is unknown{hint}")
    default = {field.name: field.default for field in fields(ModelConfig)}
    foreign = [key for key in XCEPTION_ONLY if getattr(config, key) != default[key]]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)}: only xception has this, not {config.name}; remove it or use name: xception"
        )
    dropout = 0.0 if config.fc_units else config.dropout  # with fully-connected layers it follows them
    try:
        network: nn.Module = timm.create_model(
            config.name, num_classes=config.num_classes, in_chans=config.in_chans, drop_rate=dropout
        )
        if config.grad_checkpointing:
            network.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError, TypeError) as error:
        raise ValueError(f"timm cannot build {config.name} with these options: {error}") from error
    if config.fc_units:
        _insert_fc_layers(network, config)
    return network


def _insert_fc_layers(network: nn.Module, config: ModelConfig) -> None:
    """Fully-connected layers before a timm network's logistic layer, each as Xception has them (section 4.1, JFT)."""
    logistic = network.get_classifier()  # type: ignore[operator]
    name = getattr(network, "default_cfg", {}).get("classifier")
    if not isinstance(logistic, nn.Linear) or not isinstance(name, str):
        raise ValueError(
            f"fc_units: {config.name} does not end in one linear layer, which these could precede; leave them out"
        )
    if any(units < 1 for units in config.fc_units):
        raise ValueError(
            f"fc_units={tuple(config.fc_units)} has a layer without units: use 1 or more each, or no layer: ()"
        )
    layers: list[nn.Module] = []
    for before, units in zip((logistic.in_features, *config.fc_units), config.fc_units, strict=False):
        layers += [nn.Linear(before, units), nn.ReLU()]
    head = nn.Sequential(*layers, nn.Dropout(config.dropout), nn.Linear(config.fc_units[-1], config.num_classes))
    initialize(head)
    owner, _, last = name.rpartition(".")
    setattr(network.get_submodule(owner), last, head)
