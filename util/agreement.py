"""Processes that are to do one thing together, and see different ones: told at the start, in one line, with who sees what."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from util import distributed as dist
from util.errors import UserError
from util.parts import flat

ROOT = Path(__file__).resolve().parent.parent
OWN = {"data.path", "data.image_root", "text.encoder.llm", "text.folder", "run.device"}  # a node may have its copy elsewhere; what is in it is compared


def code_version() -> str:
    """The hash of this program's Python files."""
    found = hashlib.sha256()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]):
        if path.parent.name not in ("tests", "benchmarks"):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def of_run(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What all processes of a run should have in common before they look at anything.  plain: the job."""
    return {"the code": code_version(), "torch": torch.__version__} | {name: value for name, value in flat(plain, separator=".") if name not in OWN}


def agree(facts: Mapping[str, Any]) -> None:
    """Raises: UserError where they are not the same on all ranks, with the first that differs.  Collective."""
    seen = dist.gather_objects({name: str(value) for name, value in facts.items()})
    for name in facts:
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(seen):
            ranks.setdefault(one.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            raise UserError(f"the processes do not agree on {name}: {'; '.join(f'{value} on rank {spans(which)}' for value, which in ranks.items())}")


def spans(ranks: list[int]) -> str:
    """0-3, 8 of 0, 1, 2, 3, 8."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and rank == found[-1][1] + 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
