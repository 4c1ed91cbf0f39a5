"""Does a drawn picture show what its prompt says?  The judges of the digits and the emoji."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from datasets.demo import COLOURS, load_ink

Pair = tuple[str, int]  # colour, digit


def ink_of(picture: Image.Image) -> np.ndarray:
    """(H, W) ink of any colour on white, 0 to 1: the spread of the channels over its high value in this picture."""
    rgb = np.asarray(picture, dtype=np.float32)
    spread = rgb.max(2) - rgb.min(2)
    return np.clip(spread / max(np.quantile(spread, 0.98), 1.0), 0, 1)


def colour_of(picture: Image.Image) -> str:
    """The colour whose hue is nearest to the mean colour of the ink."""
    rgb, ink = np.asarray(picture, dtype=np.float32), ink_of(picture)
    mean = (rgb * ink[..., None]).sum((0, 1)) / (255 * ink.sum())
    hue = colorsys.rgb_to_hsv(*mean)[0]

    def distance(name: str) -> float:
        apart = abs(hue - colorsys.rgb_to_hsv(*(value / 255 for value in COLOURS[name]))[0])
        return min(apart, 1 - apart)

    return min(COLOURS, key=distance)


class DigitJudge:
    """A support vector machine on the real digits, a sixth of which is kept back to measure it by."""

    def __init__(self, size: int):
        from sklearn.svm import SVC

        inks, digits = load_ink(size)
        order = np.random.RandomState(0).permutation(len(inks))
        held, train = order[:300], order[300:]
        self.machine = SVC(C=5).fit(self.features(inks[train]), digits[train])
        self.accuracy = float((self.machine.predict(self.features(inks[held])) == digits[held]).mean())

    @staticmethod
    def features(inks: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([np.asarray(Image.fromarray(ink.astype(np.float32)).resize((16, 16), Image.Resampling.BOX)).ravel() for ink in inks])

    def __call__(self, pictures: Sequence[Image.Image]) -> list[Pair]:
        digits = self.machine.predict(self.features([ink_of(picture) for picture in pictures]))
        return [(colour_of(picture), int(digit)) for picture, digit in zip(pictures, digits)]


def shares_right(found: Sequence[Pair], wanted: Sequence[Pair]) -> tuple[float, float, float]:
    """Shares of pictures with the right colour, the right digit, and both."""
    rows = np.array([(f[0] == w[0], f[1] == w[1], f == w) for f, w in zip(found, wanted)])
    return tuple(rows.mean(0).tolist())


def nearest_share(drawn: Sequence[Image.Image], real: Sequence[Image.Image], own: Sequence[int]) -> float:
    """Share of drawn pictures that are nearer, pixel by pixel, to their own caption's picture real[own[i]] than to any other."""
    table = np.stack([np.asarray(picture, dtype=np.float32).ravel() for picture in real])
    distances = np.stack([((table - np.asarray(picture, dtype=np.float32).ravel()) ** 2).sum(1) for picture in drawn])
    return float((distances.argmin(1) == np.array(own)).mean())
