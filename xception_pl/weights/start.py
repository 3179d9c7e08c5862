"""Fine-tuning's first step: the recipe's network with the weights of a file, as far as these fit it."""

from dataclasses import dataclass

from torch import Tensor, nn

from xception_pl.nets.config import ModelConfig
from xception_pl.nets.create import create_network
from xception_pl.weights.load import load_described
from xception_pl.weights.stored import WeightsError

_ARCHITECTURE = (
    "name",
    "width",
    "channel_multiple",
    "middle_blocks",
    "residual",
    "intermediate_activation",
    "segments",
    "fc_units",
    "numerics",
)
"""Keys of `model` that decide what weights mean, but for the head and the first convolution."""
_SHAPELESS = ("name", "intermediate_activation", "numerics")
"""Those of them that no shape tells."""


@dataclass(frozen=True)
class Start:
    """A network to be trained on."""

    network: nn.Module
    what: str
    """Where its weights come from and what was done to them, for the plan."""


def start_from(model: ModelConfig, class_names: list[str] | None = None) -> Start:
    """The network of `model` with the weights that `model.weights` names.

    The logistic layer is taken where the classes are the same, by number and, as far as both are known, by name;
    otherwise it stays as freshly drawn. The first convolution is adapted to the images' channels so that a grey picture
    gives what it would have given in colour: kernels of three channels are **summed** for one (x, x, x is the picture
    that the weights knew), and a kernel of one channel is **divided among** three.

    Args:
        model: the recipe's section; its `weights` are not null. What is new is drawn from torch's global generator.
        class_names: of the data to train on.

    Raises:
        WeightsError: the file cannot be read, or is of another architecture: the sentence gives the keys to set.
    """
    assert model.weights is not None
    theirs, loaded = load_described(model.weights)
    network = create_network(model)
    state, wanted = loaded.state_dict(), network.state_dict()
    head, first = _head(network), _first_convolution(network)
    _check_architecture(
        model, theirs, *({n: v for n, v in s.items() if n not in (*head, first)} for s in (state, wanted))
    )

    notes = []
    known = loaded.class_names
    same = theirs.num_classes == model.num_classes and (None in (known, class_names) or known == class_names)
    if same:
        notes.append(f"logistic layer kept: the same {model.num_classes} classes")
    else:
        other = "other classes" if theirs.num_classes == model.num_classes else f"{theirs.num_classes} classes there"
        notes.append(f"new logistic layer for {model.num_classes} classes ({other})")
        state |= {name: wanted[name] for name in head}
    there, here = state[first].shape[1], wanted[first].shape[1]
    if there != here:
        state[first] = adapted(state[first], here, model.weights)
        notes.append(f"first convolution {'summed' if here == 1 else 'divided'} from {there} channels to {here}")
    network.load_state_dict({name: state[name] for name in wanted})
    return Start(network, f"{model.weights}: {'; '.join(notes)}")


def adapted(kernel: Tensor, channels: int, source: str) -> Tensor:
    """A first convolution's kernel (O, C, h, w) for images of other channels: summed to one, or divided among three.

    Raises:
        WeightsError: neither number is one.
    """
    there = kernel.shape[1]
    if channels == 1:
        return kernel.sum(dim=1, keepdim=True)
    if there == 1:
        return kernel.expand(-1, channels, -1, -1) / channels
    raise WeightsError(
        f"model.weights {source} takes images of {there} channels, and model.in_chans is {channels}: only one channel "
        "can be made of several, or several of one."
    )


def _head(network: nn.Module) -> set[str]:
    """Names of the logistic layer's tensors."""
    layer = network.get_classifier()  # type: ignore[operator]
    own = {id(tensor) for tensor in layer.parameters()}
    return {name for name, tensor in network.named_parameters() if id(tensor) in own}


def _first_convolution(network: nn.Module) -> str:
    """Name of the weight that reads the image."""
    return next(f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Conv2d))


def _check_architecture(
    ours: ModelConfig, theirs: ModelConfig, state: dict[str, Tensor], wanted: dict[str, Tensor]
) -> None:
    shapes = [{n: v.shape for n, v in s.items() if not n.endswith("num_batches_tracked")} for s in (state, wanted)]
    fits = shapes[0] == shapes[1]
    keys = _SHAPELESS if fits else _ARCHITECTURE
    differ = [key for key in keys if getattr(ours, key) != getattr(theirs, key)]
    if fits and not differ:
        return
    options = " ".join(f"--model.{key}={_text(getattr(theirs, key))}" for key in differ)
    raise WeightsError(
        f"model.weights {ours.weights} belongs to another network than the recipe's: "
        + (f"to train on from it, set {options}." if options else "its layers have other shapes.")
    )


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return str(list(value)).replace(" ", "")
    return {None: "null", True: "true", False: "false"}.get(value, str(value))  # type: ignore[call-overload, no-any-return]
