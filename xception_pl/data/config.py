"""What a recipe may say about its data. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xception_pl.data.errors import DataError

SAMPLE = "sample"
OUTFITS = "sample-outfits"
FREQUENCY = "frequency"
SMALLEST_IMAGE = 71  # pixels: below, the network's last feature map is empty
SILENCE_SECONDS = 30.0
"""A connection without a byte for so long is given up and made anew."""
LAST_TRIES_SECONDS = 2 * SILENCE_SECONDS
"""By which a read may outlast `retry_seconds`: its last try, after that of the process it waited for."""


@dataclass(kw_only=True)
class DataConfig:
    """Where images come from, how they are cropped and changed, and how many make a batch."""

    source: str = "ILSVRC/imagenet-1k"
    """Hub dataset id, folder or file of Parquet, folder of Arrow files or images, `sample`: the shipped images, or
    `sample-outfits`: pictures of several of them, with label lists."""
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
    class_weights: str | None = None
    """Weights of the classes in MAP@100: a file with one number a line in the order of the classes, `frequency` for how
    often the training split has each label, or null for equal weights (optim.loss sigmoid only)."""
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
    shuffle_window: int = 65536
    """Images among which the order is random; larger is closer to a perfect shuffle and keeps more in the cache."""
    cache_dir: str | None = None
    """Folder for row groups of remote or large Parquet, shared by a node's processes; null is ~/.cache/xception_pl."""
    cache_gb: float = 32.0
    """Most gigabytes (10⁹ bytes) in the cache folder; with room for the data, later epochs do not touch the network."""
    retry_seconds: float = 300.0
    """Seconds for which a failing read is tried again before the run stops; a minute below trainer.timeout_seconds and
    run.stall_seconds."""
    max_corrupt: float = 0.001
    """Largest share of training images that may be undecodable: each is replaced and listed; more end the run."""
    val_corrupt: Literal["fail", "skip"] = "fail"
    """An undecodable held-out image ends the run (`fail`) or is left out of the metrics (`skip`)."""
    workers: int = 2
    """Loader processes per device; 0 loads in the training process."""
    prefetch: int = 4
    """Batches each worker holds ready."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Where training JPEGs are decoded: by the workers, or by nvJPEG on the GPU, as far as it can. Not yet run on one."""
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
    """What is impossible about a configuration, a sentence each. Opens no file, asks no network."""
    wrong = []

    def need(holds: bool, sentence: str) -> None:
        if not holds:
            wrong.append(sentence)

    try:
        if local_path(config.source) is not None and config.revision is not None:
            wrong.append(
                f"data.revision {config.revision} is a git revision of a hub dataset, but data.source "
                f"{config.source} is local: leave it out."
            )
    except DataError as error:
        wrong.append(str(error))
    weights = config.class_weights
    need(
        weights is None or weights == FREQUENCY or Path(weights).expanduser().is_file(),
        f"data.class_weights {weights} is no file: give one with a number a line, {FREQUENCY}, or null.",
    )
    need(
        config.image_size >= SMALLEST_IMAGE,
        f"data.image_size {config.image_size} is below {SMALLEST_IMAGE} px, the smallest input of the network.",
    )
    for key, least in (
        ("global_batch", 1),
        ("eval_batch", 1),
        ("shuffle_window", 1),
        ("prefetch", 1),
        ("workers", 0),
        ("randaugment", 0),
        ("train_images", 1),
        ("val_images", 1),
    ):
        value = getattr(config, key)
        need(value is None or value >= least, f"data.{key} {value} is below {least}.")
    need(config.cache_gb > 0, f"data.cache_gb {config.cache_gb} is not above 0.")
    need(config.retry_seconds >= 0, f"data.retry_seconds {config.retry_seconds} is negative.")
    for key in ("mixup", "cutmix"):
        need(getattr(config, key) >= 0, f"data.{key} {getattr(config, key)} is negative: 0 switches it off.")
    for key, low, high in (
        ("crop_area_min", 0.0, 1.0),
        ("random_erasing", 0.0, 1.0),
        ("max_corrupt", 0.0, 1.0),
        ("randaugment_magnitude", 0.0, 10.0),
    ):
        value = getattr(config, key)
        need(low <= value <= high, f"data.{key} {value} is not within {low:g} to {high:g}.")
    if config.train_images is not None and 0 < config.train_images < config.global_batch:
        wrong.append(
            f"data.global_batch {config.global_batch} is more than data.train_images {config.train_images}: "
            "an epoch would have no step."
        )
    for key in ("image_column", "label_column", "train_split", "val_split"):
        need(bool(getattr(config, key)), f"data.{key} is empty.")
    need(
        config.image_column != config.label_column,
        f"data.image_column and data.label_column are both {config.image_column!r}.",
    )
    return wrong


def local_path(source: str) -> Path | None:
    """The path that a source names, or None for a hub id.

    Raises:
        DataError: when it is written as a path and nothing is there.
    """
    if source in (SAMPLE, OUTFITS):
        return Path(__file__).parent / "sample"
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix == ".parquet":
        raise DataError(
            f"data.source {source} does not exist: give a folder, a Parquet file, a hub dataset id, `{SAMPLE}` or `{OUTFITS}`."
        )
    return None


def idle_augment(config: DataConfig) -> list[str]:
    """Options of `config` that were changed but have no effect, a sentence each: to be shown as warnings."""
    default = DataConfig()
    idle = []
    if config.train_crop == "resize" and config.crop_area_min != default.crop_area_min:
        idle.append(
            f"data.crop_area_min {config.crop_area_min} has no effect: data.train_crop resize takes the whole image"
        )
    if config.randaugment == 0 and config.randaugment_magnitude != default.randaugment_magnitude:
        idle.append(
            f"data.randaugment_magnitude {config.randaugment_magnitude} has no effect while data.randaugment is 0"
        )
    return idle
