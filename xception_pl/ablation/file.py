"""An ablation file: `base`, `overrides`, `seeds` and `variants` into one checked recipe a run. Imports no torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os.path import normpath
from pathlib import Path
from typing import Any

from xception_pl.recipe import Recipe, RecipeError, find_recipe, flat, load_recipe, nearest, read_mapping, to_plain
from xception_pl.run.decides import what_decides

_KEYS = {
    "title": "a line of text",
    "base": "the path of a recipe, relative to this file",
    "overrides": "a mapping of recipe keys to values, for all variants",
    "seeds": "a list of different whole numbers of 0 or more",
    "variants": "a mapping of at least two names to mappings of recipe keys to values",
}
_OPTIONAL = ("title", "overrides")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of an ablation: a variant with a seed."""

    variant: str
    seed: int
    base: str
    """Recipe that the run starts from."""
    overrides: dict[str, Any]
    """What differs from it, by dotted key: common, then the variant's, then the command line's, then seed and folder."""
    recipe: Recipe
    """All of it, resolved."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.variant}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where the cell's run folders lie."""
        assert self.recipe.run.name is not None
        return Path(self.recipe.run.folder) / self.recipe.run.name

    def arguments(self) -> list[str]:
        """Arguments of `python -m xception_pl.fit` that give this recipe."""
        return [self.base, *(f"--{name}={as_text(value)}" for name, value in self.overrides.items())]


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Variants × seeds of one base recipe."""

    path: Path
    title: str
    base: str
    common: dict[str, Any]
    """Overrides of the base for all variants, by dotted key."""
    variants: dict[str, dict[str, Any]]
    """Name to overrides; comparisons are with the first."""
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    """Seeds outermost, so that an ablation that is not finished compares all variants on its first seeds."""

    @property
    def folder(self) -> Path:
        """Folder of all its runs."""
        return self.cells[0].folder.parent

    @property
    def metric(self) -> str:
        """The final number that variants are compared by."""
        return "val_map100" if self.cells[0].recipe.optim.loss == "sigmoid" else "val_top1"

    def of_variant(self, name: str) -> list[Cell]:
        """The cells of a variant, in the order of the seeds."""
        return [cell for cell in self.cells if cell.variant == name]


def as_text(value: Any) -> str:
    """A value as `--key=value` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def load_ablation(path: str | Path, command_line: Mapping[str, str] | None = None) -> Ablation:
    """Reads an ablation file and resolves the recipe of each of its runs.

    Args:
        path: The file.
        command_line: Overrides of recipe keys for all variants.

    Raises:
        RecipeError: with one sentence for each mistake.
    """
    path = find_recipe(path)
    content, problems = read_mapping(path, f"there is no ablation {path}.")
    if not problems:
        problems = _misshapen(path, content)
    if problems:
        raise RecipeError(problems)
    overrides = flat(content.get("overrides") or {})
    variants = {name: flat(changes or {}) for name, changes in content["variants"].items()}
    own = dict(command_line or {})
    problems = _misplaced(path, overrides, variants, own)
    base = normpath(path.parent / content["base"])
    common = overrides | own
    origins = {name: f"{path}: overrides" for name in overrides if name not in own}
    shared: list[str] = []
    try:
        folder = Path(load_recipe(base, common, origins=origins).run.folder) / "ablations" / path.stem
    except RecipeError as error:
        folder, shared = Path("runs"), error.problems
    cells: list[Cell] = []
    for name, changes in variants.items():
        where = f"{path}: variants.{name}"
        run = {"run.folder": str(folder), "run.name": slug(name)}
        try:
            load_recipe(base, common | changes | run, origins=origins | dict.fromkeys([*changes, *run], where))
        except RecipeError as error:
            found = (problem for problem in error.problems if problem not in shared)
            problems += [problem if problem.startswith(where) else f"{where}: {problem}" for problem in found]
    problems = shared + problems
    if problems:
        raise RecipeError(problems)
    for seed in content["seeds"]:
        for name, changes in variants.items():
            run = {"seed": seed, "run.folder": str(folder), "run.name": f"{slug(name)}-seed{seed}"}
            every = common | changes | run
            cells.append(Cell(variant=name, seed=seed, base=base, overrides=every, recipe=load_recipe(base, every)))
    ablation = Ablation(
        path=path,
        title=content.get("title", path.stem),
        base=base,
        common=common,
        variants=variants,
        seeds=tuple(content["seeds"]),
        cells=tuple(cells),
    )
    if problems := _incomparable(ablation):
        raise RecipeError(problems)
    return ablation


def slug(name: str) -> str:
    """A variant's name as part of a folder's name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def _misshapen(path: Path, content: dict[Any, Any]) -> list[str]:
    """What is wrong with the file's own keys, a sentence each."""
    problems = [
        f"{path}: unknown key {name}.{nearest(str(name), list(_KEYS))}" for name in content if name not in _KEYS
    ]
    problems += [
        f"{path}: {name} is missing; it must be {kind}."
        for name, kind in _KEYS.items()
        if name not in content and name not in _OPTIONAL
    ]
    variants, seeds = content.get("variants"), content.get("seeds")
    fits = {
        "title": lambda value: isinstance(value, str) and "\n" not in value.strip(),
        "base": lambda value: isinstance(value, str),
        "overrides": lambda value: value is None or isinstance(value, dict),
        "seeds": lambda value: isinstance(value, list) and len(value) > 0 and all(_is_seed(item) for item in value),
        "variants": lambda value: isinstance(value, dict) and len(value) > 1,
    }
    problems += [
        f"{path}: {name} must be {kind}, not {content[name]!r}."
        for name, kind in _KEYS.items()
        if name in content and not fits[name](content[name])
    ]
    if isinstance(seeds, list) and all(_is_seed(item) for item in seeds):
        problems += [f"{path}: seeds has {seed} twice." for seed in sorted(set(seeds)) if seeds.count(seed) > 1]
    folders: dict[str, str] = {}
    for name, changes in variants.items() if isinstance(variants, dict) else ():
        if not isinstance(name, str) or not slug(name):
            problems.append(
                f"{path}: the variant's name {name!r} must be text with a letter or digit; put it in quotes."
            )
            continue
        if slug(name) in folders:
            problems.append(f"{path}: variants {folders[slug(name)]} and {name} would share the folder {slug(name)}.")
        folders[slug(name)] = name
        if changes is not None and not isinstance(changes, dict):
            problems.append(f"{path}: variants.{name} must be a mapping of recipe keys to values, not {changes!r}.")
    return problems


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _misplaced(
    path: Path, overrides: dict[str, Any], variants: dict[str, dict[str, Any]], command_line: dict[str, str]
) -> list[str]:
    """Keys that an ablation sets itself, or that would undo what the variants differ in."""
    problems = []
    places = {f"{path}: overrides": overrides, "the command line": command_line}
    places |= {f"{path}: variants.{name}": changes for name, changes in variants.items()}
    for where, keys in places.items():
        if "seed" in keys:
            problems.append(f"{where}: seed cannot be set here; list it in seeds.")
        if "run.name" in keys:
            problems.append(f"{where}: run.name cannot be set here; a run is named after its variant and seed.")
        if "run.folder" in keys and "variants." in where:
            problems.append(f"{where}: run.folder cannot differ between variants; set it in overrides.")
    for name in command_line:
        varied = [variant for variant, changes in variants.items() if name in changes]
        if varied:
            problems.append(f"--{name} is what variants differ in ({', '.join(varied)}); change it in {path}.")
    return problems


def _incomparable(ablation: Ablation) -> list[str]:
    """Variants whose recipes are equal, so that one is not what its name says, and losses that no one metric follows."""
    seen: list[tuple[str, dict[str, Any]]] = []
    problems = []
    first, *others = ablation.cells[: len(ablation.variants)]
    for cell in (first, *others):
        keys = what_decides(flat(to_plain(cell.recipe)))
        twin = next((name for name, known in seen if known == keys), None)
        if twin is not None:
            problems.append(f"{ablation.path}: variants {twin} and {cell.variant} are the same recipe; change one.")
        seen.append((cell.variant, keys))
    for cell in others:
        if cell.recipe.optim.loss != first.recipe.optim.loss:
            problems.append(
                f"{ablation.path}: variants {first.variant} and {cell.variant} differ in optim.loss, whose scores "
                "cannot be compared; give all the same."
            )
    return problems
