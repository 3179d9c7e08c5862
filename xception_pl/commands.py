"""What all commands share: their arguments and how they end. Imports no torch."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from xception_pl.recipe import Recipe, RecipeError, describe, load_recipe, nearest, schema

FAILED = 1
MISTAKE = 2


@dataclass
class Arguments:
    """A command line, split: a recipe, the command's own flags and options, and overrides of recipe keys."""

    recipe: str
    flags: set[str] = field(default_factory=set)
    options: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def line(self, command: str) -> str:
        """The command line that gives these arguments."""
        words = ["python", "-m", f"xception_pl.{command}", self.recipe]
        words += [f"--{name}={value}" for name, value in self.overrides.items()]
        words += [word for name, value in self.options.items() for word in (f"--{name}", value)]
        return shlex.join([*words, *(f"--{flag}" for flag in sorted(self.flags))])

    def with_option(self, name: str, value: str) -> "Arguments":
        """The same with one option set."""
        return replace(self, options=self.options | {name: value})

    def load(self) -> Recipe:
        """The recipe with the overrides.

        Raises:
            RecipeError: with one sentence for each mistake, on the command line and in the recipe.
        """
        problems = list(self.problems)
        try:
            if self.recipe:
                recipe = load_recipe(self.recipe, self.overrides)
        except RecipeError as error:
            problems += error.problems
        if problems:
            raise RecipeError(problems)
        return recipe


def split_arguments(
    argv: Sequence[str],
    *,
    flags: Sequence[str] = (),
    options: Sequence[str] = (),
    example: str = "recipes/quickstart.yaml",
) -> Arguments:
    """Splits `RECIPE [--flag] [--option VALUE] [--key.sub=value …]`; `Arguments.load` reports what is wrong.

    argparse stops at the first mistake; this collects them all, and names the nearest key.
    """
    keys = [key.name for key in schema()]
    arguments, recipes = Arguments(recipe=""), []
    problems = arguments.problems
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            recipes.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        if name.replace("_", "-") in flags:
            arguments.flags.add(name.replace("_", "-"))
            if equals:
                problems.append(f"--{name} takes no value.")
            continue
        if not equals and rest and not rest[0].startswith("--"):
            value, equals = rest.pop(0), "="
        if name not in keys and name not in options:
            problems.append(f"unknown option --{name}.{nearest(name, [*keys, *flags, *options])}")
        elif not equals:
            problems.append(f"--{name} needs a value: --{name}=VALUE.")
        elif name in options:
            arguments.options[name] = value
        else:
            arguments.overrides[name] = value
    if len(recipes) != 1:
        problems.insert(
            0,
            f"one recipe is needed, for example {example}, not {len(recipes)}: {' '.join(recipes)}".rstrip(": ") + ".",
        )
    arguments.recipe = recipes[0] if recipes else ""
    return arguments


class Parser(argparse.ArgumentParser):
    """For commands that take no recipe: says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"error: {message}\n")


def recipe_help(command: str, summary: str, own: dict[str, str]) -> str:
    """Help of a command that takes a recipe: its own options, then every key with type, default and unit."""
    lines = [
        f"usage: python -m xception_pl.{command} RECIPE [OPTIONS] [--key.sub=value …]",
        "",
        summary,
        "",
        "options:",
    ]
    lines += [f"  {name:<22}{text}" for name, text in own.items()]
    section = None
    docs = {
        name: (kind.__doc__ or "")
        for name, kind in Recipe.__annotations__.items()
        if hasattr(kind, "__dataclass_fields__")
    }
    for key in schema():
        if key.name.rpartition(".")[0] != section:
            section = key.name.rpartition(".")[0]
            lines += [
                "",
                f"{section}: {docs[section].strip()}" if section else "recipe keys, in YAML or as --key.sub=value:",
            ]
        lines += [
            f"  --{key.name}",
            f"      {key.doc}",
            f"      ({describe(key.type)}; default: {plain_text(key.default)})",
        ]
    return "\n".join(lines)


def plain_text(value: Any) -> str:
    """A default as YAML writes it."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


@contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, where that is a terminal; yields what is told of each few images that are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


def print_error(sentence: object) -> None:
    """A line on standard error, its end in the same piece: several processes may write there at once."""
    sys.stderr.write(f"error: {sentence}\n")


@contextmanager
def one_sentence_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns users' mistakes into one line each on standard error and exit code 2."""
    try:
        yield
    except RecipeError as error:
        for problem in error.problems:
            print_error(problem)
        raise SystemExit(MISTAKE) from None
    except kinds as error:
        print_error(error)
        raise SystemExit(MISTAKE) from None
