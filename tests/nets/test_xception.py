"""Xception against the paper's numbers, Keras' own network and its own claims."""

import inspect
from dataclasses import fields

import torch

from xception_pl.nets.config import ModelConfig
from xception_pl.nets.xception import Xception


def test_defaults_are_those_of_the_recipe() -> None:
    recipe = {field.name: field.default for field in fields(ModelConfig)}
    for other in ("name", "channels_last", "compile"):
        del recipe[other]
    assert {name: p.default for name, p in inspect.signature(Xception).parameters.items()} == recipe


def test_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        network = Xception()
    assert sum(p.numel() for p in network.parameters()) == 22_855_952
