"""Xception (Chollet, CVPR 2017) whole: the spectrum of convolutions, the network, its training, its experiments.

Names load on first use, so `import xception_pl` imports neither torch nor Lightning.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xception_pl.data.datamodule import ImageNetDataModule
    from xception_pl.module import XceptionModule
    from xception_pl.nets.xception import Xception
    from xception_pl.weights.load import load_network
    from xception_pl.weights.pretrained import PretrainedXception

__version__ = "0.1.0"
__all__ = ["ImageNetDataModule", "PretrainedXception", "Xception", "XceptionModule", "__version__", "load_network"]

_HOME = {
    "Xception": "xception_pl.nets.xception",
    "XceptionModule": "xception_pl.module",
    "load_network": "xception_pl.weights.load",
    "PretrainedXception": "xception_pl.weights.pretrained",
    "ImageNetDataModule": "xception_pl.data.datamodule",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'xception_pl' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _KnownToTimm(MetaPathFinder):
    """Registers our network with timm once timm is imported: timm has no other way to learn of it, and takes 2 s to import."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm.models":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                import_module("xception_pl.nets.as_timm")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "timm.models" in sys.modules:
    import_module("xception_pl.nets.as_timm")
else:
    sys.meta_path.insert(0, _KnownToTimm())
