"""From a job to the objects that do it, the cheap and the fallible first: what is wrong is told before anything takes time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import conditioning
import engine_jit as engine
import resume
import sampling
from conditioning import Conditioning
from config import DrawJob, EvaluateJob, SweepJob, TrainJob
from datasets.source import hold_out, make_loader, open_data, workers
from datasets.stream import PictureDataset, StreamSampler
from evaluation.evaluator import Evaluator
from evaluation.measures import Measure, Subjects
from evaluation.online import OnlineEvaluation
from evaluation.plan import Plan, find_requested, plan
from evaluation.text_gap import TextGap, choose
from resume import Saved, TrainState, Weights, World
from text_features import Texts, prepare, source_of
from util import checkpoint
from util import distributed as dist
from util.broken import Broken
from util.ema import averages_of
from util.errors import UserError
from util.files import writable_folder
from util.logging import Board, progress, say
from util.parallel import Parallel, to_device, uses_bf16
from util.report import Report, Sizes, first_lines
from util.schedule import Progress, Schedule
from util.skips import Skips
from util.stopping import Stop


def agree_on_data(dataset: PictureDataset | None, saved: Saved | None) -> None:
    """Raises: UserError where the processes see different files.  Collective."""
    seen = dist.gather_objects((len(dataset or ()), saved and (saved.progress.epoch, saved.progress.step)))
    if len(set(seen)) > 1:
        raise UserError(
            f"the processes see different data or checkpoints (pictures, (epoch, step)): {seen}; do all nodes see the same --data_path and --resume?"
        )


def condition(job: TrainJob | DrawJob, texts: Texts, saved: Saved | None, device: torch.device) -> Conditioning:
    """What y is of these texts, or of labels.  Collective."""
    if not job.text:
        return conditioning.of_labels(job.model.class_num, texts.prompts)
    found = prepare(source_of(job, len(texts.captions) > 0), texts, saved.text if saved else {}, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the LLM took
    return found


def lines_of(subjects: Mapping[int, Subjects]) -> np.ndarray:
    """The numbers of all captions that evaluations draw."""
    return np.unique(np.concatenate([np.arange(0), *(found.conditions.numpy() for found in subjects.values())]))


@dataclass(frozen=True)
class Studio:
    """Weights, and all that drawing with them takes."""

    weights: Weights
    painter: sampling.Painter
    conditions: Conditioning

    def evaluator(self, job: TrainJob | DrawJob, measures: Sequence[Measure], subjects: Mapping[int, Subjects], checkpoint: str | None) -> Evaluator:
        """checkpoint: the file that the weights are of, if they are of one."""
        made_with = {name: value for name, value in (self.conditions.description or {}).items() if not isinstance(value, Tensor)}
        precision = "bf16" if uses_bf16(job.run.precision, self.painter.device) else "fp32"
        facts = {"model": job.model.name, "precision": precision, "text": made_with}
        folder = Path(job.run.output_dir) / "eval"
        return Evaluator(
            self.weights, self.painter, measures, self.conditions.conditions, subjects, facts, folder, checkpoint, save_images=job.evaluation.save_images
        )


def studio_of(job: DrawJob, texts: Texts, saved: Saved, device: torch.device) -> Studio:
    """That of a checkpoint.  Collective."""
    conditions = condition(job, texts, saved, device)
    weights = sampling.restored(job, saved, conditions.width, device)
    return Studio(weights, sampling.make_painter(job, weights.net, conditions.conditions.null, device), conditions)


def prepare_generation(job: DrawJob, saved: Saved, prompts: Sequence) -> Studio:
    device = dist.init(job.run.device)
    writable_folder(job.run.output_dir, "--output_dir")
    return studio_of(job, Texts((), np.arange(0), prompts=prompts), saved, device)


def prepare_evaluation(job: EvaluateJob | SweepJob, saved: Saved) -> Evaluator:
    """Collective."""
    device, model = dist.init(job.run.device), job.model
    output_dir, path = writable_folder(job.run.output_dir, "--output_dir"), saved.path
    counts = [job.evaluation.num_images, *([job.sweep.images] if isinstance(job, SweepJob) else [])]
    request = find_requested(job.evaluation, model, counts, device)
    needed = (model.is_text and not job.evaluation.captions) or Path(job.data.path).is_dir()
    dataset = open_data(job.data, model, job.run.seed) if needed else None
    agree_on_data(dataset, saved)
    planned = plan(request, job.data, dataset, output_dir)
    subjects = {count: planned.subjects(model, count) for count in counts}
    texts = Texts(planned.captions if model.is_text else (), lines_of(subjects), prompts=sampling.as_prompts(model, None, engine.test_prompts))
    studio = studio_of(job, texts, saved, device)
    forget_captions(dataset, studio.conditions)
    return studio.evaluator(job, planned.measures(job.run.seed), subjects, str(path))


def forget_captions(dataset: PictureDataset | None, conditions: Conditioning) -> None:
    """Where features are looked up by row, the captions' numbers are all that is needed of them."""
    if dataset and conditions.width and conditions.conditions.in_loader:
        dataset.captions = ()


# --- training


@dataclass
class TrainingRun:
    """A run that may begin, or go on."""

    training: engine.Training
    online: OnlineEvaluation | None  # None without --online_eval
    progress: Progress
    writer: checkpoint.Writer


def prepare_training(job: TrainJob, saved: Saved | None, stop: Stop) -> TrainingRun:
    """Data, features, network, then what the checkpoint has of them.  Collective."""
    device, model, seed = dist.init(job.run.device), job.model, job.run.seed
    if saved:
        resume.check_batch(saved, job.train)
    output_dir = writable_folder(job.run.output_dir, "--output_dir")
    request = find_requested(job.evaluation, model, [job.evaluation.num_images], device) if job.evaluation else None
    dataset = open_data(job.data, model, seed)
    agree_on_data(dataset, saved)
    planned = plan(request, job.data, dataset, output_dir) if request else None
    subjects = {job.evaluation.num_images: planned.subjects(model, job.evaluation.num_images)} if planned else {}
    prompts = sampling.as_prompts(model, None, engine.test_prompts)
    texts = training_texts(dataset, planned, subjects, prompts) if model.is_text else Texts((), np.arange(0), prompts=prompts)
    conditions = condition(job, texts, saved, device)
    forget_captions(dataset, conditions)
    measures = planned.measures(seed) if planned else []
    studio = fresh_studio(job, conditions, device)

    pictures, held_out = hold_out(len(dataset), job.data.held_out if model.is_text else 0, seed)
    batch = job.train.effective_batch(dist.world_size())
    world = World(dist.world_size(), batch, max(1, len(pictures) // batch), dataset.fingerprint(job.data.path))
    progress = Progress(epoch=job.train.start_epoch or 0)
    if saved:
        resume.check_data(saved, world, job.data.path)
        progress = resume.restore(saved, studio.weights, world.steps_per_epoch)
    trained = sum(p.numel() for p in studio.weights.net.parameters() if p.requires_grad)
    sizes = Sizes(trained, conditions.frozen, len(pictures), len(held_out), world.steps_per_epoch, workers(job.data))
    for line in first_lines(job, sizes, device, uses_bf16(job.run.precision, device)):
        say(line)

    online = None
    if job.evaluation:
        evaluator = studio.evaluator(job, measures, subjects, None) if measures else None
        online = OnlineEvaluation(evaluator, studio.painter, prompts, conditions.prompts, job.drawing.weights, job.evaluation.num_images, output_dir)
    writer = checkpoint.Writer(job.save.keep_last)
    training = make_training(job, studio, Shares(dataset, pictures, held_out, world, progress), writer, stop)
    return TrainingRun(training, online, progress, writer)


def training_texts(dataset: PictureDataset, planned: Plan | None, subjects: Mapping[int, Subjects], prompts: Sequence) -> Texts:
    """All captions of the data, which the statistics are taken of, and those that evaluations draw besides."""
    own, asked = len(dataset.captions), lines_of(subjects)
    return Texts(planned.captions if planned else dataset.captions, np.arange(own), asked[asked >= own], prompts)


def fresh_studio(job: TrainJob, conditions: Conditioning, device: torch.device) -> Studio:
    """With initial weights."""
    net = sampling.make_network(job.model, conditions.width, job.run.seed, device)
    optimizer = engine.make_optimizer(net, job.train.weight_decay, device)
    state = TrainState(net=net, optimizer=optimizer, emas=averages_of(net, job.averages))
    return Studio(state, sampling.make_painter(job, net, conditions.conditions.null, device), conditions)


@dataclass(frozen=True)
class Shares:
    """Which pictures are trained on, and from where."""

    dataset: PictureDataset
    pictures: Tensor  # their indices
    held_out: Tensor
    world: World
    progress: Progress


def make_training(job: TrainJob, studio: Studio, shares: Shares, writer: checkpoint.Writer, stop: Stop) -> engine.Training:
    """Collective."""
    train, seed, device, dataset = job.train, job.run.seed, studio.painter.device, shares.dataset
    state, conditions, world, position = studio.weights, studio.conditions.conditions, shares.world, shares.progress
    steps, folder = world.steps_per_epoch, Path(job.run.output_dir)
    sampler = StreamSampler(shares.pictures, train.batch_size, steps * train.accum_iter, dist.rank(), dist.world_size(), seed)
    skips, board = Skips(device, position.skips), Board(folder, state.step)
    bar = progress(train.epochs * steps, "training", initial=position.epoch * steps + position.epoch_step)
    return engine.Training(
        state=state,
        parallel=Parallel(state.net, device, uses_bf16(job.run.precision, device)),
        loader=make_loader(dataset, sampler, conditions, job.data, device),
        conditions=conditions,
        null=to_device(conditions.null, device),
        diffusion=job.diffusion,
        config=replace(train, lr=train.peak_lr(dist.world_size())),
        schedule=Schedule(job.save, train.epochs, steps, train.log_freq, job.evaluation is not None),
        report=Report(bar, board, world.effective_batch, skips),
        skips=skips,
        broken=Broken(folder, len(dataset), job.data.broken),
        stop=stop,
        save=resume.Saver(writer, state, skips, world, job, studio.conditions.description),
        gap=text_gap(job, studio, dataset, shares.held_out if len(shares.held_out) else shares.pictures) if job.text else None,
        seed=seed,
        device=device,
    )


def text_gap(job: TrainJob, studio: Studio, dataset: PictureDataset, pictures: Tensor) -> TextGap:
    """On as many pictures as a step takes, between 16 and 64: measuring costs about a step."""
    batch, device = job.train.batch_size, studio.painter.device
    size = min(64, max(16, batch * dist.world_size()))
    return TextGap(choose(dataset, pictures[:size].tolist(), size), studio.conditions.conditions, job.diffusion, job.run.seed, batch, device)
