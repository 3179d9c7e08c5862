"""The Markdown report of an ablation, with its figure and its numbers as JSON beside it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xception_pl.ablation.figure import METRIC_NAMES, draw_ablation
from xception_pl.ablation.file import Ablation, as_text
from xception_pl.ablation.runs import State
from xception_pl.ablation.statistics import Row, Spread, rows
from xception_pl.run.numbers import without_nan

_BEGIN = "<!-- measured: python -m xception_pl.ablate writes from here -->"
_END = "<!-- measured: to here -->"


def write_report(ablation: Ablation, states: Sequence[State], path: Path, *, command: str) -> str:
    """Writes FILE.md, FILE.png and FILE.json; returns the table and its reading as text.

    In a report that exists only what this function wrote is replaced: text around it, for example a conclusion, stays.
    """
    found = rows(ablation, states)
    picture = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_ablation(ablation, states, found, picture)
    numbers = json.dumps(without_nan(_numbers(ablation, found)), indent=2, allow_nan=False)
    path.with_suffix(".json").write_text(numbers + "\n", encoding="utf-8")
    cells = _cells(ablation, found)
    reading = _reading(ablation, found)
    names = _missing(ablation, states)
    missing = [f"Not finished: {'; '.join(names)}."] if names else []
    measured = [
        _BEGIN,
        f"`{command}`",
        "",
        *_markdown(cells),
        "",
        *reading,
        *missing,
        *(note for state in states for note in state.notes),
        "",
        f"![training loss, held-out score by step, and the final score of each seed]({picture.name})",
        "",
        *_variants(ablation),
        "",
        *_environments(states),
        _END,
    ]
    path.write_text(_placed(path, ablation.title, "\n".join(measured)), encoding="utf-8")
    return "\n".join([*_aligned(cells), "", *reading, *missing])


def _placed(path: Path, title: str, measured: str) -> str:
    """The text of the report: the measured part in its place among what stands there already."""
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {title}\n\n{_BEGIN}{_END}\n"
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    return before + measured + after if begin and end else f"{text.rstrip()}\n\n{measured}\n"


def _cells(ablation: Ablation, found: Sequence[Row]) -> list[list[str]]:
    """The table, its header first."""
    score = METRIC_NAMES[ablation.metric]
    first = next(iter(ablation.variants))
    header = ["variant", "n", f"{score}, %", f"against {first}, points", "held-out loss", "parameters", "step, ms"]
    return [header] + [
        [
            row.variant,
            str(row.score.n),
            _text(row.score, 100, 1),
            "" if row.difference is None else _text(row.difference, 100, 1, sign=True),
            _text(row.loss, 1, 3),
            f"{row.parameters:,}",
            "" if row.step_ms is None else f"{row.step_ms:.0f}",
        ]
        for row in found
    ]


def _text(several: Spread, scale: float, digits: int, *, sign: bool = False) -> str:
    """`mean ± standard deviation`; the mean alone for n = 1."""
    mean = f"{scale * several.mean:{'+' if sign else ''}.{digits}f}"
    return mean if several.deviation is None else f"{mean} ± {scale * several.deviation:.{digits}f}"


def _reading(ablation: Ablation, found: Sequence[Row]) -> list[str]:
    """What the table says, and how little n runs can say."""
    first = next(iter(ablation.variants))
    lines = []
    for row in found:
        if row.differences:
            above, below = row.agreement
            equal = len(row.differences) - above - below
            counts = f"{above} above, {below} below" + (f", {equal} equal" if equal else "")
            lines.append(f"- {row.variant} against {first}, seed by seed: {counts}.")
    pairs = min((len(row.differences) for row in found if row.differences), default=0)
    lines += [
        "",
        "Means are over seeds, of the averaged weights on the held-out images; ± is the standard deviation of single runs "
        "(n − 1), not of the mean. Differences are paired: a seed gives all variants the same images in the same order. "
        "Step times are medians within the runs; they compare only if the machine did nothing else.",
    ]
    if pairs == 1:
        lines.append("n = 1 shows no spread: nothing here can be told from noise.")
    elif pairs:
        lines.append(
            f"n = {pairs} is small: were there no effect, {pairs} differences would still "
            f"agree in sign with a chance of {2.0 ** (1 - pairs):.1%}."
        )
    return lines


def _missing(ablation: Ablation, states: Sequence[State]) -> list[str]:
    return [cell.name for cell, state in zip(ablation.cells, states, strict=True) if not state.finished]


def _variants(ablation: Ablation) -> list[str]:
    """What was run, in the file's own words."""
    common = ", ".join(f"`{name}: {as_text(value)}`" for name, value in ablation.common.items() if name != "run.folder")
    lines = [f"Every run: `{ablation.base}`" + (f" with {common}" if common else "") + "; the variants:", ""]
    for name, changes in ablation.variants.items():
        text = ", ".join(f"`{key}: {as_text(value)}`" for key, value in changes.items())
        lines.append(f"- {name}: {text or 'nothing else'}")
    return lines


def _environments(states: Sequence[State]) -> list[str]:
    """Hardware and versions, each with the number of its runs: ideally one line."""
    counts: dict[str, int] = {}
    for state in states:
        if state.finished and state.folder is not None:
            line = _environment(json.loads((state.folder / "environment.json").read_text(encoding="utf-8")))
            counts[line] = counts.get(line, 0) + 1
    return [f"Measured on {line} ({count} {'run' if count == 1 else 'runs'})." for line, count in counts.items()]


def _environment(stored: dict[str, Any]) -> str:
    cpu, git = stored["cpu"], stored["git"]
    hardware = ", ".join(stored["gpus"]) or f"{cpu['model']}, {cpu['torch_threads']} of {cpu['cores']} cores"
    packages = ", ".join(f"{name} {stored['packages'][name]}" for name in ("torch", "lightning", "numpy"))
    commit = "" if git is None else f", commit {git['commit'][:12]}" + (" with changes" if git["changed"] else "")
    return f"{hardware}; Python {stored['python']}, {packages}{commit}"


def _numbers(ablation: Ablation, found: Sequence[Row]) -> dict[str, Any]:
    """The table with each seed's numbers, as fractions; NaN where a run diverged."""
    return {
        "title": ablation.title,
        "metric": ablation.metric,
        "compared_with": next(iter(ablation.variants)),
        "variants": [
            {
                **asdict(row),
                "score": asdict(row.score),
                "loss": asdict(row.loss),
                "difference": None if row.difference is None else asdict(row.difference),
            }
            for row in found
        ],
    }


def _markdown(cells: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    return [lines[0], "|---|" + "---:|" * (len(cells[0]) - 1), *lines[1:]]


def _aligned(cells: list[list[str]]) -> list[str]:
    """The table for a terminal: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
