"""The model card, README.md of a repository of the hub: what the weights are, what they scored, how to use them."""

from typing import Any

import yaml

from xception_pl.nets.xception import Xception
from xception_pl.weights.stored import Results

_MEASURES = {"top1": "top-1", "top5": "top-5", "map100": "MAP@100", "loss": "loss", "ece": "calibration error (ECE)"}
_SHARES = ("top1", "top5", "map100", "ece")


def model_card(network: Xception, model: dict[str, Any], results: Results | None) -> str:
    """The whole text.

    Args:
        network: with its preprocessing and class names.
        model: the section of a recipe that makes it.
        results: what was measured with these weights; None where nothing was.
    """
    options = ", ".join(
        f"{name} {model[name]}"
        for name in ("width", "middle_blocks", "segments", "output_stride", "numerics")
        if model[name] is not None
    )
    names = network.class_names or ["not named"]
    classes = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    preprocessing = network.preprocessing
    own = f"evaluation crop `{preprocessing.eval_crop}`, {preprocessing.image_size} pixels a side, scaled to [-1, 1]"
    return f"""---
{yaml.safe_dump(_front_matter(results), sort_keys=False, allow_unicode=True).strip()}
---

# Xception

[Xception](https://arxiv.org/abs/1610.02357) (Chollet, CVPR 2017), {parameters:,} parameters, {network.num_classes} classes: {classes}.
Network: {options}. Trained with {network.loss}: {_OUTPUTS[network.loss]}.

## Results

{_measured(results) if results else "Not evaluated."}

Images: {own}.

## Use

```python
from xception_pl import load_network

network = load_network("OWNER/NAME")  # or this folder; network.preprocessing, network.class_names
```

```python
import timm
import xception_pl  # makes the network known to timm

network = timm.create_model("hf-hub:OWNER/NAME", pretrained=True)  # or local-dir:FOLDER
```
"""


_OUTPUTS = {
    "cross_entropy": "probabilities are the softmax of its outputs",
    "sigmoid": "probabilities are the sigmoid of each output, any number of labels an image",
}


def _measured(results: Results) -> str:
    lines = ["| measure | value |", "|---|---|"]
    for name, label in _MEASURES.items():
        if name in results:
            interval = " (95 % interval {top1_low:.2%} to {top1_high:.2%})" if name == "top1" else ""
            text = interval.format(**results) if {"top1_low", "top1_high"} <= results.keys() else ""
            lines.append(f"| {label} | {_said(name, results[name])}{text} |")
    images = f"{results['images']:,.0f} images of " if "images" in results else ""
    prepared = f", prepared as {results['prepared']}" if "prepared" in results else ""
    return "\n".join([*lines, "", f"Measured on {images}{results.get('data', 'held-out images')}{prepared}."])


def _said(name: str, value: Any) -> str:
    return f"{value:.2%}" if name in _SHARES else f"{value:.4f}"


def _front_matter(results: Results | None) -> dict[str, Any]:
    """What the hub reads: it lists the numbers of `model-index` beside the model."""
    tags = ["image-classification", "xception", "timm"]
    matter: dict[str, Any] = {"library_name": "xception_pl", "pipeline_tag": "image-classification", "tags": tags}
    shares = {name: results[name] for name in _SHARES[:3] if name in results} if results else {}
    if results and shares:
        data = str(results.get("data", "held-out images"))
        metrics = [{"type": _TYPES[name], "name": _MEASURES[name], "value": value} for name, value in shares.items()]
        task = {"type": "image-classification", "name": "Image Classification"}
        found = {"task": task, "dataset": {"name": data, "type": data}, "metrics": metrics}
        matter["model-index"] = [{"name": "Xception", "results": [found]}]
    return matter


_TYPES = {"top1": "accuracy", "top5": "top-5 accuracy", "map100": "mean average precision"}
