"""crop.c as a function, compiled once for this machine: JPEG bytes to a resized crop without decoding the rest.

The first use compiles it with the machine's C compiler, a second or two, and keeps the result in the user's cache
folder; other processes find it there. libjpeg-turbo itself comes out of the wheel of torchvision or Pillow. Where there
is no compiler or no such wheel, `decode` has Pillow do everything.
"""

import ctypes
import functools
import importlib.util
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xception_pl.compiled import Unavailable as Unavailable
from xception_pl.compiled import compiled
from xception_pl.data.crops import Box

SOURCE = Path(__file__).parent / "crop.c"


TAIL = 16
"""crop.c writes whole vectors: so many bytes behind a crop are written over too."""


def crop_jpeg(
    data: bytes,
    box: Box,
    size: int,
    bicubic: bool,
    flip: bool = False,
    context: bool = False,
    scaled: bool = False,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8] | None:
    """`box` of a JPEG resized to (size, size, 3), flipped on request; None where native code cannot be had
    or libjpeg finds fault with the file.

    Args:
        data: a JPEG of one or three components.
        box: in pixels of the whole image.
        size: side of the result in pixels.
        bicubic: Pillow's bicubic filter, else its bilinear one.
        flip: mirror left and right.
        context: let the filter see the pixels around the box, as if the whole image had been resized.
        scaled: decode with a smaller DCT where the crop is at least twice `size`; faster, not to the bit the same.
        out: where the result goes, (size, size, 3) without gaps, and `TAIL` bytes behind it that are nothing yet.
    """
    library, _ = _try_load()
    if library is None:
        return None
    if out is None:
        out = np.empty(size * size * 3 + TAIL, np.uint8)[:-TAIL].reshape(size, size, 3)
    assert out.shape == (size, size, 3)
    assert out.flags.c_contiguous
    failed = library.crop_jpeg(
        data, len(data), (ctypes.c_double * 4)(*box), context, scaled, size, bicubic, flip, out.ctypes.data
    )
    return None if failed else out


def load() -> ctypes.CDLL:
    """crop.c, ready to use. Call it before workers start, so that they find it compiled.

    Raises:
        Unavailable: no C compiler, no libjpeg-turbo, or no folder to keep the result in.
    """
    library, reason = _try_load()
    if library is None:
        raise Unavailable(reason)
    return library


@functools.cache
def _try_load() -> tuple[ctypes.CDLL | None, str]:
    """Once a process, its failure remembered too."""
    try:
        library = ctypes.CDLL(str(compiled(SOURCE)))
    except (Unavailable, OSError) as error:
        return None, str(error)
    library.crop_open.argtypes = [ctypes.c_char_p]
    library.crop_jpeg.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, *[ctypes.c_int] * 5, ctypes.c_void_p
    ]  # fmt: skip
    for path in _libjpeg_files():
        if library.crop_open(os.fsencode(path)) == 0:
            return library, str(path)
    return None, "neither torchvision nor Pillow brings a libjpeg-turbo that can crop"


def _libjpeg_files() -> list[Path]:
    """Shared libraries of libjpeg inside the wheels of torchvision and Pillow (Linux and macOS layouts)."""
    files: list[Path] = []
    for package, vendored in (("torchvision", "torchvision.libs"), ("PIL", "pillow.libs")):
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            home = Path(spec.submodule_search_locations[0])
            for folder in (home.parent / vendored, home / ".dylibs"):
                files += sorted(folder.glob("libjpeg*"))
    return files
