"""A comparison as a table and as bars with the ceilings drawn in."""

from pathlib import Path

from xception_pl.bench.compare import Result, Row
from xception_pl.bench.ours import OWNER
from xception_pl.bench.timing import Spread

WAYS_IN_WORDS = {
    "eager": "each layer by itself",
    "compiled": "ReLU joined to its neighbour",
    "fused": "norms and ReLU fused away",
    "ideal": "a separable convolution at once",
}


def heading(result: Result) -> str:
    """What was measured, in a line."""
    what = "training steps" if result.what == "train" else "inference"
    threads = f", {result.machine['threads']} threads" if "cuda" not in result.machine else ""
    return (
        f"{what}, {result.batch} images of {result.size} px, {result.precision}, {result.machine['device']}{threads}; "
        + ", ".join(f"{name} {number}" for name, number in result.versions.items())
    )


def table(result: Result) -> str:
    """The contenders, fastest first, then the ceilings, then who was not measured and why."""
    titles = ["", "images/s (quartiles)", "× reference", "of product", "of its ceiling", "bound by", "first s"]
    titles += ["memory MB"] + (["saved MB"] if result.what == "train" else []) + ["error"]
    measured = sorted((row for row in result.rows if row.rate), key=lambda row: -row.rate.median if row.rate else 0)
    lines = _columns([titles, *(_cells(row, result) for row in measured)])
    lines = [heading(result), "", *lines, ""]
    if measured and measured[0].rate is not None:
        reference = f"; ratios against {result.reference}" if result.reference else ""
        lines += [f"Medians of {measured[0].rate.n} rounds in turns{reference}.", ""]
    lines += [
        f"Ceiling: matrix product {_spread(result.product_flops, 1e-9)} GFLOP/s, copy {_spread(result.copy_bytes, 1e-9)} GB/s; "
        f"an image is {result.operations / 1e9:.1f} GFLOP: {result.product_limit:,.3g} images/s.",
        "",
    ]
    cells = [["passes over memory", "", "MB an image", "images/s", "time bound by memory"]]
    cells += [
        [
            limit.way,
            WAYS_IN_WORDS[limit.way],
            f"{limit.bytes / 1e6:,.0f}",
            f"{limit.rate:,.3g}",
            f"{limit.memory_share:.0%}",
        ]
        for limit in result.limits
    ]
    lines += _columns(cells)
    out = [f"{row.name}: {row.problem}." for row in result.rows if row.problem is not None]
    out += [f"{name}: {reason}." for name, reason in result.skipped.items()]
    return "\n".join(lines + ([""] if out else []) + out)


def _cells(row: Row, result: Result) -> list[str]:
    assert row.rate is not None
    assert row.of_product is not None
    assert row.of_ceiling is not None
    cells = [row.name, _spread(row.rate), "" if row.ratio is None else _spread(row.ratio)]
    cells += [f"{row.of_product.median:.0%}", f"{row.of_ceiling.median:.0%} {row.way}", row.bound or ""]
    cells += [f"{row.first_seconds:.1f}", "" if row.memory is None else f"{row.memory / 1e6:,.0f}"]
    if result.what == "train":
        cells.append("" if row.saved is None else f"{row.saved / 1e6:,.0f}")
    return [*cells, f"{row.error:.0e}"]


def _spread(spread: Spread, unit: float = 1.0) -> str:
    values = (spread.median * unit, spread.low * unit, spread.high * unit)
    digits = 2 if values[0] < 10 else 1 if values[0] < 100 else 0
    median, low, high = (f"{value:,.{digits}f}" for value in values)
    return f"{median} ({low}–{high})"


def _columns(cells: list[list[str]]) -> list[str]:
    """Aligned: the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def draw(result: Result, path: Path) -> None:
    """A bar a contender, its quartiles, and lines at the ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = sorted((row for row in result.rows if row.rate), key=lambda row: row.rate.median if row.rate else 0)
    spreads = [row.rate for row in measured if row.rate is not None]
    figure, axis = plt.subplots(figsize=(8.5, 1.6 + 0.34 * len(measured)), layout="constrained")
    colours = ["tab:blue" if row.name.startswith(OWNER) else "0.7" for row in measured]
    medians = [spread.median for spread in spreads]
    whiskers = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    axis.barh([row.name for row in measured], medians, color=colours, xerr=whiskers, ecolor="0.3", height=0.7)
    for place, spread in enumerate(spreads):
        axis.annotate(
            f"{spread.median:,.3g}",
            (0, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="black",
        )
    axis.axvline(result.product_limit, color="tab:red", linewidth=1.5, label="matrix product")
    styles = {"eager": ":", "compiled": "-.", "fused": "--"}
    for limit in result.limits:
        if limit.way in styles:
            label = f"matrix product and copy, {WAYS_IN_WORDS[limit.way]}"
            axis.axvline(limit.rate, color="tab:orange", linestyle=styles[limit.way], linewidth=1.2, label=label)
    axis.set_xlim(0, 1.04 * max([result.product_limit, *(spread.high for spread in spreads)]))
    axis.set_xlabel("images a second")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(_title(result), fontsize=10, loc="left")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, title="ceilings", title_fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _title(result: Result) -> str:
    return heading(result).partition(";")[0]
