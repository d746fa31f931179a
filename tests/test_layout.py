"""The layout of the packages: no import cycles, no long functions, no long files."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 700


@pytest.fixture(params=["configuration_visualchat", "modeling_visualchat", "processing_visualchat"])
def modules(request):
    """Each module of a package by its dotted name, parsed."""
    files = sorted((ROOT / request.param).rglob("*.py"))
    assert files
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def imported_modules(name, path, names):
    """The modules of the package that a module imports, anywhere in it."""
    package = name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            candidates = [f"{module}.{alias.name}" for alias in node.names]
            candidates = [found if found in names else module for found in candidates]
        elif isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        else:
            continue
        for module in candidates:
            found = module if module in names else f"{module}.__init__"
            if found in names and found != name:
                yield found


def test_no_module_imports_itself_through_others(modules):
    graph = {name: set(imported_modules(name, path, modules)) for name, path in modules.items()}
    assert any(graph.values())
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_functions_and_files_are_short(modules):
    long = []
    for path in modules.values():
        text = path.read_text()
        if len(text.splitlines()) > MAX_FILE_LINES:
            long.append(f"{path}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = node.end_lineno - body[0].lineno + 1 + (node.body[0].lineno - node.lineno) if body else 0
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path}:{node.lineno}: {node.name} has {lines} lines")
    assert not long


def test_every_package_is_installed(modules):
    packages = {name.removesuffix(".__init__") for name in modules if name.endswith(".__init__")}
    setup = (ROOT / "setup.py").read_text()
    assert packages and all(f'"{package}"' in setup for package in packages)
