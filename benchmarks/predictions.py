"""What a network may predict, and in which space its error may be counted: the nine combinations of arXiv:2511.13720, table 1.

The project predicts x and counts the error in v. Here whatever a network's output stands for is turned into x_pred, so path, losses and solvers stay those of denoiser.py.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from denoiser import LossFn, v_loss, velocity
from util.text import Y


def x_of(predicts: str, output: Tensor, z_t: Tensor, t: Tensor, t_eps: float) -> Tensor:
    """x_pred of an output that stands for x, eps or v, by z_t = t x + (1 - t) eps; t_eps bounds t where it divides.  t: (B,)."""
    t = t.view(-1, 1, 1, 1)
    match predicts:
        case "x":
            return output
        case "eps":
            return (z_t - (1 - t) * output) / t.clamp_min(t_eps)
        case "v":
            return z_t + (1 - t) * output
    raise ValueError(predicts)


class Predicting(nn.Module):
    """net's output read as x, eps or v: (z_t, t, y) -> x_pred."""

    def __init__(self, net: nn.Module, predicts: str, t_eps: float):
        super().__init__()
        self.net, self.predicts, self.t_eps = net, predicts, t_eps

    def forward(self, z_t: Tensor, t: Tensor, y: Y) -> Tensor:
        return x_of(self.predicts, self.net(z_t, t, y), z_t, t, self.t_eps)


def x_loss(x_pred: Tensor, x: Tensor, z_t: Tensor, t: Tensor, t_eps: float) -> Tensor:
    return (x - x_pred).square().mean()


def eps_loss(x_pred: Tensor, x: Tensor, z_t: Tensor, t: Tensor, t_eps: float) -> Tensor:
    """eps = (z_t - t x) / (1 - t), so an error of v is one of eps times t."""
    error = velocity(x, z_t, t, t_eps) - velocity(x_pred, z_t, t, t_eps)
    return (t.view(-1, 1, 1, 1) * error).square().mean()


PREDICTIONS = ("x", "eps", "v")
LOSSES: dict[str, LossFn] = {"x": x_loss, "eps": eps_loss, "v": v_loss}


class Mlp(nn.Module):
    """Five linear layers with ReLU between them, on z_t and t: the paper's toy.  z_t: (B, D, 1, 1)."""

    def __init__(self, dims: int, width: int = 256):
        super().__init__()
        widths = [dims + 1, *[width] * 4, dims]
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, z_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.layers(torch.cat([z_t.flatten(1), t[:, None]], dim=1)).view_as(z_t)
