"""The conditions of a text model: captions of the data set by number -> features, from a store on disk, from memory, or from the LLM itself.

Whatever the source, the numbers are the same to float16's rounding. In the first two cases each distinct caption is encoded once
and the LLM is gone before training starts; where the store is complete it is not even loaded.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conditioning import Conditioning, FeatureNorm, LiveText, LiveTokens, StoredText, StoredTokens, norm_of, packed
from config import DrawJob, TextConfig, TextSource, TrainJob
from datasets.prepared import Beside
from text_encoder import LanguageModel, TextEncoder, alike, normalize, usual_dtype
from util import distributed as dist
from util import feature_store as disk
from util import hub
from util.errors import UserError
from util.feature_store import FeatureRows, FeatureStore
from util.files import beside, remove_stale, writable_folder
from util.logging import progress_bar, say
from util.text import PackedText, Text, Y

SAMPLE = 4096  # captions that --text_cache off measures lengths and statistics on, and whose tokens say how large a store of tokens will be
MUCH_TEXT = 65536  # captions whose tokens the statistics are taken of
MUCH_CUT = 0.05  # share of captions cut at --max_text_len that is called out
MUCH_DISK = 0.5  # share of the free disk that a store may take in silence


@dataclass(frozen=True, eq=False)
class Texts(Sequence):
    """What a run may ask features of, in this order: the captions at `training_lines` and at `other_lines`, the prompts, the empty string.

    Statistics are taken of the training lines alone.  beside: where the features of the first len(beside) captions lie, if they lie beside their pictures.
    """

    captions: Sequence[str] = ()
    training_lines: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    other_lines: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    prompts: Sequence[str] = ()
    beside: Beside | None = None

    @cached_property
    def lines(self) -> np.ndarray:
        return np.concatenate([self.training_lines, self.other_lines]).astype(np.int64)

    @cached_property
    def extra(self) -> list[str]:
        return [*self.prompts, ""]

    def __len__(self) -> int:
        return len(self.lines) + len(self.extra)

    def __getitem__(self, i: int) -> str:
        count = len(self.lines)
        return self.captions[self.lines[i]] if i < count else self.extra[i - count]

    def keys(self) -> np.ndarray:
        """What a store knows them by: captions that are one in NFKC are one."""
        return disk.keys_of(map(normalize, self))


def in_parts(chosen: np.ndarray) -> list[np.ndarray]:
    """Parts of SHARD_ROWS, as many as a shard holds."""
    return [chosen[start : start + disk.SHARD_ROWS] for start in range(0, len(chosen), disk.SHARD_ROWS)]


def encoded(encoder: TextEncoder, texts: Sequence[str], keys: np.ndarray, part: np.ndarray) -> dict[str, Tensor]:
    """What a shard of those texts holds."""
    return {"keys": disk.key_array(keys[part]), **encoder.encode_all([texts[i] for i in part])}


def encode_shares(
    encoder: TextEncoder, texts: Sequence[str], keys: np.ndarray, chosen: np.ndarray, done: Callable[[np.ndarray], bool] | None = None
) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
    """This rank's share of texts[chosen] in parts of a shard each: (keys, arrays).

    With `done`, asked by a part's keys, parts that are done are left out, and after its own share a rank helps the others with theirs.
    Every rank of every job takes its parts in an order of its own, so that several jobs on one store share the work too.
    """
    parts = in_parts(chosen)
    own = parts[dist.rank() :: dist.world_size()]
    others = [part for i, part in enumerate(parts) if i % dist.world_size() != dist.rank()] if done else []
    for share in (own, others):
        random.SystemRandom().shuffle(share)
    with progress_bar(sum(map(len, own)), "captions", unit="caption") as bar:
        for i, part in enumerate(own + others):
            if not (done and done(keys[part])):
                yield keys[part], encoded(encoder, texts, keys, part)
            bar.update(len(part) if i < len(own) else 0)


def in_memory(encoder: TextEncoder, texts: Sequence[str], keys: np.ndarray) -> FeatureRows:
    """Features of all `texts` on every rank.  Collective."""
    mine = [arrays for _, arrays in encode_shares(encoder, texts, keys, disk.first_of_each(keys))]
    mine.append(encoded(encoder, texts, keys, np.arange(0)))  # a rank may have no share
    return join_parts(mine, dist.gather_rows)


def join_parts(parts: Sequence[dict[str, Tensor]], gather: Callable[[Tensor], Tensor]) -> FeatureRows:
    """Parts as a store's shards hold them, as one."""
    for arrays in parts:
        if "offsets" in arrays:  # counted from each part's start: differences while joining, summed again below
            arrays["offsets"] = arrays["offsets"].diff()
    found = {name: gather(torch.cat([arrays[name] for arrays in parts])) for name in parts[0]}
    if "offsets" in found:
        found["offsets"] = torch.cat([torch.zeros(1, dtype=torch.long), found["offsets"].cumsum(0)])
    return FeatureRows([{name: values.numpy() for name, values in found.items()}])


def describe_lengths(lengths: np.ndarray, limit: int) -> str:
    """How long captions are, in tokens, and how many are cut.  lengths: (n,), before the cut."""
    shares, low = [], 0
    while low < lengths.max():
        high = 2 * low or 8
        share = ((lengths > low) & (lengths <= high)).mean()
        shares += [f"{low + 1}-{high} {share:.1%}"] if share else []
        low = high
    cut = (lengths > limit).mean()
    return f"tokens a caption: {', '.join(shares)}; longest {lengths.max()}; {cut:.2%} are cut at --max_text_len {limit}"


def enough_for(lengths: np.ndarray) -> int:
    """The smallest --max_text_len that cuts less than 1 % of them."""
    return int(np.quantile(lengths, 0.99, method="higher"))


def evenly(count: int, wanted: int) -> np.ndarray:
    """`wanted` numbers of 0 .. count - 1, evenly spread; all of them where there are not more."""
    return np.arange(count) if count <= wanted else np.linspace(0, count - 1, wanted).astype(np.int64)


def pinned(config: TextConfig, saved: Mapping[str, Any], manifest: Mapping[str, Any], device: torch.device) -> TextConfig:
    """With the LLM's revision and type, where the flags leave them open: those of the checkpoint, of the store, or the device's usual ones."""
    dtype = saved.get("dtype") or manifest.get("dtype") or usual_dtype(device)
    revisions = [made["revision"] for made in (saved, manifest) if made.get("llm") == config.llm and made.get("revision") and not os.path.isdir(config.llm)]
    return replace(config, dtype=dtype if config.dtype == "auto" else config.dtype, revision=revisions[0] if revisions else None)


def check_saved(saved: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Raises: UserError where the features of a checkpoint are not those that this run would make.

    A model may have another name now, be a folder instead of a hub name, or be read by another version of transformers.
    """
    for name, value in description.items():
        found = saved.get(name)
        comparable = name != "revision" or (found and hub.is_local(found) == hub.is_local(value))
        if name in saved and name not in ("llm", "transformers") and comparable and found != value:
            raise UserError(
                f"the checkpoint's text features were made with {name} {found}, this run's with {value}; give the --llm_model_name, --llm_layer, --llm_dtype and --max_text_len that it was trained with"
            )


def statistics_of(features: FeatureRows, rows: np.ndarray, source: TextSource, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """What --text_norm needs to know: what is saved, or that of the training captions at `rows`.  Collective."""
    if source.norm != "standardize":
        return {}
    if "mean" in saved:
        return {"mean": saved["mean"].clone(), "std": saved["std"].clone()}
    tokens = source.encoder.pooling == "tokens"
    mine = (rows[evenly(len(rows), MUCH_TEXT)] if tokens else rows)[dist.rank() :: dist.world_size()]
    norm = FeatureNorm.of((features.tokens(part)[0] if tokens else features(part) for part in in_parts(mine)), features.width)
    return {"mean": norm.mean, "std": norm.std}


class PinnedModel:
    """The LLM of a run: its description at once, on all ranks alike, the model itself where features are missing.  Collective to make."""

    def __init__(self, config: TextConfig, saved: Mapping[str, Any], manifest: Mapping[str, Any], device: torch.device):
        self.config, self.manifest, self.device = pinned(config, saved, manifest, device), manifest, device
        self.description = dist.from_main(LanguageModel(self.config).describe() if dist.is_main() else None)
        check_saved(saved, self.description)

    def load(self) -> TextEncoder:
        say(f"text: loading {self.config.llm} ({self.config.dtype}) on {self.device}")
        return LanguageModel(self.config).load(self.device)


def fill_store(folder: Path, model: PinnedModel, texts: Texts, keys: np.ndarray, missing: np.ndarray) -> None:
    """Encode texts[missing] into new shards, all ranks together.  Collective.  Raises: UserError where the disk has no room."""
    encoder = model.load()
    if dist.is_main():
        remove_stale(folder)
        check_room(folder, encoder, texts, missing)
    manifest = begin_store(folder, model, encoder)
    for part, arrays in encode_shares(encoder, texts, keys, missing, lambda part: (folder / disk.shard_name(part)).exists()):
        disk.write_shard(folder / disk.shard_name(part), manifest, arrays)
    dist.barrier()


def begin_store(folder: Path, model: PinnedModel, encoder: TextEncoder, flag: str = "--text_cache_dir") -> dict[str, Any]:
    """Returns: its manifest, written if there was none.  Collective.  Raises: UserError where that is of other features."""
    if dist.is_main() and disk.read_manifest(folder) is None:
        disk.write_manifest(folder, {**model.description, "stored": "float16", "width": encoder.width, "parameters": encoder.parameters}, flag)
    dist.barrier()
    manifest = disk.read_manifest(folder) or {}
    disk.check_manifest(folder, manifest, model.description, flag)  # another job may have been quicker
    return manifest


def check_room(folder: Path, encoder: TextEncoder, texts: Texts, missing: np.ndarray) -> None:
    """What the features of texts[missing] will take.  Raises: UserError where the disk has no room for them."""
    tokens, remedies = 1.0, "make room, or name another folder"
    if encoder.config.pooling == "tokens":
        sample = [texts[i] for i in missing[evenly(len(missing), SAMPLE)]]
        tokens = sum(map(len, encoder.token_ids(sample, encoder.config.max_text_len))) / len(sample)
        remedies += "; or encode in every step (--text_cache off), take a smaller --llm_model_name, or a shorter --max_text_len"
    each = 2 * encoder.width * tokens + 25
    needed, free = len(missing) * each, shutil.disk_usage(folder).free
    sizes = f"the features of {len(missing)} captions take {size_of(needed)} ({each:,.0f} bytes each), and {size_of(free)} are free"
    if needed > free:
        raise UserError(f"--text_cache_dir {folder}: {sizes}; {remedies}")
    if needed > MUCH_DISK * free:
        say(f"warning: text cache {folder}: {sizes}; {remedies}")
    elif encoder.config.pooling == "tokens":
        say(f"text cache {folder}: {sizes}")


def size_of(count: float) -> str:
    """A number of bytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def from_disk(folder: Path, model: PinnedModel, texts: Texts, keys: np.ndarray) -> FeatureStore:
    """A store that holds all `texts`; where it lacks some, and only there, the LLM is loaded and encodes them.  Collective."""
    if model.manifest:
        disk.check_manifest(folder, model.manifest, model.description)
    store = opened(folder, texts)
    distinct = disk.first_of_each(keys)
    missing = distinct[store.find(keys[distinct]) < 0]
    say(f"text cache {folder}: holds {len(distinct) - len(missing)} of {len(distinct)} texts" + ("" if len(missing) else "; the LLM is not loaded"))
    if len(missing):
        if dist.is_main():
            writable_folder(folder, "--text_cache_dir")
        fill_store(folder, model, texts, keys, missing)
        store = opened(folder, texts)
    return store


def opened(folder: Path, texts: Texts) -> FeatureStore:
    """The shards of a store, without those beside pictures where `texts` knows of them.  Collective."""
    beside = set(texts.beside.names if texts.beside else ())
    return FeatureStore(folder, dist.from_main([name for name in disk.shard_names(folder) if name not in beside]))


def say_lengths(features: FeatureRows, own: np.ndarray, rows: np.ndarray, prompts: np.ndarray, limit: int) -> None:
    """What a user should know of the captions (rows `own`), of the prompts, and of all texts (`rows`)."""
    if len(own):
        lengths = features.lengths(own)
        say(f"captions: {len(own)} different ones; {describe_lengths(lengths, limit)}")
        if (cut := (lengths > limit).mean()) > MUCH_CUT:
            say(f"warning: {cut:.0%} of the captions are cut at --max_text_len {limit}; {enough_for(lengths)} would cut less than 1 %")
    say_prompts(features, prompts, limit)
    if unknown := features.unknown(rows).sum():
        say(f"warning: {unknown} captions and prompts hold characters that this LLM's tokenizer does not know; captions may look the same to it")


def say_prompts(features: FeatureRows, prompts: np.ndarray, limit: int) -> None:
    """Tell of prompts (their rows) that are cut."""
    if len(prompts) and (cut := (features.lengths(prompts) > limit).sum()):
        say(f"warning: {cut} of {len(prompts)} prompts are cut at --max_text_len {limit}; the longest has {features.lengths(prompts).max()} tokens")


def stored_manifest(folder: Path) -> dict[str, Any]:
    """What rank 0 reads; nothing where there is no store yet.  Collective."""
    return dist.from_main(disk.read_manifest(folder)) or {}


def store_folder(source: TextSource, data_path: str, output_dir: str) -> Path:
    """--text_cache_dir, else beside the data; in output_dir where nothing can be written there and no store is there yet."""
    name = disk.FOLDERS[source.encoder.pooling]
    kept = beside(data_path, name)
    usable = kept.is_dir() or os.access(kept.parent, os.W_OK)
    return Path(source.folder or (kept if usable else Path(output_dir) / name))


def source_of(job: TrainJob | DrawJob, any_captions: bool) -> TextSource:
    """The job's, with its store's folder; prompts alone are encoded in memory."""
    if job.text.cache == "disk" and any_captions:
        return replace(job.text, folder=str(store_folder(job.text, job.data.path, job.run.output_dir)))
    return job.text if any_captions else replace(job.text, cache="memory", folder=None)


def build_store(config: TextConfig, folder: Path, captions: Sequence[str], prompts: Sequence[str], device: torch.device) -> None:
    """The store that `prepare` would build, ahead of time.  Collective."""
    model = PinnedModel(config, {}, stored_manifest(folder), device)
    texts = Texts(captions, np.arange(len(captions)), prompts=prompts)
    keys = texts.keys()
    store = from_disk(folder, model, texts, keys)
    rows = store.find(keys)
    say_lengths(store, np.unique(rows[: len(captions)]), np.unique(rows), rows[len(captions) : -1], config.max_text_len)
    size = sum((folder / name).stat().st_size for name in store.names)
    say(f"text cache {folder}: complete, {len(store)} texts in {size / 1e6:.1f} MB, {size / len(store):.0f} bytes each")


class RowsBeside:
    """rows[numbers of captions] -> rows, of those beside their pictures and of some others, after them; -1 where there is none."""

    def __init__(self, beside: Beside, others: np.ndarray, rows: np.ndarray):
        """others: their numbers, rising."""
        self.beside, self.others, self.rows = beside, others, rows

    def __getitem__(self, lines: np.ndarray) -> np.ndarray:
        found, ours = np.full(len(lines), -1), lines < len(self.beside)
        found[ours] = self.beside[lines[ours]]
        known = np.isin(lines, self.others)
        found[known] = self.rows[np.searchsorted(self.others, lines[known])]
        return found


@dataclass(frozen=True)
class Lookup:
    """Features, and the rows in them of training captions, prompts and the empty string."""

    features: FeatureRows
    own: np.ndarray  # rows of the training lines
    extra: np.ndarray  # of the prompts, and of the empty string
    row_of: np.ndarray | RowsBeside | None  # of every caption; None where the LLM reads captions in every step
    encoder: TextEncoder | None = None  # where it had to be loaded


def look_up(features: FeatureRows, texts: Texts, keys: np.ndarray, encoder: TextEncoder | None = None) -> Lookup:
    """The rows of all `texts` in `features`, found by their keys."""
    rows, row_of = features.find(keys), np.full(len(texts.captions), -1)
    own, _, extra = np.split(rows, [len(texts.training_lines), len(texts.lines)])
    row_of[texts.lines] = rows[: len(texts.lines)]
    return Lookup(features, own, extra, row_of, encoder)


def look_up_live(model: PinnedModel, texts: Texts) -> Lookup:
    """A sample of the captions, in memory.  Collective."""
    sample = texts.training_lines[evenly(len(texts.training_lines), SAMPLE)]
    return replace(look_up_in_memory(model, replace(texts, training_lines=sample, other_lines=sample[:0])), row_of=None)


def look_up_in_memory(model: PinnedModel, texts: Texts) -> Lookup:
    """Collective."""
    keys, encoder = texts.keys(), model.load()
    return look_up(in_memory(encoder, texts, keys), texts, keys, encoder)


def look_up_on_disk(folder: Path, model: PinnedModel, texts: Texts) -> Lookup:
    """Collective."""
    keys = texts.keys()
    return look_up(from_disk(folder, model, texts, keys), texts, keys)


def look_up_beside(folder: Path, model: PinnedModel, texts: Texts) -> Lookup:
    """Captions of prepared pictures by their numbers, all others in the same store by its keys.  Collective."""
    beside, numbers = texts.beside, np.unique(texts.lines[texts.lines >= len(texts.beside)])
    others = look_up_on_disk(
        folder, model, replace(texts, captions=[texts.captions[i] for i in numbers], training_lines=np.arange(len(numbers)), other_lines=numbers[:0])
    )
    features = FeatureStore(folder, [*beside.names, *others.features.names], [*beside.counts, *np.diff(others.features.starts).tolist()])
    row_of = RowsBeside(beside, numbers, others.own + beside.size)
    return Lookup(features, row_of[texts.training_lines], others.extra + beside.size, row_of)


def usable_beside(source: TextSource, beside: Beside | None) -> Beside | None:
    """Where the source's store is the one beside the pictures, and still there.  source: with its folder."""
    there = beside and source.cache == "disk" and source.encoder.pooling == "mean" and Path(source.folder or "") == beside.folder
    return beside if there and (beside.folder / disk.MANIFEST).is_file() else None


def prepare(source: TextSource, texts: Texts, saved: Mapping[str, Any], device: torch.device, origin: Mapping[str, Any] | None = None) -> Conditioning:
    """Conditions for the captions of `texts`, and features of its prompts.  Collective.

    Args: source: with `folder` where its cache is "disk"; saved: the description in a checkpoint, or nothing; origin: that of --init_from's, whose
    statistics stay in use where the features are the same.
    Raises: UserError where `saved` tells of other features.
    """
    folder = Path(source.folder or "")
    model = PinnedModel(source.encoder, saved, stored_manifest(folder) if source.cache == "disk" else {}, device)
    if source.cache == "disk":
        found = (look_up_beside if texts.beside else look_up_on_disk)(folder, model, texts)
    else:
        found = (look_up_live if source.cache == "off" else look_up_in_memory)(model, texts)
    features, distinct, length = found.features, np.unique(found.own), source.encoder.max_text_len
    others = found.extra if found.row_of is None else np.concatenate([found.extra, found.row_of[texts.other_lines]])
    say_lengths(features, distinct, np.unique(np.concatenate([distinct, others])), found.extra[:-1], length)

    description = {**model.description, "width": features.width, "text_norm": source.norm}
    same = origin is not None and alike(origin, description) and origin.get("pooling") == description["pooling"]
    noted = texts.beside.statistics if texts.beside else {}
    description |= statistics_of(features, distinct, source, {**noted, **(origin if same else saved)})
    norm = norm_of(description)
    live = found.row_of is None
    if source.encoder.pooling == "tokens":
        y_of = LiveTokens(found.encoder, texts.captions, length, norm) if live else StoredTokens(features, found.row_of, length, norm)
    else:
        null = read_rows(features, found.extra[-1:], source.encoder, norm)
        y_of = LiveText(found.encoder, texts.captions, null, norm) if live else StoredText(features, found.row_of, null, norm)
    frozen = found.encoder.parameters if found.encoder else (disk.read_manifest(folder) or {}).get("parameters", 0)
    prompts = read_rows(features, found.extra[:-1], source.encoder, norm)
    return Conditioning(y_of, prompts, description, features.width, frozen, bytes_each(features, distinct, source.encoder))


def conditions_of_prompts(encoder: TextEncoder, prompts: Sequence[str], norm: Callable[[Tensor], Tensor]) -> tuple[Tensor | PackedText, Y]:
    """y of prompts and of nothing, encoded together as one process does in `prepare`, so that the numbers are the same to the bit."""
    texts, config = Texts(prompts=prompts), encoder.config
    keys = texts.keys()
    features = join_parts([encoded(encoder, texts, keys, part) for part in in_parts(disk.first_of_each(keys))], lambda rows: rows.cpu())
    rows = features.find(keys)
    say_prompts(features, rows[:-1], config.max_text_len)
    null = Text.null(config.max_text_len, features.width) if config.pooling == "tokens" else read_rows(features, rows[-1:], config, norm)
    return read_rows(features, rows[:-1], config, norm), null


def read_rows(features: FeatureRows, rows: np.ndarray, config: TextConfig, norm: Callable[[Tensor], Tensor]) -> Tensor | PackedText:
    """y of those rows of a store."""
    return packed(*features.tokens(rows), config.max_text_len, norm) if config.pooling == "tokens" else norm(features(rows))


def bytes_each(features: FeatureRows, rows: np.ndarray, config: TextConfig) -> int:
    """What a caption takes on its way from a loader's process, on average."""
    if config.pooling == "mean" or not len(rows):
        return 4 * features.width
    return round(2 * features.width * np.minimum(features.lengths(rows), config.max_text_len).mean())
