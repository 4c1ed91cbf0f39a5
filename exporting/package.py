"""A folder that diffusers opens by trust_remote_code: this code's drawing half, renamed so that it meets no other module, and the two files that lead to it."""

import ast
import hashlib
import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from exported import TEXT_ENCODER
from util.checkpoint import IN_PAINTER, PAINTER
from util.logging import say

ROOT = Path(__file__).resolve().parent.parent
ENTRY = "sampling"  # what drawing is reached by


def modules() -> dict[str, Path]:
    """Ours, by name."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("util/*.py"), *ROOT.glob("datasets/*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imports_of(tree: ast.AST, known: Collection[str]) -> set[str]:
    """Those of the `known` modules that a module imports, wherever in its file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(known)


def needed(entry: str) -> dict[str, str]:
    """The sources of a module and of all that it imports, by name."""
    known, found, left = modules(), {}, [entry]
    while left:
        name = left.pop()
        if name not in found:
            found[name] = known[name].read_text(encoding="utf-8")
            left += imports_of(ast.parse(found[name]), known)
    return found


def renamed(source: str, package: str, tops: set[str]) -> str:
    """With every import of ours from below `package`."""
    ours = "|".join(sorted(tops))
    source = re.sub(rf"^(\s*)from ({ours})((?:\.\w+)*) import ", rf"\1from {package}.\2\3 import ", source, flags=re.M)
    return re.sub(rf"^(\s*)import ({ours})$", rf"\1from {package} import \2", source, flags=re.M)


def add_code(folder: Path) -> None:
    """Into a folder that holds the model in painter/model/: weights must not lie directly in painter/, or diffusers fetches nothing else of it from the hub."""
    sources = needed(ENTRY)
    package = f"jit_t2i_{hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:8]}"
    tops = {name.partition(".")[0] for name in sources}
    for name, source in sources.items():
        path = (folder / PAINTER / package / Path(*name.split("."))).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(renamed(source, package, tops), encoding="utf-8")
    for inner in {path.parent for path in (folder / PAINTER / package).rglob("*.py")} | {folder / PAINTER / package}:
        (inner / "__init__.py").write_text("", encoding="utf-8")
    shutil.copyfile(ROOT / "LICENSE", folder / PAINTER / package / "LICENSE")  # which it asks of copies
    shutil.copyfile(ROOT / "exporting" / "pipeline.py", folder / "pipeline.py")
    shutil.copyfile(ROOT / "exporting" / "painter.py", folder / PAINTER / "painter.py")
    encoder = folder / PAINTER / IN_PAINTER / TEXT_ENCODER
    if [*encoder.glob("*.bin")] and not [*encoder.glob("*.safetensors")]:
        say(
            "warning: the language model's weights are .bin files, which diffusers does not fetch from the hub: this folder can be opened only from a local disk"
        )
    index = {"_class_name": ["pipeline", "JiTPipeline"], "_diffusers_version": "0.30.0", PAINTER: ["painter", "JiTPainter"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
