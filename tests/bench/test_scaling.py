"""The model of a step on many GPUs: its bytes against the network, its times against sums by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from xception_pl.bench.scaling import H100, SLOW, Network, all_reduce_seconds, count_network, main, predict, table


def test_the_bytes_are_those_of_the_network() -> None:
    network = count_network()
    assert sum(network.gradient_bytes.values()) == 4 * 22_855_952
    before_entry = network.gradient_bytes["exit"] + network.gradient_bytes["middle"]
    assert before_entry / sum(network.gradient_bytes.values()) == pytest.approx(0.952, abs=5e-4)
    assert sum(count_network(bytes_each=2).gradient_bytes.values()) == 2 * 22_855_952


def test_an_all_reduce_is_a_ring_over_the_slowest_link() -> None:
    assert all_reduce_seconds(H100, 1, 1e9) == 0
    assert all_reduce_seconds(H100, 8, 3e9) == pytest.approx(2 * 7 / 8 * 3e9 / 300e9 + 2 * 1.5 * 5e-6)
    assert all_reduce_seconds(SLOW, 64, 1e9) == pytest.approx(2 * 63 / 64 * 1e9 / 10e9 + 2 * (1.5 + 3) * 5e-6)


def test_what_the_backward_pass_hides_costs_nothing() -> None:
    """Gradients in one bucket of the exit flow are exchanged while the others are computed; those of the entry flow are not."""
    early = Network({"exit": 2**20, "middle": 0, "entry": 0}, 0)
    late = Network({"exit": 0, "middle": 0, "entry": 2**20}, 0)
    assert predict(H100, early, 8, 32).exposed == 0
    assert predict(H100, late, 8, 32).exposed == pytest.approx(all_reduce_seconds(H100, 8, 2**20))
    alone = predict(H100, late, 1, 32)
    assert (alone.exposed, alone.efficiency, alone.images_per_second) == (0, 1, pytest.approx(2400))


def test_slower_links_and_faster_gpus_cost_efficiency() -> None:
    network = count_network()
    whole = predict(H100, network, 64, 32)
    assert predict(SLOW, network, 64, 32).efficiency < whole.efficiency
    assert predict(replace(H100, images_per_second=9600), network, 64, 32).efficiency < whole.efficiency
    assert predict(SLOW, count_network(bytes_each=2), 64, 32).efficiency > predict(SLOW, network, 64, 32).efficiency


def test_the_document_holds_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert table(H100.images_per_second) in printed
    assert table(H100.images_per_second) in Path("docs/scaling.md").read_text(), (
        "run python -m xception_pl.bench scaling"
    )
