"""Does a picture show its scene of datasets/scenes.py?  A program that learns nothing: connected areas, their hues, and six templates."""

import colorsys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import permutations

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.stats import binomtest

from datasets.demo import COLOURS
from datasets.scenes import OUTLINES, PLACES, RADII, STEPS, Scene, Spot, Thing, draw_spots

GRID = np.linspace(-1.1, 1.1, 24)  # of an area's shape, in sides of the square that is as large
UNKNOWN = ""  # a shape like none of the six, a colour that is grey
INKS = 255 - np.array([*COLOURS.values()], dtype=np.float32)  # (8, 3): what a colour takes from white
HUES = np.array([colorsys.rgb_to_hsv(*(value / 255 for value in rgb))[0] for rgb in COLOURS.values()])


@dataclass(frozen=True)
class Verdict:
    """`shape`, `colour`: these are right as multisets; `binding`: so are their pairs; `relation`: so is the place, the relations or the counts."""

    shape: bool
    colour: bool
    binding: bool
    relation: bool

    @property
    def everything(self) -> bool:
        return self.shape and self.colour and self.binding and self.relation


@dataclass(frozen=True)
class Found:
    """An area of one colour: its centre in widths of the picture; how like its template it is, at most 1."""

    thing: Thing
    x: float
    y: float
    likeness: float


def nearest_colours(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) to the number of the colour with the nearest hue; whiter or darker is the same colour."""
    red, green, blue = np.moveaxis(rgb.astype(np.float32), -1, 0)
    hue = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi)
    apart = np.abs((hue[..., None] - HUES + 0.5) % 1 - 0.5)
    return apart.argmin(-1)


def coverage(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) to (H, W): how far each pixel went from white, 0, to the full colour of its hue, 1."""
    ink = INKS[nearest_colours(rgb)]
    return ((255 - rgb) * ink).sum(-1) / (ink**2).sum(-1)


def normalised(cover: np.ndarray) -> np.ndarray:
    """An area as seen from its centre of mass, enlarged until it is of size 1: (24, 24), of norm 1."""
    mass = cover.sum()
    y, x = ((np.arange(length) * cover.sum(axis)).sum() / mass for length, axis in zip(cover.shape, (1, 0)))
    rows, columns = np.meshgrid(y + GRID * np.sqrt(mass), x + GRID * np.sqrt(mass), indexing="ij")
    seen = ndimage.map_coordinates(cover, [rows, columns], order=1)
    return seen / np.linalg.norm(seen)


@cache
def templates() -> tuple[list[str], np.ndarray]:
    """The six shapes at three sizes, each the mean over places between pixels.  Returns: the shape of each row, (18, 576)."""
    names, rows = [], []
    for shape in OUTLINES:
        for radius in (4.5, 6.5, 10):
            spots = [Spot(Thing(shape, "青"), (16 + dx) / 32, (16 + dy) / 32, radius / 32) for dx in (0, 0.25, 0.5, 0.75) for dy in (0, 0.25, 0.5, 0.75)]
            mean = np.mean([normalised(coverage(np.asarray(draw_spots([spot], 32), dtype=np.float32))) for spot in spots], axis=0)
            names.append(shape)
            rows.append(mean.ravel() / np.linalg.norm(mean))
    return names, np.stack(rows)


def shape_of(cover: np.ndarray) -> tuple[str, float]:
    """The shape whose template is most alike, and how alike it is."""
    names, rows = templates()
    likeness = rows @ normalised(cover).ravel()
    return names[likeness.argmax()], float(likeness.max())


def colour_of(rgb: np.ndarray, cover: np.ndarray) -> str:
    """The colour of an area's ink, weighted by how much of it there is."""
    mean = (rgb * cover[..., None]).sum((0, 1)) / cover.sum()
    return list(COLOURS)[nearest_colours(mean)] if mean.max() - mean.min() > 50 else UNKNOWN


def areas(rgb: np.ndarray, cover: np.ndarray, smallest: float) -> list[np.ndarray]:
    """(H, W) masks of the connected areas that are not white; one of two colours, where things touch, is one area for each."""
    labels, count = ndimage.label(cover > 0.4)
    hues, found = nearest_colours(ndimage.gaussian_filter(rgb, (0.7, 0.7, 0))), []
    for number in range(1, count + 1):
        area = labels == number
        inner = hues[area & (cover > 0.7)]
        colours = [colour for colour, pixels in Counter(inner.tolist()).items() if pixels > max(smallest, 0.2 * len(inner))]
        if len(colours) < 2:
            found.append(area)
            continue
        nearest = np.array(colours)[np.abs((HUES[hues][..., None] - HUES[colours] + 0.5) % 1 - 0.5).argmin(-1)]
        for colour in colours:
            parts, pieces = ndimage.label(area & (nearest == colour))
            found += [parts == piece for piece in range(1, pieces + 1)]
    return [area for area in found if cover[area].sum() > smallest]


def find_things(picture: Image.Image, level: str) -> list[Found]:
    """What is in a picture, from left to right; specks of less than a third of the smallest thing of the level are none."""
    rgb = np.asarray(picture.convert("RGB"), dtype=np.float32)
    cover, size = coverage(rgb), picture.width
    found, masks = [], areas(rgb, cover, smallest=0.45 * (RADII[level][0] * size) ** 2)
    taken = np.sum(masks, axis=0) > 0 if masks else None
    for area in masks:
        edge = ndimage.binary_dilation(area, np.ones((3, 3))) & ~(taken & ~area)  # its paler rim belongs to it
        ink = np.where(edge, np.clip(cover / np.quantile(cover[area], 0.7), 0, 1), 0)
        ink[ink < 0.12] = 0
        rows, columns = np.nonzero(area)
        shape, likeness = shape_of(np.pad(ink, 2))
        thing = Thing(shape if likeness > 0.9 else UNKNOWN, colour_of(rgb, ink))
        found.append(Found(thing, (columns.mean() + 0.5) / size, (rows.mean() + 0.5) / size, likeness))
    return sorted(found, key=lambda one: one.x)


def agreement(wanted: Thing, found: Thing) -> int:
    """How well one thing answers to another: the pair above all, then the shape, then the colour."""
    return 4 * (wanted == found) + 2 * (wanted.shape == found.shape) + (wanted.colour == found.colour)


def assignments(wanted: Sequence[Thing], found: Sequence[Thing]) -> list[tuple[int, ...]]:
    """All equally good ways to say which of `found` each of `wanted` is; none where there are too few."""
    ways = list(permutations(range(len(found)), len(wanted)))
    scores = [sum(agreement(thing, found[i]) for thing, i in zip(wanted, way)) for way in ways]
    return [way for way, score in zip(ways, scores) if score == max(scores)]


def stands(one: Found, relation: str, other: Found) -> bool:
    """Whether `one` is clearly on that side of `other`: more along it than across it."""
    dx, dy = one.x - other.x, one.y - other.y
    right, down = STEPS[relation]
    return dx * right + dy * down > abs(dx * down) + abs(dy * right)


def arranged(found: Sequence[Found], scene: Scene) -> bool:
    """Place, relations or counts, given the things that are there.

    Things that are not what was wanted stand for those they are most like; where that can be said in several ways all must be right.
    """
    if scene.counts:
        kinds = Counter(one.thing for one in found)
        ways = assignments(scene.things, list(kinds))
        right = [all(list(kinds.values())[i] == count for i, count in zip(way, scene.counts)) for way in ways]
        return bool(ways) and all(right) and len(found) == sum(scene.counts)
    ways = assignments(scene.things, [one.thing for one in found])
    if scene.place:
        nearest = [min(PLACES, key=lambda place, one=found[i]: (PLACES[place][0] - one.x) ** 2 + (PLACES[place][1] - one.y) ** 2) for (i,) in ways]
        return bool(ways) and all(place == scene.place for place in nearest)
    return bool(ways) and all(stands(found[way[i]], relation, found[way[j]]) for way in ways for i, relation, j in scene.relations)


def verdict(found: Sequence[Found], scene: Scene) -> Verdict:
    """What of the scene those things are; a thing too many or too few is wrong."""
    wanted = scene.drawn()
    if len(found) > 2 * len(wanted) + 2:  # no picture of a scene; and too many to be told apart
        return Verdict(False, False, False, False)
    things = [one.thing for one in found]
    shape = Counter(thing.shape for thing in things) == Counter(thing.shape for thing in wanted)
    colour = Counter(thing.colour for thing in things) == Counter(thing.colour for thing in wanted)
    return Verdict(shape, colour, binding=Counter(things) == Counter(wanted), relation=arranged(found, scene))


def judge(picture: Image.Image, scene: Scene) -> Verdict:
    """What of the scene the picture shows."""
    return verdict(find_things(picture, scene.level), scene)


def rate(right: int, count: int) -> tuple[float, float, float]:
    """The share that is right, and the ends of its exact (Clopper-Pearson) interval of 95 %."""
    test = binomtest(right, count)
    interval = test.proportion_ci(0.95)
    return test.statistic, interval.low, interval.high


def rates(verdicts: Sequence[Verdict]) -> dict[str, tuple[float, float, float]]:
    """Of the pictures, in each respect."""
    names = (*(field.name for field in fields(Verdict)), "everything")
    return {name: rate(sum(getattr(verdict, name) for verdict in verdicts), len(verdicts)) for name in names}
