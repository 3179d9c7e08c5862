"""Crops against their definitions, files as they are found, errors in one sentence."""

import functools
import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from skimage import data as photographs

from xception_pl.data import native
from xception_pl.data.config import DataConfig
from xception_pl.data.crops import Box, central_box, inception_box, timm_box, timm_eval_box
from xception_pl.data.decode import MAX_PIXELS, Crop, DecodeError, _Source, eval_image, plain_jpeg_size, train_image

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")
RESIZE = DataConfig(image_size=71, eval_crop="resize", train_crop="resize", flip=False)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


@functools.cache
def photograph(name: str = "coffee", size: tuple[int, int] = (500, 375)) -> Image.Image:
    return ImageOps.fit(Image.fromarray(getattr(photographs, name)()).convert("RGB"), size)


def reference(data: bytes, box: Box, size: int, bicubic: bool, flip: bool = False) -> np.ndarray:
    """Full decode, cut, Pillow's antialiased resize."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.crop((int(box.left), int(box.top), int(box.left + box.width), int(box.top + box.height)))
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR))
    return (pixels[:, ::-1] if flip else pixels).astype(int)


@pytest.fixture(params=["native", "pillow"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With native code, where this machine can compile it, and without."""
    if request.param == "native":
        try:
            native.load()
        except native.Unavailable as reason:
            pytest.skip(str(reason))
    else:
        monkeypatch.setattr("xception_pl.data.decode.crop_jpeg", lambda *arguments: None)
    return request.param


# Boxes


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (29, 31), (1, 1), (400, 40)])
def test_inception_boxes_keep_tensorflows_constraints(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        box = inception_box(rng, height, width)
        assert box.top >= 0 <= box.left
        assert box.top + box.height <= height
        assert box.left + box.width <= width
        assert box.height * box.width >= 0.1 * height * width
        if box != (0, 0, height, width):
            assert round(box.height * 0.75) <= box.width <= round(box.height * 1.33) + 1


def test_inception_boxes_have_tensorflows_distribution() -> None:
    """For a square image and aspect 1 the height is uniform between sqrt(0.1) and 1 of the side."""
    rng = np.random.default_rng(1)
    heights = np.array([inception_box(rng, 1000, 1000, aspect_min=1, aspect_max=1).height for _ in range(4000)])
    low = math.ceil(1000 * math.sqrt(0.1))
    assert heights.min() >= low
    assert abs(heights.mean() - (low + 1000) / 2) < 12
    assert abs(heights.std() - (1000 - low) / math.sqrt(12)) < 8
    share = np.array(
        [[b.height * b.width / 187500, b.top] for b in (inception_box(rng, 375, 500) for _ in range(3000))]
    )
    assert share[:, 0].min() >= 0.1
    assert share[:, 0].max() <= 1


def test_an_impossible_box_is_the_whole_image() -> None:
    assert inception_box(np.random.default_rng(0), 10, 1000, area_min=0.9) == (0, 0, 10, 1000)


def test_timm_boxes_are_random_resized_crops() -> None:
    rng = np.random.default_rng(0)
    boxes = [timm_box(rng, 375, 500) for _ in range(3000)]
    area = np.array([b.height * b.width / (375 * 500) for b in boxes])
    aspect = np.array([b.width / b.height for b in boxes])
    assert 0.075 < area.min() < 0.1
    assert area.max() > 0.95
    assert aspect.min() > 0.74
    assert aspect.max() < 1.35
    assert abs(np.log(aspect[area < 0.4]).mean()) < 0.02  # where nothing is rejected
    assert timm_box(rng, 10, 1000) == (0, (1000 - 13) // 2, 10, 13)


def test_evaluation_boxes() -> None:
    assert central_box(375, 500) == (23, 31, 329, 438)  # TensorFlow: int((375 − 328.125) / 2), int((500 − 437.5) / 2)
    box = timm_eval_box(375, 500, 299)  # 333 × 444, then rows 17 to 316 and columns 72 to 371
    assert box == pytest.approx((17 * 375 / 333, 72 * 500 / 444, 299 * 375 / 333, 299 * 500 / 444))


# Training and evaluation crops


@pytest.mark.parametrize("train_crop", ["inception", "timm", "resize"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_training_crop_is_a_function_of_its_seed(train_crop: str, channels: int, kind: str) -> None:
    data = encode(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8), kind)
    config = DataConfig(image_size=71, train_crop=train_crop, flip=False)  # type: ignore[arg-type]
    crops = [train_image(data, config, np.random.default_rng(seed), channels) for seed in (1, 1, 2)]
    assert crops[0].shape == (71, 71, channels)
    assert crops[0].dtype == np.uint8
    np.testing.assert_array_equal(crops[0], crops[1])
    assert (crops[0] != crops[2]).any() == (train_crop != "resize")


def test_half_of_the_training_crops_are_flipped() -> None:
    data = encode(photograph(size=(60, 60)))
    config = DataConfig(image_size=71, train_crop="resize")
    plain = train_image(data, RESIZE, np.random.default_rng(0))
    flips = 0
    for seed in range(100):
        crop = train_image(data, config, np.random.default_rng(seed))
        flipped = (crop != plain).any()
        np.testing.assert_array_equal(crop, plain[:, ::-1] if flipped else plain)
        flips += flipped
    assert 35 < flips < 65


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_evaluation_crops_are_their_definitions(kind: str) -> None:
    from torchvision.transforms import v2

    data = encode(photograph(), kind)
    image = Image.open(io.BytesIO(data)).convert("RGB")

    def evaluate(name: str) -> np.ndarray:
        return eval_image(data, DataConfig(eval_crop=name)).astype(int)  # type: ignore[arg-type]

    def same(name: str, want: Image.Image, tolerance: int) -> None:
        assert np.abs(evaluate(name) - np.asarray(want)).max() <= tolerance

    same("keras", image.resize((299, 299), Image.Resampling.NEAREST), 0)
    same("resize", image.resize((299, 299), Image.Resampling.BILINEAR), 1)
    same("tf-slim", image.crop((31, 23, 31 + 438, 23 + 329)).resize((299, 299), Image.Resampling.BILINEAR), 1)
    resized = v2.functional.resize(image, [333], interpolation=v2.InterpolationMode.BICUBIC)
    same("timm", v2.functional.center_crop(resized, [299]), 6)


def test_keras_crop_is_load_img(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    path = tmp_path / "photograph.jpg"
    path.write_bytes(encode(photograph(), "JPEG"))
    want = np.asarray(keras.utils.load_img(path, target_size=(150, 150)))
    np.testing.assert_array_equal(eval_image(path.read_bytes(), DataConfig(image_size=150, eval_crop="keras")), want)


# The fast ways


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_fast_ways_match_the_reference_crop(way: str, subsampling: int, progressive: bool) -> None:
    """Within 1 level for bilinear and 6 for bicubic, and nearly everywhere exact, on photographs and random boxes."""
    rng = np.random.default_rng(subsampling)
    for name in PHOTOGRAPHS:
        data = encode(photograph(name), "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
        for bicubic in (False, True):
            for flip in (False, True):
                box = inception_box(rng, 375, 500)
                got = _Source(data, 3).crop(299, Crop(box, bicubic, flip=flip, scaled=True))
                difference = np.abs(got - reference(data, box, 299, bicubic, flip))
                assert difference.max() <= (6 if bicubic else 1), (name, box)
                assert difference.mean() < 0.3, (name, box)


def test_every_edge_of_a_box_is_exact() -> None:
    """Partial decoding begins and ends at any pixel: no trace of the neighbouring blocks."""
    try:
        native.load()
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    data = encode(photograph(), "JPEG", quality=75)
    for left in range(24, 42):
        for top in (0, 7, 15, 16, 17, 33):
            box = Box(top, left, 130, 120 + left)
            got = native.crop_jpeg(data, box, 150, bicubic=False)
            assert got is not None
            assert np.abs(got - reference(data, box, 150, bicubic=False)).max() <= 1, box


@pytest.mark.parametrize("box", [Box(0, 0, 376, 10), Box(-1, 0, 10, 10), Box(0, 400, 10, 101), Box(5, 5, 0, 10)])
def test_boxes_outside_of_the_image_are_refused(box: Box) -> None:
    assert native.crop_jpeg(encode(photograph(), "JPEG"), box, 71, bicubic=False) is None


def test_scaled_decoding_stays_close() -> None:
    """With a smaller DCT: on average below 2 levels from the reference, and still the same picture everywhere."""
    data = encode(photograph("astronaut", (1024, 1024)), "JPEG", quality=90)
    box = Box(101, 55, 803, 877)
    try:
        native.load()
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    for size, factor in ((299, 2), (150, 4)):
        assert min(box.height, box.width) >= factor * size
        scaled = native.crop_jpeg(data, box, size, bicubic=False, scaled=True)
        exact = native.crop_jpeg(data, box, size, bicubic=False)
        assert scaled is not None
        assert exact is not None
        want = reference(data, box, size, bicubic=False)
        assert np.abs(exact - want).max() <= 1
        assert 0 < np.abs(scaled - want).mean() < 2
        assert np.quantile(np.abs(scaled - want), 0.999) < 24


def test_boxes_and_flips_do_not_depend_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(photograph(), "JPEG")
    config = DataConfig()
    fast = [train_image(data, config, np.random.default_rng(seed)).astype(int) for seed in range(6)]
    monkeypatch.setattr("xception_pl.data.decode.plain_jpeg_size", lambda data: None)  # Pillow
    for seed, crop in enumerate(fast):
        assert np.abs(train_image(data, config, np.random.default_rng(seed)) - crop).max() <= 1


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    native._try_load.cache_clear()
    try:
        with pytest.raises(native.Unavailable, match="there is no C compiler"):
            native.load()
        crop = train_image(encode(photograph(), "JPEG"), DataConfig(), np.random.default_rng(0))
        assert crop.shape == (299, 299, 3)
    finally:
        native._try_load.cache_clear()


# Files as they are


def flat(data: bytes, channels: int = 3) -> list[int]:
    """The one colour of an image."""
    pixels = eval_image(data, RESIZE, channels)
    assert pixels.shape == (71, 71, channels)
    assert np.ptp(pixels, (0, 1)).max() <= 2
    return pixels[35, 35].tolist()


def test_grey_and_transparent_images(way: str) -> None:
    assert flat(encode(Image.new("L", (20, 30), 77), "JPEG")) == [77, 77, 77]
    assert flat(encode(Image.new("L", (20, 30), 77), "JPEG"), channels=1) == [77]
    assert flat(encode(Image.new("LA", (20, 30), (77, 0)))) == [77, 77, 77]
    assert flat(encode(Image.new("RGBA", (20, 30), (10, 20, 30, 0)))) == [10, 20, 30]  # alpha is dropped
    palette = Image.new("P", (20, 30), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert flat(encode(palette, transparency=b"\xff\x00")) == [200, 100, 50]
    assert flat(encode(Image.new("1", (20, 30), 1))) == [255, 255, 255]


def test_sixteen_bits_are_scaled() -> None:
    grey = np.full((20, 30), 0x8080, np.uint16)
    assert flat(encode(Image.fromarray(grey))) == [128, 128, 128]
    assert flat(encode(Image.fromarray(grey)), channels=1) == [128]
    rows = (b"\0" + struct.pack(">3H", 0x0A00, 0x1400, 0x1E00) * 30) * 20  # 16-bit RGB, which Pillow cannot write
    header = struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0)
    assert flat(png(("IHDR", header), ("IDAT", zlib.compress(rows)), ("IEND", b""))) == [10, 20, 30]


def test_cmyk_jpegs_are_read_as_pillow_does() -> None:
    data = encode(photograph().convert("CMYK"), "JPEG")
    want = Image.open(io.BytesIO(data)).convert("RGB").resize((71, 71), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(eval_image(data, RESIZE), np.asarray(want))


def test_webp_and_misnamed_files_go_by_content() -> None:
    assert flat(encode(Image.new("RGB", (20, 30), (10, 20, 30)), "WEBP", lossless=True)) == [10, 20, 30]
    assert flat(encode(Image.new("RGB", (20, 30), (10, 20, 30)), "GIF")) == [10, 20, 30]


def test_orientation_is_ignored_as_keras_and_torchvision_do(way: str) -> None:
    image = photograph()
    turned = Image.Exif()
    turned[0x0112] = 6
    np.testing.assert_array_equal(
        eval_image(encode(image, "JPEG", exif=turned), RESIZE), eval_image(encode(image, "JPEG"), RESIZE)
    )


def png(*chunks: tuple[str, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind.encode() + body + struct.pack(">I", zlib.crc32(kind.encode() + body))
        for kind, body in chunks
    )


def test_huge_colour_profiles(way: str) -> None:
    """Larger than Pillow's bound for a PNG's compressed profile, and many segments of a JPEG."""
    profile = bytes(3 * 2**20)
    image = Image.new("RGB", (20, 30), (100, 100, 100))
    for kind in ("PNG", "JPEG"):
        data = encode(image, kind, icc_profile=profile)
        assert flat(data) == [100, 100, 100]
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(encode(image, "PNG", icc_profile=profile)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 2)])
def test_tiny_images(kind: str, size: tuple[int, int], way: str) -> None:
    data = encode(Image.new("RGB", size, (100, 100, 100)), kind)
    for crop in ("inception", "timm", "resize"):
        config = DataConfig(image_size=71, train_crop=crop)  # type: ignore[arg-type]
        assert np.abs(train_image(data, config, np.random.default_rng(0)).astype(int) - 100).max() <= 1
    for crop in ("tf-slim", "keras", "timm", "resize"):
        config = DataConfig(image_size=71, eval_crop=crop)  # type: ignore[arg-type]
        assert np.abs(eval_image(data, config).astype(int) - 100).max() <= 1


def bomb_png(height: int, width: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png(("IHDR", header), ("IDAT", zlib.compress(b"")), ("IEND", b""))


def bomb_jpeg(height: int, width: int) -> bytes:
    data = bytearray(encode(Image.new("RGB", (16, 16)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("data", [bomb_png(50_000, 50_000), bomb_png(9_500, 9_500), bomb_jpeg(65_000, 65_000)])
def test_decompression_bombs(data: bytes) -> None:
    with pytest.raises(DecodeError, match=r"too large|decompression bomb"):
        train_image(data, DataConfig(), np.random.default_rng(0))
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def broken() -> dict[str, bytes]:
    jpeg, whole_png = encode(photograph(), "JPEG"), encode(photograph())
    return {
        "empty": b"",
        "text": b"<html>429 Too Many Requests</html>",
        "one byte": b"\xff",
        "JPEG, half": jpeg[: len(jpeg) // 2],
        "JPEG, half, with an end": jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        "JPEG, header only": jpeg[:200],
        "JPEG, no image": b"\xff\xd8\xff\xd9",
        "PNG, half": whole_png[: len(whole_png) // 2],
        "WebP, half": encode(photograph(), "WEBP")[:2000],
        "GIF, header only": encode(photograph(), "GIF")[:20],
    }


@pytest.mark.parametrize("name", sorted(broken().keys() - {"JPEG, half, with an end"}))
def test_broken_files_are_one_sentence(name: str, way: str) -> None:
    for read in (
        lambda data: train_image(data, DataConfig(), np.random.default_rng(0)),
        lambda data: eval_image(data, RESIZE),
    ):
        with pytest.raises(DecodeError, match="bytes cannot be read: ") as error:
            read(broken()[name])
        assert "\n" not in str(error.value)
        assert "0x" not in str(error.value)


def test_a_cut_jpeg_with_an_end_marker_is_what_pillow_makes_of_it() -> None:
    """libjpeg fills the rest with grey and warns; Pillow takes that, so whole-image evaluation does too."""
    data = broken()["JPEG, half, with an end"]
    want = Image.open(io.BytesIO(data)).convert("RGB").resize((71, 71), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(eval_image(data, RESIZE), np.asarray(want))


def test_random_damage_never_crashes() -> None:
    rng = np.random.default_rng(0)
    for trial in range(150):
        data = bytearray(encode(photograph(size=(96, 64)), "JPEG", progressive=bool(trial % 2)))
        for _ in range(1 + trial % 8):
            data[rng.integers(2, len(data))] = rng.integers(256)
        try:
            pixels = train_image(bytes(data), DataConfig(image_size=71), rng)
        except DecodeError:
            continue
        assert pixels.shape == (71, 71, 3)


def test_header_reading() -> None:
    assert plain_jpeg_size(encode(photograph(), "JPEG", progressive=True)) == (375, 500)
    assert plain_jpeg_size(encode(photograph().convert("CMYK"), "JPEG")) is None
    assert plain_jpeg_size(encode(photograph())) is None
    thumbnail = (
        b"\xff\xe1" + struct.pack(">H", 2 + 700) + encode(Image.new("L", (8, 8)), "JPEG").ljust(700, b"\0")[:700]
    )
    jpeg = encode(photograph(), "JPEG")
    assert plain_jpeg_size(jpeg[:2] + thumbnail + jpeg[2:]) == (375, 500)  # not the thumbnail's
    assert plain_jpeg_size(jpeg[:-2]) is None


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_channel_counts_are_errors(channels: int) -> None:
    with pytest.raises(ValueError, match=f"images have 1 or 3 channels, not {channels}: set model.in_chans to 1 or 3"):
        eval_image(encode(photograph()), RESIZE, channels)


def test_pixels_are_ready_for_torch() -> None:
    for data in (encode(photograph(), "JPEG"), encode(photograph())):
        crop = train_image(data, DataConfig(), np.random.default_rng(3))
        assert crop.flags.c_contiguous
        assert crop.flags.writeable
        assert torch.from_numpy(crop).shape == (299, 299, 3)
