"""A run from its recipe to its final table: prepare, train, report."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, Trainer

from xception_pl.build import (
    build_data,
    build_module,
    build_start,
    build_trainer,
    check_network,
    choose_kernels,
    find_devices,
    find_nodes,
)
from xception_pl.commands import FAILED, Arguments, print_error
from xception_pl.data import native
from xception_pl.data.config import idle_augment
from xception_pl.data.datamodule import ImageNetDataModule
from xception_pl.data.errors import DataError, SourceUnreachable
from xception_pl.durable import CannotWrite
from xception_pl.module import XceptionModule
from xception_pl.recipe import Recipe, RecipeError, check_batch
from xception_pl.run.checkpoints import GivenUp
from xception_pl.run.figures import draw_curves
from xception_pl.run.folder import choose_output, write_description, write_results
from xception_pl.run.guard import NotFinite
from xception_pl.run.interrupt import Interrupted, SignalFlag
from xception_pl.run.launcher import Launcher
from xception_pl.run.log import RunLog
from xception_pl.run.plan import Plan
from xception_pl.run.ranks import Ranks
from xception_pl.run.requeue import requeue
from xception_pl.run.resume import Resumed, load_for_resume
from xception_pl.run.watchdog import Watchdog
from xception_pl.weights.results import of_run
from xception_pl.weights.safetensors import save_weights
from xception_pl.weights.start import Start


@dataclass(kw_only=True)
class Prepared:
    """A run that can start: everything checked, nothing written."""

    plan: Plan
    data: ImageNetDataModule
    module: XceptionModule
    folder: Path
    accelerator: str
    devices: int
    nodes: int
    kernels: str
    start: Start | None = None
    resumed: Resumed | None = None

    @property
    def parameters(self) -> int:
        """Parameters of the network."""
        return sum(parameter.numel() for parameter in self.module.network.parameters())

    def lines(self) -> list[str]:
        """The plan as text."""
        lines = self.plan.lines(
            parameters=self.parameters,
            hardware=f"{self.devices} × {self.accelerator}" + (f" × {self.nodes} nodes" if self.nodes > 1 else ""),
            learning_rate=self.module.learning_rate,
            folder=f"{self.folder}/",
        )
        lines.append(f"kernels   {self.kernels}")
        lines += [f"weights   {self.start.what}"] if self.start is not None else []
        lines += self._frozen()
        if not self.plan.unchecked and self.data.commit is not None:
            lines.append(f"revision  commit {self.data.commit}")
        lines += [f"warning   {sentence}" for sentence in idle_augment(self.plan.recipe.data)]
        try:
            native.load()  # here, once: loader workers find it made
        except native.Unavailable as reason:
            lines.append(f"warning   images are decoded by Pillow, several times slower: {reason}")
        return lines + [f"changed   {line}" for line in (self.resumed.lines() if self.resumed is not None else [])]

    def _frozen(self) -> list[str]:
        """What does not train."""
        model = self.plan.recipe.model
        parts = [f"blocks 1 to {model.freeze}"] if model.freeze else []
        parts += ["the statistics of every batch norm"] if model.freeze_statistics else []
        trained = sum(p.numel() for p in self.module.network.parameters() if p.requires_grad)
        return [f"frozen    {' and '.join(parts)}; {trained:,} parameters train"] if parts else []


@dataclass(frozen=True, kw_only=True)
class _Machine:
    """The devices of the job."""

    accelerator: Literal["cpu", "gpu"]
    devices: int
    nodes: int
    missing: list[str]


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What one rank asked of the source for all."""

    unreachable: list[str]
    class_weights: list[float] | None


def prepare(
    recipe: Recipe,
    *,
    resume: str | None = None,
    into: str | None = None,
    dry_run: bool = False,
    ranks: Ranks | None = None,
) -> Prepared:
    """Asks the machine and the source, and builds what trains; the ranks of a job agree on all of it.

    Raises:
        RecipeError: with a sentence for each thing that makes the run impossible. A dry run only notes the
            devices that are missing here and a source that cannot be reached.
    """
    ranks = ranks or Ranks(None)
    output = ranks.first(lambda: choose_output(recipe, resume, into))
    machine = ranks.decide(lambda: _find_machine(recipe, ranks.launcher, dry_run=dry_run), ValueError)
    data = build_data(recipe, ranks=machine.devices * machine.nodes)
    source = ranks.first(
        lambda: _ask_source(data, dry_run=dry_run), ValueError
    )  # hundreds at once would be turned away
    data.share(ranks.first)
    return ranks.decide(lambda: _build(recipe, machine, data, source, *output), ValueError)


def _find_machine(recipe: Recipe, launcher: Launcher | None, *, dry_run: bool) -> _Machine:
    accelerator, devices, missing = find_devices(recipe.trainer, launcher)
    nodes, alone = find_nodes(recipe.trainer, launcher)
    missing = missing + alone
    problems = check_batch(recipe, devices, nodes) + check_network(recipe) + ([] if dry_run else missing)
    if problems:
        raise RecipeError(problems)
    return _Machine(accelerator=accelerator, devices=devices, nodes=nodes, missing=missing)


def _ask_source(data: ImageNetDataModule, *, dry_run: bool) -> _Source:
    try:
        data.prepare()
        return _Source(unreachable=[], class_weights=data.class_weights())
    except SourceUnreachable as error:
        if not dry_run:
            raise
        return _Source(unreachable=[str(error)], class_weights=None)


def _build(
    recipe: Recipe, machine: _Machine, data: ImageNetDataModule, source: _Source, folder: Path, checkpoint: Path | None
) -> Prepared:
    known = not source.unreachable
    plan = Plan(
        recipe=recipe,
        ranks=machine.devices * machine.nodes,
        train_images=data.train_images if known else recipe.data.train_images,
        val_images=data.val_images if known else recipe.data.val_images,
        unchecked=machine.missing + source.unreachable,
    )
    if plan.problems():
        raise RecipeError(plan.problems())
    class_names = list(data.class_names) if known else None
    start = build_start(recipe, class_names) if checkpoint is None else None  # a checkpoint has all weights itself
    module = build_module(
        recipe,
        images_per_epoch=plan.train_images,
        total_steps=plan.total_steps,
        class_names=class_names,
        class_weights=source.class_weights,
        start=start,
    )
    if plan.total_steps is not None and plan.train_images is not None:
        module.learning_rate(plan.total_steps - 1)  # refuses stairs shorter than a step
    return Prepared(
        plan=plan,
        data=data,
        module=module,
        folder=folder,
        accelerator=machine.accelerator,
        devices=machine.devices,
        nodes=machine.nodes,
        kernels=choose_kernels(recipe, module.network, machine.accelerator),
        start=start,
        resumed=None if checkpoint is None else load_for_resume(checkpoint, recipe),
    )


def train(
    prepared: Prepared,
    signals: SignalFlag,
    *,
    command: Arguments,
    ranks: Ranks | None = None,
    callbacks: Sequence[Callback] = (),
) -> int:
    """Trains, evaluates the averaged weights, draws the curves; returns the exit code. `callbacks` look on."""
    recipe, folder, ranks = prepared.plan.recipe, prepared.folder, ranks or Ranks(None)
    ranks.connect("nccl" if prepared.accelerator == "gpu" else "gloo", recipe.trainer.timeout_seconds)
    trainer, log = build_trainer(
        recipe,
        folder,
        accelerator=prepared.accelerator,
        devices=prepared.devices,
        num_nodes=prepared.nodes,
        launcher=ranks.launcher,
        signals=signals,
        callbacks=callbacks,
    )
    if trainer.is_global_zero:
        print("\n".join(prepared.lines()), flush=True)
        write_description(folder, recipe, prepared.resumed)
    code, stopped_by = 0, None
    watchdog = next(found for found in trainer.callbacks if isinstance(found, Watchdog))  # type: ignore[attr-defined]
    checkpoints = watchdog.checkpoints
    watchdog.start(trainer)
    try:
        _fit_and_evaluate(prepared, trainer, log)
    except Interrupted as stop:
        code, stopped_by = stop.exit_code, stop.signal_name
        if trainer.is_global_zero:
            print("\n".join(_stopped(stop, trainer.global_step, command)), flush=True)
    except SystemExit:  # Lightning's answer to KeyboardInterrupt
        print(f"\nSIGINT, twice: stopped at once. {checkpoints.last_good()}", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT  # other ranks see that this one is gone
    except (NotFinite, GivenUp) as error:  # all ranks raise them at the same step
        code = FAILED
        if trainer.is_global_zero:
            print_error(f"{error} {checkpoints.last_good()}")
    except Exception as error:
        if trainer.world_size > 1:
            watchdog.failed(error)
        if not isinstance(error, DataError):
            error.add_note(checkpoints.last_good())
            raise
        code = FAILED
        print_error(f"{error} {checkpoints.last_good()}")
    watchdog.close()
    if trainer.is_global_zero:
        try:
            _write_results(prepared, trainer, log, finished=code == 0)
        except CannotWrite as error:
            code = FAILED
            print_error(error)
        if stopped_by == "SIGUSR1" and (requeued := requeue()) is not None:  # last: it ends this process
            print(requeued, flush=True)
    return code


def _fit_and_evaluate(prepared: Prepared, trainer: Trainer, log: RunLog) -> None:
    checkpoint = None if prepared.resumed is None else prepared.resumed.checkpoint
    # Lightning converts the module after it has loaded the checkpoint: float64 weights would be rounded to float32.
    trainer.strategy.precision_plugin.convert_module(prepared.module)
    trainer.fit(prepared.module, datamodule=prepared.data, ckpt_path=checkpoint, weights_only=True)
    if log.validated_step != trainer.global_step:  # the last epoch was not one of those that are validated
        trainer.validate(prepared.module, datamodule=prepared.data, verbose=False)


def _write_results(prepared: Prepared, trainer: Trainer, log: RunLog, *, finished: bool) -> None:
    """The curves, and for a finished run weights, results and table."""
    folder = prepared.folder
    draw_curves(folder / "metrics.csv", folder / "curves.png", f"{prepared.plan.recipe.run.name}, {folder.name}")
    if finished:
        data = prepared.plan.recipe.data
        results = of_run(log.latest, data.source, data.val_split)
        save_weights(prepared.module, folder / "checkpoints" / "averaged.safetensors", results)
        write_results(folder, {"steps": trainer.global_step, "parameters": prepared.parameters, **log.latest})
        print("\n".join(_results(prepared, log)), flush=True)


def _stopped(stop: Interrupted, step: int, command: Arguments) -> list[str]:
    """What a run that a signal ended says last; under SLURM it is requeued where the signal meant preemption.

    SIGTERM is not: SLURM sends it for scancel too, and requeues by itself where it preempts.
    """
    seconds = f", {stop.seconds:.1f} s after the signal" if stop.seconds is not None else ""
    if stop.lost is not None:
        lines = [f"error: {stop.signal_name}: stopped after step {step}, which is lost: {stop.lost}"]
    elif stop.checkpoint is None:
        return [f"\n{stop.signal_name}: stopped before the first step; there is nothing to save."]
    else:
        lines = [f"\n{stop.signal_name}: stopped after step {step} and saved {stop.checkpoint}{seconds}"]
    if stop.checkpoint is not None:
        lines.append(f"resume with: {command.with_option('resume', str(stop.checkpoint)).line('fit')}")
    return lines


def _results(prepared: Prepared, log: RunLog) -> list[str]:
    """The final table."""
    names = {"val_top1": "top-1", "val_top5": "top-5", "val_map100": "MAP@100", "val_loss": "loss"}
    which = "averaged weights" if prepared.module.average is not None else "weights (averaging is off)"
    lines = ["", f"{which}, {log.latest['val_images']:,.0f} held-out images"]
    for name, label in names.items():
        if name in log.latest:
            value = log.latest[name]
            lines.append(f"  {label:<12}" + (f"{value:.4f}" if name == "val_loss" else f"{value:.2%}"))
    lines += ["", f"written to {prepared.folder}/"]
    what = {
        "curves.png": "loss, accuracy and learning rate",
        "metrics.csv": "every logged step",
        "tensorboard": f"tensorboard --logdir {prepared.plan.recipe.run.folder}",
        "results.json": "the final numbers",
        "recipe.yaml": "the resolved recipe",
        "environment.json": "versions, git commit, hardware",
        "checkpoints/last.ckpt": "resumes the run",
        "checkpoints/best.ckpt": "highest held-out score",
        "checkpoints/averaged.safetensors": "the averaged weights alone",
    }
    return lines + [f"  {name:<34}{text}" for name, text in what.items() if (prepared.folder / name).exists()]
