"""The two small experiments of arXiv:2511.13720 in figures: why a network should predict the clean picture.  `python -m benchmarks.science [--full]` (make science).

toy       a spiral in 2 of D dimensions, an MLP that predicts x, eps or v, all under the v-loss: how far what it draws is from the spiral
pictures  {x, eps, v} predictions under {x, eps, v} losses on coloured digits, in patches of 4, 8, 16 and 32: do the drawn pictures show what was asked for?
noise     x-prediction under other laws of t and scales of the noise
Path, losses, solver, averages, optimizer and learning rate are the project's own. What is done already is kept below --out, a network a line in found.jsonl, and the same
command goes on; at the end it prints the tables and draws toy.png and pictures.png.  The short form: D of 2, 16, 512 and the row of the v-loss at patches of 4 and 32, one seed.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import engine_jit as engine
from benchmarks.predictions import LOSSES, PREDICTIONS, Mlp, Predicting
from config import Averages, DiffusionConfig, SamplerConfig
from datasets.demo import COLOURS, colour_ink, load_ink
from datasets.transforms import to_image, to_levels, to_model_range, to_uint8
from demo.judge import DigitJudge
from demo.scene_judge import rate
from denoiser import Objective, sample, sample_time
from models_jit import JiT
from resume import TrainState
from util import checkpoint, parallel
from util.distributed import device_of
from util.ema import averages_of
from util.errors import told_in_one_line
from util.files import write_whole
from util.logging import progress_bar, say
from util.lr_sched import lr_at
from util.metrics import Moments, frechet_distance
from util.skips import Skips

SIZE = 32
DIMENSIONS, PATCHES = (2, 8, 16, 64, 512), (4, 8, 16, 32)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TUNING_SEED = 99  # and a third of the steps
SPIRAL_TURNS, SPIRAL_RADIUS, THICKNESS = 2, 2.0, 0.02
PAIRS = [(colour, digit) for digit in range(10) for colour in COLOURS]  # the classes


@dataclass(frozen=True)
class Experiment:
    """A network that is trained, drawn with and measured.  D is `dims` of the toy, or a patch's side."""

    kind: str  # "toy" or "pictures"
    predicts: str
    dims: int
    loss: str = "v"
    seed: int = 0
    lr: float = 1e-3
    steps: int = 4000
    batch: int = 256
    drawn: int = 20_000
    P_mean: float = -0.8  # of t; the toy's t is uniform
    noise: float = 1.0

    @property
    def name(self) -> str:
        return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in asdict(self).values())


def drawn_by(one: Experiment, out: Path) -> Path:
    """Some of the points or pictures that it drew."""
    return out / "drawn" / f"{one.name}.{'npy' if one.kind == 'toy' else 'png'}"


def toy(predicts: str, dims: int, **more) -> Experiment:
    return Experiment("toy", predicts, dims, **{"steps": 10_000, **more})


def pictures(predicts: str, patch: int, **more) -> Experiment:
    return Experiment("pictures", predicts, patch, **{"steps": 1200, "batch": 32, "drawn": 400, **more})


def tuned(one: Experiment, found: dict[Experiment, dict]) -> Experiment:
    """At the rate that was best in a third of the steps."""
    return replace(one, lr=min(RATES, key=lambda lr: found[trial(one, lr)]["distance"]))


def trial(one: Experiment, lr: float) -> Experiment:
    return replace(one, lr=lr, seed=TUNING_SEED, steps=one.steps // 3, drawn=one.drawn // 2)


def short_form() -> list[Experiment]:
    """The dearest first; few steps, at rates that serve x-prediction well."""
    return [
        *(pictures(predicts, 4, steps=350, batch=64, drawn=300, lr=3e-3) for predicts in PREDICTIONS),
        *(pictures(predicts, 32, steps=600, batch=64, drawn=300) for predicts in PREDICTIONS),
        *(toy(predicts, dims, steps=3000) for dims in (512, 16, 2) for predicts in PREDICTIONS),
    ]


def full_form() -> list[Experiment]:
    """Each at a rate to be tuned; seed 0."""
    return [
        *(toy(predicts, dims) for dims in DIMENSIONS for predicts in PREDICTIONS),
        *(pictures(predicts, patch, loss=loss) for patch in PATCHES for loss in LOSSES for predicts in PREDICTIONS),
    ]


def noise_form(found: dict[Experiment, dict]) -> list[Experiment]:
    base = tuned(pictures("x", 8), found)
    return [*(replace(base, P_mean=m) for m in (0.0, -0.4, -0.8, -1.2)), *(replace(base, noise=scale) for scale in (0.5, 2.0))]


def seeded_form(wanted: Sequence[Experiment], found: dict[Experiment, dict]) -> list[Experiment]:
    """All that the tables are made of, when the trials of what is wanted of full_form are found."""
    tuned_form = [tuned(one, found) for one in wanted]
    if pictures("x", 8) in wanted:
        tuned_form += noise_form(found)
    return [replace(one, seed=seed) for one in dict.fromkeys(tuned_form) for seed in range(5 if one.kind == "toy" else 3)]


# --- training and drawing, which all share


def train(net: nn.Module, one: Experiment, batch_of: Callable[[torch.Generator], tuple[Tensor, Tensor, Tensor]], hasten: bool = False) -> TrainState:
    """On the device of the network's weights.  batch_of: generator -> x, t, y, which a processor draws, so that every device sees the same."""
    generator, device = torch.Generator().manual_seed(one.seed), next(net.parameters()).device
    config = DiffusionConfig(P_mean=one.P_mean, noise_scale=one.noise)
    if hasten:
        x, t, y = batch_of(torch.Generator())
        net = hastened(net, x.to(device), t.to(device), y.to(device))
    net = Predicting(net, one.predicts, config.t_eps)
    state = TrainState(net=net, optimizer=engine.make_optimizer(net, 0.0, device), emas=averages_of(net, Averages(decay1=0.999, decay2=0.999)))
    objective, skips = Objective(config, LOSSES[one.loss]), Skips(device)
    for step in range(one.steps):
        for group in state.optimizer.param_groups:
            group["lr"] = lr_at(step, one.lr, one.steps / 20, one.steps, "cosine")
        x, t, y = batch_of(generator)
        noise = torch.randn(x.shape, generator=generator)
        objective(net, x.to(device), noise.to(device), t.to(device), y.to(device)).backward()
        engine.take_step(state, 1.0, skips)
    return state


def hastened(net: nn.Module, *inputs: Tensor) -> nn.Module:
    """On a GPU one CUDA graph; on a CPU compiled: a quarter of the time less, and half a minute once a process and patch size."""
    if inputs[0].is_cuda:
        return torch.cuda.make_graphed_callables(net, inputs)
    parallel.compile_blocks(net, dynamic=False)
    return net


def draw(state: TrainState, one: Experiment, shape: Sequence[int], y: Tensor, part: int) -> Tensor:
    """Pictures or points under y, `part` at a time, by Heun without guidance.  Returns: on the CPU."""
    device = next(state.net.parameters()).device
    normal = torch.randn((len(y), *shape), generator=torch.Generator().manual_seed(one.seed + 1))
    config, sampler = DiffusionConfig(P_mean=one.P_mean, noise_scale=one.noise), SamplerConfig(steps=25 if one.kind == "toy" else 20)
    with state.drawing("1"):
        parts = zip(normal.to(device).split(part), y.to(device).split(part))
        return torch.cat([sample(state.net.eval(), noise, rows, rows, config, sampler) for noise, rows in parts]).cpu()


# --- the toy


def spiral(count: int, generator: torch.Generator) -> Tensor:
    """(count, 2) points, about as many for each length of the curve; each coordinate's standard deviation is about 1."""
    along = torch.rand(count, generator=generator).sqrt()
    angle = 2 * torch.pi * SPIRAL_TURNS * along
    return SPIRAL_RADIUS * along[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) + THICKNESS * torch.randn(count, 2, generator=generator)


def plane(dims: int) -> Tensor:
    """(dims, 2) with orthonormal columns: where the spiral lies."""
    return torch.linalg.qr(torch.randn(dims, 2, generator=torch.Generator().manual_seed(dims))).Q


def sliced_distance(a: Tensor, b: Tensor, directions: int = 128) -> float:
    """Sliced Wasserstein-2 distance of as many points: sqrt of the mean over directions of the mean squared difference of sorted projections."""
    angles = torch.arange(directions) * torch.pi / directions
    rays = torch.stack([angles.cos(), angles.sin()])
    return float(((a @ rays).sort(dim=0).values - (b @ rays).sort(dim=0).values).square().mean().sqrt())


def run_toy(one: Experiment, out: Path, device: str = "cpu") -> dict:
    place = plane(one.dims)

    def batch_of(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        x = spiral(one.batch, generator) @ place.T
        return x[:, :, None, None], torch.rand(len(x), generator=generator), torch.zeros(len(x))

    torch.manual_seed(one.seed)
    state = train(Mlp(one.dims).to(device), one, batch_of)
    points = draw(state, one, (one.dims, 1, 1), torch.zeros(one.drawn), 4000).flatten(1)
    fresh = [spiral(one.drawn, torch.Generator().manual_seed(1000 + 2 * one.seed + i)) for i in range(2)]
    inside = points @ place
    np.save(drawn_by(one, out), inside[:2000].numpy())
    beside = (points - inside @ place.T).square().sum(1).mean().sqrt()
    return {"distance": sliced_distance(inside, fresh[0]), "beside": float(beside), "floor": sliced_distance(fresh[1], fresh[0])}


# --- pictures


@cache
def digits() -> tuple[Tensor, Tensor]:
    """(14376, 3, 32, 32) uint8 and the number of each one's pair."""
    inks, names = load_ink(SIZE)
    drawn = torch.stack([to_uint8(colour_ink(ink, colour)) for ink in inks for colour in COLOURS])
    return drawn, torch.tensor([PAIRS.index((colour, name)) for name in names for colour in COLOURS])


class Classifier(nn.Module):
    """Which pair a picture shows; what stands before the last layer are the features of the Frechet distance."""

    def __init__(self):
        super().__init__()
        widths = (3, 32, 64, 64)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.head = nn.Linear(64, len(PAIRS))

    def features(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = F.gelu(convolution(x))
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train_classifier(path: Path, steps: int) -> None:
    """Once; into a file."""
    torch.manual_seed(0)
    net, (drawn, pairs) = Classifier(), digits()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(drawn), (128,))
        F.cross_entropy(net(to_model_range(drawn[chosen])), pairs[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    write_whole(path, lambda file: torch.save(net.state_dict(), file))


class Eyes:
    """What judges pictures: the demo's judge, and the distance from the real digits in a classifier's features."""

    def __init__(self, path: Path):
        self.net, self.judge = Classifier(), DigitJudge(SIZE)
        self.net.load_state_dict(torch.load(path, weights_only=True))
        self.hash = checkpoint.digest(self.net.state_dict())[:12]
        self.real = self.features(digits()[0])

    @torch.no_grad()
    def features(self, drawn: Tensor) -> Tensor:
        return torch.cat([self.net.features(to_model_range(part)) for part in drawn.split(512)])

    def distance(self, a: Tensor, b: Tensor) -> float:
        found = []
        for rows in (a, b):
            moments = Moments()
            moments.add(rows)
            found.append(moments.statistics()[0])
        return frechet_distance(*found)

    def floor(self, count: int) -> float:
        """So many real ones against the others."""
        order = torch.randperm(len(self.real), generator=torch.Generator().manual_seed(0))
        return self.distance(self.real[order[:count]], self.real[order[count:]])


@cache
def eyes(path: Path) -> Eyes:
    return Eyes(path)


def run_pictures(one: Experiment, out: Path, device: str = "cpu", hasten: bool = False) -> dict:
    seen, (drawn, pairs) = eyes(out / "classifier.pt"), digits()

    def batch_of(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.randint(len(drawn), (one.batch,), generator=generator)
        t = sample_time(torch.randn(one.batch, generator=generator), DiffusionConfig(P_mean=one.P_mean))
        return to_model_range(drawn[chosen]), t, pairs[chosen]

    torch.manual_seed(one.seed)
    shape = {"hidden_size": 128, "depth": 4, "num_heads": 4, "bottleneck_dim": 128, "in_context_len": 8, "in_context_start": 1}
    net = JiT(SIZE, one.dims, num_classes=len(PAIRS), **shape).to(device)
    state = train(net, one, batch_of, hasten)
    asked = torch.arange(one.drawn) % len(PAIRS)
    made = draw(state, one, (3, SIZE, SIZE), asked, 50)
    levels = to_levels(made.nan_to_num(0.0))
    to_image(torch.cat([*levels[:24]], dim=2)).save(drawn_by(one, out))
    right = [found == PAIRS[pair] for found, pair in zip(seen.judge([to_image(picture) for picture in levels]), asked.tolist())]
    return {
        "right": sum(right),
        "of": len(right),
        "distance": seen.distance(seen.features(levels), seen.real),
        "floor": seen.floor(one.drawn),
        "eyes": seen.hash,
    }


# --- all of them


def run_one(one: Experiment, out: Path, device: str = "cpu", hasten: bool = False) -> dict:
    return run_toy(one, out, device) if one.kind == "toy" else run_pictures(one, out, device, hasten)


class Found(dict[Experiment, dict]):
    """What networks are measured to do, in a file of a line each, so that a run goes on and figures can be checked."""

    def __init__(self, path: Path):
        self.path = path
        for line in path.read_text().split("\n")[:-1] if path.exists() else ():  # the last may be half of one
            said = json.loads(line)
            self[Experiment(**said["experiment"])] = said["found"]

    def keep(self, one: Experiment, found: dict) -> None:
        self[one] = found
        with open(self.path, "a") as file:
            file.write(json.dumps({"experiment": asdict(one), "found": found}) + "\n")

    def of(self, experiments: Iterable[Experiment]) -> dict[Experiment, dict]:
        return {one: self[one] for one in experiments}


def run_all(experiments: Sequence[Experiment], found: Found, out: Path, jobs: int, device: str = "cpu", hasten: bool = False) -> None:
    """Those that are not found yet, into found."""
    left = [one for one in dict.fromkeys(experiments) if one not in found]
    if not left:
        return
    bar = progress_bar(len(left), "networks", unit="network")
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = {pool.submit(run_one, one, out, device, hasten): one for one in left}
        for done in as_completed(waiting):
            one, result = waiting[done], done.result()
            found.keep(one, result)
            say(f"{one.name}: {', '.join(f'{name} {result[name]:.4g}' for name in ('distance', 'right', 'of') if name in result)}")
            bar.update()
    bar.close()


def run(out: Path, full: bool, jobs: int, device: str, only: str | None) -> dict[Experiment, dict]:
    """Returns: what belongs to the form."""

    def of_kind(experiments: Iterable[Experiment]) -> list[Experiment]:
        return [one for one in experiments if only in (None, one.kind)]

    (out / "drawn").mkdir(parents=True, exist_ok=True)
    if not (out / "classifier.pt").exists():
        train_classifier(out / "classifier.pt", 1500)
    found = Found(out / "found.jsonl")
    if full:
        hasten, wanted = device == "cuda" or not parallel.compiler_lacks(torch.device(device)), of_kind(full_form())
        run_all([trial(one, lr) for one in wanted for lr in RATES], found, out, jobs, device, hasten)
        experiments = seeded_form(wanted, found)
    else:
        hasten, experiments = False, of_kind(short_form())
    run_all(experiments, found, out, jobs, device, hasten)
    return found.of(experiments)


# --- what is told


def setting(one: Experiment) -> Experiment:
    """What seeds share, whatever its rate and length."""
    return replace(one, seed=0, lr=0.0, steps=0, batch=0, drawn=0)


def groups(found: dict[Experiment, dict]) -> dict[Experiment, list[dict]]:
    """The seeds of each setting."""
    gathered: dict[Experiment, list[dict]] = {}
    for one, result in sorted(found.items(), key=lambda item: item[0].seed):
        gathered.setdefault(setting(one), []).append(result)
    return gathered


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Mean, and the range where there are several."""
    return figure(mean(values)) + (f" ({figure(min(values))}-{figure(max(values))})" if len(values) > 1 else "")


def share(results: Sequence[dict]) -> str:
    """In per cent, of all seeds' pictures, with the exact interval of 95 %."""
    right, low, high = rate(sum(result["right"] for result in results), sum(result["of"] for result in results))
    return f"{100 * right:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def toy_table(gathered: dict[Experiment, list[dict]]) -> Iterator[str]:
    yield "| D | floor | " + " | ".join(f"{predicts}-prediction" for predicts in PREDICTIONS) + " | off the plane: " + ", ".join(PREDICTIONS) + " |"
    yield "|---|---|---|---|---|---|"
    for dims in DIMENSIONS:
        results = [gathered.get(setting(toy(predicts, dims))) for predicts in PREDICTIONS]
        if all(results):
            cells = [spread([result["distance"] for result in of]) for of in results]
            beside = ", ".join(figure(mean(result["beside"] for result in of)) for of in results)
            yield f"| {dims} | {spread([result['floor'] for result in results[0]])} | {' | '.join(cells)} | {beside} |"


def pictures_table(gathered: dict[Experiment, list[dict]]) -> Iterator[str]:
    yield (
        "| patch, its dimensions | loss | "
        + " | ".join(f"{predicts}: right, %" for predicts in PREDICTIONS)
        + " | "
        + " | ".join(f"{p}: distance" for p in PREDICTIONS)
        + " |"
    )
    yield f"|{'---|' * 8}"
    for patch in PATCHES:
        for loss in LOSSES:
            results = [gathered.get(setting(pictures(predicts, patch, loss=loss))) for predicts in PREDICTIONS]
            if all(results):
                cells = [*map(share, results), *(spread([result["distance"] for result in of]) for of in results)]
                yield f"| {patch}, {3 * patch**2:,} | {loss} | {' | '.join(cells)} |"


def noise_table(gathered: dict[Experiment, list[dict]]) -> Iterator[str]:
    yield "| P_mean | noise scale | right, % | distance |"
    yield "|---|---|---|---|"
    for one, results in gathered.items():
        if one.kind == "pictures" and (one.predicts, one.loss, one.dims) == ("x", "v", 8):
            yield f"| {one.P_mean:g} | {one.noise:g} | {share(results)} | {spread([result['distance'] for result in results])} |"


def draw_toy(found: dict[Experiment, dict], out: Path) -> None:
    """The first seed's points, a row of each prediction, into toy.png."""
    from matplotlib import pyplot

    shown = {(one.predicts, one.dims): one for one in found if one.kind == "toy" and one.seed == 0 and drawn_by(one, out).exists()}
    dimensions = [dims for dims in DIMENSIONS if all((predicts, dims) in shown for predicts in PREDICTIONS)]
    if not dimensions:
        return
    sheet, axes = pyplot.subplots(len(PREDICTIONS), len(dimensions), figsize=(2.2 * len(dimensions), 6.6), layout="constrained", squeeze=False)
    for row, predicts in zip(axes, PREDICTIONS):
        for place, dims in zip(row, dimensions):
            one = shown[predicts, dims]
            place.scatter(*np.load(drawn_by(one, out)).T, s=1)
            place.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal", title=f"{predicts}, D = {dims}: {found[one]['distance']:.2g}")
    sheet.savefig(out / "toy.png", dpi=110)


def draw_pictures(found: dict[Experiment, dict], out: Path) -> None:
    """What the first seed drew under the v-loss, a block of each patch size with a row of each prediction, into pictures.png."""
    from matplotlib import pyplot

    shown = {
        (one.dims, one.predicts): one
        for one in found
        if one.kind == "pictures" and one.seed == 0 and (one.loss, one.P_mean, one.noise) == ("v", -0.8, 1.0) and drawn_by(one, out).exists()
    }
    patches = [patch for patch in PATCHES if all((patch, predicts) in shown for predicts in PREDICTIONS)]
    if not patches:
        return
    sheet, axes = pyplot.subplots(len(patches) * len(PREDICTIONS), 1, figsize=(10, 0.6 * len(patches) * len(PREDICTIONS)), layout="constrained")
    for place, (patch, predicts) in zip(axes, ((patch, predicts) for patch in patches for predicts in PREDICTIONS)):
        place.imshow(pyplot.imread(drawn_by(shown[patch, predicts], out)))
        place.set(xticks=[], yticks=[])
        place.set_ylabel(f"{predicts}, {patch}", rotation=0, ha="right", va="center")
    sheet.savefig(out / "pictures.png", dpi=110)


def tell(found: dict[Experiment, dict], out: Path) -> None:
    gathered = groups(found)
    floor = max((result["floor"] for one, results in gathered.items() if one.kind == "pictures" for result in results), default=0.0)
    for title, lines in (
        ("The toy under the v-loss: sliced Wasserstein-2 distance of what is drawn from the spiral; floor: of the spiral from itself", toy_table(gathered)),
        (f"Pictures: colour and digit right, and Frechet distance from the real ones (of real from real: {figure(floor)})", pictures_table(gathered)),
        ("The noise level, x-prediction under the v-loss, patches of 8", noise_table(gathered)),
    ):
        if len(table := list(lines)) > 2:
            print(f"\n{title}\n", *table, sep="\n")
    draw_toy(found, out)
    draw_pictures(found, out)
    print(f"\n{out / 'toy.png'}, {out / 'pictures.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/science"))
    parser.add_argument("--full", action="store_true", help="all of it, an estimated six hours on two cores")
    parser.add_argument("--only", choices=("toy", "pictures"), default=None, help="one of the two; the noise level belongs to the pictures")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, each on one core")
    args = parser.parse_args()
    with told_in_one_line():
        device_of(args.device)
    tell(run(args.out, args.full, args.jobs, args.device, args.only), args.out)


if __name__ == "__main__":
    main()
