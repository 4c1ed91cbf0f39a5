"""What drawing with guidance costs: `python -m benchmarks.sample [--device cuda] --steps 25 --cfg 2.9 MODEL:PIXELS:BATCH ...`.

`baseline` is as published: Heun, both branches one after the other, the condition embedded at every call, attention in float32, a wait at every step. Ours: both
branches in one batch, the condition embedded once, fused attention; compiled; and ab2, which calls the network once a step where Heun does twice. Every call is guided.
The ceiling is a large matrix product of the same rounds. What solvers make of so many steps is benchmarks/solvers.py's.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed import BASELINE, Case, Setting, arguments, measure, published_attention, synchronize
from conditioning import expand_null
from config import DiffusionConfig, SamplerConfig
from denoiser import calls_of, heun, sample, times_of, velocity
from util.parallel import for_drawing, in_precision, twin
from util.text import Y, joined

CPU = torch.device("cpu")


class Inputs:
    """A network, noise and conditions, on the device."""

    def __init__(self, case: Case, device: torch.device):
        torch.manual_seed(0)
        with torch.device(device):
            self.net = case.build()
        self.noise = torch.randn(case.batch, 3, case.pixels, case.pixels, device=device)
        self.y, self.null = case.conditions(device)


def draw(inputs: Inputs, call: Callable, embed: Callable[[Y], Y], sampler: SamplerConfig) -> Tensor:
    """As Painter.paint."""
    with torch.no_grad():
        y, null = embed(inputs.y), embed(inputs.null)
        return sample(call, inputs.noise, y, expand_null(null, len(y)), DiffusionConfig(), sampler)


@torch.no_grad()
def draw_as_published(inputs: Inputs, call: Callable, sampler: SamplerConfig, device: torch.device) -> Tensor:
    null, z = expand_null(inputs.null, len(inputs.y)), inputs.noise

    def v_fn(z: Tensor, t: float) -> Tensor:
        t_batch = torch.full((len(z),), t, device=z.device)
        v, v_null = (velocity(call(z, t_batch, y).float(), z, t_batch) for y in (inputs.y, null))
        return v_null + sampler.cfg_scale * (v - v_null)

    with published_attention():
        for step in pairwise(times_of(sampler.steps, 1.0)):
            z = heun(v_fn, z, step)
            synchronize(device)
    return z


def flops_of(case: Case, calls: int) -> int:
    """Of one drawing, whose tensors hold nothing: the embedding of both conditions, and so many calls with both branches."""
    with FakeTensorMode(), published_attention(), torch.no_grad():
        inputs = Inputs(case, CPU)
        with FlopCounterMode(display=False) as counter:
            y, null = inputs.net.embed(inputs.y), inputs.net.embed(inputs.null)
        embedding = counter.get_total_flops()
        with counter:
            inputs.net(torch.cat([inputs.noise] * 2), torch.zeros(2 * case.batch), joined(y, expand_null(null, len(y))))
    return embedding + calls * counter.get_total_flops()


def settings_of(case: Case, device: torch.device, bf16: bool, steps: int, cfg: float) -> Iterator[Setting]:
    inputs = Inputs(case, device)
    held = sum(param.nbytes for param in inputs.net.parameters())
    samplers = {method: SamplerConfig(method, steps, cfg, (0.0, 1.0)) for method in ("heun", "ab2")}
    flops = {method: flops_of(case, calls_of(sampler)) for method, sampler in samplers.items()}
    published = in_precision(twin(inputs.net).eval(), device, bf16)
    yield Setting(BASELINE, partial(draw_as_published, inputs, published, samplers["heun"], device), flops["heun"], calls_of(samplers["heun"]), held)
    for compile in (False, True):
        call, embed = for_drawing(inputs.net, device, bf16, compile)
        for method, sampler in samplers.items():
            name = f"{method}, {'compiled' if compile else 'eager'}"
            yield Setting(name, partial(draw, inputs, call, embed, sampler), flops[method], calls_of(sampler), held)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cfg", type=float, default=2.9)
    args = parser.parse_args()
    measure(args, partial(settings_of, steps=args.steps, cfg=args.cfg), "guided call")


if __name__ == "__main__":
    main()
