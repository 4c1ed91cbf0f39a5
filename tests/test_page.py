"""The page: what may be asked for, the bytes of --generate, and, marked `page`, all of it in a real browser (`make test-page`)."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import pytest
from conftest import ROOT, save_llm, write_class_data, write_text_data
from test_export import PROMPTS, as_png, drawn, train

import app
import flags
from config import Model, SamplerConfig
from page import asked, server
from page.asked import LARGEST, Rules
from page.easel import KEPT, Easel, Stopped
from sampling import load_painter
from util.errors import UserError

TEXT = Rules(Model("MMJiT-Nano/8", img_size=16), most_pictures=6, most_steps=40)
CLASSES = Rules(Model("JiT-Nano/8", img_size=16, class_num=3), most_pictures=6, most_steps=40)
SETTINGS = {"seed": 3, "cfg": 2, "steps": 4, "interval_min": 0, "interval_max": 1, "method": "heun", "time_shift": 1}
LIST = SETTINGS | {"prompts": "赤い三\n\n 富士山と桜 \n", "times": 2}
STRIP = SETTINGS | {"prompt": "赤い三", "number": 5, "scales": "1、2.5,\n3"}
WORDS = SETTINGS | {"template": "{}い三", "number": 5, "words": "赤、青"}


def test_what_is_asked_for_is_numbered_as_generate_numbers_it():
    order = asked.pictures(LIST, TEXT)
    assert [(part.first, part.prompts) for part in order.parts] == [(0, ["赤い三", "富士山と桜"]), (2, ["赤い三", "富士山と桜"])]
    assert order.seed == 3 and order.count == 4 and order.parts[0].sampler == SamplerConfig("heun", 4, 2.0, (0.0, 1.0))
    assert order.parts[1].notes == ["2: 赤い三", "3: 富士山と桜"]
    strip = asked.over_cfg(STRIP, TEXT).parts
    assert [(part.first, part.prompts, part.sampler.cfg_scale) for part in strip] == [(5, ["赤い三"], scale) for scale in (1, 2.5, 3)]
    words = asked.over_words(WORDS, TEXT).parts
    assert [(part.first, part.prompts, part.notes) for part in words] == [(5, ["赤い三"], ["赤"]), (5, ["青い三"], ["青"])]
    assert [part.prompts for part in asked.pictures(LIST | {"prompts": ["2", "0"]}, CLASSES).parts] == [[2, 0], [2, 0]]
    assert asked.over_cfg(STRIP | {"prompt": "2"}, CLASSES).parts[0].prompts == [2]


@pytest.mark.parametrize(
    "ask, values, message",
    [
        (asked.pictures, LIST | {"prompts": " \n"}, "say what to draw"),
        (asked.pictures, LIST | {"times": 4}, "at most 6 pictures at once; these are 8"),
        (asked.pictures, LIST | {"times": 1, "prompts": "猫\n" * 7}, "at most 6 pictures"),
        (asked.pictures, LIST | {"times": 10**18}, "whole number from 1 to 6"),
        (asked.pictures, LIST | {"prompts": "猫" * 2001}, "at most 2000 characters a line"),
        (asked.pictures, LIST | {"prompts": "猫" * 20000}, "text of at most"),
        (asked.pictures, LIST | {"prompts": "\ud83c"}, "wanted text"),
        (asked.pictures, LIST | {"prompts": {"a": 1}}, "wanted text"),
        *[(asked.pictures, LIST | {"seed": seed}, f"from 0 to {LARGEST}") for seed in (-1, 1.5, None, "3", True, [1], LARGEST + 1)],
        *[(asked.pictures, LIST | {"steps": steps}, "whole number from 1 to 40") for steps in (0, 41, 2.0, "4", None)],
        (asked.pictures, LIST | {"cfg": float("nan")}, "cfg nan must be a finite number"),
        (asked.pictures, LIST | {"cfg": float("inf")}, "cfg inf must be a finite number"),
        (asked.pictures, LIST | {"cfg": -1}, "cfg -1.0 must not be negative"),
        (asked.pictures, LIST | {"cfg": "2"}, "cfg '2': wanted float"),
        (asked.pictures, LIST | {"method": "rk4"}, "sampling_method rk4: wanted one of heun, euler"),
        (asked.pictures, LIST | {"interval_min": 0.9, "interval_max": 0.1}, "interval_min <= interval_max"),
        (asked.pictures, LIST | {"interval_min": float("nan")}, "interval_min <= interval_max"),
        (asked.pictures, LIST | {"interval_max": None}, "wanted float"),
        (asked.pictures, LIST | {"time_shift": 0}, "time_shift 0.0 must be positive"),
        (asked.over_cfg, STRIP | {"scales": "1, x"}, "found x"),
        (asked.over_cfg, STRIP | {"scales": "nan"}, "cfg nan must be a finite number"),
        (asked.over_cfg, STRIP | {"scales": " , "}, "write one or more"),
        (asked.over_cfg, STRIP | {"scales": "1," * 7}, "at most 6 pictures"),
        (asked.over_cfg, STRIP | {"prompt": "赤い三\n青い三"}, "one line only"),
        (asked.over_cfg, STRIP | {"number": -1}, "picture number: "),
        (asked.over_words, WORDS | {"template": "赤い三"}, "write {} once"),
        (asked.over_words, WORDS | {"template": "{}{}"}, "write {} once"),
        (asked.over_words, WORDS | {"template": "{0.__class__}"}, "write {} once"),
    ],
)
def test_what_cannot_be_drawn_is_one_friendly_sentence(ask, values, message):
    with pytest.raises(UserError) as error:
        ask(values, TEXT)
    assert message in str(error.value) and "\n" not in str(error.value) and "--" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("labels", [None, [], ["3"], ["-1"], ["猫"], [0], "x", ["9" * 5000]])
def test_what_is_no_label_is_refused(labels):
    with pytest.raises(UserError):
        asked.pictures(LIST | {"prompts": labels}, CLASSES)


@pytest.mark.slow
def test_the_easel_paints_the_files_of_generate_and_keeps_few_of_them(text_data, llm_folder, tmp_path):
    trained = train("text", tmp_path / "out", text_data, tmp_path, llm_folder())
    wanted = drawn(trained, "text")
    painter = load_painter(trained, device="cpu")
    easel, told = Easel(painter, tmp_path), []
    order = asked.pictures(LIST | {"prompts": "\n".join(PROMPTS)}, TEXT)
    steps = [[path.read_bytes() for path, _ in canvas.pictures] for canvas in easel.draw(order, "me", told.append)]
    assert [len(step) for step in steps] == [3, 6] and steps[1][:3] == steps[0] == wanted
    sampler = painter.job.drawing.sampler
    assert steps[1][3:] == as_png(painter(PROMPTS, sampler, seed=3, first=3), tmp_path / "later")
    assert told == sorted(told) and told[0] == 0 and 0.8 < told[-1] < 1
    (*_, words) = easel.draw(asked.over_words(WORDS, TEXT), "me", told.append)
    assert [path.read_bytes() for path, _ in words.pictures] == [as_png(painter([f"{word}い三"], sampler, 3, 5), tmp_path / word)[0] for word in "赤青"]
    with zipfile.ZipFile(words.zipped()) as file:
        assert file.namelist() == ["0000.png", "0001.png", "prompts.txt", "settings.txt"] and file.read("prompts.txt").decode() == "赤い三\n青い三\n"
        assert "0001.png: picture 5, EMA 1 at step 4, cfg 2 in 0-1, heun 4, seed 3" in file.read("settings.txt").decode()

    def stop_halfway(share: float) -> None:
        easel.stop("another")
        if share > 0.6:
            easel.stop("me")

    drawing = easel.draw(order, "me", stop_halfway)
    assert len(next(drawing).pictures) == 3
    with pytest.raises(Stopped):
        next(drawing)
    for _ in range(KEPT + 3):
        easel.new_folder()
    assert not words.folder.exists() and len(easel.kept) == KEPT


def test_what_cannot_begin_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch):
    def told(*argv) -> str:
        with pytest.raises(UserError) as error:
            app.serve(flags.parse_app(list(map(str, argv))))
        return str(error.value)

    monkeypatch.setattr(app, "load_painter", lambda *_: pytest.fail("loaded"))
    assert "--resume FOLDER_OR_FILE" in told()
    assert "no such file or folder" in told("--resume", tmp_path / "nothing")
    with socket.create_server(("127.0.0.1", 0)) as place:
        (tmp_path / "checkpoint-last.pth").touch()
        port = place.getsockname()[1]
        assert f"--port {port} cannot be used (Address already in use)" in told("--resume", tmp_path, "--port", port)
    assert "wanted a folder with adapter_config.json" in told("--resume", tmp_path, "--lora", tmp_path)
    assert "--lora_scale is for --lora" in told("--resume", tmp_path, "--lora_scale", "0.5")
    assert "--host 192.0.2.1 " in told("--resume", tmp_path, "--host", "192.0.2.1")
    assert "--port 65536 must be in [0, 65535]" in told("--resume", "x", "--port", "65536")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert told("--resume", tmp_path) == "app.py needs its package: pip install 'gradio>=6,<7'"


def test_other_hosts_are_warned_of(capsys):
    for host, warned in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        with server.listening(host, 0) as place:
            assert ("can draw" in capsys.readouterr().out) == warned and server.address(host, place).startswith("http://")


def test_only_what_the_page_asks_for_comes_through():
    guard = server.Guard(None, Path("/tmp/page"))

    def status(method: str, path: str, size: str = "10") -> int | None:
        return guard.refused({"method": method, "path": path, "headers": [(b"content-length", size.encode())]})

    assert {status("GET", path) for path in ("/", "/assets/x.js", "/config", "/gradio_api/queue/data", "/gradio_api/file=/tmp/page/x/0000.png")} == {None}
    assert status("POST", "/gradio_api/queue/join") is None and status("POST", "/gradio_api/queue/join", str(1 << 21)) == 413
    assert status("POST", "/gradio_api/queue/join", "") == 413
    body = [(b"content-length", b"10"), (b"transfer-encoding", b"chunked")]  # whose length is another than it says
    assert guard.refused({"method": "POST", "path": "/gradio_api/queue/join", "headers": body}) == 413
    for path in ("file=http://a.example/x.png", "file=/etc/passwd", "proxy=http://a.example", "deep_link", "run-history/buckets", "upload"):
        assert status("GET", f"/gradio_api/{path}") == 404 and status("POST", f"/gradio_api/{path}") == 404


# --- in a browser

WATCH = """
import os, sys
def look(event, args):
    host = args[1][0] if event == "socket.connect" and isinstance(args[1], tuple) else args[0] if event == "socket.getaddrinfo" else None
    if host not in (None, "127.0.0.1", "localhost", "::1", b"127.0.0.1"):
        open(os.environ["OUTSIDE"], "a").write(f"{event} {host}\\n")
sys.addaudithook(look)
"""


@dataclass
class Program:
    """app.py as it runs."""

    trained: Path
    url: str
    process: subprocess.Popen
    outside: Path  # what it wanted of other hosts


def missing(what: str) -> None:
    pytest.fail(f"{what} is missing", pytrace=False)


@pytest.fixture(scope="module")
def chromium():
    """A real one, without a window."""
    path = shutil.which("chromium") or missing("chromium (apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("the package playwright (pip install playwright)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """programs(kind) -> app.py with a tiny model of that kind, started once."""
    root = tmp_path_factory.mktemp("page")
    running: dict[str, Program] = {}

    def get(kind: str) -> Program:
        if kind not in running:
            llm = save_llm("llama", root / f"llm-{kind}")
            trained = train(kind, root / kind, write_text_data(root / f"data-{kind}"), write_class_data(root / f"classes-{kind}"), llm)
            running[kind] = start(trained, root / f"watch-{kind}")
        return running[kind]

    yield get
    for kind, program in running.items():
        program.process.send_signal(signal.SIGINT if kind == "class" else signal.SIGTERM)
        assert program.process.wait(30) == 0
    assert not list(root.glob("tmp/jit-page-*"))


def start(trained: Path, watch: Path) -> Program:
    watch.mkdir()
    (watch / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    temporary = trained.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    more = {"PYTHONPATH": str(watch), "OUTSIDE": str(watch / "outside.txt"), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    argv = [sys.executable, "app.py", "--resume", str(trained), "--device", "cpu", "--port", "0", "--most_pictures", "6", "--most_steps", "200"]
    with open(watch / "errors.txt", "w") as errors:
        process = subprocess.Popen(argv, cwd=ROOT, env=os.environ | more, stdout=subprocess.PIPE, stderr=errors, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("http://"):
            return Program(trained, line.strip(), process, watch / "outside.txt")
    raise AssertionError("".join(lines) + (watch / "errors.txt").read_text())


@pytest.fixture
def visit(chromium):
    """visit(program) -> a visitor's page; at the end, whether any of them has asked another host for anything, or was kept from it."""
    visitors, asked_for, blocked = [], [], []

    def open_page(program: Program):
        context = chromium.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True, locale="ja-JP")
        visitors.append(context)
        context.on("request", lambda request: asked_for.append((program.url, request.url)))
        context.on("console", lambda line: blocked.append(line.text) if "Content Security Policy" in line.text else None)
        tab = context.new_page()
        tab.set_default_timeout(60_000)
        tab.goto(program.url)
        tab.wait_for_selector("#draw")
        return tab

    yield open_page
    for context in visitors:
        context.close()
    hosts = {urlsplit(url).netloc for own, url in asked_for if not url.startswith((own, "data:", "blob:"))}
    assert asked_for and hosts == set() and blocked == []


def fill(tab, **values) -> None:
    for name, value in values.items():
        tab.locator(f"#{name.replace('_', '-') if name.startswith('number') else name}").locator("textarea, input").first.fill(str(value))


def wait_for(tab, words: str) -> str:
    """Until the line under the pictures says so."""
    tab.locator("#status").filter(has_text=re.compile(words)).wait_for()
    return tab.locator("#status").inner_text()


def draw(tab, button: str = "draw") -> None:
    """And wait for the end of it."""
    before = sources(tab)
    tab.click(f"#{button}")
    tab.wait_for_function("old => (image => image && !old.includes(image.src))(document.querySelector('#gallery img'))", arg=before)
    wait_for(tab, r"\d s\s*$")


def sources(tab) -> list[str]:
    return [image.get_attribute("src") for image in tab.locator("#gallery img").all()]


def files(tab) -> list[bytes]:
    """The pictures as the browser gets them."""
    return [tab.context.request.get(source).body() for source in sources(tab)]


def place_of(source: str) -> Path:
    """Where the program has that picture."""
    return Path(unquote(urlsplit(source).path).split("file=", 1)[1])


def status_of(url: str, body: bytes | None = None) -> int:
    """Of an answer to a client that is no browser."""
    try:
        with urlopen(Request(url, body, {"Content-Type": "application/json"})) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


def join(program: Program, body: object) -> int:
    """The queue, with whatever body."""
    return status_of(f"{program.url}/gradio_api/queue/join", json.dumps(body).encode())


@pytest.mark.page
def test_type_draw_see_save_and_change_the_seed(programs, visit, tmp_path):
    program = programs("tokens")
    wanted, tab = drawn(program.trained, "tokens"), visit(program)
    head = tab.locator("#head").inner_text()
    for word in ("tokens/checkpoint-last.pth", "MMJiT-Nano/8", "16 × 16", "step 4", "EMA 1", "text encoder llm-tokens"):
        assert word in head
    assert str(program.trained.parent) not in tab.content()
    fill(tab, prompts="\n".join(PROMPTS))
    draw(tab)
    assert files(tab) == wanted  # seed, steps and cfg stand at the checkpoint's
    assert tab.evaluate("[...document.querySelectorAll('#gallery img')].every(image => image.complete && image.naturalWidth == 16)")
    with tab.expect_download() as saved:
        tab.click("#download")
    with zipfile.ZipFile(saved.value.path()) as file:
        assert [file.read(f"{i:04d}.png") for i in range(3)] == wanted and file.read("prompts.txt").decode().split() == PROMPTS
    tab.locator("#gallery button.thumbnail-item, #gallery .thumbnail-lg").nth(1).click()
    with tab.expect_download() as saved:
        tab.locator("#gallery [aria-label='Download'], #gallery [title='Download'], #gallery [aria-label='ダウンロード']").first.click()
    assert saved.value.path().read_bytes() == wanted[1]
    tab.keyboard.press("Escape")
    fill(tab, seed=4, steps=20, times=2)
    tab.click("#draw")
    tab.get_by_text(re.compile(r"drawing - \d")).first.wait_for()  # on its way
    wait_for(tab, r"\b6 / 6 .*\d s\s*$")
    others = files(tab)
    assert len(set(others)) == 6 and not set(others) & set(wanted)
    painter = load_painter(program.trained, device="cpu")
    sampler = SamplerConfig("heun", 20, 2.0)
    assert others[3:] == as_png(painter(PROMPTS, sampler, seed=4, first=3), tmp_path)


@pytest.mark.page
def test_strips(programs, visit, tmp_path):
    program = programs("tokens")
    tab, painter = visit(program), load_painter(program.trained, device="cpu")
    tab.get_by_role("tab", name="cfg strip").click()
    fill(tab, prompt=PROMPTS[0], scales="1, 2.5", number_scales=7)
    draw(tab, "draw-scales")
    assert files(tab) == [as_png(painter(PROMPTS[:1], SamplerConfig("heun", 4, scale), 3, 7), tmp_path)[0] for scale in (1.0, 2.5)]
    assert "cfg 2.5" in tab.locator("#gallery").inner_text()
    tab.get_by_role("tab", name="word strip").click()
    fill(tab, template="{}い三", words="赤、青、黒", number_words=7)
    draw(tab, "draw-words")
    wait_for(tab, "3 / 3")
    found = files(tab)
    assert found == [as_png(painter([f"{word}い三"], SamplerConfig("heun", 4, 2.0), 3, 7), tmp_path)[0] for word in "赤青黒"] and len(set(found)) == 3


@pytest.mark.page
def test_what_is_wrong_is_said_and_the_page_goes_on(programs, visit, tmp_path):
    program = programs("tokens")
    tab = visit(program)
    for values, words in [
        ({"prompts": ""}, "say what to draw"),
        ({"prompts": "猫", "seed": "-1"}, "シード / seed"),
        ({"seed": "1.5"}, "シード / seed"),
        ({"seed": ""}, "シード / seed"),
        ({"seed": "3", "steps": "1000"}, "from 1 to 200"),
        ({"steps": "4", "times": "7"}, "from 1 to 6"),
        ({"times": "1", "prompts": "猫\n" * 7}, "at most 6 pictures"),
        ({"prompts": "猫", "interval_min": "0.8", "interval_max": "0.2"}, "interval_min <= interval_max"),
        ({"interval_min": "0", "interval_max": "1", "cfg": "-2"}, "must not be negative"),
    ]:
        fill(tab, **values)
        tab.click("#draw")
        tab.locator("#status").filter(has_text=words).wait_for()
        tab.locator(".toast-body").filter(has_text=words).first.wait_for()
    fill(tab, cfg=2)
    draw(tab)
    assert files(tab) == as_png(load_painter(program.trained, device="cpu")(["猫"], seed=3), tmp_path)


@pytest.mark.page
def test_a_client_may_send_anything(programs, visit):
    program = programs("tokens")
    tab = visit(program)
    for data in ([], [None] * 9, [{}] * 8, [[1]] * 8, ["x" * 9000] * 8, [-1] * 8, "x", {"path": "/etc/passwd"}):
        for index in (0, 1, 2, 99, -1):
            join(program, {"data": data, "fn_index": index, "session_hash": "me"})
    assert join(program, "no data") == 422
    fill(tab, prompts=PROMPTS[0])
    draw(tab)
    folder, api = place_of(sources(tab)[0]).parent, f"{program.url}/gradio_api"
    assert len(files(tab)) == 1 and status_of(f"{api}/file={folder}/0000.png") == 200
    for path in ("file=/etc/passwd", f"file={program.trained}/checkpoint-last.pth", "file=https://example.com/x.png", "deep_link?session_hash=me"):
        assert status_of(f"{api}/{path}") == 404
    assert status_of(f"{api}/file={folder}%2f..%2f..%2f..%2ftokens%2fcheckpoint-last.pth") == status_of(f"{api}/file={folder.parent}/") == 403
    assert status_of(f"{api}/upload", b"x") == 404


@pytest.mark.page
def test_two_visitors_at_once_get_their_own_one_after_the_other(programs, visit):
    program = programs("tokens")
    one, two = visit(program), visit(program)
    fill(one, prompts="\n".join(PROMPTS[:2]), times=3, seed=1, steps=20)
    fill(two, prompts=PROMPTS[2], times=3, seed=2, steps=20)
    one.click("#draw")
    two.click("#draw")
    wait_for(one, r"\b6 / 6 .*\d s\s*$")
    wait_for(two, r"\b3 / 3 .*\d s\s*$")
    first, second = sources(one), sources(two)
    assert len(first) == 6 and len(second) == 3 and not {place_of(source).parent for source in first} & {place_of(source).parent for source in second}
    assert PROMPTS[2] not in one.locator("#gallery").inner_text() and PROMPTS[0] not in two.locator("#gallery").inner_text()
    written = sorted((place_of(source).stat().st_mtime_ns, source in first) for source in first + second)
    assert [own for _, own in written] in ([True] * 6 + [False] * 3, [False] * 3 + [True] * 6)


@pytest.mark.page
def test_stopping_and_leaving_lets_the_next_one_draw(programs, visit):
    program = programs("tokens")
    one, two = visit(program), visit(program)
    fill(one, prompts="\n".join(PROMPTS), times=2, steps=200)
    one.click("#draw")
    one.get_by_text(re.compile(r"drawing - \d")).first.wait_for()
    one.click("#stop")
    wait_for(one, "stopped")
    one.click("#draw")
    one.get_by_text(re.compile(r"drawing - \d")).first.wait_for()
    one.context.close()
    start = time.perf_counter()
    fill(two, prompts=PROMPTS[0])
    draw(two)
    assert time.perf_counter() - start < 20


@pytest.mark.page
def test_a_class_model_gets_a_list_of_labels(programs, visit):
    program = programs("class")
    wanted, tab = drawn(program.trained, "class"), visit(program)
    assert "3 classes" in tab.locator("#head").inner_text() and tab.get_by_role("tab").count() == 2
    for label in ("2", "1"):  # after the 0 that is chosen: --generate drew 0, 2, 1
        tab.locator("#prompts input").click()
        tab.get_by_role("option", name=label, exact=True).click()
    tab.keyboard.press("Escape")
    draw(tab)
    assert files(tab) == wanted


@pytest.mark.page
def test_more_visitors_than_can_wait_are_told_so(programs, visit):
    program = programs("tokens")
    tab = visit(program)
    fill(tab, prompts="\n".join(PROMPTS), times=2, steps=200)
    tab.click("#draw")
    tab.get_by_text(re.compile(r"drawing - \d")).first.wait_for()
    assert {join(program, {"data": [], "fn_index": 0, "session_hash": f"visitor {i}"}) for i in range(25)} == {200, 503}
    late = visit(program)
    fill(late, prompts=PROMPTS[0])
    late.click("#draw")
    late.locator(".toast-body").first.wait_for()
    assert "busy. Please try again" in late.locator(".toast-body").first.inner_text()
    tab.click("#stop")
    wait_for(tab, "stopped")
    draw(late)
    assert len(files(late)) == 1


@pytest.mark.page
def test_the_program_asked_no_other_host_for_anything(programs):
    for kind in ("tokens", "class"):
        assert not programs(kind).outside.exists(), programs(kind).outside.read_text()
