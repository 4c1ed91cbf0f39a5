"""What an evaluation will measure, and on what: all that is cheap and may fail is done here, before the first expensive thing starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from config import NEIGHBOURHOOD, Data, Eval, Model
from datasets.source import workers
from datasets.stream import Joined, PackedStrings, PictureDataset
from datasets.text_image import files_below, read_captions
from evaluation.measures import Alignment, Frechet, Manifold, Measure, Subjects
from evaluation.references import Kept, find_kept, make_reference, spread
from util import distributed as dist
from util import extractors, reference
from util.errors import UserError
from util.files import read_lines
from util.logging import say
from util.reference import Reference


@dataclass(frozen=True)
class Networks:
    """What an evaluation sees pictures through; None for what is not wanted or cannot be had."""

    inception: extractors.Extractor | None = None
    vgg16: extractors.Extractor | None = None
    dinov2: extractors.Extractor | None = None
    clip: extractors.Clip | None = None


def find_networks(config: Eval, model: Model, device: torch.device) -> Networks:
    """Looked for before anything else starts.  Collective.  Raises: UserError where one that was asked for cannot be had."""
    unwanted = config.inception_weights == "none"
    inception = None if unwanted else extractors.load_fidelity(extractors.INCEPTION, config.inception_weights, device)
    if inception is None:
        absent = "--inception_weights none" if unwanted else f"no Inception weights; {extractors.missing(extractors.INCEPTION)}"
        if config.demands == "fid" or config.fid_stats:
            raise UserError(f"{'--sweep chooses by FID' if config.demands == 'fid' else '--fid_stats is for FID'}: {absent}")
        say(f"FID and IS are left out: {absent}")
    vgg16 = extractors.load_fidelity(extractors.VGG16, config.vgg16_weights, device) if config.precision_recall else None
    if config.precision_recall and vgg16 is None:
        raise UserError(f"--precision_recall: no VGG16 weights; {extractors.missing(extractors.VGG16)}")
    dinov2 = extractors.load_dinov2(config.fd_dinov2, device) if config.fd_dinov2 else None
    if model.is_text and not config.clip_model:
        say("CLIP score and R-precision are left out: no --clip_model, such as llm-jp/waon-siglip2-base-patch16-256")
    return Networks(inception, vgg16, dinov2, extractors.load_clip(config.clip_model, device) if config.clip_model else None)


def read_eval_captions(path: Path) -> list[str]:
    """Those of a file, or of all .txt in a folder, or in captions/ in it.  Raises: UserError where there are none."""
    if not path.is_dir():
        return read_lines(path, "--eval_captions")
    folder = path / "captions" if (path / "captions").is_dir() else path
    captions = [line for files in files_below(folder, {".txt"}).values() for file in files for line in read_captions(file)]
    if not captions:
        raise UserError(f"--eval_captions {path}: no .txt with a line of text in this folder")
    return captions


@dataclass(frozen=True)
class Request:
    """What an evaluation is asked for, found before the data is opened."""

    config: Eval
    networks: Networks
    reference: Reference | None  # that of --fid_stats, on rank 0
    captions: Sequence[str]  # those of --eval_captions


def find_requested(config: Eval, model: Model, counts: Sequence[int], device: torch.device) -> Request:
    """Networks, statistics and captions that the flags name; counts: of pictures.  Collective.  Raises: UserError where one cannot be had."""
    if min(counts) < dist.world_size():
        raise UserError(
            f"{min(counts)} pictures (--num_images, --sweep_images) are too few for {dist.world_size()} processes; wanted at least one picture per process"
        )
    networks = find_networks(config, model, device)
    check_measurable(config, networks != Networks())
    found = None
    if config.fid_stats and dist.is_main():
        found = reference.read(Path(config.fid_stats))
        reference.check(found, networks.inception.identity, extractors.INCEPTION_WIDTH, model.img_size)
    return Request(config, networks, found, PackedStrings(read_eval_captions(Path(config.captions)) if config.captions else ()))


def check_measurable(config: Eval, anything: bool) -> None:
    """Raises: UserError where an evaluation would come to nothing."""
    if config.demands == "figures" and not anything and not config.save_images:
        raise UserError("--evaluate_gen has nothing to measure: see the lines above for what is left out and why, or keep the pictures by --save_images")


@dataclass(frozen=True)
class Plan:
    request: Request
    data: Data
    dataset: PictureDataset | None  # None where there is no data to compare with
    kept: dict[str, Kept]  # the data's own statistics, by figure

    @cached_property
    def captions(self) -> Sequence[str]:
        """The data's, and after them those of --eval_captions; `Subjects` of a text model hold their numbers."""
        return Joined(self.dataset.captions if self.dataset else (), self.request.captions)

    def subjects(self, model: Model, count: int) -> Subjects:
        """What `count` pictures are to show: as many labels of each class, or captions spread over those of --eval_captions or the data.

        Classes are those of the data, or where --fid_stats names the reference, all of the model.
        """
        dataset, asked = self.dataset, self.request.captions
        if not model.is_text:
            classes = len(dataset.classes) if dataset and not self.request.config.fid_stats else model.class_num
            return Subjects(torch.arange(count) % classes)
        own = len(dataset.captions) if dataset else 0
        if len(asked):
            lines = [own + spread(i, len(asked), count) for i in range(count)]
        else:
            lines = [dataset.condition(spread(i, len(dataset), count), i) for i in range(count)]
        source = self.request.config.captions or f"captions of {self.data.path}"
        return Subjects(torch.tensor(lines), source, [self.captions[number] for number in lines])

    def measures(self, seed: int) -> list[Measure]:
        """Ready to measure; the data's own statistics are made where there are none, which takes a while.  Collective."""
        networks, found = self.request.networks, []
        if self.request.config.fid_stats and networks.inception:
            found.append(Frechet("fid", networks.inception, self.request.reference))
        for figure, kept in self.kept.items():
            if not kept.there:
                make_reference(self.dataset, self.data.path, kept.extractor, kept.path, workers(self.data))
            found.append(Frechet(figure, kept.extractor, reference.read(kept.path) if dist.is_main() else None))
        if networks.clip:
            found.append(Alignment(networks.clip, seed))
        if networks.vgg16:
            found.append(Manifold(networks.vgg16, self.dataset, workers(self.data)))
        return found


def plan(request: Request, data: Data, dataset: PictureDataset | None, output_dir: Path) -> Plan:
    """Says what is left out.  Collective.  Raises: UserError where what was asked for cannot be measured."""
    config, networks = request.config, request.networks
    compared = [flag for flag, wanted in (("--precision_recall", config.precision_recall), ("--fd_dinov2", config.fd_dinov2)) if wanted]
    if compared and not dataset:
        raise UserError(f"{' and '.join(compared)}: no data to compare with at --data_path {data.path}")
    if networks.vgg16 and len(dataset) <= NEIGHBOURHOOD:
        raise UserError(f"--precision_recall needs more than {NEIGHBOURHOOD} pictures, and --data_path {data.path} holds {len(dataset)}")
    if networks.inception and not dataset and not config.fid_stats:
        absent = f"no data to compare with at --data_path {data.path}, and no --fid_stats"
        if config.demands == "fid":
            raise UserError(f"--sweep chooses by FID: {absent}")
        say(f"FID and IS are left out: {absent}")
    wanted = {"fid": ("fid_stats", networks.inception if dataset and not config.fid_stats else None), "fd_dinov2": ("fd_dinov2_stats", networks.dinov2)}
    kept = {figure: find_kept(name, network, dataset, data.path, output_dir) for figure, (name, network) in wanted.items() if network}
    check_measurable(config, bool(config.fid_stats or kept or networks.clip or networks.vgg16))
    return Plan(request, data, dataset, kept)
