"""Who may import whom: the arrows of the house."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path("xception_pl")
COMMANDS = {
    "fit",
    "verify_resume",
    "spectrum",
    "bench",
    "evaluate",
    "predict",
    "export",
    "ablate",
    "reproduce",
    "submit",
    "mirror",
}
# A room may import itself, what stands here, and the torch-free `config.py` of each room.
EVERYONE_MAY_IMPORT = {"durable"}  # these import nothing of ours and no library
MAY_IMPORT = {
    "durable": set(),
    "nets": set(),
    "optim": set(),
    "compiled": set(),
    "kernels": {"nets", "compiled"},
    "metrics": set(),
    "data": {"compiled"},
    "recipe": set(),
    "commands": {"recipe"},
    "module": {"nets", "optim", "metrics"},
    "weights": {"nets", "optim", "module", "data"},
    "prediction": {"data", "weights", "nets", "kernels"},
    "evaluation": {"data", "nets", "weights", "prediction"},
    "run": {"recipe", "commands", "module", "nets", "data", "weights"},
    "ablation": {"recipe", "run"},
    "build": {"recipe", "module", "nets", "kernels", "data", "weights", "run"},
    "training": {"recipe", "commands", "module", "data", "weights", "run", "build"},
}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in ("__init__.py", "__main__.py")]


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it, without the package's own name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("xception_pl.") for name in names if name.startswith("xception_pl.")}


def room_of(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_follow_the_arrows(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported(path):
        config = name.split(".")[1:2] == ["config"]
        if config or room_of(name) == room or room_of(name) in EVERYONE_MAY_IMPORT:
            continue
        assert room_of(name) not in COMMANDS, f"{path} imports the command {name}"
        if room not in COMMANDS:
            assert room_of(name) in MAY_IMPORT[room], f"{path} imports {name}"


@pytest.mark.parametrize("path", [path for path in FILES if path.name in ("config.py", "durable.py")], ids=str)
def test_configuration_imports_no_library(path: Path) -> None:
    modules = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not {module for module in modules if module.partition(".")[0] in ("torch", "lightning", "numpy", "datasets")}
