"""Training JPEGs decoded on the device, by nvJPEG on a GPU: workers read files and draw boxes, the rest happens here.

The boxes are those that the CPU decoder would take, from the same draws. Cropping and resizing are two matrix products
with Pillow's weights, so a crop is the CPU's to within a few grey levels where both decoders give the same pixels.
On a CPU torchvision's libjpeg stands in for nvJPEG, which is how this is tested; not yet run on a GPU.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from xception_pl.data.decode import Crop

_AT_A_TIME = 32  # decoded whole at once: bounds the memory beside the network's


@dataclass(frozen=True, slots=True)
class Undecoded:
    """A plain colour JPEG of a batch."""

    place: int
    """Of the image in the batch."""
    start: int
    stop: int
    """Its bytes among those of the batch."""
    crop: Crop


def decode_on(device: torch.device, encoded: Tensor, images: Sequence[Undecoded], size: int) -> Iterator[Tensor | None]:
    """uint8 crops (3, `size`, `size`) on `device`, None for each image that the device's decoder refuses.

    Args:
        device: where the crops are made and stay.
        encoded: the bytes of all images, uint8, on the CPU.
        images: where each lies in them, and its crop.
        size: side of the crops in pixels.
    """
    for start in range(0, len(images), _AT_A_TIME):
        some = images[start : start + _AT_A_TIME]
        decoded = _decode([encoded[image.start : image.stop] for image in some], device)
        whole = [(pixels, image.crop) for pixels, image in zip(decoded, some, strict=True) if pixels is not None]
        made = iter(crop_and_resize(whole, size) if whole else [])
        yield from (None if pixels is None else next(made) for pixels in decoded)


def cannot_decode(device: torch.device) -> str | None:
    """Why no JPEG can be decoded on `device`, such as a torchvision built without nvJPEG; None where one can.

    Asked before a run: later, what the device refuses goes to the CPU, and all of it would, unnoticed.
    """
    jpeg = io.BytesIO()
    Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
    try:
        _decode_all([torch.frombuffer(jpeg.getbuffer(), dtype=torch.uint8)], device)
    except RuntimeError as error:
        return str(error).splitlines()[0].rstrip(".")
    return None


def _decode(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Whole images, uint8 (3, H, W); one that fails spoils its batch, so then each is tried alone."""
    try:
        return list(_decode_all(files, device))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if len(files) == 1:
            return [None]
    return [_decode([file], device)[0] for file in files]


def _decode_all(files: list[Tensor], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision announces that its decoders will move
        decoded: list[Tensor] = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    return decoded


def crop_and_resize(images: Sequence[tuple[Tensor, Crop]], size: int) -> list[Tensor]:
    """Crops of decoded images: uint8 (3, H, W) each to (3, `size`, `size`), antialiased as Pillow does it."""
    cut = []
    for pixels, crop in images:
        top, left, tall, wide = map(int, crop.box)
        cut.append(pixels[:, top : top + tall, left : left + wide])
    bicubic, device = images[0][1].bicubic, cut[0].device
    assert all(crop.bicubic == bicubic for _, crop in images), "a recipe's training crops have one filter"
    down, across = (
        resize_weights(torch.tensor([pixels.shape[side] for pixels in cut], device=device), size, bicubic)
        for side in (1, 2)
    )
    out = []
    for i, (pixels, (_, crop)) in enumerate(zip(cut, images, strict=True)):
        rows, columns = down[i, :, : pixels.shape[1]], across[i, :, : pixels.shape[2]]
        narrow = (pixels.float() @ columns.T).round().clamp(0, 255)  # Pillow rounds between its two passes
        resized = (rows @ narrow).round().clamp(0, 255).to(torch.uint8)
        out.append(resized.flip(2) if crop.flip else resized)
    return out


def resize_weights(lengths: Tensor, size: int, bicubic: bool) -> Tensor:
    """Matrices (N, `size`, longest) that resize lines of `lengths` (N,) pixels to `size`: Pillow's weights.

    Args:
        lengths: pixels of each line.
        size: pixels of the result.
        bicubic: Catmull-Rom's filter, else the triangle.
    """
    length = lengths[:, None, None]
    scale = length / size
    stretch = scale.clamp(min=1.0)  # the filter widens where the image shrinks: that is the antialiasing
    reach = (2.0 if bicubic else 1.0) * stretch
    centre = (torch.arange(size, device=lengths.device)[None, :, None] + 0.5) * scale
    place = torch.arange(int(lengths.max()), device=lengths.device)[None, None, :]
    x = ((place - centre + 0.5) / stretch).abs()
    if bicubic:
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, far, 0.0))
    else:
        weights = (1 - x).clamp(min=0)
    low, high = (centre - reach + 0.5).floor(), (centre + reach + 0.5).floor()
    weights = torch.where((place >= low) & (place < high) & (place < length), weights, 0.0)
    return weights / weights.sum(2, keepdim=True)
