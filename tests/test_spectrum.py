"""The command that tables the spectrum of channel segments, and the counts that it rests on."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from xception_pl.nets.cost import activation_bytes, macs, parameters
from xception_pl.nets.xception import Xception
from xception_pl.spectrum import Settings, main, parse, spectrum, table

SMALL = ["--width", "0.25", "--middle-blocks", "1", "--image-size", "71", "--num-classes", "10"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def on_meta(**options: object) -> Xception:
    with torch.device("meta"):
        return Xception(**options)  # type: ignore[arg-type]


# Counts


def test_macs_of_the_paper() -> None:
    assert macs(on_meta(), (3, 299, 299)) / 1e9 == pytest.approx(8.357, abs=5e-4)


def test_macs_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 4 * 4, 5)
    )
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert macs(network, (4, 8, 8)) == 6 * 4 * 4 * (2 * 9) + 5 * 96
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training
    assert not network[0]._forward_hooks


def test_activation_bytes_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    image, hidden = (
        3 * 5 * 5,
        4 * 5 * 5,
    )  # the input of the first convolution, and the ReLU's output, which two layers keep
    assert activation_bytes(network, (3, 5, 5)) == 4 * (image + hidden)
    assert activation_bytes(network.double(), (3, 5, 5)) == 8 * (image + hidden)


def test_activation_bytes_are_those_of_a_real_step() -> None:
    network = Xception(width=0.1, middle_blocks=1)
    weights = {tensor.data_ptr() for tensor in network.state_dict().values()}

    def kept(batch: int) -> int:
        sizes = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = network(torch.randn(batch, 3, 71, 71))
        assert output.requires_grad
        return sum(sizes.values())

    assert activation_bytes(network, (3, 71, 71)) == kept(3) - kept(2)


# The table


def test_equal_widths_share_channels_that_every_count_divides() -> None:
    rows = spectrum(Settings(segments=(1, 3, 16, None), width=0.25, middle_blocks=1, image_size=71, steps=0))
    assert {row.middle_channels for row in rows} == {192}  # 182 to the nearest multiple of lcm(8, 3, 16) = 48
    assert {row.channel_multiple for row in rows} == {48}
    assert [row.segments for row in rows] == [1, 3, 16, None]
    for fewer, more in pairwise(rows):
        assert fewer.parameters > more.parameters
        assert fewer.macs > more.macs
        assert fewer.activation_bytes == more.activation_bytes


def test_the_paper_is_the_last_row() -> None:
    (row,) = spectrum(Settings(segments=(None,), steps=0))
    assert (row.parameters, row.middle_channels) == (22_855_952, 728)


def test_a_row_is_a_recipes_model() -> None:
    for row in spectrum(Settings(segments=(1, 4, None), match="params", width=0.5, middle_blocks=1, steps=0)):
        network = on_meta(
            segments=row.segments, width=row.width, channel_multiple=row.channel_multiple, middle_blocks=1
        )
        assert parameters(network) == row.parameters


def test_matched_parameters_are_within_one_per_cent() -> None:
    rows = spectrum(Settings(segments=(1, 2, 4, 8, None), match="params", steps=0))
    assert rows[-1].parameters == 22_855_952
    assert [row.mismatch for row in rows] == pytest.approx([0] * 5, abs=0.01)
    assert [row.mismatch for row in rows] == [row.parameters / 22_855_952 - 1 for row in rows]
    channels = [row.middle_channels for row in rows]
    assert channels == sorted(channels)
    assert "nearest" not in table(Settings(match="params", steps=0), rows)


def test_a_match_that_cannot_be_made_is_said() -> None:
    settings = Settings(segments=(64, None), match="params", width=0.25, middle_blocks=1, image_size=71, steps=0)
    rows = spectrum(settings)
    assert abs(rows[0].mismatch or 0) > 0.01
    last = table(settings, rows).splitlines()[-1]
    assert last == f"64: {rows[0].mismatch:+.1%} parameters is the nearest that multiples of 64 allow."


def test_measured_steps_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "spectrum.png"
    main(
        [
            *SMALL,
            "--segments",
            "1,null",
            "--batch",
            "2",
            "--steps",
            "3",
            "--device",
            "cpu",
            "--json",
            "--plot",
            str(figure),
        ]
    )
    printed = json.loads(capsys.readouterr().out)
    assert [row["segments"] for row in printed["rows"]] == [1, None]
    for row in printed["rows"]:
        low, high = row["step_ms_quartiles"]
        assert 0 < low <= row["step_ms"] <= high
    assert printed["settings"]["batch"] == 2
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_printed_table(capsys: pytest.CaptureFixture[str]) -> None:
    main([*SMALL, "--segments", "2,null", "--steps", "0"])
    first, _, header, *rows = capsys.readouterr().out.splitlines()
    assert first == "Xception, width 0.25, 1 middle blocks, 71 px, equal widths"
    assert header.split() == ["segments", "width", "multiple", "middle", "parameters", "GMACs", "activations", "MB"]
    small = on_meta(num_classes=10, width=0.25, middle_blocks=1)
    assert rows[1].split()[:7] == ["one", "a", "channel", "0.25", "8", "184", f"{parameters(small):,}"]


# The command line


def test_defaults_are_the_settings() -> None:
    settings, _ = parse(["--device", "cpu"])
    assert settings == Settings()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--segments", "1,x"], "--segments 1,x is not a list of counts: write it as 1,2,4,8,null"),
        (["--segments", "0"], "--segments 0 is not a list of counts: write it as 1,2,4,8,null"),
        (["--image-size", "70"], "--image-size 70 is too small: use 71 or more"),
        (["--batch", "1"], "--batch 1 is too small: use 2 or more"),
        (
            ["--plot", "/nowhere/at/all.png"],
            "--plot /nowhere/at/all.png cannot be written: /nowhere/at is not a folder",
        ),
        (["--plot", "x.foo"], "--plot x.foo is no kind of picture: end its name in .png, .pdf, .svg"),
        (["--plot", "x"], "--plot x is no kind of picture"),
        (["--width", "inf"], "--width inf is no size: use a number above 0"),
        (["--width", "nan", "--match", "params"], "--width nan is no size: use a number above 0"),
        (["--device", "abacus"], "--device abacus is not there: "),
        (["--width", "0", "--steps", "0"], "width=0.0 leaves no channels: use a number above 0"),
        (["--middle-blocks", "-1", "--steps", "0"], "middle_blocks=-1 is negative"),
        (["--match", "flops"], "argument --match: invalid choice: 'flops'"),
        (["--widht", "1"], "unrecognized arguments: --widht 1"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, xception_pl.spectrum as s\n"
        "try: s.main(['--help'])\n"
        "except SystemExit as e: print('code', e.code, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "code 0 False"
