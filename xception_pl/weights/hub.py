"""The hub's repositories of weights: fetched, and written as a folder that this package and timm read."""

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xception_pl.durable import write_text
from xception_pl.nets.xception import Xception
from xception_pl.weights.card import model_card
from xception_pl.weights.described import describe
from xception_pl.weights.safetensors import write_safetensors
from xception_pl.weights.stored import Results, WeightsError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""What a repository may call its weights, the best first."""

CROPS: dict[str, dict[str, Any]] = {
    "tf-slim": {"crop_pct": 0.875, "interpolation": "bilinear", "crop_mode": "center"},
    "timm": {"crop_pct": 0.8975, "interpolation": "bicubic", "crop_mode": "center"},
    "keras": {"crop_pct": 1.0, "interpolation": "nearest", "crop_mode": "squash"},
    "resize": {"crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "squash"},
}
"""Our evaluation crops as timm can say them; TF-Slim's takes 87.5 % of each side, timm's nearest of the shorter."""


def as_hub_id(source: str) -> tuple[str, str | None] | None:
    """Repository and revision, where a text is an id such as `owner/name`, `owner/name@revision`, or timm's `hf-hub:…`."""
    found = re.fullmatch(r"(?:hf[-_]hub:)?([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", source)
    return (found[1], found[2]) if found else None


def fetch_weights(hub_id: tuple[str, str | None], **options: Any) -> Path:
    """The file of weights of a repository, in the hub's own cache.

    Args:
        hub_id: from `as_hub_id`.
        options: of `huggingface_hub.hf_hub_download`: token, cache_dir, force_download, local_files_only.

    Raises:
        WeightsError: there is no such repository, or it has no weights, is not for this user, or cannot be reached.
    """
    for name in WEIGHT_FILES:
        found = fetch(hub_id, name, **options)
        if found is not None:
            return found
    raise WeightsError(f"the repository {hub_id[0]} has no {' or '.join(WEIGHT_FILES)}.")


def fetch(hub_id: tuple[str, str | None], name: str, **options: Any) -> Path | None:
    """A file of a repository, as `fetch_weights`; None where the repository has none of this name."""
    from huggingface_hub import get_session, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, revision = hub_id
    # the client went from requests to httpx to httpx2: ask its session whose errors it raises
    library = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    unanswered = getattr(library, "TransportError", None) or library.RequestException
    try:
        return Path(hf_hub_download(repo, name, revision=revision, **options))
    except LocalEntryNotFoundError as error:
        raise WeightsError(
            f"the hub cannot be reached for {repo}, whose {name} is not in its cache here: try again."
        ) from error
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise WeightsError(f"{repo} is gated: accept its terms on the hub and log in with `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            f"there is no file {repo}, and no repository of the hub of this name, or it is private: log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise WeightsError(f"the repository {repo} has no revision {revision}.") from error
    except HFValidationError as error:
        raise WeightsError(f"there is no file {repo}, and the hub takes no such name.") from error
    except HfHubHTTPError as error:
        raise WeightsError(f"the hub refuses {repo} with status {error.response.status_code}: try again.") from error
    except unanswered as error:
        raise WeightsError(f"the hub does not answer for {repo} ({type(error).__name__}): try again.") from error


def write_hub_folder(network: Xception, folder: Path, results: Results | None = None) -> None:
    """Writes `config.json`, `model.safetensors` and the model card `README.md`.

    Args:
        network: with `preprocessing` and `class_names` as the card and the configuration shall say them.
        folder: made where it is missing.
        results: what was measured with these weights; None where nothing was.

    Raises:
        WeightsError: the network is no whole Xception.
    """
    described = describe(network) | {"results": results}
    write_safetensors(folder / WEIGHT_FILES[0], network.state_dict(), described)
    write_text(folder / "config.json", json.dumps(timm_config(network, described), indent=2) + "\n")
    write_text(folder / "README.md", model_card(network, described["model"], results))


def timm_config(network: Xception, described: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` as timm reads it; what else our weights need is in the safetensors' metadata."""
    model, size = described["model"], network.preprocessing.image_size
    arguments = (
        "in_chans", "width", "channel_multiple", "middle_blocks", "residual", "intermediate_activation", "segments", "fc_units",
        "output_stride", "numerics",
    )  # fmt: skip
    config: dict[str, Any] = {
        "architecture": "xception_pl",
        "num_classes": network.num_classes,
        "num_features": network.num_features,
        "global_pool": network.global_pool,
        "model_args": {name: model[name] for name in arguments if model[name] is not None},
        "pretrained_cfg": {
            "tag": "xception",
            "input_size": [model["in_chans"], size, size],
            "min_input_size": [model["in_chans"], 71, 71],
            "fixed_input_size": False,
            "pool_size": [-(-size // model["output_stride"])] * 2,
            "mean": [0.5] * model["in_chans"],
            "std": [0.5] * model["in_chans"],
            "num_classes": network.num_classes,
            "first_conv": "block1.conv1",
            "classifier": "fc",
            **CROPS[network.preprocessing.eval_crop],
        },
    }
    if network.class_names is not None:
        config["label_names"] = network.class_names
    if network.loss == "sigmoid":
        config["problem_type"] = "multi_label_classification"  # transformers' word for it; timm has none
    return config
