"""Mistakes in the options of `bench train` and `bench infer` are one sentence and exit code 2."""

import sys

import pytest
import torch

from xception_pl.bench import __main__ as bench
from xception_pl.bench.options import choose, parse
from xception_pl.bench.ours import ours
from xception_pl.bench.peers import peers

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--size 70", "--size 70 is too small: use 71 or more"),
        ("--batch 0", "--batch 0 is too small: use 1 or more"),
        ("--rounds 0", "--rounds 0 is too small: use 1 or more"),
        ("--seconds 0", "--seconds 0 is no time: use a number above 0"),
        ("--device tpu", "--device tpu is not supported: use cpu, cuda or cuda:N"),
        ("--device cpu --precision fp16", "--precision fp16 needs a GPU; on a CPU choose fp32 or bf16"),
        ("--device cpu --precision tf32", "--precision tf32 needs a GPU; on a CPU choose fp32 or bf16"),
        ("--chart x.txt", "--chart x.txt is no kind of picture: end its name in .png, .pdf, .svg"),
        ("--json nowhere/x", "--json nowhere/x cannot be written: nowhere is not a folder to write in"),
        ("--device cpu --peers tim", "--peers tim: there is no such contender; choose from keras, keras:tensorflow, "),
        ("--device cpu --modes fast", "--modes fast: there is no such contender; choose from channels_last, compile, "),
        ("--device cpu --modes nchw --reference timm:nchw --peers none", "--reference timm:nchw is not measured"),
        ("--device cpu --peers none --modes none", "nobody is left to measure"),
        pytest.param("--device cuda", "--device cuda is not there: ", marks=NO_GPU),
    ],
)
def test_mistakes(arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sys.exit(bench.main(["train", *arguments.split()]))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(sentence)
    assert error.count("\n") == 1


def test_a_peer_that_was_asked_for_by_name_must_be_able(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["train", "--device", "cpu", "--size", "71", "--batch", "1", "--peers", "openvino"]) == 2
    assert capsys.readouterr().err == "openvino cannot be measured: does not train.\n"


def test_names_choose_contenders() -> None:
    def names(arguments: str) -> list[str]:
        options = parse("train", "", ["--device", "cpu", *arguments.split()])
        return [contender.name for contender in choose(options, ours(), peers())[0]]

    everyone = [contender.name for contender in ours() + peers()]
    assert names("") == everyone
    assert names("--peers none") == [contender.name for contender in ours()]
    assert names("--modes compile --peers keras:torch,timm") == [
        "xception_pl:compile",
        "timm:nchw",
        "timm:channels_last",
        "timm:compile",
        "keras:torch",
    ]


def test_measurements_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "train" in text
    assert "infer" in text
