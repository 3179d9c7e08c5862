"""The description that travels with our weights: network, class names, preprocessing, loss, as plain data and back.

It is read from files that anyone may have written, so every value is checked before it is used.
"""

import json
import types
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from xception_pl.nets import config as nets_config
from xception_pl.nets.config import ModelConfig
from xception_pl.nets.preprocessing import Preprocessing
from xception_pl.nets.xception import Xception
from xception_pl.optim.config import Loss
from xception_pl.weights.infer import model_of
from xception_pl.weights.results import read_results
from xception_pl.weights.stored import Stored, WeightsError

_T = TypeVar("_T")
DESCRIPTION = "xception_pl.json"
"""What the description is called inside files that hold several things."""
_MOST_CLASSES = 10_000_000
_LARGEST_WIDTH = 64.0


NAMES = ("model", "preprocessing", "class_names", "loss", "results")
"""What a description has, each of which may be absent."""


def describe(network: Xception) -> dict[str, Any]:
    """The description in JSON's types, under `NAMES`, as `read_description` takes it.

    Raises:
        WeightsError: the network is no whole Xception.
    """
    model = model_of(network)
    return {"model": asdict(model) | {"fc_units": list(model.fc_units)}, **describe_use(network)}


def describe_use(network: Xception) -> dict[str, Any]:
    """The same without the network itself, for files whose network is known."""
    preprocessing = asdict(network.preprocessing)
    return {"preprocessing": preprocessing, "class_names": network.class_names, "loss": network.loss}


def read_description(stored: Stored, described: Mapping[str, Any]) -> None:
    """Checks the description that a file holds and puts it into `stored`.

    Raises:
        WeightsError: a key or value that this version does not know, or one that no network can have.
    """
    model, preprocessing = described.get("model"), described.get("preprocessing") or {}
    if model is not None:
        config = _dataclass_from(ModelConfig, model, stored, "model")
        problems = nets_config.check(config) + _too_large(config, len(stored.tensors))
        if problems:
            raise WeightsError(f"{stored.source} describes a network that cannot be: {problems[0]}")
        # how the network was trained is not what it is
        stored.model = replace(config, weights=None, freeze=0, freeze_statistics=False)
    stored.preprocessing = _dataclass_from(Preprocessing, preprocessing, stored, "preprocessing")
    if not 1 <= stored.preprocessing.image_size <= 16384:
        raise WeightsError(
            f"{stored.source} was prepared for images of {stored.preprocessing.image_size} pixels a side, which cannot be."
        )
    names = described.get("class_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise WeightsError(f"{stored.source} is damaged: its class names are no list of texts.")
    stored.class_names = names
    loss = described.get("loss")
    if loss is not None:  # older files have none
        if not _fits(loss, Loss):
            raise WeightsError(
                f"{stored.source} was trained with the loss {str(loss)[:60]!r}, which this version does not know."
            )
        stored.loss = loss
    if described.get("results") is not None:
        read_results(stored, described["results"])


def read_json(stored: Stored, text: bytes) -> None:
    """Puts the description of a network that is known into `stored`, from the JSON that `describe_use` became.

    Raises:
        WeightsError: as `read_description`, or it is no JSON.
    """
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{stored.source} is damaged: its {DESCRIPTION} is no JSON.") from error
    if not isinstance(described, dict) or "model" in described:
        raise WeightsError(f"{stored.source} is damaged: its {DESCRIPTION} is no description.")
    read_description(stored, described)


def _too_large(config: ModelConfig, tensors: int) -> list[str]:
    """A description is small however large the network that it asks for: bounds, by what the file can hold."""
    problems = []
    if config.middle_blocks > tensors or len(config.fc_units) > tensors:
        problems.append(f"it has more layers than the file's {tensors} tensors.")
    if config.width > _LARGEST_WIDTH or max(config.num_classes, config.in_chans, *config.fc_units, 1) > _MOST_CLASSES:
        problems.append("a size of its layers is beyond all use.")
    return problems


def _dataclass_from(kind: type[_T], values: Any, stored: Stored, what: str) -> _T:
    """A configuration from untrusted data, with each value of the field's type."""
    if not isinstance(values, Mapping):
        raise WeightsError(f"{stored.source} is damaged: what it says of its {what} is no mapping.")
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        raise WeightsError(
            f"{stored.source} has the {what} key {unknown[0]}, which this version does not know: it was written by a later one."
        )
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise WeightsError(f"{stored.source} is damaged: {what}.{name} cannot be {str(value)[:60]!r}.")
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return kind(**arguments)


def _fits(value: Any, hint: Any) -> bool:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in options)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(item, options[0]) for item in value)
    if hint is float:
        return type(value) in (int, float) and value == value
    return type(value) is hint or (hint is type(None) and value is None)
