"""Whatever is put in, it works or ends in one line: flags, caption files, pictures, checkpoints, statistics.

FUZZ_EXAMPLES says how many tries each gets; `make test-all` gives many.
"""

import io
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, open_text, write_text_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.stream import PackedStrings
from datasets.text_image import read_captions
from flags import get_parser, job_of
from util import checkpoint, reference
from util.errors import UserError
from util.files import read_lines

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def in_one_line(action):
    """What it returns, or None where it ends as a user should see it; anything else is a failure."""
    try:
        return action()
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return None


# --- flags

OPTIONS = sorted(get_parser().options)
VALUES = st.one_of(
    st.sampled_from(["", "0", "1", "-1", "0.5", "nan", "inf", "-inf", "1e400", "1e-300", "heun", "JiT-B/16-Text", "JiT-Nano/8", "1:2:0.1", "1:2:-1", "0-1,0.1-1", "raw"]),
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.text(max_size=20),
)  # fmt: skip


@fuzz
@given(st.lists(st.tuples(st.sampled_from(OPTIONS), st.one_of(st.none(), VALUES)), max_size=5))
def test_flags(pairs):
    argv = [part for option, value in pairs for part in ([option] if value is None else [option, value])]
    stderr, sys.stderr = sys.stderr, io.StringIO()
    try:
        given = get_parser().read(argv)
    except SystemExit as stop:
        assert stop.code == 2 and sys.stderr.getvalue().startswith("error: ")
        return
    finally:
        sys.stderr = stderr
    in_one_line(lambda: job_of(given))


# --- captions


@fuzz
@given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_caption_files(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "caption.txt"
    path.write_bytes(content)
    captions = in_one_line(lambda: read_captions(path))
    if captions is not None:
        content.decode("utf-8-sig")  # what is read is UTF-8
        assert all(caption.strip() == caption and caption for caption in captions)
        assert tuple(PackedStrings(captions)) == captions
    in_one_line(lambda: read_lines(path, "--prompts_file"))


# --- bytes of files that should be something else


def damaged(content: bytes):
    """The bytes with a stretch overwritten, left out or put in, or cut off."""
    places = st.integers(0, len(content))
    return st.one_of(
        st.tuples(places, st.binary(min_size=1, max_size=8)).map(lambda p: content[: p[0]] + p[1] + content[p[0] + len(p[1]) :]),
        st.tuples(places, st.binary(min_size=1, max_size=8)).map(lambda p: content[: p[0]] + p[1] + content[p[0] :]),
        st.tuples(places, st.integers(1, 50)).map(lambda p: content[: p[0]] + content[p[0] + p[1] :]),
        places.map(lambda p: content[:p]),
        st.binary(max_size=300),
    )


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((24, 20), 80).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text_data(tmp_path_factory.mktemp("pictures"), 2)


@pytest.mark.parametrize("kind, name", [("PNG", "0.png"), ("JPEG", "0.jpg"), ("WEBP", "0.webp")])
def test_pictures(kind, name, folder):
    for old in (folder / "images").glob("0.*"):
        old.unlink()
    path = folder / "images" / name
    path.write_bytes(encoded(kind))
    dataset = open_text(folder, 16)

    @fuzz
    @given(damaged(encoded(kind)))
    def check(content):
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture, index, broken = dataset.readable(0)
        assert picture.shape == (3, 16, 16) and picture.dtype == torch.uint8 and (index == 1) == bool(broken)

    check()


def test_checkpoints(tmp_path):
    path = tmp_path / checkpoint.LAST
    checkpoint.save(path, {"model": {"net.a": torch.arange(6.0)}, "epoch": 1, "args": {"model": "JiT-B/16"}})

    @fuzz
    @given(damaged(path.read_bytes()))
    def check(content):
        (tmp_path / "damaged.pth").write_bytes(content)
        state = in_one_line(lambda: checkpoint.load(tmp_path / "damaged.pth"))
        if state is not None:
            in_one_line(lambda: checkpoint.without_prefix(state["model"], {"a": torch.zeros(6)}, "it"))

    check()


def test_statistics(tmp_path):
    path = tmp_path / "s.npz"
    reference.write(path, {"mu": np.arange(3.0), "sigma": np.eye(3)}, {"extractor": "x", "img_size": 16, "crop": "c", "n": 1, "files": 1, "data": "d"})

    @fuzz
    @given(damaged(path.read_bytes()))
    def check(content):
        (tmp_path / "damaged.npz").write_bytes(content)
        found = in_one_line(lambda: reference.read(tmp_path / "damaged.npz"))
        if found is not None:
            in_one_line(lambda: reference.check(found, "x", 3, 16))

    check()


@pytest.mark.long
@pytest.mark.parametrize("extra", [[], ["--processes", "2", "--precision", "bf16"]])
def test_a_run_killed_at_many_random_moments(extra, tmp_path):
    """benchmarks/kill_test.py, with fewer kills than its 100."""
    command = [sys.executable, "-m", "benchmarks.kill_test", "--out", str(tmp_path), "--kills", "10", "--epochs", "20", *extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0 and "equal to the bit: True" in done.stdout, done.stdout + done.stderr[-2000:]
