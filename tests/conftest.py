"""Shared by all tests: one thread, and the `--slow` switch."""

import os

# Small tensors gain nothing from more, and on a busy machine threads that wait for each other cost twenty times the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported

import pytest
import torch

if not torch.cuda.is_available():
    # The kernels' tests run in Triton's interpreter, which has to be chosen before any test imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def own_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one test in this process must not choose the folder for the processes that a later test starts."""
    monkeypatch.setenv("XCEPTION_PL_OUTPUT", "")  # so that what a run sets is undone
    monkeypatch.delenv("XCEPTION_PL_OUTPUT")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    heavy = [item for item in items if "slow" in item.keywords]
    if config.getoption("--slow"):
        # Files with heavy proofs first: where processes share the files, none is to end alone with a long one.
        first = {item.path for item in heavy}
        items.sort(key=lambda item: item.path not in first)
        return
    for item in heavy:
        item.add_marker(pytest.mark.skip(reason="heavy proof: run with --slow, as .ci/run does"))
