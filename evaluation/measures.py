"""Measures: each sees every picture of an evaluation once, as the uint8 that a PNG would hold, on the rank that drew it, and gives its figures at the end."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from config import NEIGHBOURHOOD
from datasets.stream import PictureDataset
from evaluation.references import read_pictures, spread
from util import distributed as dist
from util import metrics
from util.extractors import Clip, Extractor
from util.randomness import stream
from util.reference import Reference
from util.workers import loader_deaths

OTHERS = 99  # captions that R-precision puts beside a picture's own


@dataclass(frozen=True)
class Subjects:
    """What the pictures of an evaluation are to show."""

    conditions: Tensor  # (count,) labels, or numbers of captions
    source: str = "labels"  # where they are from
    captions: Sequence[str] = ()  # picture i's, for a text model

    def __len__(self) -> int:
        return len(self.conditions)

    def digest(self) -> str:
        """What identifies them: the captions' text, or the labels."""
        text = "\n".join(self.captions) if self.captions else repr(self.conditions.tolist())
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


class Measure(Protocol):
    extractor: Extractor | Clip  # what it sees pictures through; on its device while it measures

    def begin(self, subjects: Subjects) -> None:
        """Collective."""

    def add(self, numbers: list[int], pictures: Tensor) -> None:
        """Numbers of pictures, and the pictures, (B, 3, H, W) uint8."""

    def figures(self) -> dict[str, float]:
        """Rank 0's are the figures.  Collective."""

    def facts(self, subjects: Subjects) -> dict[str, Any]:
        """What they depend on besides the pictures.  For rank 0 alone."""


class Frechet:
    """Fréchet distance of the first layer's features to the reference and, where there are logits, the Inception score."""

    def __init__(self, name: str, extractor: Extractor, reference: Reference | None):
        """reference: rank 0's."""
        self.name, self.extractor, self.reference = name, extractor, reference

    def begin(self, subjects: Subjects) -> None:
        self.moments, self.logits = metrics.Moments(), metrics.NumberedRows()

    def add(self, numbers: list[int], pictures: Tensor) -> None:
        features, *logits = self.extractor(pictures)
        self.moments.add(features)
        for rows in logits:
            self.logits.add(numbers, rows)

    def figures(self) -> dict[str, float]:
        statistics, _ = self.moments.statistics()
        logits = self.logits.in_order()
        if not dist.is_main():
            return {}
        found = {self.name: metrics.frechet_distance(statistics, self.reference.values)}
        return found | ({"is": metrics.inception_score(logits)} if len(logits) else {})

    def facts(self, subjects: Subjects) -> dict[str, Any]:
        made = self.reference
        return {self.name: {"extractor": self.extractor.identity, "reference": made.path.name, "reference_sha256": made.sha256, **made.facts}}


class Manifold:
    """Precision and recall against as many pictures of the data, spread over it."""

    def __init__(self, extractor: Extractor, dataset: PictureDataset, num_workers: int):
        self.extractor, self.dataset, self.num_workers = extractor, dataset, num_workers
        self.real: dict[int, Tensor] = {}  # features by number of pictures

    def begin(self, subjects: Subjects) -> None:
        self.count = self._count(subjects)
        if self.count not in self.real:
            real = metrics.NumberedRows()
            chosen = [spread(i, len(self.dataset), self.count) for i in range(self.count)]
            with loader_deaths():
                for places, pictures in read_pictures(self.dataset, chosen, self.num_workers):
                    real.add(places, self.extractor(pictures)[0])
            self.real[self.count] = real.in_order()
        self.drawn = metrics.NumberedRows()

    def add(self, numbers: list[int], pictures: Tensor) -> None:
        self.drawn.add(numbers, self.extractor(pictures)[0])

    def figures(self) -> dict[str, float]:
        drawn = self.drawn.in_order()
        if not dist.is_main():
            return {}
        device = self.extractor.device
        return dict(zip(("precision", "recall"), metrics.precision_recall(drawn.to(device), self.real[self.count].to(device))))

    def facts(self, subjects: Subjects) -> dict[str, Any]:
        return {"precision_recall": {"extractor": self.extractor.identity, "real_pictures_asked_for": self._count(subjects), "neighbourhood": NEIGHBOURHOOD}}

    def _count(self, subjects: Subjects) -> int:
        return min(len(subjects), len(self.dataset))


class Alignment:
    """Does the picture show its caption?  100 x cosine under a CLIP, and how often the own caption is the nearest among others.

    A caption's others are its next ones in a shuffle of all different captions, so they follow from the seed and the captions.
    """

    def __init__(self, clip: Clip, seed: int):
        self.extractor, self.seed = clip, seed
        self.known: tuple[str, Tensor] = ("", torch.empty(0))  # digest of the captions, and their features

    def begin(self, subjects: Subjects) -> None:
        texts = list(dict.fromkeys(subjects.captions))
        texts = [texts[i] for i in torch.randperm(len(texts), generator=stream(self.seed, "r-precision", 0)).tolist()]
        place = {text: i for i, text in enumerate(texts)}
        self.own = torch.tensor([place[caption] for caption in subjects.captions])
        self.others = self._others(subjects)
        if self.known[0] != subjects.digest():
            self.known = (subjects.digest(), self._features(texts))
        self.sums = torch.zeros(3, dtype=torch.float64)  # of 1, of the cosine, of being nearest

    def _features(self, texts: list[str]) -> Tensor:
        size = -(-len(texts) // dist.world_size())
        share = texts[dist.rank() * size : (dist.rank() + 1) * size]
        return dist.gather_rows(self.extractor.of_captions(share or texts[:1])[: len(share)])

    def add(self, numbers: list[int], pictures: Tensor) -> None:
        features = self.known[1]
        chosen = (self.own[numbers][:, None] + torch.arange(self.others + 1)) % len(features)  # (B, 1 + others), the own one first
        cosine = (features[chosen] @ self.extractor.of_pictures(pictures)[:, :, None])[..., 0].double()
        own, others = cosine[:, 0], cosine[:, 1:]
        self.sums += torch.stack([torch.tensor(float(len(numbers))), own.sum(), (own[:, None] > others).all(1).sum()])

    def figures(self) -> dict[str, float]:
        count, cosine, nearest = dist.sum_over_ranks(self.sums).tolist()
        return {"clip_score": 100 * cosine / count, "r_precision": nearest / count}

    def facts(self, subjects: Subjects) -> dict[str, Any]:
        return {"clip_score": {"clip_model": self.extractor.identity, "scale": "100 x cosine", "captions_besides_the_own": self._others(subjects)}}

    @staticmethod
    def _others(subjects: Subjects) -> int:
        return min(OTHERS, len(set(subjects.captions)) - 1)
