"""Mutation testing of the formulas: changes the code in many small ways and counts the changes that a test notices.

    pip install -e ".[dev]"
    python -m tests.benchmarks.mutation [scores fusion ...] [--sample 40] [--seed 0] [--jobs 2] [--survivors]
    python -m tests.benchmarks.mutation --rest 200 [--seed 0] [--jobs 2] [--survivors]

Without ``--rest`` each module of the formulas and metrics (``MODULES``) gets a sample of its own. With ``--rest`` one
sample is drawn from the rest of the methods' code (``REST``), and each module's share of it is its share of the lines.

Mutants come from cosmic-ray's operators (one operator, number, constant, condition or loop is changed) and from
``SwapMethod`` below (``amin`` becomes ``amax``). Left out are mutants of annotations, of error messages and of
``overload`` stubs, and operators of another kind (``+`` does not become ``<<``, which hardly any code survives). A
sample is spread evenly over the lines of a module and depends on the seed and the code only.

Each mutant is tested in a fork of this process, which has collected the tests already; no file is changed. Only those
tests run that execute the changed statement, the fastest first, up to ``--budget`` seconds. ``build/mutation`` keeps
the results. ``--survivors --reuse`` tries the last run's survivors again, each with all tests that are new since; a
larger ``--budget`` also gives them the slower tests. The table goes to docs/robustness.md.
"""

from __future__ import annotations

import argparse
import ast
import collections
import difflib
import gc
import itertools
import json
import os
import random
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "captum_fusion"
WORK = ROOT / "build" / "mutation"
#: Processor seconds after which a mutant counts as an endless loop.
LIMIT = 300
MODULES = (
    *sorted((PACKAGE / "functional").glob("[!_]*.py")),
    *(PACKAGE / "attr" / name for name in ("_components.py", "fusion.py")),
    *sorted((PACKAGE / "metrics").glob("[!_]*.py")),
    PACKAGE / "metrics" / "_maps.py",
)
#: The rest of the code of methods. Functions that fill in docstrings run at import only, and cannot be changed here.
REST = (
    *(
        path
        for path in sorted((PACKAGE / "attr").glob("*.py"))
        if path not in MODULES and path.name not in ("__init__.py", "_docs.py")
    ),
    *sorted((PACKAGE / "_passes").glob("[!_]*.py")),
    *(PACKAGE / name for name in ("_arguments.py", "layers.py", "targets.py")),
)
TESTS = (
    "tests/test_functional.py",
    "tests/test_channel_search.py",
    "tests/test_regression.py",
    "tests/test_reference.py",
    "tests/test_reference_methods.py",
    "tests/test_special_methods.py",
    "tests/test_faithfulness.py",
    "tests/test_not_finite.py",
    "tests/test_attacks.py",
    *(f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_metrics*.py"))),
    "tests/test_contract.py",
    "tests/test_edge_cases.py",
    "tests/test_layers.py",
    "tests/test_replaced_layers.py",
    "tests/test_targets.py",
    "tests/test_cost.py",
    "tests/test_shared_work.py",
    "tests/test_captum.py",
    "tests/test_docs.py",
    *(
        f"captum_fusion/{path}"
        for path in ("functional", "metrics", "attr", "_passes", "_arguments.py", "layers.py", "targets.py")
    ),
)
#: Of the documentation's tests those of defaults; and not a test that starts processes.
CHOICE = "(not test_docs or test_documented_defaults) and not test_two_processes"

OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "--assert=plain", "-W", "ignore::pytest.PytestAssertRewriteWarning")
#: The exit status of a mutant that changes nothing that can be changed after the import.
UNSEEN = 9

#: The tests of each module must pass in a fork without a change.
CONTROL = "control"

#: Operators of cosmic-ray that replace one of a group by another.
GROUPS = (
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Pow", "Mod"},
    {"BitAnd", "BitOr"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
    {"Is", "IsNot"},
    {"USub", "Delete"},
    {"Invert", "Delete"},
    {"Not", "Delete"},
)
SWAPS = {
    "amin": "amax",
    "amax": "amin",
    "argmin": "argmax",
    "argmax": "argmin",
    "minimum": "maximum",
    "maximum": "minimum",
    "sum": "mean",
    "mean": "sum",
    "any": "all",
    "all": "any",
    "relu": "abs",
    "abs": "relu",
    "floor": "ceil",
    "sign": "abs",
    "prod": "sum",
    "isfinite": "isnan",
}


class Mutant(NamedTuple):
    """One change of one module."""

    module: str
    line: int
    operator: str
    source: str
    diff: str


# ------------------------------------------------------------------------------------------------------------- mutants


def operators() -> dict[str, Any]:
    """The operators by name, ours included."""
    import cosmic_ray.plugins
    from cosmic_ray.operators.operator import Operator

    class SwapMethod(Operator):
        """``x.amin()`` becomes ``x.amax()``, and so on."""

        def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
            before = node.get_previous_leaf() if node.type == "name" and node.value in SWAPS else None
            if before is not None and before.value == ".":
                yield node.start_pos, node.end_pos

        def mutate(self, node: Any, index: int) -> Any:
            node.value = SWAPS[node.value]
            return node

        @classmethod
        def examples(cls) -> tuple[()]:
            return ()

    found = {"SwapMethod": SwapMethod()}
    for name in cosmic_ray.plugins.operator_names():
        operator = cosmic_ray.plugins.get_operator(name)
        if operator.arguments() or name == "core/RemoveDecorator":
            continue
        change = re.fullmatch(r"core/Replace\w+Operator_(\w+)_(\w+)", name)
        if not change or any(set(change.groups()) <= group for group in GROUPS):
            found[name.removeprefix("core/")] = operator()
    return found


class _Meaning(ast.NodeTransformer):
    """What a program does, without annotations, docstrings, error messages and overload stubs."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        if any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list):
            return None
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> Any:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        node.annotation = ast.Constant(0)
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> Any:
        return ast.Raise(exc=node.exc.func) if isinstance(node.exc, ast.Call) else node


def meaning(source: str) -> str:
    """A text that is the same for programs that differ in no more than annotations or messages."""
    return ast.dump(_Meaning().visit(ast.parse(source)))


def mutants(path: Path, number: int, seed: int) -> list[Mutant]:
    """A random sample that is spread over the lines: a mutant of each line, then a second one, ..."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    source, changes = path.read_text(encoding="utf-8"), operators()
    lines, known, results = source.splitlines(), {meaning(source)}, []
    nodes = list(ast_nodes(get_ast(source)))
    positions = []
    for name, operator in changes.items():
        starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        positions += [(line, name, occurrence) for occurrence, (line, _) in enumerate(starts)]
    random.Random(seed).shuffle(positions)
    tested: collections.Counter[int] = collections.Counter()
    while positions and len(results) < number:
        position = min(positions, key=lambda position: tested[position[0]])
        positions.remove(position)
        line, name, occurrence = position
        mutated = mutate_code(source, changes[name], occurrence)
        try:
            changed = meaning(mutated)
        except SyntaxError:
            continue
        if changed not in known:
            known.add(changed)
            tested[line] += 1
            diff = [d for d in difflib.ndiff(lines, mutated.splitlines()) if d[0] in "+-"]
            results.append(Mutant(str(path.relative_to(ROOT)), line, name, mutated, "\n".join(diff)))
    return results


# --------------------------------------------------------------------------------------------------------------- tests


class Coverage(NamedTuple):
    """Which tests execute which lines, and how long they take."""

    seconds: dict[str, float]
    tests: dict[str, dict[int, list[str]]]

    def of(self, mutant: Mutant, budget: float) -> list[str]:
        """The tests of a mutant: those that execute its statement, or any of the module's if it runs at import."""
        statement = _statement(ast.parse((ROOT / mutant.module).read_text(encoding="utf-8")), mutant.line)
        by_line = self.tests.get(mutant.module, {})
        found = {test for line in statement for test in by_line.get(line, ())}
        found = found or {test for tests in by_line.values() for test in tests}
        chosen, total = [], 0.0
        for test in sorted(found, key=lambda name: (self.seconds.get(name, 0.0), name)):
            total += self.seconds.get(test, 0.0)
            if chosen and total > budget:
                break
            chosen.append(test)
        return chosen


def _statement(tree: ast.AST, line: int) -> range:
    """The lines of the smallest statement at a line, of a compound one those of its head."""
    best = range(line, line + 1)
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or node.lineno):
            body = getattr(node, "body", None)
            end = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            if line <= max(end, node.lineno):
                best = range(node.lineno, max(end, node.lineno) + 1)
    return best


class _Timer:
    """A plugin of pytest that notes how long each test took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up the phases of a test; tests that are skipped notice nothing."""
        if report.passed:
            self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration


def measured() -> Coverage:
    """Run the tests once, with a record of the lines that each of them executes."""
    timer, data, config = _Timer(), WORK / "coverage", WORK / "coveragerc"
    config.write_text(f"[run]\nsource_pkgs = captum_fusion\ndata_file = {data}\n", encoding="utf-8")
    process = os.fork()
    if not process:
        options = ["--cov", f"--cov-config={config}", "--cov-context=test", "--cov-report=", "-k", CHOICE]
        code = pytest.main([*OPTIONS, *options, *TESTS], plugins=[timer])
        (WORK / "seconds.json").write_text(json.dumps(timer.seconds), encoding="utf-8")
        os._exit(int(code))
    if os.waitpid(process, 0)[1]:
        raise SystemExit("The tests must pass before mutants are tested.")
    import coverage

    record = coverage.CoverageData(str(data))
    record.read()
    tests = {}
    for path in (*MODULES, *REST):
        lines = record.contexts_by_lineno(str(path))
        names = {line: sorted({c.partition("|")[0] for c in contexts} - {""}) for line, contexts in lines.items()}
        tests[str(path.relative_to(ROOT))] = names
    return Coverage(json.loads((WORK / "seconds.json").read_text(encoding="utf-8")), tests)


# ----------------------------------------------------------------------------------------------------------------- run


def apply(mutant: Mutant) -> bool:
    """Change the functions and constants of a module that is imported already; whether there was something to change.

    Functions get new code and defaults, so that every reference to them sees the change.
    """
    path = str(ROOT / mutant.module)
    module = sys.modules[mutant.module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")]
    before = [f for f in gc.get_objects() if type(f) is FunctionType and f.__code__.co_filename == path]
    namespace: dict[str, Any] = {"__name__": module.__name__, "__file__": path}
    exec(compile(mutant.source, path, "exec", dont_inherit=True), namespace)
    known, after = {id(f) for f in before}, {}
    for f in gc.get_objects():
        if type(f) is FunctionType and f.__code__.co_filename == path and id(f) not in known:
            after[f.__qualname__, f.__code__.co_firstlineno] = f
    changed = False
    for old in before:
        new = after.get((old.__qualname__, old.__code__.co_firstlineno))
        if new is not None and len(new.__code__.co_freevars) != len(old.__code__.co_freevars):
            return False
        for part in ("__code__", "__defaults__", "__kwdefaults__"):
            if new is not None and _text(getattr(old, part)) != _text(getattr(new, part)):
                setattr(old, part, getattr(new, part))
                changed = True
    for name, old in list(vars(module).items()):
        new = namespace.get(name)
        if isinstance(old, (int, float, tuple, dict, torch.Tensor)) and _text(old) != _text(new):
            for other in [m for m in sys.modules.values() if str(vars(m).get("__file__")).startswith(str(ROOT))]:
                if vars(other).get(name) is old:
                    setattr(other, name, new)
                    changed = True
    return changed


def _text(value: Any) -> str:
    """A text that is the same for equal code, constants and defaults."""
    if isinstance(value, CodeType):
        return repr((value.co_code, value.co_names, [_text(constant) for constant in value.co_consts]))
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


class _Run:
    """A plugin of pytest that tests mutants instead of running the collected tests.

    Each mutant is tested in a fork, so that tests are imported and collected only once.
    """

    def __init__(self, chosen: Sequence[Mutant], coverage: Coverage, jobs: int, budget: float) -> None:
        self.chosen, self.coverage, self.jobs, self.budget = chosen, coverage, jobs, budget
        self.results: list[tuple[Mutant, bool]] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Test every mutant, ``jobs`` of them at a time."""
        items = {item.nodeid: item for item in session.items}
        waiting, running = list(reversed(self.chosen)), {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                mutant = waiting.pop()
                tests = [test for test in self.coverage.of(mutant, self.budget) if test in items]
                tests = [test for test in items if test not in self.coverage.seconds or "defaults" in test] + tests
                running[self._start(mutant, [items[test] for test in tests])] = mutant
            process, status = os.wait()
            self._note(running.pop(process), status)
        return True

    def _note(self, mutant: Mutant, status: int) -> None:
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == UNSEEN:
            return
        if mutant.operator == CONTROL:
            if status:
                print(f"\n{mutant.module}: its tests fail without a change", flush=True)
            return
        self.results.append((mutant, status != 0))
        if not status:
            print(f"\n{mutant.module}:{mutant.line} {mutant.operator}\n{mutant.diff}", flush=True)

    @staticmethod
    def _start(mutant: Mutant, items: list[pytest.Item]) -> int:
        """Run the tests of a mutant in another process, whose exit status is 0 if they pass."""
        process = os.fork()
        if process:
            return process
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        status = 1  # also of a module that cannot be imported
        try:
            if mutant.operator != CONTROL and not apply(mutant):
                status = UNSEEN
                return process
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            status = 0
        finally:
            os._exit(status)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In the fork of a mutant: a test has failed."""
        if report.failed:
            os._exit(1)


def table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each module, in Markdown."""
    rows = ["| module | mutants | killed |", "| --- | --- | --- |"]
    for path in (*MODULES, *REST):
        own = [result for result in results if result["module"] == str(path.relative_to(ROOT))]
        if own:
            killed = sum(result["killed"] for result in own)
            rows.append(f"| `{own[0]['module']}` | {len(own)} | {100 * killed / len(own):.0f} % |")
    killed = sum(result["killed"] for result in results)
    rows.append(f"| all | {len(results)} | {100 * killed / max(len(results), 1):.1f} % |")
    return "\n".join(rows)


def numbers(sample: int, rest: int) -> dict[Path, int]:
    """How many mutants of each module are tested."""
    if not rest:
        return dict.fromkeys(MODULES, sample)
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in REST]
    ends = [round(rest * end / sum(lines)) for end in itertools.accumulate(lines, initial=0)]
    return {path: end - start for path, (start, end) in zip(REST, itertools.pairwise(ends), strict=True)}


def recorded(reuse: bool) -> Coverage:
    """Which tests execute which lines, measured or as measured last time."""
    stored = WORK / "lines.json"
    if not reuse or not stored.exists():
        stored.write_text(json.dumps(measured()), encoding="utf-8")
    seconds, lines = json.loads(stored.read_text(encoding="utf-8"))
    return Coverage(seconds, {path: {int(k): v for k, v in tests.items()} for path, tests in lines.items()})


def main() -> None:
    """Test a sample of mutants of each module, print the survivors and the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.mutation", description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", help="parts of paths (default: all)")
    parser.add_argument("--sample", type=int, default=40, help="mutants of each module")
    parser.add_argument("--rest", type=int, default=0, help="mutants of the rest of the methods' code, instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of the tests of a mutant")
    parser.add_argument("--survivors", action="store_true", help="only those that survived the last run")
    parser.add_argument("--reuse", action="store_true", help="do not measure again which tests execute which lines")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutation", phases=phases, database=None)  # nobody reads the smallest example
    hypothesis.settings.load_profile("mutation")
    coverage, record = recorded(arguments.reuse), WORK / "results.json"
    earlier = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
    alive = {(r["module"], r["diff"]) for r in earlier if not r["killed"]}
    counts = numbers(arguments.sample, arguments.rest)
    paths = [
        path
        for path in counts
        if not arguments.modules or any(part in str(path.relative_to(PACKAGE)) for part in arguments.modules)
    ]
    chosen = [Mutant(str(path.relative_to(ROOT)), 0, CONTROL, "", "nothing is changed") for path in paths]
    chosen += [mutant for path in paths for mutant in mutants(path, counts[path], arguments.seed)]
    if arguments.survivors:
        chosen = [m for m in chosen if m.operator == CONTROL or (m.module, m.diff) in alive]
    run = _Run(chosen, coverage, arguments.jobs, arguments.budget)
    pytest.main([*OPTIONS, "-s", "-p", "no:cov", "-k", CHOICE, *TESTS], plugins=[run])
    tested = {(mutant.module, mutant.diff) for mutant, _ in run.results}
    done = [r for r in earlier if (r["module"], r["diff"]) not in tested]
    if not arguments.survivors:
        done = [r for r in done if r["module"] not in {str(path.relative_to(ROOT)) for path in paths}]
    for mutant, killed in run.results:
        result = {"module": mutant.module, "line": mutant.line, "operator": mutant.operator, "diff": mutant.diff}
        done.append({**result, "killed": killed})
    record.write_text(json.dumps(done, indent=1), encoding="utf-8")
    print("\n" + table(done))


if __name__ == "__main__":
    main()
