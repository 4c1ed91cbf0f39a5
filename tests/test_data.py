"""Folders to samples: pairs, errors, the crop, broken files, and the stream of samples."""

import io
import os
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, child, ended, open_text
from PIL import Image, ImageOps, PngImagePlugin

from config import Data, DiffusionConfig
from datasets import transforms
from datasets.imagenet import ClassFolder
from datasets.source import hold_out, workers
from datasets.stream import Collate, PackedStrings, PictureDataset, Shuffle, StreamSampler, View
from datasets.text_image import names_below
from datasets.transforms import center_crop, open_rgb, random_crop, to_uint8
from denoiser import sample_time
from evaluation.references import read_pictures
from util.errors import UserError
from util.randomness import stream


def test_pairs_of_any_depth_case_and_extension(tmp_path):
    for name in ("images/深い/a.JPG", "images/b.c.WebP", "images/x.jpeg", "captions/深い/a.txt", "captions/b.c.txt", "captions/x.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("images"):
            Image.new("RGB", (9, 9)).save(path)
        else:
            path.write_bytes("\ufeff一行目\r\n\r\n 二行目 \n".encode())
    data = open_text(tmp_path, 8)
    assert len(data) == 3 and list(data.captions) == ["一行目", "二行目"] * 3
    assert data.distinct_captions() == ["一行目", "二行目"]
    assert {data.condition(1, n) for n in range(20)} == {2, 3}  # numbers of picture 1's lines
    assert [data.condition(0, n) for n in range(20)] == [data.condition(0, n) for n in range(20)]


def test_folders_behind_links_are_part_of_the_data_and_links_in_a_circle_end(text_data, tmp_path):
    for name in ("images", "captions"):
        (text_data / name).rename(tmp_path / name)
        (text_data / name).mkdir()
        (text_data / name / "linked").symlink_to(tmp_path / name)
        (tmp_path / name / "round").symlink_to(text_data / name)
        (tmp_path / name / "itself").symlink_to(tmp_path / name / "itself")
        (tmp_path / name / "nowhere").symlink_to(tmp_path / "nothing")
    (text_data / "images" / "own").mkdir()
    (text_data / "images" / "own again").symlink_to(text_data / "images" / "own")
    (tmp_path / "images" / "0.png").rename(text_data / "images" / "own" / "0.png")
    (text_data / "captions" / "own").mkdir()
    (tmp_path / "captions" / "0.txt").rename(text_data / "captions" / "own" / "0.txt")
    data = open_text(text_data)
    assert [Path(path).relative_to(text_data).as_posix() for path in data.paths] == [*(f"images/linked/{i}.png" for i in range(1, 8)), "images/own/0.png"]
    assert [*data.captions] == [CAPTIONS[i % len(CAPTIONS)] for i in (*range(1, 8), 0)]


def test_files_of_a_tree_without_links_come_in_the_order_of_their_parts(tmp_path):
    for name in ("a/b/c.png", "a/b.png", "a-b/c.png", "a.png", "a/Ω/が.png", "A/x.png", ".hidden/a.png", "a b/z.png", "a/b-c/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(names_below(tmp_path)) == [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]


def test_everything_wrong_with_a_folder_is_one_error_with_counts_and_names(text_data, capsys):
    (text_data / "captions" / "0.txt").unlink()
    (text_data / "captions" / "1.txt").write_text(" \n\n", encoding="utf-8")
    (text_data / "images" / "2.png").unlink()
    with pytest.raises(UserError) as error:
        open_text(text_data)
    message = str(error.value)
    assert "1 pictures without a caption file (0)" in message and "1 caption files without a line of text (1)" in message
    assert "1 caption files without a picture (2)" in message and "--missing_captions skip" in message and "\n" not in message
    data = open_text(text_data, missing="skip")
    assert len(data) == 5 and "left out 1 pictures without a caption file (0)" in capsys.readouterr().out


def test_folders_that_are_not_there_or_empty_or_of_the_other_kind(tmp_path, class_data, text_data):
    with pytest.raises(UserError, match="class model is meant"):
        open_text(class_data)
    with pytest.raises(UserError, match="-Text model is meant"):
        ClassFolder(text_data, 10, View(16))
    (tmp_path / "images").mkdir()
    (tmp_path / "captions").mkdir()
    with pytest.raises(UserError, match="no captioned pictures"):
        open_text(tmp_path)
    (text_data / "captions" / "0.txt").write_bytes("赤い三".encode("shift_jis"))
    with pytest.raises(UserError, match="not UTF-8.*iconv"):
        open_text(text_data)


def test_class_folders_are_numbered_by_name_and_checked_against_class_num(class_data):
    data = ClassFolder(class_data, 3, View(8, hflip=True))
    assert len(data) == 12 and data.labels == (0,) * 4 + (1,) * 4 + (2,) * 4 and data.view.hflip
    with pytest.raises(UserError, match="3 class folders, but --class_num is 2"):
        ClassFolder(class_data, 2, View(16))
    (class_data / "train" / "n04").mkdir()
    with pytest.raises(UserError, match="n04"):
        ClassFolder(class_data, 10, View(16))


def test_center_crop_halves_by_box_then_bicubic_then_cuts_the_middle():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (130, 70, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(center_crop(image, 70)), np.asarray(image)[30:100])  # no resizing: the plain middle
    halves = np.asarray(image, dtype=float)[:, :].reshape(65, 2, 35, 2, 3).mean((1, 3))
    box = np.asarray(center_crop(image, 35), dtype=float)
    assert np.abs(box - halves[15:50]).max() <= 1  # Pillow rounds twice, once a direction
    half = image.resize((35, 65), Image.Resampling.BOX)
    small = half.resize((20, 37), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(center_crop(image, 20)), np.asarray(small)[8:28])
    assert center_crop(Image.new("RGB", (3, 9)), 16).size == (16, 16)


def shrunk(image: Image.Image, short: int) -> Image.Image:
    """As a whole, however long it gets."""
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(5, 7), (40, 30), (33, 130), (300, 41), (16, 16), (1, 1), (1, 300), (700, 3)])
def test_a_square_is_cut_out_of_the_whole_shrunk_picture_or_made_alone_where_that_is_too_long(size, monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    whole = shrunk(image, 16)
    left, top = (whole.width - 16) // 2, (whole.height - 16) // 2
    middle, large = whole.crop((left, top, left + 16, top + 16)), shrunk(image, 18)  # (20 - 16 + 1) * 0.5 more
    left, top = int(0.3 * (large.width - 15)), int(0.9 * (large.height - 15))
    anywhere = large.crop((left, top, left + 16, top + 16))
    assert np.array_equal(center_crop(image, 16), middle) and np.array_equal(random_crop(image, 16, (0.5, 0.3, 0.9)), anywhere)
    monkeypatch.setattr(transforms, "MOST_PIXELS", 0)
    for alone, wanted in ((center_crop(image, 16), middle), (random_crop(image, 16, (0.5, 0.3, 0.9)), anywhere)):
        assert np.abs(np.asarray(alone, dtype=int) - np.asarray(wanted, dtype=int)).max() <= 1


def test_a_line_of_pixels_is_never_enlarged_as_a_whole(monkeypatch):
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest, **more: made.append(size) or resize(self, size, *rest, **more))
    ramp = np.repeat(np.arange(20000) // 100, 3).reshape(1, -1, 3).astype(np.uint8)
    found = np.asarray(center_crop(Image.fromarray(ramp), 256))  # 5,120,000 x 256 as a whole
    assert found.shape == (256, 256, 3) and {99, 100} == set(found.flatten().tolist()) and made == [(256, 256)]
    assert np.asarray(random_crop(Image.fromarray(ramp.transpose(1, 0, 2)), 256, (0.5, 0, 0.999))).min() >= 198


def test_odd_pictures_become_rgb(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert np.asarray(open_rgb(str(tmp_path / "clear.png"))).min() == 255  # transparency lies on white
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_rgb(str(tmp_path / "turned.jpg")).size == (2, 4)
    for mode in ("L", "CMYK", "P", "1", "LA"):
        file = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (4, 4)).save(file)
        assert to_uint8(open_rgb(str(file))).shape == (3, 4, 4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_all_eight_orientations_are_turned_upright_as_pillow_does(kind):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    shapes = set()
    for orientation in range(10):  # 0 and 9 mean nothing
        exif, file = image.getexif(), io.BytesIO()
        exif[0x0112] = orientation
        image.save(file, kind, exif=exif)
        with Image.open(file) as opened:
            wanted = ImageOps.exif_transpose(opened).convert("RGB")
        assert np.array_equal(open_rgb(file), wanted)
        shapes.add(wanted.size)
    assert shapes == {(24, 16), (16, 24)}


def test_damaged_exif_breaks_no_picture():
    image = Image.new("RGB", (24, 16))
    entries = [(0x0111, 2, 4, b"abc\0"), (0x0112, 3, 1, b"\0\x06\0\0")]  # text where a number belongs, and an orientation
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + b"".join(struct.pack(">HHI4s", *entry) for entry in entries) + bytes(4)
    image.save(file := io.BytesIO(), "JPEG", exif=exif)
    assert open_rgb(file).size == (16, 24)
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n8\nno hexadecimal")
    image.save(file := io.BytesIO(), "PNG", pnginfo=text)
    assert open_rgb(file).size == (24, 16)


def test_sixteen_bit_greys_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert np.abs(np.asarray(open_rgb(str(tmp_path / "deep.png")))[..., 0].ravel() - np.arange(256.0)).max() <= 1


def test_a_broken_picture_is_replaced_and_named(text_data):
    (text_data / "images" / "3.png").write_bytes(b"no picture")
    data = open_text(text_data, 16)
    picture, caption, n, broken = data[3, 77]
    assert torch.equal(picture, data.picture(4)) and data.captions[caption] == CAPTIONS[4] and n == 77
    assert len(broken) == 1 and "3.png" in broken[0]


def test_what_is_no_picture_is_told_in_the_same_words_each_time(tmp_path):
    (tmp_path / "0.png").write_bytes(b"no picture")
    for file, words in ((io.BytesIO(b"no picture"), "cannot identify image file"), (str(tmp_path / "0.png"), f"cannot identify image file '{tmp_path}/0.png'")):
        with pytest.raises(OSError) as error:
            open_rgb(file)
        assert str(error.value) == words  # and no address of a stream


def test_flip_is_off_for_text_and_a_function_of_the_sample_number(text_data, class_data):
    plain, flipped = open_text(text_data, 16), open_text(text_data, 16, hflip=True)
    assert all(torch.equal(plain[0, n][0], plain.picture(0)) for n in range(20))
    flips = [torch.equal(flipped[0, n][0], plain.picture(0).flip(-1)) for n in range(40)]
    assert 8 < sum(flips) < 32 and flips == [torch.equal(flipped[0, n][0], plain.picture(0).flip(-1)) for n in range(40)]


def test_batches(text_data, class_data):
    text, classes = open_text(text_data, 16), ClassFolder(class_data, 3, View(16, hflip=True))
    plain, looks_up = (Collate(look_up, DiffusionConfig(), 0.1, seed=0) for look_up in (None, lambda lines: lines * 10))
    batch = plain([text[0, 5], text[1, 6]])
    assert batch.pictures.shape == (2, 3, 16, 16) and batch.pictures.dtype == torch.uint8
    assert [text.captions[line] for line in batch.y] == CAPTIONS[:2] and batch.numbers == [5, 6] and batch.broken == []
    assert plain([classes[0, 5], classes[11, 6]]).y.tolist() == [0, 2]
    assert looks_up([text[0, 5], text[1, 6]]).y.tolist() == [0, 10]


def test_a_batch_carries_the_times_and_dropped_rows_that_its_samples_numbers_decide(text_data):
    data, numbers = open_text(text_data, 16), range(1000, 1128)
    batch = Collate(None, DiffusionConfig(), 0.25, seed=7)([data[n % 8, n] for n in numbers])
    times = [torch.randn((), generator=stream(7, "t", n)) for n in numbers]
    assert np.array_equal(batch.t, sample_time(torch.stack(times), DiffusionConfig()).numpy())
    assert batch.dropped.tolist() == [torch.rand(1, generator=stream(7, "drop", n)).item() < 0.25 for n in numbers]
    assert 10 < batch.dropped.sum() < 60


def test_packed_strings_are_the_strings():
    strings = ["", "赤い三", "a", "", "𠮷野家🍚", "\udcff of a file name", "末"]
    packed = PackedStrings(strings)
    assert list(packed) == strings and packed[-1] == "末" and len(packed) == 7
    assert len(PackedStrings([])) == 0
    with pytest.raises(IndexError):
        packed[7]


def test_at_most_a_hundredth_is_held_out_and_never_trained_on():
    class Pictures:
        in_blocks = False

        def __init__(self, size):
            self.size = size

        def __len__(self):
            return self.size

    for size, wanted, count in [(8, 64, 0), (640, 64, 6), (10000, 64, 64), (10000, 0, 0)]:
        order, held = hold_out(Pictures(size), wanted, seed=1)
        assert len(held) == count and sorted([*order.pictures.tolist(), *held.tolist()]) == list(range(size))
    order, _ = hold_out(Pictures(640), 64, seed=1)
    assert {index for index, _ in StreamSampler(order, 10, range(200), 0, 1)} == set(order.pictures.tolist())


def stream_of(world: int, batch: int, batches: range = range(6), size: int = 10) -> list[list[tuple[int, int]]]:
    parts = [list(StreamSampler(Shuffle(torch.arange(size), seed=1), batch, batches, rank, world)) for rank in range(world)]
    return [sum((part[i * batch : (i + 1) * batch] for part in parts), []) for i in range(len(batches))]


def test_sample_n_is_picture_n_of_the_endless_shuffles():
    for size in (3, 10, 64):  # a batch of 4 begins, ends and lies across shuffles, and holds whole ones
        pictures = torch.arange(100, 100 + size)
        sampler = StreamSampler(Shuffle(pictures, seed=1), 4, range(5, 40), 0, 1)
        shuffles = [pictures[torch.randperm(size, generator=stream(1, "order", k))] for k in range(160 // size + 1)]
        assert list(sampler) == [(int(shuffles[n // size][n % size]), n) for n in range(20, 160)]
        assert sampler.pictures_of(7, 2) == [int(shuffles[n // size][n % size]) for n in range(28, 36)]


def test_ranks_share_the_same_global_batches():
    assert stream_of(1, 4) == stream_of(2, 2) == stream_of(4, 1)


def test_every_picture_once_a_pass_in_a_new_order_each():
    samples = sum(stream_of(1, 5), [])
    passes = [[index for index, n in samples if n // 10 == k] for k in range(3)]
    assert all(sorted(order) == list(range(10)) for order in passes) and passes[0] != passes[1] != passes[2]
    assert [n for _, n in samples] == list(range(30))


def test_a_run_that_goes_on_takes_the_batches_that_were_left():
    assert stream_of(2, 2, range(12)) == stream_of(2, 2, range(5)) + stream_of(2, 2, range(5, 12))


def test_the_demo_holds_a_tenth_of_the_pairs_out(tmp_path):
    from datasets.demo import COLOURS, HELD_OUT, digit_captions, write_digits

    count = write_digits(tmp_path, 16)
    data = open_text(tmp_path, 16)
    assert len(data) == count and len(COLOURS) >= 6 and len(HELD_OUT) == len(COLOURS) * 10 // 10
    for pair in HELD_OUT:
        assert not set(digit_captions(*pair)) & set(data.distinct_captions())
    pairs = [(colour, digit) for colour in COLOURS for digit in range(10) if (colour, digit) not in HELD_OUT]
    assert set(data.distinct_captions()) == {caption for pair in pairs for caption in digit_captions(*pair)}


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    found = []
    for ranks in (1, 4, 8, 32):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        found.append(workers(Data(workers=12)))
    assert found == [12, 4, 2, 1] and workers(Data(workers=0)) == 0


def test_a_loader_process_that_dies_while_statistics_are_made_is_an_error_with_its_cause(text_data, capfd):
    def work():
        PictureDataset.picture = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        list(read_pictures(open_text(text_data), range(8), num_workers=1))

    assert ended(child(work)) == 1
    printed = capfd.readouterr().out
    assert "a loader process died (DataLoader worker" in printed and "--num_workers" in printed
