"""Writing the checkpoints of a sharded network: by torch.distributed.checkpoint, each process its own part, while training goes on.

`checkpoint-last.pth` stays the name of the latest one, but is small: in place of the tensors it says `parts`, the folder beside it and their shapes. A folder gets
its name when all parts are written, and the file is replaced after that, so that a checkpoint is there whole or not at all.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor
from torch.futures import Future

from util import checkpoint
from util import distributed as dist
from util.errors import one_line
from util.files import sync
from util.parts import OFFSETS, SECTIONS, flat


class Folder(HuggingFaceStorageWriter):
    """Storage for one checkpoint's parts: a temporary folder that rank 0 renames once all ranks have written."""

    def __init__(self, path: Path, then: Callable[[Path], None]):
        """then(folder): what is left to do when it is whole."""
        super().__init__(str(path.with_name(".checkpoint-parts.tmp")), save_distributed=True)  # one name, so that nothing is left but the last
        self.whole, self.then = path, then

    def prepare_global_plan(self, plans):
        """On rank 0, before anything is written: what a run that was killed has left there is no part of this."""
        for left in Path(self.path).iterdir():
            left.unlink()
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list]:
        """Write this process's part straight into one file.  torch's own writer builds the file in memory first, which blocks the main thread for a second."""
        done: Future[list] = Future()
        if plan.items:
            tensors = {item.index.fqn: planner.resolve_data(item).detach().contiguous() for item in plan.items}
            offsets = {item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)} for item in plan.items}
            path = Path(self.path) / f"part-{plan.storage_data['shard_index']:05d}.safetensors"
            save_file(tensors, path, {OFFSETS: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"})
            sync(path)
        done.set_result([])
        return done

    def finish(self, metadata, results) -> None:
        """On rank 0, after all have written."""
        super().finish(metadata, results)
        place, again = self.whole, 0
        while place.exists():  # of the same step, in a run that went another way
            again += 1
            place = self.whole.with_name(f"{self.whole.name}-{again}")
        os.replace(self.path, place)
        sync(place.parent)
        self.then(place)


def alone(tensor: Tensor) -> Tensor:
    """Buffers are the same tensor in every section, and a file of safetensors takes none twice."""
    return tensor if isinstance(tensor, DTensor) else tensor.clone()


def split(state: Mapping[str, Any], path: Path, then: Callable[[Mapping[str, Any]], None]) -> tuple[dict[str, Tensor], Folder]:
    """The tensors of a checkpoint and what writes them; then(plain) gets what its file `path` is to hold."""
    tensors = {name: alone(value) for name, value in flat({name: state[name] for name in SECTIONS if name in state})}
    plain = {name: value for name, value in state.items() if name not in SECTIONS}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    folder = Folder(path.with_name(f"checkpoint-step-{state.get('step', 0)}"), lambda whole: then(plain | {"parts": {"folder": whole.name, "shapes": shapes}}))
    return tensors, folder


def write_parts(state: Mapping[str, Any], path: Path) -> None:
    """A checkpoint that one process holds whole.  Raises: OSError."""
    tensors, folder = split(state, path, lambda plain: checkpoint.save(path, plain))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no group
        dcp.save(tensors, storage_writer=folder, no_dist=True)


class Stager(DefaultStager):
    """torch's, but where memory cannot be page-locked it copies without: an error on one rank would leave the others waiting for it."""

    def _stage(self, state_dict: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        try:
            return super()._stage(state_dict, **kwargs)
        except RuntimeError as error:
            if not self._state_dict_stager.pin_memory:
                raise
            print(f"warning: rank {dist.rank()}: host memory could not be page-locked ({one_line(error)}); checkpoints are copied more slowly", flush=True)
            with suppress(RuntimeError):  # CUDA tells the next call of the error
                if self._staging_stream:
                    self._staging_stream.synchronize()
            self._state_dict_stager = StateDictStager(pin_memory=False)
            return super()._stage(state_dict, **kwargs)


class PartsWriter(checkpoint.Writer):
    """A Writer of all processes together: what fails on one has failed on all.  Collective."""

    def __init__(self, keep_last: int | None, device: torch.device):
        super().__init__(keep_last)
        self.gpu = gpu = device.type == "cuda"
        self.stager = Stager(StagingOptions(use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=gpu, use_non_blocking_copy=gpu))
        self.group, self.copying = dist.group_of_cpus(), None

    def write(self, state: Mapping[str, Any], path: Path, numbered: Path | None = None) -> None:
        self.wait()
        self.latest = (state, path, numbered)
        self.start()

    def reason(self, error: BaseException) -> str:
        failed = getattr(error, "failures", {})  # of the ranks that have failed, with their tracebacks
        return ", ".join(f"rank {rank}: {one_line(cause)}" for rank, (cause, _) in failed.items()) or one_line(error)

    def settle(self) -> None:
        if self.copying:
            futures.wait([self.copying])  # its error is told by wait()
            self.copying = None

    def start(self) -> None:
        state, path, numbered = self.latest
        tensors, folder = split(state, path, lambda plain: self.keep(plain, path, numbered))
        if self.gpu:  # the stager copies on a stream of its own, and does not wait for what split has just made
            torch.cuda.current_stream().synchronize()
        saving = dcp.async_save(tensors, storage_writer=folder, process_group=self.group, async_stager=self.stager)
        self.work, self.copying = (saving, None) if isinstance(saving, futures.Future) else (saving.upload_completion, saving.staging_completion)
