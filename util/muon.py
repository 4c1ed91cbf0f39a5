"""Muon for the matrices inside the blocks, and AdamW for all the rest, as one optimizer."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor

MOMENTUM = 0.95
COEFFICIENTS = [  # of Newton-Schulz, a step each: modded-nanogpt's, which timm takes too (after leloykun.github.io/ponder/muon-opt-coeffs)
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


class Muon(torch.optim.Optimizer):
    """W <- W - lr 0.2 sqrt(max(m, n)) U V^T, where U S V^T is Nesterov's momentum of W's gradient (arXiv:2502.16982: as long as AdamW's steps, so with its rates).

    Args: matrices: (m, n) each; those of one shape are orthogonalised in one batch. adamw: has all other parameters.
    Nothing changes in a step where `found_inf` is 1, which is looked at on the device alone, as a fused AdamW does.
    """

    def __init__(self, matrices: Iterable[Tensor], weight_decay: float, adamw: torch.optim.AdamW):
        self.adamw = adamw
        super().__init__([{"params": list(matrices), "weight_decay": weight_decay}, *adamw.param_groups], {"lr": 1e-3})
        adamw.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[1:]

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        group, found_inf = self.param_groups[0], getattr(self, "found_inf", None)
        by_shape = defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape[matrix.shape].append(matrix)
        skip = torch.zeros((), device=group["params"][0].device) if found_inf is None else found_inf
        for matrices in by_shape.values():
            self.update(matrices, group["lr"], group["weight_decay"], skip)
        self.adamw.found_inf = found_inf
        self.adamw.step()

    def update(self, matrices: list[Tensor], lr: float, weight_decay: float, skip: Tensor) -> None:
        """Muon's step for matrices of one shape.  skip: (), 1 leaves them as they are."""
        for matrix in matrices:
            if "momentum_buffer" not in self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        grad = torch.where(skip > 0, 0, torch.stack([matrix.grad for matrix in matrices]))
        momentum = torch.stack(buffers).lerp_(grad, (1 - MOMENTUM) * (1 - skip))
        torch._foreach_copy_(buffers, list(momentum))
        dtype = torch.bfloat16 if grad.is_cuda else torch.float32  # a CPU without bf16 instructions takes twenty times as long in bf16
        direction = zeropower_via_newtonschulz(grad.lerp(momentum, MOMENTUM), len(COEFFICIENTS), COEFFICIENTS, dtype=dtype).to(grad.dtype)
        torch._foreach_mul_(matrices, 1 - lr * weight_decay * (1 - skip))
        torch._foreach_sub_(matrices, list(direction * (lr * 0.2 * max(grad.shape[1:]) ** 0.5 * (1 - skip))))
