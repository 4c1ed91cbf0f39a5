"""Figures to TensorBoard, trackio and wandb: the same ones, on through a resumed run, and nothing that goes wrong with them ends the training."""

import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import flags, run

from config import Run
from util.errors import UserError
from util.trackers import Board, check


def logged(folder) -> dict[str, dict[int, float]]:
    """TensorBoard's scalars, by name and step."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: {one.step: one.value for one in events.Scalars(name)} for name in events.Tags()["scalars"]}


@pytest.mark.slow
def test_trackio_gets_what_tensorboard_gets_and_goes_on_in_a_resumed_run(text_data, llm_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    found = {}
    for name, more in {"plain": [], "tracked": ["--tracker", "trackio", "--tracker_project", "p"]}.items():
        for epochs in (2, 4):
            argv = flags(text_data, llm_folder(), tmp_path / name, "--batch_size", 4, "--epochs", epochs, "--log_freq", 1, "--resume", tmp_path / name)
            run(*argv, *more)
    plain = logged(tmp_path / "plain")
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("p")
    assert name.startswith("tracked-")
    for row in SQLiteStorage.get_logs("p", name):
        for key, value in row.items():
            if key in plain and key != "images_per_second":
                found.setdefault(key, {})[row["step"]] = value
    assert set(found) >= {"train_loss", "lr", "text_gap/loss", "grad_norm"} and sorted(found["train_loss"]) == list(range(1, 9))
    for key, values in found.items():
        assert values == pytest.approx({step: plain[key][step] for step in values}, rel=1e-6), key
    assert not logged(tmp_path / "tracked")


def test_wandb_is_called_with_the_run_its_settings_and_its_figures(tmp_path, monkeypatch):
    """The package itself, without a network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    board = Board(Run(output_dir=str(tmp_path), tracker="wandb"), {"model": {"name": "JiT-B/16"}})
    import numpy as np
    import wandb

    assert wandb.run.project == "jit-t2i" and wandb.run.name.startswith(tmp_path.name) and wandb.run.config["model"]["name"] == "JiT-B/16"
    calls, log = [], wandb.log
    monkeypatch.setattr(wandb, "log", lambda values, step: calls.append((values, step)) or log(values, step=step))
    board.scalars({"train_loss": 0.5}, 3)
    board.image("prompts", np.zeros((8, 8, 3), dtype=np.uint8), 3)
    assert calls[0] == ({"train_loss": 0.5}, 3) and isinstance(calls[1][0]["prompts"], wandb.Image) and wandb.run.step == 3
    board.close()
    assert wandb.run is None and list(tmp_path.glob("wandb/offline-run-*"))


def test_a_tracker_that_is_not_installed_is_one_line_and_one_that_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises((UserError, ValueError), match="wandb"):
        check(Run(tracker="wandb"))
    board = Board(Run(output_dir=str(tmp_path)), {})
    board.tracker.writer.add_scalar = lambda *_: json.loads("{")
    for step in (1, 2):
        board.scalars({"train_loss": 1.0}, step)
    board.close()
    assert capsys.readouterr().out.count("warning: tensorboard cannot be written to") == 1
