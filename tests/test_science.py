"""The paper's two small experiments: what is said of predictions, losses and distances, and the smallest case of each."""

from dataclasses import replace

import pytest
import torch

from benchmarks import science
from benchmarks.predictions import LOSSES, PREDICTIONS, Mlp, x_of
from denoiser import interpolate


@pytest.fixture
def point():
    x, eps, t = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4), torch.linspace(0.1, 0.9, 6)
    return x, eps, t, interpolate(x, eps, t)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_a_perfect_prediction_of_anything_is_the_clean_picture(predicts, point):
    x, eps, t, z_t = point
    torch.testing.assert_close(x_of(predicts, {"x": x, "eps": eps, "v": x - eps}[predicts], z_t, t, 0.05), x)


@pytest.mark.parametrize("space", PREDICTIONS)
def test_a_loss_is_the_plain_squared_error_of_what_is_predicted_in_its_own_space(space, point):
    x, eps, t, z_t = point
    target = {"x": x, "eps": eps, "v": x - eps}[space]
    output = target + torch.randn_like(target)
    found = LOSSES[space](x_of(space, output, z_t, t, 0.05), x, z_t, t, 0.05)
    torch.testing.assert_close(found, (output - target).square().mean())


def test_sliced_distance_of_a_shift_is_the_shift_over_the_square_root_of_two():
    points = torch.randn(500, 2)
    assert science.sliced_distance(points, points[torch.randperm(500)]) == pytest.approx(0, abs=1e-6)
    assert science.sliced_distance(points, points + torch.tensor([3.0, 4.0])) == pytest.approx(5 / 2**0.5, rel=1e-4)


def test_the_plane_is_orthonormal_and_the_spiral_has_unit_variance():
    place = science.plane(16)
    torch.testing.assert_close(place.T @ place, torch.eye(2))
    assert science.spiral(20_000, torch.Generator().manual_seed(0)).square().mean() == pytest.approx(1, rel=0.05)


def test_the_network_of_the_toy_has_five_layers():
    assert [tuple(param.shape) for param in Mlp(16).parameters() if param.ndim == 2] == [(256, 17), *[(256, 256)] * 3, (16, 256)]


def test_the_smallest_case_of_each_is_measured_kept_and_told(tmp_path, capsys):
    (tmp_path / "drawn").mkdir()
    science.train_classifier(tmp_path / "classifier.pt", 2)
    experiments = [science.toy(predicts, 2, steps=200, drawn=1000) for predicts in PREDICTIONS]
    experiments += [science.pictures(predicts, 32, steps=2, drawn=20) for predicts in PREDICTIONS]
    found = science.Found(tmp_path / "found.jsonl")
    for one in experiments:
        found.keep(one, science.run_one(one, tmp_path))
    untrained = science.run_one(replace(experiments[0], steps=1), tmp_path)
    assert found[experiments[0]]["distance"] < untrained["distance"]
    assert science.Found(tmp_path / "found.jsonl") == found
    science.run_all(experiments, found, tmp_path, jobs=0)  # nothing is left, so no process is wanted
    science.tell(found, tmp_path)
    told = capsys.readouterr().out
    assert "| 2 |" in told and "| 32, 3,072 | v |" in told
    assert (tmp_path / "toy.png").stat().st_size and (tmp_path / "pictures.png").stat().st_size


def test_the_full_form_has_what_the_paper_has_and_chooses_the_best_rate():
    full = science.full_form()
    assert len([one for one in full if one.kind == "toy"]) == 15 and len([one for one in full if one.kind == "pictures"]) == 36
    found = {science.trial(one, lr): {"distance": abs(lr - 1e-3)} for one in full for lr in science.RATES}
    assert {science.tuned(one, found).lr for one in full} == {1e-3}
    seeds = science.seeded_form(full, found)
    assert len(seeds) == len(set(seeds)) == 15 * 5 + (36 + 5) * 3  # x-prediction in patches of 8 under the v-loss is one of both tables
    assert len(science.seeded_form([one for one in full if one.kind == "toy"], found)) == 15 * 5  # --only toy
    assert {(one.P_mean, one.noise) for one in science.noise_form(found)} == {(0, 1), (-0.4, 1), (-0.8, 1), (-1.2, 1), (-0.8, 0.5), (-0.8, 2)}
