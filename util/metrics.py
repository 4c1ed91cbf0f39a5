"""FID and IS with torch-fidelity's Inception and formulas, from uint8 pictures in memory.

An extractor is a function: uint8 (B, 3, H, W) -> (features (B, 2048), logits (B, 1008)).
"""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from util import distributed as dist
from util.errors import UserError

Extractor = Callable[[Tensor], tuple[Tensor, Tensor]]
Statistics = dict[str, np.ndarray]  # "mu" (D,), "sigma" (D, D), float64


def load_inception(device: torch.device) -> Extractor | None:
    """Inception with the FID weights, downloaded once where that is possible; None where they cannot be had.  Collective."""
    from torch_fidelity.utils import create_feature_extractor

    network = None
    for turn in (True, False):  # one process of a node downloads, the others find the file
        mine = turn == (dist.local_rank() == 0)
        if mine:
            network = _try_inception(create_feature_extractor, device)
        if not all(dist.gather_objects(network is not None or not mine)):
            return None

    @torch.inference_mode()
    def extract(pictures: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = network(pictures.to(device))
        return features.cpu(), logits.cpu()

    return extract


def _try_inception(create: Callable, device: torch.device) -> torch.nn.Module | None:
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        return create("inception-v3-compat", ["2048", "logits_unbiased"], cuda=device.type == "cuda", verbose=False)
    except Exception as error:  # no network, a cut file, a wrong hash: each its own exception
        print(f"Inception weights: {type(error).__name__}: {error}", file=sys.stderr)
        return None
    finally:
        socket.setdefaulttimeout(patience)


def inception_place() -> str:
    """Where the weights are looked for, and what they are called."""
    return os.path.join(torch.hub.get_dir(), "checkpoints", "weights-inception-2015-12-05-6726825d.pth")


class Moments:
    """Running mean and covariance of features, float64: memory does not grow with the pictures."""

    def __init__(self):
        self.count, self.sum, self.outer = 0, None, None

    def add(self, features: Tensor) -> None:  # (B, D)
        features = features.double()
        if self.sum is None:
            self._start(features.shape[1])
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += features.T @ features

    def _start(self, width: int) -> None:
        self.sum, self.outer = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)

    def statistics(self) -> Statistics:
        """Over all ranks; one that added nothing counts for nothing.  Collective."""
        width = max(dist.gather_objects(0 if self.sum is None else len(self.sum)))
        if self.sum is None:
            self._start(width)
        count = sum(dist.gather_objects(self.count))
        mu = dist.sum_over_ranks(self.sum) / count
        sigma = (dist.sum_over_ranks(self.outer) - count * torch.outer(mu, mu)) / max(count - 1, 1)
        return {"mu": mu.numpy(), "sigma": sigma.numpy()}


def frechet_distance(a: Statistics, b: Statistics) -> float:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


def inception_score(logits: Tensor) -> float:
    """Mean over ten splits, as torch-fidelity shuffles them; one split for fewer than ten pictures."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    return isc_features_to_metric(logits, splits=min(10, len(logits)))[KEY_METRIC_ISC_MEAN]


def load_statistics(path: Path) -> Statistics:
    """Raises: UserError if the file holds no `mu` and `sigma`."""
    with np.load(path, allow_pickle=False) as file:
        if not {"mu", "sigma"} <= set(file.files):
            raise UserError(f"{path}: no reference statistics; wanted the arrays mu and sigma, found {', '.join(file.files)}")
        return {name: file[name].astype(np.float64) for name in ("mu", "sigma")}


def statistics_count(path: Path) -> int:
    """Pictures that statistics were made from; 0 for a file that does not say, -1 where there is none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return int(file["n"]) if "n" in file.files else 0
    except Exception:  # not there, cut short, not a zip: made anew
        return -1


def save_statistics(path: Path, values: Statistics, count: int) -> None:
    temporary = path.with_name(f".{path.stem}.tmp.npz")
    np.savez(temporary, **values, n=count)
    os.replace(temporary, path)
