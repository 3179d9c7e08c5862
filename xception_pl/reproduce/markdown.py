"""The ledger as Markdown."""

from collections.abc import Iterable
from typing import Any

from xception_pl.run.decides import IDLE

_NOT_RUN = "not yet run"


def to_markdown(ledger: dict[str, Any]) -> str:
    """The whole ledger; the same text for the same ledger."""
    parts = [
        "# Reproduction ledger",
        "Every claim of *Xception: Deep Learning with Depthwise Separable Convolutions* (Chollet, CVPR 2017, "
        "arXiv:1610.02357v3), the recipe that runs it, the paper's number and ours. Generated: "
        "`python -m xception_pl.reproduce RUN_FOLDER … --markdown FILE` writes this page again, with the numbers of the "
        "runs in those folders. A run counts where its resolved recipe equals the shipped one but for the seed and the "
        f"keys that decide no number ({', '.join(_code(key + '*' if key.endswith('.') else key) for key in IDLE)}); "
        "numbers are mean ± standard deviation over seeds.",
        "## Results",
        _table(
            ("claim", "source", "paper", "ours", "recipe", "note"),
            [
                (
                    row["what"],
                    row["source"],
                    f"{row['paper']:.{row['digits']}f}",
                    _ours(row),
                    _code(row["recipe"]),
                    row["note"],
                )
                for row in ledger["results"]
            ],
        ),
        "## Figures",
        _table(
            ("claim", "source", "paper", "ours", "recipe"),
            [
                (row["what"], row["source"], row["paper"], _figure(row["ours"]), ", ".join(map(_code, row["recipes"])))
                for row in ledger["figures"]
            ],
        ),
        "## Parameters",
        "Counted in the network that the recipe builds.",
        _table(
            ("network", "source", "paper", "ours", "difference", "recipe", "note"),
            [
                (
                    row["what"],
                    row["source"],
                    f"{row['paper']:,}",
                    f"{row['ours']:,}",
                    f"{row['ours'] - row['paper']:+,}" if row["ours"] != row["paper"] else "0",
                    _code(row["recipe"]),
                    row["note"],
                )
                for row in ledger["counts"]
            ],
        ),
        "## Hyperparameters",
        "Read from the resolved recipes.",
        _table(
            ("claim", "source", "key", "paper", "ours", ""),
            [*map(_setting, ledger["settings"]), _towers(ledger["auxiliary_towers"])],
        ),
        "## Deviations",
        "Read from the recipes' comments: **[U]** fills what the paper does not state, **[departs]** differs from what "
        "it states.",
        *(part for path, entry in ledger["deviations"].items() for part in _deviations(path, entry, ledger)),
        "## Runs",
        *_runs(ledger),
    ]
    return "\n\n".join(parts) + "\n"


def _ours(row: dict[str, Any]) -> str:
    ours = row["ours"]
    if ours is None:
        return _NOT_RUN
    digits = row["digits"] + 1
    spread = "" if ours["sd"] is None else f" ± {ours['sd']:.{digits}f}"
    return f"{ours['mean']:.{digits}f}{spread} (n = {ours['n']})"


def _figure(ours: dict[str, Any] | None) -> str:
    if ours is None:
        return _NOT_RUN
    if "runs" in ours:
        return "; ".join(
            f"{_code(path)}: {len(folders)} {'run' if len(folders) == 1 else 'runs'}, "
            + ", ".join(_code(f"{folder}/curves.png") for folder in folders)
            if folders
            else f"{_code(path)}: {_NOT_RUN}"
            for path, folders in ours["runs"].items()
        )
    metric = ours["metric"].removeprefix("val_")
    differences = "; ".join(f"{name} {_difference(found)}" for name, found in ours["differences"].items())
    return f"in small, {metric} in points against {ours['compared_with']}: {differences}; {ours['report']}"


def _difference(found: dict[str, Any]) -> str:
    """Mean ± standard deviation of the differences, in points."""
    count = f"(n = {found['n']})"
    if found["mean"] is None:
        return f"not finite {count}"
    spread = "" if found["deviation"] is None else f" ± {100 * found['deviation']:.1f}"
    return f"{100 * found['mean']:+.1f}{spread} {count}"


def _setting(row: dict[str, Any]) -> tuple[str, ...]:
    values = dict.fromkeys(map(_value, row["ours"].values()))
    paper = "on" if row["paper"] is True else _value(row["paper"])
    return (
        row["what"],
        row["source"],
        _code(row["key"]),
        paper,
        ", ".join(values),
        "equal" if row["equal"] else "departs",
    )


def _towers(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    most = max(row["ours"] for row in rows)
    return (
        "auxiliary towers",
        rows[0]["source"],
        _code("model.name"),
        "0",
        str(most),
        "equal" if not most else "departs",
    )


def _deviations(path: str, entry: dict[str, Any], ledger: dict[str, Any]) -> Iterable[str]:
    yield f"### {_code(path)}"
    base, flags = entry["base"], entry["flags"]
    own = [flag for flag in flags if flag["file"] == path]
    if base is not None:  # its table stands above: here only what differs from it
        kept = {flag["key"] for flag in flags if flag["file"] != path}
        gone = [flag["key"] for flag in ledger["deviations"][base]["flags"] if flag["key"] not in kept]
        but = f", but for {', '.join(map(_code, gone))}" if gone else ""
        yield f"The deviations of {_code(base)}{but}" + ("; and its own:" if own else ".")
        flags = own
    if flags:
        yield _table(
            ("key", "value", "", "topic", "reason"),
            [
                (_code(f["key"]), _value(f["value"]), f"[{f['kind']}]", f["topic"], f["reason"])
                for f in sorted(flags, key=lambda f: str(f["kind"]))
            ],
        )


def _runs(ledger: dict[str, Any]) -> Iterable[str]:
    counted = [(path, run) for path, runs in ledger["runs"].items() for run in runs]
    if not counted and not ledger["refused"]:
        yield "None were given."
    if counted:
        yield _table(
            ("recipe", "seed", "run"), [(_code(path), str(run["seed"]), _code(run["folder"])) for path, run in counted]
        )
    if ledger["refused"]:
        yield "Not counted:"
        yield _table(
            ("run", "reason", "results"),
            [
                (
                    _code(run["folder"]),
                    run["reason"],
                    ", ".join(_result(k, v) for k, v in run["results"].items() if k.startswith("val_")),
                )
                for run in ledger["refused"]
            ],
        )


def _result(name: str, value: float | None) -> str:
    return f"{name} not finite" if value is None else f"{name} {value:.4g}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return (
        f"{value:,}"
        if isinstance(value, int) and value >= 10_000
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _code(text: str) -> str:
    return f"`{text}`"
