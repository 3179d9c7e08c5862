"""Shared by the benchmark's tests."""

import pytest

from xception_pl.bench.check import Outcome, exact
from xception_pl.bench.task import Task, make_task


@pytest.fixture(scope="session")
def inference() -> Task:
    """At 75 pixels the second pooling reads an even size, the others odd ones."""
    return make_task(training=False, device="cpu", precision="fp32", batch=2, size=75)


@pytest.fixture(scope="session")
def training() -> Task:
    return make_task(training=True, device="cpu", precision="fp32", batch=2, size=71)


@pytest.fixture(scope="session")
def exact_inference(inference: Task) -> Outcome:
    return exact(inference)


@pytest.fixture(scope="session")
def exact_training(training: Task) -> Outcome:
    return exact(training)
