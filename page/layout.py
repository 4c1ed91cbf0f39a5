"""The page itself: what stands on it, and what its buttons do."""

import html
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
import torch

from config import SOLVERS
from page import asked
from page.asked import Order, Rules
from page.easel import Easel, Stopped
from page.server import Guard
from sampling import LoadedPainter
from util import hub
from util.errors import UserError

Ask = Callable[[Mapping[str, Any], Rules], Order]  # the functions of asked.py
Boxes = dict[str, gr.components.Component]  # by the names that those know
WAITING = 20  # visitors in the queue
FONT = ["system-ui", "Noto Sans JP", "Noto Sans CJK JP", "Hiragino Sans", "Yu Gothic UI", "sans-serif"]
BAR = gr.Progress()
CRISP = 128  # pictures of fewer pixels are enlarged without smoothing
CSS = ".crisp img { image-rendering: pixelated; } #status { min-height: 5em; }"


def headline(painter: LoadedPainter, path: Path) -> str:
    """Which checkpoint, model, step, weights and text encoder draw; no folders of this machine."""
    path, model, which, step = path.resolve(), painter.job.model, painter.job.drawing.weights, painter.weights.step
    facts = [path.name if path.is_dir() else f"{path.parent.name}/{path.name}", model.name, f"{model.img_size} × {model.img_size}"]
    facts += [f"step {step:,}"] * bool(step) + ["raw weights" if which == "raw" else f"EMA {which}"]
    if painter.text:
        facts.append(f"text encoder {hub.reader_of(painter.text)}")
    else:
        facts.append(f"{model.class_num} classes")
    return " · ".join(facts)


def ask_for_prompts(rules: Rules) -> Boxes:
    again = "全部の行を、番号を進めながら繰り返し描きます / draws all lines this many times, each time with the next picture numbers"
    return {"prompts": prompts_box(rules, "prompts", several=True), "times": gr.Number(1, label="回数 / times", info=again, elem_id="times")}


def ask_for_scales(rules: Rules) -> Boxes:
    prompt = prompts_box(rules, "prompt", several=False)
    scales = gr.Textbox("1, 2, 3, 4", label="cfg の値 / values of cfg", info="コンマ区切り / separated by commas", max_lines=1, elem_id="scales")
    return {"prompt": prompt, "scales": scales, "number": number_box("scales")}


def ask_for_words(rules: Rules) -> Boxes:
    template = gr.Textbox(
        label="プロンプト / prompt", info=f"変える語の場所に {asked.HOLE} と書きます / write {asked.HOLE} in place of the word that changes",
        placeholder=f"{asked.HOLE}柴犬", max_lines=1, elem_id="template",
    )  # fmt: skip
    words = gr.Textbox(label="語 / words", info="コンマ区切り / separated by commas", placeholder="赤い, 青い", max_lines=1, elem_id="words")
    return {"template": template, "words": words, "number": number_box("words")}


def prompts_box(rules: Rules, name: str, several: bool) -> gr.Textbox | gr.Dropdown:
    """To type into, or the labels of a class model."""
    if rules.model.is_text:
        label = "プロンプト（1 行に 1 枚）/ prompts, a picture a line" if several else "プロンプト / prompt"
        return gr.Textbox(label=label, lines=4 if several else 1, max_lines=12 if several else 1, elem_id=name)
    label, choices = "ラベル（複数可）/ labels" if several else "ラベル / label", [str(i) for i in range(rules.model.class_num)]
    return gr.Dropdown(choices, value=["0"] if several else "0", multiselect=several, label=label, elem_id=name)


def number_box(tab: str) -> gr.Number:
    same = "同じ番号とシードなら同じノイズです / the same number and seed are the same noise"
    return gr.Number(0, label="絵の番号 / picture number", info=same, elem_id=f"number-{tab}")


def settings(easel: Easel) -> Boxes:
    """As the checkpoint says, to begin with."""
    job = easel.painter.job
    usual, (low, high) = job.drawing.sampler, job.drawing.sampler.cfg_interval
    with gr.Row():
        boxes = {"seed": gr.Number(job.run.seed, label="シード / seed", elem_id="seed", min_width=90)}
        boxes["cfg"] = gr.Number(usual.cfg_scale, label="cfg", elem_id="cfg", min_width=90)
        boxes["steps"] = gr.Number(usual.steps, label="ステップ数 / steps", elem_id="steps", min_width=90)
    with gr.Row():
        boxes["interval_min"] = gr.Number(low, label="interval_min", elem_id="interval_min", min_width=90)
        boxes["interval_max"] = gr.Number(high, label="interval_max", elem_id="interval_max", min_width=90)
        boxes["method"] = gr.Dropdown(SOLVERS, value=usual.method, label="solver", elem_id="method", min_width=90)
        boxes["time_shift"] = gr.Number(usual.time_shift, label="time_shift", elem_id="time_shift", min_width=90)
    return boxes


def drawing_event(easel: Easel, rules: Rules, ask: Ask, boxes: Boxes, outputs: Sequence[gr.components.Component]) -> Callable:
    """What a button does: from the values of its boxes to pictures, as they are drawn.  outputs: gallery, status, download."""
    gallery, status, download = outputs

    def draw(values: dict, request: gr.Request, progress=BAR) -> Iterator[dict]:
        start, canvas = time.perf_counter(), None
        try:
            order = ask({name: values[box] for name, box in boxes.items()}, rules)
            for canvas in easel.draw(order, request.session_hash, lambda share: progress(share, desc="描いています / drawing")):
                count = f"{len(canvas.pictures)} / {order.count} 枚（pictures）"
                yield {gallery: canvas.pictures, status: f"{count} …"}
            said = f"{count}, {time.perf_counter() - start:.1f} s"
        except Stopped:
            said = "止めました / stopped"
        except UserError as error:
            said = refusal(str(error))
        except torch.OutOfMemoryError:
            said = refusal("メモリが足りません。枚数を減らしてください / out of memory; try fewer pictures")
        if canvas:
            yield {status: said, download: gr.DownloadButton(value=canvas.zipped(), interactive=True)}
        else:
            yield {status: said}

    return draw


def refusal(why: str) -> str:
    """Beside the pictures, which stay, and in a corner of the page."""
    gr.Warning(html.escape(why))
    return as_is(f"描けません / not drawn: {why}")


def as_is(text: str) -> str:
    """Markdown that shows these very letters."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def stop_event(easel: Easel) -> Callable:
    def stop(request: gr.Request) -> None:
        easel.stop(request.session_hash)

    return stop


def easel_column(rules: Rules) -> tuple[list[gr.components.Component], gr.Button]:
    """Where the pictures appear.  Returns: gallery, status and download; the button that stops."""
    crisp = "crisp" if rules.model.img_size < CRISP else ""
    gallery = gr.Gallery(
        label="絵 / pictures", columns=4, height=520, object_fit="contain", interactive=False,
        buttons=["download", "fullscreen"], elem_id="gallery", elem_classes=crisp,
    )  # fmt: skip
    status = gr.Markdown(elem_id="status")
    with gr.Row():
        stop = gr.Button("止める / stop", elem_id="stop")
        download = gr.DownloadButton("すべて保存 / save all (.zip)", interactive=False, elem_id="download")
    return [gallery, status, download], stop


def build(easel: Easel, rules: Rules, head: str) -> gr.Blocks:
    """The page: three ways to ask, settings that they share, one place for the pictures."""
    ways: list[tuple[str, str, Callable, Ask]] = [
        ("描く / draw", "draw", ask_for_prompts, asked.pictures),
        ("cfg 比較 / cfg strip", "draw-scales", ask_for_scales, asked.over_cfg),
        ("単語比較 / word strip", "draw-words", ask_for_words, asked.over_words),
    ]
    with gr.Blocks(title="JiT-T2I", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(f"### {as_is(head)}", elem_id="head")
        with gr.Row():
            with gr.Column(scale=2, min_width=360):
                asking = []
                with gr.Tabs():
                    for title, name, boxes_of, ask in ways[: 3 if rules.model.is_text else 2]:
                        with gr.Tab(title, elem_id=f"tab-{name}"):
                            boxes = boxes_of(rules)
                            asking.append((gr.Button("描く / draw", variant="primary", elem_id=name), boxes, ask))
                shared = settings(easel)
            with gr.Column(scale=3, min_width=360):
                outputs, stop = easel_column(rules)
        for button, boxes, ask in asking:
            boxes |= shared
            button.click(
                drawing_event(easel, rules, ask, boxes, outputs), set(boxes.values()), outputs,
                concurrency_id="drawing", concurrency_limit=1, api_visibility="private", show_progress_on=outputs[1],
            )  # fmt: skip
        stop.click(stop_event(easel), queue=False, api_visibility="private")
        blocks.unload(stop_event(easel))  # the visitor is gone
    return blocks.queue(max_size=WAITING, api_open=False)


def mounted(blocks: gr.Blocks, folder: Path) -> Guard:
    """The page as an ASGI app that serves the drawings' files below `folder`."""
    theme = gr.themes.Default(font=FONT, font_mono=["ui-monospace", "monospace"])
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(app, blocks, path="", footer_links=[], run_history=False, allowed_paths=[str(folder)], show_error=False, ssr_mode=False,
                        enable_monitoring=False, theme=theme, css=CSS)  # fmt: skip
    return Guard(app, folder)
