"""Data as people have it: the same pictures through every route, what is recognised as what, and rows that cannot be used."""

import io
import os
import re
import signal
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import child, ended, open_text
from PIL import Image

import datasets.tar
from benchmarks.data_routes import ROUTES, write_files, write_jsonl, write_route, write_tar
from datasets.captioned import several
from datasets.stream import PictureDataset, View
from datasets.transforms import center_crop, random_crop
from flags import parse
from main_jit import run as run_job
from util.broken import Broken
from util.errors import UserError

COUNT = 200


def captions_of(i: int) -> list[str]:
    """Of one picture: one, and of every third two."""
    return [f"{i}番目の赤い丸、「青」と", f"{i}番の絵"][: 1 + (i % 3 == 0)]


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """PNG files."""
    rng, found = np.random.default_rng(0), []
    for _ in range(COUNT):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def write(route: str, root: Path, pictures: list[bytes]) -> tuple[Path, dict]:
    if route != "bytes.parquet":
        return write_route(route, root, pictures, captions_of)
    root.mkdir()
    rows = {"jpg": pictures, "caption": [captions_of(i) for i in range(len(pictures))]}
    pyarrow.parquet.write_table(pyarrow.table(rows), root / "one.parquet")
    return root / "one.parquet", {"image_column": "jpg", "caption_column": "caption"}


@pytest.mark.parametrize("route", [*ROUTES[1:], "bytes.parquet"])
def test_every_route_gives_the_same_samples(route, pictures, tmp_path, capsys):
    wanted = open_text(write("folder", tmp_path / "folder", pictures)[0], 8)
    path, more = write(route, tmp_path / "route", pictures)
    data = open_text(path, 8, **more)
    assert f"{COUNT} pictures" in capsys.readouterr().out.splitlines()[-1] and len(data) == COUNT
    for n in range(40):
        index = 7 * n % COUNT
        (one, line, *_), (other, other_line, *_) = wanted[index, n], data[index, n]
        assert torch.equal(one, other)
        if route != "metadata.csv":  # which has no lists
            assert line == other_line and wanted.captions[line] == data.captions[other_line]
    if route != "metadata.csv":
        assert list(data.captions) == list(wanted.captions)


@pytest.mark.slow
def test_the_same_pictures_through_every_route_train_bit_identically(pictures, tmp_path, llm_folder):
    digests = {}
    for route in ("folder", "metadata.jsonl", "coco.json", "parquet", "tar"):
        path, more = write(route, tmp_path / route, pictures)
        flags = [word for name, value in more.items() for word in (f"--{name}", value)]
        run_job(parse(["--model", "JiT-Pico/8-Tokens", "--img_size", "16", "--data_path", str(path), "--output_dir", str(tmp_path / f"out-{route}"),
                       "--llm_model_name", str(llm_folder()), "--batch_size", "40", "--epochs", "1", "--num_workers", "0", "--max_text_len", "8", "--device", "cpu", *flags]))  # fmt: skip
        state = torch.load(tmp_path / f"out-{route}" / "checkpoint-last.pth", weights_only=True)["model"]
        digests[route] = {name: value.numpy().tobytes() for name, value in state.items()}
    assert all(digests[route] == digests["folder"] for route in digests)


def test_what_may_be_several_things_is_an_error_that_names_the_flag(pictures, tmp_path):
    path, _ = write("folder", tmp_path, pictures[:3])
    write_jsonl(path / "metadata.jsonl", [{"file_name": "images/0000001.png", "text": "別の"}])
    with pytest.raises(UserError, match="may be folder or table; say which by --data_format"):
        open_text(path)
    assert len(open_text(path, format="folder")) == 3 and list(open_text(path, format="table").captions) == ["別の"]
    (path / "metadata.csv").write_text("file_name,text\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds metadata.csv and metadata.jsonl; give one of them as --data_path"):
        open_text(path, format="table")


def test_what_img2dataset_writes_beside_its_shards_is_no_data(pictures, tmp_path):
    path, _ = write("tar", tmp_path, pictures[:6])
    pyarrow.parquet.write_table(pyarrow.table({"url": ["x"], "caption": ["y"]}), path / "00000.parquet")
    (path / "00000_stats.json").write_text("{}", encoding="utf-8")
    assert len(open_text(path)) == 6


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", '{"pic": "000.png", "text": "x"}\n', "no column image or file_name; there are pic, text. Name it by --image_column"),
    ("a.csv", "image,caption\n000.png,x\n", "no column text or texts; there are image, caption. Name it by --caption_column"),
    ("a.json", '{"images": []}', "wanted a list of rows, or COCO's images and annotations; it holds images"),
    ("a.json", "[", "cannot be read"),
    ("a.jsonl", "", "there are none"),
    ("a.xml", "", "wanted a folder, or a file that ends in .jsonl .csv .json .parquet .tar"),
    ("a.tar", "no tar", "cannot be read as a tar without compression"),
    ("none/b.jsonl", None, "is not there"),
])  # fmt: skip
def test_a_file_that_is_no_data_is_one_line(name, content, words, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        open_text(tmp_path / name)
    assert words in str(error.value) and "\n" not in str(error.value)
    if name == "a.csv":
        assert "--caption_column nothing" not in str(error.value)
        with pytest.raises(UserError, match="no column nothing; there are image, caption"):
            open_text(tmp_path / name, caption_column="nothing")


def test_a_shift_jis_table_and_a_parquet_file_of_names_and_a_missing_column(pictures, tmp_path):
    (tmp_path / "a.csv").write_bytes("image,text\n000.png,赤い\n".encode("shift_jis"))
    with pytest.raises(UserError, match="not UTF-8.*iconv"):
        open_text(tmp_path / "a.csv")
    pyarrow.parquet.write_table(pyarrow.table({"image": pictures[:2], "label": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="no column text or texts; there are image, label"):
        open_text(tmp_path / "b.parquet")
    with pytest.raises(UserError, match="column label holds int64, wanted pictures as bytes"):
        open_text(tmp_path / "b.parquet", format="parquet", image_column="label", caption_column="label")


def test_bad_rows_are_counted_and_named_and_over_a_hundredth_an_error(pictures, tmp_path, capsys):
    names = write_files(tmp_path, pictures, ".png")
    good = [{"image": names[i % COUNT], "text": f"{i}"} for i in range(700)]
    bad = [
        "no row",
        {"image": "none.png", "text": "x"},
        {"image": names[0], "text": ""},
        {"image": names[0]},
        {"image": 3, "text": "x"},
        {"image": names[0], "text": [5]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [*good[:5], *bad, *good[5:]])
    data = open_text(path)
    assert len(data) == 700 and len(data.bad) == 6
    reasons = ("no row", "no file .*none.png", "no caption", "NoneType", "no picture is named", "a caption is int, wanted text")
    for line, row, reason in zip(data.bad, range(6, 12), reasons):
        assert re.search(rf"a\.jsonl, row {row}: .*{reason}", line), line
    said = capsys.readouterr().out
    assert "6 of 706 rows cannot be used and are left out; the first is" in said and "500 pictures are the same file as another" in said
    with pytest.raises(UserError, match=r"6 of 706 rows cannot be used \(--bad_images error\)"):
        open_text(path, broken="error")
    write_jsonl(path, [*good[:500], *bad])
    with pytest.raises(UserError, match=r"6 of 506 rows cannot be used \(over 1 %\); the first is .*row 501"):
        open_text(path)


def test_bad_samples_of_tar_shards(pictures, tmp_path):
    members = {f"{i:03d}.{kind}": content for i in range(COUNT) for kind, content in (("png", pictures[i]), ("txt", b"x"))}
    write_tar(tmp_path / "0.tar", [*members.items(), ("a.png", pictures[0]), ("b.txt", b"y"), ("d/c.seg.png", pictures[1]), ("d/c.txt", b"\n")])
    with pytest.raises(UserError, match=r"3 of 203 rows cannot be used \(over 1 %\); the first is .*0.tar: a: no .txt or .json"):
        open_text(tmp_path)
    write_tar(tmp_path / "1.tar", ((f"e{name}", content) for name, content in members.items()))
    data = open_text(tmp_path)
    assert len(data) == 2 * COUNT and [line.rpartition("tar: ")[2] for line in data.bad] == ["a: no .txt or .json", "b: no picture", "d/c: no picture"]
    assert data.paths[0].endswith("0.tar/000.png") and data.paths[COUNT].endswith("1.tar/e000.png")


def test_an_index_is_made_once_and_anew_where_its_shard_has_changed(pictures, tmp_path, monkeypatch, capsys):
    path, _ = write("tar", tmp_path, pictures[:9])
    before = list(open_text(path).captions)
    made = []
    make = datasets.tar.make_index
    monkeypatch.setattr(datasets.tar, "make_index", lambda shard, caption_column: made.append(shard.name) or make(shard, caption_column))
    assert list(open_text(path).captions) == before and not made and sorted(one.suffix for one in (path / "tar_index").iterdir()) == [".json"] * 3
    write_tar(path / "00001.tar", [("x.png", pictures[0]), ("x.txt", "別の".encode())])
    assert len(open_text(path)) == 7 and made == ["00001.tar"]
    assert "1 pictures are the same file as another" in capsys.readouterr().out.splitlines()[-1]
    index = next(one for one in (path / "tar_index").iterdir() if one.name.startswith("00000"))
    index.write_text(index.read_text(encoding="utf-8")[:40], encoding="utf-8")
    assert len(open_text(path)) == 7 and made == ["00001.tar", "00000.tar"]


def test_a_shard_that_is_cut_short_gives_what_it_holds(pictures, tmp_path):
    path, _ = write("tar", tmp_path, pictures)
    shard, size = path / "00002.tar", os.path.getsize(path / "00002.tar")
    for cut in (size // 2048 * 1024, size // 2048 * 1024 - 400):  # between blocks, and within one
        os.truncate(shard, cut)
        data = open_text(path)
        assert COUNT // 2 < len(data) < COUNT and len(data.bad) == 1 and re.search("it has no end|unexpected end of data", data.bad[0])
        assert data.readable(len(data) - 1)[1:] == (len(data) - 1, [])


@pytest.mark.parametrize("route, flag", [("folder", "caption_column"), ("parquet", "image_root"), ("tar", "image_column")])
def test_a_flag_that_a_kind_of_data_does_not_read_is_refused(route, flag, pictures, tmp_path):
    path, more = write(route, tmp_path / "route", pictures[:3])
    with pytest.raises(UserError, match=f"--{flag} x has no effect on --data_path .*, which is read as {route}; leave it out"):
        open_text(path, **more, **{flag: "x"})


def test_lines_of_a_caption_are_joined_whatever_ends_them():
    assert several("赤い丸\r\n青い星\r\n") == several("赤い丸\n青い星") == ("赤い丸 青い星",)


def test_files_are_found_by_nfc_names_in_folders_and_under_a_root(pictures, tmp_path):
    (tmp_path / "写真" / "犬").mkdir(parents=True)
    (tmp_path / "写真" / "犬" / unicodedata.normalize("NFD", "がく.png")).write_bytes(pictures[0])
    path = write_jsonl(tmp_path / "a.jsonl", [{"image": "写真/犬/がく.png", "text": "x"}, {"image": str(tmp_path / "写真/犬/がく.png"), "text": "y"}])
    data = open_text(path)
    assert len(data) == 2 and torch.equal(data.picture(0), data.picture(1))
    assert len(open_text(write_jsonl(tmp_path / "b.jsonl", [{"image": "犬/がく.png", "text": "x"}]), image_root=str(tmp_path / "写真"))) == 1


def test_folders_are_found_by_nfc_names_too(pictures, tmp_path):
    folders = ("データ", "ガ/ぱ")
    for folder in folders:
        place = tmp_path / unicodedata.normalize("NFD", folder)
        place.mkdir(parents=True)
        (place / "0.png").write_bytes(pictures[0])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "round").symlink_to(tmp_path / "a" / "round")
    (tmp_path / unicodedata.normalize("NFD", "データ") / "round.png").symlink_to("round.png")
    rows = [{"image": f"{folder}/0.png", "text": folder} for folder in (*folders, "a/../データ")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = open_text(path)
    assert [*data.captions] == [*folders, "a/../データ"] and torch.equal(data.picture(0), data.picture(1)) and torch.equal(data.picture(0), data.picture(2))
    write_jsonl(path, [*rows * 100, {"image": "デ/ータ/0.png", "text": "x"}])
    assert open_text(path).bad == [f"{path}, row 301: no file {tmp_path}/デ/ータ/0.png"]


def test_a_random_crop_is_a_function_of_the_sample_and_of_adms_sizes(tmp_path):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    data = PictureDataset([str(tmp_path / "a.png")], View(16, crop="random"))
    data.condition = lambda index, n: 0
    shown = [data[0, n].picture for n in range(30)]
    assert all(torch.equal(one, data[0, n].picture) for n, one in enumerate(shown)) and len({one.numpy().tobytes() for one in shown}) > 20
    middle = PictureDataset([str(tmp_path / "a.png")], View(16)).picture(0)
    assert torch.equal(data.picture(0), middle)  # what statistics are of
    assert np.array_equal(random_crop(image, 40, (0, 0, 0)), np.asarray(image)[:, :40]) and random_crop(image, 40, (0.999, 0.999, 0.999)).size == (40, 40)
    square = image.crop((0, 0, 40, 40))
    assert np.array_equal(random_crop(square, 40, (0, 0.9, 0.9)), center_crop(square, 40))
    largest = square.resize((50, 50), Image.Resampling.BICUBIC)  # 40 / 0.8
    assert np.array_equal(random_crop(square, 40, (0.999, 0, 0)), np.asarray(largest)[:40, :40])


def test_damage_in_a_shard_is_named_and_no_text_is_cut(pictures, tmp_path):
    samples = [(f"{i:03d}.{kind}", content) for i in range(COUNT) for kind, content in (("png", pictures[i]), ("txt", f"{i}番".encode()))]
    shard = write_tar(tmp_path / "0.tar", samples)
    whole = shard.read_bytes()
    broken = bytearray(whole)
    with tarfile.open(shard) as tar:
        header = tar.getmember("150.png").offset
    broken[header : header + 512] = b"\xff" * 512
    for content, count, words in (
        (bytes(broken), 150, f"after 149: what follows from byte {header} on cannot be read"),
        (whole + whole, COUNT, "after 199: what follows from byte"),
        (whole[: header + 100], 150, "after 149: (it has no end|unexpected end of data|what follows)"),
    ):
        shard.write_bytes(content)
        data = open_text(tmp_path)
        assert len(data) == count and len(data.bad) == 1 and re.search(words, data.bad[0]), data.bad
    with tarfile.open(write_tar(shard, samples)) as tar:
        text = tar.getmember("199.txt")
    shard.write_bytes(whole[: text.offset_data + 3])  # within its first letters
    data = open_text(tmp_path)
    assert len(data) == COUNT - 1 and "199: cut short" in data.bad[-1]


def test_shards_of_macos_upper_case_names_and_odd_json(pictures, tmp_path):
    samples = [("._000.png", b"x"), ("000.PNG", pictures[0]), ("._000.txt", b"x"), ("000.TXT", "赤".encode())]
    samples += [(f"{i:03d}.{kind}", content) for i in range(1, COUNT) for kind, content in (("png", pictures[i]), ("txt", b"x"))]
    odd = [("a.png", pictures[0]), ("a.json", b'[{"caption": "x"}]'), ("b.png", pictures[0]), ("b.json", b'{"caption": "\\ud83d"}')]
    write_tar(tmp_path / "0.TAR", samples + odd)
    data = open_text(tmp_path / "0.TAR")
    assert len(data) == len(open_text(tmp_path)) == COUNT and data.captions[0] == "赤"
    assert ["wanted an object" in data.bad[0], "half a character" in data.bad[1]] == [True, True] and len(data.bad) == 2


def test_csv_rows_with_a_comma_too_many_and_folders_in_the_place_of_files(pictures, tmp_path):
    names = write_files(tmp_path, pictures, ".png")
    (tmp_path / "folder.png").mkdir()
    lines = ["image,text", *(f"{name},x" for name in names), f"{names[0]},a red, round ball", "folder.png,x"]
    (tmp_path / "a.CSV").write_text("\n".join(lines), encoding="utf-8")
    data = open_text(tmp_path / "a.CSV")
    assert len(data) == COUNT and "wants quotes" in data.bad[0] and "no file" in data.bad[1]
    with pytest.raises(UserError, match="no column nothing; there are image, text"):
        open_text(tmp_path / "a.CSV", caption_column="nothing")


def test_what_is_no_parquet_and_no_table_is_one_line(tmp_path):
    (tmp_path / "a.parquet").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    (tmp_path / "b.parquet").mkdir()
    for path in (tmp_path / "a.parquet", tmp_path):
        with pytest.raises(UserError, match="cannot be read as Parquet .* pointer of git-lfs") as error:
            open_text(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no table; wanted one that ends in"):
        open_text(tmp_path, format="table")
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "x.tar").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="x.tar cannot be read"):
        open_text(tmp_path)


def test_damaged_pages_of_a_parquet_file_are_one_line(pictures, tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": pictures[:9], "text": [f"{i}番" for i in range(9)]}), path)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    content[column.dictionary_page_offset : column.data_page_offset + 8] = b"\xff" * (column.data_page_offset + 8 - column.dictionary_page_offset)
    path.write_bytes(content)  # the footer is whole
    with pytest.raises(UserError, match=r"a.parquet cannot be read as Parquet \(.+\); is it whole") as error:
        open_text(path)
    assert "\n" not in str(error.value)


def test_folders_that_may_not_be_read_are_passed_over_but_for_the_datas_own(pictures, tmp_path, monkeypatch, capsys):
    path, _ = write("tar", tmp_path, pictures[:6])
    (path / "lost+found").mkdir()
    (path / "itself").symlink_to(path / "itself")
    locked, scandir = [path / "lost+found"], os.scandir

    def scan(folder):  # a test may be run by root, who may read everything
        if Path(folder) in locked:
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    assert len(open_text(path)) == 6
    assert capsys.readouterr().out.count(f"warning: {path / 'lost+found'} cannot be read (Permission denied), and what is in it is left out") == 1
    locked.append(path)
    with pytest.raises(UserError, match="--data_path .* cannot be read: Permission denied"):
        open_text(path)


def test_a_process_that_dies_while_tar_files_are_indexed_ends_the_run_in_one_line(pictures, tmp_path, monkeypatch, capfd):
    path, _ = write("tar", tmp_path, pictures[:6])

    def work():
        signal.alarm(30)  # or it would wait for ever
        os.sched_getaffinity = lambda _: range(2)
        datasets.tar.samples = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        open_text(path)

    assert ended(child(work)) == 1
    assert "a process died; run the command again, with more memory if it ran out" in capfd.readouterr().out


def test_tar_files_are_indexed_by_several_processes_as_by_one(pictures, tmp_path, monkeypatch):
    found = []
    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        path, _ = write("tar", tmp_path / str(cores), pictures[:9])
        found.append([*open_text(path).captions])
    assert found[0] == found[1]


def test_a_broken_picture_within_a_file_is_told_in_the_same_words_each_time(pictures, tmp_path):
    for route in ("tar", "parquet"):
        path, more = write(route, tmp_path / route, [*pictures[:4], b"no picture", *pictures[5:9]])
        (line,) = open_text(path, **more).readable(4)[2]
        assert line.endswith(": UnidentifiedImageError: cannot identify image file")


def test_the_start_and_the_run_agree_on_a_hundredth(pictures, tmp_path):
    names = write_files(tmp_path, pictures, ".png")
    data = open_text(write_jsonl(tmp_path / "a.jsonl", [*({"image": name, "text": "x"} for name in names[:198]), {"image": "none", "text": "x"}, "no row"]))
    Broken(tmp_path, len(data) + len(data.bad), "skip", data.bad).write()
    with pytest.raises(UserError, match="over 1 %"):
        Broken(tmp_path, len(data) + len(data.bad), "skip", data.bad).note(["another: broken"])


def test_a_fingerprint_is_of_the_names_wherever_the_data_lies(pictures, tmp_path, monkeypatch):
    for route in ("table.jsonl", "tar", "parquet", "folder"):
        path, more = write(route, tmp_path / "one" / route, pictures[:3])
        again, other = write(route, tmp_path / "two" / route, pictures[:3])
        monkeypatch.chdir(path.parent)
        found = {open_text(one, **kept).fingerprint(one) for one, kept in ((path, more), (again, other), (path.name, more))}
        assert len(found) == 1, route
