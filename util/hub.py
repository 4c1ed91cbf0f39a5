"""Pretrained transformers models, by hub name or folder: checking the name, identifying the weights, loading errors as one line."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from util.errors import UserError, one_line
from util.files import sha256_of


def quiet() -> None:
    """No tables and progress bars of transformers' own."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_name(flag: str, name: str, example: str) -> None:
    """Raises: UserError for what is neither a folder nor like a hub name; transformers would take a mistyped path for one."""
    if not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(f"{flag} {name}: no such folder, and not a hub name like {example}")


@contextmanager
def in_one_line(flag: str, name: str, but: type[Exception] = UserError) -> Iterator[None]:
    """Whatever goes wrong in loading (no such model, a cut file, a package that is missing: each its own exception) as one line."""
    try:
        yield
    except (UserError, but):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            trusted = ", and if you trust its authors, add --trust_remote_code" if flag == "--llm_model_name" else ", or choose a model without"
            raise UserError(f"{flag} {name} brings Python code of its own, which is not run; read it{trusted}") from error
        raise UserError(f"{flag} {name} cannot be loaded: {one_line(error, 300)}") from error


def digest_of_weights(folder: Path) -> str:
    """SHA-256 over a local model's configuration and weights, file by file."""
    paths = [folder / "config.json", *(sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")))]
    with ThreadPoolExecutor() as threads:
        parts = list(threads.map(sha256_of, paths))
    return "sha256:" + hashlib.sha256(b"".join(map(bytes.fromhex, parts))).hexdigest()[:32]


def named_of(text: Mapping[str, Any]) -> Mapping[str, Any]:
    """`llm` and `revision` of the model that a language model was copied from; its own, if it is no copy."""
    return text.get("named") or text


def reader_of(text: Mapping[str, Any]) -> str:
    """What to call the language model of text features: its name on the hub, or of a folder its last part."""
    llm, revision = named_of(text)["llm"], named_of(text)["revision"]
    return Path(llm).name if is_local(revision) or os.path.isdir(llm) else llm


def is_local(revision: str) -> bool:
    """Whether a revision is the hash of a local folder, and no commit of the hub."""
    return revision.startswith("sha256:")


def revision_of(name: str, revision: str | None = None) -> str:
    """The hub's commit, or the hash of a local folder's weights, which are read for it."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    if os.path.isdir(name):
        return digest_of_weights(Path(name))
    return extract_commit_hash(cached_file(name, "config.json", revision=revision), None) or ""
