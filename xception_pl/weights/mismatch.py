"""What does not fit between a file and a network, in a table, with the likely cause."""

import re
from collections.abc import Mapping
from difflib import get_close_matches

Shape = tuple[int, ...]

_ROWS = 12


def mismatch_table(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> str | None:
    """None where names and shapes are equal, else a sentence, a table and the likely cause.

    Args:
        expected: shapes of the network's tensors, by the file's names for them.
        found: shapes of the file's tensors.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    reshaped = [name for name in expected if name in found and expected[name] != found[name]]
    if not missing + unexpected + reshaped:
        return None
    rows = [("missing", name, f"{expected[name]}", _nearest(name, unexpected, expected, found)) for name in missing]
    rows += [("unexpected", name, f"{found[name]}", _nearest(name, missing, found, expected)) for name in unexpected]
    rows += [("other shape", name, f"{found[name]}", f"the network has {expected[name]}") for name in reshaped]
    kinds = {
        "missing": len(missing),
        "unexpected": len(unexpected),
        "of another shape": len(reshaped),
    }
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    cause = likely_cause(list(found))
    if cause is None and reshaped and not missing + unexpected:
        cause = "a network of other widths"
    if cause is None and missing and not unexpected + reshaped:
        cause = "a part of a network, or a file that was written in part"
    lines = [f"of its tensors {counts}{f'; likely {cause}' if cause else ''}."]
    shown = [row for kind in ("other shape", "missing", "unexpected") for row in rows if row[0] == kind]
    shown = shown if len(shown) <= _ROWS else _some_of_each(shown)
    widths = [max(len(row[i]) for row in shown) for i in range(3)]
    lines += [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in shown
    ]
    if len(rows) > len(shown):
        lines.append(f"  and {len(rows) - len(shown)} more")
    return "\n".join(lines)


def likely_cause(names: list[str]) -> str | None:
    """Whose weights these names are, where they are known to be another network's."""
    aligned = _aligned(names)
    if aligned is not None:
        return f"{aligned} weights, a later network of other layers: timm has it"
    families = {
        r"(^|\.)layer[1-4]\.\d+\.conv1\.weight$": "a ResNet's weights",
        r"(^|\.)Mixed_[5-7][a-e]\.": "Inception V3's weights",
        r"(^|\.)patch_embed\.": "a vision transformer's weights",
        r"(^|\.)conv_stem\.weight$": "an EfficientNet's or MobileNet's weights",
        r"(^|\.)features\.\d+\.weight$": "a VGG's or AlexNet's weights",
    }
    return next((text for pattern, text in families.items() if any(re.search(pattern, name) for name in names)), None)


def _aligned(names: list[str]) -> str | None:
    """DeepLab's aligned Xception in timm's, Gluon's or the common DeepLab port's names, by its number of blocks."""
    timm = {
        int(found[1]) for name in names if (found := re.search(r"(?:^|\.)blocks\.(\d+)\.(?:stack|shortcut)\.", name))
    }
    ports = {int(found[1]) for name in names if (found := re.search(r"(?:^|\.)block(\d+)\.rep\.", name))}
    if timm:
        size = {13: "41", 21: "65", 23: "71"}.get(len(timm))
    elif len(ports) > 12 or any(re.search(r"\.rep\.\d+\.(bn|bn_depthwise)\.", name) for name in names):
        size = {20: "65"}.get(max(ports, default=0))
    else:
        return None
    return f"aligned Xception{f'-{size}' if size else ''}"


def _nearest(name: str, names: list[str], shapes: Mapping[str, Shape], others: Mapping[str, Shape]) -> str:
    """The name that was most likely meant: close in letters, and of the same shape where several are."""
    close = get_close_matches(name, names[:400], n=5, cutoff=0.6)
    close.sort(key=lambda other: others[other] != shapes[name])
    return f"nearest: {close[0]} {others[close[0]]}" if close else ""


def _some_of_each(rows: list[tuple[str, str, str, str]]) -> list[tuple[str, str, str, str]]:
    kinds = list(dict.fromkeys(row[0] for row in rows))
    return [row for kind in kinds for row in [row for row in rows if row[0] == kind][: _ROWS // len(kinds)]]
