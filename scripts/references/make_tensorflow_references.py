"""Make the numbers again that the tests compare with: TensorFlow's own operations, and Keras' Xception in training.

Needs an interpreter of its own, with TensorFlow and Keras and nothing of this project. From the root:

    python -m venv build/tensorflow
    build/tensorflow/bin/pip install tensorflow-cpu==2.21.0 keras==3.15.1
    build/tensorflow/bin/python -m scripts.references.make_tensorflow_references [FOLDER]

writes `tensorflow_ops.json` and `xception_trajectory.json` to FOLDER (by default tests/references). Everything is
float64 and drawn from the seed in tests/references/seeded.py.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf

from tests.references import seeded

keras.config.set_floatx("float64")
v1 = tf.compat.v1.train


def optimizer_steps(make: Callable[[Callable[[], tf.Tensor]], Any], learning_rates: list[float]) -> dict[str, Any]:
    """The weights after each step of an optimiser of TensorFlow 1, for gradients that depend on nothing."""
    draw = seeded.generator("optimizer")
    weight = tf.Variable(draw.normal(size=6))
    gradients = draw.normal(size=(len(learning_rates), 6))
    gradients[:, 5] = 0.0  # a weight that never gets a gradient
    rate = tf.Variable(0.0, dtype=tf.float64)
    optimizer = make(rate.value)
    result: dict[str, Any] = {
        "learning_rates": learning_rates,
        "start": weight.numpy().tolist(),
        "gradients": gradients.tolist(),
        "weights": [],
    }
    for learning_rate, gradient in zip(learning_rates, gradients, strict=True):
        rate.assign(learning_rate)
        optimizer.apply_gradients([(tf.constant(gradient), weight)])
        result["weights"].append(weight.numpy().tolist())
    return result


def averaging(decay: float, steps: int) -> dict[str, Any]:
    """ExponentialMovingAverage with num_updates 0, 1, 2 … (it computes the decay in float32)."""
    draw = seeded.generator("average")
    variable = tf.Variable(draw.normal(size=4))
    updates = tf.Variable(0, dtype=tf.int64)
    average = tf.train.ExponentialMovingAverage(decay, num_updates=updates)
    average.apply([variable])  # the first call makes the shadow, equal to the variable
    result: dict[str, Any] = {"decay": decay, "start": variable.numpy().tolist(), "values": [], "averages": []}
    for step in range(steps):
        updates.assign(step)
        variable.assign(draw.normal(size=4))
        average.apply([variable])
        result["values"].append(variable.numpy().tolist())
        result["averages"].append(average.average(variable).numpy().tolist())
    return result


def staircase(learning_rate: float, decay_rate: float, decay_steps: int, steps: list[int]) -> dict[str, Any]:
    """exponential_decay, in steps."""
    rate, factor = tf.constant(learning_rate, tf.float64), tf.constant(decay_rate, tf.float64)
    rates = [
        float(v1.exponential_decay(rate, tf.constant(step, tf.int64), decay_steps, factor, staircase=True)())
        for step in steps
    ]
    return {
        "learning_rate": learning_rate,
        "decay_rate": decay_rate,
        "decay_steps": decay_steps,
        "steps": steps,
        "rates": rates,
    }


def penalties(strength: float) -> dict[str, Any]:
    """Gradient of L2 as TF-Slim means it (tf.nn.l2_loss) and as Keras does (keras.regularizers.L2)."""
    weight = tf.Variable(seeded.generator("penalty").normal(size=5))
    with tf.GradientTape(persistent=True) as tape:
        slim = strength * tf.nn.l2_loss(weight)
        of_keras = keras.regularizers.L2(strength)(weight)
    return {
        "strength": strength,
        "weight": weight.numpy().tolist(),
        "slim": tape.gradient(slim, weight).numpy().tolist(),
        "keras": tape.gradient(of_keras, weight).numpy().tolist(),
    }


def losses(smoothing: float) -> dict[str, Any]:
    """Smoothed cross-entropy of three images, and the sigmoid cross-entropies of their label sets."""
    draw = seeded.generator("losses")
    logits = draw.normal(size=(3, 5)) * 3.0
    labels = draw.randint(5, size=3)
    label_sets = draw.randint(2, size=(3, 5)).astype(np.float64)
    crossentropy = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
    return {
        "label_smoothing": smoothing,
        "logits": logits.tolist(),
        "labels": labels.tolist(),
        "label_sets": label_sets.tolist(),
        "cross_entropy": float(crossentropy(np.eye(5)[labels], logits)),
        "sigmoid_terms": tf.nn.sigmoid_cross_entropy_with_logits(label_sets, logits).numpy().tolist(),
    }


def tensorflow_ops() -> dict[str, Any]:
    falling = [0.1] * 3 + [0.05] * 3 + [0.01] * 4
    # As tensors: TensorFlow makes float32 of Python's numbers.
    momentum, rho, one, small = (tf.constant(x, tf.float64) for x in (0.9, 0.8, 1.0, 1.0e-3))
    return {
        "momentum": optimizer_steps(lambda rate: v1.MomentumOptimizer(rate, momentum), falling),
        "nesterov": optimizer_steps(lambda rate: v1.MomentumOptimizer(rate, momentum, use_nesterov=True), falling),
        "rmsprop_eps_1": optimizer_steps(lambda rate: v1.RMSPropOptimizer(rate, rho, momentum, one), falling),
        "rmsprop_eps_small": optimizer_steps(lambda rate: v1.RMSPropOptimizer(rate, rho, momentum, small), falling),
        "averaging_early": averaging(0.9999, 12),
        "averaging_capped": averaging(0.5, 20),
        "staircase": staircase(0.045, 0.94, 10009, [0, 1, 10008, 10009, 20017, 20018, 100090, 1000900]),
        "penalties": penalties(0.25),  # exact in float32
        "losses": losses(0.1),
    }


def xception_with_l2() -> keras.Model:
    """keras.applications.Xception, with L2 on its kernels, giving logits."""
    model = keras.applications.Xception(
        weights=None,
        input_shape=(seeded.SIZE, seeded.SIZE, 3),
        classes=seeded.CLASSES,
        classifier_activation=None,
    )

    def penalised(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        for key in ("kernel_regularizer", "depthwise_regularizer", "pointwise_regularizer"):
            if key in config and not (isinstance(layer, keras.layers.SeparableConv2D) and key == "kernel_regularizer"):
                config[key] = keras.regularizers.L2(seeded.L2)
        return type(layer).from_config(config)

    return keras.models.clone_model(model, clone_function=penalised)


def named_weights(model: keras.Model) -> dict[str, Any]:
    """Variables by the names that seeded.py speaks of. Shortcuts have automatic names: their width tells the block."""
    shortcuts = {128: "block2", 256: "block3", 728: "block4", 1024: "block13"}
    result = {}
    for layer in model.layers:
        for variable in layer.weights:
            name = layer.name
            if not name.startswith(("block", "predictions")):
                name = f"{shortcuts[variable.shape[-1]]}_shortcut"
                name += "_bn" if isinstance(layer, keras.layers.BatchNormalization) else ""
            result[f"{name}/{variable.name}"] = variable
    assert len(result) == len(model.weights)
    return result


def xception_trajectory() -> dict[str, Any]:
    """Train with Keras' own training step, and say what came of it."""
    model = xception_with_l2()
    weights = named_weights(model)
    for name, variable in weights.items():
        variable.assign(seeded.weight(name, tuple(variable.shape)))
    model.compile(
        optimizer=keras.optimizers.SGD(seeded.LEARNING_RATE, momentum=seeded.MOMENTUM),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    regularised_losses = []
    for step in range(seeded.STEPS):
        model.reset_metrics()  # train_on_batch gives a running mean
        regularised_losses.append(float(model.train_on_batch(*seeded.batch(step))))
    return {
        "losses": regularised_losses,
        "weights": {name: seeded.summary(name, variable.numpy()) for name, variable in weights.items()},
    }


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/references")
    for name, make in {"tensorflow_ops": tensorflow_ops, "xception_trajectory": xception_trajectory}.items():
        made_with = {"tensorflow": tf.__version__, "keras": keras.__version__, "numpy": np.__version__}
        text = json.dumps({"made_with": made_with, **make()}, indent=1)
        (folder / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
