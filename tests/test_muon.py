"""Muon: timm's numbers, which parameters it takes, steps that are skipped, and a run that goes on with it."""

from copy import deepcopy
from functools import partial

import pytest
import timm.optim.muon as theirs
import torch
from test_training import assert_same_training, flags, run, weights

import models_jit
from engine_jit import make_optimizer
from util.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def net():
    torch.manual_seed(0)
    return models_jit.build_model("JiT-Nano/8", input_size=16, num_classes=3)


def set_gradients(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in net.parameters():
        if param.requires_grad:
            param.grad = torch.randn(param.shape, generator=generator)


def test_it_is_timms_on_the_matrices_of_the_blocks_and_adamw_on_the_rest(net, monkeypatch):
    monkeypatch.setattr(theirs, "zeropower_via_newtonschulz", partial(theirs.zeropower_via_newtonschulz, dtype=torch.float32))
    other = deepcopy(net)
    ours = make_optimizer(net, 0.1, CPU, "muon")
    inside = {param for block in net.blocks for param in block.parameters() if param.ndim == 2}
    assert set(ours.param_groups[0]["params"]) == inside and len(inside) == 5 * len(net.blocks)
    of_theirs = [param for block in other.blocks for param in block.parameters() if param.ndim == 2]
    rest = [param for param in other.parameters() if param.requires_grad and not any(param is matrix for matrix in of_theirs)]
    decay, plain = [p for p in rest if p.ndim > 1], [p for p in rest if p.ndim <= 1]
    muon = theirs.Muon([{"params": of_theirs}], weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.95))
    for step in range(3):
        for optimizer in (ours, muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (step + 1)
        set_gradients(net, step), set_gradients(other, step)
        ours.step(), muon.step(), adamw.step()
    for (name, one), two in zip(net.named_parameters(), other.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-5, msg=lambda said, name=name: f"{name}: {said}")


def test_a_direction_is_orthogonal_and_as_long_as_adamws(net):
    optimizer, matrix = make_optimizer(net, 0.0, CPU, "muon"), net.blocks[0].attn.qkv.weight
    before = matrix.detach().clone()
    set_gradients(net, 0)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    direction = (before - matrix.detach()) / (0.2 * max(matrix.shape) ** 0.5)
    values = torch.linalg.svdvals(direction)
    assert values.min() > 0.6 and values.max() < 1.3  # the quintic's singular values lie about 1
    assert 0.1 < (before - matrix.detach()).square().mean().sqrt() < 0.3  # AdamW's updates have 0.2 to 0.4


def test_a_step_that_is_not_finite_changes_nothing(net):
    optimizer = make_optimizer(net, 0.1, CPU, "muon")
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.found_inf = torch.zeros(())
    set_gradients(net, 0)
    optimizer.step()
    weights, state = deepcopy(net.state_dict()), deepcopy(optimizer.state_dict()["state"])
    set_gradients(net, 1)
    net.blocks[0].attn.qkv.weight.grad[0, 0] = float("nan")
    net.final_layer.linear.weight.grad[0, 0] = float("inf")
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(value, after[i][name]) for i, values in state.items() for name, value in values.items())
    optimizer.found_inf = torch.zeros(())
    set_gradients(net, 2)
    optimizer.step()
    assert not any(torch.equal(value, weights[name]) for name, value in net.state_dict().items() if name.endswith("qkv.weight"))


def test_a_run_goes_on_with_it_to_the_bit_and_with_no_other(text_data, llm_folder, tmp_path):
    common = ["--model", "JiT-Nano/8-Tokens", "--batch_size", 4, "--lr", "1e-2", "--optimizer", "muon", "--max_text_len", 12]
    straight, resumed = ([str(part) for part in flags(text_data, llm_folder(), tmp_path / name, *common)] for name in ("straight", "resumed"))
    run(*straight, "--epochs", "2")
    run(*resumed, "--epochs", "1")
    run(*resumed, "--epochs", "2", "--resume", str(tmp_path / "resumed"))
    assert_same_training(weights(tmp_path / "straight"), weights(tmp_path / "resumed"))
    with pytest.raises(UserError, match="--optimizer is adamw, but .* was trained with muon; give --optimizer muon"):
        run(*resumed, "--epochs", "3", "--resume", str(tmp_path / "resumed"), "--optimizer", "adamw")
    with pytest.raises(UserError, match="--optimizer muon .* --parallel fsdp"):
        run(*resumed, "--parallel", "fsdp")
