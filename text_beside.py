"""Features of captions beside their pictures: each shard that prepare_data.py makes gets a shard of the text store, with its captions in their order.

So the number of a caption says where its features lie, and training looks nothing up, however many there are.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conditioning import FeatureNorm
from config import TextConfig
from datasets.prepared import Beside
from datasets.shards import captions_of, features_beside, shard_name, text_store
from text_encoder import TextEncoder, normalize
from text_features import MUCH_TEXT, PinnedModel, Texts, begin_store, evenly, in_parts, stored_manifest
from util import feature_store as disk
from util.errors import UserError
from util.feature_store import FeatureStore
from util.files import writable_folder


class Encoding:
    """encoding(number) -> number, once the features of that shard's captions are there.  The language model is loaded with the first that lacks them."""

    def __init__(self, config: TextConfig, out: Path, device: torch.device, prompts: Sequence[str]):
        """prompts: put into the store too, with the empty string, so that training finds all that it needs."""
        self.config, self.out, self.device, self.prompts = config, out, device, prompts

    def __call__(self, number: int) -> int:
        shard = self.out / shard_name(number)
        if not features_beside(shard).exists():
            write(features_beside(shard), captions_of(shard), *self.model)
        return number

    @cached_property
    def model(self) -> tuple[TextEncoder, dict[str, Any]]:
        """With the manifest of its store, which is begun with the prompts."""
        folder, model = writable_folder(text_store(self.out), "--out"), checked(self.config, self.out, self.device)
        encoder = model.load()
        manifest = begin_store(folder, model, encoder, "--out")
        prompts = Texts((), np.arange(0), prompts=self.prompts)
        place = folder / disk.shard_name(prompts.keys())
        if not place.exists():
            write(place, prompts, encoder, manifest)
        return encoder, manifest


@lru_cache(maxsize=1)
def checked(config: TextConfig, out: Path, device: torch.device) -> PinnedModel:
    """The language model, described once a process.  Raises: UserError where there is none such, or where the features of another lie there."""
    model = PinnedModel(config, {}, stored_manifest(text_store(out)), device)
    if model.manifest:
        disk.check_manifest(text_store(out), model.manifest, model.description, "--out")
    return model


def write(place: Path, captions: Sequence[str], encoder: TextEncoder, manifest: dict[str, Any]) -> None:
    """Their shard of a store; each distinct caption is encoded once.  Raises: UserError."""
    keys = disk.keys_of(map(normalize, captions))
    _, first, again = np.unique(keys, return_index=True, return_inverse=True)
    found = encoder.encode_all([captions[i] for i in first])
    disk.write_shard(place, manifest, {"keys": disk.key_array(keys), **{name: values[again] for name, values in found.items()}}, "--out")


def check_captions(features: FeatureStore) -> None:
    """Raises: UserError where a shard's features are not those of the captions that it has."""
    for name, held in zip(features.names, features.shards):
        shard = (features.folder.parent / name).with_suffix(".tar")
        if not np.array_equal(held["keys"], disk.key_array(disk.keys_of(map(normalize, captions_of(shard))))):
            raise UserError(f"{features.folder / name} does not hold the features of the captions in {shard.name}; delete it and run the command again")


def statistics(beside: Beside) -> dict[str, Tensor]:
    """Mean and std of a fixed sample of the captions.  Raises: UserError for features that are damaged, or of other captions."""
    features = FeatureStore(beside.folder, beside.names, beside.counts)
    check_captions(features)
    sample = beside[evenly(len(beside), MUCH_TEXT)]
    norm = FeatureNorm.of(map(features, in_parts(sample)), features.width)
    return {"mean": norm.mean, "std": norm.std}
