"""The ledger: nothing typed, every flag found, only runs of the shipped recipes counted."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from xception_pl.recipe import flat, load_recipe, to_plain
from xception_pl.reproduce import ledger as module
from xception_pl.reproduce.__main__ import main
from xception_pl.reproduce.claims import COUNTS, FIGURES, INCEPTION, JFT_XCEPTION, RESULTS, SETTINGS, XCEPTION
from xception_pl.reproduce.flags import base_of, read_flags
from xception_pl.reproduce.ledger import make_ledger
from xception_pl.reproduce.markdown import to_markdown
from xception_pl.reproduce.runs import sort_runs, summary

RECIPES = sorted(map(str, Path("recipes").rglob("*.yaml")))


@pytest.fixture(scope="module")
def ledger() -> dict[str, Any]:
    """Without runs."""
    return make_ledger([])


def write_run(
    folder: Path, recipe: str, results: dict[str, float] | None, speeds: Sequence[float] = (), **overrides: str
) -> Path:
    """A run's folder; `speeds` are its logged images a second."""
    folder.mkdir(parents=True)
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    (folder / "recipe.yaml").write_text(load_recipe(recipe, dotted).to_yaml())
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    if speeds:
        rows = [f"{step},{speed}\n" for step, speed in enumerate(speeds, start=1)]
        (folder / "metrics.csv").write_text("".join(["step,images_per_second\n", *rows]))
    return folder


def test_the_committed_ledger_is_what_the_command_prints_now(ledger: dict[str, Any]) -> None:
    written = Path("docs/reproduction.md").read_text()
    assert to_markdown(ledger) == written, "run: python -m xception_pl.reproduce --markdown docs/reproduction.md"


def test_a_ledger_without_runs_has_no_result_of_ours(ledger: dict[str, Any]) -> None:
    assert [row["ours"] for row in ledger["results"]] == [None] * len(RESULTS)
    assert [row["ours"] for row in ledger["figures"][:3]] == [None] * 3
    assert to_markdown(ledger).count("not yet run") == len(RESULTS) + 3


def test_the_claims_are_the_papers() -> None:
    """Tables 1 to 3, once more: network, then its numbers in the order of the table's columns."""
    tables = {
        "Table 1": "0.715 0.901 0.77 0.933 0.782 0.941 0.79 0.945",
        "Table 2": "6.36 6.5 6.7 6.78",
        "Table 3": "31 28",
    }
    for table, numbers in tables.items():
        assert " ".join(f"{row.paper:g}" for row in RESULTS if row.source == table) == numbers
    assert [row.paper for row in COUNTS if row.source == "Table 3"] == [23_626_728, 22_855_952]
    assert [row.paper for row in COUNTS if row.source != "Table 3"] == [55_639_952, 115_629_968]
    assert [row.source.split(",")[0] for row in FIGURES] == [f"Figure {n}" for n in (6, 7, 8, 9, 10)]


def test_recipes_agree_with_the_papers_hyperparameters(ledger: dict[str, Any]) -> None:
    for row in ledger["settings"]:
        for path in row["recipes"]:
            departs = {flag.key for flag in read_flags(path) if flag.kind == "departs"}
            assert row["equal"] is (row["key"] not in departs), (path, row["key"])
    assert {row["what"] for row in ledger["settings"] if not row["equal"]} == {"GPUs", "JFT: iterations"}
    assert all(row["ours"] == 0 for row in ledger["auxiliary_towers"])
    differences = {row["what"]: row["ours"] - row["paper"] for row in ledger["counts"]}
    assert {what for what, difference in differences.items() if difference} == {"Inception V3"}
    assert differences["Inception V3"] == 207_840


@pytest.fixture
def no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what takes time: building each network to count it."""
    monkeypatch.setattr(module, "COUNTS", ())
    monkeypatch.setattr(module, "WITHOUT_AUXILIARY_TOWER", (XCEPTION,))


@pytest.mark.usefixtures("no_networks")
def test_a_changed_recipe_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.shipped_recipe

    def altered(path: str) -> Any:
        recipe = original(path)
        recipe.optim.lr = 0.05 if path == XCEPTION else recipe.optim.lr
        return recipe

    monkeypatch.setattr(module, "shipped_recipe", altered)
    row = next(row for row in make_ledger([])["settings"] if not row["equal"])
    assert (row["key"], row["paper"]) == ("optim.lr", 0.045)
    assert row["ours"] == {XCEPTION: 0.05, INCEPTION: 0.045}


def test_each_recipe_that_a_claim_names_is_there() -> None:
    named = {row.recipe for row in (*RESULTS, *COUNTS)} | {path for row in SETTINGS for path in row.recipes}
    named |= {path for row in FIGURES for path in row.recipes}
    assert [path for path in sorted(named) if not Path(path).is_file()] == []


# Flags


@pytest.mark.parametrize("path", RECIPES)
def test_each_flag_in_a_recipe_is_found(path: str) -> None:
    """Compared with the text itself: each line with a flag behind a key."""
    marked = [
        line.split(":")[0].strip()
        for line in Path(path).read_text().splitlines()
        if re.search(r"\[(U|departs)\]", line) and not line.lstrip().startswith("#")
    ]
    own = [flag for flag in read_flags(path) if flag.file == path]
    assert [flag.key.rpartition(".")[2] for flag in own] == marked
    assert all(flag.topic and flag.reason for flag in own)


def test_a_key_that_is_set_again_loses_its_bases_flag(tmp_path: Path) -> None:
    (tmp_path / "ground.yaml").write_text(
        "model:\n  name: xception  # [U] initialisation: ours\n  dropout: 0.5  # [departs] dropout: more\n"
        "optim:\n  lr: 0.1  # [U] rate: guessed\n"
    )
    upon = tmp_path / "upon.yaml"
    upon.write_text("base: ground.yaml\nmodel: {dropout: 0.2}\noptim:\n  lr: 0.2  # [departs] rate: doubled\n")
    flags = read_flags(str(upon))
    assert [(f.kind, f.key, f.topic, f.reason) for f in flags] == [
        ("U", "model.name", "initialisation", "ours"),
        ("departs", "optim.lr", "rate", "doubled"),
    ]
    assert [Path(flag.file).name for flag in flags] == ["ground.yaml", "upon.yaml"]


def test_a_flag_without_a_key_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 0\n# [U] seed: any\n")
    with pytest.raises(ValueError, match=r"recipe.yaml, line 2: a flag must stand behind the key that it is about.$"):
        read_flags(str(recipe))


def test_a_run_whose_recipe_changed_midway_is_not_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", XCEPTION, {"val_top1": 0.8})
    starts = [{"step": 0, "changed": {}}, {"step": 5, "changed": {"run.name": "was 'a' and is 'b'"}}]
    (folder / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    recipes = {XCEPTION: flat(to_plain(load_recipe(XCEPTION)))}
    counted, refused = sort_runs([str(folder)], recipes)
    assert (len(counted[XCEPTION]), refused) == (1, [])
    with open(folder / "starts.jsonl", "a") as file:
        file.write(json.dumps({"step": 9, "changed": {"optim.lr": "was 0.045 and is 0.1"}}) + "\n")
    counted, refused = sort_runs([str(folder)], recipes)
    assert counted[XCEPTION] == []
    assert [run.reason for run in refused] == ["its recipe changed midway: optim.lr was 0.045 and is 0.1"]


def test_bases_are_found_beside_their_recipe() -> None:
    assert base_of(XCEPTION) == "recipes/imagenet.yaml"
    assert base_of("recipes/jft/xception_fc.yaml") == JFT_XCEPTION
    assert base_of("recipes/imagenet.yaml") is None


def test_every_flag_of_a_claimed_recipe_stands_in_the_ledger(ledger: dict[str, Any]) -> None:
    markdown = to_markdown(ledger)
    for path in ledger["deviations"]:
        for flag in read_flags(path):
            assert f"| [{flag.kind}] | {flag.topic} | {flag.reason} |" in markdown
    inception = {flag["key"]: flag for flag in ledger["deviations"][INCEPTION]["flags"]}
    assert inception["data.global_batch"]["value"] == 256
    assert inception["model.name"]["value"] == "inception_v3"


# Runs


@pytest.mark.usefixtures("no_networks")
def test_only_runs_of_the_shipped_recipe_count(tmp_path: Path) -> None:
    results = [
        {"val_top1": 0.788, "val_top5": 0.944, "images_per_second": 256.0},
        {"val_top1": 0.790, "val_top5": 0.945, "images_per_second": 256.0},
        {"val_top1": 0.795, "val_top5": 0.946, "images_per_second": 256.0},
    ]
    warming, last = 25.6, 256.0
    write_run(tmp_path / "a", XCEPTION, results[0], [warming, 5120, 5120, 5120, last])
    write_run(
        tmp_path / "b",
        "recipes/imagenet.yaml",
        results[1],
        [warming, 2560, 2560, last],
        seed="1",
        data__prefetch="3",
        run__name="mine",
    )
    write_run(tmp_path / "deep/c", XCEPTION, results[2], [warming], seed="2", run__folder=str(tmp_path))
    write_run(tmp_path / "d", XCEPTION, results[0], seed="3", optim__lr="0.05", trainer__max_epochs="90")
    write_run(tmp_path / "e", XCEPTION, None, seed="4")
    write_run(tmp_path / "f", XCEPTION, results[0], seed="2")
    write_run(tmp_path / "g", INCEPTION, {"val_top1": 0.78, "val_top5": float("nan")})
    (write_run(tmp_path / "h", XCEPTION, results[0]) / "recipe.yaml").write_text("model: {widht: 2}")
    (write_run(tmp_path / "i", XCEPTION, results[0]) / "results.json").write_text('{"val_top1":')
    made = make_ledger([str(tmp_path), str(tmp_path / "a")])

    ours = {row["what"]: row["ours"] for row in made["results"]}
    top1 = ours["Xception, top-1"]
    assert (top1["n"], top1["seeds"]) == (3, [0, 1, 2])
    assert top1["mean"] == pytest.approx(0.791, rel=1e-12)
    assert top1["sd"] == pytest.approx(0.0036055512754639912, rel=1e-12)  # sqrt((9 + 1 + 16) / 2) thousandths
    speed = ours["Xception, steps a second"]
    assert (speed["mean"], speed["seeds"]) == (pytest.approx((20 + 10) / 2), [0, 1])
    assert ours["Inception V3, top-1"] == {"mean": 0.78, "sd": None, "n": 1, "seeds": [0]}
    assert ours["Inception V3, top-5"] is None
    assert ours["VGG-16, top-1"] is None

    reasons = {Path(row["folder"]).name: row["reason"] for row in made["refused"]}
    assert reasons.pop("h").startswith("its recipe cannot be read: stored recipe: unknown key model.widht.")
    assert reasons.pop("i").startswith("its results cannot be read: ")
    assert reasons == {
        "d": f"other recipe: differs from {XCEPTION} in optim.lr, trainer.max_epochs",
        "e": "not finished",
        "f": f"{XCEPTION} with seed 2 is counted already",
    }
    text = to_markdown(made)
    assert "| Xception, top-1 | Table 1 | 0.790 | 0.7910 ± 0.0036 (n = 3) |" in text
    assert "| Inception V3, top-1 | Table 1 | 0.782 | 0.7800 (n = 1) |" in text
    assert "optim.lr, trainer.max_epochs | val_top1 0.788, val_top5 0.944 |" in text


@pytest.mark.usefixtures("no_networks")
def test_a_figure_of_curves_shows_the_counted_runs_alone(tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "1")):
        write_run(tmp_path / name, XCEPTION, {"val_top1": 0.79}, seed=seed)
    write_run(tmp_path / "other", INCEPTION, {"val_top1": 0.78}, optim__lr="0.05")
    made = make_ledger([str(tmp_path)])
    assert [row["ours"] for row in made["figures"][:3]] == [
        {"runs": {XCEPTION: [f"{tmp_path}/a", f"{tmp_path}/b"], INCEPTION: []}},
        None,
        None,
    ]
    shown = f"`{XCEPTION}`: 2 runs, `{tmp_path}/a/curves.png`, `{tmp_path}/b/curves.png`; `{INCEPTION}`: not yet run"
    assert f"| Xception against Inception V3 | {shown} |" in to_markdown(made)


@pytest.mark.usefixtures("no_networks")
def test_a_figure_of_an_ablation_shows_what_its_report_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    differences = [None, {"mean": -0.0512, "deviation": 0.0123, "n": 3}, {"mean": None, "deviation": None, "n": 1}]
    rows = [{"variant": name, "difference": found} for name, found in zip("abc", differences, strict=True)]
    report = {"metric": "val_top1", "compared_with": "a", "variants": rows}
    (tmp_path / "residual.json").write_text(json.dumps(report))
    monkeypatch.setattr(module, "ABLATIONS", tmp_path)
    made = make_ledger([])
    assert made["figures"][3]["ours"]["differences"] == {"b": differences[1], "c": differences[2]}
    text = to_markdown(made)
    assert "against a: b -5.1 ± 1.2 (n = 3); c not finite (n = 1); docs/ablations/residual.md |" in text
    assert "| none is faster and ends better than ReLU or ELU | not yet run |" in text


def test_the_shipped_ablations_stand_in_the_ledger(ledger: dict[str, Any]) -> None:
    for row in ledger["figures"][3:]:
        report = Path(row["ours"]["report"])
        (line,) = [line for line in to_markdown(ledger).splitlines() if str(report) in line]
        for difference in re.findall(r"[+-]\d+\.\d ± \d+\.\d", report.read_text()):
            assert difference in line


def test_map_is_shown_in_the_papers_percent(tmp_path: Path) -> None:
    write_run(tmp_path / "a", JFT_XCEPTION, {"val_map100": 0.0671})
    recipes = {JFT_XCEPTION: flat(to_plain(load_recipe(JFT_XCEPTION)))}
    counted, refused = sort_runs([str(tmp_path)], recipes)
    (claim,) = [row for row in RESULTS if row.recipe == JFT_XCEPTION]
    found = summary(counted[JFT_XCEPTION], claim.metric, claim.scale)
    assert refused == []
    assert found is not None
    assert found["mean"] == pytest.approx(6.71)


# The command


@pytest.mark.usefixtures("no_networks")
@pytest.mark.parametrize("number", ["NaN", "null"])
def test_runs_that_diverged_are_written_as_json(number: str, tmp_path: Path) -> None:
    results = f'{{"val_top1": 0.001, "val_loss": {number}}}'
    (write_run(tmp_path / "runs/a", XCEPTION, {}) / "results.json").write_text(results)
    (write_run(tmp_path / "runs/b", XCEPTION, {}, optim__lr="4") / "results.json").write_text(results)
    written = {kind: tmp_path / f"a.{kind}" for kind in ("json", "md")}
    arguments = [f"--json={written['json']}", f"--markdown={written['md']}"]
    assert main([str(tmp_path / "runs"), *arguments]) == 0
    stored = json.loads(written["json"].read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert stored["refused"][0]["results"] == {"val_top1": 0.001, "val_loss": None}
    assert "optim.lr | val_top1 0.001, val_loss not finite |" in written["md"].read_text()
    assert to_markdown(stored) == written["md"].read_text()


def test_the_command_writes_both_forms(
    tmp_path: Path, ledger: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "make_ledger", lambda folders: ledger if not folders else None)
    assert main(["--markdown", str(tmp_path / "a.md"), "--json", str(tmp_path / "a.json")]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "a.md").read_text() == to_markdown(ledger)
    stored = json.loads((tmp_path / "a.json").read_text())
    assert stored == json.loads(json.dumps(ledger))
    assert to_markdown(stored) == to_markdown(ledger)


def test_a_folder_without_runs_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2
    expected = f"error: There is no run in {tmp_path}: give a folder with recipe.yaml in it or below it.\n"
    assert capsys.readouterr().err == expected


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom xception_pl.reproduce.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as ended:\n    assert ended.code == 0\n"
        "sys.exit(str([name for name in ('torch', 'lightning', 'datasets', 'timm') if name in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""
    assert "RUN_FOLDER" in done.stdout
