"""Xception (Chollet, CVPR 2017) whole: the spectrum of convolutions, the network, its training, its experiments.

Names load on first use, so `import xception_pl` imports neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xception_pl.data.datamodule import ImageNetDataModule
    from xception_pl.module import XceptionModule
    from xception_pl.nets.xception import Xception
    from xception_pl.weights.load import load_network

__version__ = "0.1.0"
__all__ = ["ImageNetDataModule", "Xception", "XceptionModule", "__version__", "load_network"]

_HOME = {
    "Xception": "xception_pl.nets.xception",
    "XceptionModule": "xception_pl.module",
    "load_network": "xception_pl.weights.load",
    "ImageNetDataModule": "xception_pl.data.datamodule",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'xception_pl' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
