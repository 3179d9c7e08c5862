"""What a recipe may say about its data. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(kw_only=True)
class DataConfig:
    """Where images come from, how they are cropped and changed, and how many make a batch."""

    source: str = "ILSVRC/imagenet-1k"
    """Hub dataset id, folder or file of Parquet, image folder, or `sample`: the images that ship with the package."""
    revision: str | None = None
    """Git revision of a hub dataset: pin a commit for a reproduction."""
    train_split: str = "train"
    """Name of the training split."""
    val_split: str = "validation"
    """Name of the held-out split."""
    image_column: str = "image"
    """Column of the images."""
    label_column: str = "label"
    """Column of the labels (of label lists, with optim.loss sigmoid)."""
    train_images: int | None = None
    """Expected images of the training split; null counts them. A dry run plans with it; checked against the source."""
    val_images: int | None = None
    """Expected images of the held-out split; null counts them."""
    image_size: int = 299
    """Side of the network's input in pixels, at least 71."""
    global_batch: int = 256
    """Images an optimiser step, over all devices and accumulated batches."""
    eval_batch: int = 64
    """Images a device and step in evaluation."""
    shuffle_window: int = 16384
    """Images among which the order is random; larger is closer to a perfect shuffle and holds more in memory."""
    workers: int = 2
    """Loader processes per device; 0 loads in the training process."""
    prefetch: int = 4
    """Batches each worker holds ready."""
    train_crop: Literal["inception", "resize", "timm"] = "inception"
    """Training crop: `inception` TF-Slim's random box, `timm` RandomResizedCrop (8-100 %), `resize` the whole image."""
    crop_area_min: float = 0.05
    """Smallest area of the random box as a share of the image (TF-Slim 0.05, timm 0.08)."""
    eval_crop: Literal["tf-slim", "keras", "timm", "resize"] = "tf-slim"
    """Evaluation crop: central 87.5 % of each side; Keras' resize; timm's 0.8975 bicubic; or the whole image."""
    flip: bool = True
    """Random horizontal flips in training."""
    color: Literal["none", "fast", "full"] = "none"
    """TF-Slim's colour distortion: `fast` brightness and saturation, `full` hue and contrast too, in four orders."""
    randaugment: int = 0
    """RandAugment operations an image; 0 is off."""
    randaugment_magnitude: float = 9.0
    """Strength of RandAugment's operations, 0 to 10."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 is off."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution; 0 is off."""
    random_erasing: float = 0.0
    """Probability that a random rectangle of a training image is erased."""


def check(config: DataConfig) -> list[str]:
    """What is impossible in these values: one sentence each, naming the keys. The source itself is asked later."""
    problems = []
    least = {"image_size": 71, "global_batch": 1, "eval_batch": 1, "shuffle_window": 1, "workers": 0, "prefetch": 1}
    for name, lowest in least.items():
        if getattr(config, name) < lowest:
            why = ", the smallest image that Figure 5's network takes" if name == "image_size" else ""
            problems.append(f"data.{name} must be at least {lowest}{why}, not {getattr(config, name)}.")
    for name in ("train_images", "val_images"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            problems.append(f"data.{name} must be at least 1, or null to count them, not {getattr(config, name)}.")
    local = _local(config.source)
    if local is not None and not local.exists():
        problems.append(f"data.source: there is no file or folder {config.source}.")
    if config.revision is not None and (local is not None or config.source == "sample"):
        problems.append(f"data.revision is for hub datasets and has no effect on {config.source}; remove it.")
    if not config.workers and config.prefetch != DataConfig.prefetch:
        problems.append("data.prefetch has no effect with data.workers 0; remove it or give workers.")
    return problems


def _local(source: str) -> Path | None:
    """The path that a source names, or None for a hub dataset (`name` or `owner/name`) and the sample."""
    path = Path(source).expanduser()
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith((".parquet", ".arrow"))
    return path if looks_local or (source != "sample" and path.exists()) else None
