"""`bench fit` measures the recipe's own steps, in turns, and says what bounds them."""

import json
from pathlib import Path

import pytest
import torch

from xception_pl.bench import __main__ as bench
from xception_pl.bench.fit import BareLoop, Gate, Speeds, one_device
from xception_pl.bench.timing import Spread
from xception_pl.recipe import load_recipe
from xception_pl.training import prepare

TINY = ("--model.width=0.0625", "--model.middle_blocks=0", "--data.global_batch=8", "--data.workers=0")


def speeds(**rates: float) -> Speeds:
    spreads = {name: Spread(rate, rate, rate, 3) for name, rate in rates.items()}
    return Speeds(steps=1, batch=1, trainer=spreads["compute"], overhead=Spread(0.0, 0.0, 0.0, 3), **spreads)


def test_verdicts() -> None:
    assert speeds(input=900, compute=100, both=97, share=0.97).verdict == "compute-bound, 97% of compute"
    assert speeds(input=62, compute=100, both=62, share=0.62).verdict == "input-bound, 62% of compute"
    assert speeds(input=150, compute=100, both=60, share=0.6).verdict.startswith("input and compute take turns, 60%")


def test_the_gate_answers_with_the_turns_in_order() -> None:
    class Bare:
        def __init__(self) -> None:
            self.seen: list[object] = []

        def step(self, batch: object) -> None:
            self.seen.append(batch)

        def wait(self) -> None:
            pass

    bare = Bare()
    loader = [{"n": n} for n in range(100)]
    gate = Gate(loader, bare, ahead=3, rounds=2, steps=3, accumulate=2)  # type: ignore[arg-type]
    given = [batch["n"] for batch in gate]
    assert gate.steps == 4  # whole optimiser steps
    assert len(given) == len(gate)
    # warm-up; then in each round the first batch again and again, and new ones: 3 made ahead, 2 + 4 of input alone,
    # 3 made ahead again, and the Trainer's 2 + 4
    assert given == [0] * 4 + [0] * 6 + list(range(13, 19)) + [0] * 6 + list(range(31, 37)) + [0] * 2
    assert bare.seen == [{"n": 0}] * 12
    assert {name: len(taken) for name, taken in gate.taken.items()} == dict.fromkeys(gate.taken, 2)


def test_the_bare_loop_takes_the_trainers_step() -> None:
    """One step of each on the same batch ends in the same weights and the same average."""
    recipe = load_recipe(
        "recipes/quickstart.yaml", {"model.width": 0.0625, "model.middle_blocks": 0, "data.workers": 0}
    )
    recipe.model.dropout = 0.0
    prepared = prepare(one_device(recipe))
    bare = BareLoop(prepared)
    batch = next(iter(prepared.data.train_dataloader()))
    module = prepared.module.train()
    images = prepared.data.on_after_batch_transfer(dict(batch), 0)
    optimizer = module.configure_optimizers()
    for group in optimizer.param_groups:
        group["lr"] = module.learning_rate(0)
    module.training_step(images, 0).backward()
    optimizer.step()
    assert module.average is not None
    module.average.update(module.network)
    bare.step(batch)
    for (name, mine), theirs in zip(bare.module.state_dict().items(), module.state_dict().values(), strict=True):
        if "metrics" not in name:
            torch.testing.assert_close(mine, theirs, msg=name)


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    arguments = ["fit", "recipes/quickstart.yaml", *TINY, "--rounds", "2", "--steps", "2", "--json", str(out)]
    assert bench.main(arguments) == 0
    result = json.loads(out.read_text())
    assert (result["steps"], result["batch"]) == (2, 8)
    assert all(
        result[name]["n"] == 2 and result[name]["median"] > 0 for name in ("input", "compute", "trainer", "both")
    )
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("the Trainer costs ") for line in lines)
    assert lines[-1] == result["verdict"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("recipes/quickstart.yaml --rounds 0", "error: --rounds must be a whole number of 1 or more, not '0'."),
        ("recipes/quickstart.yaml --steps x", "error: --steps must be a whole number of 1 or more, not 'x'."),
        (
            "recipes/quickstart.yaml --json nowhere/x",
            "error: --json nowhere/x cannot be written: nowhere is no folder.",
        ),
        ("recipes/quickstart.yaml --model.widht=1", "error: unknown option --model.widht. Did you mean model.width?"),
    ],
)
def test_mistakes(arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(["fit", *arguments.split()])
    assert stop.value.code == 2
    assert capsys.readouterr().err == sentence + "\n"
