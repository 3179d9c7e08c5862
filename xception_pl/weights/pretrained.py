"""Xception with huggingface_hub's methods: `from_pretrained`, `save_pretrained`, `push_to_hub`."""

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin

from xception_pl.nets.xception import Xception
from xception_pl.weights.hub import as_hub_id, fetch_weights, write_hub_folder
from xception_pl.weights.load import load_network
from xception_pl.weights.ready import ReadyXception
from xception_pl.weights.results import fingerprint


class PretrainedXception(ReadyXception, PyTorchModelHubMixin, library_name="xception_pl"):  # type: ignore[call-arg]
    """An :class:`~xception_pl.nets.xception.Xception` that comes from and goes to the hub.

    ``PretrainedXception.from_pretrained(folder_or_id)`` takes the weights of any format that
    :func:`xception_pl.load_network` knows there, and ``num_classes=``; `save_pretrained` and `push_to_hub` write the folder of
    ``python -m xception_pl.export --to hub-folder``, with the numbers that came with the weights unless these have changed. A class
    of its own, so that networks need no hub library.
    """

    _measured: str | None = None
    """Fingerprint of the weights that `results` were measured with."""

    def _save_pretrained(self, save_directory: Path) -> None:
        # trained on since, they are no longer those that were measured
        same = self.results is not None and fingerprint(self) == self._measured
        write_hub_folder(self, save_directory, self.results if same else None)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        num_classes: int | None = None,
        **others: Any,
    ) -> "PretrainedXception":
        source: str | Path = model_id
        hub_id = as_hub_id(model_id) if not Path(model_id).expanduser().exists() else None
        if hub_id is not None:
            source = fetch_weights(
                (hub_id[0], revision or hub_id[1]),
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            ).parent  # with the config.json that the mixin has fetched by now
        network = load_network(source, num_classes=num_classes)
        if not isinstance(network, Xception):
            raise ValueError(f"{model_id} holds a {type(network).__name__}, no Xception: use load_network")
        network.__class__ = cls
        assert isinstance(network, cls)
        if network.results is not None:
            network._measured = fingerprint(network)
        return network
