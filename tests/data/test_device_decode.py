"""Decoding on the device: the CPU decoder's crops, whichever way a file takes. A CPU stands in for the GPU."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs
from torch.utils.data._utils.pin_memory import pin_memory

from tests.data.tracing import Tracer, png, trainer
from xception_pl.data.config import DataConfig
from xception_pl.data.crops import Box
from xception_pl.data.datamodule import ImageNetDataModule
from xception_pl.data.decode import Crop
from xception_pl.data.device_decode import cannot_decode, crop_and_resize
from xception_pl.data.errors import DataError
from xception_pl.data.item import Item

ROWS, BATCH = 24, 12
PNGS, JUNK, REFUSED = (3, 10), 5, 7


def photograph(number: int) -> bytes:
    """A piece of a photograph as a JPEG."""
    top = 10 * number
    out = io.BytesIO()
    Image.fromarray(photographs.astronaut()[top : top + 100 + number, 50:210]).save(out, "JPEG", quality=90)
    return out.getvalue()


def spoilt(jpeg: bytes) -> bytes:
    """A JPEG whose header and end are whole and whose Huffman tables are not."""
    place = jpeg.index(b"\xff\xc4")
    return jpeg[: place + 5] + b"\xff" * 16 + jpeg[place + 21 :]


def table() -> datasets.Dataset:
    images = [png(i, 90) if i in PNGS else photograph(i) for i in range(ROWS)]
    images[JUNK], images[REFUSED] = b"junk", spoilt(images[REFUSED])
    return datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": None} for data in images], "label": list(range(ROWS))},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )


def module(decode: str, **changes: object) -> ImageNetDataModule:
    config = {"image_size": 71, "global_batch": BATCH, "workers": 0, "max_corrupt": 0.2, "decode": decode, **changes}
    return ImageNetDataModule(DataConfig(**config), num_classes=ROWS, train=table(), val=table())  # type: ignore[arg-type]


@pytest.fixture
def cpu_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageNetDataModule, "_device", torch.device("cpu"))
    monkeypatch.setattr("xception_pl.data.datamodule.check_device", lambda device, channels: None)


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize(
    "box", [Box(0, 0, 120, 160), Box(10, 20, 50, 140), Box(3, 5, 90, 33), Box(7, 9, 20, 30), Box(0, 0, 1, 1)]
)
def test_crops_are_pillows(box: Box, bicubic: bool) -> None:
    image = Image.fromarray(photographs.astronaut()[100:220, 100:260])
    cut = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))  # type: ignore[arg-type]
    wanted = cut.resize((71, 71), Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for flip in (False, True):
        (crop,) = crop_and_resize([(pixels, Crop(box, bicubic, flip=flip))], 71)
        found = crop.flip(2) if flip else crop
        difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(wanted, int))
        assert difference.max() <= (6 if bicubic else 1)
        assert difference.mean() < 0.2


@pytest.mark.parametrize(("workers", "crop"), [(0, "inception"), (2, "inception"), (0, "timm")])
def test_batches_are_those_of_the_cpu(cpu_stands_in: None, workers: int, crop: str) -> None:
    """Order, labels, seeds, replacements and crops, and the files that take the CPU's way are counted."""
    reference = list(module("cpu", train_crop=crop).train_dataloader())
    data = module("gpu", train_crop=crop, workers=workers)
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(reference) == ROWS // BATCH
    for found, wanted in zip(batches, reference, strict=True):
        assert found.keys() == wanted.keys()
        for name in ("id", "label", "seed"):
            assert torch.equal(found[name], wanted[name])
        assert found["image"].shape == (BATCH, 3, 71, 71)
        assert found["image"].is_contiguous(memory_format=torch.channels_last)
        difference = (found["image"].int() - wanted["image"].int()).abs()
        assert difference.max() <= (6 if crop == "timm" else 2)
        assert difference.float().mean() < 0.2
        for place, row in enumerate(wanted["id"].tolist()):
            if row in PNGS:
                assert torch.equal(found["image"][place], wanted["image"][place])
    assert data.decoded_on_cpu == len({*PNGS, JUNK, REFUSED})
    assert loader._on_corrupt is not None
    assert loader._on_corrupt.rows == {JUNK, REFUSED}  # type: ignore[attr-defined]


def test_lightning_trains_with_it(tmp_path: Path, cpu_stands_in: None) -> None:
    tracer, data = Tracer(), module("gpu", workers=2, val_corrupt="skip")
    trainer(tmp_path, max_epochs=2).fit(tracer, data)
    assert [sorted(tracer.seen[2 * e] + tracer.seen[2 * e + 1]) for e in range(2)] == [list(range(ROWS))] * 2
    assert data.decoded_on_cpu == 2 * len({*PNGS, JUNK, REFUSED})


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a GPU")
def test_without_a_gpu_it_is_refused_in_one_sentence() -> None:
    with pytest.raises(DataError, match=r"^data.decode gpu needs a CUDA GPU .*: set data.decode to cpu\.$"):
        module("gpu").prepare()


def test_a_torchvision_without_nvjpeg_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image would go to the training process's CPU instead."""
    from xception_pl.data.checks import check_device

    def without(*arguments: object, **options: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support")

    monkeypatch.setattr("torchvision.io.decode_jpeg", without)
    with pytest.raises(DataError, match=r"not compiled with nvJPEG support\): set data.decode to cpu\.$"):
        check_device(torch.device("cuda"), 3)
    monkeypatch.undo()
    assert cannot_decode(torch.device("cpu")) is None


def test_grey_networks_are_refused_in_one_sentence() -> None:
    data = module("gpu")
    data.in_chans = 1
    with pytest.raises(DataError, match=r"model.in_chans is 1: set data.decode to cpu\.$"):
        data.prepare()


def test_items_are_pinned_by_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's pinning thread knows tensors and containers, and passes by all other objects without this method."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    item = Item({"id": torch.zeros(2)}, [], {}, encoded=torch.zeros(3))
    pinned = pin_memory(item)
    assert pinned.batch["id"].tolist() == [1, 1]
    assert pinned.encoded.tolist() == [1, 1, 1]
