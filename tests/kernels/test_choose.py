"""Which path a network takes, and the sentence that says why."""

from pathlib import Path

import pytest
import timm
import torch

from xception_pl.build import choose_kernels
from xception_pl.kernels import choose
from xception_pl.kernels.choose import use_kernels
from xception_pl.nets.xception import Xception
from xception_pl.recipe import RecipeError, load_recipe

CPU = torch.device("cpu")


class OfTest:
    """Stands where a device's fused path does."""

    unavailable_because: str | None = None
    unproven_because: str | None = None

    def unavailable(self, network: Xception, device: torch.device) -> str | None:
        return self.unavailable_because

    def unproven(self, network: Xception, device: torch.device) -> str | None:
        return self.unproven_because

    def fuse(self, network: Xception) -> str:
        network.fused = True  # type: ignore[assignment]
        return "kernels of a test"


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> OfTest:
    made = OfTest()
    monkeypatch.setattr(choose, "import_module", lambda name: made)
    monkeypatch.setitem(choose.PATHS, "cpu", "of.the.test")
    return made


def small() -> Xception:
    return Xception(2, width=0.125, middle_blocks=0)


def test_torch_leaves_the_network_alone(path: OfTest) -> None:
    network = small()
    assert use_kernels(network, "torch", CPU) == "torch: as model.kernels says"
    assert not hasattr(network, "fused")


@pytest.mark.parametrize("kernels", ["auto", "fused"])
def test_the_fused_path_is_taken_where_it_can_be(path: OfTest, kernels: choose.Kernels) -> None:
    network = small()
    assert use_kernels(network, kernels, CPU) == "fused: kernels of a test"
    assert network.fused


def test_auto_leaves_what_nothing_shows_to_be_faster(path: OfTest) -> None:
    path.unproven_because = "not timed here"
    assert use_kernels(small(), "auto", CPU) == "torch: not timed here"
    assert use_kernels(small(), "fused", CPU) == "fused: kernels of a test"


def test_what_is_impossible_is_refused_or_left(path: OfTest) -> None:
    path.unavailable_because = "no compiler was found"
    assert use_kernels(small(), "auto", CPU) == "torch: no compiler was found"
    with pytest.raises(ValueError, match=r"^model.kernels fused is not possible here: no compiler was found; use auto"):
        use_kernels(small(), "fused", CPU)


def test_other_networks_and_devices_stay_on_torch() -> None:
    other = timm.create_model("resnet10t", num_classes=2)
    assert use_kernels(other, "auto", CPU) == "torch: only xception has fused kernels, not ResNet"
    assert use_kernels(small(), "auto", torch.device("mps")) == "torch: there are no fused kernels for mps"
    checkpointed = small()
    checkpointed.set_grad_checkpointing()
    with pytest.raises(ValueError, match="grad_checkpointing recomputes the plain layers"):
        use_kernels(checkpointed, "fused", CPU)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "model: {compile: true, kernels: fused}",
            "model.kernels fused does not go with model.compile true: torch.compile cannot see into the fused kernels.",
        ),
        (
            "model: {name: resnet10t, kernels: fused}",
            "model.kernels fused does not go with model.name resnet10t: other networks have no fused kernels.",
        ),
        (
            "model: {kernels: fused}\ntrainer: {precision: 64-true}",
            "model.kernels fused does not go with trainer.precision 64-true: fused kernels have no float64.",
        ),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(override: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(override + "\ndata: {source: sample, val_split: test}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, {})
    assert sentence in caught.value.problems


def test_auto_keeps_what_the_recipe_compiles(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {compile: true}\ndata: {source: sample, val_split: test}")
    said = choose_kernels(load_recipe(path, {}), small(), "cpu")
    assert said == "torch: model.compile compiles the plain layers"
