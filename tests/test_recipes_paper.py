"""The recipes of Tables 1 and 2: each builds its network, says the paper's values, and flags what the paper leaves open."""

import json
import os
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from torch import nn

from xception_pl.data.outfits import outfits
from xception_pl.fit import main
from xception_pl.metrics import MeanAveragePrecisionAtK
from xception_pl.module import XceptionModule
from xception_pl.nets.config import ModelConfig
from xception_pl.nets.create import create_network
from xception_pl.optim.schedules import learning_rate
from xception_pl.recipe import Recipe, flat, load_recipe, to_plain
from xception_pl.reproduce.flags import base_of, read_flags
from xception_pl.run.plan import Plan

TABLE1 = [f"recipes/table1/{name}.yaml" for name in ("xception", "inception_v3", "resnet152", "vgg16")]
TABLE2 = [f"recipes/jft/{name}.yaml" for name in ("xception", "xception_fc", "inception_v3", "inception_v3_fc")]
INCEPTION_FEATURES = 23_834_568 - 2049 * 1000
PARAMETERS = {
    "recipes/imagenet.yaml": 22_855_952,
    "recipes/imagenet_modern.yaml": 22_855_952,
    "recipes/table1/xception.yaml": 22_855_952,
    "recipes/table1/inception_v3.yaml": 23_834_568,
    "recipes/table1/resnet152.yaml": 60_192_808,
    "recipes/table1/vgg16.yaml": 138_357_544,
    "recipes/jft/xception.yaml": 55_639_952,
    "recipes/jft/xception_fc.yaml": 115_629_968,
    "recipes/jft/inception_v3.yaml": INCEPTION_FEATURES + 2049 * 17_000,
    "recipes/jft/inception_v3_fc.yaml": INCEPTION_FEATURES + 2049 * 4096 + 4097 * 4096 + 4097 * 17_000,
}
SIZES = {path: 224 if "resnet" in path or "vgg" in path else 299 for path in PARAMETERS}

# The paper's silences (paper.md, section 3), by the topics that the recipes' flags name.
NOT_STATED = {
    "batch size",
    "epochs",
    "augmentation",
    "label smoothing",
    "clipping",
    "warm-up",
    "initialisation",
    "batch norm's decay",
    "decay of the average",
    "staircase or continuous",
    "resize and crop at evaluation",
}
NOT_STATED_OF_RMSPROP = {"RMSprop's rho", "RMSprop's epsilon"}


def on_meta(recipe: Recipe) -> nn.Module:
    with torch.device("meta"):
        return create_network(recipe.model)


@pytest.mark.parametrize("path", PARAMETERS)
def test_a_recipe_builds_its_network(path: str) -> None:
    recipe = load_recipe(path)
    network = on_meta(recipe)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[path]
    assert recipe.data.image_size == SIZES[path]
    assert not [name for name, _ in network.named_modules() if "aux" in name.lower()]
    images = torch.empty(2, recipe.model.in_chans, recipe.data.image_size, recipe.data.image_size, device="meta")
    assert network(images).shape == (2, recipe.model.num_classes)


@pytest.mark.parametrize("path", PARAMETERS)
def test_a_recipe_is_a_screen_and_says_how_to_run_it(path: str) -> None:
    text = Path(path).read_text()
    assert text.count("\n") <= 60
    assert "Not yet run" in text
    assert f"python -m xception_pl.fit {path}" in text


@pytest.mark.parametrize("path", [path for path in PARAMETERS if base_of(path)])
def test_a_recipe_repeats_nothing_of_its_base(path: str) -> None:
    """A key is set to change it, or to say something else about it."""
    content = yaml.safe_load(Path(path).read_text())
    base = flat(to_plain(load_recipe(Path(path).parent / content.pop("base"))))
    said = {flag.key for flag in read_flags(path)} | {"model.bn_momentum"}
    assert [key for key, value in flat(content).items() if value == base[key] and key not in said] == []


@pytest.mark.parametrize("path", TABLE1)
def test_table_1_shares_one_training(path: str) -> None:
    """Optimiser and schedule are the paper's; L2 is each network's; one plan for all."""
    recipe = load_recipe(path)
    optim = recipe.optim
    assert (optim.name, optim.momentum, optim.decay_rate, optim.decay_every_epochs) == ("sgd", 0.9, 0.94, 2)
    assert optim.lr == (0.01 if "vgg" in path else 0.045)
    assert optim.l2 == (4e-5 if "inception" in path else 1e-5)
    assert recipe.model.dropout == (0.0 if "resnet" in path else 0.5)
    plan = Plan(recipe=recipe, ranks=8, train_images=recipe.data.train_images, val_images=recipe.data.val_images)
    assert (plan.device_batch, plan.epoch_steps, plan.total_steps) == (32, 5004, 500_400)
    for step, stairs in ((0, 0), (10_008, 0), (10_009, 1), (500_399, 49)):  # int(1,281,167 · 2 / 256) = 10,009 a stair
        rate = learning_rate(
            optim, step, images_per_epoch=plan.train_images or 0, global_batch=256, total_steps=plan.total_steps or 0
        )
        assert rate == pytest.approx(optim.lr * 0.94**stairs, rel=1e-12)


@pytest.mark.parametrize("path", TABLE2)
def test_table_2_shares_one_training(path: str) -> None:
    recipe = load_recipe(path)
    optim, model = recipe.optim, recipe.model
    assert (optim.name, optim.momentum, optim.lr, optim.decay_rate) == ("rmsprop", 0.9, 0.001, 0.9)
    assert (optim.loss, model.dropout, model.num_classes) == ("sigmoid", 0.0, 17_000)
    assert model.fc_units == ((4096, 4096) if "_fc" in path else ())
    assert optim.l2 == (4e-5 if "inception" in path else 1e-5)
    assert recipe.data.class_weights == "frequency"

    def rate(step: int) -> float:
        return learning_rate(optim, step, images_per_epoch=350_000_000, global_batch=256, total_steps=3_750_000)

    first_after = -(-3_000_000 // 256)  # the first step that 3,000,000 samples precede
    assert (rate(first_after - 1), rate(first_after)) == (0.001, pytest.approx(0.0009, rel=1e-12))


@pytest.mark.parametrize("path", ["recipes/imagenet.yaml", *TABLE1, *TABLE2])
def test_what_the_paper_leaves_open_is_flagged(path: str) -> None:
    topics = {flag.topic for flag in read_flags(path) if flag.kind == "U"}
    expected = NOT_STATED | (NOT_STATED_OF_RMSPROP if "jft" in path else set())
    if "vgg" in path:
        expected = expected - {"batch norm's decay"}  # it has none
    assert topics >= expected


def test_inception_v3_trains_without_its_auxiliary_tower() -> None:
    recipe = load_recipe("recipes/table1/inception_v3.yaml", {"model.num_classes": "5"})
    torch.manual_seed(0)
    module = XceptionModule(recipe.model, recipe.optim, images_per_epoch=8, global_batch=2, total_steps=4)
    module.train()
    before = module.network.fc.weight.detach().clone()  # type: ignore[union-attr, operator]
    optimizer = module.configure_optimizers()
    loss = module.training_step({"image": torch.randn(2, 3, 96, 96), "label": torch.tensor([1, 3])}, 0)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(p.grad is not None for p in module.network.parameters())
    assert not torch.equal(module.network.fc.weight, before)  # type: ignore[union-attr, arg-type]


def test_the_modern_recipe_departs_in_training_alone() -> None:
    paper, modern = load_recipe("recipes/imagenet.yaml"), load_recipe("recipes/imagenet_modern.yaml")
    assert create_network_text(modern.model) == create_network_text(paper.model).replace("p=0.5", "p=0.2")
    plan = Plan(recipe=modern, ranks=8, train_images=1_281_167, val_images=50_000)
    assert (plan.device_batch, plan.epoch_steps, plan.total_steps) == (128, 1251, 375_300)

    def rate(step: int) -> float:
        return learning_rate(
            modern.optim, step, images_per_epoch=1_281_167, global_batch=1024, total_steps=plan.total_steps or 0
        )

    assert (rate(6254), rate(6255)) == (0.5, 0.5)  # int(1,281,167 · 5 / 1024) = 6,255 steps of warm-up
    assert rate(0) == pytest.approx(0.5 / 6255, rel=1e-12)
    assert 0 < rate(375_299) < 1e-8


def create_network_text(config: ModelConfig) -> str:
    with torch.device("meta"):
        return repr(create_network(config))


def test_the_modern_recipe_gives_the_source_of_each_value() -> None:
    text = Path("docs/modern_recipe.md").read_text()
    section = ""
    for line in Path("recipes/imagenet_modern.yaml").read_text().splitlines():
        if line and not line.startswith(("#", " ", "base")):
            section = line.rstrip(":")
        elif line.startswith("  ") and (key := line.split(":")[0].strip()) != "color":
            assert f"{section}.{key}`" in text or f"`{key}`" in text, key


def test_the_small_set_runs_the_whole_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = os.path.abspath("recipes/jft/sample.yaml")
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=3", "--trainer.limit_val_batches=1", "--model.width=0.125", "--data.workers=0"]
    assert main([recipe, *short, "--model.middle_blocks=1", "--trainer.enable_progress_bar=false"]) == 0
    (folder,) = (tmp_path / "runs" / "sample").iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert 0 < results["val_map100"] <= 1
    module = XceptionModule.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True)
    weights = module.hparams["class_weights"]
    assert len(weights) == 10
    assert all(800 < weight < 1000 for weight in weights)  # 4,000 pictures of 2.5 garments of 10 kinds, fewer distinct
    assert torch.equal(module.val_metrics["map100"].class_weights, torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--data.source=sample"], "holds one label an image, but the loss takes label lists"),
        (["--optim.loss=cross_entropy"], "data.class_weights weighs the classes of label lists"),
        (
            ["--optim.loss=cross_entropy", "--data.class_weights=null"],
            "holds label lists, but the loss takes one label",
        ),
        (["--model.fc_units=[0]"], "model.fc_units must hold sizes of at least 1, not 0."),
        (["--model.num_classes=9"], "There are 10 classes in split 'train' of sample-outfits, but the network has 9"),
        (["--data.val_split=tset"], "There is no split 'tset' in sample-outfits (nearest: 'test'"),
        (["--data.class_weights=nowhere.txt"], "data.class_weights nowhere.txt is no file"),
        (["--data.revision=abc"], "data.revision abc is a git revision of a hub dataset, but"),
        (["--model.name=vgg17"], "network 'vgg17' is unknown: did you mean vgg1"),
        (["--model.output_stride=5"], "model.output_stride must be one of 8, 16, 32, not '5'."),
    ],
)
def test_one_sentence_for_each_mistake(
    overrides: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = os.path.abspath("recipes/jft/sample.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([recipe, *overrides])
    errors = capsys.readouterr().err
    assert (ended.value.code, errors.count("\n")) == (2, 1)
    assert expected in errors
    assert list(tmp_path.iterdir()) == []


def test_a_label_outside_the_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the source names no classes: counting meets it before the run, reading while it runs."""
    recipe = os.path.abspath("recipes/jft/sample.yaml")
    numbers = datasets.Features({"image": datasets.Image(), "label": datasets.List(datasets.Value("int64"))})
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        table = outfits("test").select(range(40)).cast(numbers)
        table = table.map(lambda row, at: {"label": [12] if at == 7 else row["label"]}, with_indices=True)
        table.to_parquet(tmp_path / "set" / f"{split}.parquet")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([recipe, "--data.source=set"])
    assert ended.value.code == 2
    found = "an image has label 12, but the network has 10 classes."
    assert capsys.readouterr().err == f"error: In split 'train' of set {found}\n"

    short = ["--data.workers=0", "--model.width=0.125", "--trainer.enable_progress_bar=false"]
    assert main([recipe, "--data.source=set", "--data.class_weights=null", *short]) == 1
    expected = (
        "error: Row 7 of split 'train' of set has label 12: the network has 10 classes. There is no checkpoint yet."
    )
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")] == [expected]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a whole training: 150 s of one core
def test_the_small_set_is_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its recipe says: 0.896 over three seeds, and what scores without knowledge get."""
    recipe = os.path.abspath("recipes/jft/sample.yaml")
    monkeypatch.chdir(tmp_path)
    assert main([recipe, "--trainer.enable_progress_bar=false"]) == 0
    (folder,) = (tmp_path / "runs" / "sample").iterdir()
    module = XceptionModule.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True)
    chance = MeanAveragePrecisionAtK(module.hparams["class_weights"])
    targets = torch.zeros(1000, 10)
    for row, labels in enumerate(outfits("test")["label"]):
        targets[row, labels] = 1
    chance.update(torch.rand(1000, 10, generator=torch.Generator().manual_seed(0)), targets)
    assert chance.compute() == pytest.approx(0.387, abs=0.015)
    assert json.loads((folder / "results.json").read_text())["val_map100"] > 0.86
