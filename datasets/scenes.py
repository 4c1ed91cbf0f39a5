"""Drawn scenes with captions that a program can check: `python -m datasets.scenes --out DIR --level two --count 20000 --size 32`.

Six shapes in eight colours on white. Ten of the 48 (shape, colour) pairs are never drawn for training, so that a picture of one of those
shows that words are understood apart. Levels: one thing at a place; two things and how they stand; three things and two relations;
two kinds of things, counted. `demo.scene_judge` says whether a picture shows its scene.
"""

import argparse
import math
import random
import re
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw

from datasets.demo import ADJECTIVES, COLOURS, make_folders, write_pair
from util.errors import UserError
from util.randomness import derive
from util.workers import in_processes, own_cores

Point = tuple[float, float]


def star() -> list[Point]:
    corners = [(math.radians(36 * i - 90), 1.0 if i % 2 == 0 else 0.45) for i in range(10)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle, radius in corners]


def heart() -> list[Point]:
    angles = [math.tau * i / 60 for i in range(60)]
    heights = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(math.sin(a) ** 3, -(height + 2.5) / 15) for a, height in zip(angles, heights)]


def cross(arm: float = 0.36) -> list[Point]:
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    turns = [lambda x, y: (x, y), lambda x, y: (-y, x), lambda x, y: (-x, -y), lambda x, y: (y, -x)]
    return [turn(x, y) for turn in turns for x, y in quarter]


OUTLINES: dict[str, list[Point]] = {  # corners in a square from -1 to 1, y down
    "丸": [(math.cos(math.tau * i / 60), math.sin(math.tau * i / 60)) for i in range(60)],
    "三角": [(0, -0.9), (1, 0.85), (-1, 0.85)],
    "四角": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "星": star(),
    "ハート": heart(),
    "十字": cross(),
}
PLACES = {"左上": (0.27, 0.27), "右上": (0.73, 0.27), "左下": (0.27, 0.73), "右下": (0.73, 0.73), "真ん中": (0.5, 0.5)}
STEPS = {"右": (1, 0), "左": (-1, 0), "上": (0, -1), "下": (0, 1)}  # x, y from the thing that is named with it
INVERSE = {"右": "左", "左": "右", "上": "下", "下": "上"}
LEVELS = ("one", "two", "three", "count")
RADII = {"one": (4.5 / 32, 6 / 32), "two": (4.5 / 32, 6 / 32), "three": (6 / 64, 8 / 64), "count": (5.5 / 64, 7 / 64)}  # of a picture's width
SMALLEST = {"one": 32, "two": 32, "three": 64, "count": 64, "mixed": 64, "mixed-hard": 64}  # pixels; below it things come nearer than two pixels
HARD_SHARES = (0.05, 0.1, 0.35, 0.5)  # of the levels in "mixed-hard"; in "mixed" all have the same
SUPERSAMPLING = 8
SPREAD = 0.15  # of related things over the picture


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """`relations`: (i, "右", j) says that things[i] is to the right of things[j].  `counts`: how many there are of each of `things`."""

    level: str
    things: tuple[Thing, ...]
    place: str = ""
    relations: tuple[tuple[int, str, int], ...] = ()
    counts: tuple[int, ...] = ()

    def drawn(self) -> tuple[Thing, ...]:
        """Everything that is in the picture, several of a kind named several times."""
        return tuple(thing for thing, count in zip(self.things, self.counts or (1,) * len(self.things)) for _ in range(count))


PAIRS = tuple(Thing(shape, colour) for shape in OUTLINES for colour in COLOURS)
HELD_OUT_PAIRS = tuple(Thing(list(OUTLINES)[i % 6], list(COLOURS)[-i % 8]) for i in range(10))  # each colour and each shape, at most twice
HELD_OUT_COUNTS = frozenset(  # every second of the other pairs lacks one of its counts
    (2 + i % 4, pair) for i, pair in enumerate([pair for pair in PAIRS if pair not in HELD_OUT_PAIRS][::2])
)


def is_seen(scene: Scene) -> bool:
    """Whether nothing of it is held out, so that it may be trained on."""
    return not (set(scene.things) & set(HELD_OUT_PAIRS) or set(zip(scene.counts, scene.things)) & HELD_OUT_COUNTS)


def any_scene(level: str, rng: random.Random) -> Scene:
    """Held out or not."""
    things = tuple(rng.sample(PAIRS, {"one": 1, "two": 2, "three": 3, "count": 2}[level]))
    if level == "one":
        return Scene(level, things, place=rng.choice(list(PLACES)))
    if level == "count":
        return Scene(level, things, counts=(rng.randint(2, 5), rng.randint(1, 3)))
    first = (0, rng.choice(list(STEPS)), 1)
    if level == "two":
        return Scene(level, things, relations=(first,))
    onto_another = {(1, first[1]), (0, INVERSE[first[1]])}  # there the third thing would stand where one stands already
    anchor, relation = rng.choice([free for free in ((i, step) for i in (0, 1) for step in STEPS) if free not in onto_another])
    return Scene(level, things, relations=(first, (2, relation, anchor)))


def random_scene(level: str, rng: random.Random, seen: bool) -> Scene:
    """A scene of a level ("mixed", "mixed-hard": of any) with nothing held out, or with at least one held-out pair or count of a pair."""
    match level:
        case "mixed":
            level = rng.choice(LEVELS)
        case "mixed-hard":
            (level,) = rng.choices(LEVELS, HARD_SHARES)
    while is_seen(scene := any_scene(level, rng)) != seen:
        pass
    return scene


# What a scene is called.

ENGLISH = {
    **{"丸": "circle", "三角": "triangle", "四角": "square", "星": "star", "ハート": "heart", "十字": "cross"},
    **{"赤": "red", "橙": "orange", "黄": "yellow", "緑": "green", "水": "cyan", "青": "blue", "紫": "purple", "桃": "pink"},
    **{"左上": "top left", "右上": "top right", "左下": "bottom left", "右下": "bottom right", "真ん中": "middle"},
    **{"右": "to the right of", "左": "to the left of", "上": "above", "下": "below"},
}
COUNTERS = {"ja": ("", "一つ", "二つ", "三つ", "四つ", "五つ"), "en": ("", "one", "two", "three", "four", "five")}
PLACED = {
    "ja": ("{place}に{a}がある", "{a}が{place}にある", "{place}にある{a}", "{a}の場所は{place}"),
    "en": ("there is {a} in the {place}", "in the {place} there is {a}", "{a} in the {place}", "{a} is in the {place}"),
}
RELATED = {  # a is `relation` of b, b is `inverse` of a
    "ja": ("{b}の{relation}に{a}がある", "{a}の{inverse}に{b}がある", "{a}が{b}の{relation}にある", "{b}が{a}の{inverse}にある"),
    "en": ("{a} is {relation} {b}", "{b} is {inverse} {a}", "{relation} {b} there is {a}", "{inverse} {a} there is {b}"),
}
COUNTED = {
    "ja": ("{a}が{m}と{b}が{n}ある", "{b}が{n}と{a}が{m}ある", "{m}の{a}と{n}の{b}がある", "{n}の{b}と{m}の{a}がある"),
    "en": ("{m} {a} and {n} {b}", "{n} {b} and {m} {a}", "a picture of {m} {a} and {n} {b}", "a picture of {n} {b} and {m} {a}"),
}
FILLER = {  # no word of a shape, a colour, a place or a count
    "ja": (
        "この絵はとても静かな気持ちで描かれた。",
        "作者は長い旅から帰ったばかりだった。",
        "朝の空気は冷たく、窓は少し開いていた。",
        "机には古い本と筆が置いてあった。",
        "誰もがゆっくりと話を聞いていた。",
        "その日は風もなく、音もほとんどしなかった。",
        "昔から絵を描くことが好きな人だった。",
        "紙は丈夫で、手ざわりもよかった。",
        "友人は何度も見に来て、感想を言った。",
        "完成するまでにかなりの時間がかかった。",
        "展覧会では多くの人が足を止めた。",
        "説明を読むと、描かれたものがよく分かる。",
        "雨の日にはよく音楽を聞きながら仕事をした。",
        "母から習った描き方を今でも守っている。",
        "細かいところまで気を配って作られた。",
        "新しい道具を使うのは初めてだった。",
        "見る人によって感じ方は違うだろう。",
        "それでも描かれたものははっきりしている。",
        "額に入れる前に、もう少し乾かす必要があった。",
        "子どもたちは楽しそうに眺めていた。",
        "電車の時間まで、まだ余裕があった。",
        "夕食の後で、また続きを描き始めた。",
        "名前はまだ付けられていない。",
        "最後に、何が描かれているかを書いておく。",
    ),
    "en": (
        "This picture was made in a calm mood.",
        "The artist had just come home from a long journey.",
        "The morning air was cold and the window stood open.",
        "Old books and brushes lay on the desk.",
        "Everybody listened without a word.",
        "There was no wind that day and hardly a sound.",
        "Painting had always been a pleasure.",
        "The paper was strong and felt good.",
        "A friend came often to look and to talk about it.",
        "It took quite some time to finish.",
        "Many people stopped at the exhibition.",
        "Whoever reads the text knows what was painted.",
        "On rainy days the work was done with music.",
        "The way of painting was learned from a mother.",
        "Every detail was done with care.",
        "The new tools had never been used before.",
        "Each person may feel something else.",
        "Still, what was painted is clear.",
        "It had to dry a little more before it was framed.",
        "The children watched and seemed happy.",
        "Some time remained before the train.",
        "After dinner the work went on again.",
        "It has not been given a name yet.",
        "At last, here is what was painted.",
    ),
}
FILLER_LENGTH = {"ja": 110, "en": 450}  # characters at least; the sentence that passes it is the last


def noun(thing: Thing, language: str, article: str = "a") -> str:
    """'赤い丸'; 'a red circle', or with "the" or none before it."""
    if language == "ja":
        return ADJECTIVES[thing.colour] + thing.shape
    phrase = f"{ENGLISH[thing.colour]} {ENGLISH[thing.shape]}"
    return f"{'an' if article == 'a' and phrase[0] in 'aeiou' else article} {phrase}".strip()


def plural(thing: Thing, count: int, language: str) -> str:
    phrase = noun(thing, language, article="")
    return phrase if language == "ja" or count == 1 else phrase + ("es" if phrase.endswith("s") else "s")


def related(scene: Scene, relation: tuple[int, str, int], language: str) -> list[str]:
    """The four sentences for one relation, both ways round."""
    one, word, other = relation
    article = "the" if scene.level == "three" else "a"  # there a thing is named twice
    words = {"a": noun(scene.things[one], language, article), "b": noun(scene.things[other], language, article)}
    words |= {name: step if language == "ja" else ENGLISH[step] for name, step in (("relation", word), ("inverse", INVERSE[word]))}
    return [form.format(**words) for form in RELATED[language]]


def joined(first: str, second: str, language: str) -> str:
    return f"{first[:-1]}り、{second}" if language == "ja" else f"{first}, and {second}"


def captions(scene: Scene, language: str = "ja") -> list[str]:
    """Four wordings, all of them true of the scene, in both orders of what they name."""
    if scene.level == "one":
        place = scene.place if language == "ja" else ENGLISH[scene.place]
        return [form.format(a=noun(scene.things[0], language), place=place) for form in PLACED[language]]
    if scene.level == "count":
        (a, b), counter = (plural(thing, count, language) for thing, count in zip(scene.things, scene.counts)), COUNTERS[language]
        return [form.format(a=a, b=b, m=counter[scene.counts[0]], n=counter[scene.counts[1]]) for form in COUNTED[language]]
    sentences = [related(scene, relation, language) for relation in scene.relations]
    if scene.level == "two":
        return sentences[0]
    forward = (True, False, True, False)  # each kind of sentence with one order of the two relations, so that any thing may be named first
    return [joined(*(pair if ahead else pair[::-1]), language) for pair, ahead in zip(zip(*sentences), forward)]


def long_caption(scene: Scene, rng: random.Random, language: str = "ja") -> str:
    """One wording after some 120 characters (English: 470) that say nothing about the picture."""
    text, space = "", "" if language == "ja" else " "
    for sentence in rng.sample(FILLER[language], len(FILLER[language])):
        text += sentence + space
        if len(text) >= FILLER_LENGTH[language]:
            break
    return text + rng.choice(captions(scene, language))


def corpus(language: str, long: bool = False, lines: int = 20_000) -> list[str]:
    """Text for a language model: captions of scenes of all levels with all pairs, held-out ones too, and the filler's sentences.

    Holds every word and every pair in every sentence, so that what is new about a held-out pair is its picture and not its words.
    `long`: nearly half of the lines are long captions.
    """
    rng = random.Random(0)
    found = dict.fromkeys(FILLER[language])
    while len(found) < lines:
        scenes = [any_scene(level, rng) for level in LEVELS]
        found |= dict.fromkeys(caption for scene in scenes for caption in captions(scene, language))
        if long:
            found |= dict.fromkeys(long_caption(scene, rng, language) for scene in scenes)
    return list(found)[:lines]


def words(language: str) -> list[str]:
    """What captions are made of, for a tokenizer none of whose pieces crosses from one word to the next."""
    forms = [*PLACED[language], *RELATED[language], *COUNTED[language]]
    between = {part.strip() for form in forms for part in re.split(r"\{\w+\}", form)} | {"り、"}
    names = [*ADJECTIVES.values(), *OUTLINES, *PLACES, *STEPS] if language == "ja" else [word for name in ENGLISH.values() for word in name.split()]
    return sorted({*between, *names, *COUNTERS[language]} - {""})


# How a scene is drawn.


@dataclass(frozen=True)
class Spot:
    """Where a thing stands: its centre and half its width, in widths of the picture."""

    thing: Thing
    x: float
    y: float
    radius: float


def around(middle: float, reach: float, rng: random.Random) -> float:
    return rng.uniform(middle - reach, middle + reach)


def cells(scene: Scene) -> list[tuple[int, int]]:
    """Places on a grid at which all relations hold."""
    found = {1: (0, 0)}
    for one, relation, other in scene.relations:
        found[one] = (found[other][0] + STEPS[relation][0], found[other][1] + STEPS[relation][1])
    return [found[i] for i in range(len(found))]


def related_spots(scene: Scene, rng: random.Random, spread: float) -> list[Spot]:
    """Neighbours on a grid, each a little beside its place: at least two pixels are left between them.

    The grid lies in the middle at `spread` 0 and anywhere in the picture at 1: no caption says where, so it only makes pictures harder to draw.
    """
    step, reach = (rng.uniform(15.5, 16.5) / 32, 0.75 / 32) if scene.level == "two" else (rng.uniform(20, 21) / 64, 1 / 64)
    radii = [rng.uniform(*RADII[scene.level]) for _ in scene.things]
    axes = []
    for axis in zip(*cells(scene)):
        middles = [around(step * cell, reach, rng) for cell in axis]
        low, high = (edge(m + sign * r for m, r in zip(middles, radii)) for edge, sign in ((min, -1), (max, 1)))
        first, last = 0.03 - low, 0.97 - high
        shift = (first + last) / 2 + spread * around(0, (last - first) / 2, rng)
        axes.append([middle + shift for middle in middles])
    return [Spot(thing, x, y, radius) for thing, x, y, radius in zip(scene.things, *axes, radii)]


def cells_of_counts(counts: tuple[int, ...], rng: random.Random) -> list[tuple[int, int]]:
    """Cells (column, row) of three by three: the first kind's in two columns, the second's in the third, on the left or on the right of it."""
    mirrored = rng.random() < 0.5
    found = [divmod(cell, 3) for cell in [*rng.sample(range(6), counts[0]), *rng.sample(range(6, 9), counts[1])]]
    return [(2 - column if mirrored else column, row) for column, row in found]


def layout(scene: Scene, rng: random.Random, spread: float = SPREAD) -> list[Spot]:
    """Where everything of the scene stands, a little different at each call."""
    if scene.relations:
        return related_spots(scene, rng, spread)
    if scene.counts:
        middles, reach = [((column + 0.5) / 3, (row + 0.5) / 3) for column, row in cells_of_counts(scene.counts, rng)], 2 / 64
    else:
        middles, reach = [PLACES[scene.place]], 1.4 / 32
    return [Spot(thing, around(x, reach, rng), around(y, reach, rng), rng.uniform(*RADII[scene.level])) for thing, (x, y) in zip(scene.drawn(), middles)]


def draw_spots(spots: list[Spot], size: int) -> Image.Image:
    width = size * SUPERSAMPLING
    canvas = Image.new("RGB", (width, width), "white")
    brush = ImageDraw.Draw(canvas)
    for spot in spots:
        outline = [((spot.x + spot.radius * x) * width, (spot.y + spot.radius * y) * width) for x, y in OUTLINES[spot.thing.shape]]
        brush.polygon(outline, fill=COLOURS[spot.thing.colour])
    return canvas.reduce(SUPERSAMPLING)


def draw(scene: Scene, size: int, rng: random.Random, spread: float = SPREAD) -> Image.Image:
    return draw_spots(layout(scene, rng, spread), size)


# A data set of scenes.


@dataclass(frozen=True)
class SceneSet:
    """`wrong`: the share of pictures with the captions of another scene.  `long`: with filler before each caption.  `spread`: see related_spots."""

    level: str = "two"
    count: int = 20_000
    size: int = 32
    seed: int = 0
    language: str = "ja"
    wrong: float = 0.0
    long: bool = False
    spread: float = SPREAD

    def check(self) -> None:
        """Raises: UserError for what cannot be drawn."""
        if self.size < SMALLEST[self.level]:
            raise UserError(f"--size {self.size} is too small for --level {self.level}; wanted at least {SMALLEST[self.level]}")
        if self.count < 1:
            raise UserError(f"--count {self.count}; wanted at least 1")
        if not 0 <= self.wrong <= 1:
            raise UserError(f"--wrong {self.wrong}; wanted a share from 0 to 1")
        if not 0 <= self.spread <= 1:
            raise UserError(f"--spread {self.spread}; wanted a share from 0 to 1")

    def stream(self, purpose: str, index: int) -> random.Random:
        return random.Random(derive(self.seed, f"scenes {purpose}", index))


def described(options: SceneSet, index: int, scene: Scene) -> Scene:
    """The scene that picture `index` is captioned with: its own, or by the share `wrong` another of its level."""
    rng = options.stream("wrong", index)
    if rng.random() >= options.wrong:
        return scene
    while (other := random_scene(scene.level, rng, seen=True)) == scene:
        pass
    return other


def write_scene(root: Path, options: SceneSet, index: int) -> None:
    rng = options.stream("picture", index)
    scene = random_scene(options.level, rng, seen=True)
    picture = draw(scene, options.size, rng, options.spread)
    told, filler = described(options, index, scene), options.stream("words", index)
    lines = captions(told, options.language)
    if options.long:
        lines = [long_caption(told, filler, options.language) for _ in lines]
    write_pair(root, f"{index:05d}", picture, lines)


def write_some(indices: Iterable[int], root: Path, options: SceneSet) -> None:
    for index in indices:
        write_scene(root, options, index)


def write_scenes(root: Path, options: SceneSet) -> None:
    """images/NNNNN.png and captions/NNNNN.txt, one wording a line; picture i depends on level, size and seed alone.  On all cores.

    Raises: UserError for what cannot be drawn, for a folder that holds pictures already, and where a process died.
    """
    options.check()
    make_folders(root)
    if any((root / "images").iterdir()):
        raise UserError(f"{root / 'images'} is not empty; remove it, or give --out another folder")
    numbers = range(options.count)
    parts = [numbers[first : first + 256] for first in range(0, options.count, 256)]
    with closing(
        in_processes(partial(write_some, root=root, options=options), parts, min(own_cores(), len(parts)), f"remove {root / 'images'} and try again")
    ) as done:
        for _ in done:
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder for images/ and captions/")
    parser.add_argument("--level", choices=tuple(SMALLEST), default="two", help="mixed: all four, of one size; mixed-hard: mostly three and count")
    parser.add_argument("--count", type=int, default=20_000, help="number of pictures")
    parser.add_argument("--size", type=int, default=32, help="width and height in pixels; three, count and both mixed want 64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--language", choices=("ja", "en"), default="ja")
    parser.add_argument("--long", action="store_true", help="put about 120 characters (English: 470) of unrelated text before each caption")
    parser.add_argument("--wrong", type=float, default=0.0, help="share of pictures with the captions of another scene")
    parser.add_argument("--spread", type=float, default=SPREAD, help="how far from the middle related things may stand: 0 not at all, 1 anywhere")
    parser.add_argument("--corpus", type=Path, default=None, help="also (or, without --out, only) write text for demo.tiny_llm into this file")
    parser.add_argument("--words", type=Path, default=None, help="also write the words that captions are made of into this file, for --words of demo.tiny_llm")
    args = parser.parse_args()
    try:
        if not (args.out or args.corpus or args.words):
            raise UserError("nothing to write; give --out, --corpus, --words, or several")
        if args.out:
            write_scenes(args.out, SceneSet(args.level, args.count, args.size, args.seed, args.language, args.wrong, args.long, args.spread))
            print(f"{args.count} captioned pictures in {args.out}")
        if args.words:
            args.words.write_text("\n".join(words(args.language)) + "\n", encoding="utf-8")
        if args.corpus:
            lines = corpus(args.language, args.long)
            args.corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{len(lines)} lines of text in {args.corpus}")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
