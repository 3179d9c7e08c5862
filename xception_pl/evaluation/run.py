"""An evaluation from weights and a source to what was found, and to the files that tell it."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from xception_pl.data.cache import cache_folder
from xception_pl.data.config import DataConfig
from xception_pl.data.errors import DataError
from xception_pl.data.item import Corrupt
from xception_pl.data.source import open_split
from xception_pl.data.stream import open_reader
from xception_pl.durable import durable_write, write_text
from xception_pl.evaluation.exclusion import Numbers, excluded_rows
from xception_pl.evaluation.passes import Subject, match_classes, run_pass
from xception_pl.evaluation.report import Bytes, report_html
from xception_pl.evaluation.results import Evaluated, Evaluation, classes_csv, confusion_csv, confusion_png, spelled_out
from xception_pl.evaluation.scores import Scores
from xception_pl.nets.xception import Xception
from xception_pl.prediction.names import class_names
from xception_pl.weights.load import load_network
from xception_pl.weights.ready import prepare_for
from xception_pl.weights.results import fingerprint

_SIGMOID = (
    "trained with sigmoid: each probability is a class' own, the loss is the sum of all classes' binary cross-entropies"
)

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def _silent(total: int) -> Iterator[Callable[[int], None]]:
    yield lambda count: None


def evaluate(
    weights: Sequence[str | Path],
    config: DataConfig,
    *,
    eval_crop: str | None = None,
    image_size: int | None = None,
    exclude: Path | None = None,
    exclude_numbers: Numbers = "row",
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    devices: int = 1,
    progress: Progress = _silent,
) -> tuple[Evaluation, Bytes] | None:
    """Shows a held-out split to networks, and adds up what they say.

    Networks that take the same preprocessing are shown the images in one pass.

    Args:
        weights: what `load_network` reads; the first is what the others are compared with.
        config: source, split, batch and workers; its image size and crop give way to the weights'.
        eval_crop: instead of the weights' own, for all.
        image_size: the same.
        exclude: a list of images to leave out, as `excluded_rows` reads it.
        exclude_numbers: what numbers in it are.
        accelerator: kind of device.
        devices: how many; each is a process of its own, started here, by torchrun or by SLURM.
        progress: makes a bar of so many images.

    Returns:
        What was found, and what gives the encoded images of rows; None in all processes but the first.

    Raises:
        ValueError: in one sentence, the weights, the source or the list cannot be used.
    """
    # Everything that may be wrong is found before other processes are started.
    networks = [load_network(str(source)) for source in weights]
    split = open_split(
        config.source,
        config.val_split,
        revision=config.revision,
        image_column=config.image_column,
        label_column=config.label_column,
        keep=cache_folder(config.cache_dir) / "footers",
    )
    if split.labels.multi:
        raise DataError(
            f"{split.where} has label lists, and evaluate measures one label an image: the MAP@100 of a run's weights is "
            "val_map100 in its results.json."
        )
    classes = [match_classes(split.labels.names, n.class_names, n.num_classes, split.where) for n in networks]
    left_out = np.empty(0, np.int64) if exclude is None else excluded_rows(exclude, split, exclude_numbers)

    from lightning.fabric import Fabric

    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
    fabric = Fabric(
        accelerator=_accelerator(accelerator, devices), devices=devices, strategy="ddp" if devices > 1 else "auto"
    )
    fabric.launch()
    split = fabric.broadcast(split)  # a hub's branch may move between two who ask

    wanted = [_preprocessing(network, eval_crop, image_size) for network in networks]
    scores: list[Scores | None] = [None] * len(networks)
    corrupt: dict[int, Corrupt] = {}
    seconds = 0.0
    kinds = list(dict.fromkeys(wanted))
    with progress(split.images * len(kinds)) if fabric.global_rank == 0 else nullcontext(lambda count: None) as advance:
        for size, crop, channels in kinds:
            chosen = [i for i, one in enumerate(wanted) if one == (size, crop, channels)]
            for i in chosen:
                networks[i].to(fabric.device).to(memory_format=torch.channels_last)
            try:
                found = run_pass(
                    fabric,
                    [Subject(networks[i], classes[i][0], networks[i].loss) for i in chosen],
                    split,
                    replace(config, image_size=size, eval_crop=cast(Any, crop)),
                    channels=channels,
                    classes=max(len(classes[i][0]) for i in chosen),
                    advance=advance,
                )
            except ValueError:
                if fabric.global_rank == 0:
                    raise
                return None  # the first says it; torchrun would end it at once if this one failed before
            for i, of_one in zip(chosen, found.scores, strict=True):
                scores[i] = of_one
            corrupt |= {image.row: image for image in found.corrupt}
            seconds += found.seconds
    if fabric.global_rank != 0:
        return None

    results = []
    for source, network, (_, note), (size, crop, channels), of_network in zip(
        weights, networks, classes, wanted, scores, strict=True
    ):
        assert of_network is not None
        parameters = sum(parameter.numel() for parameter in network.parameters())
        results.append(
            Evaluated(
                weights=str(source),
                network=f"{_kind(network)}, {parameters:,} parameters, {network.num_classes:,} classes",
                fingerprint=fingerprint(network),
                preprocessing=spelled_out(size, crop, channels),
                class_names=class_names(network.class_names, network.num_classes),
                scores=of_network.without(left_out),
                note="; ".join(filter(None, (note, _SIGMOID if network.loss == "sigmoid" else None))) or None,
            )
        )
    evaluation = Evaluation(
        where=split.where,
        images=split.images,
        excluded=len(left_out),
        corrupt=[corrupt[row] for row in sorted(corrupt)],
        seconds=seconds,
        hardware=_hardware(fabric),
        networks=results,
    )
    reader = open_reader(split, config.retry_seconds)
    return evaluation, lambda rows: [row.data for row in reader.rows(rows)]


def write_evaluation(folder: Path, evaluation: Evaluation, images: Bytes) -> None:
    """Writes `report.html`, `evaluation.json`, and of each network `classes.csv`, `confusion.csv` and `confusion.png`.

    The files of a second network are called `classes_2.csv` and so on. The report comes last.

    Args:
        folder: made where it is missing.
        evaluation: what was found.
        images: gives the encoded images of rows.

    Raises:
        CannotWrite: the folder cannot be written in.
    """
    write_text(folder / "evaluation.json", json.dumps(evaluation.plain(), indent=2) + "\n")
    for number, network in enumerate(evaluation.networks, start=1):
        suffix = f"_{number}" if number > 1 else ""
        write_text(folder / f"classes{suffix}.csv", classes_csv(network))
        write_text(folder / f"confusion{suffix}.csv", confusion_csv(network))
        with durable_write(folder / f"confusion{suffix}.png") as file:
            file.write(confusion_png(network))
    write_text(folder / "report.html", report_html(evaluation, images))


def _preprocessing(network: Any, eval_crop: str | None, image_size: int | None) -> tuple[int, str, int]:
    """Size, crop and channels."""
    prepare = prepare_for(network, eval_crop=eval_crop, image_size=image_size)
    return prepare.config.image_size, prepare.config.eval_crop, prepare.channels


def _accelerator(wanted: str, devices: int) -> str:
    """Raises ValueError where there are not so many."""
    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return "cpu"
    if gpus < devices:
        raise ValueError(f"--devices {devices}: this machine has {gpus} GPUs.")
    return "cuda"


def _hardware(fabric: Any) -> str:
    if fabric.device.type == "cuda":
        return f"{fabric.world_size} × {torch.cuda.get_device_name(fabric.device)}"
    threads = torch.get_num_threads()
    return f"{fabric.world_size} × CPU with {threads} thread{'s' * (threads > 1)} of {os.cpu_count()} cores"


def _kind(network: Any) -> str:
    return "Xception" if isinstance(network, Xception) else type(network).__name__
