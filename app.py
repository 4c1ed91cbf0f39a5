"""A page in the browser to type prompts into: `python app.py --resume output/b16`, then open http://127.0.0.1:7860."""

from collections.abc import Sequence

import flags
from util.errors import need_package, told_in_one_line

if __name__ == "__main__":
    with told_in_one_line():
        flags.parse_app()  # before torch is imported

import tempfile
from pathlib import Path

import lora
from config import AppJob
from page import server
from page.asked import Rules
from page.easel import Easel
from sampling import load_painter
from util import checkpoint
from util.logging import say


def serve(job: AppJob) -> None:
    """Until it is stopped.  Raises: UserError where it cannot begin."""
    need_package("gradio", "app.py", "'gradio>=6,<7'")
    path = checkpoint.find(job.resume)
    if job.lora:
        lora.check_folder(job.lora)
    with server.listening(job.host, job.port) as place, tempfile.TemporaryDirectory(prefix="jit-page-") as folder:
        server.hush(Path(folder))
        from page import layout  # gradio, which takes seconds, and which need not be there

        weights = job.weights or ("1" if job.lora and not checkpoint.is_exported(path) else None)  # adapters are trained on EMA 1
        painter = load_painter(job.resume, weights, job.device, job.llm, job.trust_remote_code)
        head = layout.headline(painter, path)
        if job.lora:
            painter.add_lora(job.lora, job.lora_scale)
            head += f" · {Path(job.lora).resolve().name} × {job.lora_scale:g}"
        easel = Easel(painter, Path(folder))
        blocks = layout.build(easel, Rules(painter.job.model, job.most_pictures, job.most_steps), head)
        say(server.address(job.host, place))
        try:
            server.run(layout.mounted(blocks, Path(folder)), place)
        finally:
            easel.stop()


def main(argv: Sequence[str] | None = None) -> None:
    with told_in_one_line(), server.ended_by_signal():
        serve(flags.parse_app(argv))


if __name__ == "__main__":
    main()
