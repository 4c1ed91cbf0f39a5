"""The formulas of evaluation, torch-fidelity's own where it has them: Fréchet distance, Inception score, precision and recall; and what is kept for them."""

import numpy as np
import torch
from torch import Tensor

from config import NEIGHBOURHOOD
from util import distributed as dist

Statistics = dict[str, np.ndarray]  # "mu" (D,), "sigma" (D, D), float64


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

    def statistics(self) -> tuple[Statistics, int]:
        """Over all ranks, and of how many pictures; a rank that added nothing counts for nothing.  Collective."""
        width = max(dist.gather_objects(0 if self.sum is None else len(self.sum)))
        if self.sum is None:
            self._start(width)
        count = sum(dist.gather_objects(self.count))
        mu = dist.sum_over_ranks(self.sum) / count
        sigma = (dist.sum_over_ranks(self.outer) - count * torch.outer(mu, mu)) / max(count - 1, 1)
        return {"mu": mu.numpy(), "sigma": sigma.numpy()}, count


class NumberedRows:
    """Rows by picture number, each added on the rank that drew the picture."""

    def __init__(self):
        self.numbers: list[int] = []
        self.rows: list[Tensor] = []

    def add(self, numbers: list[int], rows: Tensor) -> None:
        self.numbers += numbers
        self.rows.append(rows)

    def in_order(self) -> Tensor:
        """All ranks' rows in the order of their numbers, on rank 0; nothing on the others.  Collective."""
        width = max(dist.gather_objects(self.rows[0].shape[1] if self.rows else 0))
        rows = dist.gather_rows(torch.cat([torch.empty(0, width), *self.rows]), main_only=True)
        numbers = dist.gather_rows(torch.tensor(self.numbers, dtype=torch.long), main_only=True)
        return rows[numbers.argsort()]


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2)) (arXiv:1706.08500)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


def inception_score(logits: Tensor) -> float:
    """Mean over ten splits, as torch-fidelity shuffles them; one split for each of fewer than ten pictures (arXiv:1606.03498)."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    return isc_features_to_metric(logits, splits=min(10, len(logits)))[KEY_METRIC_ISC_MEAN]


def precision_recall(drawn: Tensor, real: Tensor) -> tuple[float, float]:
    """Shares of drawn pictures within the real ones' manifold and of real ones within the drawn ones' (arXiv:1904.06991).

    Args: drawn, real: features (N, D), (M, D), more than NEIGHBOURHOOD of each.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    found = prc_features_to_metric(drawn, real, prc_neighborhood=NEIGHBOURHOOD, save_cpu_ram=True, verbose=False)
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]
