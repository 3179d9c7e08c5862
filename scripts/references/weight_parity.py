"""How far outputs are apart between Keras' and timm's own networks and ours, in both directions: the table of docs/weights.md.

python -m scripts.references.weight_parity
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.weights.conftest import outputs, randomise, relative_error, smooth_images
from xception_pl import Xception, load_network
from xception_pl.weights.exports import export

SIZES = (299, 256, 150, 97)


def row(direction: str, ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]) -> None:
    """Prints a line of the table: the largest difference, relative to the largest logit, at each size."""
    apart = [f"{relative_error(ours(smooth_images(size)), theirs(smooth_images(size))):.0e}" for size in SIZES]
    print(f"| {direction} | {' | '.join(apart)} |", flush=True)


def in_runtime(session: Any, images: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def main() -> None:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras
    import timm

    from tests.nets.test_keras_parity import random_weights

    def in_keras(model: Any) -> Callable[[Tensor], Tensor]:
        @torch.no_grad()
        def compute(images: Tensor) -> Tensor:
            return torch.as_tensor(model(images.permute(0, 2, 3, 1).contiguous(), training=False))

        return compute

    def ours(network: Xception) -> Callable[[Tensor], Tensor]:
        return lambda images: outputs(network, images)

    print("| from → to | " + " | ".join(map(str, SIZES)) + " |\n|---|" + "---|" * len(SIZES))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        body = keras.applications.Xception(weights=None, include_top=False, pooling="avg", input_shape=(None, None, 3))
        head = keras.layers.Dense(11, name="predictions")(body.output)
        model = random_weights(keras.Model(body.input, head))
        model.save(path / "a.keras")
        row("Keras `.keras` → ours", ours(load_network(path / "a.keras")), in_keras(model))

        network = randomise(Xception(11))
        assert isinstance(network, Xception)
        export(network, "keras", path / "b.keras")
        row("ours → Keras `.keras`", ours(network), in_keras(keras.saving.load_model(path / "b.keras")))

        theirs = randomise(timm.create_model("legacy_xception", num_classes=11))
        torch.save(theirs.state_dict(), path / "c.pth")
        row("timm → ours", ours(load_network(path / "c.pth")), lambda images: outputs(theirs, images))

        network = randomise(Xception(11, numerics="torch"))
        assert isinstance(network, Xception)
        export(network, "timm", path / "d.safetensors")
        again = timm.create_model("legacy_xception", num_classes=11, checkpoint_path=path / "d.safetensors").eval()
        row("ours → timm", ours(network), lambda images: outputs(again, images))

        import onnxruntime

        for numerics in ("keras", "torch"):
            network = randomise(Xception(11, numerics=numerics))
            assert isinstance(network, Xception)
            export(network, "onnx", path / "e.onnx")
            session = onnxruntime.InferenceSession(path / "e.onnx", providers=["CPUExecutionProvider"])
            row(
                f"ours ({numerics}) → ONNX Runtime",
                ours(network),
                partial(in_runtime, session),
            )


if __name__ == "__main__":
    main()
