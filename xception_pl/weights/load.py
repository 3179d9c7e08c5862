"""`load_network`: any Xception file into a network that is ready to use."""

import re
import warnings
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from xception_pl.nets.config import ModelConfig
from xception_pl.nets.create import create_network
from xception_pl.nets.xception import Xception
from xception_pl.weights.foreign import use_config
from xception_pl.weights.infer import infer_model
from xception_pl.weights.keras import KERAS
from xception_pl.weights.layout import OURS, Layout
from xception_pl.weights.mismatch import likely_cause, mismatch_table
from xception_pl.weights.read import read_weights
from xception_pl.weights.ready import ready
from xception_pl.weights.stored import Stored, WeightsError
from xception_pl.weights.timm import TIMM, common_name

_ANCHORS = {"block1.rep.0.conv1.weight": TIMM, "block1.conv1.weight": OURS, "block1_conv1/kernel": KERAS}
"""A tensor that each family of files has, and no other."""


def load_network(source: str | Path | nn.Module, *, num_classes: int | None = None, raw: bool = False) -> Xception:
    """A network with the weights of a file, in evaluation mode and float32, on the CPU.

    What the file is, its content says, not its name: a checkpoint or `averaged.safetensors` of a run, Keras' `.keras`,
    `.weights.h5` and `.h5`, any of timm's, Cadene's or tstandley's ports (also inside `state_dict`, or with prefixes such
    as `module.`). Nothing in a file is executed. The network has the numerics of the weights' origin, how images were prepared
    for it (`network.preprocessing`), the names of its classes (`network.class_names`), the loss that says how its logits
    become probabilities (`network.loss`), and what was measured with these weights (`network.results`). Names and results
    are None where the file has none.

    Args:
        source: a file, a folder of a finished run or as the hub keeps it, the id of a repository of the hub (`owner/name`
            or `owner/name@revision`), or timm's `legacy_xception` as an object.
        num_classes: outputs wanted. Where the file has another number, the logistic layer is replaced by a new one, and
            a warning says so.
        raw: the last step's weights instead of the averaged ones, of files that hold both.

    Returns:
        The network. A checkpoint of a run whose model.name is another network of timm gives that one, with the same
        attributes.

    Raises:
        ValueError: in one sentence, with a table where tensors do not fit: the file cannot be read, would execute code,
            is damaged, or belongs to another network.
    """
    config, network = load_described(source, raw=raw)
    if num_classes is not None and num_classes != config.num_classes:
        has = f"has a logistic layer of {config.num_classes} outputs" if config.num_classes else "has no logistic layer"
        warnings.warn(f"{source} {has}: a new one of {num_classes}, not yet trained, takes its place", stacklevel=2)
        network.reset_classifier(num_classes)
        network.class_names, network.loss, network.results = None, "cross_entropy", None
    return ready(network).eval()


def load_described(source: str | Path | nn.Module, *, raw: bool = False) -> tuple[ModelConfig, Xception]:
    """`load_network` as the file has it, with the model section of a recipe that makes this network.

    Raises:
        WeightsError: as `load_network`.
    """
    stored = read_weights(source)
    if raw:
        if stored.raw_tensors is None:
            raise WeightsError(
                f"{stored.source} holds one set of weights: leave out raw, which picks the one that is not averaged."
            )
        stored.tensors, stored.results = stored.raw_tensors, None  # which were measured with the averaged ones
    layout = OURS
    if stored.model is None or stored.model.name == "xception":
        stored.tensors, layout = _recognise(stored)
    config = stored.model or infer_model(stored, layout)
    network = _with_tensors(config, stored, layout)
    network.preprocessing = stored.preprocessing or use_config(stored, config.num_classes, layout.preprocessing)
    network.class_names = _class_names(stored, config.num_classes)
    network.loss = stored.loss
    network.results = stored.results
    return config, network


def _recognise(stored: Stored) -> tuple[dict[str, Tensor], Layout]:
    """The tensors without prefixes, and whose names they have."""
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in stored.tensors.items()}
    for anchor, layout in _ANCHORS.items():
        prefixes = [name.removesuffix(anchor) for name in tensors if re.fullmatch(rf"(.*\.)?{re.escape(anchor)}", name)]
        if len(prefixes) > 1:
            places = " and ".join(prefix or "no prefix" for prefix in sorted(prefixes))
            raise WeightsError(
                f"{stored.source} holds {len(prefixes)} networks, under {places}: save one of them alone."
            )
        if prefixes:
            named = {name.removeprefix(prefixes[0]): tensor for name, tensor in tensors.items()}
            if layout is TIMM:
                named = {common_name(name): _pointwise(name, tensor) for name, tensor in named.items()}
            return named, layout
    if not tensors:
        raise WeightsError(f"{stored.source} is {stored.kind} without any weights.")
    cause = likely_cause(list(tensors))
    first = ", ".join(list(tensors)[:3])
    raise WeightsError(
        f"{stored.source} is {stored.kind}, but no Xception: its {len(tensors)} tensors begin with {first}"
        + (f". These are {cause}." if cause else ".")
    )


def _pointwise(name: str, tensor: Tensor) -> Tensor:
    """A 1 × 1 convolution that was saved as a matrix, as in `xception-b5690688.pth`."""
    return tensor[:, :, None, None] if name.endswith("pointwise.weight") and tensor.dim() == 2 else tensor


def _with_tensors(config: ModelConfig, stored: Stored, layout: Layout) -> Xception:
    """The network that `config` says with the file's numbers.

    Shapes are compared before any number is read, and on a network without memory: neither a description nor a shape
    can make this larger than the file.
    """
    try:
        with torch.device("meta"):
            network = create_network(config)
    except (ValueError, RuntimeError, OverflowError) as error:
        raise WeightsError(f"{stored.source} describes a network that cannot be: {str(error).rstrip('.')}.") from error
    wanted = network.state_dict()
    names = {name: layout.rename(name) for name in wanted}
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    found = {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()}
    expected = {
        names[name]: tuple(layout.to_file(name, tensor).shape)
        for name, tensor in wanted.items()
        if name not in counters or names[name] in found  # many files leave them out, and they decide nothing
    }
    problem = mismatch_table(expected, found)
    if problem is not None:
        raise WeightsError(f"{stored.source} does not fit {config.name} by {layout.name}: {problem}")
    state = {}
    for name, tensor in wanted.items():
        if names[name] not in stored.tensors:
            state[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            continue
        value = layout.from_file(name, stored.tensors[names[name]])
        # a copy: the file may be mapped, and may be overwritten while the network lives
        state[name] = value.to(tensor.dtype, copy=True, memory_format=torch.contiguous_format)
    _check_finite(state, names, stored)
    network.load_state_dict(state, assign=True)
    return cast(Xception, network)


def _check_finite(state: dict[str, Tensor], names: dict[str, str], stored: Stored) -> None:
    bad = [names[name] for name, tensor in state.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise WeightsError(
            f"{stored.source} holds NaN or infinite numbers in {len(bad)} of {len(state)} tensors, first in {bad[0]}: "
            "the training that wrote it diverged, or the file is damaged."
        )
    negative = [
        names[name] for name, tensor in state.items() if name.endswith("running_var") and bool((tensor < 0).any())
    ]
    if negative:
        raise WeightsError(f"{stored.source} is damaged: {negative[0]} holds variances below 0.")


def _class_names(stored: Stored, num_classes: int) -> list[str] | None:
    names = stored.class_names
    if names is not None and len(names) != num_classes:
        raise WeightsError(f"{stored.source} is damaged: it names {len(names)} classes and has {num_classes} outputs.")
    return names
