"""`bench train` and `bench infer`: start each contender, check it against float64, measure all in turns."""

import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from unittest.mock import patch

import torch

from xception_pl.bench.ceiling import COPY, PRODUCT, Ceiling, Copy, MatrixProduct
from xception_pl.bench.check import Outcome, errors, exact, verdict
from xception_pl.bench.contender import Contender, Runner, TorchTraining
from xception_pl.bench.keras_peer import KerasRunner
from xception_pl.bench.memory import held, step_memory
from xception_pl.bench.options import REFERENCE, Options, choose
from xception_pl.bench.ours import OWNER, ours
from xception_pl.bench.peers import peers
from xception_pl.bench.task import Task, machine, make_task
from xception_pl.bench.timing import Spread, alternate, ratios
from xception_pl.nets.traffic import WAYS, Way

PACKAGES = ("torch", "timm", "keras", "tensorflow", "onnxruntime", "openvino")


@dataclass(kw_only=True)
class Row:
    """What one contender did.

    Args:
        name: Of the contender.
        way: How often it passes over memory.
        problem: Why it was not measured; None where it was.
        first_seconds: From building it to its first result: conversion and compilation, with no cache filled before.
        error: Relative error of the logits, or the median of those of loss and gradients.
        seconds: A step's, one number a round.
        rate: Images a second.
        ratio: Times the reference's rate, round by round.
        of_product: Share of what the matrix product's rate allows, round by round.
        of_ceiling: Share of what matrix product and copy allow its own passes over memory.
        bound: What most of that ceiling's time goes to, memory or arithmetic.
        memory: Peak bytes of a step, with what it holds between steps: weights, gradients, momentum, its own copies.
        saved: Bytes kept for the backward pass, an image.
    """

    name: str
    way: Way
    problem: str | None = None
    first_seconds: float | None = None
    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    rate: Spread | None = None
    ratio: Spread | None = None
    of_product: Spread | None = None
    of_ceiling: Spread | None = None
    bound: str | None = None
    memory: int | None = None
    saved: float | None = None


@dataclass(kw_only=True)
class Limit:
    """What the machine allows one way of computing: bytes an image, images a second, share of time bound by memory."""

    way: Way
    bytes: float
    rate: float
    memory_share: float


@dataclass(kw_only=True)
class Result:
    """Everything that is reported."""

    what: str
    command: str
    batch: int
    size: int
    precision: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    reference: str | None
    product_flops: Spread
    copy_bytes: Spread
    operations: int
    product_limit: float
    limits: list[Limit]
    rows: list[Row]
    skipped: dict[str, str]

    @property
    def failed(self) -> bool:
        """Whether one of ours gave wrong outputs, or none."""
        return any(row.problem is not None for row in self.rows if row.name.startswith(OWNER))


def compare(options: Options, *, training: bool) -> Result:
    """Runs the whole comparison.

    Raises:
        ValueError: a name is nobody's, or a contender that was asked for by name cannot take the task.
    """
    chosen, named = choose(options, ours(), peers())
    if not chosen:
        raise ValueError("nobody is left to measure; name some with --peers or --modes.")
    if options.reference is not None and options.reference not in [contender.name for contender in chosen]:
        raise ValueError(
            f"--reference {options.reference} is not measured; choose from {', '.join(c.name for c in chosen)}."
        )
    task = make_task(
        training=training,
        device=options.device,
        precision=options.precision,  # type: ignore[arg-type]
        batch=options.batch,
        size=options.size,
    )
    skipped = {contender.name: reason for contender in chosen if (reason := contender.unfit(task)) is not None}
    for name, reason in skipped.items():
        if name in named or name == options.reference:
            raise ValueError(f"{name} cannot be measured: {reason}.")
    fit = [contender for contender in chosen if contender.name not in skipped]
    if not fit:
        raise ValueError(f"nobody is left to measure: {'; '.join(f'{name}: {why}' for name, why in skipped.items())}.")
    if options.precision == "tf32":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    else:
        torch.backends.cudnn.allow_tf32 = False  # its default is True, which float32 is not
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": cache}):
        rows, runners = _started(fit, task)
        return _measured(options, task, rows, runners, skipped)


def _started(contenders: list[Contender], task: Task) -> tuple[list[Row], dict[str, Runner]]:
    """Each contender's first result, checked; the runners are those that passed."""
    say("reference in float64 …")
    reference = exact(task)
    plain = None
    if task.precision != "fp32":  # what this precision costs the plain network
        outcome = next(contender for contender in ours() if contender.name == f"{OWNER}:nchw").start(task).outcome()
        plain = errors(outcome, reference)
    rows, runners = [], {}
    for contender in contenders:
        say(f"{contender.name}: first result …")
        row = Row(name=contender.name, way=contender.way)
        before, start = held(task.device), time.perf_counter()
        try:
            runner = contender.start(task)
            outcome = runner.outcome()
        except Exception as error:  # a contender that fails is a line of the table, not the end of the others
            row.problem = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            row.first_seconds = time.perf_counter() - start
            row.memory = _memory(runner, task, before)
            _check(row, outcome, reference, plain)
            if row.problem is None:
                runners[contender.name] = runner
        rows.append(row)
    return rows, runners


def _memory(runner: Runner, task: Task, before: int | None) -> int | None:
    """Bytes of a step and of what the contender holds; None where it computes in another process."""
    if before is None or isinstance(runner, KerasRunner):
        return None
    runner.turn(1)  # some allocate at the second step
    after, step = held(task.device), step_memory(lambda: runner.turn(1), task.device)
    return None if after is None or step is None else after - before + step


def _check(row: Row, outcome: Outcome, reference: Outcome, plain: dict[str, float] | None) -> None:
    try:
        row.error, wrong = verdict(errors(outcome, reference), plain)
    except ValueError as error:
        wrong = str(error)
    if wrong is not None:
        row.problem = f"disqualified: {wrong}"


def _measured(
    options: Options, task: Task, rows: list[Row], runners: dict[str, Runner], skipped: dict[str, str]
) -> Result:
    say(f"{len(runners)} contenders in turns …")
    product, copy, ceiling = MatrixProduct(task), Copy(task), Ceiling.of(task)
    turns = {name: runner.turn for name, runner in runners.items()} | {PRODUCT: product.turn, COPY: copy.turn}
    seconds = alternate(turns, rounds=options.rounds, budget=options.seconds)
    rates = [product.operations / taken for taken in seconds[PRODUCT]]
    bandwidths = [copy.bytes / taken for taken in seconds[COPY]]
    flops, bandwidth = Spread.of(rates), Spread.of(bandwidths)
    names = [row.name for row in rows if row.problem is None]
    reference = options.reference or (REFERENCE if REFERENCE in names else next(iter(names), None))
    for row in rows:
        if row.problem is not None:
            continue
        row.seconds = seconds[row.name]
        row.rate = Spread.of([task.batch / taken for taken in row.seconds])
        if reference in runners:
            row.ratio = ratios(row.seconds, seconds[reference])
        images = [taken / task.batch for taken in row.seconds]
        row.of_product = Spread.of([ceiling.operations / f / taken for f, taken in zip(rates, images, strict=True)])
        row.of_ceiling = Spread.of(
            [
                ceiling.seconds(row.way, rate=f, bandwidth=b) / taken
                for f, b, taken in zip(rates, bandwidths, images, strict=True)
            ]
        )
        at = {"rate": flops.median, "bandwidth": bandwidth.median}
        row.bound = "memory" if ceiling.memory_share(row.way, **at) > 0.5 else "arithmetic"
        runner = runners[row.name]
        if isinstance(runner, TorchTraining):
            row.saved = runner.saved_bytes() / task.batch
    return Result(
        what="train" if task.training else "infer",
        command=f"python -m xception_pl.bench {' '.join(sys.argv[1:])}",
        batch=task.batch,
        size=options.size,
        precision=task.precision,
        machine=machine(task),
        versions=_versions(),
        reference=reference if reference in runners else None,
        product_flops=flops,
        copy_bytes=bandwidth,
        operations=ceiling.operations,
        product_limit=flops.median / ceiling.operations,
        limits=[
            Limit(
                way=way,
                bytes=ceiling.bytes(way),
                rate=1 / ceiling.seconds(way, rate=flops.median, bandwidth=bandwidth.median),
                memory_share=ceiling.memory_share(way, rate=flops.median, bandwidth=bandwidth.median),
            )
            for way in WAYS
        ],
        rows=rows,
        skipped=skipped,
    )


def _versions() -> dict[str, str]:
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def say(text: str) -> None:
    """Progress, on standard error: the table alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)
