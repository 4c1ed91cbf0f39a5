"""Records: figures, never without what they depend on; their names, lines and files."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from config import SamplerConfig
from util.files import write_whole

TITLES = {
    "fid": "FID", "is": "IS", "clip_score": "CLIP score", "r_precision": "R-precision", "precision": "precision", "recall": "recall", "fd_dinov2": "FD-DINOv2",
}  # fmt: skip


def short(count: int) -> str:
    """50000 -> "50k"."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def describe(weights: str, step: int | None, sampler: SamplerConfig, seed: int) -> str:
    """How pictures were drawn, in a line."""
    which = "raw weights" if weights == "raw" else f"EMA {weights}"
    low, high = sampler.cfg_interval
    shift = f" shifted by {sampler.time_shift:g}" if sampler.time_shift != 1 else ""
    return f"{which}{f' at step {step}' if step else ''}, cfg {sampler.cfg_scale:g} in {low:g}-{high:g}, {sampler.method} {sampler.steps}{shift}, seed {seed}"


@dataclass(frozen=True)
class Record:
    """Figures, and everything needed to believe them."""

    figures: dict[str, float]
    setting: dict[str, Any]  # what they depend on; the file's name carries its hash
    made: dict[str, Any] = field(default_factory=dict)  # how, where and when: they do not depend on it

    @property
    def place(self) -> str:
        """Size, weights, guidance and solver, as the names of files and figures have them."""
        sampling = self.setting["sampling"]
        low, high = sampling["cfg_interval"]
        weights = self.setting["weights"]["which"]
        name = f"{weights if weights == 'raw' else f'ema{weights}'}_cfg{sampling['cfg_scale']:g}_{low:g}-{high:g}_{sampling['method']}{sampling['steps']}"
        name += f"_shift{sampling['time_shift']:g}" if sampling["time_shift"] != 1 else ""
        return f"{self.setting['img_size']}px_{name}"

    @property
    def name(self) -> str:
        digest = hashlib.sha256(json.dumps(self.setting, sort_keys=True).encode()).hexdigest()[:8]
        step = self.setting["weights"]["step"]
        return f"{f'step{step}' if step else 'published'}_{self.place}_{short(self.setting['pictures'])}_{digest}"

    def scalars(self) -> dict[str, float]:
        """Under TensorBoard's names, with number, size, weights and guidance in them."""
        return {f"{TITLES[name]}-{short(self.setting['pictures'])}/{self.place}": value for name, value in self.figures.items()}

    def line(self) -> str:
        weights, sampling = self.setting["weights"], self.setting["sampling"]
        of = self.setting.get("clip_score", {}).get("captions_besides_the_own", 0) + 1
        notes = {"clip_score": " (100 x cosine)", "r_precision": f" (of {of})"}
        digits = {"fid": ".3f", "is": ".2f", "clip_score": ".2f", "fd_dinov2": ".2f"}
        count = short(self.setting["pictures"])
        found = "  ".join(f"{TITLES[name]}-{count} {value:{digits.get(name, '.3f')}}{notes.get(name, '')}" for name, value in self.figures.items())
        made = self.setting.get("fid")
        against = f", reference {made['reference']} (sha256 {made['reference_sha256'][:8]})" if made else ""
        return f"{found or 'no figures'}  [{describe(weights['which'], weights['step'], SamplerConfig(**sampling), self.setting['seed'])}{against}]"


def as_plain(value: Any) -> Any:
    """As JSON would give it back: lists for tuples."""
    return json.loads(json.dumps(value))


def read_record(path: Path, setting: Mapping[str, Any]) -> Record | None:
    """The record in a file, if it is one of ours and of this setting."""
    try:
        found = Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there, or not one of ours
        return None
    return found if found.setting == setting else None


def write_record(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(record), ensure_ascii=False, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def write_list(folder: Path, shown: Sequence[Any]) -> None:
    """pictures.jsonl beside kept pictures: what each was to show."""
    lines = [json.dumps({"file": f"{i:06d}.png", "shows": what}, ensure_ascii=False) for i, what in enumerate(shown)]
    (folder / "pictures.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
