"""No dead knobs: every key of a recipe changes something that can be seen."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import loggers
from lightning.pytorch.loggers import Logger

from xception_pl.build import (
    build_data,
    build_loggers,
    build_module,
    build_start,
    build_trainer,
    choose_kernels,
    find_devices,
)
from xception_pl.data import source, stream
from xception_pl.data.augment import DeviceAugment
from xception_pl.data.config import SAMPLE, local_path
from xception_pl.data.errors import DataError
from xception_pl.optim.create import create_optimizer
from xception_pl.recipe import Recipe, RecipeError, load_recipe, schema
from xception_pl.run.guard import StepGuard
from xception_pl.run.interrupt import SignalFlag
from xception_pl.run.watchdog import Watchdog
from xception_pl.weights.safetensors import save_weights

BASE = """
model: {num_classes: 10, width: 0.125, middle_blocks: 1}
data: {source: sample, val_split: test, image_size: 71, global_batch: 8, eval_batch: 4, workers: 0, shuffle_window: 512}
"""


def of_network(recipe: Recipe) -> Any:
    """Shapes, layout, one training step's output and statistics, what is saved for the backward pass."""
    module = build_module(recipe, images_per_epoch=64, total_steps=10, start=build_start(recipe))
    kernels = choose_kernels(recipe, module.network, find_devices(recipe.trainer)[0])
    module.on_fit_start()
    compiled = module.network._compiled_call_impl is not None
    module.network._compiled_call_impl = None  # compiling itself takes too long here: test_fit does it
    saved = []
    images = torch.randn(2, recipe.model.in_chans, 71, 71, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        logits = module.network(images)
    layouts = {p.is_contiguous(memory_format=torch.channels_last) for p in module.network.parameters() if p.dim() == 4}
    state = {
        name: (tuple(value.shape), float(value.double().sum())) for name, value in module.network.state_dict().items()
    }
    with torch.no_grad():
        features = module.network.forward_features(images).shape
    return logits.double().sum().item(), sum(saved), layouts, state, compiled, kernels, features


def of_optimiser(recipe: Recipe) -> Any:
    """Groups and settings of the optimiser, the learning rate over 40 steps, losses, the average after two updates."""
    module = build_module(recipe, images_per_epoch=64, total_steps=40)
    optimizer = create_optimizer(recipe.optim, module.network)
    groups = [{k: v if k != "params" else len(v) for k, v in group.items()} for group in optimizer.param_groups]
    rates = [module.learning_rate(step) for step in range(40)]
    logits = torch.linspace(-1, 1, 20).reshape(2, 10)
    targets = torch.eye(10)[:2]
    weight = next(module.network.parameters())
    with torch.no_grad():
        for _ in range(2):
            weight += 1
            if module.average is not None:
                module.average.update(module.network)
    return (
        type(optimizer),
        groups,
        rates,
        module.loss(logits, targets).item(),
        float(next(module.evaluated.parameters()).detach().sum()),
    )


def of_data(recipe: Recipe) -> Any:
    """The first batches of both loaders as the network sees them, and how they are loaded."""
    data = build_data(recipe)
    train, val = data.train_dataloader(), data.val_dataloader()
    weights = data.class_weights()
    loading = [(len(x), x._loader.num_workers, x._loader.prefetch_factor) for x in (train, val)]
    if recipe.data.workers:
        return loading
    device = DeviceAugment(recipe.data, recipe.model.num_classes)
    batches = [device(next(iter(train)), True), device(next(iter(val)), False)]
    return (
        loading,
        weights,
        [{name: (value.shape, hash(value.numpy().tobytes())) for name, value in batch.items()} for batch in batches],
    )


def of_expectations(recipe: Recipe) -> Any:
    """What is planned with before anything is read."""
    data = build_data(recipe)
    return data.train_images, data.val_images, data.steps_per_epoch


def of_hub(recipe: Recipe) -> Any:
    """What `datasets` is asked for; it answers with the shipped images."""
    import datasets

    asked = []
    original = datasets.load_dataset_builder

    def answer(path: str, revision: str | None = None) -> datasets.DatasetBuilder:
        asked.append((path, revision))
        return original(str(local_path(SAMPLE)))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(datasets, "load_dataset_builder", answer)
        patched.setattr(source, "_knock", lambda: None)
        assert build_data(recipe).train_images == 4000
    return asked


def of_faults(recipe: Recipe, folder: Path) -> Any:
    """Where row groups are kept and how long a read is tried; what corrupt images do. Held-out image 0 is junk."""
    images = pq.read_table("xception_pl/data/sample/test.parquet").slice(0, 8).to_pylist()
    images[0]["image"]["bytes"] = b"junk"
    folder.mkdir(exist_ok=True)
    features = pq.read_schema("xception_pl/data/sample/test.parquet")
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(images, schema=features), folder / f"{split}.parquet")
    recipe.data.source, recipe.data.global_batch = str(folder), 8
    recipe.data.cache_dir = recipe.data.cache_dir and str(folder / recipe.data.cache_dir)
    data = build_data(recipe)
    cache = data._cache("train")
    assert cache is not None
    try:
        valid = next(iter(data.val_dataloader()))["valid"].tolist()
    except DataError as error:
        valid = str(error)
    allowed = data.train_dataloader()._on_corrupt._allowed
    return cache.folder, cache.limit_bytes, cache.retry_seconds, allowed, valid


def of_trainer(recipe: Recipe, folder: Path) -> Any:
    """The Trainer that is built, as it describes itself."""
    accelerator, devices, missing = find_devices(recipe.trainer)
    if accelerator == "gpu":
        return accelerator, devices, missing
    trainer, log = build_trainer(recipe, folder, accelerator=accelerator, devices=devices, signals=SignalFlag())
    shown = (
        [trainer.num_devices, trainer.num_nodes, trainer.world_size, type(trainer.strategy), trainer.precision],
        [trainer.max_epochs, trainer.max_steps, trainer.accumulate_grad_batches, trainer.check_val_every_n_epoch],
        [
            trainer.gradient_clip_val,
            trainer.gradient_clip_algorithm,
            trainer.limit_train_batches,
            trainer.limit_val_batches,
        ],
        [
            getattr(trainer.strategy, "_layer_sync", None) is not None,
            getattr(trainer.strategy, "compress", None),
            getattr(trainer.strategy, "_timeout", None),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
        ],
        [trainer.val_check_interval, [x.skip for x in trainer.callbacks if isinstance(x, StepGuard)]],
        [torch.get_float32_matmul_precision(), log.every_n_steps, sorted(type(x).__name__ for x in trainer.callbacks)],
        [type(logger).__name__ for logger in trainer.loggers],
    )
    torch.use_deterministic_algorithms(False)
    return shown


def of_run(recipe: Recipe, folder: Path) -> Any:
    """Where the run goes, what its callbacks and loggers do."""
    from xception_pl.run.folder import planned_folder

    trainer, _ = build_trainer(recipe, folder, accelerator="cpu", devices=1, signals=SignalFlag())
    every = [(x.save_every_steps, x.save_every_minutes) for x in trainer.checkpoint_callbacks]
    bounds = [
        (x.config.rank_timeout_seconds, x.config.stall_seconds) for x in trainer.callbacks if isinstance(x, Watchdog)
    ]
    return planned_folder(recipe).parent, every, bounds, [type(x).__name__ for x in trainer.loggers]


def write_other(folder: Path) -> Path:
    """Another source than the shipped images: some of them, upside down under a second name, with a second label."""
    folder.mkdir()
    for split, first in (("train", 100), ("test", 200)):
        table = pq.read_table("xception_pl/data/sample/test.parquet").slice(first, 16)
        table = table.append_column(table.schema.field("image").with_name("picture"), table["image"].take(BACKWARDS))
        table = table.append_column(table.schema.field("label").with_name("class"), table["label"].take(BACKWARDS))
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def write_weights(path: Path, recipe: Recipe) -> Path:
    """Weights of the recipe's network, with another seed than the recipe's."""
    recipe.seed += 1
    save_weights(build_module(recipe, images_per_epoch=64, total_steps=10), path)
    return path


class FakeWandb(Logger):
    """Stands where Lightning's WandbLogger does, and keeps what it was made with."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given

    name = version = "fake"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package wandb were installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: object() if name == "wandb" else find_spec(name, *more)
    )
    monkeypatch.setattr(loggers, "WandbLogger", FakeWandb)


BACKWARDS = list(range(15, -1, -1))
RMSPROP, COSINE = {"optim.name": "rmsprop"}, {"optim.schedule": "cosine", "optim.decay_rate": "0.94"}
OTHER = {"data.source": "{other}"}
WEIGHTS = {"model.weights": "{weights}"}
# Key: the value to change to, and what else the recipe must say for the key to have a meaning. {other} is write_other's,
# {weights} write_weights'.
CHANGES: dict[str, tuple[str, dict[str, str]]] = {
    "seed": ("1", {}),
    "model.name": ("resnet10t", {"model.width": "1", "model.middle_blocks": "8"}),
    "model.num_classes": ("11", {}),
    "model.in_chans": ("1", {}),
    "model.dropout": ("0.2", {}),
    "model.width": ("0.25", {}),
    "model.channel_multiple": ("16", {}),
    "model.middle_blocks": ("2", {}),
    "model.residual": ("false", {}),
    "model.intermediate_activation": ("elu", {}),
    "model.segments": ("4", {}),
    "model.fc_units": ("[16]", {}),
    "model.output_stride": ("16", {}),
    "model.grad_checkpointing": ("true", {}),
    "model.bn_momentum": ("0.5", {}),
    "model.numerics": ("torch", {}),
    "model.weights": ("{weights}", {}),
    "model.freeze": ("1", WEIGHTS),
    "model.freeze_statistics": ("true", WEIGHTS),
    "model.channels_last": ("false", {}),
    "model.compile": ("true", {}),
    "model.kernels": ("torch", {}),
    "optim.name": ("rmsprop", {}),
    "optim.lr": ("0.1", {}),
    "optim.lr_batch": ("16", {}),
    "optim.layer_decay": ("0.8", {}),
    "optim.momentum": ("0.8", {}),
    "optim.nesterov": ("true", {}),
    "optim.rho": ("0.8", RMSPROP),
    "optim.eps": ("0.1", RMSPROP),
    "optim.l2": ("0.1", {}),
    "optim.l2_sense": ("keras", {}),
    "optim.l2_on": ("all", {}),
    "optim.schedule": ("cosine", {}),
    "optim.decay_rate": ("0.5", {}),
    "optim.decay_every_epochs": ("1", {}),
    "optim.decay_every_samples": ("100", {"optim.decay_every_epochs": "0", "optim.decay_every_samples": "50"}),
    "optim.warmup_epochs": ("1", {}),
    "optim.final_lr": ("0.01", COSINE),
    "optim.loss": ("sigmoid", {}),
    "optim.label_smoothing": ("0.1", {}),
    "optim.ema_decay": ("0", {}),
    "data.source": ("{other}", {}),
    "data.revision": ("abc", {"data.source": "owner/name"}),
    "data.train_split": ("test", {}),
    "data.val_split": ("train", {}),
    "data.image_column": ("picture", OTHER),
    "data.label_column": ("class", OTHER),
    "data.class_weights": ("frequency", {"optim.loss": "sigmoid", "data.source": "sample-outfits"}),
    "data.train_images": ("3992", {}),
    "data.val_images": ("5", {}),
    "data.image_size": ("75", {}),
    "data.global_batch": ("16", {}),
    "data.eval_batch": ("5", {}),
    "data.shuffle_window": ("16", {}),
    "data.cache_dir": ("kept", {}),
    "data.cache_gb": ("1", {}),
    "data.retry_seconds": ("1", {}),
    "data.max_corrupt": ("0.5", {}),
    "data.val_corrupt": ("skip", {}),
    "data.workers": ("1", {}),
    "data.prefetch": ("3", {"data.workers": "1"}),
    "data.decode": ("gpu", {}),
    "data.train_crop": ("resize", {}),
    "data.crop_area_min": ("0.9", {}),
    "data.eval_crop": ("timm", {}),
    "data.flip": ("false", {"data.train_crop": "resize"}),
    "data.color": ("full", {}),
    "data.randaugment": ("2", {}),
    "data.randaugment_magnitude": ("2", {"data.randaugment": "2"}),
    "data.mixup": ("0.8", {}),
    "data.cutmix": ("1.0", {}),
    "data.random_erasing": ("1.0", {}),
    "trainer.accelerator": ("gpu", {}),
    "trainer.devices": ("2", {}),
    "trainer.num_nodes": ("2", {}),
    "trainer.strategy": ("ddp", {}),
    "trainer.precision": ("bf16-mixed", {}),
    "trainer.matmul_precision": ("medium", {}),
    "trainer.max_epochs": ("3", {}),
    "trainer.max_steps": ("7", {}),
    "trainer.accumulate_grad_batches": ("2", {}),
    "trainer.max_device_batch": ("4", {}),
    "trainer.gradient_clip_val": ("1.0", {}),
    "trainer.gradient_clip_algorithm": ("value", {"trainer.gradient_clip_val": "1.0"}),
    "trainer.sync_batchnorm": ("true", {"trainer.strategy": "ddp"}),
    "trainer.compress_gradients": ("true", {"trainer.strategy": "ddp"}),
    "trainer.timeout_seconds": ("400", {"trainer.strategy": "ddp"}),
    "trainer.deterministic": ("true", {}),
    "trainer.benchmark": ("true", {}),
    "trainer.limit_train_batches": ("2", {}),
    "trainer.limit_val_batches": ("2", {}),
    "trainer.check_val_every_n_epoch": ("2", {}),
    "trainer.val_check_interval": ("4", {}),
    "trainer.skip_nonfinite_steps": ("3", {}),
    "trainer.log_every_n_steps": ("7", {}),
    "trainer.enable_progress_bar": ("false", {}),
    "run.folder": ("elsewhere", {}),
    "run.name": ("named", {}),
    "run.save_every_steps": ("3", {}),
    "run.save_every_minutes": ("0.5", {}),
    "run.rank_timeout_seconds": ("5", {}),
    "run.stall_seconds": ("600", {}),
    "run.tensorboard": ("false", {}),
    "run.wandb": ("project", {}),
}
FAULTS = ("data.cache_dir", "data.cache_gb", "data.retry_seconds", "data.max_corrupt", "data.val_corrupt")
REFUSED = ("data.decode",)  # a GPU
"""Keys whose effect here is a refusal: what they ask for needs another machine. Of the others none may be refused."""
OBSERVERS: dict[str, Callable[..., Any]] = {
    "data.revision": of_hub,
    "data.train_images": of_expectations,
    "data.val_images": of_expectations,
    "model": of_network,
    "optim": of_optimiser,
    "data": of_data,
    "seed": of_data,
}


def test_the_list_is_complete() -> None:
    assert set(CHANGES) == {key.name for key in schema()}


@pytest.mark.usefixtures("wandb")
@pytest.mark.parametrize("key", CHANGES)
def test_every_key_changes_something(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if key in FAULTS:
        monkeypatch.setattr(stream, "MEMORY_BYTES", 0)  # as if the shipped images were too many to hold
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    other = str(write_other(tmp_path / "other"))
    weights = str(write_weights(tmp_path / "weights", load_recipe(path)))
    section = key.partition(".")[0]

    def observed(overrides: dict[str, str]) -> Any:
        recipe = load_recipe(
            path, {name: text.format(other=other, weights=weights) for name, text in overrides.items()}
        )
        if key in OBSERVERS or (section in OBSERVERS and key not in FAULTS):
            return OBSERVERS.get(key, OBSERVERS.get(section))(recipe)
        observer = {"trainer": of_trainer, "run": of_run, "data": of_faults}[section]
        return observer(recipe, tmp_path / "run")

    value, needed = CHANGES[key]
    needed = {name: text for name, text in needed.items() if name != "optim.decay_rate"}
    before = observed(needed)
    if key in REFUSED and not torch.cuda.is_available():
        with pytest.raises((RecipeError, DataError), match=key):
            observed({**needed, key: value})
    else:
        assert repr(before) != repr(observed({**needed, key: value}))


@pytest.mark.usefixtures("wandb")
def test_wandb_gets_project_name_and_folder(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    folder = tmp_path / "runs/mine/2026-01-01_00-00-00"
    made = build_loggers(load_recipe(path, {"run.wandb": "project", "run.name": "mine"}), folder)
    (fake,) = [logger for logger in made if isinstance(logger, FakeWandb)]
    assert fake.given == {"project": "project", "name": "mine/2026-01-01_00-00-00", "save_dir": folder}
