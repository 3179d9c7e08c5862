"""The optimiser's settings are checked together, in one sentence each."""

import subprocess
import sys
from dataclasses import fields
from math import inf, nan
from typing import Any

import pytest

from xception_pl.optim.config import OptimConfig, check


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "name": "rmsprop",
            "lr": 0.001,
            "decay_rate": 0.9,
            "decay_every_epochs": 0.0,
            "decay_every_samples": 3_000_000,
        },
        {"name": "rmsprop", "rho": 0.95, "eps": 1.0e-3},
        {"nesterov": True},
        {"schedule": "cosine", "final_lr": 1.0e-5, "warmup_epochs": 5.0, "label_smoothing": 0.1},
        {"schedule": "constant", "l2": 0.0, "momentum": 0.0, "ema_decay": 0.0},
        {"loss": "sigmoid"},
        {"l2": 0.0, "l2_sense": "keras"},
    ],
)
def test_sound_settings_pass(settings: dict[str, Any]) -> None:
    assert check(OptimConfig(**settings)) == []


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"lr": 0.0}, ["lr"]),
        ({"lr": nan}, ["lr"]),
        ({"lr": inf}, ["lr"]),
        ({"momentum": 1.0}, ["momentum"]),
        ({"momentum": -0.1}, ["momentum"]),
        ({"name": "rmsprop", "rho": 1.0}, ["rho"]),
        ({"name": "rmsprop", "eps": 0.0}, ["eps"]),
        ({"l2": -1.0e-5}, ["l2"]),
        ({"decay_rate": 0.0}, ["decay_rate"]),
        ({"decay_rate": 1.1}, ["decay_rate"]),
        ({"decay_every_epochs": -2.0}, ["decay_every_epochs"]),
        ({"decay_every_epochs": 0.0, "decay_every_samples": -3}, ["decay_every_samples"]),
        ({"warmup_epochs": -1.0}, ["warmup_epochs"]),
        ({"schedule": "cosine", "final_lr": -1.0}, ["final_lr"]),
        ({"label_smoothing": 1.0}, ["label_smoothing"]),
        ({"ema_decay": 1.0}, ["ema_decay"]),
        ({"ema_decay": nan}, ["ema_decay"]),
        ({"decay_every_samples": 3_000_000}, ["decay_every_epochs", "decay_every_samples"]),
        ({"decay_every_epochs": 0.0}, ["decay_every_epochs", "decay_every_samples"]),
        ({"rho": 0.5}, ["rho", "name"]),
        ({"eps": 0.5}, ["eps", "name"]),
        ({"name": "rmsprop", "nesterov": True}, ["nesterov", "name"]),
        ({"nesterov": True, "momentum": 0.0}, ["nesterov", "momentum"]),
        ({"schedule": "cosine", "decay_rate": 0.9}, ["decay_rate", "schedule"]),
        ({"schedule": "constant", "decay_every_epochs": 0.0}, ["decay_every_epochs", "schedule"]),
        ({"schedule": "constant", "decay_every_samples": 3}, ["decay_every_samples", "schedule"]),
        ({"final_lr": 1.0e-5}, ["final_lr", "schedule"]),
        ({"schedule": "cosine", "final_lr": 0.1}, ["final_lr", "lr"]),
        ({"loss": "sigmoid", "label_smoothing": 0.1}, ["label_smoothing", "loss"]),
    ],
)
def test_each_mistake_is_one_sentence_that_names_its_keys(settings: dict[str, Any], keys: list[str]) -> None:
    (sentence,) = check(OptimConfig(**settings))
    assert all(f"optim.{key}" in sentence for key in keys)
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_all_mistakes_come_at_once() -> None:
    assert len(check(OptimConfig(lr=-1.0, momentum=2.0, name="rmsprop", nesterov=True, decay_every_epochs=0.0))) == 4


def test_defaults_are_the_papers_for_imagenet() -> None:
    """Section 4.2, and TF-Slim's rho and eps."""
    defaults = {field.name: field.default for field in fields(OptimConfig)}
    paper = {"name": "sgd", "lr": 0.045, "momentum": 0.9, "decay_rate": 0.94, "decay_every_epochs": 2.0, "l2": 1e-5}
    assert defaults | paper | {"rho": 0.9, "eps": 1.0} == defaults


@pytest.mark.parametrize(
    ("modules", "unneeded"),
    [
        (["config", "schedules"], ["torch"]),  # a recipe is checked and planned before torch is imported
        (["create", "averaging", "losses"], ["lightning", "datasets", "jsonargparse", "torchmetrics", "timm"]),
    ],
)
def test_imports_stay_small(modules: list[str], unneeded: list[str]) -> None:
    imports = ", ".join(f"xception_pl.optim.{module}" for module in modules)
    code = f"import sys, {imports}; print([name for name in {unneeded} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"
