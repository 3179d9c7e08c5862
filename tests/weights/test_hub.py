"""Repositories of weights, on a hub of this machine: fetched, pushed, read by timm."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from tests.loopback_hub import LoopbackHub, status
from tests.weights.conftest import SMALL, outputs, randomise, smooth_images
from tests.weights.test_load import NAMES, assert_same_weights
from xception_pl import PretrainedXception, Xception, load_network
from xception_pl.nets.preprocessing import Preprocessing
from xception_pl.weights.hub import as_hub_id, write_hub_folder

REPO = "someone/xception-small"
RESULTS = {"images": 1000.0, "top1": 0.88512, "loss": 0.5, "data": "split 'test' of garments"}


@pytest.fixture
def named(small: Xception) -> Xception:
    small.class_names = NAMES
    small.preprocessing = Preprocessing(image_size=96, eval_crop="resize")
    return small


@pytest.fixture
def hub(tmp_path: Path, named: Xception, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    folder = tmp_path / "repository"
    write_hub_folder(named, folder)
    with LoopbackHub(folder, REPO, kind="model") as hub:
        hub.attract(monkeypatch, tmp_path / "cache")
        yield hub


def assert_equal(network: Xception, named: Xception) -> None:
    assert_same_weights(network, named)
    assert torch.equal(outputs(network, smooth_images(96)), outputs(named, smooth_images(96)))
    assert (network.class_names, network.preprocessing) == (NAMES, named.preprocessing)


def test_an_id_gives_the_network(hub: LoopbackHub, named: Xception) -> None:
    for source in (REPO, f"{REPO}@main", f"hf-hub:{REPO}"):
        assert_equal(load_network(source), named)
    assert hub.reads == {"model.safetensors": 1}  # the second and third come from the cache


def test_a_folder_gives_the_network(hub: LoopbackHub, named: Xception) -> None:
    assert_equal(load_network(hub.folder), named)


def test_a_repository_with_old_weights_only(hub: LoopbackHub, named: Xception) -> None:
    (hub.folder / "model.safetensors").unlink()
    torch.save(named.state_dict(), hub.folder / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="no description"):
        assert_same_weights(load_network(REPO), named)
    (hub.folder / "pytorch_model.bin").rename(hub.folder / "other.bin")
    hub.commit = "b" * 40  # the cache has what the last one held
    with pytest.raises(ValueError, match=r"has no model.safetensors or pytorch_model.bin\.$"):
        load_network(REPO)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "someone/else",
            r"^there is no file someone/else, and no repository of the hub of this name, or it is private",
        ),
        (f"{REPO}@v9", "has no revision v9"),
        ("some where/else", "^there is no file some where/else, and no repository of the hub is called so"),
        ("nothing.pth", "^there is no file nothing.pth"),
        ("a..b/c--d", "the hub takes no such name"),
    ],
)
def test_what_is_not_there(hub: LoopbackHub, source: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_network(source)


def test_gated_failing_and_absent_hubs(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its tries
    hub.token = "secret"
    with pytest.raises(ValueError, match=f"{REPO} is gated: accept its terms"):
        load_network(REPO)
    hub.token = None
    hub.faults.append(status(500))
    with pytest.raises(ValueError, match=r"hub refuses .* with status 500"):
        load_network(REPO)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    with pytest.raises(ValueError, match=r"hub cannot be reached|hub does not answer"):
        load_network(REPO)


def test_what_is_an_id() -> None:
    assert as_hub_id("timm/legacy_xception.tf_in1k") == ("timm/legacy_xception.tf_in1k", None)
    assert as_hub_id("hf_hub:a/b@v1.0") == ("a/b", "v1.0")
    for text in ("a", "a/b/c", "/a/b", "../b", "./b", "a/b@", ""):
        assert as_hub_id(text) is None


def test_the_mixins_methods(hub: LoopbackHub, named: Xception, tmp_path: Path) -> None:
    network = PretrainedXception.from_pretrained(REPO)
    assert isinstance(network, PretrainedXception)
    assert_equal(network, named)
    assert not network.training
    assert network.predict(smooth_images(96)).shape == (2, 5)
    with torch.no_grad():
        network.fc.weight.add_(1)
    network.save_pretrained(tmp_path / "saved")
    assert_equal(PretrainedXception.from_pretrained(tmp_path / "saved"), network)
    network.push_to_hub(REPO, token="mine")
    assert hub.seen_tokens == {"mine"}
    assert_equal(load_network(hub.folder), network)
    with pytest.warns(UserWarning, match="new one of 3"):
        assert PretrainedXception.from_pretrained(REPO, num_classes=3).fc.out_features == 3


def test_a_new_network_can_be_saved(tmp_path: Path) -> None:
    options = {
        "segments": 4,
        "residual": False,
        "intermediate_activation": "elu",
        "output_stride": 16,
        "numerics": "torch",
    }
    network = PretrainedXception(3, 1, dropout=0.1, fc_units=(6,), **SMALL | options)
    randomise(network)
    network.save_pretrained(tmp_path / "saved")
    again = load_network(tmp_path / "saved")
    assert again.dropout.p == 0.1
    assert torch.equal(outputs(again, smooth_images(96, 1)), outputs(network, smooth_images(96, 1)))


def test_the_card_has_the_runs_numbers_or_says_that_there_are_none(named: Xception, tmp_path: Path) -> None:
    write_hub_folder(named, tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "Not evaluated." in card
    assert "5 classes: ant, bee, cat, dog, emu." in card
    assert ModelCard.load(tmp_path / "a" / "README.md").data.eval_results is None
    assert load_network(tmp_path / "a").results is None
    write_hub_folder(named, tmp_path / "a", RESULTS)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| top-1 | 88.51% |\n| loss | 0.5000 |\n\nMeasured on 1,000 images of split 'test' of garments." in card
    assert "Not evaluated" not in card
    assert load_network(tmp_path / "a").results == RESULTS
    (found,) = ModelCard.load(tmp_path / "a" / "README.md").data.eval_results or []
    assert (found.metric_type, found.metric_value, found.dataset_name) == ("accuracy", 0.88512, RESULTS["data"])


def test_a_network_of_the_hub_keeps_its_numbers_until_it_is_trained_on(named: Xception, tmp_path: Path) -> None:
    write_hub_folder(named, tmp_path / "a", RESULTS)
    network = PretrainedXception.from_pretrained(tmp_path / "a")
    network.save_pretrained(tmp_path / "b")
    assert "| top-1 | 88.51% |" in (tmp_path / "b" / "README.md").read_text()
    with torch.no_grad():
        network.fc.bias[0] += 1e-3
    network.save_pretrained(tmp_path / "c")
    assert "Not evaluated." in (tmp_path / "c" / "README.md").read_text()
    assert load_network(tmp_path / "c").results is None
    with pytest.warns(UserWarning, match="new one of 3"):
        assert load_network(tmp_path / "a", num_classes=3).results is None


def foreign(folder: Path, state: dict[str, torch.Tensor], config: dict[str, object]) -> Path:
    """A repository as others leave it: names of timm, no description."""
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    return randomise(timm.create_model("legacy_xception", num_classes=3))


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_what_timm_writes_has_class_names_and_preprocessing(
    theirs: torch.nn.Module, tmp_path: Path, quiet: None
) -> None:
    config = {"label_names": ["ant", "bee", "cat"], "pretrained_cfg": {"input_size": [3, 224, 224]}}
    timm.models.save_for_hf(theirs, tmp_path / "timms", model_config=config, safe_serialization=True)
    network = load_network(tmp_path / "timms")
    assert network.class_names == ["ant", "bee", "cat"]
    assert network.loss == "cross_entropy"
    assert network.preprocessing == Preprocessing(image_size=224, eval_crop="timm")


@pytest.mark.parametrize(
    ("config", "names", "loss"),
    [
        ({"id2label": {"0": "ant", "1": "bee", "2": "cat"}}, ["ant", "bee", "cat"], "cross_entropy"),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}, None, "cross_entropy"),
        ({"label_names": {"0": "ant", "2": "cat"}}, ["ant", "1", "cat"], "cross_entropy"),  # timm: with gaps
        ({"pretrained_cfg": {"label_names": ["a", "b", "c"]}}, ["a", "b", "c"], "cross_entropy"),
        ({"id2label": {"0": "x", "1": "y", "2": "z"}, "problem_type": "multi_label_classification"}, ["x", "y", "z"], "sigmoid"),
        ({"id2label": {"zero": "ant"}}, None, "cross_entropy"),
        ({"id2label": {"0": "a", "99999999": "b"}}, None, "cross_entropy"),
        ({"label_names": [1, 2, 3]}, None, "cross_entropy"),
        ({"label_names": "ant"}, None, "cross_entropy"),
        ({"pretrained_cfg": [], "id2label": []}, None, "cross_entropy"),
    ],
)  # fmt: skip
def test_class_names_and_loss_of_foreign_repositories(
    theirs: torch.nn.Module, tmp_path: Path, config: dict[str, object], names: list[str] | None, loss: str, quiet: None
) -> None:
    network = load_network(foreign(tmp_path / "a", theirs.state_dict(), config))
    assert (network.class_names, network.loss) == (names, loss)
    assert network.preprocessing == Preprocessing(eval_crop="timm")


def test_a_foreign_repository_of_the_hub(
    hub: LoopbackHub, theirs: torch.nn.Module, tmp_path: Path, quiet: None
) -> None:
    foreign(hub.folder, theirs.state_dict(), {"id2label": {"0": "ant", "1": "bee", "2": "cat"}})
    assert load_network(REPO).class_names == ["ant", "bee", "cat"]
    assert hub.reads == {"model.safetensors": 1, "config.json": 1}
    assert PretrainedXception.from_pretrained(REPO).class_names == ["ant", "bee", "cat"]


def test_foreign_weights_need_no_configuration(
    hub: LoopbackHub, theirs: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(hub.folder, theirs.state_dict(), {})
    (hub.folder / "config.json").unlink()
    assert load_network(REPO).class_names is None
    for marker in (tmp_path / "cache").rglob(".no_exist/*/config.json"):
        marker.unlink()  # what the client notes of files that are not there
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.warns(UserWarning, match="class names and preprocessing are left out"):
        assert load_network(REPO).num_classes == 3


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"label_names": ["ant"]}, "names 1 classes, and the network has 3 outputs: the names are left out"),
        ({"pretrained_cfg": {"crop_pct": 0.95}}, "was evaluated with crop_pct 0.95, which is none of our crops: timm is taken"),
        ({"pretrained_cfg": {"mean": [0.485, 0.456, 0.406]}}, r"scaled by mean \[0.485, 0.456, 0.406\]: here they are scaled to"),
    ],
)  # fmt: skip
def test_what_does_not_fit_in_a_foreign_configuration_is_said(
    theirs: torch.nn.Module, tmp_path: Path, config: dict[str, object], sentence: str
) -> None:
    folder = foreign(tmp_path / "a", theirs.state_dict(), config)
    with pytest.warns(UserWarning, match=sentence):
        assert load_network(folder).class_names is None


@pytest.mark.parametrize("text", ["{", "[" * 200_000, "[]"])
def test_a_broken_configuration_leaves_the_weights(theirs: torch.nn.Module, tmp_path: Path, text: str) -> None:
    folder = foreign(tmp_path / "a", theirs.state_dict(), {})
    (folder / "config.json").write_text(text)
    with pytest.warns(UserWarning, match=r"config.json cannot be read as a configuration"):
        assert load_network(folder).num_classes == 3


def test_timm_reads_folder_and_repository(hub: LoopbackHub, named: Xception) -> None:
    for name in (f"local-dir:{hub.folder}", f"hf-hub:{REPO}"):
        network = timm.create_model(name, pretrained=True).eval()
        assert torch.equal(outputs(network, smooth_images(96)), outputs(named, smooth_images(96)))
        assert network.pretrained_cfg["label_names"] == NAMES
    config = timm.data.resolve_data_config(model=network)
    assert (config["input_size"], config["crop_pct"], config["crop_mode"]) == ((3, 96, 96), 1.0, "squash")
    assert (config["mean"], config["std"]) == ([0.5] * 3, [0.5] * 3)
    assert json.loads((hub.folder / "config.json").read_text())["architecture"] == "xception_pl"


def test_weights_with_pytorchs_numerics_keep_them_in_timm(tmp_path: Path) -> None:
    network = randomise(Xception(5, numerics="torch", **SMALL))
    write_hub_folder(network, tmp_path)  # type: ignore[arg-type]
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(outputs(again, smooth_images(96)), outputs(network, smooth_images(96)))
