"""Exponential moving averages of a network's trainable weights, matched by name."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from config import Averages
from util.checkpoint import load_into, state_of


class Ema:
    """Float32 averages of the trainable parameters: average <- d average + (1 - d) parameter after every optimizer step.

    With `warmup`, d = min(decay, (1 + n) / (10 + n)) at update n: without it 30 % of the initial weights are still in an
    average of decay 0.9999 after 12,000 steps. With `kept` false it holds no tensors, but the decay of the average that a network was loaded from.
    """

    def __init__(self, net: nn.Module, decay: float, warmup: bool = True, kept: bool = True):
        self.decay, self.warmup = decay, warmup
        self.average = {name: param.detach().float().clone() for name, param in net.named_parameters() if param.requires_grad and kept}

    def decay_at(self, n: int) -> float:
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay

    def initial_share(self, steps: int) -> float:
        """What is left of the initial weights in the average after that many updates."""
        share = 1.0
        for n in range(steps):
            share *= self.decay_at(n)
            if share < 1e-4:
                return 0.0
        return share

    @torch.no_grad()
    def update(self, trained: Sequence[Tensor], n: int) -> None:
        """trained: the network's trainable parameters, in its order; n: optimizer steps done before this one."""
        torch._foreach_lerp_(list(self.average.values()), trained, 1 - self.decay_at(n))

    def state_dict(self, net: nn.Module) -> dict[str, Tensor]:
        """The network's state, as checkpoint.state_of it, with the averages in place of the parameters."""
        return {**state_of(net), **self.average}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        load_into(self.average, state)

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """Inside, the network computes with the averages; afterwards with its own weights, bit for bit."""
        params = dict(net.named_parameters())

        def swap() -> None:
            for name, value in self.average.items():
                params[name].data, self.average[name] = value, params[name].data

        swap()
        try:
            yield
        finally:
            swap()


def averages_of(net: nn.Module, config: Averages, kept: bool = True) -> list[Ema]:
    return [Ema(net, decay, config.warmup, kept) for decay in (config.decay1, config.decay2)]
