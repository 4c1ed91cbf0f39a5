"""The diffusion method of JiT (arXiv:2511.13720): path, velocity, loss, guidance, solvers.

Notation as in the paper: x clean picture in [-1, 1], eps noise, t time (0 noise, 1 data), z_t the picture between, v = dz/dt.
The network is only a callable net(z_t, t, y) -> x_pred here. z, t, v and the solver's step stay float32; whoever builds `net`
may run it under bf16 autocast: v divides by 1 - t, and bf16's rounding of z or v would show as salt-and-pepper noise.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from config import DiffusionConfig, SamplerConfig
from util.text import Y

Net = Callable[[Tensor, Tensor, Y], Tensor]
VelocityFn = Callable[[Tensor, float], Tensor]


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


def denoising_loss(net: Net, x: Tensor, normal: Tensor, t: Tensor, y: Y, config: DiffusionConfig) -> Tensor:
    """x-prediction under the v-loss, mean over pictures and pixels.

    Both velocities share the bound on 1 - t, so this is exactly the x-loss weighted by 1 / max(1 - t, t_eps)^2.
    Args: x: (B, 3, H, W) in [-1, 1]; normal: like x, standard normal; t: (B,); y: what `net` is conditioned on.
    """
    z_t = interpolate(x, noise_of(normal, config), t)
    x_pred = net(z_t, t, y).float()
    return (velocity(x, z_t, t, config.t_eps) - velocity(x_pred, z_t, t, config.t_eps)).square().mean()


def net_velocity(net: Net, y: Y, t_eps: float = 0.05) -> VelocityFn:
    """v_fn(z, t) of the network under condition y; t is one number for the whole batch."""

    def v_fn(z: Tensor, t: float) -> Tensor:
        t_batch = torch.full((len(z),), t, dtype=torch.float32, device=z.device)
        return velocity(net(z, t_batch, y).float(), z, t_batch, t_eps)

    return v_fn


def guided(v_cond: VelocityFn, v_null: VelocityFn, scale: float, interval: tuple[float, float]) -> VelocityFn:
    """Classifier-free guidance where interval[0] < t < interval[1] (from t = 0 on if interval[0] is 0).

    Elsewhere, and at scale 1, the null branch is not computed.  Interval: arXiv:2404.07724; scale on v as in JiT.
    """
    low, high = torch.tensor(interval, dtype=torch.float32).tolist()  # as the published sampler compares: t is float32 there

    def v_fn(z: Tensor, t: float) -> Tensor:
        v = v_cond(z, t)
        if scale == 1 or not (t < high and (low < t or low == 0)):
            return v
        null = v_null(z, t)
        return null + scale * (v - null)

    return v_fn


def euler(v_fn: VelocityFn, z: Tensor, t: float, t_next: float) -> Tensor:
    return z + (t_next - t) * v_fn(z, t)


def heun(v_fn: VelocityFn, z: Tensor, t: float, t_next: float) -> Tensor:
    """The mean of the velocities at both ends; an Euler step where t_next is 1, since v is not defined there."""
    v = v_fn(z, t)
    if t_next < 1:
        v = (v + v_fn(z + (t_next - t) * v, t_next)) / 2
    return z + (t_next - t) * v


SOLVERS = {"heun": heun, "euler": euler}  # one step of each; --sampling_method names them


def solve(v_fn: VelocityFn, z: Tensor, method: str, steps: int) -> Tensor:
    """Integrate dz/dt = v_fn(z, t) over `steps` uniform steps from t = 0 to 1.

    The times are float32, so that guidance sets in at the same step as in the published sampler.
    """
    assert z.dtype == torch.float32, f"the solver's state must be float32, not {z.dtype}"
    for t, t_next in pairwise(torch.linspace(0, 1, steps + 1).tolist()):
        z = SOLVERS[method](v_fn, z, t, t_next)
    return z


@torch.no_grad()
def sample(net: Net, normal: Tensor, y: Y, y_null: Y, diffusion: DiffusionConfig, sampler: SamplerConfig) -> Tensor:
    """Draw pictures.  normal: (B, 3, H, W), standard normal; y, y_null: (B, ...).  Returns: (B, 3, H, W), about [-1, 1]."""
    v_fn = guided(
        net_velocity(net, y, diffusion.t_eps),
        net_velocity(net, y_null, diffusion.t_eps),
        sampler.cfg_scale,
        sampler.cfg_interval,
    )
    return solve(v_fn, noise_of(normal, diffusion), sampler.method, sampler.steps)
