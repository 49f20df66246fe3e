"""The house: what the top level holds, who imports whom, and that the README tells the truth."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("models", "datamodules", "lightning_modules", "experiments")
# The arrows run one way; models and datamodules never meet.
MAY_IMPORT = {
    "models": {"models"},
    "datamodules": {"datamodules"},
    "lightning_modules": {"lightning_modules", "models"},
    "experiments": set(PACKAGES),
}
# models are pure torch, and CLIP's wrapper knows open_clip
# but for the one that writes and reads the cascade as a folder, for those who have nothing else of this repository
KNOWS_FILES = {"pretrained.py"}
FOREIGN_TO_MODELS = {"lightning", "omegaconf", "wandb", "decord", "av", "PIL", "pathlib", "os", "io"}


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        up = (imported(path) & set(PACKAGES)) - MAY_IMPORT[package]
        assert not up, f"{path.relative_to(ROOT)} imports {up}"


def test_models_are_pure_torch() -> None:
    for path in (ROOT / "models").rglob("*.py"):
        allowed = {"pathlib"} if path.name in KNOWS_FILES else set()
        assert not imported(path) & FOREIGN_TO_MODELS - allowed, path.name


def targets() -> dict[str, str]:
    """Targets of the Makefile with their help line."""
    text = (ROOT / "Makefile").read_text()
    return dict(re.findall(r"^([a-z0-9-]+):[^#\n]*## (.*)$", text, re.MULTILINE))


def test_every_target_has_a_line_of_help() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"\.PHONY:((?:.*\\\n)*.*)", text)
    assert phony
    assert set(phony[1].replace("\\", " ").split()) == set(targets())
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(re.search(rf"^  {name} +\S", shown, re.MULTILINE) for name in targets())


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    """Targets in backticks or blocks of code; pictures and links, from where the page is; files in backticks."""
    text = page.read_text()
    used = set(re.findall(r"(?:^|`)make ([a-z][a-z0-9-]+)", text, re.MULTILINE))
    assert used <= set(targets()), used - set(targets())
    links = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r'<img[^>]* src="([^"]+)"', text)
    for link in links:
        assert (page.parent / link).exists(), link
    names = re.findall(r"`((?:models|datamodules|lightning_modules|experiments|tests|docs)/[\w./]+\.\w+)`", text)
    for name in names:
        assert (ROOT / name).is_file(), name
    if page.name == "README.md" and page.parent == ROOT:
        assert {"demo", "test", "generate"} <= used and links and names


def test_environment_yml_leads_to_the_same_packages() -> None:
    text = (ROOT / "environment.yml").read_text()
    assert "--editable .[dev]" in text and "--constraint constraints.txt" in text


def test_every_bound_has_a_pin() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["dev"]
    pins = {line.split("==")[0].replace("_", "-").lower() for line in (ROOT / "constraints.txt").read_text().split()}
    for requirement in needed:
        name = re.split(r"[<>=\[]", requirement)[0].replace("_", "-").lower()
        assert name in pins, name
