"""Keras' Xception, in a process of its own: a process has one backend, and TensorFlow brings threads of its own."""

import os
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from xception_pl.bench.check import Outcome
from xception_pl.bench.contender import LEARNING_RATE, MOMENTUM
from xception_pl.bench.task import CLASSES, Task


class KerasRunner:
    """`keras.applications.Xception` with the task's weights; it answers one request after the other.

    Raises:
        RuntimeError: what the process failed with, in the call that it answers.
    """

    def __init__(self, task: Task, *, backend: str) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, task, backend, torch.get_num_threads()), daemon=True
        )
        self._process.start()
        theirs.close()
        self._ask("start")

    def outcome(self) -> Outcome:
        found: Outcome = self._ask("outcome")
        return found

    def turn(self, steps: int) -> None:
        self._ask(steps)

    def _ask(self, request: str | int) -> Any:
        try:
            self._connection.send(request)
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError):
            answer = RuntimeError("Keras' process ended")
        if isinstance(answer, RuntimeError):
            raise answer
        return answer


def _serve(connection: Connection, task: Task, backend: str, threads: int) -> None:
    """The process: answers with an outcome, with None when steps are done, or with what went wrong."""
    os.environ |= {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": str(threads)}
    os.environ |= {"TF_NUM_INTRAOP_THREADS": str(threads)}
    torch.set_num_threads(threads)
    model: _Model | None = None
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            if model is None:
                model = _Model(task)
            if request == "outcome":
                connection.send(model.outcome())
            else:
                for _ in range(request if isinstance(request, int) else 0):
                    model.step()
                connection.send(None)
        except Exception as error:  # whatever it is, the parent tells it
            connection.send(RuntimeError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"))


class _Model:
    def __init__(self, task: Task) -> None:
        import keras

        self.task = task
        size = task.images.shape[-1]
        self.model = keras.applications.Xception(
            weights=None, classifier_activation=None, classes=CLASSES, input_shape=(size, size, 3)
        )
        self.images = task.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = task.labels.numpy()
        self._load()
        if task.training:
            self.optimizer = keras.optimizers.SGD(1.0, momentum=MOMENTUM)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            self.model.compile(optimizer=self.optimizer, loss=loss)

    def step(self) -> Any:
        if self.task.training:
            return self.model.train_on_batch(self.images, self.labels)
        return self.model.predict_on_batch(self.images)

    def outcome(self) -> Outcome:
        if not self.task.training:
            return {"logits": torch.from_numpy(self.step().copy())}
        loss = self.step()
        # The first step of SGD with rate 1 subtracts the gradients, momentum or not.
        gradients = {
            name: self.task.weights[name] - _to_torch(variable)
            for name, variable in _named(self.model)
            if variable.trainable
        }
        self._load()
        self.optimizer.learning_rate = LEARNING_RATE
        return {"loss": torch.tensor(float(loss[0] if isinstance(loss, list) else loss)), **gradients}

    def _load(self) -> None:
        for name, variable in _named(self.model):
            variable.assign(_to_keras(self.task.weights[name], tuple(variable.shape), variable.name).numpy())


_TENSORS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def _named(model: Any) -> Iterator[tuple[str, Any]]:
    """Keras' variables with our tensors' names; the four shortcuts, which have none, in their order."""
    shortcuts = {"Conv2D": iter((2, 3, 4, 13)), "BatchNormalization": iter((2, 3, 4, 13))}
    for layer in model.layers:
        if not layer.weights:
            continue
        kind = type(layer).__name__
        if layer.name == "predictions":
            module = "fc"
        elif layer.name.startswith("block"):
            block, *rest = layer.name.split("_")
            module = f"{block}.{rest[0]}" if len(rest) == 1 else f"{block}.bn{rest[0][-1]}"
        else:
            module = f"block{next(shortcuts[kind])}.shortcut{'_bn' * (kind == 'BatchNormalization')}"
        for variable in layer.weights:
            name = variable.name
            if kind == "SeparableConv2D":
                yield f"{module}.{name.removesuffix('_kernel')}.weight", variable
            elif kind == "BatchNormalization":
                yield f"{module}.{_TENSORS[name]}", variable
            else:
                yield f"{module}.{'weight' if name == 'kernel' else name}", variable


def _to_keras(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    if tensor.dim() == 4:
        tensor = tensor.permute(2, 3, 0, 1) if name == "depthwise_kernel" else tensor.permute(2, 3, 1, 0)
    elif tensor.dim() == 2:
        tensor = tensor.T
    assert tensor.shape == shape, name
    return tensor.contiguous()


def _to_torch(variable: Any) -> Tensor:
    import keras

    tensor = torch.from_numpy(keras.ops.convert_to_numpy(variable).copy())
    if tensor.dim() == 4:
        return tensor.permute(2, 3, 0, 1) if variable.name == "depthwise_kernel" else tensor.permute(3, 2, 0, 1)
    return tensor.T if tensor.dim() == 2 else tensor
