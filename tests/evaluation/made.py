"""An evaluation of the shipped images by networks that are right as often as they are told to be."""

from collections.abc import Callable, Sequence

import torch

from xception_pl.data.item import Corrupt
from xception_pl.data.source import Split, open_split
from xception_pl.data.stream import open_reader
from xception_pl.evaluation.results import Evaluated, Evaluation, spelled_out
from xception_pl.evaluation.scores import score


def sample() -> Split:
    return open_split("sample", "test")


def made_evaluation(networks: int = 1) -> tuple[Evaluation, Callable[[Sequence[int]], list[bytes]]]:
    split = sample()
    reader = open_reader(split)
    labels = torch.tensor([row.labels[0] for row in reader.rows(range(split.images))])
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(networks):
        logits = torch.randn(len(labels), 10, generator=generator)
        logits[torch.arange(len(labels)), labels] += 3.2 + number / 4
        logits[torch.arange(len(labels)), (labels * 7 + 3) % 10] += 1.5
        found.append(
            Evaluated(
                weights=f"runs/<made>/{number}.safetensors",
                network="xception, 1,234,567 parameters",
                fingerprint=f"{number:064}",
                preprocessing=spelled_out(71, "resize", 3),
                class_names=list(split.labels.names or ()),
                scores=score(logits * 2, labels, torch.arange(len(labels))),
            )
        )
    evaluation = Evaluation(
        where=split.where,
        images=split.images + 2,
        excluded=1,
        corrupt=[Corrupt(1000, "7 bytes cannot be read: <they> are no image of a known format")],
        seconds=10.0,
        hardware="1 × CPU",
        networks=found,
    )
    return evaluation, lambda rows: [row.data for row in reader.rows(rows)]
