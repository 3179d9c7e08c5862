"""The device's changes of a batch against TensorFlow's formulas, Pillow's operations and their own algebra."""

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from xception_pl.data import color, draws, mixing
from xception_pl.data.augment import DeviceAugment
from xception_pl.data.config import DataConfig, idle_augment
from xception_pl.data.randaugment import OPERATIONS, apply_operation, randaugment

EVERYTHING = {"randaugment": 2, "color": "full", "random_erasing": 0.5, "mixup": 0.2, "cutmix": 1.0}


def a_batch(size: int = 8, side: int = 24) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    return {"image": image, "label": torch.arange(size) % 5, "seed": torch.arange(size) * 977 + 5}


# The whole


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_scaling_is_exact_and_keeps_the_memory_format(memory_format: torch.memory_format) -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    batch = {"image": image.contiguous(memory_format=memory_format), "label": torch.tensor([1, 2])}
    for training in (False, True):  # nothing is enabled: no seeds needed
        out = DeviceAugment(DataConfig())(batch, training=training)
        assert out["image"].is_contiguous(memory_format=memory_format)
        assert set(out) == {"image", "label"}
        torch.testing.assert_close(out["image"], (image.double() / 127.5 - 1).float(), rtol=0, atol=1.2e-7)
        assert (out["image"].amin(), out["image"].amax()) == (-1, 1)


def test_evaluation_draws_nothing() -> None:
    batch = a_batch()
    augment = DeviceAugment(DataConfig(**EVERYTHING), num_classes=5)
    out = augment(batch, training=False)
    assert "target" not in out
    torch.testing.assert_close(out["image"], batch["image"] / 127.5 - 1)


@pytest.mark.parametrize("option", sorted(EVERYTHING))
def test_each_option_changes_the_batch_by_its_seeds_alone(option: str) -> None:
    batch = a_batch()
    augment = DeviceAugment(DataConfig(**{option: EVERYTHING[option]}), num_classes=5)
    first = augment(batch, training=True)
    assert (first["image"] != batch["image"] / 127.5 - 1).any()
    assert first["image"].abs().amax() <= 1 + 1e-6
    torch.manual_seed(1)
    torch.testing.assert_close(augment(batch, training=True), first, rtol=0, atol=0)
    other = augment({**batch, "seed": batch["seed"] + 1}, training=True)
    assert (other["image"] != first["image"]).any()


def test_unmixed_images_do_not_depend_on_their_batch() -> None:
    batch = a_batch()
    augment = DeviceAugment(DataConfig(randaugment=2, color="full", random_erasing=0.5))
    whole = augment(batch, training=True)["image"]
    halves = [
        augment({k: v[part] for k, v in batch.items()}, training=True)["image"] for part in (slice(3), slice(3, 8))
    ]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=0, atol=1e-6)


def test_one_channel_has_no_colour() -> None:
    batch = {**a_batch(), "image": a_batch()["image"][:, :1]}
    with pytest.raises(ValueError, match=r"need images of 3 channels, not 1: turn both off"):
        DeviceAugment(DataConfig(color="fast"))(batch, training=True)


def test_options_without_effect_are_named() -> None:
    idle = idle_augment(DataConfig(train_crop="resize", crop_area_min=0.3, randaugment_magnitude=5.0))
    assert [sentence.split()[0] for sentence in idle] == ["data.crop_area_min", "data.randaugment_magnitude"]
    assert idle_augment(DataConfig(randaugment=2, randaugment_magnitude=5.0)) == []


# Draws


def test_uniform_is_splitmix64() -> None:
    """Against arithmetic in whole numbers modulo 2^64, negative seeds included."""
    import zlib

    mask = 2**64 - 1

    def mixed(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    want = [
        [
            (mixed((mixed(mixed(s & mask) ^ zlib.crc32(b"name")) + k * 0x9E3779B97F4A7C15) & mask) >> 40) / 2**24
            for k in (1, 2)
        ]
        for s in seeds
    ]
    got = draws.uniform(torch.tensor(seeds), "name", 2)
    np.testing.assert_array_equal(got.double().numpy(), want)


def test_uniform_is_uniform_and_names_are_independent() -> None:
    seed = torch.arange(20000)
    u = torch.cat([draws.uniform(seed, "a", 2), draws.uniform(seed, "b", 1)], 1).numpy()
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(u.T) - np.eye(3)).max() < 0.03
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_beta_has_its_distribution(alpha: float) -> None:
    got = draws.beta(torch.arange(20000), "x", alpha).numpy()
    assert stats.kstest(got, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


# Colour, against TensorFlow's definitions


def hsv_pixelwise(image: np.ndarray, change: object) -> np.ndarray:
    out = np.empty_like(image)
    for place in np.ndindex(image.shape[1:]):
        hsv = colorsys.rgb_to_hsv(*image[(slice(None), *place)])
        out[(slice(None), *place)] = colorsys.hsv_to_rgb(*change(*hsv))  # type: ignore[operator]
    return out


def tf_adjust(name: str, image: np.ndarray, amount: float) -> np.ndarray:
    """tf.image.adjust_* of one (3, H, W) float image, from TensorFlow's documentation, for values in [0, 1]."""
    if name == "B":
        return image + amount
    if name == "C":
        mean = image.mean((1, 2), keepdims=True)
        return (image - mean) * amount + mean
    if name == "S":
        return hsv_pixelwise(image, lambda h, s, v: (h, min(max(s * amount, 0), 1), v))
    return hsv_pixelwise(image, lambda h, s, v: ((h + amount) % 1, s, v))


@pytest.mark.parametrize(
    ("name", "function", "amounts"),
    [
        ("B", color.adjust_brightness, (-0.12, 0.1)),
        ("S", color.adjust_saturation, (0.5, 1.5)),
        ("H", color.adjust_hue, (-0.2, 0.17)),
        ("C", color.adjust_contrast, (0.5, 1.5)),
    ],
)
def test_colour_operations_are_tensorflows(name: str, function: object, amounts: tuple[float, float]) -> None:
    image = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    image[0, :, 0] = image[0, :1, 0]  # grey pixels
    image[0, :, 1] = 0
    image[1, 1, 0] = image[1, 0, 0]  # two equal channels
    got = function(image, torch.tensor(amounts, dtype=torch.float64))  # type: ignore[operator]
    for one, source, amount in zip(got, image, amounts, strict=True):
        np.testing.assert_allclose(one.numpy(), tf_adjust(name, source.numpy(), amount), atol=1e-6)


def test_colour_out_of_range_follows_tensorflows_kernels() -> None:
    """A pixel without positive value loses its colour in adjust_saturation; adjust_hue keeps largest and smallest."""
    pixel = torch.tensor([-0.1, -0.2, -0.3]).view(1, 3, 1, 1)
    assert color.adjust_saturation(pixel, torch.tensor([0.7])).flatten().tolist() == pytest.approx([-0.1] * 3)
    turned = color.adjust_hue(pixel, torch.tensor([1 / 3])).flatten().tolist()
    assert turned == pytest.approx([-0.3, -0.1, -0.2], abs=1e-6)
    strong = color.adjust_saturation(torch.tensor([0.5, 0.2, -0.1]).view(1, 3, 1, 1), torch.tensor([1.5]))
    assert strong.flatten().tolist() == pytest.approx([0.5, 0.25, 0.0], abs=1e-6)  # saturation 1.2 · 1.5, clipped to 1


def test_all_four_orders_are_applied_in_sequence() -> None:
    batch, seen = 24, set()
    image = 0.3 + 0.4 * torch.rand(batch, 3, 5, 5, generator=torch.Generator().manual_seed(4))
    seed = torch.arange(batch)
    got = color.distort_color(image, seed, "full")
    u = draws.uniform(seed, "color", 5).double()
    for i in range(batch):
        amount = {
            "B": (2 * u[i, 0] - 1) * 32 / 255,
            "S": 0.5 + u[i, 1],
            "H": (2 * u[i, 2] - 1) * 0.2,
            "C": 0.5 + u[i, 3],
        }
        order = ("BSHC", "SBCH", "CHBS", "HSCB")[int(u[i, 4] * 4)]
        seen.add(order)
        want = image[i].numpy()
        for name in order:
            want = tf_adjust(name, want, float(amount[name]))
        np.testing.assert_allclose(got[i].numpy(), want.clip(0, 1), atol=1e-5)
    assert len(seen) == 4


# RandAugment, against Pillow


def pillow_reference(name: str, image: Image.Image, sign: float, magnitude: float) -> Image.Image:
    part = magnitude / 10
    width, height = image.size
    enhancers = {
        c.__name__: c
        for c in (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness)
    }
    if name in enhancers:
        return enhancers[name](image).enhance(1 + sign * 0.9 * part)
    if name in ("AutoContrast", "Equalize"):
        return getattr(ImageOps, name.lower())(image)
    if name == "Solarize":
        return ImageOps.solarize(image, math.ceil(256 * (1 - part)))
    if name == "Posterize":
        return ImageOps.posterize(image, 8 - round(4 * part))
    s, grey = sign * part, (128,) * 3
    if name == "Rotate":
        return image.rotate(30 * s, Image.Resampling.BILINEAR, fillcolor=grey)
    rows = {
        "ShearX": (1, 0.3 * s, -0.3 * s * height / 2, 0, 1, 0),
        "ShearY": (1, 0, 0, 0.3 * s, 1, -0.3 * s * width / 2),
        "TranslateX": (1, 0, 0.45 * s * width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, 0.45 * s * height),
    }
    return image.transform(image.size, Image.Transform.AFFINE, rows[name], Image.Resampling.BILINEAR, fillcolor=grey)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("sign", "magnitude"), [(1.0, 9.0), (-1.0, 4.0)])
def test_randaugment_operations_are_pillows(name: str, sign: float, magnitude: float) -> None:
    from skimage import data

    pixels = data.astronaut()[100:164, 180:260] // 2 + 30  # height 64, width 80: sides must not be confused
    got = apply_operation(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].float(),
        torch.tensor([OPERATIONS.index(name)]),
        torch.tensor([sign]),
        magnitude,
    )[0]
    assert torch.equal(got, got.round())
    source = Image.fromarray(pixels)
    want = np.asarray(source if name == "Identity" else pillow_reference(name, source, sign, magnitude)).astype(int)
    difference = np.abs(got.permute(1, 2, 0).numpy() - want)
    if name[:5] in ("Rotat", "Shear", "Trans"):  # Pillow does not blend the edge with the fill colour: look inside
        assert np.quantile(difference, 0.93) <= 1
        assert (want != pixels).mean() > 0.5
    else:
        assert difference.max() <= (1 if name in ("Color", "Contrast", "Brightness", "Sharpness") else 0)
        assert name == "Identity" or (want != pixels).any()


def test_randaugment_draws_each_operation_equally() -> None:
    u = draws.uniform(torch.arange(14000), "randaugment/0", 2)
    counts = torch.bincount((u[:, 0] * len(OPERATIONS)).long(), minlength=len(OPERATIONS)).numpy()
    assert stats.chisquare(counts).pvalue > 1e-3
    flat = torch.full((4, 3, 8, 8), 128.0)
    assert torch.isfinite(randaugment(flat, torch.arange(4), 6, 10.0)).all()


# Mixing and erasing


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixing_keeps_labels_and_pixels_in_step(mixup: float, cutmix: float) -> None:
    """Each image is its own constant, so the mean of a mixed image tells the share of each source."""
    size, side = 9, 32
    own = torch.eye(size)
    image = own.view(size, size, 1, 1).expand(size, size, side, side)  # channel i of image i is 1
    mixed, target = mixing.mix(image, own, torch.arange(size) * 31 + 1, mixup, cutmix)
    torch.testing.assert_close(mixed.mean((2, 3)), target, rtol=0, atol=1e-5)
    torch.testing.assert_close(target.sum(1), torch.ones(size))
    torch.testing.assert_close(target.diagonal(), target.diagonal().flip(0))  # one share a pair
    assert target[size // 2, size // 2] == 1
    hard = ((mixed == 0) | (mixed == 1)).all((1, 2, 3))
    assert hard.all() if mixup == 0 else not hard.all()


def test_mixing_takes_both_kinds_half_of_the_time() -> None:
    size = 600
    image = torch.zeros(size, 1, 8, 8)
    image[: size // 2] = 1
    mixed, _ = mixing.mix(image, torch.zeros(size, 1), torch.arange(size) ** 2, 5.0, 5.0)
    hard = ((mixed == 0) | (mixed == 1)).all((1, 2, 3))[: size // 2].float().mean()
    assert 0.4 < hard < 0.6


def test_cutmix_share_has_its_mean() -> None:
    size = 4000
    _, target = mixing.mix(
        torch.zeros(size, 1, 64, 64), torch.eye(2)[torch.arange(size) % 2], torch.arange(size) ** 2, 0, 1.0
    )
    own = target[torch.arange(size), torch.arange(size) % 2]
    # E over lambda ~ U(0,1) and a uniform centre: per side s = sqrt(1 - lambda), kept part s·(1 - s/4); E[(s - s²/4)²].
    expected = 1 - (1 / 2 - 2 / 4 * 2 / 5 + 1 / 16 * 1 / 3)
    assert abs(own.mean().item() - expected) < 0.02


def test_mixing_indices_needs_the_number_of_classes() -> None:
    with pytest.raises(ValueError, match=r"needs the number of classes"):
        DeviceAugment(DataConfig(mixup=0.2))(a_batch(), training=True)
    multi_hot = {**a_batch(), "label": torch.eye(8)}
    assert DeviceAugment(DataConfig(mixup=0.2))(multi_hot, training=True)["target"].shape == (8, 8)


def test_erasing_statistics() -> None:
    size, side = 4000, 48
    erased = mixing.erase(torch.ones(size, 1, side, side), torch.arange(size), 0.25)[:, 0] == 0
    hit = erased.any(2).any(1)
    assert abs(hit.float().mean() - 0.25) < 0.03
    share = erased[hit].float().mean((1, 2))
    assert share.min() > 0.015
    assert share.max() < 0.35
    rows, columns = erased[hit].any(2).sum(1), erased[hit].any(1).sum(1)
    assert torch.equal(rows * columns, erased[hit].sum((1, 2)))  # rectangles
    assert 0.45 < erased[hit].float().mean((0, 2))[: side // 2].sum() / erased[hit].float().mean((0, 2)).sum() < 0.55
