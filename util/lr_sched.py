"""The learning rate as a function of the epoch, set at every iteration."""

import math


def lr_at(epoch: float, peak: float, warmup_epochs: float, epochs: float, schedule: str = "constant", min_lr: float = 0.0) -> float:
    """Linear from 0 to `peak` over the warm-up, then constant, or a half cosine down to `min_lr` at the end.

    epoch: fractional, 0 at the first step of the run.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    if schedule == "constant":
        return peak
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    return min_lr + (peak - min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
