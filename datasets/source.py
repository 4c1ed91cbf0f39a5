"""Where pictures come from: one function opens them, one reads them for training.  A new kind of data is a file beside this one and a line here."""

import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from config import Data, Model
from datasets.imagenet import ClassFolder
from datasets.stream import Collate, PictureDataset, StreamSampler
from datasets.text_image import TextImageFolder
from util.logging import say
from util.randomness import stream
from util.stopping import in_worker


def open_data(data: Data, model: Model, seed: int) -> PictureDataset:
    """The data of --data_path as the model needs it.  Raises: UserError where it cannot be used."""
    if model.is_text:
        dataset = TextImageFolder(data.path, model.img_size, bool(data.hflip), seed, data.missing)
        if dataset.skipped:
            say(f"--missing_captions skip: left out {dataset.skipped}")
        return dataset
    dataset = ClassFolder(data.path, model.class_num, model.img_size, data.hflip is not False, seed)
    if len(dataset.classes) < model.class_num:
        say(f"warning: {len(dataset.classes)} class folders and --class_num {model.class_num}: the other classes are never trained")
    return dataset


def open_pictures(data: Data, img_size: int) -> PictureDataset:
    """For pictures alone: class folders where there is train/, else captioned pictures."""
    if (Path(data.path) / "train").is_dir():
        return ClassFolder(data.path, None, img_size)
    return TextImageFolder(data.path, img_size, missing=data.missing)


def workers(data: Data) -> int:
    """Loader processes: as asked, at most one a core."""
    return min(data.workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def make_loader(dataset: PictureDataset, sampler: StreamSampler, conditions, data: Data, device: torch.device) -> DataLoader:
    """Batches of one rank; its processes look up the `conditions` that can be looked up there."""
    return DataLoader(
        dataset,
        sampler.batch_size,
        sampler=sampler,
        num_workers=workers(data),
        collate_fn=Collate(conditions if conditions.in_loader else None),
        pin_memory=data.pin_mem and device.type == "cuda",
        persistent_workers=workers(data) > 0,
        worker_init_fn=in_worker,
    )


def hold_out(size: int, wanted: int, seed: int) -> tuple[Tensor, Tensor]:
    """Picture indices to train on and to hold out: `wanted`, but a hundredth of all at most."""
    order = torch.randperm(size, generator=stream(seed, "held out", 0))
    count = min(wanted, size // 100)
    return order[count:].sort().values, order[:count]
