"""Resuming, every rule of it: what a checkpoint holds, which one a run begins from, what must agree with it, and how it is restored."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import exported
import lora
import released
from config import (
    SEVERAL,
    WEIGHT_CHOICES,
    Averages,
    Config,
    Data,
    DiffusionConfig,
    Drawing,
    DrawJob,
    Job,
    Model,
    Run,
    Sweep,
    SweepJob,
    TextSource,
    Train,
    TrainJob,
    as_type,
    check_kind,
    flag_of,
    from_plain,
    parse_model_name,
    settings,
    to_plain,
)
from util import checkpoint
from util import distributed as dist
from util.ema import Ema
from util.errors import UserError, one_line
from util.logging import say
from util.parts import Spread
from util.schedule import Due, Progress
from util.sharding import holding, whole
from util.skips import Skips

J = TypeVar("J", bound=DrawJob)

# --- what a run is made of, and what a checkpoint holds of it


@dataclass(kw_only=True)
class Weights:
    """A network and its averages: what draws."""

    net: nn.Module
    emas: list[Ema]
    step: int = 0  # optimizer steps that made them; 0 for a published file, which does not say
    copy: nn.Module | None = None  # of a sharded network: it draws, and has weights only meanwhile
    alone: str | None = None  # the one of "1", "2" and "raw" that the network is made of, where nothing else is kept

    @property
    def drawn(self) -> nn.Module:
        """The network that draws."""
        return self.copy or self.net

    @property
    def kept(self) -> tuple[str, ...]:
        """What can draw."""
        return (self.alone,) if self.alone else WEIGHT_CHOICES

    @contextmanager
    def drawing(self, which: str) -> Iterator[None]:
        """Inside, `drawn` computes with an average, "1" or "2", or with the network's own weights, "raw".  Collective where it is sharded."""
        if which not in self.kept:
            raise ValueError(f"weights {which} were not read, only {self.alone}")
        with self._computing_with(None if which in ("raw", self.alone) else self.emas[int(which) - 1]):
            yield

    def _computing_with(self, ema: Ema | None) -> AbstractContextManager:
        if self.copy:
            return holding(self.copy, ema.average if ema else dict(self.net.named_parameters()))
        return ema.applied(self.net) if ema else nullcontext()


@dataclass(kw_only=True)
class TrainState(Weights):
    """What training changes."""

    optimizer: torch.optim.Optimizer
    base: str = ""  # the hash of the weights below, where adapters alone are trained

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """What a step changes, in the network's order."""
        return [param for param in self.net.parameters() if param.requires_grad]


@dataclass(frozen=True)
class World:
    """What decides, with the seed, which pictures a step trains on."""

    processes: int
    effective_batch: int
    steps_per_epoch: int
    data: str  # the data set's fingerprint


@dataclass
class Saved:
    """A checkpoint, mapped into memory until it is closed."""

    path: Path
    weights: dict[str, Tensor | Spread]  # the network's own, under `net.`
    averages: list[dict[str, Tensor | Spread] | None]
    progress: Progress
    job: dict[str, Any]  # the configs that made it, plain: as many as it says
    text: dict[str, Any]  # how its text features were made; nothing for a class model
    optimizer: dict[str, Any] = field(default_factory=dict)
    world: World | None = None  # None for a published file
    anew: bool = False  # --start_epoch counts: the steps are not the checkpoint's any more
    base: str = ""  # as TrainState has it
    alone: str = ""  # which weights an exported folder holds: an average, or "raw"

    def check_which(self, asked: Sequence[str]) -> None:
        """Raises: UserError where weights are asked for that an exported folder does not hold."""
        if others := [which for which in asked if self.alone and which != self.alone]:
            raise UserError(f"--eval_ema {others[0]}: {self.path} holds only the weights {self.alone}; give --eval_ema {self.alone} or leave it out")

    @property
    def best(self) -> dict[str, Tensor]:
        """EMA 1, or where there is none the weights."""
        return {name: whole(value) for name, value in (self.averages[0] or self.weights).items()}

    @property
    def best_which(self) -> str:
        """Which weights `best` are."""
        return self.alone or ("1" if self.averages[0] else "raw")

    @property
    def best_name(self) -> str:
        return "the raw weights" if self.best_which == "raw" else f"EMA {self.best_which}"

    def close(self) -> None:
        """Let go of the file: a large model's is tens of gigabytes."""
        self.weights, self.averages, self.optimizer, self.text = {}, [], {}, {}


def content(state: TrainState, progress: Progress, world: World, job: TrainJob, text: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a checkpoint holds, as plain data.  `epoch` in the file is the last one that is finished."""
    return {
        "model": checkpoint.with_prefix(checkpoint.state_of(state.net)),
        **{f"model_ema{i + 1}": checkpoint.with_prefix(ema.state_dict(state.net)) for i, ema in enumerate(state.emas)},
        "optimizer": checkpoint.optimizer_state(state.optimizer, state.net),
        "epoch": progress.epoch - 1,
        "epoch_step": progress.epoch_step,
        "step": progress.step,
        "skips": progress.skips,
        "evaluation_due": progress.evaluation_due,
        "world": asdict(world),
        "job": to_plain(job),
        **({"text": dict(text)} if text else {}),
        **({"base": state.base} if state.base else {}),
    }


def read(path: Path, start_epoch: int | None = None, flag: str = "--resume") -> Saved:
    """A checkpoint of ours, of any version, an exported folder, or a published one: JiT's, or MiniT2I's folder.  Raises: UserError for what is none of them."""
    if checkpoint.is_released(path):
        weights, job, text = released.read(path, flag)
        return Saved(path, weights, [weights] * 2, Progress(epoch=0), job, text)
    if checkpoint.is_exported(path):
        found = exported.read(path, flag)
        return Saved(path, found.weights, [found.weights] * 2, Progress(epoch=0, step=found.step), found.job, found.text, alone=found.which)
    state = checkpoint.load(path, flag)
    try:
        progress, world = progress_of(state), from_plain(World, state["world"]) if "world" in state else None
        job = plain_job(state)
        for section, cls in SECTIONS.items():
            if job.get(section) is not None:
                from_plain(cls, job[section])  # whether it can be: the flags may complete it
        averages, text, base = [state.get(f"model_ema{i}") for i in (1, 2)], state.get("text", {}), as_type(str, state.get("base", ""), "base")
        if not all(part is None or isinstance(part, Mapping) for part in (*averages, text)):
            raise TypeError("averages and text must be dictionaries")
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # UserError is a ValueError
        raise UserError(f"{flag} {path}: not a JiT checkpoint ({one_line(error)})") from error
    if start_epoch is not None:
        progress = replace(progress, epoch=start_epoch, epoch_step=0)
    return Saved(
        path,
        weights=state["model"],
        averages=averages,
        progress=progress,
        job=job,
        text=text or {},
        optimizer=state.get("optimizer", {}),
        world=world,
        anew=start_epoch is not None,
        base=base,
    )


def read_whole(path: Path, flag: str = "--resume") -> Saved:
    """A checkpoint that draws by itself.  Raises: UserError, with what to type, for one that holds adapters alone."""
    saved = read(path, flag=flag)
    if saved.base:
        base = look_up(saved.job, "train.init_from")
        raise UserError(
            f"{flag} {path} holds only LoRA adapters; to draw give --resume {base} --lora {path.parent}, to merge them run export.py with the same two flags"
        )
    return saved


def progress_of(state: Mapping[str, Any]) -> Progress:
    """The position that a file says.  Raises: UserError, TypeError where it says none."""
    skips = state.get("skips")
    if skips is not None and (not isinstance(skips, Tensor) or skips.shape != (2,)):
        raise TypeError("skips must be two numbers")
    progress = Progress(
        epoch=as_type(int, state.get("epoch", -1), "epoch") + 1,
        epoch_step=as_type(int, state.get("epoch_step", 0), "epoch_step"),
        step=as_type(int | None, state.get("step"), "step"),
        skips=None if skips is None else skips.clone(),
        evaluation_due=as_type(bool, state.get("evaluation_due", False), "evaluation_due"),
    )
    if min(progress.epoch, progress.epoch_step, progress.step or 0) < 0:
        raise TypeError("epoch, epoch_step and step must not be negative")
    return progress


def plain_job(state: Mapping[str, Any]) -> dict[str, Any]:
    """The configs that a file says; those of `args`, which published files and ours before version 0.2 have, by the names of their flags."""
    job = dict(state["job"]) if "job" in state else of_flags(state["args"])
    if "world" not in state:  # a published file: its authors' folders are not here
        job.pop("data", None)
    else:
        job["train"] = {"optimizer": "adamw"} | dict(job.get("train") or {})  # before 27 November 2026 there was no other
    if text := state.get("text"):  # which was there before the configs, and is what the features were really made with
        source = dict(job.get("text") or {})
        encoder = dict(source.get("encoder") or {}) | {"llm": text["llm"], "layer": text["layer"], "max_text_len": text["max_text_len"]}
        job["text"] = source | {"encoder": encoder, "norm": text["text_norm"]}
    return job


SECTIONS: dict[str, type[Config]] = {
    "model": Model, "diffusion": DiffusionConfig, "data": Data, "text": TextSource, "averages": Averages, "drawing": Drawing, "run": Run,
}  # fmt: skip


def of_flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain configs from flags by name, as far as there are such flags and their values are ours."""
    job: dict[str, Any] = {"averages": {"warmup": False}} if values else {}  # published averages have none
    for section, cls in SECTIONS.items():
        for path, config_field, hint in settings(cls):
            known = flag_of(config_field)
            if known and known.name in values:
                value = values[known.name]
                with suppress(UserError):
                    put(job, f"{section}.{path}", as_type(hint, value[0] if known.several and value and isinstance(value, tuple | list) else value, path))
    if {"interval_min", "interval_max"} <= set(values):
        put(job, "drawing.sampler.cfg_interval", (values["interval_min"], values["interval_max"]))
    return job


# --- which checkpoint a run begins from


def find(job: TrainJob) -> Saved | None:
    """The checkpoint that the run begins from, if any; nothing is changed by looking."""
    path, start_epoch = beginning(job)
    if path and path.is_dir():
        raise UserError(f"--resume {path} is a model for drawing, not a training checkpoint; to start a run from its weights give --init_from {path}")
    return read(path, start_epoch) if path else None


def beginning(job: TrainJob) -> tuple[Path | None, int | None]:
    """The file that training begins from, and the epoch that --start_epoch asks for.

    A run that has written into output_dir goes on from there when the same command is given again, wherever it began, and --start_epoch has had its
    effect; so it has where torchrun starts a run again that goes on in its own folder.
    """
    run, start_epoch = job.run, job.train.start_epoch
    own = Path(run.output_dir) / checkpoint.LAST
    if own.exists() and (began := dist.torchrun_began()) is not None and own.stat().st_mtime > began:
        return own, None
    if own.exists() and job.train.init_from:
        say(f"resuming {own}, a run that was started with --init_from {job.train.init_from}; for a new run give another --output_dir")
        return own, None
    path = checkpoint.find(run.resume, run.output_dir) if run.resume else None
    if not own.exists():
        return path, start_epoch
    if path is None:
        raise UserError(f"{own} exists already; to continue that run give --resume {run.output_dir}, for a new run give another --output_dir")
    if path.resolve().parent == own.resolve().parent:
        return path, start_epoch
    say(f"resuming {own} instead of --resume {run.resume}: this run has saved it already; for a new run give another --output_dir")
    return own, None


def find_origin(job: TrainJob) -> Saved | None:
    """The checkpoint of --init_from."""
    if job.train.init_from is None:
        return None
    return read_whole(checkpoint.find(job.train.init_from, flag="--init_from"), "--init_from")


# --- what must agree


@dataclass(frozen=True)
class Rule:
    """A field in which a run and its checkpoint must agree."""

    field: str  # dotted, within the job
    flag: str
    when: Sequence[str] = ("training", "drawing")  # or "resuming": in training that goes on with it; "counting": and goes on counting its steps
    kind: str = ""  # "text" or "class": for these models alone


RULES = (
    Rule("model.name", "model"),
    Rule("model.img_size", "img_size"),
    Rule("diffusion.noise_scale", "noise_scale"),
    Rule("diffusion.P_mean", "P_mean", ("drawing",)),  # training may change these on its way
    Rule("diffusion.P_std", "P_std", ("drawing",)),
    Rule("diffusion.t_eps", "t_eps", ("drawing",)),
    Rule("text.encoder.llm", "llm_model_name", kind="text"),
    Rule("text.encoder.max_text_len", "max_text_len", kind="text"),
    Rule("text.encoder.layer", "llm_layer", kind="text"),
    Rule("text.norm", "text_norm", kind="text"),
    Rule("model.class_num", "class_num", kind="class"),
    Rule("train.lora_rank", "lora_rank", ("resuming",)),
    Rule("train.optimizer", "optimizer", ("resuming",)),
    Rule("run.seed", "seed", ("counting",)),  # it and the next decide which pictures a step trains on
    Rule("data.held_out", "held_out", ("counting",), kind="text"),
)


def check(saved: Saved, job: Job, base: bool = False) -> None:
    """Raises: UserError where the checkpoint is of another network, noise or text than the run.

    Of a run that draws, and of one that trains adapters for this checkpoint (`base`), what is given counts alone.
    """
    training = isinstance(job, TrainJob)
    says_all = training and not base
    moments = {"training"} if training else {"drawing"}
    if says_all:
        if bool(saved.base) != (job.train.lora_rank is not None):
            raise UserError(
                f"{saved.path} holds {'only LoRA adapters; give --lora_rank' if saved.base else 'a whole model and no adapters; leave out --lora_rank'}"
            )
        if job.train.init_from and not look_up(saved.job, "train.init_from"):
            raise UserError(
                f"--init_from {job.train.init_from}: {saved.path} was started without it; to continue that run leave out --init_from, for a new run give another --output_dir"
            )
        moments.add("resuming")
        if saved.world and not saved.anew:
            moments.add("counting")
    name = job.model.name if says_all else job.given.get("model", look_up(saved.job, "model.name") or Model.name)
    kind = "class" if parse_model_name(name).condition == "labels" else "text"
    if kind == "text" and not saved.text:
        raise UserError(f"--model {name} is a text model, but {saved.path} does not say how its text features were made; is it of a class model?")
    ours = to_plain(job) if says_all else {}
    for rule in RULES:
        if moments & set(rule.when) and rule.kind in ("", kind):
            agree(saved, rule, look_up(ours, rule.field) if says_all else job.given.get(rule.flag))


def begun_with(job: TrainJob, saved: Saved) -> TrainJob:
    """With the checkpoint's --init_from where none is given, so that the run's next checkpoint says it too."""
    begun = job.train.init_from or look_up(saved.job, "train.init_from")
    return replace(job, train=replace(job.train, init_from=begun))


def agree(saved: Saved, rule: Rule, ours: Any) -> None:
    """Raises: UserError where both say something, and not the same."""
    found = look_up(saved.job, rule.field)
    if ours is None or found is None or ours == found:
        return
    if rule.field == "text.encoder.llm" and (os.path.isdir(ours) or os.path.isdir(found)):
        return  # a folder may have another name now; its content is compared when it is opened
    raise UserError(f"--{rule.flag} is {ours}, but {saved.path} was trained with {found}; give --{rule.flag} {found}")


def look_up(plain: Mapping[str, Any], path: str) -> Any:
    """plain["a"]["b"] of "a.b"; None where there is no such thing."""
    value: Any = plain
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def put(plain: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        plain = plain.setdefault(section, {})
    plain[name] = value


def check_batch(saved: Saved, train: Train) -> None:
    """Raises: UserError where a step of the checkpoint is another number of pictures than this run's."""
    before, processes = saved.world, dist.world_size()
    if not before:
        return
    batch = train.effective_batch(processes)
    if before.effective_batch != batch and not saved.anew:
        found = f"{train.batch_size} x {train.accum_iter} x {processes} = {batch}"
        raise UserError(
            f"{saved.path} was trained with an effective batch of {before.effective_batch}, and --batch_size x --accum_iter x processes is {found}; "
            f"make it {before.effective_batch}, or give --start_epoch to count the steps anew"
        )
    if before.processes != processes:
        say(f"{saved.path} was trained by {before.processes} processes, this run has {processes}; the effective batch and the order of the data are the same")


def check_data(saved: Saved, world: World, data_path: str) -> None:
    """Says where the files have changed.  Raises: UserError where they have within an epoch: the rest of it would be other pictures."""
    before = saved.world
    if before and (before.data, before.steps_per_epoch) != (world.data, world.steps_per_epoch):
        files = f"other files in --data_path {data_path}" if before.data != world.data else "another batch size or --held_out"
        change = f"epochs of {before.steps_per_epoch} steps; this run has {files}, and its epochs have {world.steps_per_epoch} steps"
        if saved.progress.epoch_step:
            raise UserError(
                f"{saved.path} was saved in the middle of an epoch and had {change}; give the same data, or start that epoch again with --start_epoch {saved.progress.epoch}"
            )
        say(f"{saved.path} had {change}")


# --- what a run that draws takes from its checkpoint

INHERITED = (  # fields and whole sections that are the checkpoint's where their flags are not given; nothing that runs code, no processes, no device
    "model", "diffusion", "averages", "data.path", "data.missing", "text.encoder.llm", "text.encoder.max_text_len", "text.encoder.layer",
    "text.encoder.pooling", "text.norm", "text.cache", "text.folder", "drawing.weights", "drawing.sampler", "run.seed", "run.precision",
)  # fmt: skip
OF_BASE = (  # what training adapters takes from the model that they are for
    "model", "diffusion", "text.encoder.llm", "text.encoder.max_text_len", "text.encoder.layer", "text.encoder.pooling", "text.norm", "drawing.sampler",
)  # fmt: skip
OF_DATA = ("data.format", "data.image_column", "data.caption_column", "data.image_root")  # the checkpoint's too, unless other data is given


def completed(job: J, saved: Saved) -> J:
    """The job with the checkpoint's settings where the flags say none.  Raises: UserError where a flag that is given contradicts it."""
    check(saved, job)
    given = job.given
    configs = filled(job, saved, INHERITED + (() if "data_path" in given else OF_DATA))
    if "output_dir" not in given and (job.drawing.lora or not saved.path.is_dir()):  # nothing is written into a model's folder
        configs["run"] = replace(configs["run"], output_dir=job.drawing.lora or str(saved.path.parent))
    saved.check_which(given.get("eval_ema", ()))
    if which := saved.alone or (saved.best_which if job.drawing.lora and "eval_ema" not in given else None):  # what adapters are trained on
        configs["drawing"] = replace(configs["drawing"], weights=which)
    job = replace(job, **configs)
    return replace(job, sweep=completed_sweep(job)) if isinstance(job, SweepJob) else job


def on_its_base(job: TrainJob) -> TrainJob:
    """With the settings of the model that adapters are trained for, where the flags say none.  Raises: UserError where a flag that is given contradicts it."""
    if job.train.lora_rank is None:
        return job
    base = find_origin(job)
    check(base, job, base=True)
    configs = filled(job, base, OF_BASE)
    base.close()
    return replace(job, **configs)


def filled(job: J | TrainJob, saved: Saved, inherited: Sequence[str]) -> dict[str, Config | None]:
    """The job's configs, with the checkpoint's values in the fields and sections `inherited` whose flags are not given."""
    given, found = job.given, {section: to_plain(getattr(job, section)) for section in SECTIONS}
    for section, cls in SECTIONS.items():
        for name, config_field, _ in settings(cls):
            path, known = f"{section}.{name}", flag_of(config_field)
            value = look_up(saved.job, path) if any(f"{path}.".startswith(f"{place}.") for place in inherited) else None
            if known and known.name in given and section != "averages":  # averages are what they were made with
                value = given[known.name] if section == "model" else None  # the other sections hold what is given
            if value is not None:
                put(found, path, value)
    low, high = found["drawing"]["sampler"]["cfg_interval"]
    found["drawing"]["sampler"]["cfg_interval"] = (given.get("interval_min", low), given.get("interval_max", high))
    if found["text"]["cache"] != "disk" and "text_cache_dir" not in given:
        found["text"]["folder"] = None
    configs = {section: from_plain(cls, found[section]) for section, cls in SECTIONS.items()}
    check_kind(configs["model"], given)
    return configs | {"text": configs["text"] if configs["model"].is_text else None}


def completed_sweep(job: SweepJob) -> Sweep:
    """With what the checkpoint draws with where no values are given.  Raises: UserError for a single setting."""
    sampler, sweep = job.drawing.sampler, job.sweep
    sweep = replace(
        sweep,
        weights=sweep.weights or (job.drawing.weights,),
        scales=sweep.scales or (sampler.cfg_scale,),
        intervals=sweep.intervals or (sampler.cfg_interval,),
    )
    if len(sweep.weights) == len(sweep.scales) == 1 and (len(sweep.intervals) == 1 or sweep.scales == (1,)):
        raise UserError(SEVERAL)
    return sweep


def open_for_drawing(job: J) -> tuple[J, Saved]:
    """The completed job, and the checkpoint, to be restored and closed."""
    if job.drawing.lora:
        lora.check_folder(job.drawing.lora)
    path = checkpoint.find(job.run.resume, job.run.output_dir)
    if path is None:
        raise UserError(f"--resume {job.run.resume} holds no checkpoint yet, so there is nothing to draw with")
    saved = read_whole(path)
    return completed(job, saved), saved


# --- restoring, and saving


def restore_weights(saved: Saved, weights: Weights) -> None:
    """The network and its averages, or what it is made of alone.  Raises: UserError where they do not fit."""
    expected = checkpoint.state_of(weights.net)
    held = {"raw": ("model", saved.weights), "1": ("model_ema1", saved.averages[0]), "2": ("model_ema2", saved.averages[1])}
    loads = {weights.alone or "raw": partial(checkpoint.load_into, expected)}
    if not weights.alone:
        loads |= {str(i + 1): ema.load_state_dict for i, ema in enumerate(weights.emas)}
    for which, load in loads.items():
        name, values = held[which]
        if values is None:
            raise UserError(f"{saved.path} has no {name}; wanted a checkpoint with model, model_ema1 and model_ema2")
        load(checkpoint.without_prefix(values, expected, f"{saved.path}, {name},"))
    weights.step = saved.progress.step or 0


def restore(saved: Saved, state: TrainState, steps_per_epoch: int) -> Progress:
    """All that training changes.  Returns: where the run goes on; the checkpoint is closed."""
    if saved.base != state.base:
        raise UserError(f"{saved.path} holds adapters for other weights than those of --init_from; name the model that they were trained on")
    restore_weights(saved, state)
    progress = saved.progress
    if progress.step is None:
        progress = replace(progress, step=progress.epoch * steps_per_epoch)
    state.step = progress.step
    if progress.epoch_step >= steps_per_epoch:
        raise UserError(
            f"{saved.path} was saved after step {progress.epoch_step} of an epoch, and an epoch has only {steps_per_epoch} steps now; start that epoch again with --start_epoch {progress.epoch}"
        )
    try:
        by_name = checkpoint.load_optimizer_state(state.optimizer, state.net, saved.optimizer)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--resume {saved.path}: its optimizer state is none of --optimizer's ({one_line(error)})") from error
    missing = "" if by_name else "; its optimizer state is not by name (a published file?), so the optimizer starts afresh"
    within = f", {progress.epoch_step} of its {steps_per_epoch} steps done" if progress.epoch_step else ""
    say(f"resumed {saved.path}: next epoch {progress.epoch}{within}, step {state.step}, model, both EMAs{' and optimizer' if by_name else missing}")
    saved.close()
    return progress


@dataclass
class Saver:
    """Writes checkpoints of a run: saver(due, position), then `settle` before the next step.  Rank 0 copies the state and goes on, the others do not wait; of a sharded one each copies its part.  Collective."""

    writer: checkpoint.Writer
    state: TrainState
    skips: Skips
    world: World
    job: TrainJob
    text: Mapping[str, Any] | None

    def __call__(self, due: Due, progress: Progress) -> None:
        if not dist.is_main() and not self.state.copy:
            return
        progress, folder = replace(progress, skips=self.skips.kept(), evaluation_due=due.evaluate), Path(self.job.run.output_dir)
        numbered = folder / f"checkpoint-{progress.epoch - 1}.pth" if due.numbered else None
        self.writer.write(content(self.state, progress, self.world, self.job, self.text), folder / checkpoint.LAST, numbered)

    def settle(self) -> None:
        """Before a step changes the weights."""
        self.writer.settle()
