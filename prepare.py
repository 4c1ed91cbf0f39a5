"""From a job to the objects that do it, the cheap and the fallible first: what is wrong is told before anything takes time."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import engine_jit as engine
import lora
import resume
import sampling
from conditioning import Conditioning, LabelConditions
from config import DrawJob, EvaluateJob, SweepJob, TrainJob, to_plain
from datasets.prepared import Beside
from datasets.source import hold_out, make_loader, open_data, workers
from datasets.stream import BlockShuffle, Collate, PictureDataset, Shuffle, StreamSampler
from denoiser import Objective, v_loss
from evaluation.evaluator import Evaluator
from evaluation.measures import Measure, Subjects
from evaluation.online import OnlineEvaluation
from evaluation.plan import Plan, find_requested, plan
from evaluation.text_gap import TextGap, choose
from resume import Saved, TrainState, Weights, World
from text_encoder import alike
from text_features import SAMPLE, Texts, evenly, prepare, source_of, usable_beside
from transfer import check_origin, say_noise, transfer
from util import checkpoint
from util import distributed as dist
from util.agreement import agree, of_run
from util.broken import Broken
from util.ema import averages_of
from util.errors import need_package
from util.files import writable_folder
from util.logging import progress_bar, say
from util.parallel import Parallel, compiled, to_device, uses_bf16, uses_compile
from util.parts_writer import PartsWriter
from util.report import Report, Sizes, first_lines
from util.schedule import Progress, Schedule
from util.sharding import check_layout, let_go, shard
from util.skips import Skips
from util.stopping import Stop
from util.trackers import Board
from util.trackers import check as check_tracker


def agree_on_data(dataset: PictureDataset | None, saved: Saved | None, path: str) -> None:
    """Raises: UserError where the processes see different files.  Collective."""
    progress = saved and f"{saved.path.name} at epoch {saved.progress.epoch}, step {saved.progress.step}"
    names = dataset.fingerprint(path) if dataset else None
    agree({"the number of pictures in --data_path": len(dataset or ()), "their names (hash)": names, "the checkpoint of --resume": progress})


def make_conditioning(job: TrainJob | DrawJob, texts: Texts, saved: Saved | None, device: torch.device, origin: Saved | None = None) -> Conditioning:
    """What y is of these texts, or of labels.  origin: the checkpoint of --init_from.  Collective."""
    if not job.text:
        return Conditioning(LabelConditions(job.model.class_num), torch.tensor(texts.prompts))
    found = prepare(source_of(job, len(texts.captions) > 0), texts, saved.text if saved else {}, device, origin.text if origin else None)
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
    conditioning: Conditioning

    def evaluator(self, job: TrainJob | DrawJob, measures: Sequence[Measure], subjects: Mapping[int, Subjects], checkpoint: str | None) -> Evaluator:
        """checkpoint: the file that the weights are of, if they are of one."""
        made_with = {name: value for name, value in (self.conditioning.description or {}).items() if not isinstance(value, Tensor)}
        precision = "bf16" if uses_bf16(job.run.precision, self.painter.device) else "fp32"
        facts = {"model": job.model.name, "precision": precision, "text": made_with}
        if job.drawing.lora:
            facts["lora"] = lora.describe(job.drawing.lora, job.drawing.lora_scale)
        folder = Path(job.run.output_dir) / "eval"
        return Evaluator(
            self.weights, self.painter, measures, self.conditioning.y_of, subjects, facts, folder, checkpoint, save_images=job.evaluation.save_images
        )


def studio_of(job: DrawJob, texts: Texts, saved: Saved, device: torch.device) -> Studio:
    """That of a checkpoint.  Collective."""
    conditioning = make_conditioning(job, texts, saved, device)
    weights = sampling.restored(job, saved, conditioning.width, device)
    return Studio(weights, sampling.make_painter(job, weights.net, conditioning.y_of.null, device), conditioning)


def prepare_generation(job: DrawJob, saved: Saved, prompts: Sequence) -> Studio:
    device = dist.init(job.run.device)
    writable_folder(job.run.output_dir, "--output_dir")
    return studio_of(job, Texts(prompts=prompts), saved, device)


def prepare_evaluation(job: EvaluateJob | SweepJob, saved: Saved) -> Evaluator:
    """Collective."""
    device, model = dist.init(job.run.device), job.model
    agree(of_run(to_plain(job)))
    check_tracker(job.run)
    output_dir, path = writable_folder(job.run.output_dir, "--output_dir"), saved.path
    counts = [job.evaluation.num_images, *([job.sweep.images] if isinstance(job, SweepJob) else [])]
    request = find_requested(job.evaluation, model, counts, device)
    known = "data_path" in job.given or resume.look_up(saved.job, "data.path") is not None  # else an unrelated ./data may lie here
    there, needed = Path(job.data.path).exists(), model.is_text and not job.evaluation.captions
    if there and not (known or needed):
        say(f"the checkpoint does not name its data, so {job.data.path} is not read; to compare the pictures with that data, give --data_path {job.data.path}")
    needed = needed or (known and there)
    dataset = open_data(job.data, model, job.run.seed) if needed else None
    agree_on_data(dataset, saved, job.data.path)
    planned = plan(request, job.data, dataset, output_dir)
    subjects = {count: planned.subjects(model, count) for count in counts}
    prompts, beside = sampling.as_prompts(model, None, engine.test_prompts), beside_of(job, dataset)
    texts = Texts(planned.captions if model.is_text else (), lines_of(subjects), prompts=prompts, beside=beside)
    studio = studio_of(job, texts, saved, device)
    forget_captions(dataset, studio.conditioning)
    return studio.evaluator(job, planned.measures(job.run.seed), subjects, str(path))


def forget_captions(dataset: PictureDataset | None, conditioning: Conditioning) -> None:
    """Drop the captions' text where features are looked up by row: only the numbers are needed from here on."""
    if dataset and conditioning.width and conditioning.y_of.in_loader:
        dataset.captions = ()


# --- training


@dataclass(frozen=True)
class Split:
    """Which pictures are trained on, which are held out, and what decides their order."""

    dataset: PictureDataset
    order: Shuffle | BlockShuffle  # of those that are trained on
    held_out: Tensor  # indices
    world: World


@dataclass(frozen=True)
class Prepared:
    """All that a run needs before its steps begin."""

    split: Split
    state: TrainState
    studio: Studio
    online: OnlineEvaluation | None  # None without --online_eval
    progress: Progress


def prepare_training(job: TrainJob, saved: Saved | None) -> Prepared:
    """Data, features, network, then what the checkpoint has of them.  Collective."""
    device, model, evaluation = dist.init(job.run.device), job.model, job.evaluation
    check_tracker(job.run)
    agree(of_run(to_plain(job)))
    check_layout(job.train.parallel)
    adapters = job.train.lora_rank is not None
    if adapters:
        need_package("peft", "--lora_rank")
    origin = resume.find_origin(job) if adapters or not saved else None
    if saved:
        resume.check_batch(saved, job.train)
    elif origin:
        check_origin(origin, model.name)
    output_dir = writable_folder(job.run.output_dir, "--output_dir")
    request = find_requested(evaluation, model, [evaluation.num_images], device) if evaluation else None
    dataset = open_data(job.data, model, job.run.seed)
    agree_on_data(dataset, saved, job.data.path)
    split = split_data(job, dataset)
    if saved:
        resume.check_data(saved, split.world, job.data.path)
    planned = plan(request, job.data, dataset, output_dir) if request else None
    subjects = {evaluation.num_images: planned.subjects(model, evaluation.num_images)} if planned else {}
    prompts = sampling.as_prompts(model, None, engine.test_prompts)
    texts = training_texts(job, dataset, planned, lines_of(subjects), prompts) if model.is_text else Texts(prompts=prompts)
    conditioning = make_conditioning(job, texts, saved or (origin if adapters else None), device, origin)
    forget_captions(dataset, conditioning)
    measures = planned.measures(job.run.seed) if planned else []

    state = fresh_state(job, conditioning, origin, device)
    studio = Studio(state, sampling.make_painter(job, state.drawn, conditioning.y_of.null, device), conditioning)
    progress = resume.restore(saved, state, split.world.steps_per_epoch) if saved else Progress(epoch=job.train.start_epoch or 0)
    online = None
    if evaluation:
        evaluator = studio.evaluator(job, measures, subjects, None) if measures or job.evaluation.save_images else None
        online = OnlineEvaluation(evaluator, studio.painter, prompts, conditioning.prompts, job.drawing.weights, evaluation.num_images, output_dir)
    return Prepared(split, state, studio, online, progress)


def split_data(job: TrainJob, dataset: PictureDataset) -> Split:
    processes = dist.world_size()
    order, held_out = hold_out(dataset, job.data.held_out if job.model.is_text else 0, job.run.seed)
    batch = job.train.effective_batch(processes)
    return Split(dataset, order, held_out, World(processes, batch, max(1, len(order) // batch), dataset.fingerprint(job.data.path)))


def training_texts(job: TrainJob, dataset: PictureDataset, planned: Plan | None, asked: np.ndarray, prompts: Sequence[str]) -> Texts:
    """All captions of the data, or a sample of them where features are not kept, or lie beside the pictures; and those that evaluations draw besides."""
    own, beside = len(dataset.captions), beside_of(job, dataset)
    lines = evenly(own, SAMPLE) if job.text.cache == "off" or beside else np.arange(own)
    return Texts(planned.captions if planned else dataset.captions, lines, asked[asked >= own], prompts, beside)


def beside_of(job: TrainJob | DrawJob, dataset: PictureDataset | None) -> Beside | None:
    """Where the features of prepared pictures' captions lie, if they are what this job asks for."""
    return usable_beside(source_of(job, any_captions=True), dataset.beside) if dataset and job.text else None


def fresh_state(job: TrainJob, conditioning: Conditioning, origin: Saved | None, device: torch.device) -> TrainState:
    """With initial weights, with those of --init_from, or with adapters on those.  The checkpoint is closed."""
    net, base = sampling.make_network(job, conditioning.width, device), ""
    if origin and job.train.lora_rank:
        base = put_adapters(net, job.train.lora_rank, job.run.seed, origin)
    elif origin:
        same_text = bool(conditioning.description) and alike(origin.text, conditioning.description)
        report = transfer(origin, net, same_text, conditioning.y_of.null)
        if dist.is_main():
            report.write(Path(job.run.output_dir) / "init_from.txt")
        say(f"begun with {origin.path}, {origin.best_name}: {report}")
        say_noise(origin, job.diffusion)
    if origin:
        origin.close()
    copy = None
    if job.train.parallel != "ddp":
        copy = deepcopy(net)
        let_go(copy)
        shard(net, job.train.parallel, device)
    optimizer, emas = engine.make_optimizer(net, job.train.weight_decay, device, job.train.optimizer), averages_of(net, job.averages)
    return TrainState(net=net, optimizer=optimizer, emas=emas, copy=copy, base=base)


def put_adapters(net: nn.Module, rank: int, seed: int, origin: Saved) -> str:
    """Load the weights of --init_from, freeze them, add adapters.  Returns: the frozen weights' hash.  Raises: UserError where they do not fit."""
    below = origin.best  # read once: of a checkpoint in parts it is the whole model
    net.load_state_dict(checkpoint.without_prefix(below, net.state_dict(), f"--init_from {origin.path}"))
    lora.add(net, rank, seed)
    say(
        f"adapters of rank {rank} on {origin.path}, {origin.best_name}, whose {sum(value.numel() for value in below.values()) / 1e6:.1f}M weights stay as they are"
    )
    return lora.digest(below)


@dataclass(frozen=True)
class TrainingRun:
    """What the epoch loop needs."""

    training: engine.Training
    online: OnlineEvaluation | None
    progress: Progress  # where it began, or goes on
    writer: checkpoint.Writer


def check_shared_memory(job: TrainJob, conditioning: Conditioning) -> None:
    """Calls out batches on their way from the loader's processes that will not fit where they travel."""
    travels, count = conditioning.bytes_each if conditioning.y_of.in_loader else 8, workers(job.data)
    batches = 2 * count * job.train.batch_size * (3 * job.model.img_size**2 + travels)
    room = Path("/dev/shm")
    if room.is_dir() and batches > (free := shutil.disk_usage(room).free):
        say(
            f"warning: the {2 * count} batches that the loader keeps ready need {batches / 1e9:.1f} GB, but {room} has {free / 1e9:.1f} GB free; loader processes would die. "
            f"Lower --num_workers or --batch_size, or enlarge {room} (docker run --shm-size)"
        )


def begin(job: TrainJob, prepared: Prepared, stop: Stop) -> TrainingRun:
    """Assemble the run from what is prepared, and print its first lines.  Collective."""
    split, state, conditioning, position = prepared.split, prepared.state, prepared.studio.conditioning, prepared.progress
    device, world, folder = prepared.studio.painter.device, split.world, Path(job.run.output_dir)
    check_shared_memory(job, conditioning)
    steps, bf16, train = world.steps_per_epoch, uses_bf16(job.run.precision, device), job.train
    compile = uses_compile(job.run.compile, device, bf16)
    state.net.grad_checkpointing = train.grad_checkpointing == "blocks"
    trained = sum(p.numel() for p in state.net.parameters() if p.requires_grad)
    for line in first_lines(job, Sizes(trained, conditioning.frozen, len(split.order), len(split.held_out), steps, workers(job.data)), device, bf16):
        say(line)
    taken, parts = position.epoch * steps + position.epoch_step, train.accum_iter
    batches = range(taken * parts, train.epochs * steps * parts)
    sampler = StreamSampler(split.order, train.batch_size, batches, dist.rank(), world.processes)
    look_up = conditioning.y_of if conditioning.y_of.in_loader else None
    collate = Collate(look_up, job.diffusion, train.label_drop_prob, job.run.seed)
    skips, board = Skips(device, position.skips), Board(job.run, to_plain(job), state.step)
    writer = PartsWriter(job.save.keep_last, device) if state.copy else checkpoint.Writer(job.save.keep_last, lora.write if state.base else None)
    bar = progress_bar(train.epochs * steps, "training", initial=taken)
    training = engine.Training(
        state=state,
        parallel=Parallel(state.net, device, bf16, compile),
        loader=make_loader(split.dataset, sampler, collate, job.data, device),
        conditions=conditioning.y_of,
        null=to_device(conditioning.y_of.null, device),
        objective=Objective(job.diffusion, compiled(v_loss) if compile else v_loss),
        config=train,
        peak_lr=train.peak_lr(world.processes),
        schedule=Schedule(job.save, train.epochs, steps, train.log_freq, job.evaluation is not None),
        report=Report(bar, board, world.effective_batch, skips),
        skips=skips,
        broken=Broken(folder, len(split.dataset) + len(split.dataset.bad), job.data.broken, split.dataset.bad),
        stop=stop,
        save=resume.Saver(writer, state, skips, world, job, conditioning.description),
        gap=text_gap(job, prepared) if job.text else None,
        seed=job.run.seed,
        device=device,
    )
    return TrainingRun(training, prepared.online, position, writer)


GAP_PICTURES = (16, 64)


def text_gap(job: TrainJob, prepared: Prepared) -> Callable[[], dict[str, Tensor]]:
    """On as many held-out pictures as a step takes, within GAP_PICTURES: measuring costs about a step."""
    split, studio, batch = prepared.split, prepared.studio, job.train.batch_size
    fewest, most = GAP_PICTURES
    size = min(most, max(fewest, batch * dist.world_size()))
    pictures = split.held_out[:size].tolist() if len(split.held_out) else split.order.first(size)
    chosen = choose(split.dataset, pictures, size)
    gap = TextGap(chosen, studio.conditioning.y_of, job.diffusion, job.run.seed, batch, studio.painter.device)

    def measure() -> dict[str, Tensor]:
        with prepared.state.drawing("raw"):
            return gap(studio.painter.net)

    return measure
