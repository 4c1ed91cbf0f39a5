"""Train, sample and evaluate JiT on captions or class labels: `torchrun ... main_jit.py --help`, or plain `python` for one process.

The only file that reads flags: flags -> objects -> the epoch loop.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torch.utils.data import DataLoader

import engine_jit as engine
import evaluation
import text_features
from datasets.imagenet import ClassFolder
from datasets.stream import Collate, PackedStrings, PictureDataset, StreamSampler, hold_out
from datasets.text_image import TextImageFolder, files_below, read_captions
from denoiser import DiffusionConfig, SamplerConfig
from evaluation import Subjects
from flags import check_args, evaluates, evaluation_sizes, get_parser, trains
from models_jit import JiT, build_model
from text_encoder import TextConfig
from text_features import Conditioning
from util import checkpoint, extractors, reference
from util import distributed as dist
from util.ema import Ema
from util.errors import UserError, leave
from util.files import Lock, writable_folder, write_whole
from util.logging import Board, progress, say
from util.metrics import NEIGHBOURHOOD
from util.randomness import derive
from util.reference import Reference
from util.stopping import Stop, in_worker

EVALUATED = ".evaluated"  # holds the step of the latest evaluation within training that came to its end
LOW_LR = 2e-5  # below this a run of the recipe's length hardly learns: PixelGen and JiT train at 2e-4


def read_lines(path: Path, flag: str) -> list[str]:
    """The lines of a UTF-8 file that hold text.  Raises: UserError where there are none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} cannot be read as UTF-8 text: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{flag} {path} holds no line of text")
    return lines


def read_eval_captions(args: argparse.Namespace) -> list[str]:
    """Those of --eval_captions: of a file, or of all .txt in a folder, or in captions/ in it; none where the flag is not given."""
    if args.eval_captions is None:
        return []
    path = Path(args.eval_captions)
    if not path.is_dir():
        return read_lines(path, "--eval_captions")
    folder = path / "captions" if (path / "captions").is_dir() else path
    captions = [line for files in files_below(folder, {".txt"}).values() for file in files for line in read_captions(file)]
    if not captions:
        raise UserError(f"--eval_captions {path}: no .txt with a line of text in this folder")
    return captions


def read_prompts(args: argparse.Namespace) -> list[str] | list[int]:
    """What to draw: --prompt, the lines of --prompts_file, or the test prompts; label numbers for a class model."""
    prompts = read_lines(Path(args.prompts_file), "--prompts_file") if args.prompts_file else args.prompt
    if args.is_text:
        return prompts or list(engine.test_prompts)
    if not prompts:
        return list(range(min(10, args.class_num)))
    wrong = [prompt for prompt in prompts if not (prompt.isdecimal() and int(prompt) < args.class_num)]
    if wrong:
        raise UserError(f"--prompt {wrong[0]}: {args.model} takes label numbers from 0 to {args.class_num - 1}; for text use a -Text model")
    return [int(prompt) for prompt in prompts]


def make_dataset(args: argparse.Namespace) -> PictureDataset:
    if args.is_text:
        dataset = TextImageFolder(args.data_path, args.img_size, bool(args.hflip), args.seed, args.missing_captions)
        if dataset.skipped:
            say(f"--missing_captions skip: left out {dataset.skipped}")
        return dataset
    dataset = ClassFolder(args.data_path, args.class_num, args.img_size, args.hflip is not False, args.seed)
    if len(dataset.classes) < args.class_num:
        say(f"warning: {len(dataset.classes)} class folders and --class_num {args.class_num}: the other classes are never trained")
    return dataset


def check_resumed(args: argparse.Namespace, state: dict[str, Any], path: Path) -> None:
    """Raises: UserError where the checkpoint is of another network or another noise than the flags say."""
    saved = state["args"]
    if args.is_text and "text" not in state:
        raise UserError(f"--model {args.model} is a text model, but {path} does not say how its text features were made; is it of a class model?")
    if args.is_text:
        text = state["text"]
        saved = saved | {"llm_model_name": text["llm"], "llm_layer": text["layer"], "max_text_len": text["max_text_len"], "text_norm": text["text_norm"]}
    flags = ["model", "img_size", "noise_scale", *(("llm_model_name", "max_text_len", "llm_layer", "text_norm") if args.is_text else ("class_num",))]
    if trains(args) and "world" in state and args.start_epoch is None:
        flags += ["seed", *(["held_out"] if args.is_text else [])]  # they decide which pictures a step trains on
    for flag in flags:
        moved = flag == "llm_model_name" and (os.path.isdir(args.llm_model_name) or os.path.isdir(saved[flag]))  # a folder may have another name now
        if flag in saved and saved[flag] != getattr(args, flag) and not moved:
            raise UserError(f"--{flag} is {getattr(args, flag)}, but {path} was trained with {saved[flag]}; give --{flag} {saved[flag]}")


def text_config(args: argparse.Namespace) -> TextConfig:
    return TextConfig(args.llm_model_name, args.max_text_len, args.llm_layer, dtype=args.llm_dtype, trust_remote_code=args.trust_remote_code)


def store_folder(args: argparse.Namespace) -> Path:
    """Beside the data; in output_dir where nothing can be written there and no store is there yet."""
    beside = Path(args.data_path) / "text_cache"
    usable = beside.is_dir() or os.access(args.data_path, os.W_OK)
    return Path(args.text_cache_dir or (beside if usable else Path(args.output_dir) / "text_cache"))


def choose_subjects(args: argparse.Namespace, dataset: PictureDataset | None, captions: Sequence[str]) -> dict[int, Subjects]:
    """What evaluations draw, by number of pictures: as many labels of each class, or captions spread over those of --eval_captions or the data.

    Classes are those of the data, or where --fid_stats names the reference, all of the model.

    Args: captions: the data's, and after them those of --eval_captions.
    """
    counts = evaluation_sizes(args)
    if not args.is_text:
        classes = len(dataset.classes) if dataset and not args.fid_stats else args.class_num
        return {count: Subjects(torch.arange(count) % classes) for count in counts}
    own = len(dataset.captions) if dataset else 0

    def line(i: int, count: int) -> int:
        if args.eval_captions:
            return own + evaluation.spread(i, len(captions) - own, count)
        return dataset.condition(evaluation.spread(i, len(dataset), count), i)

    def subjects(count: int) -> Subjects:
        lines = [line(i, count) for i in range(count)]
        source = args.eval_captions or f"captions of {args.data_path}"
        return Subjects(torch.tensor(lines), source, [captions[number] for number in lines])

    return {count: subjects(count) for count in counts}


def prepare_text(
    args: argparse.Namespace,
    dataset: TextImageFolder | None,
    captions: Sequence[str],
    subjects: Iterable[Subjects],
    prompts: list[str],
    saved: dict[str, Any],
    device: torch.device,
) -> Conditioning:
    """Features of the captions that the run will ask for, and of the prompts.  Collective."""
    own = len(dataset.captions) if dataset else 0
    asked = np.unique(np.concatenate([np.arange(0), *(found.conditions.numpy() for found in subjects)]))
    lines, others = (np.arange(own), asked[asked >= own]) if trains(args) else (asked, ())
    cache = args.text_cache if captions else "memory"
    conditioning = text_features.prepare(text_config(args), cache, store_folder(args), captions, lines, prompts, args.text_norm, saved, device, others)
    if dataset and conditioning.conditions.in_loader:
        dataset.captions = ()  # their rows' numbers are all that is needed of them
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the LLM took
    return conditioning


def build_network(args: argparse.Namespace, text_dim: int | None, device: torch.device) -> JiT:
    torch.manual_seed(derive(args.seed, "initial weights", 0))
    net = build_model(
        args.model,
        input_size=args.img_size,
        attn_drop=args.attn_dropout,
        proj_drop=args.proj_dropout,
        num_classes=args.class_num,
        text_dim=text_dim,
    )
    return net.to(device)


def load_weights(state: dict[str, Any], path: Path, net: JiT, emas: Sequence[Ema]) -> None:
    expected = net.state_dict()
    for key, target in (("model", net), *((f"model_ema{i + 1}", ema) for i, ema in enumerate(emas))):
        if key not in state:
            raise UserError(f"{path} has no {key}; wanted a checkpoint with model, model_ema1 and model_ema2")
        target.load_state_dict(checkpoint.without_prefix(state[key], expected, f"{path}, {key},"))


@dataclass
class Run:
    """The objects that training and evaluation share."""

    args: argparse.Namespace
    device: torch.device
    dataset: PictureDataset | None
    conditioning: Conditioning
    state: engine.TrainState
    painter: engine.Painter
    evaluator: evaluation.Evaluator | None  # None where nothing can be measured
    output_dir: Path
    known_broken: int = 0
    data: str = ""  # the data set's fingerprint


def workers(args: argparse.Namespace) -> int:
    return min(args.num_workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@dataclass(frozen=True)
class Networks:
    """What an evaluation sees pictures through; None for what is not wanted or cannot be had."""

    inception: extractors.Extractor | None = None
    vgg16: extractors.Extractor | None = None
    dinov2: extractors.Extractor | None = None
    clip: extractors.Clip | None = None


def find_networks(args: argparse.Namespace, device: torch.device) -> Networks:
    """Looked for before anything else starts.  Collective.  Raises: UserError where one that was asked for cannot be had."""
    unwanted = args.inception_weights == "none"
    inception = None if unwanted else extractors.load_fidelity(extractors.INCEPTION, args.inception_weights, device)
    if inception is None:
        absent = "--inception_weights none" if unwanted else f"no Inception weights; {extractors.missing(extractors.INCEPTION)}"
        if args.sweep or args.fid_stats:
            raise UserError(f"{'--sweep chooses by FID' if args.sweep else '--fid_stats is for FID'}: {absent}")
        say(f"FID and IS are left out: {absent}")
    vgg16 = extractors.load_fidelity(extractors.VGG16, args.vgg16_weights, device) if args.precision_recall else None
    if args.precision_recall and vgg16 is None:
        raise UserError(f"--precision_recall: no VGG16 weights; {extractors.missing(extractors.VGG16)}")
    dinov2 = extractors.load_dinov2(args.fd_dinov2, device) if args.fd_dinov2 else None
    if args.is_text and not args.clip_model:
        say("CLIP score and R-precision are left out: no --clip_model, such as llm-jp/waon-siglip2-base-patch16-256")
    return Networks(inception, vgg16, dinov2, extractors.load_clip(args.clip_model, device) if args.clip_model else None)


def check_measurable(args: argparse.Namespace, anything: bool) -> None:
    """Raises: UserError where an evaluation would come to nothing."""
    if args.evaluate_gen and not anything and not args.save_images:
        raise UserError("--evaluate_gen has nothing to measure: mend what the lines above say is left out, or keep the pictures by --save_images")


@dataclass(frozen=True)
class Kept:
    """Where the data's own reference statistics are, or will be."""

    extractor: extractors.Extractor
    path: Path
    there: bool


def find_references(args: argparse.Namespace, networks: Networks, dataset: PictureDataset | None, output_dir: Path) -> dict[str, Kept]:
    """By figure; says and raises what can be known before anything is computed.  Collective.

    A file beside the data is used where it is the data's, also where nothing can be written there.
    """
    compared = [f"--{flag}" for flag in ("precision_recall", "fd_dinov2") if getattr(args, flag)]
    if compared and not dataset:
        raise UserError(f"{' and '.join(compared)}: no data to compare with at --data_path {args.data_path}")
    if networks.vgg16 and len(dataset) <= NEIGHBOURHOOD:
        raise UserError(f"--precision_recall needs more than {NEIGHBOURHOOD} pictures, and --data_path {args.data_path} holds {len(dataset)}")
    if networks.inception and not dataset and not args.fid_stats:
        absent = f"no data to compare with at --data_path {args.data_path}, and no --fid_stats"
        if args.sweep:
            raise UserError(f"--sweep chooses by FID: {absent}")
        say(f"FID and IS are left out: {absent}")

    def find(extractor: extractors.Extractor, name: str) -> Kept:
        places = [folder / f"{name}_{args.img_size}.npz" for folder in (Path(args.data_path), output_dir)]
        kept = [path for path in places if evaluation.is_kept(path, dataset, args.data_path, extractor)]
        return Kept(extractor, kept[0] if kept else places[not os.access(args.data_path, os.W_OK)], bool(kept))

    wanted = {"fid": (networks.inception, "fid_stats")} if dataset and not args.fid_stats else {}
    wanted |= {"fd_dinov2": (networks.dinov2, "fd_dinov2_stats")}
    wanted = {figure: pair for figure, pair in wanted.items() if pair[0]}
    found = dist.from_main({figure: (kept.path, kept.there) for figure, pair in wanted.items() for kept in [find(*pair)]} if dist.is_main() else None)
    return {figure: Kept(wanted[figure][0], *place) for figure, place in found.items()}


def read_reference(args: argparse.Namespace, networks: Networks) -> Reference | None:
    """That of --fid_stats, of this size and network; rank 0 gets it."""
    if not args.fid_stats or not dist.is_main():
        return None
    found = reference.read(Path(args.fid_stats))
    reference.check(found, networks.inception.identity, extractors.INCEPTION_WIDTH, args.img_size)
    return found


def make_measures(
    args: argparse.Namespace, networks: Networks, dataset: PictureDataset | None, given: Reference | None, references: dict[str, Kept]
) -> list[evaluation.Measure]:
    """Makes the data's own reference statistics where there are none.  Collective."""
    measures: list[evaluation.Measure] = [evaluation.Frechet("fid", networks.inception, given)] if args.fid_stats and networks.inception else []
    for figure, kept in references.items():
        if not kept.there:
            evaluation.make_reference(dataset, args.data_path, kept.extractor, kept.path, workers(args))
        measures.append(evaluation.Frechet(figure, kept.extractor, reference.read(kept.path) if dist.is_main() else None))
    if networks.clip:
        measures.append(evaluation.Alignment(networks.clip, args.seed))
    if networks.vgg16:
        measures.append(evaluation.Manifold(networks.vgg16, dataset, workers(args)))
    return measures


def effective_batch(args: argparse.Namespace) -> int:
    """Pictures of one optimizer step, over all processes."""
    return args.batch_size * args.accum_iter * dist.world_size()


def describe_run(args: argparse.Namespace, run: Run, config: engine.TrainConfig, pictures: int, held_out: int) -> None:
    batch = effective_batch(args)
    trained = sum(p.numel() for p in run.state.net.parameters() if p.requires_grad)
    say(f"model: {args.model} at {args.img_size} pixels, {trained / 1e6:.2f}M parameters trained, {run.conditioning.frozen / 1e6:.2f}M frozen in the LLM")
    say(
        f"data: {pictures} pictures{f' and {held_out} held out' if held_out else ''}, {config.steps_per_epoch} steps per epoch, {workers(args)} loader processes"
    )
    say(
        f"batch: {batch} = {args.batch_size} x {args.accum_iter} accumulated x {dist.world_size()} processes; lr {config.lr:.3e}; {'bf16' if config.bf16 else 'fp32'} on {run.device}"
    )
    if args.lr is None and config.lr < LOW_LR:
        say(f"warning: --blr {args.blr} and an effective batch of {batch} give a learning rate of {config.lr:.1e}, below {LOW_LR:.0e}: "
            "training will be very slow. Set --lr (1e-4 to 2e-4 for JiT-B and larger), or raise --accum_iter")  # fmt: skip
    if args.img_size > 256 and args.noise_scale == 1:
        say(f"warning: --noise_scale 1 at {args.img_size} pixels; the paper scales the noise by img_size / 256, here {args.img_size / 256:g}")
    if args.label_drop_prob == 0 and args.cfg[0] != 1:
        say("warning: with --label_drop_prob 0 the network never learns the null that --cfg needs")
    if args.warmup_epochs >= args.epochs:
        say(f"warning: --warmup_epochs {args.warmup_epochs:g} is not shorter than --epochs {args.epochs}; the learning rate never reaches its peak")
    if batch > pictures:
        say(f"warning: a step takes {batch} pictures and there are {pictures}; each is shown several times a step")


def save_checkpoint(saver: "Saver", epoch: int, epoch_step: int) -> None:
    """After `epoch_step` steps of the epoch that follows `epoch`.  Rank 0 copies and goes on; the others do not wait."""
    if not dist.is_main():
        return
    run, config = saver.run, saver.config
    net, state, args = run.state.net, run.state, run.args
    at_end = epoch == saver.epoch
    content = {
        "model": checkpoint.with_prefix(net.state_dict()),
        **{f"model_ema{i + 1}": checkpoint.with_prefix(ema.state_dict(net)) for i, ema in enumerate(state.emas)},
        "optimizer": checkpoint.optimizer_state(state.optimizer, net),
        "epoch": epoch,
        "epoch_step": epoch_step,
        "step": state.step,
        "skips": saver.skips.kept(),
        "evaluation_due": at_end and saver.evaluates,
        "world": world_of(args, run, config),
        "args": dict(vars(args)),
    }
    if run.conditioning.description:
        content["text"] = run.conditioning.description
    saver.writer.write(content, run.output_dir / checkpoint.LAST, run.output_dir / f"checkpoint-{epoch}.pth" if at_end and saver.numbered else None)


def world_of(args: argparse.Namespace, run: Run, config: engine.TrainConfig) -> dict[str, Any]:
    """What decides, with the seed, which pictures a step trains on."""
    return {"processes": dist.world_size(), "effective_batch": effective_batch(args), "steps_per_epoch": config.steps_per_epoch, "data": run.data}


def write_broken(run: Run) -> None:
    """All ranks' unreadable pictures into output_dir/bad_images.txt.  Collective."""
    broken = sorted(set().union(*dist.gather_objects(run.state.broken)))
    if len(broken) > run.known_broken:
        run.known_broken = len(broken)
        path = run.output_dir / "bad_images.txt"
        say(f"{len(broken)} unreadable pictures so far, listed in {path}")
        if dist.is_main():
            before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            text = "\n".join(sorted({*before, *broken})) + "\n"
            try:
                write_whole(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))
            except OSError as error:
                say(f"WARNING: {path} cannot be written ({error.strerror})")
    engine.note_broken(run.state, broken, len(run.dataset), "skip")


def make_text_gap(run: Run, pictures: Tensor) -> engine.TextGap:
    """On as many pictures as a step takes, between 16 and 64: measuring costs about a step."""
    args, size = run.args, min(64, max(16, run.args.batch_size * dist.world_size()))
    return engine.TextGap(
        run.dataset, pictures[:size].tolist(), size, run.conditioning.conditions, run.painter.diffusion, args.seed, args.batch_size, run.device
    )


@dataclass
class Saver:
    """When checkpoints are written, and when the run is to stop."""

    run: Run
    config: engine.TrainConfig
    stop: Stop
    writer: checkpoint.Writer
    skips: engine.Skips
    board: Board
    epoch: int = 0
    stopped: bool = False

    def pause(self, i: int) -> Callable[[int], bool] | None:
        """What is to be done after step i of the epoch: at its end, at --save_freq_steps and where a signal has asked to stop."""
        self.stopped = self.stop.agreed()
        every = self.run.args.save_freq_steps
        in_between = every and (self.run.state.step + 1) % every == 0
        ends = i == self.config.steps_per_epoch - 1
        if not (self.stopped or in_between or (ends and self.due_at_end)):
            return None
        return self.save

    @property
    def last(self) -> bool:
        return self.epoch == self.run.args.epochs - 1

    @property
    def evaluates(self) -> bool:
        return self.run.args.online_eval and (self.last or (self.epoch + 1) % self.run.args.eval_freq == 0)

    @property
    def numbered(self) -> bool:
        return self.epoch > 0 and self.epoch % 100 == 0

    @property
    def due_at_end(self) -> bool:
        return self.last or self.evaluates or self.numbered or (self.epoch + 1) % self.run.args.save_last_freq == 0

    def save(self, i: int) -> bool:
        """Returns: whether to go on."""
        done = i + 1
        write_broken(self.run)
        if done == self.config.steps_per_epoch:
            save_checkpoint(self, self.epoch, 0)
        else:
            save_checkpoint(self, self.epoch - 1, done)
        return not self.stopped

    def finish(self) -> None:
        """All is saved: wait for what is being written, and say how to go on."""
        self.writer.close()
        why = f"stopped by {self.stop.name or 'a signal to another process'} after step {self.run.state.step}"
        say(f"{why}; go on by the same command with --resume {self.run.args.output_dir}")

    def leave(self) -> None:
        self.finish()
        self.board.close()
        end_at_once()


def end_at_once() -> None:
    sys.stdout.flush()
    os._exit(0)


def train(
    run: Run,
    config: engine.TrainConfig,
    saved: dict[str, Any] | None,
    first_epoch: int,
    first_step: int,
    prompts: list,
    pictures: Tensor,
    held_out: Tensor,
    stop: Stop,
) -> None:
    """`pictures` are trained on; the text's effect is measured on those held out, if any."""
    args, state, device, conditions, diffusion = run.args, run.state, run.device, run.conditioning.conditions, run.painter.diffusion
    sampler = StreamSampler(pictures, args.batch_size, config.steps_per_epoch * args.accum_iter, dist.rank(), dist.world_size(), args.seed)
    loader = DataLoader(
        run.dataset,
        args.batch_size,
        sampler=sampler,
        num_workers=workers(args),
        collate_fn=Collate(conditions if conditions.in_loader else None),
        pin_memory=args.pin_mem and device.type == "cuda",
        persistent_workers=workers(args) > 0,
        worker_init_fn=in_worker,
    )
    parallel = dist.wrap(state.net, device)
    board = Board(run.output_dir, state.step)
    bar = progress(args.epochs * config.steps_per_epoch, "training", initial=first_epoch * config.steps_per_epoch + first_step)
    skips = engine.Skips(device, saved["skips"] if saved else None)
    report = engine.Report(bar, board, effective_batch(args), skips)
    gap = make_text_gap(run, held_out if len(held_out) else pictures) if args.is_text else None
    saver = Saver(run, config, stop, checkpoint.Writer(args.keep_last), skips, board)
    if args.online_eval and saved and saved["evaluation_due"] and first_epoch and not is_evaluated(run):
        evaluate_online(saver, prompts)
    try:
        for epoch in range(first_epoch, args.epochs):
            saver.epoch = sampler.epoch = epoch
            sampler.first = first_step * args.accum_iter
            with engine.loader_deaths():
                engine.train_one_epoch(state, parallel, loader, conditions, diffusion, config, epoch, first_step, report, skips, saver.pause, gap, device)
            first_step = 0
            if not saver.stopped and saver.evaluates:
                evaluate_online(saver, prompts)
            if saver.stopped:
                saver.finish()
                break
        saver.writer.close()
    except UserError:
        with suppress(UserError):  # a checkpoint that is being written is still good
            saver.writer.wait()
        raise
    bar.close()
    board.close()
    dist.barrier()  # rank 0 may have been writing


def is_evaluated(run: Run) -> bool:
    """Whether the evaluation that was due at this step was made to its end.  Collective."""
    path = run.output_dir / EVALUATED
    return dist.from_main(path.is_file() and path.read_text() == str(run.state.step))


def evaluate_online(saver: Saver, prompts: list) -> None:
    """Figures, if any can be had, and the test prompts' pictures, to TensorBoard; a signal ends it at once, and the next start makes it anew.  Collective."""
    run, board = saver.run, saver.board
    args, state = run.args, run.state
    saver.stopped = saver.stop.agreed_now()
    if saver.stopped:
        return
    with saver.stop.at_once(saver.leave):
        if run.evaluator:
            board.scalars(run.evaluator(args.eval_ema[0], run.painter.sampler, args.num_images).scalars(), state.step)
        with engine.drawing_with(state, args.eval_ema[0]):
            board.image("test_prompts", engine.prompt_grid(run.painter, run.conditioning.prompts, prompts), state.step)
    if dist.is_main():
        with suppress(OSError):  # on a full disk it may be made twice
            (run.output_dir / EVALUATED).write_text(str(state.step))


def make_optimizer(net: JiT, weight_decay: float, device: torch.device) -> torch.optim.Optimizer:
    """AdamW as in the paper's table 9, no decay on biases, norms and one-dimensional tensors."""
    groups = param_groups_weight_decay(net, weight_decay)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))


def resume_training(args: argparse.Namespace, saved: dict[str, Any], path: Path, run: Run, config: engine.TrainConfig) -> tuple[int, int]:
    """Optimizer and step as the checkpoint has them.  Returns: the epoch to go on with, and how many of its steps are done."""
    state, world = run.state, world_of(args, run, config)
    first_epoch = saved.get("epoch", -1) + 1 if args.start_epoch is None else args.start_epoch
    first_step = saved.get("epoch_step", 0) if args.start_epoch is None else 0
    state.step = saved.get("step", first_epoch * config.steps_per_epoch)
    check_data(args, saved, path, world, first_step)
    by_name = checkpoint.load_optimizer_state(state.optimizer, state.net, saved.get("optimizer", {}))
    missing = "" if by_name else "; its optimizer state is not by name (a published file?), so AdamW starts afresh"
    within = f", {first_step} of its {config.steps_per_epoch} steps done" if first_step else ""
    say(f"resumed {path}: next epoch {first_epoch}{within}, step {state.step}, model, both EMAs{' and optimizer' if by_name else missing}")
    return first_epoch, first_step


def check_batch(args: argparse.Namespace, saved: dict[str, Any], path: Path) -> None:
    """Raises: UserError where a step of the checkpoint is another number of pictures than this run's."""
    world = saved.get("world")
    if not world:
        return
    batch, processes = effective_batch(args), dist.world_size()
    if world["effective_batch"] != batch and args.start_epoch is None:
        found = f"{args.batch_size} x {args.accum_iter} x {processes} = {batch}"
        raise UserError(
            f"{path} was trained with an effective batch of {world['effective_batch']}, and --batch_size x --accum_iter x processes is {found}; "
            f"make it {world['effective_batch']}, or say by --start_epoch that the steps are to be counted anew"
        )
    if world["processes"] != processes:
        say(f"{path} was trained by {world['processes']} processes, this run has {processes}; the effective batch and the order of the data are the same")


def check_data(args: argparse.Namespace, saved: dict[str, Any], path: Path, world: dict[str, Any], first_step: int) -> None:
    """Says where the files have changed.  Raises: UserError where they have within an epoch, whose order is another then."""
    before = saved.get("world")
    if before and (before["data"], before["steps_per_epoch"]) != (world["data"], world["steps_per_epoch"]):
        change = f"epochs of {before['steps_per_epoch']} steps, and with other files in --data_path {args.data_path} they are {world['steps_per_epoch']} now"
        if first_step:
            raise UserError(f"{path} stands within one of its {change}; give the same data, or begin the epoch again by --start_epoch")
        say(f"{path} had {change}")


def train_config(args: argparse.Namespace, data_size: int, bf16: bool) -> engine.TrainConfig:
    batch = effective_batch(args)
    return engine.TrainConfig(
        lr=args.blr * batch / 256 if args.lr is None else args.lr,
        epochs=args.epochs,
        steps_per_epoch=max(1, data_size // batch),
        warmup_epochs=args.warmup_epochs,
        lr_schedule=args.lr_schedule,
        min_lr=args.min_lr,
        accum_iter=args.accum_iter,
        label_drop_prob=args.label_drop_prob,
        grad_clip=args.grad_clip,
        bf16=bf16,
        seed=args.seed,
        log_freq=args.log_freq,
        bad_images=args.bad_images,
    )


def prepare(args: argparse.Namespace, saved: dict[str, Any] | None, path: Path | None, prompts: list, device: torch.device) -> Run:
    """Data, features, network and weights, the cheap and the fallible first.  Collective."""
    output_dir = writable_folder(args.output_dir, "--output_dir")
    if evaluates(args) and min(evaluation_sizes(args)) < dist.world_size():
        raise UserError(
            f"an evaluation of {min(evaluation_sizes(args))} pictures (--num_images, --sweep_images) is fewer than the {dist.world_size()} processes"
        )
    networks = find_networks(args, device) if evaluates(args) else Networks()
    check_measurable(args, networks != Networks())
    given, asked = read_reference(args, networks), read_eval_captions(args)
    dataset = make_dataset(args) if needs_data(args) else None
    seen = dist.gather_objects((len(dataset or ()), saved and (saved.get("epoch"), saved.get("step"))))
    if len(set(seen)) > 1:
        raise UserError(
            f"the processes see different data or checkpoints (pictures, (epoch, step)): {seen}; do all nodes see the same --data_path and --resume?"
        )

    references = find_references(args, networks, dataset, output_dir)
    check_measurable(args, bool(given or references or networks.clip or networks.vgg16))
    captions = (dataset.captions if dataset else PackedStrings(())) + PackedStrings(asked) if args.is_text else ()
    subjects = choose_subjects(args, dataset, captions)
    if args.is_text:
        conditioning = prepare_text(args, dataset, captions, subjects.values(), prompts, saved["text"] if saved else {}, device)
    else:
        conditioning = Conditioning(engine.LabelConditions(args.class_num), torch.tensor(prompts))
    measures = make_measures(args, networks, dataset, given, references)
    net = build_network(args, conditioning.width, device)
    emas = make_emas(args, net, saved)
    if saved:
        load_weights(saved, path, net, emas)
    step = saved.get("step", 0) if saved else 0
    state = engine.TrainState(net, make_optimizer(net, args.weight_decay, device), emas, step)
    painter = engine.Painter(
        net=engine.in_precision(net, device, uses_bf16(args, device)),
        null=conditioning.conditions.null,
        img_size=args.img_size,
        diffusion=DiffusionConfig(args.P_mean, args.P_std, args.noise_scale, args.t_eps),
        sampler=SamplerConfig(args.sampling_method, args.num_sampling_steps, args.cfg[0], (args.interval_min, args.interval_max)),
        batch_size=args.gen_bsz,
        device=device,
        seed=args.seed,
    )
    evaluator = None
    if measures or args.evaluate_gen:
        made_with = {name: value for name, value in (conditioning.description or {}).items() if not isinstance(value, Tensor)}
        facts = {"model": args.model, "precision": "bf16" if uses_bf16(args, device) else "fp32", "text": made_with}
        checkpoint_file = None if trains(args) else str(path)
        evaluator = evaluation.Evaluator(
            state, painter, measures, conditioning.conditions, subjects, facts, output_dir / "eval", checkpoint_file, args.save_images
        )
    return Run(args, device, dataset, conditioning, state, painter, evaluator, output_dir, data=dataset.fingerprint(args.data_path) if trains(args) else "")


def needs_data(args: argparse.Namespace) -> bool:
    """Training does, and an evaluation as well, but for one of labels or --eval_captions where there is no such folder."""
    if args.generate:
        return False
    return trains(args) or (args.is_text and not args.eval_captions) or os.path.isdir(args.data_path)


def make_emas(args: argparse.Namespace, net: JiT, saved: dict[str, Any] | None) -> list[Ema]:
    """With the flags' decays in training, with those that made the checkpoint otherwise; a published file has no warm-up."""
    made = {"ema_warmup": False} | saved["args"] if saved and not trains(args) else {}
    return [Ema(net, made.get(name, getattr(args, name)), made.get("ema_warmup", args.ema_warmup)) for name in ("ema_decay1", "ema_decay2")]


def uses_bf16(args: argparse.Namespace, device: torch.device) -> bool:
    return args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")


def start(args: argparse.Namespace) -> None:
    check_args(args)
    prompts = read_prompts(args)
    lock = Lock(writable_folder(args.output_dir, "--output_dir"), "--output_dir") if trains(args) and os.environ.get("RANK", "0") == "0" else None
    path = find_checkpoint(args)
    saved = checkpoint.load(path) if path else None
    if saved:
        check_resumed(args, saved, path)
    if not trains(args):
        draw(args, prompts, saved, path)
        return
    stop = Stop()
    try:
        prepare_and_train(args, prompts, saved, path, stop)
    finally:
        stop.close()
        del lock  # until here


def draw(args: argparse.Namespace, prompts: list, saved: dict[str, Any], path: Path) -> None:
    run = prepare(args, saved, path, prompts, dist.init(args.device))
    if args.generate:
        draw_prompts(run, path, prompts)
    else:
        evaluate_checkpoint(run, path)


def prepare_and_train(args: argparse.Namespace, prompts: list, saved: dict[str, Any] | None, path: Path | None, stop: Stop) -> None:
    def leave_early() -> None:
        say(f"stopped by {stop.name} before training began")
        end_at_once()

    with stop.at_once(leave_early):
        device = dist.init(args.device)
        if saved:
            check_batch(args, saved, path)
        run = prepare(args, saved, path, prompts, device)
        pictures, held_out = hold_out(len(run.dataset), args.held_out if args.is_text else 0, args.seed)
        config = train_config(args, len(pictures), uses_bf16(args, run.device))
        first_epoch, first_step = resume_training(args, saved, path, run, config) if saved else (args.start_epoch or 0, 0)
    if saved:  # the rest is tens of gigabytes, for the large models
        saved = {"skips": saved["skips"].clone() if "skips" in saved else None, "evaluation_due": saved.get("evaluation_due", False)}
    describe_run(args, run, config, len(pictures), len(held_out))
    if first_epoch >= args.epochs:
        say(f"nothing to train: {first_epoch} of --epochs {args.epochs} epochs are done")
    train(run, config, saved, first_epoch, first_step, prompts, pictures, held_out, stop)


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The file to begin from, if any.

    A run that has written into output_dir goes on from there when the same command is given again, wherever --resume had it begin; and where torchrun
    starts it again, --start_epoch has had its effect.
    """
    own = Path(args.output_dir) / checkpoint.LAST
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if trains(args) and restarted and own.exists():
        args.start_epoch = None
        return own
    path = checkpoint.find(args.resume, args.output_dir) if args.resume else None
    if path is None and not trains(args):
        raise UserError(f"--resume {args.resume} holds no checkpoint yet, so there is nothing to draw with")
    if not trains(args) or not own.exists():
        return path
    if path is None:
        raise UserError(f"{own} is there already; go on with it by --resume {args.output_dir}, or name another --output_dir")
    if path.resolve().parent == own.resolve().parent:
        return path
    say(f"going on with {own}, which was begun from --resume {args.resume} or another; for a fresh start name another --output_dir")
    return own


def draw_prompts(run: Run, path: Path, prompts: list) -> None:
    weights = run.args.eval_ema[0]
    made = evaluation.describe(weights, run.state.step, run.painter.sampler, run.painter.seed)
    say(f"drawing {len(prompts)} prompts with {path} [{made}]")
    evaluation.call_out_initial(run.state, weights)
    with engine.drawing_with(run.state, weights):
        sheet = engine.generate(run.painter, run.conditioning.prompts, prompts, run.output_dir / "samples")
    say(f"pictures in {sheet.parent}, all of them on {sheet}")


def evaluate_checkpoint(run: Run, path: Path) -> None:
    """Once, or under all settings of a sweep; the figures go to TensorBoard too."""
    args, evaluator = run.args, run.evaluator
    say(f"evaluating {path}, step {run.state.step}")
    if args.sweep:
        ranges = args.interval or ((args.interval_min, args.interval_max),)
        records, best = evaluation.sweep(evaluator, args.eval_ema, args.cfg, ranges, args.sweep_images, args.num_images)
        records = [*records, best]
    else:
        records = [evaluator(args.eval_ema[0], run.painter.sampler, args.num_images)]
    board = Board(run.output_dir)
    for record in records:
        board.scalars(record.scalars(), run.state.step)
    board.close()


def or_leave(action: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """A program's body; what a user can put right ends it in one line."""
    try:
        action(args)
    except UserError as error:
        leave(f"error: {error}", 1)
    dist.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    or_leave(start, get_parser().parse_args(argv))


if __name__ == "__main__":
    main()
