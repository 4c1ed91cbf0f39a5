"""What a picture is conditioned on, y: a class label, its caption's pooled features, or the states of its caption's tokens; the null; where y comes from.

A new kind is a class here, the choice of it in text_features.prepare, and a network that reads it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from text_encoder import TextEncoder, rms_normalized
from util import distributed as dist
from util.feature_store import FeatureRows
from util.parallel import to_device
from util.text import Embedded, PackedText, Text, Y


class Conditions(Protocol):
    """Labels or caption numbers, (B,) int64 -> y, (B, ...), or what becomes y by `.to(device)`."""

    null: Y  # y of nothing, (1, ...)
    in_loader: bool  # whether the loader's processes call it, or else the step

    def __call__(self, raw: Tensor) -> Tensor | PackedText | Text: ...


class LabelConditions:
    """Class labels are their own y; the null label is the one after the last."""

    in_loader = True

    def __init__(self, num_classes: int):
        self.null = torch.tensor([num_classes])

    def __call__(self, labels: Tensor) -> Tensor:
        return labels


@dataclass(frozen=True)
class FeatureNorm:
    """Features, pooled or of tokens, to mean 0 and variance 1 in each dimension.

    Mean-pooled LLM states share most of their length, so captions differ by little until it is taken out.
    """

    mean: Tensor  # (1, width)
    std: Tensor  # (1, width)

    @classmethod
    def of(cls, blocks: Iterable[Tensor], width: int) -> "FeatureNorm":
        """From all ranks' features, each rank's in blocks (n, width).  Dimensions that do not vary keep their scale.  Collective."""
        sums = torch.zeros(3, width, dtype=torch.float64)  # of 1, of the feature, of its square
        for block in blocks:
            block = block.double()
            sums += torch.stack([torch.full((width,), float(len(block)), dtype=torch.float64), block.sum(0), block.square().sum(0)])
        count, total, squares = dist.sum_over_ranks(sums)[:, None]
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        return cls(mean.float(), torch.where(std > 1e-6, std, 1.0).float())

    def __call__(self, features: Tensor) -> Tensor:
        return (features - to_device(self.mean, features.device)) / to_device(self.std, features.device)


def unchanged(features: Tensor) -> Tensor:
    """--text_norm none."""
    return features


def norm_of(description: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """The normalisation that a model's description asks for: features (..., width) -> the same shape."""
    if description["text_norm"] == "standardize":
        return FeatureNorm(description["mean"], description["std"])
    return rms_normalized if description["text_norm"] == "rms" else unchanged


def rows_at(rows: np.ndarray, lines: Tensor) -> np.ndarray:
    """The rows of captions in a store, out of those of all lines."""
    found = rows[lines.numpy()]
    assert (found >= 0).all(), "a caption that this run was not prepared for"
    return found


class StoredText:
    """conditions(lines) -> (B, width) float32 on the CPU, read by row; the loader's processes do it."""

    in_loader = True

    def __init__(self, features: FeatureRows, rows: np.ndarray, null: Tensor, norm: Callable[[Tensor], Tensor]):
        self.features, self.rows, self.null, self.norm = features, rows, null, norm

    def __call__(self, lines: Tensor) -> Tensor:
        return self.norm(self.features(rows_at(self.rows, lines)))


class LiveText:
    """conditions(lines) -> (B, width) float32 on the LLM's device, encoded on the spot."""

    in_loader = False

    def __init__(self, encoder: TextEncoder, captions: Sequence[str], null: Tensor, norm: Callable[[Tensor], Tensor]):
        self.encoder, self.captions, self.null, self.norm = encoder, captions, null, norm

    def __call__(self, lines: Tensor) -> Tensor:
        return self.norm(self.encoder.encode([self.captions[line] for line in lines.tolist()]))


def packed(states: Tensor, lengths: Tensor, padded_to: int, norm: Callable[[Tensor], Tensor]) -> PackedText:
    """Normalised states of tokens as they travel.  states: (tokens, W) float16; lengths: (B,), tokens of each caption."""
    return PackedText(norm(states.float()).half(), lengths, padded_to)


class StoredTokens:
    """conditions(lines) -> PackedText on the CPU, read by row; the loader's processes do it."""

    in_loader = True

    def __init__(self, features: FeatureRows, rows: np.ndarray, padded_to: int, norm: Callable[[Tensor], Tensor]):
        self.features, self.rows, self.padded_to, self.norm = features, rows, padded_to, norm
        self.null = Text.null(padded_to, features.width)

    def __call__(self, lines: Tensor) -> PackedText:
        return packed(*self.features.tokens(rows_at(self.rows, lines)), self.padded_to, self.norm)


class LiveTokens:
    """conditions(lines) -> Text on the LLM's device, encoded on the spot."""

    in_loader = False

    def __init__(self, encoder: TextEncoder, captions: Sequence[str], padded_to: int, norm: Callable[[Tensor], Tensor]):
        self.encoder, self.captions, self.padded_to, self.norm = encoder, captions, padded_to, norm
        self.null = Text.null(padded_to, encoder.width)

    def __call__(self, lines: Tensor) -> Text:
        states, mask = self.encoder.encode_tokens([self.captions[line] for line in lines.tolist()])
        more = self.padded_to - mask.shape[1]
        return Text(F.pad(self.norm(states), (0, 0, 0, more)), F.pad(mask, (0, more)))


@dataclass
class Conditioning:
    """What training and drawing are conditioned on, and how its features were made."""

    y_of: Conditions
    prompts: Tensor | PackedText  # y of the prompts, a row each
    description: dict[str, Any] | None = None  # goes into the checkpoint of a text model
    width: int | None = None  # of text features
    frozen: int = 0  # parameters of the LLM
    bytes_each: int = 8  # of a row on its way from a loader's process


def expand_null(null: Y | Embedded, count: int) -> Y | Embedded:
    """(1, ...) -> (count, ...)."""
    return null.expand(count, *null.shape[1:]) if isinstance(null, Tensor) else null.expand(count)


def drop_conditions(y: Y, null: Y, dropped: Tensor) -> Y:
    """y (B, ...) with the null in place of the rows `dropped`, (B,) bool."""
    if isinstance(y, Text):
        return y.without(dropped)
    return torch.where(dropped.view(-1, *[1] * (y.ndim - 1)), null, y)
