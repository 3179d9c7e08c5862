"""`config.json` of repositories that are not ours, as timm and transformers write it: class names, loss, preprocessing."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from xception_pl.nets.preprocessing import Preprocessing
from xception_pl.weights.hub import CROPS
from xception_pl.weights.stored import Stored

_LARGEST = 50_000_000  # bytes; 20,000 names take less than one


def read_config(path: Path) -> Mapping[str, Any]:
    """What it says; nothing, and a warning, where it is damaged: the weights can be used without."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, Mapping):
            return found
    except (OSError, ValueError, RecursionError):
        pass
    warnings.warn(f"{path} cannot be read as a configuration: class names and preprocessing are left out", stacklevel=4)
    return {}


def use_config(stored: Stored, classes: int, preprocessing: Preprocessing) -> Preprocessing:
    """Takes class names and loss from `stored.config` into `stored`; returns the preprocessing that it says.

    Args:
        stored: weights without a description of ours.
        classes: outputs of the network.
        preprocessing: of the family that the weights belong to, for what the configuration does not say.
    """
    config = stored.config
    names = _names(config)
    if names is not None and len(names) != classes:
        warnings.warn(
            f"the config.json of {stored.source} names {len(names)} classes, and the network has {classes} outputs: "
            "the names are left out",
            stacklevel=3,
        )
        names = None
    stored.class_names = names
    if config.get("problem_type") == "multi_label_classification":
        stored.loss = "sigmoid"
    inner = config.get("pretrained_cfg")
    return _preprocessing(inner, stored, preprocessing) if isinstance(inner, Mapping) else preprocessing


def _names(config: Mapping[str, Any]) -> list[str] | None:
    """timm's `label_names`, a list or a mapping with gaps; else transformers' `id2label`, without the names it makes up."""
    inner = config.get("pretrained_cfg")
    places = [config, inner if isinstance(inner, Mapping) else {}]
    found = next(
        (place[key] for key in ("label_names", "labels", "id2label") for place in places if place.get(key)), None
    )
    if isinstance(found, Mapping):
        numbers = {int(key): name for key, name in found.items() if str(key).isdecimal() and len(str(key)) < 9}
        if len(numbers) < len(found):
            return None
        last = max(numbers)
        found = [numbers.get(i, str(i)) for i in range(last + 1)] if last < 2 * len(numbers) + 1000 else None
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        return None
    found = list(found)
    return None if found == [f"LABEL_{i}" for i in range(len(found))] else found


def _preprocessing(timms: Mapping[str, Any], stored: Stored, otherwise: Preprocessing) -> Preprocessing:
    """timm's `pretrained_cfg` as far as our preprocessing can say it; what it cannot is a warning."""
    size = timms.get("input_size")
    if isinstance(size, list | tuple) and len(size) == 3 and type(size[2]) is int and 71 <= size[2] <= 16384:
        otherwise = replace(otherwise, image_size=size[2])
    said = {key: timms[key] for key in ("crop_pct", "interpolation", "crop_mode") if timms.get(key) is not None}
    if "crop_pct" in said:
        crop = next((name for name, crop in CROPS.items() if all(crop[key] == said[key] for key in said)), None)
        if crop is None:
            told = ", ".join(f"{key} {value}" for key, value in said.items())
            warnings.warn(
                f"{stored.source} was evaluated with {told}, which is none of our crops: {otherwise.eval_crop} is taken",
                stacklevel=4,
            )
        else:
            otherwise = replace(otherwise, eval_crop=cast(Any, crop))
    scale = {key: timms[key] for key in ("mean", "std") if timms.get(key) is not None}
    if any(list(value) != [0.5] * len(value) if isinstance(value, list | tuple) else True for value in scale.values()):
        told = " and ".join(f"{key} {value}" for key, value in scale.items())
        warnings.warn(
            f"{stored.source} was trained on images scaled by {told}: here they are scaled to [-1, 1], so its answers "
            "will be off until it is trained on",
            stacklevel=4,
        )
    return otherwise
