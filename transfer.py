"""--init_from: a run's first weights out of another checkpoint's (its EMA 1), tensor by tensor.

What has the same name and shape is copied. Where y is of another kind, or another language model's, its embedders start so that the network does what it did
without a condition: classes entered adaLN in every block, so the null's vector goes into the time embedder's last bias where adaLN takes the time alone.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from config import DiffusionConfig, parse_model_name
from resume import Saved, look_up
from util import checkpoint
from util.errors import UserError
from util.logging import say
from util.text import Y

TABLE, PROJ, BIAS, MASK = "y_embedder.embedding_table.weight", "y_embedder.proj.weight", "y_embedder.proj.bias", "y_embedder.mask_token"
TIME, PLACES = "t_embedder.mlp.2.bias", "in_context_posemb"  # the time embedder's last bias; the places of the in-context tokens
LEAST_GAIN = 0.05  # directions that a new projection passes on less than this, beside its strongest, would ask for a mask token far larger than any token
ORDER = ("labels", "pooled", "tokens")  # a condition can become itself, or one further on


@dataclass
class Report:
    """What became of every tensor."""

    copied: list[str] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)  # name -> of what
    new: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        lines = [f"copied   {name}" for name in self.copied] + [f"made     {name}  ({of})" for name, of in self.made.items()]
        lines += [f"new      {name}" for name in self.new] + [f"dropped  {name}" for name in self.dropped]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        parts = [f"{len(self.copied)} tensors copied"]
        parts += [f"{word}: {', '.join(names)}" for word, names in (("made", self.made), ("new", self.new), ("dropped", self.dropped)) if names]
        return "; ".join(parts)


def check_origin(origin: Saved, name: str) -> None:
    """Raises: UserError where the weights of `origin` can be of no use to the model `name`."""
    if (said := look_up(origin.job, "model.name")) is None:
        return
    wanted, found = parse_model_name(name), parse_model_name(said)
    if (found.family, found.size) != (wanted.family, wanted.size):
        raise UserError(
            f"--init_from {origin.path} is {found.family}-{found.size}, and --model {name} is another network; wanted one of the same family and size"
        )
    if ORDER.index(found.condition) > ORDER.index(wanted.condition):
        raise UserError(
            f"--init_from {origin.path} reads {found.condition}, and --model {name} reads {wanted.condition}: weights can go from labels to pooled to tokens, but not back"
        )


def say_noise(origin: Saved, diffusion: DiffusionConfig) -> None:
    """Tell where the noise is not the origin's: a new resolution wants that, a forgotten flag does not."""
    before = look_up(origin.job, "diffusion") or {}
    for name, found in asdict(diffusion).items():
        if before.get(name, found) != found:
            say(f"--init_from {origin.path} was trained with --{name} {before[name]:g}; this run has {found:g}")


def spread_of(weight: Tensor) -> Tensor:
    """The standard deviation of a linear layer's outputs under standardized features."""
    return weight.float().square().sum(1).mean().sqrt()


def scaled(weight: Tensor, spread: Tensor) -> Tensor:
    return weight * (spread / spread_of(weight))


class Transfer:
    """The weights of `source` for a network that has `target`, both by name.

    Args: same_text: whether the features of text are alike; null: y of nothing in the run that begins, if it is pooled.
    """

    def __init__(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor], same_text: bool, null: Y):
        self.source, self.target, self.same_text, self.null = source, target, same_text, null
        self.values: dict[str, Tensor] = {}
        self.report = Report()

    def __call__(self) -> dict[str, Tensor]:
        own = self.joint_text() if "txt_embedder.weight" in self.target else self.condition()
        for name, value in self.target.items():
            if name in own or name in self.report.made:
                continue
            if name in self.source and self.source[name].shape == value.shape:
                self.copy(name)
            else:
                self.report.new.append(name)
        self.report.new += sorted(own - set(self.values))
        self.report.dropped = [name for name in self.source if name not in self.target]
        return self.values

    def copy(self, *names: str) -> None:
        for name in names:
            self.values[name] = self.source[name]
            self.report.copied.append(name)

    def make(self, name: str, value: Tensor, of: str) -> None:
        self.values[name], self.report.made[name] = value, of

    def joint_text(self) -> set[str]:
        """MM-JiT's text stream.  Returns: the names it handles."""
        names = {"txt_embedder.weight", "mask_token"}
        if self.same_text:
            self.copy(*names)
            return names
        old, new = self.source["txt_embedder.weight"].float(), self.target["txt_embedder.weight"]
        weight = scaled(new, spread_of(old))
        self.make("txt_embedder.weight", weight, "new, with the old one's spread")
        entered = old @ self.source["mask_token"].float().flatten()
        self.make("mask_token", (torch.linalg.pinv(weight, rtol=LEAST_GAIN) @ entered).reshape(1, 1, -1), "what enters as the old one did")
        return names

    def condition(self) -> set[str]:
        """JiT's embedder of y.  Returns: the names it handles."""
        source, target = self.source, self.target
        names = {name for name in target if name.startswith("y_embedder.")}
        before, now = condition_of(source), condition_of(target)
        places = set()
        if now == "tokens" and source[PLACES].shape != target[PLACES].shape:
            rows, places = min(source[PLACES].shape[1], target[PLACES].shape[1]), {PLACES}
            self.make(PLACES, torch.cat([source[PLACES][:, :rows], target[PLACES][:, rows:]], dim=1), f"the first {rows} copied, the others new")
        if now == "labels":
            if source[TABLE].shape == target[TABLE].shape:
                self.copy(TABLE)
            else:
                self.make(TABLE, self.resting(before).expand_as(target[TABLE]).clone(), "the null label's vector for every class")
            return names
        if before == now and self.same_text:
            self.copy(*names)
            return names | places
        resting = self.resting(before)
        spread = spread_of(source[PROJ]) if PROJ in source else (source[TABLE][:-1].float().var(0, correction=0).mean()).sqrt()
        if before == "pooled" and self.same_text:
            self.copy(PROJ)
        elif now == "pooled" or before == "tokens":  # else it stays new: tokens are read by attention, and as quiet as classes were they are found late
            self.make(PROJ, scaled(target[PROJ], spread), f"new, with the spread of the {before}")
        if now == "pooled":
            self.make(BIAS, resting - (self.values[PROJ] @ self.null.flatten().cpu() if before == "labels" else 0), f"of the {before} at rest")
            return names
        self.make(BIAS, source[BIAS] if before == "tokens" else resting, f"of the {before} at rest")
        self.make(MASK, resting.reshape(1, 1, -1), f"of the {before} at rest")
        if before != "tokens":
            self.make(TIME, source[TIME] + resting, f"with the {before} at rest, which adaLN saw")
        return names | places

    def resting(self, condition: str) -> Tensor:
        """The vector that stood for no condition in particular, (C,): the null label's, the mean caption's, the mask token."""
        if condition == "labels":
            return self.source[TABLE][-1].float()
        return self.source[BIAS if condition == "pooled" else MASK].float().flatten()


def condition_of(state: Mapping[str, Tensor]) -> str:
    return "labels" if TABLE in state else "tokens" if MASK in state else "pooled"


def transfer(origin: Saved, net: nn.Module, same_text: bool, null: Y) -> Report:
    """Load what `net` can have of the origin's EMA 1.  Raises: UserError where its blocks are other ones."""
    source = {name.removeprefix(checkpoint.PREFIX): value for name, value in origin.best.items()}
    source.pop("pos_embed", None)  # a fixed table; the network's own is of its own grid
    target = {name: value.cpu() for name, value in net.state_dict().items() if name != "pos_embed"}  # the net may be on a GPU; the origin lies in memory
    for name, value in target.items():
        if "blocks." in name and (name not in source or source[name].shape != value.shape):
            raise UserError(f"--init_from {origin.path} does not fit --model: {name} is not there or of another shape; wanted the same family and size")
    work = Transfer(source, target, same_text, null)
    net.load_state_dict(work(), strict=False)
    return work.report
