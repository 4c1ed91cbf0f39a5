"""The method's facts: path, velocity, loss, guidance and solvers in closed form."""

import math
from itertools import pairwise

import pytest
import torch

from config import DiffusionConfig, SamplerConfig
from denoiser import SOLVERS, Objective, calls_of, guided, interpolate, sample, sample_time, solve, times_of, velocity
from util.randomness import derive, normal, seed_step, stream, uniform


def test_path_ends_in_noise_and_data_and_its_velocity_is_their_difference():
    x, eps = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    assert torch.equal(interpolate(x, eps, torch.zeros(4)), eps)
    assert torch.equal(interpolate(x, eps, torch.ones(4)), x)
    t = torch.tensor([0.0, 0.3, 0.6, 0.9])
    torch.testing.assert_close(velocity(x, interpolate(x, eps, t), t), x - eps, rtol=1e-4, atol=1e-5)


def test_velocity_is_bounded_near_data():
    x, z = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    assert velocity(x, z, torch.tensor([0.99]), 0.05).max().item() == pytest.approx(20)


def test_loss_is_the_weighted_x_loss():
    x, eps, x_pred = torch.randn(3, 5, 3, 8, 8)
    t = torch.tensor([0.1, 0.5, 0.9, 0.97, 1.0])
    for t_eps in (0.05, 0.2):
        loss = Objective(DiffusionConfig(t_eps=t_eps))(lambda z, t, y: x_pred, x, eps, t, None)
        weight = 1 / (1 - t).clamp_min(t_eps) ** 2
        torch.testing.assert_close(loss, (weight * (x - x_pred).square().mean((1, 2, 3))).mean(), rtol=1e-4, atol=1e-4)


def test_loss_of_a_network_that_knows_is_zero():
    x, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert Objective(DiffusionConfig())(lambda z, t, y: x, x, eps, torch.rand(2), None) == 0


def test_times_are_logit_normal():
    t = sample_time(torch.linspace(-3, 3, 7), DiffusionConfig(P_mean=-0.4, P_std=1.2))
    torch.testing.assert_close(t, torch.tensor([1 / (1 + math.exp(0.4 - 1.2 * n)) for n in range(-3, 4)]))


@pytest.mark.parametrize("method", SOLVERS)
def test_sampler_lands_on_the_only_picture_the_network_knows(method):
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    config = SamplerConfig(method, steps=10)
    out = sample(lambda z, t, y: x, torch.randn_like(x), torch.zeros(2), torch.zeros(2), DiffusionConfig(), config)
    torch.testing.assert_close(out, x)


def test_solvers_against_closed_forms():
    z = torch.ones(1, 3, 2, 2)
    times = times_of(8, 1)
    growth = solve(lambda z, t: z, z, "euler", times)
    torch.testing.assert_close(growth, z * (1 + 1 / 8) ** 8)
    heun = solve(lambda z, t: z, z, "heun", times)
    torch.testing.assert_close(heun, z * (1 + 1 / 8 + 1 / 128) ** 7 * (1 + 1 / 8))  # the last step is Euler
    quadratic = solve(lambda z, t: torch.full_like(z, t), z, "heun", times)
    torch.testing.assert_close(quadratic, z + (7 / 8) ** 2 / 2 + 7 / 64)  # exact up to the last step
    quadratic = solve(lambda z, t: torch.full_like(z, t), z, "ab2", times)
    torch.testing.assert_close(quadratic, z + (1 - 1 / 64) / 2)  # exact but for the first step
    uneven = solve(lambda z, t: torch.full_like(z, t), z, "ab2", [0, 0.5, 0.75, 1])
    torch.testing.assert_close(uneven, z + (1 - 1 / 4) / 2)


def spread(t: float, data: float = 0.3) -> float:
    """The standard deviation of z_t where the data's is that."""
    return math.hypot(t * data, 1 - t)


def gaussian_velocity(z: torch.Tensor, t: float, data: float = 0.3) -> torch.Tensor:
    """That of the best network for normal data, whose ODE keeps z / spread(t)."""
    return (t * data**2 / spread(t, data) ** 2 - 1) / (1 - t) * z


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2), ("ab2", 2), ("dpmpp2m", 2)])
def test_each_solver_converges_at_its_order(method, order):
    assert method in SOLVERS
    z, errors = torch.ones(1, 3, 1, 1), []
    for steps in (40, 80):
        found = solve(gaussian_velocity, z, method, [0.1 + 0.8 * i / steps for i in range(steps + 1)])
        errors.append((found - spread(0.9) / spread(0.1)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15) and errors[1] < 1e-2
    whole = [(solve(gaussian_velocity, z, method, times_of(steps, 1)) - 0.3).abs().max().item() for steps in (20, 160)]
    assert whole[1] < whole[0] / 6  # from noise to data too


@pytest.mark.parametrize("shift", [0.5, 1, 1.3, 2.4, 3])  # as floats 1.3 and 2.4 would miss 1
def test_a_shift_bends_the_times_and_keeps_their_ends(shift):
    even, times = times_of(10, 1), times_of(10, shift)
    assert even == torch.linspace(0, 1, 11).tolist() and times[0] == 0 and times[-1] == 1 and times == sorted(times)
    for t, bent in zip(even, times):
        assert 1 - bent == pytest.approx(shift * (1 - t) / (1 + (shift - 1) * (1 - t)), abs=1e-6)


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("shift", [1e-6, 1e6])
def test_times_that_float32_cannot_tell_apart_are_one(method, shift):
    times = times_of(50, shift)
    assert times[0] == 0 and times[-1] == 1 and all(before < after for before, after in pairwise(times))
    assert solve(gaussian_velocity, torch.ones(1, 3, 1, 1), method, times).isfinite().all()


def test_network_calls_per_picture():
    """Guided ones are one call with twice the rows."""
    for method, steps, cfg, interval, calls, rows in [
        ("euler", 50, 1.0, (0, 1), 50, 50),
        ("ab2", 50, 1.0, (0, 1), 50, 50),
        ("dpmpp2m", 50, 3.0, (0, 1), 50, 100),
        ("heun", 50, 1.0, (0, 1), 99, 99),
        ("heun", 50, 3.0, (0, 1), 99, 198),
        ("heun", 50, 3.0, (0.1, 1), 99, 99 + 88),  # evaluations at t <= 0.1: step 0 has t = 0, .02; ..., step 4 .08, .1; step 5 .1
        ("heun", 50, 3.0, (0.1, 0.5), 99, 99 + 38),
    ]:
        seen = []

        def net(z, t, y, seen=seen):
            assert len(z) == len(t) == len(y)
            seen.append(t.tolist())
            return torch.zeros_like(z)

        config = SamplerConfig(method, steps, cfg, interval)
        sample(net, torch.randn(1, 3, 2, 2), torch.ones(1), torch.zeros(1), DiffusionConfig(), config)
        assert len(seen) == calls == calls_of(config) and sum(map(len, seen)) == rows and max(map(max, seen)) < 1


def test_guidance_extrapolates_inside_its_interval_only():
    net, z = (lambda z, t, y: z + ((1 - t) * y).view(-1, 1, 1, 1)), torch.zeros(1, 1, 1, 1)  # a velocity of y

    def v(t: float, scale: float, interval: tuple[float, float]) -> float:
        return guided(net, torch.ones(1), torch.zeros(1), DiffusionConfig(), SamplerConfig(cfg_scale=scale, cfg_interval=interval))(z, t).item()

    assert [v(t, 3.0, (0.1, 0.9)) for t in (0, 0.1, 0.11, 0.89, 0.9)] == pytest.approx([1, 1, 3, 3, 1])
    assert v(0.0, 3.0, (0.0, 1.0)) == 3  # from 0 on if the interval starts at 0
    assert v(0.5, 1.0, (0.0, 1.0)) == 1


@pytest.mark.parametrize("low, high", [(0.1, 1.0), (0.1, 0.9), (0.0, 0.5), (0.3, 0.7)])
@pytest.mark.parametrize("steps", [10, 20, 25, 30, 40, 50])
def test_guidance_acts_at_the_times_of_the_published_sampler(steps, low, high):
    """Both bounds are excluded in float32, where 0.1 is a time of 10, 20 and 40 steps; of 50 the time is below 0.1, of 30 above."""
    asked = set()

    def net(z, t, y):
        if 0 in y:
            asked.add(t[0].item())
        return torch.zeros_like(z)

    sample(net, torch.ones(1, 3, 2, 2), torch.ones(1), torch.zeros(1), DiffusionConfig(), SamplerConfig("heun", steps, 3.0, (low, high)))
    t = torch.linspace(0, 1, steps + 1)[:-1]
    assert asked == set(t[(t < high) & ((low == 0) | (t > low))].tolist())


def test_a_sample_follows_both_conditions_and_the_bound_on_1_minus_t():
    noise, x, x_null = torch.randn(3, 1, 3, 2, 2)
    y = torch.ones(1, requires_grad=True)
    net = lambda z, t, y: x_null + y.view(-1, 1, 1, 1) * (x - x_null)  # noqa: E731
    out = sample(net, noise, y, torch.zeros(1), DiffusionConfig(t_eps=0.8), SamplerConfig("euler", 2, 3.0))
    aim = x_null + 3 * (x - x_null)
    middle = noise + (aim - noise) / 2
    torch.testing.assert_close(out, middle + (aim - middle) / 2 / 0.8)
    assert not out.requires_grad


def test_noise_scale_is_the_spread_of_the_start():
    seen = []

    def net(z, t, y):
        seen.append(z)
        return z

    sample(net, torch.ones(1, 3, 2, 2), torch.zeros(1), torch.zeros(1), DiffusionConfig(noise_scale=2.0), SamplerConfig("euler", 1))
    assert (seen[0] == 2).all()


def test_solver_state_is_float32_though_the_network_is_not():
    z = torch.randn(1, 3, 4, 4)
    net = lambda z, t, y: z.bfloat16()  # noqa: E731
    out = sample(net, z, torch.zeros(1), torch.zeros(1), DiffusionConfig(), SamplerConfig("heun", 4))
    assert out.dtype == torch.float32
    with pytest.raises(AssertionError, match="float32"):
        solve(lambda z, t: z, z.bfloat16(), "euler", times_of(2, 1))


@pytest.mark.parametrize("shape", [(), (1,), (15,), (16,), (17,), (3, 5, 7), (3, 8, 8), (3, 16, 16)])
def test_a_row_of_noise_is_what_torch_draws_from_a_generator_of_its_own(shape):
    """Below 16 numbers and from 16 on torch draws in two ways."""
    numbers = [5, 0, 10**9, 5]
    assert torch.equal(normal(3, "eps", numbers, shape), torch.stack([torch.randn(shape, generator=stream(3, "eps", n)) for n in numbers]))
    assert torch.equal(uniform(3, "drop", numbers), torch.cat([torch.rand(1, generator=stream(3, "drop", n)) for n in numbers]))


def test_a_steps_dropout_is_what_torch_seeds():
    torch.manual_seed(derive(3, "dropout", 8))
    drawn = torch.rand(5)
    seed_step(3, 8, torch.device("cpu"))
    assert torch.equal(torch.rand(5), drawn)


def test_start_noise_of_a_picture_depends_on_its_number_alone():
    whole = normal(0, "sample", range(6), (3, 4, 4))
    assert torch.equal(whole[[4, 1]], normal(0, "sample", [4, 1], (3, 4, 4)))
    assert not torch.equal(whole, normal(1, "sample", range(6), (3, 4, 4)))
    assert not torch.equal(whole, normal(0, "eps", range(6), (3, 4, 4)))
    assert abs(normal(0, "eps", range(400), (100,)).std().item() - 1) < 0.02
