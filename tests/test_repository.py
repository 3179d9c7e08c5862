"""What a clone and a wheel promise."""

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

import xception_pl


def test_the_citation_is_valid() -> None:
    command = [Path(sys.executable).with_name("cffconvert"), "--validate"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(Path("CITATION.cff").read_text())["version"] == xception_pl.__version__


def test_the_changelog_knows_the_version() -> None:
    assert f"## {xception_pl.__version__}" in Path("CHANGELOG.md").read_text()


def test_the_readme_shows_the_recipe_as_it_is() -> None:
    assert Path("recipes/quickstart.yaml").read_text().rstrip() in Path("README.md").read_text()


def test_pins_name_versions_and_no_place() -> None:
    lines = [line for line in Path("constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[\w.]+( ; .+)?", line) for line in lines)


@pytest.mark.parametrize(
    "document", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *map(str, Path("docs").rglob("*.md"))]
)
def test_links_in_documents_lead_somewhere(document: str) -> None:
    path = Path(document)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|<img src=\"([^\"]+)\"", path.read_text())
    for target in (first or second for first, second in targets):
        assert target.startswith("http") or (path.parent / target).exists(), f"{document}: {target}"


def test_the_wheel_knows_every_package() -> None:
    listed = set(tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.parts) for path in Path("xception_pl").rglob("__init__.py")}
    assert listed == found | {"xception_pl.recipes"}


@pytest.mark.parametrize("arguments", [("help",), ("-n", "quickstart"), ("-n", "test")])
def test_make_has_its_targets(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["make", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    """Built, installed where no checkout is, and asked for the shipped recipe; the libraries are lent by this environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), "."]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, env=environment)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    # Path entries alone: an editable installation of this checkout works by a hook, which a .pth line does not lend.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "lent.pth").write_text("\n".join(libraries))
    command = [
        python,
        "-m",
        "xception_pl.fit",
        "recipes/quickstart.yaml",
        "--trainer.max_steps=3",
        "--trainer.limit_val_batches=1",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "written to runs/quickstart/" in done.stdout
    where = subprocess.run(
        [python, "-c", "import xception_pl; print(xception_pl.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(tmp_path))
