"""Xception under timm's roof: importing this module makes it known to timm as `xception_pl` or `xception_pl.xception`.

`import xception_pl` does so too, as soon as timm is imported. Whatever is built for timm's networks then takes it by that
name: ``timm.create_model("xception_pl", features_only=True, out_indices=(1, 2, 3, 4), output_stride=16)`` gives an encoder
for a decoder of segmentation or detection, with `feature_info.channels()` and `.reduction()`; segmentation_models_pytorch
calls it ``tu-xception_pl``.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from xception_pl.nets.xception import Xception

default_cfgs = generate_default_cfgs(
    {
        "xception_pl.xception": {
            "num_classes": 1000,
            "input_size": (3, 299, 299),
            "min_input_size": (3, 71, 71),
            "pool_size": (10, 10),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "block1.conv1",
            "classifier": "fc",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def xception_pl(
    pretrained: bool = False,
    *,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
    pad_stem: bool = False,
    **options: Any,
) -> nn.Module:
    """The paper's Xception, with timm's arguments and the keywords of :class:`~xception_pl.nets.xception.Xception`.

    No weights belong to the name alone: `pretrained` needs a `pretrained_cfg` that says where they are, such as
    ``{"file": "…/averaged.safetensors"}`` or ``{"hf_hub_id": "owner/name"}``, with our names for the tensors; or take all
    from a folder that `python -m xception_pl.export --to hub-folder` wrote, as ``local-dir:FOLDER`` or ``hf-hub:owner/name``.
    Weights of other origin go through :func:`xception_pl.load_network`.

    Args:
        pretrained: load those weights; another number of classes or channels is adapted as timm does it.
        drop_rate: dropout before the logistic layer.
        global_pool: "avg", "max", "avgmax" (half of each), "catavgmax" (both, so twice the features), or "" for none, which
            needs ``num_classes=0``. Weights are trained with one of them; those of the paper's network with "avg".
        pad_stem: pad the stem's two convolutions, which Figure 5 does not, so that a 128-pixel image gives maps of 64,
            32, 16, 8 and 4 pixels instead of 61, 31, 16, 8 and 4. Some decoders (DeepLabV3+, FPN, U-Net++) need this.
        options: what timm and Xception take.
    """

    def network(**keywords: Any) -> Xception:
        xception = Xception(**keywords)
        if global_pool != "avg":
            xception.reset_classifier(keywords.get("num_classes", 1000), global_pool)
        if pad_stem:
            xception.block1.conv1.padding = xception.block1.conv2.padding = (1, 1)
        return xception

    built: nn.Module = build_model_with_cfg(
        network, "xception_pl", pretrained, feature_cfg={"feature_cls": "getter"}, dropout=drop_rate, **options
    )
    return built
