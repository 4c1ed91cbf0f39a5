"""Evaluation: pictures drawn on every rank, seen through every measure as they are drawn; figures written down with all they depend on; sweeps.

A measure sees each picture once, on the rank that drew it, and is asked for its figures at the end. Pictures are measured as the
uint8 that a PNG would hold; picture i follows from the seed, i and its condition alone.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from datasets.stream import PictureDataset
from denoiser import SamplerConfig
from engine_jit import Painter, TrainState, drawing_with, save_pictures
from util import distributed as dist
from util import metrics, reference
from util.errors import UserError
from util.extractors import AT_A_TIME, Clip, Extractor
from util.files import writable_folder, write_whole
from util.logging import progress, say
from util.randomness import stream
from util.reference import Reference
from util.stopping import in_worker

OTHERS = 99  # captions that R-precision puts beside a picture's own
MUCH_INITIAL = 0.05  # share of initial weights in an average that is called out
LIBRARIES = ("torch", "torchvision", "torch-fidelity", "transformers", "timm", "numpy", "pillow")
TITLES = {
    "fid": "FID", "is": "IS", "clip_score": "CLIP score", "r_precision": "R-precision", "precision": "precision", "recall": "recall", "fd_dinov2": "FD-DINOv2",
}  # fmt: skip


@dataclass(frozen=True)
class Subjects:
    """What the pictures of an evaluation are to show."""

    conditions: Tensor  # (count,) labels, or numbers of captions
    source: str = "labels"  # where they are from
    captions: Sequence[str] = ()  # picture i's, for a text model

    def __len__(self) -> int:
        return len(self.conditions)

    def digest(self) -> str:
        """What identifies them: the captions' text, or the labels."""
        text = "\n".join(self.captions) if self.captions else repr(self.conditions.tolist())
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


class Measure(Protocol):
    def begin(self, subjects: Subjects) -> None:
        """Collective."""

    def add(self, numbers: list[int], pictures: Tensor) -> None:
        """Numbers of pictures, and the pictures, (B, 3, H, W) uint8."""

    def figures(self) -> dict[str, float]:
        """Rank 0's are the figures.  Collective."""

    def facts(self, subjects: Subjects) -> dict[str, Any]:
        """What they depend on besides the pictures.  For rank 0 alone."""


class Frechet:
    """Fréchet distance of the first layer's features to the reference and, where there are logits, the Inception score."""

    def __init__(self, name: str, extractor: Extractor, reference: Reference | None):
        """reference: rank 0's."""
        self.name, self.extractor, self.reference = name, extractor, reference

    def begin(self, subjects: Subjects) -> None:
        self.moments, self.logits = metrics.Moments(), metrics.NumberedRows()

    def add(self, numbers: list[int], pictures: Tensor) -> None:
        features, *logits = self.extractor(pictures)
        self.moments.add(features)
        for rows in logits:
            self.logits.add(numbers, rows)

    def figures(self) -> dict[str, float]:
        statistics, _ = self.moments.statistics()
        logits = self.logits.in_order()
        if not dist.is_main():
            return {}
        found = {self.name: metrics.frechet_distance(statistics, self.reference.values)}
        return found | ({"is": metrics.inception_score(logits)} if len(logits) else {})

    def facts(self, subjects: Subjects) -> dict[str, Any]:
        made = self.reference
        return {self.name: {"extractor": self.extractor.identity, "reference": made.path.name, "reference_sha256": made.sha256, **made.facts}}


class Manifold:
    """Precision and recall against as many pictures of the data, spread over it."""

    def __init__(self, extractor: Extractor, dataset: PictureDataset, num_workers: int):
        self.extractor, self.dataset, self.num_workers = extractor, dataset, num_workers
        self.real: dict[int, Tensor] = {}  # features by number of pictures

    def begin(self, subjects: Subjects) -> None:
        self.count = self._count(subjects)
        if self.count not in self.real:
            real = metrics.NumberedRows()
            chosen = [spread(i, len(self.dataset), self.count) for i in range(self.count)]
            for places, pictures in read_pictures(self.dataset, chosen, self.num_workers):
                real.add(places, self.extractor(pictures)[0])
            self.real[self.count] = real.in_order()
        self.drawn = metrics.NumberedRows()

    def add(self, numbers: list[int], pictures: Tensor) -> None:
        self.drawn.add(numbers, self.extractor(pictures)[0])

    def figures(self) -> dict[str, float]:
        drawn = self.drawn.in_order()
        if not dist.is_main():
            return {}
        device = self.extractor.device
        return dict(zip(("precision", "recall"), metrics.precision_recall(drawn.to(device), self.real[self.count].to(device))))

    def facts(self, subjects: Subjects) -> dict[str, Any]:
        return {
            "precision_recall": {"extractor": self.extractor.identity, "real_pictures_asked_for": self._count(subjects), "neighbourhood": metrics.NEIGHBOURHOOD}
        }

    def _count(self, subjects: Subjects) -> int:
        return min(len(subjects), len(self.dataset))


class Alignment:
    """Does the picture show its caption?  100 x cosine under a CLIP, and how often the own caption is the nearest among others.

    A caption's others are its next ones in a shuffle of all different captions, so they follow from the seed and the captions.
    """

    def __init__(self, clip: Clip, seed: int):
        self.clip, self.seed = clip, seed
        self.known: tuple[str, Tensor] = ("", torch.empty(0))  # digest of the captions, and their features

    def begin(self, subjects: Subjects) -> None:
        texts = list(dict.fromkeys(subjects.captions))
        texts = [texts[i] for i in torch.randperm(len(texts), generator=stream(self.seed, "r-precision", 0)).tolist()]
        place = {text: i for i, text in enumerate(texts)}
        self.own = torch.tensor([place[caption] for caption in subjects.captions])
        self.others = self._others(subjects)
        if self.known[0] != subjects.digest():
            self.known = (subjects.digest(), self._features(texts))
        self.sums = torch.zeros(3, dtype=torch.float64)  # of 1, of the cosine, of being nearest

    def _features(self, texts: list[str]) -> Tensor:
        size = -(-len(texts) // dist.world_size())
        share = texts[dist.rank() * size : (dist.rank() + 1) * size]
        return dist.gather_rows(self.clip.of_captions(share or texts[:1])[: len(share)])

    def add(self, numbers: list[int], pictures: Tensor) -> None:
        features = self.known[1]
        chosen = (self.own[numbers][:, None] + torch.arange(self.others + 1)) % len(features)  # (B, 1 + others), the own one first
        cosine = (features[chosen] @ self.clip.of_pictures(pictures)[:, :, None])[..., 0].double()
        own, others = cosine[:, 0], cosine[:, 1:]
        self.sums += torch.stack([torch.tensor(float(len(numbers))), own.sum(), (own[:, None] > others).all(1).sum()])

    def figures(self) -> dict[str, float]:
        count, cosine, nearest = dist.sum_over_ranks(self.sums).tolist()
        return {"clip_score": 100 * cosine / count, "r_precision": nearest / count}

    def facts(self, subjects: Subjects) -> dict[str, Any]:
        return {"clip_score": {"clip_model": self.clip.identity, "scale": "100 x cosine", "captions_besides_the_own": self._others(subjects)}}

    @staticmethod
    def _others(subjects: Subjects) -> int:
        return min(OTHERS, len(set(subjects.captions)) - 1)


def spread(i: int, size: int, count: int) -> int:
    """Item of `size` that number i of `count` is: evenly spread where there are fewer numbers than items, else round and round."""
    return i * size // count if count < size else i % size


class _Share(Dataset):
    """A rank's share of the pictures `chosen`, as training crops them, unflipped: place in `chosen`, and None for one that cannot be read."""

    def __init__(self, dataset: PictureDataset, chosen: Sequence[int]):
        self.dataset, self.chosen = dataset, chosen
        self.places = range(dist.rank(), len(chosen), dist.world_size())

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[int, Tensor | None]:
        place = self.places[i]
        try:
            return place, self.dataset.picture(self.chosen[place])
        except Exception:  # decoders raise nearly anything; counted by whoever asked
            return place, None


def _stacked(rows: list[tuple[int, Tensor | None]]) -> tuple[int, list[int], Tensor]:
    """One tensor a batch: a list of them would take a file descriptor for each picture on its way from the worker."""
    found = [(number, picture) for number, picture in rows if picture is not None]
    return len(rows), [number for number, _ in found], torch.stack([picture for _, picture in found]) if found else torch.empty(0)


def read_pictures(dataset: PictureDataset, chosen: Sequence[int], num_workers: int) -> Iterator[tuple[list[int], Tensor]]:
    """This rank's share of the pictures `chosen`: their places in it, and (B, 3, H, W) uint8; unreadable ones are left out."""
    share = _Share(dataset, chosen)
    generator = torch.Generator()  # or the loader would draw from the one that training may use
    loader = DataLoader(share, AT_A_TIME, num_workers=num_workers, collate_fn=_stacked, generator=generator, worker_init_fn=in_worker)
    with progress(len(share), "reference", unit="picture") as bar:
        for count, places, pictures in loader:
            if places:
                yield places, pictures
            bar.update(count)


def facts_of(dataset: PictureDataset, root: str, extractor: Extractor) -> dict[str, str | int]:
    """What the data's own statistics are of; the files by their names."""
    return {
        "extractor": extractor.identity,
        "img_size": dataset.img_size,
        "crop": reference.CROP,
        "files": len(dataset),
        "data": dataset.fingerprint(root),
    }


def is_kept(path: Path, dataset: PictureDataset, root: str, extractor: Extractor) -> bool:
    """Whether `path` holds the statistics of this data set under this network.

    Raises: UserError where the file there does not say what it is of: somebody put it there.
    """
    try:
        facts = reference.read(path).facts
    except UserError:  # not there, or cut short: made anew
        return False
    if "data" not in facts:
        raise UserError(f"{path} does not say which pictures it is of; name it by --fid_stats, or move it away for statistics of the data itself")
    return all(facts.get(name) == value for name, value in facts_of(dataset, root, extractor).items())


def make_reference(dataset: PictureDataset, root: str, extractor: Extractor, path: Path, num_workers: int) -> None:
    """Statistics of all pictures under the training's crop into `path`.  Collective.

    Raises: UserError where over 1 % of the files cannot be read, or the file not be written.
    """
    if len(set(seen := dist.gather_objects(len(dataset)))) > 1:
        raise UserError(f"the processes see different data (pictures): {seen}; do all nodes see the same --data_path?")
    if dist.is_main():
        writable_folder(path.parent, "reference statistics:")
    say(f"reference statistics of {len(dataset)} pictures, made once, kept in {path}")
    moments = metrics.Moments()
    for _, pictures in read_pictures(dataset, range(len(dataset)), num_workers):
        moments.add(extractor(pictures)[0])
    values, count = moments.statistics()
    if len(dataset) - count > 0.01 * len(dataset):
        raise UserError(f"{len(dataset) - count} of {len(dataset)} pictures below {root} cannot be read, over 1 %: no reference statistics are made")
    if count < len(dataset):
        say(f"{len(dataset) - count} unreadable pictures are left out of {path}")
    if dist.is_main():
        reference.write(path, values, facts_of(dataset, root, extractor) | {"n": count})
    dist.barrier()


def evaluate(
    painter: Painter, y_of: Callable[[Tensor], Tensor], subjects: Subjects, measures: Sequence[Measure], folder: Path | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Draw a picture of each subject over all ranks and measure them as they are drawn.  Collective.

    Args: y_of: the subjects' conditions -> what the network takes, (B, ...); folder: where to keep the pictures as PNG, if at all.
    Returns: rank 0's figures, and the seconds that rank 0 spent.
    """
    started = time.perf_counter()
    seconds = {"drawing": 0.0, "features": 0.0}
    for measure in measures:
        measure.begin(subjects)
    drawn = painter.draw(lambda numbers: y_of(subjects.conditions[numbers]), len(subjects), "evaluation")
    while True:
        before = time.perf_counter()
        batch = next(drawn, None)
        seconds["drawing"] += time.perf_counter() - before
        if batch is None:
            break
        if folder:
            save_pictures(folder, *batch, digits=6)
        before = time.perf_counter()
        for measure in measures:
            measure.add(*batch)
        seconds["features"] += time.perf_counter() - before
    figures = {}
    for measure in measures:
        figures |= measure.figures()
    seconds["rest"] = time.perf_counter() - started - sum(seconds.values())
    return dist.from_main(figures), seconds


def short(count: int) -> str:
    """50000 -> "50k"."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def digest_of(net: nn.Module) -> str:
    """SHA-256 of a network's weights as it computes with them now."""
    value = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        value.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return value.hexdigest()


def call_out_initial(state: TrainState, weights: str) -> None:
    """An average that still holds much of the initial weights draws noise, however well training goes.  A published file says no step."""
    shares = {str(i + 1): ema.initial_share(state.step) for i, ema in enumerate(state.emas)}
    if state.step and shares.get(weights, 0) >= MUCH_INITIAL:
        better = ["raw", *(other for other, share in shares.items() if share < MUCH_INITIAL)]
        say(f"warning: EMA {weights} is {shares[weights]:.0%} initial weights at step {state.step:,}; use --eval_ema {' or '.join(better)}")


def describe(weights: str, step: int | None, sampler: SamplerConfig, seed: int) -> str:
    """How pictures were drawn, in a line."""
    which = "raw weights" if weights == "raw" else f"EMA {weights}"
    low, high = sampler.cfg_interval
    return f"{which}{f' at step {step}' if step else ''}, cfg {sampler.cfg_scale:g} in {low:g}-{high:g}, {sampler.method} {sampler.steps}, seed {seed}"


@dataclass(frozen=True)
class Record:
    """Figures, and everything needed to believe them."""

    figures: dict[str, float]
    setting: dict[str, Any]  # what they depend on; the file's name carries its hash
    made: dict[str, Any] = field(default_factory=dict)  # how, where and when: they do not depend on it

    @property
    def place(self) -> str:
        sampling = self.setting["sampling"]
        low, high = sampling["cfg_interval"]
        weights = self.setting["weights"]["which"]
        name = f"{weights if weights == 'raw' else f'ema{weights}'}_cfg{sampling['cfg_scale']:g}_{low:g}-{high:g}_{sampling['method']}{sampling['steps']}"
        return f"{self.setting['img_size']}px_{name}"

    @property
    def name(self) -> str:
        digest = hashlib.sha256(json.dumps(self.setting, sort_keys=True).encode()).hexdigest()[:8]
        step = self.setting["weights"]["step"]
        return f"{f'step{step}' if step else 'published'}_{self.place}_{short(self.setting['pictures'])}_{digest}"

    def scalars(self) -> dict[str, float]:
        """Under TensorBoard's names, with number, size, weights and guidance in them."""
        return {f"{TITLES[name]}-{short(self.setting['pictures'])}/{self.place}": value for name, value in self.figures.items()}

    def line(self) -> str:
        weights, sampling = self.setting["weights"], self.setting["sampling"]
        of = self.setting.get("clip_score", {}).get("captions_besides_the_own", 0) + 1
        notes = {"clip_score": " (100 x cosine)", "r_precision": f" (of {of})"}
        digits = {"fid": ".3f", "is": ".2f", "clip_score": ".2f", "fd_dinov2": ".2f"}
        count = short(self.setting["pictures"])
        found = "  ".join(f"{TITLES[name]}-{count} {value:{digits.get(name, '.3f')}}{notes.get(name, '')}" for name, value in self.figures.items())
        made = self.setting.get("fid")
        against = f", reference {made['reference']} (sha256 {made['reference_sha256'][:8]})" if made else ""
        return f"{found or 'no figures'}  [{describe(weights['which'], weights['step'], SamplerConfig(**sampling), self.setting['seed'])}{against}]"


def as_plain(value: Any) -> Any:
    """As JSON would give it back: lists for tuples."""
    return json.loads(json.dumps(value))


@dataclass(frozen=True)
class Evaluator:
    """Evaluates weights under settings, and writes down what came out with what it depends on, in `folder`."""

    state: TrainState
    painter: Painter
    measures: Sequence[Measure]
    y_of: Callable[[Tensor], Tensor]  # conditions of subjects -> what the network takes
    subjects: Mapping[int, Subjects]  # by number of pictures
    facts: Mapping[str, Any]  # of the run: model, size, precision
    folder: Path
    checkpoint: str | None = None  # the file whose weights these are
    save_images: bool = False

    def __call__(self, weights: str, sampler: SamplerConfig, count: int, save: bool | None = None, again: bool = True) -> Record:
        """Collective.  Without `again` (in a sweep) a record of the same setting that is there already is taken."""
        if again:
            call_out_initial(self.state, weights)
        save = self.save_images if save is None else save
        with drawing_with(self.state, weights):
            painter, subjects = replace(self.painter, sampler=sampler), self.subjects[count]
            setting = dist.from_main(self._setting(weights, painter, subjects) if dist.is_main() else None)
            path = self.folder / f"{Record({}, setting).name}.json"
            if not again and (known := dist.from_main(self._known(path, setting))):
                say(f"{known.line()}  as measured before: {path.name}")
                return known
            folder = self._pictures_folder(path) if save else None
            figures, seconds = evaluate(painter, self.y_of, subjects, self.measures, folder)
        if painter.device.type == "cuda":
            torch.cuda.empty_cache()  # training goes on with tensors of other sizes
        record = Record(figures, setting, self._made(subjects, seconds))
        self._write(path, record, folder, subjects)
        say(record.line())
        if again:
            say(f"written to {path}" + (f", pictures in {folder}" if folder else ""))
        return record

    def _setting(self, weights: str, painter: Painter, subjects: Subjects) -> dict[str, Any]:
        decay = None if weights == "raw" else self.state.emas[int(weights) - 1].decay
        setting = {
            **self.facts,
            "weights": {"which": weights, "decay": decay, "step": self.state.step or None, "sha256": digest_of(self.state.net)},
            "img_size": painter.img_size,
            "diffusion": asdict(painter.diffusion),
            "sampling": asdict(painter.sampler),
            "seed": painter.seed,
            "pictures": len(subjects),
            "subjects_sha256": subjects.digest(),
            "libraries": {name: version(name) for name in LIBRARIES},
        }
        for measure in self.measures:
            setting |= measure.facts(subjects)
        return as_plain(setting)

    def _made(self, subjects: Subjects, seconds: Mapping[str, float]) -> dict[str, Any]:
        device = self.painter.device
        return {
            "checkpoint": self.checkpoint,
            "subjects": subjects.source,
            "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "processes": dist.world_size(),
            "batch": self.painter.batch_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "pictures_per_second": round(len(subjects) / sum(seconds.values()), 3),
        }

    @staticmethod
    def _known(path: Path, setting: Mapping[str, Any]) -> Record | None:
        try:
            found = Record(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # not there, or not one of ours
            return None
        return found if found.setting == setting else None

    @staticmethod
    def _pictures_folder(path: Path) -> Path:
        folder = path.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        if dist.is_main():
            for old in folder.glob("*.png"):
                old.unlink()
        dist.barrier()
        return folder

    @staticmethod
    def _write(path: Path, record: Record, folder: Path | None, subjects: Subjects) -> None:
        if not dist.is_main():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(record), ensure_ascii=False, indent=2) + "\n"
        write_whole(path, lambda file: file.write(text.encode()))
        if folder:
            shown = subjects.captions or subjects.conditions.tolist()
            lines = [json.dumps({"file": f"{i:06d}.png", "shows": what}, ensure_ascii=False) for i, what in enumerate(shown)]
            (folder / "pictures.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def sweep(
    evaluator: Evaluator, weights: Sequence[str], scales: Sequence[float], intervals: Sequence[tuple[float, float]], few: int, many: int
) -> tuple[list[Record], Record]:
    """All combinations with `few` pictures, as the paper chooses EMA and cfg (arXiv:2511.13720, table 9), then the best FID's with `many`.  Collective.

    Combinations measured before are not measured again, so a sweep that was killed goes on. Without guidance there is no interval.
    Returns: the records of the sweep, and that of the best.
    """
    for which in weights:
        call_out_initial(evaluator.state, which)
    records = [
        evaluator(which, replace(evaluator.painter.sampler, cfg_scale=scale, cfg_interval=interval), few, save=False, again=False)
        for which in weights
        for interval in intervals
        for scale in scales
        if scale != 1 or interval == intervals[0]
    ]
    best = min(records, key=lambda record: record.figures["fid"])
    sampling = best.setting["sampling"]
    if dist.is_main():
        stem = evaluator.folder / f"sweep_step{evaluator.state.step}_{short(few)}"
        text = table(records, best)
        stem.with_suffix(".md").write_text(text, encoding="utf-8")
        plot(records, best, stem.with_suffix(".png"))
        say(f"\n{text}\ntable and plot: {stem}.md, {stem}.png")
    if sampling["cfg_scale"] in {min(scales), max(scales)} - {1} and len(set(scales)) > 2:
        say(f"the best cfg, {sampling['cfg_scale']:g}, is at the end of the range: a wider --cfg may hold a better one")
    sampler = replace(evaluator.painter.sampler, cfg_scale=sampling["cfg_scale"], cfg_interval=tuple(sampling["cfg_interval"]))
    return records, evaluator(best.setting["weights"]["which"], sampler, many, again=evaluator.save_images)


def table(records: Sequence[Record], best: Record) -> str:
    """Markdown; the best FID is marked."""
    names = list(records[0].figures)
    count = short(records[0].setting["pictures"])
    rows = [["weights", "cfg", "interval", *(f"{TITLES[name]}-{count}" for name in names)], ["---"] * (3 + len(names))]
    for record in records:
        sampling = record.setting["sampling"]
        low, high = sampling["cfg_interval"]
        figures = [f"{record.figures[name]:.3f}" + (" **best**" if record is best and name == "fid" else "") for name in names]
        rows.append([record.setting["weights"]["which"], f"{sampling['cfg_scale']:g}", f"{low:g}-{high:g}", *figures])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def plot(records: Sequence[Record], best: Record, path: Path) -> None:
    """Each figure against cfg, one line for each pair of weights and interval; the best FID's setting is circled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(records[0].figures)
    figure = Figure(figsize=(4.5 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    lines: dict[tuple, list[Record]] = {}
    for record in records:
        lines.setdefault((record.setting["weights"]["which"], tuple(record.setting["sampling"]["cfg_interval"])), []).append(record)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for (which, (low, high)), line in lines.items():
            points = sorted((record.setting["sampling"]["cfg_scale"], record.figures[name]) for record in line)
            axes.plot(*zip(*points), marker=".", label=f"{which if which == 'raw' else f'EMA {which}'}, {low:g}-{high:g}")
        axes.plot(best.setting["sampling"]["cfg_scale"], best.figures[name], "o", markersize=12, fillstyle="none", color="black")
        axes.set(xlabel="cfg", title=f"{TITLES[name]}-{short(best.setting['pictures'])}")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
