"""What the paper claims (Chollet, CVPR 2017, arXiv:1610.02357v3): data, each with its table, figure or section."""

from dataclasses import dataclass

XCEPTION = "recipes/table1/xception.yaml"
INCEPTION = "recipes/table1/inception_v3.yaml"
RESNET = "recipes/table1/resnet152.yaml"
VGG = "recipes/table1/vgg16.yaml"
JFT_XCEPTION = "recipes/jft/xception.yaml"
JFT_XCEPTION_FC = "recipes/jft/xception_fc.yaml"
JFT_INCEPTION = "recipes/jft/inception_v3.yaml"
JFT_INCEPTION_FC = "recipes/jft/inception_v3_fc.yaml"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A number that a training run measures."""

    what: str
    source: str
    paper: float
    metric: str
    """Key of a run's results."""
    recipe: str
    digits: int = 3
    """Decimals that the paper prints."""
    scale: float = 1.0
    """The paper's unit in ours: 100 where it prints percent."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Count:
    """A number that is counted in a network."""

    what: str
    source: str
    paper: int
    recipe: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A hyperparameter: the key that holds it, in each of the recipes, and the paper's value."""

    what: str
    source: str
    key: str
    paper: float | str | bool
    """True: on, whatever the value."""
    recipes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A comparison of training curves, without a number."""

    what: str
    source: str
    paper: str
    recipes: tuple[str, ...]
    """Those whose runs are compared, or an ablation's one file, whose stored report holds the comparison."""


_QUOTED = "quoted by the paper from the network's authors"
_PRIVATE = "JFT and FastEval14k are private: another set gives another number"
_K80 = "60 K80 GPUs, one batch a step; ours counts optimiser steps of the recipe's global batch on its own hardware, the median over a run"


def _table1(network: str, recipe: str, top1: float, top5: float, note: str = "") -> tuple[Result, Result]:
    return (
        Result(what=f"{network}, top-1", source="Table 1", paper=top1, metric="val_top1", recipe=recipe, note=note),
        Result(what=f"{network}, top-5", source="Table 1", paper=top5, metric="val_top5", recipe=recipe, note=note),
    )


def _table2(network: str, recipe: str, percent: float) -> Result:
    return Result(
        what=f"{network}, MAP@100 in percent",
        source="Table 2",
        paper=percent,
        metric="val_map100",
        recipe=recipe,
        digits=2,
        scale=100.0,
        note=_PRIVATE,
    )


def _table3(network: str, recipe: str, steps: float) -> Result:
    return Result(
        what=f"{network}, steps a second",
        source="Table 3",
        paper=steps,
        metric="steps_per_second",
        recipe=recipe,
        digits=0,
        note=_K80,
    )


RESULTS = (
    *_table1("VGG-16", VGG, 0.715, 0.901, _QUOTED),
    *_table1("ResNet-152", RESNET, 0.770, 0.933, _QUOTED),
    *_table1("Inception V3", INCEPTION, 0.782, 0.941),
    *_table1("Xception", XCEPTION, 0.790, 0.945),
    _table2("Inception V3, no fully-connected layers", JFT_INCEPTION, 6.36),
    _table2("Inception V3, with fully-connected layers", JFT_INCEPTION_FC, 6.50),
    _table2("Xception, no fully-connected layers", JFT_XCEPTION, 6.70),
    _table2("Xception, with fully-connected layers", JFT_XCEPTION_FC, 6.78),
    _table3("Inception V3", INCEPTION, 31),
    _table3("Xception", XCEPTION, 28),
)

COUNTS = (
    Count(
        what="Inception V3",
        source="Table 3",
        paper=23_626_728,
        recipe=INCEPTION,
        note="the first public Keras code was narrower in three places and had biases (tests/nets/test_create.py)",
    ),
    Count(what="Xception", source="Table 3", paper=22_855_952, recipe=XCEPTION),
    Count(
        what="Xception, 17,000 classes",
        source="Figure 5 and section 4.1, by arithmetic",
        paper=20_806_952 + 2049 * 17_000,
        recipe=JFT_XCEPTION,
    ),
    Count(
        what="Xception, two layers of 4096 units, 17,000 classes",
        source="Figure 5 and section 4.1, by arithmetic",
        paper=20_806_952 + 2049 * 4096 + 4097 * 4096 + 4097 * 17_000,
        recipe=JFT_XCEPTION_FC,
    ),
)

_IMAGENET = (XCEPTION, INCEPTION)
_JFT = (JFT_XCEPTION, JFT_XCEPTION_FC, JFT_INCEPTION, JFT_INCEPTION_FC)


def _set(what: str, source: str, key: str, paper: float | str | bool, *recipes: str) -> Setting:
    return Setting(what=what, source=source, key=key, paper=paper, recipes=recipes)


SETTINGS = (
    _set("ImageNet: optimiser", "section 4.2", "optim.name", "sgd", *_IMAGENET),
    _set("ImageNet: momentum", "section 4.2", "optim.momentum", 0.9, *_IMAGENET),
    _set("ImageNet: initial learning rate", "section 4.2", "optim.lr", 0.045, *_IMAGENET),
    _set("ImageNet: decay of the rate", "section 4.2", "optim.decay_rate", 0.94, *_IMAGENET),
    _set("ImageNet: epochs a decay", "section 4.2", "optim.decay_every_epochs", 2, *_IMAGENET),
    _set("JFT: optimiser", "section 4.2", "optim.name", "rmsprop", *_JFT),
    _set("JFT: momentum", "section 4.2", "optim.momentum", 0.9, *_JFT),
    _set("JFT: initial learning rate", "section 4.2", "optim.lr", 0.001, *_JFT),
    _set("JFT: decay of the rate", "section 4.2", "optim.decay_rate", 0.9, *_JFT),
    _set("JFT: samples a decay", "section 4.2", "optim.decay_every_samples", 3_000_000, *_JFT),
    _set("averaging at inference", "section 4.2", "optim.ema_decay", True, *_IMAGENET, *_JFT),
    _set("L2, Xception", "section 4.3", "optim.l2", 1e-5, XCEPTION, JFT_XCEPTION, JFT_XCEPTION_FC),
    _set("L2, Inception V3", "section 4.3", "optim.l2", 4e-5, INCEPTION, JFT_INCEPTION, JFT_INCEPTION_FC),
    _set("ImageNet: dropout", "section 4.3", "model.dropout", 0.5, *_IMAGENET),
    _set("JFT: dropout", "section 4.3", "model.dropout", 0, *_JFT),
    _set("input size in pixels", "Figure 5", "data.image_size", 299, *_IMAGENET, *_JFT),
    _set("GPUs", "section 4.4", "trainer.devices", 60, *_IMAGENET, *_JFT),
    _set("JFT: iterations", "section 4.5", "trainer.max_steps", 30_000_000, *_JFT),
    _set("JFT: classes", "section 4.1", "model.num_classes", 17_000, *_JFT),
)

WITHOUT_AUXILIARY_TOWER = (*_IMAGENET, *_JFT)
"""Recipes whose networks the paper trained without an auxiliary tower (section 4.3)."""

FIGURES = (
    Figure(
        what="training profiles on ImageNet",
        source="Figure 6",
        paper="Xception against Inception V3",
        recipes=_IMAGENET,
    ),
    Figure(
        what="training profiles on JFT, no fully-connected layers",
        source="Figure 7",
        paper="Xception against Inception V3",
        recipes=(JFT_XCEPTION, JFT_INCEPTION),
    ),
    Figure(
        what="training profiles on JFT, with fully-connected layers",
        source="Figure 8",
        paper="Xception against Inception V3",
        recipes=(JFT_XCEPTION_FC, JFT_INCEPTION_FC),
    ),
    Figure(
        what="residual connections",
        source="Figure 9, section 4.6",
        paper="without them training is slower and ends worse",
        recipes=("recipes/ablations/residual.yaml",),
    ),
    Figure(
        what="activation between depthwise and pointwise convolution",
        source="Figure 10, section 4.7",
        paper="none is faster and ends better than ReLU or ELU",
        recipes=("recipes/ablations/intermediate_activation.yaml",),
    ),
)
