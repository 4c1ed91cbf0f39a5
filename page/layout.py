"""The page itself: what stands on it, and what its buttons do."""

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

WAITING = 20  # visitors in the queue
FONT = ["system-ui", "Noto Sans JP", "Noto Sans CJK JP", "Hiragino Sans", "Yu Gothic UI", "sans-serif"]
BAR = gr.Progress()
CRISP = 128  # pictures of fewer pixels are enlarged without smoothing
CSS = ".crisp img { image-rendering: pixelated; } .progress-text { white-space: nowrap; }"


def headline(painter: LoadedPainter, path: Path) -> str:
    """Which checkpoint, model, step, weights and text encoder draw; no folders of this machine."""
    path, model, which, step = path.resolve(), painter.job.model, painter.job.drawing.weights, painter.weights.step
    facts = [path.name if path.is_dir() else f"{path.parent.name}/{path.name}", model.name, f"{model.img_size} × {model.img_size}"]
    facts += [f"step {step:,}"] * bool(step) + ["raw weights" if which == "raw" else f"EMA {which}"]
    if painter.text:
        llm = painter.text["llm"]
        facts.append(f"text encoder {Path(llm).name if hub.is_local(painter.text['revision']) else llm}")
    else:
        facts.append(f"{model.class_num} classes")
    return " · ".join(facts)


def ask_for_prompts(rules: Rules) -> dict[str, gr.components.Component]:
    if rules.model.is_text:
        prompts = gr.Textbox(label="プロンプト（1 行に 1 枚）/ prompts, a picture a line", lines=4, max_lines=12, elem_id="prompts")
    else:
        prompts = labels_box("ラベル（複数可）/ labels", "prompts", rules, several=True)
    times = gr.Number(1, label="回数（全部の行を、次の番号で描き足します）/ times: all lines again, with the next numbers", elem_id="times")
    return {"prompts": prompts, "times": times}


def ask_for_scales(rules: Rules) -> dict[str, gr.components.Component]:
    if rules.model.is_text:
        prompt = gr.Textbox(label="プロンプト / prompt", max_lines=1, elem_id="prompt")
    else:
        prompt = labels_box("ラベル / label", "prompt", rules)
    scales = gr.Textbox("1, 2, 3, 4", label="cfg の値（コンマ区切り）/ values of cfg, between commas", max_lines=1, elem_id="scales")
    return {"prompt": prompt, "scales": scales, "number": number_box("scales")}


def ask_for_words(rules: Rules) -> dict[str, gr.components.Component]:
    template = gr.Textbox(
        label="プロンプト / prompt", info=f"変える語の場所に {asked.HOLE} と書きます / write {asked.HOLE} in place of the word that changes",
        placeholder=f"{asked.HOLE}柴犬", max_lines=1, elem_id="template",
    )  # fmt: skip
    words = gr.Textbox(label="語（コンマ区切り）/ words, between commas", placeholder="赤い, 青い", max_lines=1, elem_id="words")
    return {"template": template, "words": words, "number": number_box("words")}


def labels_box(label: str, name: str, rules: Rules, several: bool = False) -> gr.Dropdown:
    choices = [str(i) for i in range(rules.model.class_num)]
    return gr.Dropdown(choices, value=["0"] if several else "0", multiselect=several, label=label, elem_id=name)


def number_box(tab: str) -> gr.Number:
    return gr.Number(0, label="絵の番号（同じ番号は同じノイズ）/ picture number: the same noise", elem_id=f"number-{tab}")


def settings(easel: Easel, rules: Rules) -> dict[str, gr.components.Component]:
    """As the checkpoint says, to begin with."""
    job = easel.painter.job
    usual, (low, high) = job.drawing.sampler, job.drawing.sampler.cfg_interval
    with gr.Row():
        boxes = {"seed": gr.Number(job.run.seed, label="シード / seed", elem_id="seed", min_width=90)}
        boxes["cfg"] = gr.Number(usual.cfg_scale, label="cfg", elem_id="cfg", min_width=90)
        boxes["steps"] = gr.Number(usual.steps, label=f"ステップ数 / steps ≤ {rules.most_steps}", elem_id="steps", min_width=90)
    with gr.Row():
        boxes["interval_min"] = gr.Number(low, label="interval_min", elem_id="interval_min", min_width=90)
        boxes["interval_max"] = gr.Number(high, label="interval_max", elem_id="interval_max", min_width=90)
        boxes["method"] = gr.Radio(SOLVERS, value=usual.method, label="ソルバー / solver", elem_id="method", min_width=90)
    return boxes


Ask = Callable[[Mapping[str, Any], Rules], Order]


def drawing_event(easel: Easel, rules: Rules, ask: Ask, boxes: Mapping[str, gr.components.Component], outputs: Sequence[gr.components.Component]) -> Callable:
    """What a button does: from the values of its boxes to pictures, as they are drawn.  outputs: gallery, status, download."""
    gallery, status, download = outputs

    def draw(values: dict, request: gr.Request, progress=BAR) -> Iterator[dict]:
        start, drawing = time.perf_counter(), None
        try:
            order = ask({name: values[box] for name, box in boxes.items()}, rules)
            for drawing in easel.draw(order, request.session_hash, lambda share: progress(share, desc="描いています / drawing")):
                count = f"{len(drawing.pictures)} / {order.count} 枚（pictures）"
                yield {gallery: drawing.pictures, status: f"{count} …"}
            said = f"{count}, {time.perf_counter() - start:.1f} s"
        except Stopped:
            said = "止めました / stopped"
        except UserError as error:
            raise gr.Error(str(error), title="描けません / not drawn", print_exception=False) from error
        except torch.OutOfMemoryError as error:
            raise gr.Error("メモリが足りません。枚数を減らしてください / out of memory; try fewer pictures", print_exception=False) from error
        if drawing:
            yield {status: said, download: gr.DownloadButton(value=drawing.zipped(), interactive=True)}
        else:
            yield {status: said}

    return draw


def stop_event(easel: Easel) -> Callable:
    def stop(request: gr.Request) -> None:
        easel.stop(request.session_hash)

    return stop


def build(easel: Easel, rules: Rules, head: str) -> gr.Blocks:
    """The page."""
    kinds: list[tuple[str, str, Callable, Ask]] = [
        ("描く / draw", "draw", ask_for_prompts, asked.pictures),
        ("cfg を変える / cfg strip", "draw-scales", ask_for_scales, asked.over_cfg),
        ("1 語を変える / word strip", "draw-words", ask_for_words, asked.over_words),
    ]
    with gr.Blocks(title="JiT-T2I", analytics_enabled=False) as blocks:
        gr.Markdown(f"### {head}", elem_id="head")
        with gr.Row():
            with gr.Column(scale=2, min_width=360):
                buttons = []
                with gr.Tabs():
                    for title, name, boxes_of, ask in kinds[: 3 if rules.model.is_text else 2]:
                        with gr.Tab(title):
                            boxes = boxes_of(rules)
                            buttons.append((gr.Button("描く / draw", variant="primary", elem_id=name), boxes, ask))
                shared = settings(easel, rules)
            with gr.Column(scale=3, min_width=360):
                crisp = "crisp" if rules.model.img_size < CRISP else ""
                gallery = gr.Gallery(label="絵 / pictures", columns=4, object_fit="contain", height=520, interactive=False,
                                     buttons=["download", "fullscreen"], elem_id="gallery", elem_classes=crisp)  # fmt: skip
                status = gr.Markdown(elem_id="status")
                with gr.Row():
                    stop = gr.Button("止める / stop", variant="stop", elem_id="stop")
                    download = gr.DownloadButton("すべて保存 / download all (.zip)", interactive=False, elem_id="download")
        for button, boxes, ask in buttons:
            fields = boxes | shared
            button.click(
                drawing_event(easel, rules, ask, fields, (gallery, status, download)), set(fields.values()), [gallery, status, download],
                concurrency_id="drawing", concurrency_limit=1, api_visibility="private", show_progress_on=gallery,
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
