"""Drawing: a painter of numbered pictures, prompts to files, a painter out of a checkpoint alone.

The verbs: the solver *samples*, a painter *paints* a batch, *draws* many over all ranks as uint8, and *generates* files of prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import lora
import models_jit
import models_mmjit
import resume
from conditioning import LabelConditions, expand_null, norm_of
from config import Averages, Data, DiffusionConfig, Drawing, DrawJob, GenerateJob, Model, Run, SamplerConfig, TextConfig, TextSource, TrainJob
from datasets.transforms import to_image, to_levels
from denoiser import Net, sample
from resume import Weights
from text_features import PinnedModel, conditions_of_prompts
from util import distributed as dist
from util.ema import averages_of
from util.errors import UserError
from util.logging import progress_bar, say
from util.parallel import for_drawing, uses_bf16, uses_compile
from util.randomness import derive, normal
from util.sheet import captioned_sheet, save_sheet
from util.text import Embedded, PackedText, Y


@dataclass
class Room:
    """How many pictures the device's memory holds at a time, as far as is known."""

    pictures: int = 256

    def shrink(self, tried: int) -> None:
        self.pictures = tried // 2
        torch.cuda.empty_cache()
        say(f"{tried} pictures at a time do not fit into the GPU's memory; going on with {self.pictures}")


@dataclass(frozen=True)
class Painter:
    """A network with all that drawing takes; picture i depends on seed, i and its condition alone."""

    net: Net
    null: Y  # (1, ...)
    img_size: int
    diffusion: DiffusionConfig
    sampler: SamplerConfig
    batch_size: int | None  # None: as many as there is room for
    device: torch.device
    seed: int = 0
    embed: Callable[[Y], Y | Embedded] = lambda y: y  # once for all steps
    room: Room = field(default_factory=Room)

    @torch.no_grad()
    def paint(self, numbers: Sequence[int], y: Y | PackedText) -> Tensor:
        """Pictures of those numbers under conditions y, (B, 3, H, W), about [-1, 1]."""
        noise = normal(self.seed, "sample", numbers, (3, self.img_size, self.img_size)).to(self.device)
        y, null = self.embed(y.to(self.device)), self.embed(self.null.to(self.device))
        return sample(self.net, noise, y, expand_null(null, len(y)), self.diffusion, self.sampler)

    def paint_in_batches(self, numbers: Sequence[int], y_of: Callable[[Sequence[int]], Y | PackedText]) -> Iterator[tuple[list[int], Tensor]]:
        """Those pictures, some at a time: their numbers and (B, 3, H, W) uint8 on the CPU.  y_of: numbers -> conditions (B, ...).

        Raises: UserError where `batch_size` of them do not fit into the GPU's memory.
        """
        start = 0
        while start < len(numbers):
            part = list(numbers[start : start + (self.batch_size or self.room.pictures)])
            try:
                pictures = to_levels(self.paint(part, y_of(part)))
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise UserError(f"not even one picture of {self.img_size} pixels fits into what is free of the GPU's memory") from error
                if self.batch_size:
                    raise UserError(f"{len(part)} pictures at a time do not fit into the GPU's memory; give --gen_bsz auto, or a smaller number") from error
                pictures = None  # what was tried is freed at the end of this block
            if pictures is None:
                self.room.shrink(len(part))
                continue
            yield part, pictures
            start += len(part)

    def draw(self, y_of: Callable[[Sequence[int]], Y | PackedText], count: int, what: str) -> Iterator[tuple[list[int], Tensor]]:
        """This rank's share of pictures 0 .. count - 1: their numbers and (B, 3, H, W) uint8 on the CPU.

        y_of: numbers -> conditions (B, ...).  A progress bar stands on rank 0.
        """
        mine = range(dist.rank(), count, dist.world_size())
        with progress_bar(len(mine), what, unit="picture") as bar:
            for numbers, pictures in self.paint_in_batches(mine, y_of):
                yield numbers, pictures
                bar.update(len(numbers))


def make_network(job: TrainJob | DrawJob, text_width: int | None, device: torch.device) -> nn.Module:
    """With the initial weights that follow from the seed.  text_width: of a text model's features."""
    model = job.model
    torch.manual_seed(derive(job.run.seed, "initial weights", 0))
    if model.family == "MMJiT":
        return models_mmjit.build_model(model.name, input_size=model.img_size, text_dim=text_width).to(device)
    net = models_jit.build_model(
        model.name,
        input_size=model.img_size,
        attn_drop=model.attn_dropout,
        proj_drop=model.proj_dropout,
        num_classes=model.class_num,
        text_dim=text_width,
        text_len=job.text.encoder.max_text_len if model.condition == "tokens" else None,
    )
    return net.to(device)


def make_painter(job: TrainJob | DrawJob, net: nn.Module, null: Y, device: torch.device) -> Painter:
    """A few pictures are drawn sooner than a network is compiled, so --generate compiles only where it is asked to."""
    bf16 = uses_bf16(job.run.precision, device)
    compile = uses_compile(job.run.compile, device, bf16, usual=not isinstance(job, GenerateJob))
    call, embed = for_drawing(net, device, bf16, compile)
    return Painter(call, null, job.model.img_size, job.diffusion, job.drawing.sampler, job.drawing.batch_size, device, job.run.seed, embed)


def restored(job: DrawJob, saved: resume.Saved, text_width: int | None, device: torch.device) -> Weights:
    """The weights of a checkpoint, with those of --lora, in a network of their own; to --generate, those alone that draw.  The checkpoint is closed."""
    net, alone = make_network(job, text_width, device), job.drawing.weights if isinstance(job, GenerateJob) else None
    weights = Weights(net=net, emas=averages_of(net, job.averages, kept=alone is None), alone=alone)
    resume.restore_weights(saved, weights)
    saved.close()
    if job.drawing.lora:
        merge_adapters(weights, job.drawing.weights, job.drawing.lora, job.drawing.lora_scale)
    return weights


def merge_adapters(weights: Weights, which: str, folder: str, scale: float) -> None:
    """Into all weights that are kept.  which: those that draw, whose base is compared.  Raises: UserError where they do not fit, and nothing is changed."""
    with weights.drawing(which):
        lora.compare_base(weights.net, folder)
    for which in weights.kept:
        with weights.drawing(which):
            lora.merge(weights.net, folder, scale)


def as_prompts(model: Model, prompts: Sequence[str] | None, usual: Sequence[str]) -> list[str] | list[int]:
    """What to draw: captions, or label numbers for a class model; with None the `usual` prompts, or the first labels.

    Raises: UserError for what is no label.
    """
    if model.is_text:
        return list(usual if prompts is None else prompts)
    if prompts is None:
        return list(range(min(10, model.class_num)))
    wrong = [prompt for prompt in map(str, prompts) if not (prompt.isdecimal() and int(prompt) < model.class_num)]
    if wrong:
        raise UserError(f"--prompt {wrong[0]}: {model.name} takes label numbers from 0 to {model.class_num - 1}; for text use a -Text model")
    return [int(prompt) for prompt in prompts]


def save_pictures(folder: Path, numbers: Sequence[int], pictures: Tensor, digits: int) -> None:
    """(B, 3, H, W) uint8 to one PNG each, named by number."""
    for i, picture in zip(numbers, pictures):
        to_image(picture).save(folder / f"{i:0{digits}d}.png")


def generate(painter: Painter, y: Tensor | PackedText, prompts: Sequence, folder: Path) -> Path:
    """Draw each prompt into folder/NNNN.png, and all of them on folder/sheet.png; what a longer call before has left goes.  Collective.

    Args: y: (prompts, ...), their conditions.  Returns: the sheet's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for numbers, pictures in painter.draw(lambda numbers: y[numbers], len(prompts), "pictures"):
        save_pictures(folder, numbers, pictures, digits=4)
    dist.barrier()
    if dist.is_main():
        for path in folder.glob("*.png"):
            if path.stem.isdecimal() and int(path.stem) >= len(prompts):
                path.unlink()
        captions = [str(prompt) for prompt in prompts]
        (folder / "prompts.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        shown = [Image.open(folder / f"{i:04d}.png") for i in range(min(len(prompts), 400))]
        save_sheet(folder / "sheet.png", shown, captions[: len(shown)])
    return folder / "sheet.png"


def draw_sheet(painter: Painter, y: Tensor | PackedText, prompts: Sequence) -> np.ndarray:
    """The prompts' pictures as one captioned sheet, (H, W, 3) uint8.  Collective.  y: (prompts, ...)."""
    drawn = list(painter.draw(lambda numbers: y[numbers], len(prompts), "test prompts"))
    empty = torch.empty(0, 3, painter.img_size, painter.img_size, dtype=torch.uint8)
    numbers = dist.gather_rows(torch.tensor([i for part, _ in drawn for i in part], dtype=torch.long))
    pictures = dist.gather_rows(torch.cat([empty, *(part for _, part in drawn)]))[numbers.argsort()]
    return np.asarray(captioned_sheet([to_image(p) for p in pictures], [str(prompt) for prompt in prompts], columns=5)[0])


# --- from a checkpoint alone


@dataclass
class LoadedPainter:
    """painter(prompts) -> pictures, out of a checkpoint; the language model is loaded at the first use, which is collective."""

    job: GenerateJob
    weights: Weights
    text: dict[str, Any]  # how the text features were made; nothing for a class model
    device: torch.device
    room: Room = field(default_factory=Room)

    def add_lora(self, folder: str | Path, scale: float = 1.0) -> None:
        """Add a folder of adapters, as --lora does; several add up.  Raises: UserError where they do not fit, and nothing is changed."""
        lora.check_folder(str(folder))
        merge_adapters(self.weights, self.job.drawing.weights, str(folder), scale)

    @property
    def sampler(self) -> SamplerConfig:
        """How the checkpoint says to draw; a call takes `dataclasses.replace(painter.sampler, steps=20)`."""
        return self.job.drawing.sampler

    @cached_property
    def encoder(self):
        return PinnedModel(self.job.text.encoder, self.text, {}, self.device).load()

    def condition(self, prompts: Sequence[str] | Sequence[int]) -> tuple[Tensor | PackedText, Y]:
        """y of prompts, as --generate makes it, and of nothing."""
        if not self.job.text:
            return torch.tensor(as_prompts(self.job.model, prompts, ()), dtype=torch.long), LabelConditions(self.job.model.class_num).null
        return conditions_of_prompts(self.encoder, list(prompts), norm_of(self.text))

    def __call__(self, prompts: str | Sequence[str] | Sequence[int], sampler: SamplerConfig | None = None, seed: int = 0, first: int = 0) -> Tensor:
        """A picture of each prompt, (N, 3, H, W) uint8 on the CPU; picture i follows from the seed, `first` + i and its prompt.

        Args: prompts: captions, or labels of a class model; a string is one caption; sampler: None draws as the checkpoint says.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        y, null = self.condition(prompts)
        painter = make_painter(self.job, self.weights.net, null, self.device)
        painter = replace(painter, seed=seed, sampler=sampler or self.sampler, batch_size=None, room=self.room)
        with self.weights.drawing(self.job.drawing.weights):
            drawn = painter.paint_in_batches(range(first, first + len(y)), lambda numbers: y[[number - first for number in numbers]])
            parts = [pictures for _, pictures in drawn]
        return torch.cat(parts) if parts else torch.empty(0, 3, painter.img_size, painter.img_size, dtype=torch.uint8)


def load_painter(path: str | Path, weights: str | None = None, device: str = "auto", llm: str | None = None, trust_remote_code: bool = False) -> LoadedPainter:
    """A painter with all its settings out of a checkpoint: a file, or a folder with checkpoint-last.pth.

    Args: weights: EMA "1" or "2", or "raw"; None: as the checkpoint says, EMA 1 if nothing else was asked of it; device: "auto", "cuda" or "cpu"; llm: where the language model's folder is now;
    trust_remote_code: run the code that it brings along.  Raises: UserError where the checkpoint cannot be had.
    """
    given = {"resume": str(path), "device": device, "trust_remote_code": trust_remote_code}
    given |= ({"eval_ema": (weights,)} if weights else {}) | ({"llm_model_name": llm} if llm else {})
    source = TextSource(TextConfig(llm or TextConfig.llm, trust_remote_code=trust_remote_code))
    run, drawing = Run(resume=str(path), device=device), Drawing(weights=weights or "1")
    job, saved = resume.open_for_drawing(
        GenerateJob(Model(), DiffusionConfig(), Data(), source, Averages(), drawing, run, given, prompts=(), prompts_file=None)
    )
    text = {name: value.clone() if isinstance(value, Tensor) else value for name, value in saved.text.items()}  # restored() closes the mapped file
    place = dist.init(device)
    return LoadedPainter(job, restored(job, saved, text.get("width"), place), text, place)
