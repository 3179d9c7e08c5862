"""Deviations as recipes flag them: a comment `# [U] topic: reason` or `# [departs] topic: reason` on a key's line.

[U] marks a value that the paper does not state, [departs] one that differs from what it states.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from xception_pl.recipe import find_recipe

_FLAG = re.compile(r"#\s*\[(U|departs)\]\s*([^:]+):\s*(.+)$")


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flagged key of a recipe."""

    kind: str
    """U or departs."""
    key: str
    topic: str
    reason: str
    file: str
    """The recipe that says so: the one asked for, or one that it builds on."""


def read_flags(path: str) -> list[Flag]:
    """The flags of a recipe and of those that it builds on; a key that a recipe sets loses the flag of its base.

    Raises:
        ValueError: a flag stands on a line with no key of its own.
    """
    lines = find_recipe(path).read_text(encoding="utf-8").splitlines()
    keys = dict(_keys("\n".join(lines)))
    flags = []
    for number, line in enumerate(lines):
        found = _FLAG.search(line)
        if found is None:
            continue
        if number not in keys:
            raise ValueError(f"{path}, line {number + 1}: a flag must stand behind the key that it is about.")
        kind, topic, reason = found.groups()
        flags.append(Flag(kind=kind, key=keys[number], topic=topic.strip(), reason=reason.strip(), file=path))
    base = base_of(path)
    if base is None:
        return flags
    return [flag for flag in read_flags(base) if flag.key not in keys.values()] + flags


def base_of(path: str) -> str | None:
    """The recipe that a recipe builds on, as a path like its own."""
    content = yaml.safe_load(find_recipe(path).read_text(encoding="utf-8"))
    if "base" not in content:
        return None
    parts: list[str] = []
    for part in (Path(path).parent / content["base"]).parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return str(Path(*parts))


def _keys(text: str) -> Iterator[tuple[int, str]]:
    """Line, counted from 0, and dotted name of each leaf; of several on a line the last."""

    def walk(node: yaml.Node | None, prefix: str) -> Iterator[tuple[int, str]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(value, yaml.MappingNode):
                    yield from walk(value, f"{prefix}{key.value}.")
                else:
                    yield value.end_mark.line, f"{prefix}{key.value}"

    yield from walk(yaml.compose(text), "")
