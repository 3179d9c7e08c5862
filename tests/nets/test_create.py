"""Networks by name: ours with every option, timm's with those that it shares, and a sentence for what cannot be."""

import inspect
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import timm
import torch
from timm.layers import ConvNormAct
from timm.models.inception_v3 import InceptionA, InceptionB, InceptionC
from torch import nn

from xception_pl.nets.config import ModelConfig
from xception_pl.nets.create import XCEPTION_ONLY, create_network
from xception_pl.nets.xception import Xception


def on_meta(config: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        return create_network(config)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


CHANGED = {
    "num_classes": 7,
    "in_chans": 1,
    "dropout": 0.25,
    "width": 0.5,
    "channel_multiple": 16,
    "middle_blocks": 2,
    "residual": False,
    "intermediate_activation": "elu",
    "segments": 4,
    "fc_units": (64, 32),
    "output_stride": 16,
    "grad_checkpointing": True,
    "numerics": "torch",
}


def test_every_option_reaches_xception() -> None:
    of_any_network = {"name", "channels_last", "compile", "bn_momentum", "kernels"}
    of_training = {"weights", "freeze", "freeze_statistics"}
    options = {f.name for f in fields(ModelConfig)} - of_any_network - of_training
    assert set(CHANGED) == options
    for key, value in CHANGED.items():
        direct = {key: value}
        with torch.device("meta"):
            expected = Xception(**direct)  # type: ignore[arg-type]
        network = on_meta(replace(ModelConfig(), **direct))  # type: ignore[arg-type]
        assert repr(network) == repr(expected)
        assert network.feature_info == expected.feature_info
        different = repr(network) != repr(on_meta(ModelConfig()))
        assert different or network.grad_checkpointing or network.feature_info[-1]["reduction"] == 16, key


@pytest.mark.parametrize(("name", "own"), [("xception", 0.01), ("resnet10t", 0.1)])
def test_batch_norms_momentum_is_the_networks_own_unless_given(name: str, own: float) -> None:
    for given, expected in ((None, own), (0.2, 0.2)):
        network = on_meta(ModelConfig(name=name, bn_momentum=given))
        assert {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {expected}


@pytest.mark.parametrize(
    ("name", "count"), [("resnet152", 60_192_808), ("vgg16", 138_357_544), ("inception_v3", 23_834_568)]
)
def test_the_other_rows_of_table_1(name: str, count: int) -> None:
    network = on_meta(ModelConfig(name=name))
    assert parameters(network) == count
    assert not [n for n, _ in network.named_modules() if "aux" in n.lower()]


def test_the_papers_count_of_inception_v3() -> None:
    """Table 3's 23,626,728 is the network of Chollet's first public Keras code; timm's has 207,840 parameters more.

    In that code (fchollet/deep-learning-models, inception_v3.py, 2016) the second and third module repeat the first:
    32 channels after pooling, not 64, so that the next layers read 256 and 736 channels, not 288 and 768. The last
    17 × 17 module begins its double tower with 160 channels, not 192. Every convolution has a bias beside its batch
    norm.
    """
    network = on_meta(ModelConfig(name="inception_v3"))
    with torch.device("meta"):
        network.Mixed_5c = InceptionA(256, pool_features=32)
        network.Mixed_5d = InceptionA(256, pool_features=32)
        network.Mixed_6a = InceptionB(256)
        network.Mixed_6b = InceptionC(736, channels_7x7=128)
        network.Mixed_6e.branch7x7dbl_1 = ConvNormAct(768, 160, kernel_size=1)
        network.Mixed_6e.branch7x7dbl_2 = ConvNormAct(160, 192, kernel_size=(7, 1))
    biases = sum(module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d))
    assert parameters(network) + biases == 23_626_728


def test_options_reach_a_timm_network() -> None:
    network = create_network(
        ModelConfig(name="resnet18", num_classes=7, in_chans=1, dropout=0.25, grad_checkpointing=True)
    )
    assert network(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    assert network.drop_rate == 0.25
    assert network.grad_checkpointing


def test_an_unknown_name_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"^network 'xeption' is unknown: did you mean xception"):
        create_network(ModelConfig(name="xeption"))
    with pytest.raises(ValueError, match=r"^network 'inceptionv3' is unknown: did you mean inception_v3"):
        create_network(ModelConfig(name="inceptionv3"))
    with pytest.raises(
        ValueError, match=r"^network '???' is unknown: use xception or the name of a timm model$".replace("?", r"\?")
    ):
        create_network(ModelConfig(name="???"))


def test_xceptions_options_are_refused_on_another_network() -> None:
    with pytest.raises(ValueError, match=r"^width, segments: only xception has this, not resnet18"):
        create_network(ModelConfig(name="resnet18", width=0.5, segments=1))
    for key in XCEPTION_ONLY:
        with pytest.raises(ValueError, match=f"^{key}: only xception"):
            create_network(replace(ModelConfig(name="resnet18"), **{key: CHANGED[key]}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 96), ("resnet18", 64), ("vgg11", 64)])
def test_fully_connected_layers_before_a_timm_networks_logistic_layer(name: str, size: int) -> None:
    """As in Xception: linear with bias, ReLU, and one dropout before the last layer."""
    with torch.device("meta"):
        plain = create_network(ModelConfig(name=name, num_classes=7))
        network = create_network(ModelConfig(name=name, num_classes=7, fc_units=(48, 32), dropout=0.25))
    features = plain.get_classifier().in_features
    added = features * 48 + 48 + 48 * 32 + 32 + 32 * 7 + 7
    assert parameters(network) == parameters(plain) - (features * 7 + 7) + added
    assert network.train()(torch.empty(2, 3, size, size, device="meta")).shape == (2, 7)
    head = network.get_classifier()
    kinds = [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert [type(layer) for layer in head] == kinds
    assert head[4].p == 0.25
    assert {module.p for module in network.modules() if isinstance(module, nn.Dropout) and module is not head[4]} <= {0}
    assert getattr(network, "drop_rate", 0.0) == 0


def test_fully_connected_layers_start_as_kerass() -> None:
    head = create_network(ModelConfig(name="resnet10t", num_classes=7, fc_units=(48,))).get_classifier()
    limit = (6 / (512 + 48)) ** 0.5
    assert 0.99 * limit < head[0].weight.abs().max() <= limit
    assert not head[0].bias.any()


def test_fully_connected_layers_that_cannot_be() -> None:
    for name in ("dpn68", "levit_128s"):  # a convolution, and two layers
        with pytest.raises(ValueError, match=f"^fc_units: {name} does not end in one linear layer"):
            on_meta(ModelConfig(name=name, fc_units=(8,)))
    with pytest.raises(ValueError, match=r"^fc_units=\(8, 0\) has a layer without units"):
        create_network(ModelConfig(name="resnet10t", fc_units=(8, 0)))


def test_what_timm_cannot_do_is_one_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"^timm cannot build legacy_xception with these options: gradient checkpointing"
    ):
        create_network(ModelConfig(name="legacy_xception", grad_checkpointing=True))


def test_options_only_of_xception_say_so_in_the_recipe() -> None:
    source = inspect.getsource(ModelConfig)
    for key in XCEPTION_ONLY:
        assert "(xception only)" in source.split(f"    {key}: ")[1].split('"""')[1]


def test_xception_needs_neither_timm_nor_lightning_nor_datasets() -> None:
    code = (
        "import sys; from xception_pl.nets.config import ModelConfig; assert 'torch' not in sys.modules;"
        "from xception_pl.nets.create import create_network; create_network(ModelConfig(width=0.1));"
        "print([m for m in ('timm', 'lightning', 'datasets', 'jsonargparse') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_names_go_to_timm_unchanged() -> None:
    assert timm.is_model("inception_v3")
    assert type(on_meta(ModelConfig(name="legacy_xception"))).__module__ == "timm.models.xception"
