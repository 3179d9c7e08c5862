"""What an evaluation found, as data, as a table, and as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from xception_pl.data.item import Corrupt
from xception_pl.evaluation.scores import Ints, Scores
from xception_pl.evaluation.statistics import Paired, Summary, confusion_matrix, paired_test, summarised

CROPS = {
    "tf-slim": "the central 87.5 % of each side, resized to {size} × {size} pixels (bilinear, aspect ignored): TF-Slim's",
    "keras": "the whole image resized to {size} × {size} pixels (nearest neighbour, aspect ignored): Keras' load_img",
    "timm": "the shorter side resized to {short} pixels (bicubic), the central {size} × {size}: timm's, crop 0.8975",
    "resize": "the whole image resized to {size} × {size} pixels (bilinear, aspect ignored)",
}


def spelled_out(image_size: int, eval_crop: str, channels: int) -> str:
    """The preprocessing in words."""
    crop = CROPS[eval_crop].format(size=image_size, short=int(image_size / 0.8975))
    colour = "grey" if channels == 1 else "RGB"
    return f"{eval_crop}: {colour}, {crop}; scaled to [-1, 1] as x / 127.5 - 1"


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One network's result."""

    weights: str
    """Path or id, as given."""
    network: str
    """What it is, in a few words."""
    fingerprint: str
    """Of its weights, by which `export --results` knows them again."""
    preprocessing: str
    class_names: list[str]
    scores: Scores
    note: str | None = None
    """What has to be said about the classes and the loss."""
    summary: Summary = field(init=False)
    confusion: Ints = field(init=False)

    def __post_init__(self) -> None:
        classes = len(self.class_names)
        object.__setattr__(self, "summary", summarised(self.scores, classes))
        object.__setattr__(self, "confusion", confusion_matrix(self.scores, classes))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that a run of the command found."""

    where: str
    """The split."""
    images: int
    """Of the split, before anything was left out."""
    excluded: int
    """Left out by the user's list."""
    corrupt: list[Corrupt]
    """Left out because they cannot be decoded."""
    seconds: float
    """Of all passes, loading included."""
    hardware: str
    networks: list[Evaluated]
    """The first is what the others are compared with."""

    @property
    def images_per_second(self) -> float:
        """Images shown to a network, each to each, in a second of the whole."""
        return (self.images - len(self.corrupt)) * len(self.networks) / self.seconds

    def compared(self) -> list[Paired]:
        """The first network against each other one, on the same images."""
        return [paired_test(self.networks[0].scores, other.scores) for other in self.networks[1:]]

    def plain(self) -> dict[str, Any]:
        """Everything but the images' own scores, in JSON's types."""
        return {
            "data": self.where,
            "images": self.images,
            "excluded": self.excluded,
            "corrupt": [{"row": image.row, "reason": image.reason} for image in self.corrupt],
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "hardware": self.hardware,
            "networks": [_plain(network) for network in self.networks],
            "comparisons": [
                {"first": self.networks[0].weights, "second": other.weights, **asdict(pair)}
                for other, pair in zip(self.networks[1:], self.compared(), strict=True)
            ],
        }

    def table(self) -> str:
        """For a terminal."""
        lines = [f"{self.where}: {self.images:,} images"]
        lines += [f"  {self.excluded:,} excluded by the list given"] * bool(self.excluded)
        lines += [f"  {len(self.corrupt):,} cannot be decoded and do not count:"] * bool(self.corrupt)
        lines += [f"    row {image.row}: {image.reason}" for image in self.corrupt[:5]]
        lines += [f"    … and {len(self.corrupt) - 5} more"] * (len(self.corrupt) > 5)
        for network in self.networks:
            found, (low, high) = network.summary, network.summary.top1_interval
            lines += [
                "",
                f"{network.weights}: {network.network}",
                f"  prepared    {network.preprocessing}",
                *([f"  note        {network.note}"] if network.note else []),
                f"  images      {found.images:,}",
                f"  top-1       {found.top1:.4%}   95 % interval {low:.2%} to {high:.2%}",
                f"  top-5       {found.top5:.4%}",
                f"  loss        {found.loss:.6f}",
                f"  ECE         {found.ece:.2%}   (expected calibration error, 15 bins)",
            ]
        for other, pair in zip(self.networks[1:], self.compared(), strict=True):
            low, high = pair.interval
            lines += [
                "",
                f"{other.weights} against {self.networks[0].weights}, on the same images",
                f"  top-1       {pair.difference * 100:+.3f} points   95 % interval {low * 100:+.3f} to {high * 100:+.3f}",
                f"  only right  {pair.only_second:,} against {pair.only_first:,} images; "
                f"McNemar's exact test p = {pair.p_value:.3g}",
            ]
        lines += ["", f"{self.images_per_second:.1f} images/s with loading, on {self.hardware}"]
        return "\n".join(lines)


def _plain(network: Evaluated) -> dict[str, Any]:
    found = asdict(network.summary)
    classes = [
        {"name": network.class_names[item.index], "top1": item.accuracy, "precision": item.precision, **asdict(item)}
        for item in network.summary.classes
    ]
    described = {
        name: getattr(network, name) for name in ("weights", "network", "fingerprint", "preprocessing", "note")
    }
    return {**described, **found, "top1_interval": list(network.summary.top1_interval), "classes": classes}


def classes_csv(network: Evaluated) -> str:
    """A line a class: index, name, images, correct, top1, precision, in_top5, predicted."""
    rows: list[Sequence[Any]] = [("class", "name", "images", "correct", "top1", "precision", "in_top5", "predicted")]
    for item in network.summary.classes:
        shares = ["" if share is None else f"{share:.6f}" for share in (item.accuracy, item.precision)]
        name = network.class_names[item.index]
        rows.append((item.index, name, item.images, item.correct, *shares, item.in_top5, item.predicted))
    return _csv(rows)


def confusion_csv(network: Evaluated) -> str:
    """The confusion matrix: a row a label, a column a prediction, both headed by the classes' names."""
    rows: list[Sequence[Any]] = [("label", *network.class_names)]
    rows += [(name, *counts) for name, counts in zip(network.class_names, network.confusion.tolist(), strict=True)]
    return _csv(rows)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def confusion_png(network: Evaluated) -> bytes:
    """The confusion matrix as a picture: each label's images shared out over the predictions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    matrix = network.confusion
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    classes = len(matrix)
    named = classes <= 40
    side = max(5.0, 0.32 * classes) + 1.5 if named else 10.0
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axis.set_xlabel("predicted")
    axis.set_ylabel("label")
    axis.set_title(f"{network.summary.images:,} images, top-1 {network.summary.top1:.2%}", fontsize=11)
    if named:
        axis.set_xticks(range(classes), network.class_names, rotation=90, fontsize=8)
        axis.set_yticks(range(classes), network.class_names, fontsize=8)
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if shares[row, column] > 0.4 else "black"
            axis.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=6, color=colour)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
    return file.getvalue()
