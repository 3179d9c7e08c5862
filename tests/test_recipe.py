"""Recipes: strict, complete in their complaints, and the same after printing."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from xception_pl.commands import split_arguments
from xception_pl.fit import main
from xception_pl.recipe import RecipeError, load_recipe, recipe_from_plain, schema, to_plain

RECIPES = sorted(path for path in Path("recipes").rglob("*.yaml") if path.parent.name != "ablations")


def problems_of(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(RecipeError) as caught:
        split_arguments([str(recipe), *overrides]).load()
    return caught.value.problems


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_shipped_recipes_fit_the_schema(path: Path) -> None:
    load_recipe(path)


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_printed_recipe_reads_back_to_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, {"optim.lr": "1e-5", "model.fc_units": "[8, 4]"})
    printed = tmp_path / "other_name.yaml"
    printed.write_text(recipe.to_yaml())
    assert load_recipe(printed) == recipe
    assert recipe_from_plain(to_plain(recipe)) == recipe
    assert recipe.optim.lr == 1e-5
    assert recipe.model.fc_units == (8, 4)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    text = "model: {widht: 0.5, dropout: wet}\noptim: {lr: true}\ntrainer: 3\ndata: {image_size: 50}\nseed: 1.5\n"
    problems = problems_of(tmp_path, text, "--optim.momentm=0.8", "--model.compile=maybe", "--resum", "last")
    found = "\n".join(problems)
    for expected in (
        "unknown key model.widht. Did you mean model.width?",
        "model.dropout must be a number, not 'wet'.",
        "optim.lr must be a number, not True.",
        "trainer is a section with keys of its own, not 3.",
        "data.image_size",
        "seed must be a whole number, not 1.5.",
        "unknown option --optim.momentm. Did you mean optim.momentum?",
        "--model.compile: model.compile must be true or false, not 'maybe'.",
        "unknown option --resum.",
    ):
        assert expected in found
    assert len(problems) == 9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "data: {global_batch: 30}\ntrainer: {devices: 4, num_nodes: 2}",
            "data.global_batch 30 does not divide by trainer.devices 4",
        ),
        ("data: {image_size: 70}", "data.image_size"),
        (
            "data: {retry_seconds: 900}",
            "data.retry_seconds 900 must be at least 60 s below trainer.timeout_seconds 600 and run.stall_seconds 540: a device",
        ),
        (
            "data: {retry_seconds: 500}",
            "data.retry_seconds 500 must be at least 60 s below run.stall_seconds 540: a device that still tries to read",
        ),
        (
            "run: {stall_seconds: 300}",
            "data.retry_seconds 300 must be at least 60 s below run.stall_seconds 300: a device that still tries to read",
        ),
        (
            "data: {global_batch: 64}\ntrainer: {devices: 1, accumulate_grad_batches: 2, max_device_batch: 16}",
            "trainer.max_device_batch is 16, but data.global_batch 64 on 1 devices with "
            "trainer.accumulate_grad_batches 2 is 32 a device",
        ),
        ("run: {folder: /proc/nowhere}", "run.folder /proc/nowhere cannot be written to"),
        ("run: {wandb: project}", "run.wandb needs the package wandb"),
        ("run: {name: a/b}", "run.name must be a plain folder name"),
        ("data: {source: ./no/such/folder}", "no/such/folder"),
        ("model: {num_classes: 0}", "model.num_classes must be at least 1, not 0."),
        ("optim: {lr: .nan}", "optim.lr must be a number"),
        ("optim: {lr: .inf}", "optim.lr must be a number"),
        ("optim: {lr: null}", "optim.lr must be a number, not None."),
        ("optim: {lr: 0.1, lr: 0.2}", "the key lr stands twice"),
        ("optim: {lr: 0.1", "not valid YAML"),
        ("model: {width: 0.5}\nmodel.width: 0.25", "the key model.width stands twice."),
        ("? [a, b]\n: c", "a key must be a word"),
        ("model: &a {x: *a}", "contains itself"),
        ("run: {name: '..'}", "run.name must be a plain folder name"),
        ("base: ''", "base must be the path of another recipe"),
        ("seed: -1", "seed must be 0 or more"),
        ("seed: 99999999999999999999999", "seed must be 0 or more"),
        (
            "trainer: {limit_train_batches: 5, accumulate_grad_batches: 2}",
            "no multiple of trainer.accumulate_grad_batches 2",
        ),
        ("model: {channel_multiple: 0}", "model.channel_multiple must be at least 1"),
        ("- a list", "must be a mapping of keys to values, not list"),
        ("base: nowhere.yaml", "there is no recipe"),
        ("base: recipe.yaml", "base leads back to"),
        ("base: 3", "base must be the path of another recipe"),
    ],
)
def test_one_sentence_for_each_mistake(tmp_path: Path, text: str, expected: str) -> None:
    problems = problems_of(tmp_path, text)
    assert len(problems) == 1
    assert expected in problems[0]
    assert "\n" not in problems[0]


def test_a_recipe_builds_on_another(tmp_path: Path) -> None:
    (tmp_path / "ground.yaml").write_text("seed: 3\noptim: {lr: 0.1, momentum: 0.5}\n")
    (tmp_path / "upon.yaml").write_text("base: ground.yaml\noptim: {lr: 0.2}\n")
    recipe = load_recipe(tmp_path / "upon.yaml", {"seed": "4"})
    assert (recipe.seed, recipe.optim.lr, recipe.optim.momentum, recipe.run.name) == (4, 0.2, 0.5, "upon")


def test_a_mistake_in_a_base_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "ground.yaml").write_text("sed: 3\n")
    (problem,) = problems_of(tmp_path, "base: ground.yaml")
    assert problem == f"{tmp_path / 'ground.yaml'}: unknown key sed. Did you mean seed?"


def test_every_key_has_a_docstring() -> None:
    for key in schema():
        assert key.doc.endswith((".", "].")), key.name


def test_the_command_ends_with_2_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Path("recipes/quickstart.yaml").resolve()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([str(recipe), "--model.widht=1", "--seed", "x"])
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.err.count("error: ") == 2
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_print_config_runs_again_unchanged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes/quickstart.yaml", "--print_config", "--seed=7"]) == 0
    printed = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert main([str(again), "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    assert yaml.safe_load(printed)["seed"] == 7


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for key in schema():
        assert f"--{key.name}\n" in listed


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import xception_pl", ("torch", "lightning", "datasets", "numpy")),
        ("from xception_pl.fit import main; main(['--help'])", ("torch", "lightning", "datasets")),
        ("from xception_pl.fit import main; main(['recipes/imagenet.yaml', '--print_config'])", ("torch", "lightning")),
        ("from xception_pl import Xception", ("lightning", "datasets", "timm")),
    ],
)
def test_imports_stay_cheap(code: str, absent: tuple[str, ...]) -> None:
    check = f"import sys; {code}; bad = [name for name in {absent!r} if name in sys.modules]; sys.exit(str(bad) if bad else 0)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
