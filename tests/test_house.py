"""The house: imports go down only and close no circle, one reader of flags, one module that talks to torch.distributed, small signatures."""

import ast
import re
from collections import Counter
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

from exporting import package

FLOORS = {
    5: ("main_jit", "cache_text", "prepare_ref", "export", "convert_checkpoint", "prepare_data", "app"),
    4: ("flags", "prepare", "evaluation", "exporting", "page"),
    3: ("engine_jit", "sampling", "text_features", "text_beside"),
    2: ("resume", "released", "exported", "transfer", "lora", "conditioning", "text_encoder", "datasets", "denoiser", "models_jit", "models_mmjit"),
    1: ("config", "util"),
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*ROOT.glob("*.py"), *(path for folder in ("evaluation", "exporting", "page", "datasets", "util") for path in (ROOT / folder).glob("*.py"))]
    if path.name != "__init__.py"
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports_of(name: str) -> set[str]:
    """Modules of ours that it imports."""
    return package.imports_of(TREES[name], MODULES)


def test_imports_go_down_only():
    assert set(FLOOR) == {name.split(".")[0] for name in MODULES}
    for name in MODULES:
        for other in imports_of(name):
            assert FLOOR[other.split(".")[0]] <= FLOOR[name.split(".")[0]], f"{name} imports {other} from a floor above"


def test_imports_close_no_circle():
    order = list(TopologicalSorter({name: imports_of(name) for name in MODULES}).static_order())  # raises CycleError
    assert len(order) == len(MODULES)


def test_the_network_knows_no_loss_and_no_llm_and_the_method_no_network():
    assert imports_of("models_jit") == imports_of("denoiser") == {"config", "util.text"}
    assert imports_of("models_mmjit") == {"config", "models_jit", "util.text"} and imports_of("util.text") == set()
    assert imports_of("config") == {"util.errors"} and imports_of("flags") == {"config", "util.errors"}


def test_one_reader_of_flags_and_one_that_talks_to_torch_distributed():
    for name, path in MODULES.items():
        source, names = path.read_text(encoding="utf-8"), {node.id for node in ast.walk(TREES[name]) if isinstance(node, ast.Name)}
        arguments = {arg.arg for node in ast.walk(TREES[name]) if isinstance(node, ast.arguments) for arg in (*node.args, *node.kwonlyargs)}
        if name not in ("flags", "datasets.demo", "datasets.scenes"):
            reads = {"args"} & (names | arguments) or ("argparse" in source and name != "util.checkpoint")  # a published file holds a Namespace
            assert not reads, f"{name} reads flags"
        if name not in ("util.distributed", "util.sharding", "util.parts_writer"):
            assert "torch.distributed" not in source.split('"""', 2)[-1], path


def functions(name: str):
    """Each function with its number of parameters; those of network layers and dataclasses are their own matter."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            given = node.args
            yield node.name, len([arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs) if arg.arg not in ("self", "cls")])


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("models_jit", "models_mmjit")])
def test_no_function_takes_more_than_six_parameters(name):
    assert {function: count for function, count in functions(name) if count > 6} == {}


def test_main_is_short_and_every_module_stands_in_the_map():
    assert len(MODULES["main_jit"].read_text(encoding="utf-8").splitlines()) < 200
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in MODULES:
        assert re.search(rf"\b{name.split('.')[-1]}\b", text), f"{name} is not on CONTRIBUTING.md's map"
    for floor, names in FLOORS.items():
        (line,) = re.findall(rf"^{floor}\. (.*)$", text, re.M)
        assert all(f"`{name}" in line for name in names), line


def test_warnings_have_one_form():
    for path in MODULES.values():
        assert not re.search(r"\bWARNING\b|\bWarning:", path.read_text(encoding="utf-8")), path


def test_nothing_is_defined_that_nothing_uses():
    """Functions, classes and constants of the modules, tests not counted."""
    programs = [*MODULES.values(), *(path for folder in ("demo", "benchmarks") for path in (ROOT / folder).glob("*.py"))]
    words = Counter(re.findall(r"\w+", "\n".join(path.read_text(encoding="utf-8") for path in programs)))
    for name in MODULES:
        for node in TREES[name].body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            defined = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else [target.id for target in targets if isinstance(target, ast.Name)]
            for one in defined:
                assert words[one] > 1 or one in ("load_painter", "JiT_models"), f"{name}.{one} is used by nothing"
