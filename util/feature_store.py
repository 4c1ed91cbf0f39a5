"""Text features on disk, float16: encoded once, read by row through memory maps that all processes of a machine share.

A store is a folder with manifest.json, which says how its features were made, and shards, each a safetensors file of up to 1,024
captions: `keys` (16 bytes a caption), `features`, `lengths` (tokens before the cut), `unknown` (has characters unknown to the
tokenizer) and, where every token's state is kept, `offsets`. A shard is called after its keys (beside prepared pictures,
where it holds all captions of one picture shard, after that shard), and is there whole or not at all: written beside, synced, renamed. So a job that is killed loses the shards it was at, jobs on one store do each other no harm and
take each other's shards as done, and new captions are new shards.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from util.errors import UserError
from util.files import write_whole
from util.hub import is_local

MANIFEST = "manifest.json"
FOLDERS = {"mean": "text_cache", "tokens": "text_cache_tokens"}  # by pooling
SHARD_ROWS = 1024
MOST_OPEN = 16_384  # shards: the kernel lets a process have 65,530 maps
FLAGS = {"llm": "--llm_model_name", "max_text_len": "--max_text_len", "layer": "--llm_layer", "dtype": "--llm_dtype"}


def keys_of(texts: Iterable[str]) -> np.ndarray:
    """128-bit hashes of texts, (n,) of 16 bytes each: what a store knows a caption by."""
    digests = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts)
    return np.frombuffer(digests, dtype="S16")


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """Positions at which a key stands for the first time, in order."""
    return np.sort(np.unique(keys, return_index=True)[1])


def shard_name(keys: np.ndarray) -> str:
    return f"{hashlib.blake2b(keys.tobytes(), digest_size=12).hexdigest()}.safetensors"


def settings_digest(manifest: Mapping[str, Any]) -> str:
    """Of all but the model's name: its revision says what it is, and a folder may have several."""
    settings = {field: value for field, value in manifest.items() if field != "llm"}
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=12).hexdigest()


def write_file(path: Path, content: bytes, flag: str) -> None:
    """flag: that says where the store is.  Raises: UserError where it cannot be written, with nothing left behind."""
    try:
        write_whole(path, lambda file: file.write(content), shared=True)
    except OSError as error:
        raise UserError(
            f"{flag} {path.parent} cannot be written to: {error.strerror}; the features stored before are kept. Make room, or name another folder"
        ) from error


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """None where there is no store yet.  Raises: UserError for a file that is no manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"--text_cache_dir {folder}: {MANIFEST} cannot be read ({error}); name another folder, or delete this one") from error
    if not isinstance(manifest, dict):
        raise UserError(f"--text_cache_dir {folder}: {MANIFEST} is not a text cache's; name another folder")
    return manifest


def check_manifest(folder: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Any], flag: str = "--text_cache_dir") -> None:
    """flag: that says where the store is.  Raises: UserError that names the first field in which its features differ from what this run would make."""
    moved = is_local(str(wanted.get("revision")))  # a local model's content is compared; its folder may have another name now
    for field, value in wanted.items():
        found = manifest.get(field)
        if found == value or (field == "llm" and moved):
            continue
        remedy = f"give {FLAGS[field]} {found}, or name" if field in FLAGS else "name"
        raise UserError(
            f"{flag} {folder}: its features were made with {field} {found!r}, but this run needs {value!r}; "
            f"{remedy} another folder (delete this one to encode its captions anew)"
        )


def write_manifest(folder: Path, manifest: Mapping[str, Any], flag: str = "--text_cache_dir") -> None:
    write_file(folder / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode(), flag)


def key_array(keys: np.ndarray) -> Tensor:
    """(n,) keys as (n, 16) bytes."""
    return torch.from_numpy(np.ascontiguousarray(keys).view(np.uint8).reshape(-1, 16).copy())


def write_shard(path: Path, manifest: Mapping[str, Any], arrays: Mapping[str, Tensor], flag: str = "--text_cache_dir") -> None:
    """arrays: `keys`, and what TextEncoder.encode_all returns of their captions."""
    write_file(path, save(dict(arrays), {"settings": settings_digest(manifest)}), flag)


class FeatureRows:
    """Features by row, out of arrays in memory or mapped from files.  rows_of(numbers) -> (B, width) float32, the pooled features."""

    def __init__(self, shards: Sequence[Mapping[str, np.ndarray]], counts: Iterable[int] = ()):
        """counts: captions of each shard, where that is known without a look inside."""
        self.shards = shards
        self.starts = np.cumsum([0, *(counts or (len(shard["keys"]) for shard in shards))])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def width(self) -> int:
        return self.shards[0]["features"].shape[1]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Row of each key, (n,) int64; -1 where there is none."""
        if not len(self):
            return np.full(len(keys), -1)
        held = np.concatenate([shard["keys"] for shard in self.shards]).view("S16")[:, 0]
        order = np.argsort(held, kind="stable")
        at = np.minimum(np.searchsorted(held, keys, sorter=order), len(held) - 1)
        return np.where(held[order[at]] == keys, order[at], -1)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of those captions before the cut, (n,)."""
        return self._values("lengths", rows)

    def unknown(self, rows: np.ndarray) -> np.ndarray:
        """Whether those captions hold characters that the tokenizer does not know, (n,) bool."""
        return self._values("unknown", rows)

    def _values(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A number of each of many captions, (n,); each shard is opened once."""
        like, at = self.shards[0][name], self._shard_of(rows)
        found, order = np.empty(len(rows), like.dtype), np.argsort(at, kind="stable")
        shards, firsts = np.unique(at[order], return_index=True)
        for shard, chosen in zip(shards.tolist(), np.split(order, firsts[1:])):
            found[chosen] = self.shards[shard][name][rows[chosen] - self.starts[shard]]
        return found

    def _shard_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, rows, side="right") - 1

    def _places(self, rows: np.ndarray) -> Iterable[tuple[Mapping[str, np.ndarray], int]]:
        at = self._shard_of(rows)
        return ((self.shards[shard], row) for shard, row in zip(at.tolist(), (rows - self.starts[at]).tolist()))

    def __call__(self, rows: np.ndarray) -> Tensor:
        chosen = np.empty((len(rows), self.width), dtype=np.float16)
        for i, (shard, row) in enumerate(self._places(rows)):
            chosen[i] = shard["features"][row]
        return torch.from_numpy(chosen).float()

    def tokens(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """States of all valid tokens, caption after caption, (tokens, width) float16, and how many are each caption's, (B,)."""
        found = [torch.from_numpy(shard["features"][slice(*shard["offsets"][row : row + 2])]) for shard, row in self._places(rows)]
        return torch.cat([torch.empty(0, self.width, dtype=torch.float16), *found]), torch.tensor([len(states) for states in found], dtype=torch.long)


class OpenShards(Sequence):
    """The shards of a folder by number, opened read-only and checked as they are asked for; the latest MOST_OPEN stay open."""

    def __init__(self, folder: Path, names: Sequence[str]):
        self.names, settings = names, settings_digest(read_manifest(folder) or {})
        self.opened = lru_cache(MOST_OPEN)(lambda number: open_shard(folder / names[number], settings))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        return self.opened(number)


class FeatureStore(FeatureRows):
    """The shards `names` of a folder; what is read lies once in the machine's memory, whatever the number of processes.

    Without `counts` all are opened and checked at once.
    """

    def __init__(self, folder: Path, names: Sequence[str], counts: Sequence[int] = ()):
        self.folder, self.names, self.counts = folder, list(names), counts
        super().__init__(OpenShards(folder, self.names), counts)

    def __reduce__(self):  # to another process by name, not by content
        return type(self), (self.folder, self.names, self.counts)


def shard_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def open_shard(path: Path, settings: str) -> dict[str, np.ndarray]:
    """A shard's arrays, mapped.  Raises: UserError for one that is damaged, or of another manifest."""
    try:
        with safe_open(path, "pt") as file:
            made_with = (file.metadata() or {}).get("settings")
            names = file.keys()
            shard = {name: file.get_tensor(name).numpy() for name in names}
        keys, features = shard["keys"], shard["features"]
        if keys.dtype != np.uint8 or keys.shape[1:] != (16,) or features.dtype != np.float16 or features.ndim != 2:
            raise ValueError("not the arrays of a shard")
        if not len(keys) == len(shard["lengths"]) == len(shard["unknown"]) == (len(shard["offsets"]) - 1 if "offsets" in shard else len(features)):
            raise ValueError("arrays of different lengths")
    except FileNotFoundError as error:
        raise UserError(f"--text_cache_dir {path.parent}: {path.name} is not seen by this process; do all nodes see the same folder?") from error
    except Exception as error:  # cut short, overwritten, not a shard: each its own exception
        raise UserError(
            f"--text_cache_dir: {path} is damaged ({error}); delete it, and its captions are encoded anew (if it lies beside shards of prepare_data.py, run prepare_data.py again)"
        ) from error
    if made_with != settings:
        raise UserError(
            f"--text_cache_dir: {path} was made with other settings than {MANIFEST} says; delete it, and its captions are encoded anew (if it lies beside shards of prepare_data.py, run prepare_data.py again)"
        )
    return shard
