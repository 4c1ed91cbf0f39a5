"""A sweep over weights, guidance and its interval, and the best of it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from config import SamplerConfig, Sweep
from evaluation.evaluator import Evaluator, call_out_initial
from evaluation.records import TITLES, Record, short
from util import distributed as dist
from util.logging import say


def settings_of(sweep: Sweep, sampler: SamplerConfig) -> Iterator[tuple[str, SamplerConfig]]:
    """All combinations; without guidance there is no interval."""
    for which in sweep.weights:
        for interval in sweep.intervals:
            for scale in sweep.scales:
                if scale != 1 or interval == sweep.intervals[0]:
                    yield which, replace(sampler, cfg_scale=scale, cfg_interval=interval)


def run_sweep(evaluator: Evaluator, sweep: Sweep, count: int) -> list[Record]:
    """All combinations with `sweep.images` pictures, as the paper chooses EMA and cfg (arXiv:2511.13720, table 9), then the best FID's with `count`.  Collective.

    Combinations measured before are not measured again, so a sweep that was killed goes on.
    Returns: the sweep's records, and last that of the best with `count` pictures.
    """
    for which in sweep.weights:
        call_out_initial(evaluator.state, which)
    quick = replace(evaluator, save_images=False)
    points = list(settings_of(sweep, evaluator.painter.sampler))
    records = [known_or_measured(quick, *point, sweep.images) for point in points]
    best = min(records, key=lambda record: record.figures["fid"])
    if dist.is_main():
        stem = evaluator.folder / f"sweep_step{evaluator.state.step}_{short(sweep.images)}"
        text = table(records, best)
        stem.with_suffix(".md").write_text(text, encoding="utf-8")
        plot(records, best, stem.with_suffix(".png"))
        say(f"\n{text}\ntable and plot: {stem}.md, {stem}.png")
    which, sampler = points[records.index(best)]
    if sampler.cfg_scale in {min(sweep.scales), max(sweep.scales)} - {1} and len(set(sweep.scales)) > 2:
        say(f"the best cfg, {sampler.cfg_scale:g}, is at the end of the range: a wider --cfg may hold a better one")
    final = evaluator(which, sampler, count) if evaluator.save_images else known_or_measured(evaluator, which, sampler, count)
    return [*records, final]


def known_or_measured(evaluator: Evaluator, which: str, sampler: SamplerConfig, count: int) -> Record:
    """Collective."""
    point = evaluator.point(which, sampler, count)
    return evaluator.recall(point) or evaluator.measure(point)


def table(records: Sequence[Record], best: Record) -> str:
    """Markdown; the best FID is marked."""
    names = list(records[0].figures)
    count = short(records[0].setting["pictures"])
    rows = [["weights", "cfg", "interval", *(f"{TITLES[name]}-{count}" for name in names)], ["---"] * (3 + len(names))]
    for record in records:
        sampling = record.setting["sampling"]
        low, high = sampling["cfg_interval"]
        figures = [f"{record.figures[name]:.3f}" + (" **best**" if record is best and name == "fid" else "") for name in names]
        rows.append([record.setting["weights"]["which"], f"{sampling['cfg_scale']:g}", f"{low:g}-{high:g}", *figures])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def plot(records: Sequence[Record], best: Record, path: Path) -> None:
    """Each figure against cfg, one line for each pair of weights and interval; the best FID's setting is circled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(records[0].figures)
    figure = Figure(figsize=(4.5 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    lines: dict[tuple, list[Record]] = {}
    for record in records:
        lines.setdefault((record.setting["weights"]["which"], tuple(record.setting["sampling"]["cfg_interval"])), []).append(record)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for (which, (low, high)), line in lines.items():
            points = sorted((record.setting["sampling"]["cfg_scale"], record.figures[name]) for record in line)
            axes.plot(*zip(*points), marker=".", label=f"{which if which == 'raw' else f'EMA {which}'}, {low:g}-{high:g}")
        axes.plot(best.setting["sampling"]["cfg_scale"], best.figures[name], "o", markersize=12, fillstyle="none", color="black")
        axes.set(xlabel="cfg", title=f"{TITLES[name]}-{short(best.setting['pictures'])}")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
