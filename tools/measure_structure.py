"""Measure the structure of bnprobe's code: how much there is of it, how it is layered, what a command touches.

    python tools/measure_structure.py
    python tools/measure_structure.py --trace
    python tools/measure_structure.py --checkout ../before

Counted in the package ``bnprobe`` of a checkout, by reading its source:

- modules: ``.py`` files; functions: every ``def``, methods and nested ones too; lines: all lines of these files;
- rooms: folders at the top of the package; loose modules: modules beside them;
- import layers: modules in the longest chain of imports that run when a module is loaded; a cycle is one link.
  ``from bnprobe.stats import x`` leads to ``bnprobe.stats``, or to ``bnprobe.stats.x`` where that is a module. Imports
  inside functions, and those for type checkers alone, are counted apart;
- import cycles: groups of modules that import each other;
- shared names: names without a leading underscore that two or more modules define at their top: functions, classes and
  constants;
- record types: data classes, named tuples and pydantic models.

With ``--trace`` it runs two commands on the digits sample, and counts the files and functions of bnprobe that are
called, and the most calls of bnprobe's functions that are open at a time. What runs while a module is loaded does not
count, nor do lambdas and comprehensions.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = "bnprobe"
CHECKOUT = Path(__file__).resolve().parent.parent
TRACED = {
    "scan": "scan digits/sorted.yaml",
    "convert --finetune": "convert digits/sorted.yaml --finetune --steps 6 -o out.safetensors",
}

Graph = Mapping[str, set[str]]


@dataclass
class Module:
    """What is read off one file.

    Attributes:
        imports: Modules that are imported when it is loaded.
        later: Modules that are imported inside functions.
        typing: Modules that are imported for type checkers alone.
        names: Public names that it defines at the top.
    """

    lines: int = 0
    functions: int = 0
    records: int = 0
    imports: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)
    typing: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)


def main() -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=CHECKOUT, metavar="DIR", help="default: this one")
    parser.add_argument("--trace", action="store_true", help="run a scan and a repair, and count what they call")
    parser.add_argument("--names", action="store_true", help="list shared names, cycles and the longest chain")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # in the process that is traced
    given = parser.parse_args()
    checkout = given.checkout.resolve()
    if given.run is not None:
        print_traced(checkout / PACKAGE, given.run)
        return 0
    modules = read_package(checkout / PACKAGE)
    rows = structure(modules)
    if given.trace:
        rows += [row for name, command in TRACED.items() for row in traced(checkout, name, command)]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name.ljust(width)}  {figure:>7,}" for name, figure in rows))
    if given.names:
        print_names(modules)
    return 0


def structure(modules: Mapping[str, Module]) -> list[tuple[str, int]]:
    """The figures of a package, each with what it counts."""
    loaded, in_functions = import_graph(modules), import_graph(modules, later=True)
    tops = {name.split(".")[1] for name in modules if "." in name}
    rooms = {name.split(".")[1] for name in modules if name.count(".") > 1}
    return [
        ("modules", len(modules)),
        ("lines", sum(module.lines for module in modules.values())),
        ("functions", sum(module.functions for module in modules.values())),
        ("rooms", len(rooms)),
        ("loose modules at the top", len([top for top in tops - rooms if not top.startswith("__")])),
        ("import layers", len(longest_chain(loaded))),
        ("import layers, imports inside functions too", len(longest_chain(in_functions))),
        ("import cycles", len(cycles(loaded))),
        ("import cycles, imports inside functions too", len(cycles(in_functions))),
        ("import cycles, those for type checkers too", len(cycles(import_graph(modules, later=True, typing=True)))),
        ("shared names", len(shared_names(modules))),
        ("record types", sum(module.records for module in modules.values())),
    ]


def print_names(modules: Mapping[str, Module]) -> None:
    """What stands behind the figures."""
    loaded, everything = import_graph(modules), import_graph(modules, later=True, typing=True)
    print("\nlongest chain of imports")
    print("\n".join(f"  {' = '.join(link)}" for link in longest_chain(loaded)))
    print("\nimport cycles, with imports inside functions and those for type checkers")
    print("\n".join(f"  {', '.join(cycle)}" for cycle in cycles(everything)) or "  none")
    print("\nshared names")
    print("\n".join(f"  {name}: {', '.join(homes)}" for name, homes in shared_names(modules).items()))


# Reading the source


def read_package(folder: Path) -> dict[str, Module]:
    """Every module of a package, by its dotted name."""
    files = {_module_name(file, folder): file for file in sorted(folder.rglob("*.py"))}
    return {name: _read_module(file, set(files)) for name, file in files.items()}


def _module_name(file: Path, folder: Path) -> str:
    parts = (folder.name, *file.relative_to(folder).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read_module(file: Path, known: set[str]) -> Module:
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    module = Module(
        lines=len(text.splitlines()),
        functions=sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node in nodes),
        records=sum(isinstance(node, ast.ClassDef) and _is_record(node) for node in nodes),
        names={name for statement in tree.body for name in _defined(statement) if not name.startswith("_")},
    )
    _collect_imports(tree, module.imports, module, known)
    return module


def _collect_imports(node: ast.AST, found: set[str], module: Module, known: set[str]) -> None:
    """Put what is imported below a node into ``found``, or into the set of the module that its surroundings ask for."""
    for child in ast.iter_child_nodes(node):
        inner = found
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inner = module.typing
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = module.later
        elif isinstance(child, ast.Import | ast.ImportFrom):
            found |= _imported(child, known)
        _collect_imports(child, inner, module, known)


def _imported(node: ast.Import | ast.ImportFrom, known: set[str]) -> set[str]:
    """Modules of the package that a statement names; imports are absolute, the house style."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & known
    inner = {f"{node.module}.{alias.name}" for alias in node.names}
    return (inner & known) | ({str(node.module)} & known if inner - known else set())


def _is_record(node: ast.ClassDef) -> bool:
    decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    bases = {ast.unparse(base) for base in node.bases}
    return "dataclass" in decorators or bool(bases & {"NamedTuple", "BaseModel", "_Section"})


def _defined(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    yield from (target.id for target in targets if isinstance(target, ast.Name))


# The graph of imports


def import_graph(modules: Mapping[str, Module], later: bool = False, typing: bool = False) -> dict[str, set[str]]:
    """Which module imports which when it is loaded; also inside functions, and for type checkers, if asked for."""
    nothing: set[str] = set()
    return {
        name: module.imports | (module.later if later else nothing) | (module.typing if typing else nothing)
        for name, module in modules.items()
    }


def components(graph: Graph) -> list[tuple[str, ...]]:
    """Groups of modules that reach each other, what is imported first (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[tuple[str, ...]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            position = stack.index(node)
            found.append(tuple(sorted(stack[position:])))
            del stack[position:]

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found


def cycles(graph: Graph) -> list[tuple[str, ...]]:
    """Groups of two or more modules that import each other."""
    return [group for group in components(graph) if len(group) > 1]


def longest_chain(graph: Graph) -> list[tuple[str, ...]]:
    """The longest chain of imports, from the top down; each link is a module, or a group that imports each other."""
    chains: dict[str, list[tuple[str, ...]]] = {}
    for group in components(graph):
        below = [chains[other] for node in group for other in sorted(graph[node]) if other not in group]
        chain = [group, *max(below, key=len, default=[])]
        chains.update(dict.fromkeys(group, chain))
    return max(chains.values(), key=len, default=[])


def shared_names(modules: Mapping[str, Module]) -> dict[str, list[str]]:
    """Public names that two or more modules define, with these modules."""
    homes = defaultdict(list)
    for module_name, module in modules.items():
        for name in module.names - {"annotations"}:
            homes[name].append(module_name)
    return {name: found for name, found in sorted(homes.items()) if len(found) > 1}


# Tracing a command


def traced(checkout: Path, name: str, command: str) -> list[tuple[str, int]]:
    """Files and functions that a command calls, and its deepest chain of calls."""
    with tempfile.TemporaryDirectory(prefix="bnprobe-") as folder:
        shutil.copytree(checkout / "sample_configs", folder, dirs_exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        script = [sys.executable, str(Path(__file__).resolve()), "--checkout", str(checkout), "--run"]
        done = subprocess.run(
            [*script, *command.split()], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
    files, functions, depth = map(int, done.stdout.split())
    return [(f"{name}: files", files), (f"{name}: functions", functions), (f"{name}: calls deep", depth)]


def print_traced(package: Path, arguments: list[str]) -> None:
    """Run a command in this process, and print the files, the functions and the depth."""
    import runpy

    called: set[CodeType] = set()
    prefix = f"{package}{os.sep}"
    depth = deepest = loading = 0

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth, deepest, loading
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(prefix):
            return
        change = 1 if event == "call" else -1
        if code.co_name == "<module>" and not code.co_filename.endswith("__main__.py"):
            loading += change
        elif not loading and not code.co_name.startswith("<"):
            depth += change
            deepest = max(deepest, depth)
            called.add(code)

    sys.argv = [PACKAGE, *arguments]
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
        sys.setprofile(watch)
        try:
            runpy.run_module(PACKAGE, run_name="__main__", alter_sys=True)
        finally:
            sys.setprofile(None)
    files = {code.co_filename for code in called}
    print(len(files), len(called), deepest, file=output)


if __name__ == "__main__":
    sys.exit(main())
