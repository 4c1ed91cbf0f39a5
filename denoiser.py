"""The diffusion method of JiT (arXiv:2511.13720): path, velocity, loss, guidance, solvers.

Notation as in the paper: x clean picture in [-1, 1], eps noise, t time (0 noise, 1 data), z_t the picture between, v = dz/dt.
The network is only a callable net(z_t, t, y) -> x_pred here. z, t, v and the solver's step stay float32; whoever builds `net`
may run it under bf16 autocast: v divides by 1 - t, and bf16's rounding of z or v would show as salt-and-pepper noise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from config import DiffusionConfig, SamplerConfig
from util.text import Embedded, Y, joined

Net = Callable[[Tensor, Tensor, Y | Embedded], Tensor]  # net(z_t, t, y) -> x_pred: z_t (B, 3, H, W), t (B,)
VelocityFn = Callable[[Tensor, float], Tensor]  # v_fn(z, t) -> dz/dt, like z; z: (B, 3, H, W) float32, one t for the batch
LossFn = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def noise_of(normal: Tensor, config: DiffusionConfig) -> Tensor:
    """eps, or the start of the solver, from standard normal numbers."""
    return config.noise_scale * normal


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t = t x + (1 - t) eps.  x, eps: (B, 3, H, W); t: (B,) in [0, 1]."""
    t = t.view(-1, 1, 1, 1)
    return t * x + (1 - t) * eps


def velocity(x: Tensor, z_t: Tensor, t: Tensor, t_eps: float = 0.05) -> Tensor:
    """v of the straight path through z_t that ends at x; t_eps bounds it near t = 1.  t: (B,)."""
    return (x - z_t) / (1 - t).clamp_min(t_eps).view(-1, 1, 1, 1)


def sample_time(normal: Tensor, config: DiffusionConfig) -> Tensor:
    """Logit-normal times in (0, 1) from standard normal numbers."""
    return torch.sigmoid(config.P_mean + config.P_std * normal)


def v_loss(x_pred: Tensor, x: Tensor, z_t: Tensor, t: Tensor, t_eps: float) -> Tensor:
    """Mean over pictures and pixels.

    Both velocities share the bound on 1 - t, so this is exactly the x-loss weighted by 1 / max(1 - t, t_eps)^2.
    """
    return (velocity(x, z_t, t, t_eps) - velocity(x_pred.float(), z_t, t, t_eps)).square().mean()


@dataclass(frozen=True)
class Objective:
    """x-prediction under the v-loss.  loss: v_loss, or that compiled."""

    config: DiffusionConfig
    loss: LossFn = v_loss

    def __call__(self, net: Net, x: Tensor, normal: Tensor, t: Tensor, y: Y) -> Tensor:
        """x: (B, 3, H, W) in [-1, 1]; normal: like x, standard normal; t: (B,); y: what `net` is conditioned on.  Returns: a number."""
        z_t = interpolate(x, noise_of(normal, self.config), t)
        return self.loss(net(z_t, t, y), x, z_t, t, self.config.t_eps)


def guided(net: Net, y: Y | Embedded, y_null: Y | Embedded, diffusion: DiffusionConfig, sampler: SamplerConfig) -> VelocityFn:
    """v_fn(z, t) of the network under condition y; t is one number for the whole batch.

    Classifier-free guidance acts where cfg_interval[0] < t < cfg_interval[1] (from t = 0 on if that begins at 0), both branches in one batch. Elsewhere, and at
    scale 1, there is no null branch.  Interval: arXiv:2404.07724; scale on v as in JiT.
    """
    low, high = torch.tensor(sampler.cfg_interval, dtype=torch.float32).tolist()  # as the published sampler compares: t is float32 there
    scale, both = sampler.cfg_scale, joined(y, y_null)

    def v_of(z: Tensor, t: float, y: Y | Embedded) -> Tensor:
        t_batch = torch.full((len(z),), t, dtype=torch.float32, device=z.device)
        return velocity(net(z, t_batch, y).float(), z, t_batch, diffusion.t_eps)

    def v_fn(z: Tensor, t: float) -> Tensor:
        if scale == 1 or not (t < high and (low < t or low == 0)):
            return v_of(z, t, y)
        v, null = v_of(torch.cat([z, z]), t, both).chunk(2)
        return null + scale * (v - null)

    return v_fn


# Solvers: solver(v_fn, z at times[0], times rising from 0 to 1) -> z at times[-1].


def euler(v_fn: VelocityFn, z: Tensor, times: Sequence[float]) -> Tensor:
    for t, t_next in pairwise(times):
        z = z + (t_next - t) * v_fn(z, t)
    return z


def heun(v_fn: VelocityFn, z: Tensor, times: Sequence[float]) -> Tensor:
    """The mean of the velocities at both ends; an Euler step where t_next is 1, since v is not defined there."""
    for t, t_next in pairwise(times):
        v = v_fn(z, t)
        if t_next < 1:
            v = (v + v_fn(z + (t_next - t) * v, t_next)) / 2
        z = z + (t_next - t) * v
    return z


def ab2(v_fn: VelocityFn, z: Tensor, times: Sequence[float]) -> Tensor:
    """Adams-Bashforth of second order: the velocity goes on as from the step before, which is kept. One call a step; the first step is Euler's."""
    before, step_before = None, math.inf
    for t, t_next in pairwise(times):
        v, step = v_fn(z, t), t_next - t
        z = z + step * (v if before is None else v + step / (2 * step_before) * (v - before))
        before, step_before = v, step
    return z


def dpmpp2m(v_fn: VelocityFn, z: Tensor, times: Sequence[float]) -> Tensor:
    """DPM-Solver++(2M), algorithm 2 of arXiv:2211.01095, for alpha = t and sigma = 1 - t: x_pred goes on in log(alpha / sigma) as from the step before.

    One call a step. The first two steps and the last are Euler's: log(alpha / sigma) is infinite at t = 0 and t = 1.
    """
    before, step_before = None, math.inf
    for t, t_next in pairwise(times):
        x, step = z + (1 - t) * v_fn(z, t), log_snr(t_next) - log_snr(t)
        aim = x if before is None or t_next == 1 else x + step / (2 * step_before) * (x - before)
        z = z + (t_next - t) / (1 - t) * (aim - z)
        before, step_before = x, step
    return z


def log_snr(t: float) -> float:
    return math.log(t / (1 - t)) if 0 < t < 1 else math.copysign(math.inf, t - 0.5)


def calls_of(sampler: SamplerConfig) -> int:
    """Evaluations of the network for a picture, a guided one counted once."""
    return 2 * sampler.steps - 1 if sampler.method == "heun" else sampler.steps


SOLVERS = {"heun": heun, "euler": euler, "ab2": ab2, "dpmpp2m": dpmpp2m}  # --sampling_method names them


def times_of(steps: int, shift: float) -> list[float]:
    """steps + 1 times that rise from 0 to 1; a shift s > 1 makes steps near the noise shorter: 1 - t -> s (1 - t) / (1 + (s - 1) (1 - t)), arXiv:2403.03206.

    Float32, so that guidance sets in at the same step as in the published sampler.
    """
    t = torch.linspace(0, 1, steps + 1)
    times = (t if shift == 1 else t / (shift - (shift - 1) * t)).tolist()[:-1]
    return list(dict.fromkeys([*times, 1.0]))  # the quotient at 1 is not always exactly 1; a tiny shift makes times near 1 the same


def solve(v_fn: VelocityFn, z: Tensor, method: str, times: Sequence[float]) -> Tensor:
    """Integrate dz/dt = v_fn(z, t) through `times`, which go from 0 to 1."""
    assert z.dtype == torch.float32, f"the solver's state must be float32, not {z.dtype}"
    return SOLVERS[method](v_fn, z, times)


@torch.no_grad()
def sample(net: Net, normal: Tensor, y: Y | Embedded, y_null: Y | Embedded, diffusion: DiffusionConfig, sampler: SamplerConfig) -> Tensor:
    """Draw pictures.  normal: (B, 3, H, W), standard normal; y, y_null: B rows.  Returns: (B, 3, H, W), about [-1, 1]."""
    v_fn = guided(net, y, y_null, diffusion, sampler)
    return solve(v_fn, noise_of(normal, diffusion), sampler.method, times_of(sampler.steps, sampler.time_shift))
