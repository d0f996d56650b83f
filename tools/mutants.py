"""Mutants: small seeded faults in the package, each of which the test suite must catch.

The table is ``mutants.yaml``. A mutant names a definition and a fragment of source inside it, not a file, so that it
survives a move of its module. Faults are planted in a temporary copy of the checkout, one at a time.

    python tools/mutants.py check                          is every mutant found in today's code? (seconds)
    python tools/mutants.py run --json mutants.json        plant each and run the tests of its area, then wider ones
    python tools/mutants.py run --only 'ladder-*'          some of them; results of the others in the file are kept
    python tools/mutants.py run --quick                    with the tests named first, else those of the area
    python tools/mutants.py run --json FILE --rest         those on which the file has no failing test
    python tools/mutants.py run --tests tests/unit/stats   with these tests only
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fnmatch
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".yaml")
PACKAGE = "bnprobe"

# Most of the time of a short run goes into the import of torch: the server has imported it, and forks.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["torch.testing", "torch.utils.data", "scipy.stats", "scipy.optimize", "pydantic", "typer"]
)

_NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "build", "dist")


class NotFoundError(Exception):
    """The code has no such place, or several."""


@dataclass(frozen=True)
class Mutant:
    """One seeded fault.

    Attributes:
        name: Unique, with hyphens.
        area: Key of the table's ``areas``: which tests should catch it.
        definition: Function, method ("Class.method"), class or constant, by its name within its module.
        find: Source inside the definition, outside docstrings; white space does not matter.
        replace: What stands there instead.
        within: Part of the file's path, where name and source alone would fit in two files.
        first: Test files to run before those of the area, by name or by the end of their path.
    """

    name: str
    area: str
    definition: str
    find: str
    replace: str
    within: str = ""
    first: tuple[str, ...] = ()


@dataclass(frozen=True)
class Definition:
    """A named part of a file, from byte ``start`` to byte ``end``."""

    path: Path
    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Place:
    """The bytes of a file that a mutant replaces."""

    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Result:
    """What became of a mutant.

    Attributes:
        outcome: "caught"; "survived"; "not found" in the code; "timed out"; "to confirm": a test failed, and has not
            been run without the mutant yet; "unclear": it fails without the mutant too.
        test: The first failing test.
        note: Why it was not found.
    """

    name: str
    area: str
    definition: str
    outcome: str
    path: str = ""
    test: str = ""
    note: str = ""
    seconds: float = 0.0


class Code:
    """The definitions of all Python files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sources: dict[Path, bytes] = {}
        self._docstrings: dict[Path, list[tuple[int, int]]] = {}
        self._definitions: list[Definition] = []
        for path in sorted(folder.rglob("*.py")):
            self._read(path)

    def find(self, mutant: Mutant) -> Place:
        """The one place of a mutant.

        Raises:
            NotFoundError: There is none, or there are several; says where else the source stands.
        """
        known = [one for one in self._definitions if mutant.within in one.path.as_posix()]
        named = [one for one in known if one.name == mutant.definition]
        found = [places[0] for one in named if len(places := self._places(one, mutant.find)) == 1]
        if len(found) == 1:
            return found[0]
        if found:
            files = ", ".join(str(place.path.relative_to(self._folder)) for place in found)
            raise NotFoundError(f"{mutant.definition} has the source in several places ({files}): say within")
        others = [one for one in known if self._places(one, mutant.find)]
        elsewhere = ", ".join(f"{one.name} ({one.path.relative_to(self._folder)})" for one in others)
        what = f"{mutant.definition} does not hold the source just once" if named else f"no {mutant.definition}"
        raise NotFoundError(f"{what}; the source stands in: {elsewhere or 'no definition'}")

    def mutated(self, mutant: Mutant) -> tuple[Path, bytes]:
        """The file of a mutant, and its content with the fault.

        Raises:
            NotFoundError: As ``find``.
            ValueError: The replacement is no Python, or changes nothing.
        """
        place = self.find(mutant)
        before = self._sources[place.path]
        after = before[: place.start] + mutant.replace.encode() + before[place.end :]
        try:
            changed = ast.dump(ast.parse(after)) != ast.dump(ast.parse(before))
        except SyntaxError as error:
            raise ValueError(f"{mutant.name}: the replacement is no Python ({error}).") from error
        if not changed:
            raise ValueError(f"{mutant.name}: the replacement changes nothing.")
        return place.path, after

    def _read(self, path: Path) -> None:
        source = path.read_bytes()
        starts = [0, *(match.end() for match in re.finditer(rb"\n", source))]
        tree = ast.parse(source)
        self._sources[path], self._docstrings[path] = source, []

        def span(node: Any) -> tuple[int, int]:
            return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

        def visit(node: ast.AST, prefix: str) -> None:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                    self._docstrings[path].append(span(child))
                names = _names(child)
                self._definitions += [Definition(path, prefix + name, *span(child)) for name in names]
                opens = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                visit(child, f"{prefix}{names[0]}." if opens else prefix)

        visit(tree, "")

    def _places(self, definition: Definition, fragment: str) -> list[Place]:
        source, docstrings = self._sources[definition.path], self._docstrings[definition.path]
        matches = _pattern(fragment).finditer(source, definition.start, definition.end)
        return [
            Place(definition.path, *match.span())
            for match in matches
            if not any(start <= match.start() < end for start, end in docstrings)
        ]


def _names(node: ast.AST) -> list[str]:
    """What a statement defines: a function, a class or constants."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _pattern(fragment: str) -> re.Pattern[bytes]:
    """The tokens of a fragment with any white space between them; names and numbers whole."""
    tokens = re.findall(r"\w+|[^\w\s]", fragment)
    body = r"\s*".join(map(re.escape, tokens))
    start, end = (r"\b" if token[0].isalnum() or token[0] == "_" else "" for token in (tokens[0], tokens[-1]))
    return re.compile(f"{start}{body}{end}".encode())


@dataclass(frozen=True)
class Table:
    """The mutants, and which tests are run for them.

    Attributes:
        areas: Tests by area; paths that are not there are left out.
        wider: Tests to run where those of the area catch nothing.
    """

    mutants: tuple[Mutant, ...]
    areas: dict[str, list[str]]
    wider: list[str]


def read_table(path: Path = TABLE) -> Table:
    """The table in a YAML file."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    mutants = tuple(Mutant(**{**entry, "first": tuple(entry.get("first", ()))}) for entry in content["mutants"])
    repeated = [name for name, count in Counter(mutant.name for mutant in mutants).items() if count > 1]
    unknown = {mutant.area for mutant in mutants} - content["areas"].keys()
    if repeated or unknown:
        raise ValueError(f"{path}: names used twice: {repeated}; areas that are not in the table: {sorted(unknown)}.")
    return Table(mutants, content["areas"], content["wider"])


def _pytest(arguments: Sequence[str], folder: Path, output: str) -> None:
    """Run tests in this process, which has a session of its own: all that they start can be ended with it."""
    import pytest

    os.setsid()
    os.chdir(folder)
    os.environ.update(PYTHONPATH=str(folder), OMP_NUM_THREADS="1")
    sys.path.insert(0, str(folder))
    with Path(output).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = pytest.main(["-q", "-n0", "-p", "no:cacheprovider", *arguments])
    sys.stdout.flush()
    os._exit(int(code))


class Checkout:
    """A copy of a checkout in which tests are run."""

    def __init__(self, folder: Path, timeout: float) -> None:
        self.folder, self._timeout = folder, timeout

    def first_failure(self, tests: Sequence[str], done: Sequence[str] = ()) -> str:
        """The first test that fails, or ""; ``done`` were run already.

        Raises:
            TimeoutError: They run too long.
        """
        return next(iter(self._failures(["-x", *tests, *(f"--ignore={path}" for path in done)])), "")

    def failing(self, tests: Sequence[str]) -> set[str]:
        """Those of the tests that fail.

        Raises:
            TimeoutError: They run too long.
        """
        return set(self._failures(list(tests))) if tests else set()

    def _failures(self, arguments: Sequence[str]) -> list[str]:
        with tempfile.NamedTemporaryFile() as output:
            process = _SERVER.Process(target=_pytest, args=(arguments, self.folder, output.name))
            process.start()
            process.join(self._timeout)
            timed_out = process.is_alive()
            assert process.pid is not None  # it was started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what tests started, too
            process.join()
            if timed_out:
                raise TimeoutError
            text = output.read().decode(errors="replace")
        if process.exitcode in (0, 5):  # 5: no tests there
            return []
        failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
        if not failed:
            raise RuntimeError(f"pytest ended with {process.exitcode} and names no test:\n{text[-2000:]}")
        return failed

    @contextlib.contextmanager
    def planted(self, path: Path, content: bytes, number: int) -> Iterator[None]:
        """Another content of a file for a while; ``number`` is another one for every content."""
        before, modified = path.read_bytes(), path.stat().st_mtime
        try:
            path.write_bytes(content)
            os.utime(path, (modified + number, modified + number))  # by time and size compiled files are told apart
            yield
        finally:
            path.write_bytes(before)
            os.utime(path, (modified, modified))


def judge(mutant: Mutant, number: int, code: Code, checkout: Checkout, stages: Sequence[Sequence[str]]) -> Result:
    """Plant a mutant and run tests, stage by stage, until one fails."""
    started = time.monotonic()
    try:
        path, content = code.mutated(mutant)
    except NotFoundError as error:
        return Result(mutant.name, mutant.area, mutant.definition, "not found", note=str(error))
    outcome, test = "survived", ""
    try:
        with checkout.planted(path, content, number):
            done: list[str] = []
            for tests in stages:
                test = checkout.first_failure(tests, done)
                if test:
                    break
                done += tests
        outcome = "to confirm" if test else outcome
    except TimeoutError:
        outcome = "timed out"
    seconds = round(time.monotonic() - started, 1)
    where = path.relative_to(checkout.folder).as_posix()
    return Result(mutant.name, mutant.area, mutant.definition, outcome, where, test, seconds=seconds)


def confirmed(results: Sequence[Result], checkout: Checkout) -> list[Result]:
    """The results, with every test that failed run without the mutants."""
    failed = {result.test for result in results if result.outcome == "to confirm"}
    unsound = checkout.failing(sorted(failed))
    outcomes = {test: "unclear" if test in unsound else "caught" for test in failed}
    return [
        replace(result, outcome=outcomes[result.test]) if result.outcome == "to confirm" else result
        for result in results
    ]


def stages_for(mutant: Mutant, table: Table, root: Path, quick: bool = False) -> list[list[str]]:
    """Tests to run, the likeliest first, of those that are there; the first lot alone if ``quick``."""
    first = [str(path.relative_to(root)) for name in mutant.first for path in (root / "tests").rglob(name)]
    stages = [sorted(first), table.areas[mutant.area], *([path] for path in table.wider)]
    there = [[path for path in stage if (root / path).exists()] for stage in stages]
    stages = [stage for stage in there if stage]
    return stages[:1] if quick else stages


def run(
    table: Table,
    mutants: Sequence[Mutant],
    *,
    tests: Sequence[str] = (),
    quick: bool = False,
    timeout: float = 1800.0,
    record: Path | None = None,
) -> bool:
    """Judge mutants, print and record what becomes of them; whether all were caught."""
    # Started in the background this process would ignore Ctrl-C, and so would the tests that are about it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = "1"
    others = {mutant.name for mutant in table.mutants} - {mutant.name for mutant in mutants}
    results = [result for result in recorded(record) if result.name in others]
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        folder = Path(temporary).resolve() / "checkout"
        shutil.copytree(ROOT, folder, symlinks=True, ignore=_NOT_COPIED)
        code, checkout = Code(folder / PACKAGE), Checkout(folder, timeout)
        for number, mutant in enumerate(mutants, start=1):
            stages = [list(tests)] if tests else stages_for(mutant, table, folder, quick)
            results.append(judge(mutant, number, code, checkout, stages))
            print(f"{number}/{len(mutants)} {_line(results[-1])}", flush=True)
            _write(record, results)
        results = confirmed(results, checkout)
    _write(record, results)
    for result in results:
        if result.outcome != "caught":
            print(_line(result))
    counts = Counter(result.outcome for result in results)
    print(f"{len(results)} mutants: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    return counts["caught"] == len(results)


def check(mutants: Sequence[Mutant]) -> bool:
    """Look for mutants in the checkout itself, and name those that are not there."""
    code, lost = Code(ROOT / PACKAGE), 0
    for mutant in mutants:
        try:
            code.mutated(mutant)
        except NotFoundError as error:
            print(f"{mutant.name}: not found: {error}")
            lost += 1
    areas = Counter(mutant.area for mutant in mutants)
    print(f"{len(mutants)} mutants, {lost} not found; " + ", ".join(f"{area} {areas[area]}" for area in sorted(areas)))
    return not lost


def _line(result: Result) -> str:
    words = f"{result.outcome:9} {result.name} ({result.area}, {result.definition}) {result.seconds:.0f} s"
    return f"{words}  {result.test or result.note}".rstrip()


def recorded(record: Path | None) -> list[Result]:
    """The results in a file; none where there is no file yet."""
    if record is None or not record.exists():
        return []
    return [Result(**entry) for entry in json.loads(record.read_text(encoding="utf-8"))["mutants"]]


def _write(record: Path | None, results: Sequence[Result]) -> None:
    if record is None:
        return
    counts = Counter(result.outcome for result in results)
    content = {"counts": dict(counts), "mutants": [asdict(result) for result in results]}
    record.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 1 if a mutant was not caught or not found."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("command", choices=("check", "run"))
    parser.add_argument("--only", action="append", metavar="GLOB", help="mutants of these names; may be repeated")
    parser.add_argument("--tests", nargs="+", default=[], metavar="PATH", help="run these tests for every mutant")
    parser.add_argument("--rest", action="store_true", help="only mutants on which the JSON file has no failing test")
    parser.add_argument("--quick", action="store_true", help="the tests named first only, else those of the area")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that one run of tests may take")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    given = parser.parse_args(arguments)
    table = read_table()
    globs = given.only or ["*"]
    mutants = [mutant for mutant in table.mutants if any(fnmatch.fnmatch(mutant.name, glob) for glob in globs)]
    if not mutants:
        parser.error(f"no mutant is called {' or '.join(globs)}")
    if given.rest:
        failed = {result.name for result in recorded(given.json) if result.outcome in ("caught", "to confirm")}
        mutants = [mutant for mutant in mutants if mutant.name not in failed]
    options = {"tests": given.tests, "quick": given.quick, "timeout": given.timeout, "record": given.json}
    if given.command == "check":
        return 0 if check(mutants) else 1
    return 0 if run(table, mutants, **options) else 1


if __name__ == "__main__":
    sys.exit(main())
