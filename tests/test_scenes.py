"""Drawn scenes: what their captions say is what is drawn, nothing held out is trained on, and the judge tells right from wrong."""

import os
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from datasets import scenes
from datasets.scenes import (
    HELD_OUT_COUNTS,
    HELD_OUT_PAIRS,
    INVERSE,
    LEVELS,
    OUTLINES,
    PAIRS,
    PLACES,
    SMALLEST,
    Scene,
    SceneSet,
    Spot,
    Thing,
    captions,
    corpus,
    draw,
    draw_spots,
    layout,
    long_caption,
    noun,
    random_scene,
    write_scenes,
)
from demo import tiny_llm
from demo.scene_judge import Verdict, find_things, judge, rates
from util.errors import UserError

RED_DISC, BLUE_SQUARE, GREEN_STAR = Thing("丸", "赤"), Thing("四角", "青"), Thing("星", "緑")
TWO = Scene("two", (RED_DISC, BLUE_SQUARE), relations=((0, "右", 1),))
THREE = Scene("three", (RED_DISC, BLUE_SQUARE, GREEN_STAR), relations=((0, "右", 1), (2, "上", 0)))
COUNT = Scene("count", (RED_DISC, BLUE_SQUARE), counts=(3, 2))
COLOUR_WORDS = ("赤", "橙", "黄", "緑", "水色", "青", "紫", "桃", "オレンジ", "ピンク")
ONE = Scene("one", (RED_DISC,), place="左上")


def blurred(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A little blur, and noise of 8 of 255."""
    rgb = ndimage.gaussian_filter(np.asarray(picture, dtype=np.float32), (0.4, 0.4, 0))
    return Image.fromarray((rgb + rng.normal(0, 8, rgb.shape)).clip(0, 255).round().astype(np.uint8))


def verdict_on(drawn: Scene, asked: Scene) -> Verdict:
    """Of several drawings of one scene, judged as another; all must be judged alike."""
    rng = random.Random(0)
    found = {judge(draw(drawn, SMALLEST[drawn.level], rng), asked) for _ in range(5)}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_the_judge_is_right_on_drawn_scenes(level, seen):
    rng, noise = random.Random(1), np.random.default_rng(1)
    chosen = [random_scene(level, rng, seen) for _ in range(250)]
    verdicts = [judge(blurred(draw(scene, SMALLEST[level], rng), noise), scene) for scene in chosen]
    assert rates(verdicts)["everything"][0] >= 0.995


@pytest.mark.parametrize("scene", [ONE, TWO, THREE, COUNT], ids=LEVELS)
def test_the_judge_sees_what_is_wrong_with_a_thing(scene):
    others = scene.things[1:]
    assert verdict_on(scene, scene).everything
    assert verdict_on(replace(scene, things=(Thing("丸", "緑"), *others)), scene) == Verdict(True, False, False, True)
    assert verdict_on(replace(scene, things=(Thing("ハート", "赤"), *others)), scene) == Verdict(False, True, False, True)


@pytest.mark.parametrize("scene", [TWO, THREE], ids=["two", "three"])
def test_exchanged_colours_are_a_wrong_binding_of_right_words(scene):
    exchanged = (Thing("丸", "青"), Thing("四角", "赤"), *scene.things[2:])
    assert verdict_on(replace(scene, things=exchanged), scene) == Verdict(True, True, False, True)


def test_exchanged_colours_of_counted_things_are_wrong_too():
    assert verdict_on(replace(COUNT, things=(Thing("丸", "青"), Thing("四角", "赤"))), COUNT) == Verdict(True, False, False, True)  # 3 blue, 2 red
    assert verdict_on(replace(COUNT, counts=(3, 3), things=(Thing("丸", "青"), Thing("四角", "赤"))), replace(COUNT, counts=(3, 3))).colour


def test_a_wrong_place_relation_or_count_is_all_that_is_wrong():
    only_that = Verdict(True, True, True, False)
    for place in PLACES:
        assert verdict_on(replace(ONE, place=place), ONE).relation == (place == ONE.place)
    for relation in INVERSE:
        wanted = Verdict(True, True, True, True) if relation == "右" else only_that
        assert verdict_on(replace(TWO, relations=((0, relation, 1),)), TWO) == wanted
    assert verdict_on(replace(THREE, relations=((0, "右", 1), (2, "下", 0))), THREE) == only_that
    assert verdict_on(replace(COUNT, counts=(3, 3)), COUNT) == Verdict(False, False, False, False)  # the multisets hold the counts


@pytest.mark.parametrize("scene", [ONE, TWO, THREE, COUNT], ids=LEVELS)
def test_a_thing_too_few_or_too_many_is_wrong(scene):
    size, spots = SMALLEST[scene.level], layout(scene, random.Random(0))
    radius = 0.7 * spots[0].radius  # a smaller one counts too
    assert judge(draw_spots(spots, size), scene).everything
    without = judge(draw_spots(spots[1:], size), scene)
    assert not (without.shape or without.colour or without.binding or without.relation)
    free = [
        Spot(thing, x, y, radius)
        for thing in (GREEN_STAR, spots[0].thing)
        for x in np.linspace(0.15, 0.85, 15)
        for y in np.linspace(0.15, 0.85, 15)
        if all(max(abs(x - spot.x), abs(y - spot.y)) > spot.radius + radius + 2 / size for spot in spots)
    ]
    assert {spot.thing for spot in free} == {GREEN_STAR, spots[0].thing}
    for extra in free[:: len(free) // 6 + 1]:
        with_one_more = judge(draw_spots([*spots, extra], size), scene)
        assert not (with_one_more.shape or with_one_more.colour or with_one_more.binding)


def test_specks_and_an_empty_picture():
    picture = draw(TWO, 32, random.Random(0))
    picture.putpixel((0, 0), (0, 0, 255))
    assert judge(picture, TWO).everything
    assert judge(Image.new("RGB", (32, 32), "white"), TWO) == Verdict(False, False, False, False)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert not judge(noise, COUNT).everything
    grey = Image.fromarray(np.asarray(picture.convert("L").convert("RGB")))
    assert [found.thing.colour for found in find_things(grey, "two")] == ["", ""]


def test_touching_things_of_two_colours_are_two_and_of_one_colour_no_shape():
    side_by_side = [Spot(BLUE_SQUARE, 0.35, 0.5, 0.16), Spot(Thing("四角", "赤"), 0.35 + 2 * 0.85 * 0.16, 0.5, 0.16)]
    assert [found.thing for found in find_things(draw_spots(side_by_side, 64), "two")] == [BLUE_SQUARE, Thing("四角", "赤")]
    (merged,) = find_things(draw_spots([replace(spot, thing=Thing("丸", "青")) for spot in side_by_side], 64), "two")
    assert merged.thing == Thing("", "青")


def test_rates_are_exact_intervals():
    table = rates([Verdict(True, True, False, True)] * 10)
    assert table["shape"] == pytest.approx((1, 0.025**0.1, 1)) and table["everything"] == pytest.approx((0, 0, 1 - 0.025**0.1))
    assert list(table) == ["shape", "colour", "binding", "relation", "everything"]


@pytest.mark.parametrize("level", LEVELS)
def test_things_stand_apart_and_inside(level):
    rng, pixel = random.Random(2), 1 / SMALLEST[level]
    for _ in range(300):
        spots = layout(random_scene(level, rng, seen=True), rng)
        for one, other in combinations(spots, 2):
            assert max(abs(one.x - other.x), abs(one.y - other.y)) - one.radius - other.radius > 1.99 * pixel
        assert all(spot.radius < min(spot.x, spot.y, 1 - spot.x, 1 - spot.y) for spot in spots)
        assert {4.5 * pixel < spot.radius < 8 * pixel for spot in spots} == {True}


def test_a_fifth_of_the_pairs_and_a_tenth_of_the_counts_are_held_out():
    assert len(PAIRS) == 48 and len(set(HELD_OUT_PAIRS)) == 10
    for kind, known in (("colour", 4), ("shape", 6)):
        held = [getattr(pair, kind) for pair in HELD_OUT_PAIRS]
        seen = [getattr(pair, kind) for pair in PAIRS if pair not in HELD_OUT_PAIRS]
        assert set(held) == {getattr(pair, kind) for pair in PAIRS} and all(seen.count(value) >= known for value in held)
    assert len(HELD_OUT_COUNTS) == 19 and not {pair for _, pair in HELD_OUT_COUNTS} & set(HELD_OUT_PAIRS)
    rng = random.Random(3)
    unseen = [random_scene("count", rng, seen=False) for _ in range(200)]
    by_count_alone = [scene for scene in unseen if not set(scene.things) & set(HELD_OUT_PAIRS)]
    assert 10 < len(by_count_alone) < 100 and all(set(zip(scene.counts, scene.things)) & HELD_OUT_COUNTS for scene in by_count_alone)


@pytest.mark.parametrize(("level", "shares"), [("mixed", [0.25] * 4), ("mixed-hard", [0.05, 0.1, 0.35, 0.5])])
def test_mixed_scenes_are_of_all_levels(level, shares):
    rng = random.Random(0)
    found = Counter(random_scene(level, rng, seen=True).level for _ in range(4000))
    assert [found[one] / 4000 for one in LEVELS] == pytest.approx(shares, abs=0.03)


def test_nothing_held_out_is_in_a_training_set(tmp_path):
    write_scenes(tmp_path, SceneSet("mixed", count=400, size=64, wrong=0.5))
    text = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "captions").iterdir())
    assert [pair for pair in PAIRS if noun(pair, "ja") not in text] == sorted(HELD_OUT_PAIRS, key=PAIRS.index)
    counted = [(count, noun(pair, "ja"), scenes.COUNTERS["ja"][count]) for count, pair in HELD_OUT_COUNTS]
    assert not [name for _, name, counter in counted if f"{name}が{counter}" in text or f"{counter}の{name}" in text]
    for path in sorted((tmp_path / "images").iterdir())[:100]:
        assert not {found.thing for found in find_things(Image.open(path), "three")} & set(HELD_OUT_PAIRS)


def named(language: str) -> dict[str, Thing]:
    return {noun(pair, language, article=""): pair for pair in PAIRS}


def clauses(caption: str, language: str) -> list[tuple[Thing, str, Thing]]:
    """(a, relation, b) for each 'a is `relation` of b' in a caption, read by the order of its words and the particles between them."""
    names, found = named(language), []
    thing = "(" + "|".join(names) + ")"
    for clause in caption.split("、" if language == "ja" else ", and "):
        if language == "ja":
            relation = "([右左上下])"
            if match := re.fullmatch(f"{thing}の{relation}に{thing}があ[るり]", clause):
                b, word, a = match.groups()
            else:
                a, b, word = re.fullmatch(f"{thing}が{thing}の{relation}にあ[るり]", clause).groups()
        else:
            words = {"to the right of": "右", "to the left of": "左", "above": "上", "below": "下"}
            relation, article = "(" + "|".join(words) + ")", "(?:an?|the) "
            if match := re.fullmatch(f"{article}{thing} is {relation} {article}{thing}", clause):
                a, word, b = match.groups()
            else:
                word, b, a = re.fullmatch(f"{relation} {article}{thing} there is {article}{thing}", clause).groups()
            word = words[word]
        found.append((names[a], word, names[b]))
    return found


@pytest.mark.parametrize("language", ["ja", "en"])
@pytest.mark.parametrize("level", ["two", "three"])
def test_every_wording_of_a_relation_is_true_of_the_picture(level, language):
    rng, first = random.Random(4), set()
    for _ in range(150):
        scene = random_scene(level, rng, seen=False)
        at = {spot.thing: (spot.x, spot.y) for spot in layout(scene, rng)}
        lines = captions(scene, language)
        assert len(set(lines)) == 4
        for line in lines:
            read = clauses(line, language)
            assert len(read) == len(scene.relations) and {thing for a, _, b in read for thing in (a, b)} == set(scene.things)
            for a, word, b in read:
                dx, dy = at[a][0] - at[b][0], at[a][1] - at[b][1]
                assert {"右": dx > 3 * abs(dy), "左": -dx > 3 * abs(dy), "下": dy > 3 * abs(dx), "上": -dy > 3 * abs(dx)}[word], line
            places = [line.index(noun(thing, language, article="")) for thing in scene.things]
            first.add(places.index(min(places)))
    assert first == set(range(len(scene.things)))  # any of them may be named first


@pytest.mark.parametrize("language", ["ja", "en"])
def test_places_and_counts_are_named_rightly(language):
    rng = random.Random(5)
    for _ in range(100):
        scene = random_scene("one", rng, seen=True)
        (spot,) = layout(scene, rng)
        across = "左" if spot.x < 0.4 else "右" if spot.x > 0.6 else "真ん"
        down = "上" if spot.y < 0.4 else "下" if spot.y > 0.6 else "中"
        place = across + down if language == "ja" else scenes.ENGLISH[across + down]
        for line in captions(scene, language):
            assert place in line and noun(scene.things[0], language) in line
        scene = random_scene("count", rng, seen=True)
        drawn = [found.thing for found in find_things(draw(scene, 64, rng), "count")]
        for line in captions(scene, language):
            for thing in scene.things:
                name, count = noun(thing, language, article=""), scenes.COUNTERS[language][drawn.count(thing)]
                wordings = (f"{name}が{count}", f"{count}の{name}") if language == "ja" else (f"{count} {name}",)
                assert any(wording in line for wording in wordings), line


def test_english_captions_are_english():
    assert captions(TWO, "en")[0] == "a red circle is to the right of a blue square"
    assert captions(Scene("one", (Thing("ハート", "橙"),), place="真ん中"), "en")[0] == "there is an orange heart in the middle"
    assert captions(Scene("count", (Thing("十字", "水"), RED_DISC), counts=(2, 1)), "en")[0] == "two cyan crosses and one red circle"
    assert captions(THREE, "en")[0] == "the red circle is to the right of the blue square, and the green star is above the red circle"


@pytest.mark.parametrize("language", ["ja", "en"])
def test_a_long_caption_says_nothing_before_its_last_clause(language):
    words = [*COLOUR_WORDS, *OUTLINES, *PLACES, *INVERSE, *"一二三四五"] if language == "ja" else [*scenes.ENGLISH.values(), *scenes.COUNTERS["en"][1:]]
    bounds = "{}" if language == "ja" else r"\b{}s?\b"
    assert len(scenes.FILLER[language]) >= 20
    assert not [(word, text) for text in scenes.FILLER[language] for word in words if re.search(bounds.format(word), text.lower())]
    rng, found = random.Random(6), set()
    for _ in range(50):
        scene = random_scene("two", rng, seen=True)
        text = long_caption(scene, rng, language)
        (end,) = [line for line in captions(scene, language) if text.endswith(line)]
        found.add(filler := text.removesuffix(end))
        assert len(filler) >= {"ja": 110, "en": 450}[language] and (language == "en" or len(filler) < 140)  # more than 100 tokens of one character each
    assert len(found) == 50


def contents(root) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_data_set_is_a_function_of_its_options(tmp_path):
    sets = {
        "first": SceneSet("two", 30),
        "again": SceneSet("two", 30),
        "longer": SceneSet("two", 40),
        "other": SceneSet("two", 30, seed=1),
        "wrong": SceneSet("two", 30, wrong=0.5),
        "all wrong": SceneSet("two", 30, wrong=1.0),
    }
    for name, options in sets.items():
        write_scenes(tmp_path / name, options)
    first, longer, wrong, all_wrong = (contents(tmp_path / name) for name in ("first", "longer", "wrong", "all wrong"))
    assert len(first) == 60 and contents(tmp_path / "again") == first and first.items() <= longer.items()
    assert not set(contents(tmp_path / "other").items()) & {item for item in first.items() if item[0].startswith("images")}
    changed = [name for name in first if first[name] != wrong[name]]
    assert all(name.startswith("captions") for name in changed) and 5 < len(changed) < 25
    assert [name for name in first if first[name] == all_wrong[name]] == [name for name in first if name.startswith("images")]


@pytest.mark.parametrize("language", ["ja", "en"])
def test_the_corpus_names_every_pair_in_every_kind_of_sentence(language):
    lines = corpus(language)
    assert len(lines) == len(set(lines)) == 20_000 and lines == corpus(language)
    kinds = {  # a mark of each of four kinds of sentence at each level
        "ja": ("に.*がある$", "にある$", "にある", "場所", "に.*があり、.*がある$", "にあり、.*にある$", "[^の]つと.*つある$", "つの.*つの.*がある$"),
        "en": (
            "^there is",
            "^in the",
            "in the",
            "is in the",
            "^(above|to) [^,]*$",
            "^an? .* is (above|to)",
            "^the .*, and the ",
            "^(two|three) ",
            "^a picture of",
        ),
    }[language]
    for kind in kinds:
        text = "\n".join(line for line in lines if re.search(kind, line))
        assert [pair for pair in PAIRS if noun(pair, language, article="") not in text] == [], kind
    assert max(map(len, lines)) < 140 < max(map(len, corpus(language, long=True, lines=1000)))


@pytest.mark.parametrize(("language", "longest"), [("ja", 1), ("en", 3)])
def test_an_unseen_scene_is_told_in_seen_tokens(language, longest):
    tokenizer, rng = tiny_llm.train_tokenizer(corpus(language), longest=longest), random.Random(7)

    def tokens(seen: bool, count: int) -> list[list[int]]:
        return tokenizer([line for _ in range(count) for line in captions(random_scene("two", rng, seen), language)])["input_ids"]

    known, new = tokens(True, 2000), tokens(False, 500)
    assert {token for line in new for token in line} <= {token for line in known for token in line}
    assert max(map(len, known + new)) < 32


def run_main(module, monkeypatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    module.main()


def test_related_things_stand_as_far_from_the_middle_as_they_may():
    def middles(spread):
        spots = [layout(TWO, random.Random(i), spread) for i in range(200)]  # side by side: up and down there is room
        return [abs((a.y + b.y) / 2 - 0.5) for a, b in spots]

    assert max(middles(0)) < 1.6 / 32 < max(middles(0.15)) < 3.5 / 32 and max(middles(1)) > 8 / 32
    with pytest.raises(UserError, match=re.escape("--spread 1.5; wanted a share from 0 to 1")):
        SceneSet(spread=1.5).check()


def test_the_command_lines(tmp_path, monkeypatch, capsys):
    text, out = tmp_path / "corpus.txt", tmp_path / "data"
    run_main(scenes, monkeypatch, "--out", str(out), "--level", "count", "--count", "3", "--size", "64", "--long", "--corpus", str(text))
    assert "3 captioned pictures" in capsys.readouterr().out and len(text.read_text(encoding="utf-8").splitlines()) == 20_000
    for argv in (["--out", str(out)], ["--out", "x", "--level", "three"], ["--out", "x", "--wrong", "1.5"], []):
        with pytest.raises(SystemExit, match="^error: "):
            run_main(scenes, monkeypatch, *argv)
    with pytest.raises(UserError, match="not empty"):
        write_scenes(out, SceneSet("two", 1))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="a process died; remove .*killed/images and try again"):
        patch.setattr(scenes, "write_scene", lambda *_: os._exit(9))
        patch.setattr(scenes, "own_cores", lambda: 2)
        write_scenes(tmp_path / "killed", SceneSet("two", 300))
    text.write_text("\n".join(corpus("ja", lines=200)), encoding="utf-8")
    run_main(tiny_llm, monkeypatch, "--text", str(text), "--out", str(tmp_path / "llm"), "--steps", "1", "--longest", "1")
    assert "on 200 captions" in capsys.readouterr().out
    for argv in ([], ["--text", str(text), "--data_path", str(out)], ["--text", str(tmp_path / "none.txt")], ["--text", str(text), "--longest", "0"]):
        with pytest.raises(SystemExit):
            run_main(tiny_llm, monkeypatch, *argv, "--out", str(tmp_path / "llm"))


def test_with_words_for_pieces_an_unseen_scene_is_told_in_seen_tokens():
    tokenizer, rng = tiny_llm.train_tokenizer(corpus("ja"), words=scenes.words("ja")), random.Random(8)
    ids = {seen: {tuple(tokenizer(c)["input_ids"]) for _ in range(400) for c in captions(random_scene("two", rng, seen))} for seen in (True, False)}
    tokens = {seen: {token for line in lines for token in line} for seen, lines in ids.items()}
    assert tokens[False] <= tokens[True] and max(map(len, ids[True])) <= 12
    assert tokenizer.tokenize("赤い丸の右に青い四角がある") == ["赤い", "丸", "の", "右", "に", "青い", "四角", "がある"]
    assert "<unk>" not in tokenizer.tokenize("猫と𠮷")
