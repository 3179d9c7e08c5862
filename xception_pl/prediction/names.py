"""What the classes are called."""

from collections import Counter
from collections.abc import Sequence

IMAGENET_CLASSES = 1000


def class_names(stored: Sequence[str] | None, classes: int) -> list[str]:
    """The names that came with the weights; without them ImageNet's where there are 1000 classes, else their numbers."""
    if stored is not None and len(stored) == classes:
        return list(stored)
    return imagenet_names() if classes == IMAGENET_CLASSES else [str(index) for index in range(classes)]


def imagenet_names() -> list[str]:
    """ImageNet-1k's classes in the order of its labels, from timm's tables: "tench", "goldfish" …

    Two words stand for two classes each (a crane is a bird and a machine): their WordNet ids follow them.
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    words = [info.index_to_description(index).partition(",")[0] for index in range(IMAGENET_CLASSES)]
    twice = {word for word, count in Counter(words).items() if count > 1}
    return [f"{word} ({info.index_to_label_name(i)})" if word in twice else word for i, word in enumerate(words)]
