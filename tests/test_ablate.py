"""Ablations: the file and its mistakes, runs that stop, fail and go on, and the numbers of the report."""

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import xception_pl
from xception_pl.ablate import main
from xception_pl.ablation import runs
from xception_pl.ablation.figure import band
from xception_pl.ablation.file import Ablation, Cell, load_ablation
from xception_pl.ablation.runs import Runner, State, find_state
from xception_pl.ablation.statistics import Spread, rows, spread
from xception_pl.fit import main as fit
from xception_pl.nets.cost import parameters
from xception_pl.nets.create import create_network
from xception_pl.recipe import RecipeError

SHIPPED = [path.resolve() for path in sorted(Path("recipes/ablations").glob("*.yaml"))]
BASE = """
model: {num_classes: 10, width: 0.125, middle_blocks: 1, bn_momentum: 0.1, dropout: 0.5}
data: {source: sample, val_split: test, image_size: 71, global_batch: 8, workers: 0, shuffle_window: 512}
optim: {lr: 0.02, ema_decay: 0.9}
trainer: {max_epochs: 1, limit_train_batches: 4, limit_val_batches: 1, log_every_n_steps: 2, enable_progress_bar: false}
"""
TINY = """
title: Two depths
base: base.yaml
overrides: {run: {tensorboard: false}, optim.momentum: 0.8}
seeds: [3, 5]
variants:
  deep: {}
  shallow: {model: {middle_blocks: 0}}
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test runs in a folder of its own with a base recipe and an ablation, and leaves the signal handlers it found."""
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(xception_pl.__file__).parents[1]))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def write_run(cell: Cell, name: str = "2026-01-01_00-00-00", **results: float) -> Path:
    """A run folder as `fit` leaves it; without results, one that was interrupted."""
    folder = cell.folder / name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    (folder / "recipe.yaml").write_text(cell.recipe.to_yaml())
    if results:
        (folder / "results.json").write_text(json.dumps({"steps": 4, "parameters": 1000, "val_loss": 1.0, **results}))
        (folder / "metrics.csv").write_text(
            "step,epoch,train_loss,images_per_second,val_top1\n"
            f"2,0.5,2.0,10,\n3,0.75,1.5,80,\n4,1,1.0,160,\n4,1,,,{results['val_top1']}\n"
        )
        environment = {
            "python": "3.11.7",
            "packages": {"torch": "2.15.0", "lightning": "2.6.6", "numpy": "2.4.6"},
            "git": {"commit": "0123456789abcdef", "changed": False},
            "cpu": {"model": "CPU", "cores": 2, "torch_threads": 1},
            "gpus": [],
        }
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def states(ablation: Ablation) -> list[State]:
    return [find_state(cell) for cell in ablation.cells]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs trainings in this process, which spares each its imports; returns the arguments of each, as they come."""
    calls: list[list[str]] = []

    def run(self: Runner, cell: Cell, state: State) -> tuple[int, float]:
        monkeypatch.delenv("XCEPTION_PL_RUN_FOLDER", raising=False)
        calls.append(runs.fit_command(cell, state)[3:])
        code = fit(calls[-1])
        return code, 1.0

    monkeypatch.setattr(Runner, "run", run)
    return calls


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Puts a script in the place of `fit`; it gets the arguments that fit would get."""

    def use(script: str) -> None:
        (tmp_path / "pretended.py").write_text(script)
        original = runs.fit_command

        def command(cell: Cell, state: State) -> list[str]:
            return [sys.executable, str(tmp_path / "pretended.py"), *original(cell, state)[3:]]

        monkeypatch.setattr(runs, "fit_command", command)

    return use


# The file


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_ablations_load(path: Path) -> None:
    ablation = load_ablation(path)
    assert len(ablation.seeds) >= 3
    assert len(ablation.cells) == len(ablation.seeds) * len(ablation.variants)
    assert all(cell.recipe.seed == cell.seed for cell in ablation.cells)


def test_the_matched_widths_of_the_segments_give_equal_parameters() -> None:
    ablation = load_ablation(next(path for path in SHIPPED if path.stem == "segments"))
    with torch.device("meta"):
        networks = {
            cell.variant: create_network(cell.recipe.model) for cell in ablation.cells[: len(ablation.variants)]
        }
    counts = {name: parameters(network) for name, network in networks.items()}
    target = counts["one a channel"]
    matched = {name: count / target - 1 for name, count in counts.items() if "equal parameters" in name}
    assert len(matched) == 4
    assert all(abs(mismatch) < 0.0175 for mismatch in matched.values()), matched


def test_a_cell_is_base_overrides_variant_command_line_and_seed() -> None:
    ablation = load_ablation("tiny.yaml", {"optim.lr": "0.5", "run.folder": "elsewhere"})
    assert [(cell.variant, cell.seed) for cell in ablation.cells] == [
        ("deep", 3),
        ("shallow", 3),
        ("deep", 5),
        ("shallow", 5),
    ]
    last = ablation.cells[-1]
    assert last.recipe.model.middle_blocks == 0
    assert (last.recipe.model.width, last.recipe.optim.momentum, last.recipe.optim.lr) == (0.125, 0.8, 0.5)
    assert last.folder == Path("elsewhere/ablations/tiny/shallow-seed5")
    assert last.arguments() == [
        "base.yaml",
        "--run.tensorboard=false",
        "--optim.momentum=0.8",
        "--optim.lr=0.5",
        "--run.folder=elsewhere/ablations/tiny",
        "--model.middle_blocks=0",
        "--seed=5",
        "--run.name=shallow-seed5",
    ]


def test_the_arguments_of_a_cell_give_its_recipe() -> None:
    """Values of every type survive the way over the command line."""
    Path("typed.yaml").write_text(
        "base: base.yaml\nseeds: [0]\nvariants:\n  a: {model.fc_units: [8, 4], optim.l2: 1.0e-5, model.bn_momentum: null}\n"
        "  b: {model.residual: false, trainer.devices: 1, trainer.precision: 64-true}\n"
    )
    from xception_pl.commands import split_arguments

    for cell in load_ablation("typed.yaml").cells:
        assert split_arguments(cell.arguments()).load() == cell.recipe


def problems_of(text: str, **overrides: str) -> list[str]:
    Path("wrong.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_ablation("wrong.yaml", overrides)
    return caught.value.problems


def test_all_mistakes_of_the_shape_are_named_at_once() -> None:
    problems = problems_of("varaints: {}\nseeds: [1, 1, 0.5]\noverrides: [3]\ntitle: 4\n")
    assert problems == [
        "wrong.yaml: unknown key varaints. Did you mean variants?",
        "wrong.yaml: base is missing; it must be the path of a recipe, relative to this file.",
        "wrong.yaml: variants is missing; it must be a mapping of at least two names to mappings of recipe keys to values.",
        "wrong.yaml: title must be a line of text, not 4.",
        "wrong.yaml: overrides must be a mapping of recipe keys to values, for all variants, not [3].",
        "wrong.yaml: seeds must be a list of different whole numbers of 0 or more, not [1, 1, 0.5].",
    ]


def test_all_mistakes_of_the_recipes_are_named_at_once_and_once() -> None:
    problems = problems_of(
        "base: base.yaml\noverrides: {optim.lr: -1, model.widht: 1, seed: 4}\nseeds: [0, 1]\n"
        "variants: {a: {model.residul: false}, b: {model.dropout: 2, run.folder: here, run.name: x}, c: {data: 3}}\n"
    )
    expected = [
        "wrong.yaml: overrides: unknown key model.widht. Did you mean model.width?",
        "optim.lr is -1.0, but must be",
        "wrong.yaml: overrides: seed cannot be set here; list it in seeds.",
        "wrong.yaml: variants.b: run.name cannot be set here; a run is named after its variant and seed.",
        "wrong.yaml: variants.b: run.folder cannot differ between variants; set it in overrides.",
        "wrong.yaml: variants.a: unknown key model.residul. Did you mean model.residual?",
        "wrong.yaml: variants.c: data is a section with keys of its own, not 3.",
    ]
    for sentence in expected:
        assert sum(problem.startswith(sentence) for problem in problems) == 1, (sentence, problems)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: no.yaml\nseeds: [0]\nvariants: {a: {}, b: {seed: 1}}", "there is no recipe no.yaml"),
        ("base: base.yaml\nseeds: [0, 0]\nvariants: {a: {}, b: {seed: 1}}", "wrong.yaml: seeds has 0 twice."),
        ("base: base.yaml\nseeds: []\nvariants: {a: {}, b: {seed: 1}}", "wrong.yaml: seeds must be a list"),
        ("base: base.yaml\nseeds: [true]\nvariants: {a: {}, b: {seed: 1}}", "wrong.yaml: seeds must be a list"),
        ("base: base.yaml\nseeds: [0]\nvariants: {a: {}}", "wrong.yaml: variants must be a mapping of at least two"),
        ("base: base.yaml\nseeds: [0]\nvariants: {a: {}, no: {}}", "the variant's name False must be text"),
        ("base: base.yaml\nseeds: [0]\nvariants: {a: {}, b: 3}", "wrong.yaml: variants.b must be a mapping"),
        ("base: base.yaml\nseeds: [0]\nvariants: {a b: {}, a-b: {model.width: 1}}", "share the folder a-b."),
        (
            "base: base.yaml\nseeds: [0]\nvariants: {a: {}, b: {model.width: 0.125}}",
            "wrong.yaml: variants a and b are the same recipe; change one.",
        ),
        (
            "base: base.yaml\nseeds: [0]\nvariants: {a: {}, b: {optim.lr: 0.1, optim.final_lr: 0.1}}",
            "wrong.yaml: variants.b: optim.final_lr",
        ),
        (
            "base: base.yaml\nseeds: [0]\nvariants: {a: {}, b: {optim.loss: sigmoid}}",
            "wrong.yaml: variants a and b differ in optim.loss, whose scores cannot be compared; give all the same.",
        ),
        ("base: [", "wrong.yaml, line"),
        ("- 3", "wrong.yaml must be a mapping of keys to values, not list."),
    ],
)
def test_one_mistake_is_one_sentence(text: str, expected: str) -> None:
    problems = [problem for problem in problems_of(text) if "seed cannot be set here" not in problem]
    assert len(problems) == 1
    assert expected in problems[0]


def test_the_command_line_may_not_undo_the_variants() -> None:
    assert problems_of(TINY, **{"model.middle_blocks": "2", "seed": "1"}) == [
        "the command line: seed cannot be set here; list it in seeds.",
        "--model.middle_blocks is what variants differ in (shallow); change it in wrong.yaml.",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("none.yaml",), "there is no ablation none.yaml."),
        (("tiny.yaml", "--sede=3"), "unknown option --sede. Did you mean seed?"),
        (("--dry-run",), "one recipe is needed, for example recipes/ablations/residual.yaml, not 0."),
        (("tiny.yaml", "--only=4"), "--only must be the index of a run, 0 to 3, not 4; --dry-run lists them."),
        (("tiny.yaml", "--only=x"), "--only must be the index of a run, 0 to 3, not x; --dry-run lists them."),
        (("tiny.yaml", "--only=1", "--collect"), "--collect and --only exclude each other; give one."),
        (("tiny.yaml", "--slurm", "--sbatch='-x"), "is not a shell's line of options: No closing quotation."),
        (("tiny.yaml", "--submit"), "--submit has no effect without --slurm."),
        (("tiny.yaml", "--report=a.txt"), "--report a.txt must be a .md file in a folder that exists."),
    ],
)
def test_mistakes_of_the_command_line(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert expected in errors
    assert errors.count("\n") == 1
    assert not Path("runs").exists()


def test_help_imports_no_torch() -> None:
    program = (
        "import sys\nfrom xception_pl.ablate import main\n"
        "assert main(['--help']) == 0\nassert main(['tiny.yaml', '--dry-run']) == 0\n"
        "assert not {'torch', 'lightning', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m xception_pl.ablate FILE [OPTIONS] [--key.sub=value …]")
    assert "--only INDEX" in done.stdout


# The runs


def test_from_end_to_end(in_process: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny.yaml"]) == 0
    assert len(in_process) == 4
    folder = Path("runs/ablations/tiny")
    printed = capsys.readouterr().out
    assert "[4/4] shallow, seed 5: val_top1 0." in printed
    assert f"written to {folder}/report.md" in printed
    report = (folder / "report.md").read_text()
    assert report.startswith("# Two depths\n")
    for text in ("| deep | 2 |", "| shallow | 2 |", "![", "`python -m xception_pl.ablate tiny.yaml`", "(4 runs)"):
        assert text in report
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((folder / "report.json").read_text())
    deep, shallow = numbers["variants"]
    assert deep["parameters"] > shallow["parameters"]
    final = json.loads(next(folder.glob("shallow-seed5/*/results.json")).read_text())["val_top1"]
    assert shallow["finals"]["5"] == final
    assert shallow["differences"]["5"] == final - deep["finals"]["5"]

    # Nothing runs again; a run without its results goes on from its checkpoint.
    assert main(["tiny.yaml"]) == 0
    assert len(in_process) == 4
    (unfinished,) = folder.glob("deep-seed5/*")
    (unfinished / "results.json").unlink()
    assert main(["tiny.yaml", "--only", "2"]) == 0
    assert len(in_process) == 5
    assert in_process[-1][-1] == f"--resume={unfinished}"
    assert len(list(folder.glob("deep-seed5/*"))) == 1
    assert all(state.finished for state in states(load_ablation("tiny.yaml")))


@pytest.mark.slow
def test_ctrl_c_saves_the_run_and_the_same_command_goes_on() -> None:
    """The real thing: processes, signals and resuming, with runs long enough to be met in the middle."""
    Path("tiny.yaml").write_text(TINY.replace("[3, 5]", "[3]"))
    arguments = ["tiny.yaml", "--trainer.limit_train_batches=60"]
    command = [sys.executable, "-m", "xception_pl.ablate", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not list(Path("runs").rglob("metrics.csv")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed = process.communicate()[0]
    assert process.returncode == 130
    assert "stopped; 0 of 2 runs are finished" in printed
    assert f"go on with: {shlex.join(['python', *command[1:]])}" in printed
    cell = load_ablation("tiny.yaml", {"trainer.limit_train_batches": "60"}).cells[0]
    interrupted = find_state(cell)
    assert interrupted.word == "begun"
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert find_state(cell) == State(folder=interrupted.folder, finished=True)


def test_ctrl_c_reaches_the_run_once_and_ends_the_rest(pretended: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pretended(
        "import pathlib, signal, sys, time\n"
        "caught = []\nsignal.signal(signal.SIGINT, lambda *_: caught.append(1))\n"
        "pathlib.Path('begun').touch()\n"
        "while not caught: time.sleep(0.01)\n"
        "time.sleep(0.2)\npathlib.Path('signals').write_text(str(len(caught)))\nsys.exit(130)\n"
    )

    def interrupt() -> None:
        while not Path("begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["tiny.yaml", "--optim.lr=0.5"]) == 130
    thread.join()
    assert Path("signals").read_text() == "1"
    printed = capsys.readouterr().out
    assert printed.count("begun; follow it with") == 1
    assert "stopped; 0 of 4 runs are finished" in printed
    assert printed.rstrip().endswith("go on with: python -m xception_pl.ablate tiny.yaml --optim.lr=0.5")


def test_a_failed_run_is_reported_and_the_others_go_on(pretended: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ablation = load_ablation("tiny.yaml")
    write_run(ablation.cells[0], val_top1=0.5)
    pretended("import os, sys\nprint('RUN' , os.environ.get('XCEPTION_PL_RUN_FOLDER'))\nsys.exit('CUDA ran away')\n")
    assert main(["tiny.yaml"]) == 1
    printed = capsys.readouterr()
    assert "deep, seed 3: finished before" in printed.out
    assert [line for line in printed.err.splitlines() if line] == [
        f"[{number}/4] {name}: failed with exit code 1: CUDA ran away (all in runs/ablations/tiny/{folder}.log)"
        for number, name, folder in (
            (2, "shallow, seed 3", "shallow-seed3"),
            (3, "deep, seed 5", "deep-seed5"),
            (4, "shallow, seed 5", "shallow-seed5"),
        )
    ]
    assert Path("runs/ablations/tiny/deep-seed5.log").read_text().startswith("RUN None")
    assert (
        "Not finished: shallow, seed 3; deep, seed 5; shallow, seed 5."
        in Path("runs/ablations/tiny/report.md").read_text()
    )


def test_a_run_of_another_process_is_left_alone(pretended: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the command that began it was killed, and only the run lives on."""
    ablation = load_ablation("tiny.yaml")
    for cell in ablation.cells[1:]:
        write_run(cell, val_top1=0.5)
    pretended("import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n")
    program = (
        "import os, subprocess, sys, threading\nfrom pathlib import Path\n"
        "from xception_pl.ablation.file import load_ablation\nfrom xception_pl.ablation import runs\n"
        "cell = load_ablation('tiny.yaml').cells[0]\n"
        "runs.fit_command = lambda *_: [sys.executable, 'pretended.py']\nrunner = runs.Runner()\n"
        "threading.Thread(target=runner.run, args=(cell, runs.State()), daemon=True).start()\n"
        "while not Path('begun').exists(): pass\n"
        "print(runner._process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    run = int(subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE).stdout)
    try:
        assert main(["tiny.yaml"]) == 0
    finally:
        os.kill(run, signal.SIGKILL)
    assert "[1/4] deep, seed 3: left out, another process is running it\n" in capsys.readouterr().out


def test_runs_of_another_recipe_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(load_ablation("tiny.yaml").cells[0], val_top1=0.5)
    Path("base.yaml").write_text(BASE.replace("lr: 0.02", "lr: 0.03"))
    ablation = load_ablation("tiny.yaml")
    assert main(["tiny.yaml", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "  0  deep, seed 3     not begun\n" in printed
    note = "deep-seed3/2026-01-01_00-00-00 is a run of another recipe (optim.lr 0.02, now 0.03) and does not count."
    assert note in printed
    write_run(ablation.cells[0], "2026-01-02_00-00-00", val_top1=0.7)
    assert main(["tiny.yaml", "--collect"]) == 0
    assert "| deep | 1 | 70.0 |" in Path("runs/ablations/tiny/report.md").read_text()
    assert note in Path("runs/ablations/tiny/report.md").read_text()


def test_of_runs_of_the_same_recipe_the_newest_counts_and_where_they_lie_does_not() -> None:
    here, there = load_ablation("tiny.yaml"), load_ablation("tiny.yaml", {"run.folder": "there"})
    write_run(here.cells[0], "2026-01-01_00-00-00", val_top1=0.5)
    newest = write_run(here.cells[0], "2026-01-02_00-00-00", val_top1=0.6)
    write_run(here.cells[0], "2026-01-03_00-00-00")
    state = find_state(here.cells[0])
    assert (state.folder, state.finished) == (newest, True)
    assert state.notes == ["deep-seed3/2026-01-01_00-00-00 repeats deep-seed3/2026-01-02_00-00-00 and does not count."]
    here.folder.parent.mkdir(exist_ok=True)
    there.folder.parent.mkdir(parents=True)
    here.folder.rename(there.folder)
    assert find_state(there.cells[0]).finished


def test_how_images_were_loaded_does_not_make_another_recipe() -> None:
    loading = {"data.workers": "2", "data.prefetch": "3", "data.cache_gb": "1", "data.retry_seconds": "9"}
    write_run(load_ablation("tiny.yaml", loading).cells[0], val_top1=0.5)
    assert find_state(load_ablation("tiny.yaml").cells[0]).finished
    assert not find_state(load_ablation("tiny.yaml", {"data.shuffle_window": "9"}).cells[0]).finished


def test_nothing_finished_is_nothing_to_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny.yaml", "--collect"]) == 1
    assert capsys.readouterr().err == "error: no run is finished yet; there is nothing to report.\n"


# The numbers


def test_mean_and_sample_standard_deviation() -> None:
    several = spread([0.2, 0.4, 0.9])
    assert several.mean == pytest.approx(0.5)
    assert several.deviation == pytest.approx(0.36055512754639896)  # sqrt((0.09 + 0.01 + 0.16) / 2)
    assert spread([0.2]) == Spread(mean=0.2, deviation=None, n=1)


def test_a_run_that_diverged_shows_in_the_table() -> None:
    ablation = load_ablation("tiny.yaml")
    for cell, loss in zip(ablation.cells, (1.0, 1.0, float("nan"), 1.0), strict=True):
        write_run(cell, val_top1=0.5, val_loss=loss)
    assert main(["tiny.yaml", "--collect"]) == 0
    assert "| deep | 2 | 50.0 ± 0.0 |  | nan ± nan |" in Path("runs/ablations/tiny/report.md").read_text()

    text = Path("runs/ablations/tiny/report.json").read_text()
    deep = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))["variants"][0]
    assert deep["losses"] == {"3": 1.0, "5": None}
    assert deep["loss"] == {"mean": None, "deviation": None, "n": 2}


def test_differences_are_paired_by_seed() -> None:
    """Seeds far apart, variants close: the difference's spread is that of the pairs, ten times below the scores'."""
    Path("tiny.yaml").write_text(TINY.replace("[3, 5]", "[3, 5, 7]"))
    ablation = load_ablation("tiny.yaml")
    scores = {"deep": {3: 0.5, 5: 0.6, 7: 0.7}, "shallow": {3: 0.48, 5: 0.59}}
    for cell in ablation.cells:
        if cell.seed in scores[cell.variant]:
            write_run(cell, val_top1=scores[cell.variant][cell.seed], val_loss=1 + cell.seed)
    deep, shallow = rows(ablation, states(ablation))
    assert (deep.score.mean, deep.score.deviation, deep.score.n) == (pytest.approx(0.6), pytest.approx(0.1), 3)
    assert deep.loss.mean == pytest.approx(6)
    assert deep.difference is None
    assert shallow.differences == {3: pytest.approx(-0.02), 5: pytest.approx(-0.01)}
    assert shallow.difference is not None
    assert shallow.difference.mean == pytest.approx(-0.015)
    assert shallow.difference.deviation == pytest.approx(0.00707106781)
    assert shallow.agreement == (0, 2)
    assert shallow.step_ms == pytest.approx(75)  # windows of 80 and 160 images/s of batches of 8, the first left out

    assert main(["tiny.yaml", "--collect"]) == 0
    report = Path("runs/ablations/tiny/report.md").read_text()
    assert (
        "| variant | n | top-1, % | against deep, points | held-out loss | parameters | step, ms |\n"
        "|---|---:|---:|---:|---:|---:|---:|\n"
        "| deep | 3 | 60.0 ± 10.0 |  | 6.000 ± 2.000 | 1,000 | 75 |\n"
        "| shallow | 2 | 53.5 ± 7.8 | -1.5 ± 0.7 | 5.000 ± 1.414 | 1,000 | 75 |\n"
    ) in report
    for line in (
        "- shallow against deep, seed by seed: 0 above, 2 below.",
        "n = 2 is small: were there no effect, 2 differences would still agree in sign with a chance of 50.0%.",
        "Not finished: shallow, seed 7.",
        "Every run: `base.yaml` with `run.tensorboard: false`, `optim.momentum: 0.8`; the variants:",
        "- shallow: `model.middle_blocks: 0`",
        "Measured on CPU, 1 of 2 cores; Python 3.11.7, torch 2.15.0, lightning 2.6.6, numpy 2.4.6, commit 0123456789ab (5 runs).",
    ):
        assert f"\n{line}\n" in report


def test_a_band_is_of_the_steps_that_all_runs_have() -> None:
    assert band([{1: 1.0, 2: 2.0, 3: 9.0}, {1: 3.0, 2: 2.0}]) == ([1, 2], [2.0, 2.0], [1.0, 2.0], [3.0, 2.0])


def test_a_conclusion_around_the_measured_part_stays() -> None:
    ablation = load_ablation("tiny.yaml")
    for cell in ablation.cells:
        write_run(cell, val_top1=0.5)
    assert main(["tiny.yaml", "--collect", "--report=depth.md"]) == 0
    path = Path("depth.md")
    first = path.read_text()
    assert "](depth.png)" in first
    path.write_text(first.replace("# Two depths\n", "# Two depths\n\nNo effect.\n") + "\nAnd below.\n")
    write_run(ablation.cells[1], "2026-01-02_00-00-00", val_top1=0.75)
    assert main(["tiny.yaml", "--collect", "--report=depth.md"]) == 0
    second = path.read_text()
    assert second.startswith("# Two depths\n\nNo effect.\n")
    assert second.endswith("\nAnd below.\n")
    assert "| shallow | 2 | 62.5 ± 17.7 | +12.5 ± 17.7 |" in second
    assert "| shallow | 2 | 50.0" not in second


# SLURM


def test_the_slurm_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_run(load_ablation("tiny.yaml").cells[1], val_top1=0.5)
    options = "--sbatch=--partition=gpu --gpus=1 --time=2:00:00"
    assert main(["tiny.yaml", "--slurm", "--optim.momentum=0.7", options]) == 0
    script = Path("runs/ablations/tiny/ablate.sbatch")
    assert script.read_text() == (
        "#!/bin/bash\n"
        "#SBATCH --job-name=ablate-tiny\n"
        "#SBATCH --array=0,1,2,3\n"
        "#SBATCH --output=runs/ablations/tiny/slurm-%A_%a.log\n"
        "#SBATCH --signal=B:TERM@120\n"
        "#SBATCH --partition=gpu\n"
        "#SBATCH --gpus=1\n"
        "#SBATCH --time=2:00:00\n"
        "set -euo pipefail\n"
        f"cd {tmp_path}\n"
        f'exec {sys.executable} -m xception_pl.ablate tiny.yaml --optim.momentum=0.7 --only="$SLURM_ARRAY_TASK_ID"\n'
    )
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "written to runs/ablations/tiny/ablate.sbatch: 4 of 4 runs\n" in capsys.readouterr().out
    assert main(["tiny.yaml", "--slurm"]) == 0
    assert "#SBATCH --array=0,2,3\n" in script.read_text()  # with this recipe, one is finished


def test_submitting_needs_sbatch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit) as ended:
        main(["tiny.yaml", "--slurm", "--submit"])
    assert ended.value.code == 2
    assert "there is no sbatch on this machine" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_submitting_hands_the_script_to_sbatch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    script = f"head -n 1 $2 >{tmp_path}/submitted; echo 17; echo no such partition >&2; exit $(cat {tmp_path}/code)"
    sbatch.write_text(f"#!/bin/sh\n{script}\n")
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    (tmp_path / "code").write_text("0")
    assert main(["tiny.yaml", "--slurm", "--submit"]) == 0
    assert (tmp_path / "submitted").read_text() == "#!/bin/bash\n"
    assert "submitted job array 17\n" in capsys.readouterr().out
    (tmp_path / "code").write_text("1")
    with pytest.raises(SystemExit) as ended:
        main(["tiny.yaml", "--slurm", "--submit"])
    assert ended.value.code == 2
    assert "no such partition" in capsys.readouterr().err


def test_nothing_left_to_submit(capsys: pytest.CaptureFixture[str]) -> None:
    for cell in load_ablation("tiny.yaml").cells:
        write_run(cell, val_top1=0.5)
    with pytest.raises(SystemExit) as ended:
        main(["tiny.yaml", "--slurm"])
    assert ended.value.code == 2
    assert "all 4 runs are finished" in capsys.readouterr().err
