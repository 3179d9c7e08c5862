"""What `python -m xception_pl.predict` does: weights, pictures and options to outcomes and files."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from xception_pl.durable import durable_write
from xception_pl.kernels.choose import Kernels
from xception_pl.kernels.cpu_layers import measured, unfit
from xception_pl.kernels.inference import fast_inference
from xception_pl.nets.fold import fold_batch_norm
from xception_pl.prediction.gradcam import grad_cam, overlay
from xception_pl.prediction.names import class_names
from xception_pl.prediction.output import ENDINGS, Format, Writer, opened
from xception_pl.prediction.pictures import Pictures, find_pictures
from xception_pl.prediction.pipeline import Outcome, Output, chained, outcomes
from xception_pl.weights.load import load_network
from xception_pl.weights.ready import prepare_for

_MOST_WORKERS = 8


class Predictor:
    """A network with what is asked of it.

    Args:
        weights: what `load_network` reads.
        device: torch's name of one; None for a GPU where there is one.
        eval_crop: instead of the weights' own.
        image_size: the same, pixels.
        features: pooled features too.
        gradcam: folder for heat maps.
        kernels: `auto` computes logits and features by a CPU's own kernels where these are known to be faster, `fused`
            by them or not at all, `torch` never. Heat maps, folding and compiling need torch.
        fold: batch norm folded into the convolutions.
        compiled: through torch.compile.

    Raises:
        ValueError: the weights, the device or the kernels cannot be used.
    """

    def __init__(
        self,
        weights: str,
        *,
        device: str | None = None,
        eval_crop: str | None = None,
        image_size: int | None = None,
        features: bool = False,
        gradcam: Path | None = None,
        kernels: Kernels = "auto",
        fold: bool = False,
        compiled: bool = False,
    ) -> None:
        self.device = _device(device)
        network: Any = load_network(weights)
        self.prepare = prepare_for(network, eval_crop=eval_crop, image_size=image_size)
        self.names = class_names(network.class_names, network.num_classes)
        self.loss = network.loss
        self.gradcam, self.compiled = gradcam, compiled
        network.to(self.device).to(memory_format=torch.channels_last).requires_grad_(False)
        if fold:
            network = fold_batch_norm(network)
        if compiled:  # forward_features too, where features are wanted: Module.compile would take forward alone
            network.forward_features = torch.compile(network.forward_features)
        if not (fold or compiled or gradcam is not None):
            network = _with_kernels(network, self.device, kernels)
        self.network = _forward(network, features, gradcam is not None)

    def find(self, images: Iterable[str], *, split: str = "test") -> list[Pictures]:
        """The pictures that the arguments mean."""
        return find_pictures(images, split=split)

    def writer(self, path: Path | None, form: Format) -> AbstractContextManager[Writer]:
        """Where outcomes are written to."""
        return opened(path, form, self.names, sys.stdout)

    def outcomes(
        self, pictures: Sequence[Pictures], *, top: int = 5, batch: int = 32, workers: int | None = None
    ) -> Iterator[Outcome]:
        """An outcome a picture, in order; heat maps are written on the way."""
        found = outcomes(
            chained(pictures),
            self.prepare,
            self.network,
            device=self.device,
            batch=batch,
            workers=workers or min(_MOST_WORKERS, os.cpu_count() or 1),
            top=top,
            loss=self.loss,
            fill=self.compiled,
        )
        for number, outcome in enumerate(found):
            if self.gradcam is not None and outcome.heat is not None:
                assert outcome.pixels is not None
                name = _file_name(number, outcome.name, self.names[outcome.classes[0]])
                with durable_write(self.gradcam / name) as file:
                    overlay(outcome.pixels, outcome.heat).save(file, "PNG")
            yield outcome


def output_format(path: Path | None, form: str | None, *, features: bool) -> Format:
    """The format that is meant.

    Raises:
        ValueError: the ending says nothing, or the format cannot hold what is asked.
    """
    if form is None and path is not None and path.suffix.lower() not in ENDINGS:
        raise ValueError(f"--output {path} ends in none of {', '.join(ENDINGS)}: say what it is to be with --format.")
    found = cast(Format, form) if form is not None else "table" if path is None else ENDINGS[path.suffix.lower()]
    if features and found == "table":
        raise ValueError("--features are too many numbers for a table: choose --format csv, jsonl or parquet.")
    return found


def _with_kernels(network: Any, device: torch.device, kernels: Kernels) -> Any:
    """The network, or what gives the same by a CPU's own kernels."""
    if kernels == "torch" or (kernels == "auto" and not (device.type == "cpu" and measured())):
        return network
    problem = unfit(network)
    if kernels == "fused" and problem is not None:
        raise ValueError(f"--kernels fused is not possible here: {problem}; use auto or torch.")
    return fast_inference(network)


def _forward(network: Any, features: bool, heat: bool) -> Callable[[Tensor], Output]:
    """The network as the pipeline calls it."""

    def with_heat(images: Tensor) -> Output:
        logits, heat_maps, maps = grad_cam(network, images)
        return Output(logits, _pooled(maps) if features else None, heat_maps)

    @torch.inference_mode()
    def plain(images: Tensor) -> Output:
        if not features:
            return Output(network(images))
        maps = network.forward_features(images)
        return Output(network.forward_head(maps), _pooled(maps))

    return with_heat if heat else plain


def _pooled(maps: Tensor) -> Tensor:
    """(B, F) of feature maps (B, F, h, w)."""
    return maps.mean((2, 3))


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not there: {str(error).splitlines()[0]}") from error
    return device


def _file_name(number: int, picture: str, label: str) -> str:
    """`000012_tom_tabby.png`: in the order of the input, and no two alike."""
    stem = Path(picture).stem if ":" not in picture else picture.rpartition(":")[2]
    words = [re.sub(r"[^\w.-]+", "-", word).strip("-") for word in (stem, label)]
    return f"{number:06}_{words[0]}_{words[1]}.png"
