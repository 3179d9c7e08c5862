"""Recipes: YAML and overrides into typed, checked configuration. Imports no torch, so that help and errors come at once.

A recipe is a YAML mapping with the keys of `Recipe`. `base: other.yaml` (relative to the recipe) builds on another recipe.
"""

import difflib
import math
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

from xception_pl.data import config as data_config
from xception_pl.data.config import DataConfig
from xception_pl.nets import config as nets_config
from xception_pl.nets.config import ModelConfig
from xception_pl.optim import config as optim_config
from xception_pl.optim.config import OptimConfig
from xception_pl.run import config as run_config
from xception_pl.run.config import RunConfig, TrainerConfig


@dataclass(kw_only=True)
class Recipe:
    """Everything that decides a run."""

    seed: int = 0
    """Seed of the weights, the order of the images, crops and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_yaml(self) -> str:
        """The recipe as YAML that reads back to an equal recipe."""
        return yaml.safe_dump(to_plain(self), sort_keys=False, width=120)


class RecipeError(Exception):
    """A user's mistakes, one sentence each, all at once."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Key:
    """One leaf of the schema."""

    name: str
    type: Any
    default: Any
    doc: str


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries of YAML's own types (tuples become lists)."""
    return {key: _plain(value) for key, value in asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def schema(config: type = Recipe, prefix: str = "") -> Iterator[Key]:
    """The leaves of a configuration dataclass, with types, defaults and the docstrings under the fields."""
    hints = get_type_hints(config)
    docs = {
        p.arg_name: " ".join((p.description or "").split()) for p in docstring_parser.parse_from_object(config).params
    }
    for item in fields(config):
        if is_dataclass(hints[item.name]):
            yield from schema(hints[item.name], f"{prefix}{item.name}.")
        else:
            assert item.default is not MISSING
            yield Key(prefix + item.name, hints[item.name], item.default, docs[item.name])


def find_recipe(path: str | Path) -> Path:
    """The file that a recipe's name means: itself, or, without a clone, the shipped one for `recipes/…`."""
    path = Path(path)
    if not path.exists() and path.parts[:1] == ("recipes",):
        package = Path(__file__).parent  # a wheel has the recipes inside the package, a checkout beside it
        return next((folder / path for folder in (package, package.parent) if (folder / path).exists()), path)
    return path


def load_recipe(
    path: str | Path, overrides: Mapping[str, Any] | None = None, *, origins: Mapping[str, str] | None = None
) -> Recipe:
    """Reads a recipe, applies overrides (dotted key to text or value), checks everything that needs no torch.

    Args:
        path: The recipe.
        overrides: Values over those of the recipe.
        origins: Where an override was written, for messages; those not named here are of the command line.

    Raises:
        RecipeError: with one sentence for each mistake.
    """
    path = find_recipe(path)
    leaves, problems = _read_leaves(path, ())
    leaves |= {key: (value, (origins or {}).get(key, f"--{key}")) for key, value in (overrides or {}).items()}
    recipe, mistyped = _typed(leaves)
    recipe.run.name = recipe.run.name or path.stem
    problems += mistyped.values()
    # A section with a mistyped key holds a default in its place: its values together would be judged wrongly.
    problems += check(recipe, skip={name.partition(".")[0] for name in mistyped})
    if problems:
        raise RecipeError(problems)
    return recipe


def recipe_from_plain(plain: dict[str, Any], where: str = "stored recipe") -> Recipe:
    """The inverse of `to_plain`, as strict as `load_recipe`, without its checks of this machine.

    Args:
        plain: The values; what is missing has its default.
        where: They come from, for messages.

    Raises:
        RecipeError: with one sentence for each mistake.
    """
    recipe, problems = _typed(dict(_flatten(plain, "", where)))
    if problems:
        raise RecipeError(list(problems.values()))
    return recipe


def check(recipe: Recipe, skip: Collection[str] = ()) -> list[str]:
    """What is wrong with the values together: one sentence each, naming the keys; sections in `skip` are left out."""
    found = {
        "model": nets_config.check(recipe.model),
        "optim": optim_config.check(recipe.optim),
        "data": data_config.check(recipe.data),
        "trainer": run_config.check_trainer(recipe.trainer),
        "run": run_config.check_run(recipe.run),
    }
    found["seed"] = [] if 0 <= recipe.seed < 2**63 else [f"seed must be 0 or more and below 2**63, not {recipe.seed}."]
    problems = [problem for section, sentences in found.items() if section not in skip for problem in sentences]
    if (
        recipe.model.kernels == "fused"
        and recipe.trainer.precision == "64-true"
        and not {"model", "trainer"} & set(skip)
    ):
        problems.append(
            "model.kernels fused does not go with trainer.precision 64-true: fused kernels have no float64."
        )
    if recipe.data.class_weights is not None and recipe.optim.loss != "sigmoid" and not {"data", "optim"} & set(skip):
        problems.append(
            f"data.class_weights weighs the classes of label lists, and optim.loss {recipe.optim.loss} has one label an "
            "image: leave it out or set optim.loss to sigmoid."
        )
    if not problems and not skip and recipe.trainer.devices != "auto":
        problems += check_batch(recipe, recipe.trainer.devices)
    return problems + _check_bounds(recipe, skip)


def _check_bounds(recipe: Recipe, skip: Collection[str]) -> list[str]:
    """Whether a source that is away for less than `data.retry_seconds` is waited for by all who wait."""
    tries, last = recipe.data.retry_seconds, data_config.LAST_TRIES_SECONDS
    waits = {
        "trainer.timeout_seconds": recipe.trainer.timeout_seconds,
        "run.stall_seconds": recipe.run.stall_seconds,
    }
    short = [
        f"{key} {bound:g}"
        for key, bound in waits.items()
        if tries + last > bound and not {"data", key.partition(".")[0]} & set(skip)
    ]
    if not short:
        return []
    return [
        f"data.retry_seconds {tries:g} must be at least {last:g} s below {' and '.join(short)}: a device that still tries "
        "to read would be given up."
    ]


def check_batch(recipe: Recipe, devices: int, nodes: int | None = None) -> list[str]:
    """Whether the global batch divides over `devices` a node, nodes (None: the recipe's) and accumulated batches."""
    if nodes is None:
        nodes = 1 if recipe.trainer.num_nodes == "auto" else recipe.trainer.num_nodes
    batch, fixed = recipe.data.global_batch, recipe.trainer.accumulate_grad_batches
    accumulate, most = 1 if fixed == "auto" else fixed, recipe.trainer.max_device_batch
    parts = devices * nodes * accumulate
    if batch % parts:
        accumulated = "" if fixed == "auto" else f" × trainer.accumulate_grad_batches {accumulate}"
        return [
            f"data.global_batch {batch} does not divide by trainer.devices {devices} × trainer.num_nodes {nodes}{accumulated} = "
            f"{parts}; choose a multiple of that."
        ]
    if most is not None and fixed != "auto" and batch // parts > most:
        return [
            f"trainer.max_device_batch is {most}, but data.global_batch {batch} on {devices * nodes} devices with "
            f"trainer.accumulate_grad_batches {fixed} is {batch // parts} a device; set trainer.accumulate_grad_batches to auto."
        ]
    return []


def accumulated_batches(recipe: Recipe, ranks: int) -> int:
    """Micro-batches an optimiser step on that many devices: the recipe's, or the fewest that trainer.max_device_batch allows."""
    if recipe.trainer.accumulate_grad_batches != "auto":
        return recipe.trainer.accumulate_grad_batches
    a_device, most = recipe.data.global_batch // ranks, recipe.trainer.max_device_batch
    if most is None:
        return 1
    return next(count for count in range(1, a_device + 1) if a_device % count == 0 and a_device // count <= most)


def nearest(name: str, known: list[str]) -> str:
    """` Did you mean X?` for the known name closest to `name`, or nothing."""
    ends = {key.rpartition(".")[2]: key for key in known}
    whole = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    last = difflib.get_close_matches(name.rpartition(".")[2], list(ends), n=1, cutoff=0.6)
    found = whole or [ends[end] for end in last]
    return f" Did you mean {found[0]}?" if found else ""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where PyYAML would take the last in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            problem = None
            if not isinstance(key_node, yaml.ScalarNode):
                problem = "a key must be a word"
            elif key_node.value in seen:
                problem = f"the key {key_node.value} stands twice"
            if problem is not None:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Leaves = dict[str, tuple[Any, str]]
"""Dotted key to its value and where it was written."""


def read_mapping(path: Path, missing: str) -> tuple[dict[Any, Any], list[str]]:
    """A YAML file that holds a mapping (an empty file is an empty one), and a sentence for what makes it unreadable.

    Args:
        path: The file.
        missing: What to say where there is no such file; the recipes that there are follow.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except FileNotFoundError:
        return {}, [missing + _recipes_beside(path)]
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"{path} cannot be read as a recipe: {error}."]
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        return {}, [f"{path}{line}: not valid YAML: {error.problem}."]
    except (yaml.YAMLError, RecursionError) as error:
        return {}, [f"{path} is not valid YAML: {' '.join(str(error).split())}."]
    if content is None:
        content = {}
    if not isinstance(content, dict):
        return {}, [f"{path} must be a mapping of keys to values, not {type(content).__name__}."]
    return content, []


def _read_leaves(path: Path, above: tuple[Path, ...]) -> tuple[_Leaves, list[str]]:
    """The leaves of a recipe file over those of its base."""
    if path.resolve() in above:
        return {}, [f"{above[-1]}: base leads back to {path}; remove the circle."]
    where = f"{above[-1]}: base: " if above else ""
    content, unreadable = read_mapping(path, f"{where}there is no recipe {path}.")
    if unreadable:
        return {}, unreadable
    leaves: _Leaves = {}
    problems: list[str] = []
    base = content.pop("base", None)
    if base is not None:
        if isinstance(base, str) and base:
            leaves, problems = _read_leaves(path.parent / base, (*above, path.resolve()))
        else:
            problems = [f"{path}: base must be the path of another recipe, not {base!r}."]
    try:
        own = list(_flatten(content, "", str(path)))
    except RecursionError:
        return leaves, [*problems, f"{path}: a mapping contains itself."]
    names = [name for name, _ in own]
    problems += [f"{path}: the key {name} stands twice." for name in dict.fromkeys(names) if names.count(name) > 1]
    leaves |= dict(own)
    return leaves, problems


def _recipes_beside(path: Path) -> str:
    found = sorted(str(item) for item in path.parent.glob("*.yaml")) or sorted(
        str(item) for item in Path("recipes").glob("*.yaml")
    )
    return f" There are {', '.join(found)}." if found else ""


def flat(content: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    return {name: value for name, (value, _) in _flatten(content, "", "")}


def _flatten(content: dict[Any, Any], prefix: str, where: str) -> Iterator[tuple[str, tuple[Any, str]]]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.", where)
        else:
            yield f"{prefix}{name}", (value, where)


def _typed(leaves: _Leaves) -> tuple[Recipe, dict[str, str]]:
    """A recipe from untyped leaves, and a sentence for each that does not fit.

    jsonargparse says whether a value fits its type, and converts it.
    """
    keys = {key.name: key for key in schema()}
    problems: dict[str, str] = {}
    values: dict[str, Any] = {}
    for name, (value, where) in leaves.items():
        if name not in keys:
            if not any(known.startswith(f"{name}.") for known in keys):
                problems[name] = f"{where}: unknown key {name}.{nearest(name, list(keys))}"
            elif value is not None and value != {}:
                problems[name] = f"{where}: {name} is a section with keys of its own, not {value!r}."
            continue
        try:
            values[name] = _convert(keys[name], value)
        except ValueError:
            problems[name] = f"{where}: {name} must be {describe(keys[name].type)}, not {value!r}."
    return _build(Recipe, "", values), problems


def _convert(key: Key, value: Any) -> Any:
    if value is None or value == "null":
        if type(None) not in get_args(key.type):
            raise ValueError("null")
        return None
    nested: Any = value
    for part in reversed(key.name.split(".")):
        nested = {part: nested}
    try:
        converted = _reader(key).parse_object(nested)[key.name]
    except Exception as error:  # jsonargparse raises argparse's errors and its own
        raise ValueError(str(error)) from error
    if isinstance(converted, float) and not math.isfinite(converted):
        raise ValueError("not finite")
    return converted


@cache
def _reader(key: Key) -> ArgumentParser:
    """A parser that knows this key alone: jsonargparse goes through all the keys it knows for each value it reads."""
    reader = ArgumentParser(exit_on_error=False)
    reader.add_argument(f"--{key.name}", type=key.type, default=key.default)
    return reader


def _build(config: type, prefix: str, values: dict[str, Any]) -> Any:
    hints = get_type_hints(config)
    arguments = {}
    for item in fields(config):
        name = prefix + item.name
        if is_dataclass(hints[item.name]):
            arguments[item.name] = _build(hints[item.name], f"{name}.", values)
        elif name in values:
            arguments[item.name] = values[name]
    return config(**arguments)


def describe(kind: Any) -> str:
    """A type in words, for messages and help."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(describe(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        options = [str(option) for option in get_args(kind)]
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    if get_origin(kind) is tuple:
        return f"a list, each item {describe(get_args(kind)[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words[kind]
