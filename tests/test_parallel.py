"""How a network is run: compiled block by block, computed again in the backward pass, and as drawing calls it."""

import copy
import socket

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import assert_same_training, flags, run, weights
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import models_jit
import models_mmjit
from config import DiffusionConfig
from denoiser import Objective, v_loss
from text_encoder import usual_dtype
from util import distributed as dist
from util import parallel
from util.errors import UserError
from util.parallel import Parallel, compiled, for_drawing, twin, uses_bf16, uses_compile
from util.text import Text

CPU = torch.device("cpu")
JIT = {"input_size": 16, "hidden_size": 64, "depth": 2, "num_heads": 2, "bottleneck_dim": 16, "in_context_len": 4, "in_context_start": 1}


def network(kind: str = "JiT", **kwargs) -> nn.Module:
    """A small one in which every weight acts."""
    torch.manual_seed(0)
    if kind == "MMJiT":
        net = models_mmjit.MMJiT(16, 4, hidden_size=64, depth=2, num_heads=2, text_dim=24, bottleneck_dim=16)
    else:
        net = models_jit.JiT(**(JIT | kwargs), patch_size=4, num_classes=5)
    for param in net.parameters():
        nn.init.normal_(param, std=0.05)
    return net


def inputs(kind: str, batch: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 5, (batch,), generator=g)
    if kind == "MMJiT":
        y = Text(torch.randn(batch, 6, 24, generator=g), torch.rand(batch, 6, generator=g) < 0.7)
    return torch.randn(batch, 3, 16, 16, generator=g), torch.rand(batch, generator=g), y


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are made, by a backend that computes as eager does."""
    made = []

    def backend(graph, example, **kwargs):
        made.append(graph)
        return aot_eager(graph, example)

    torch._dynamo.reset()
    monkeypatch.setattr(parallel, "BACKEND", backend)
    yield made
    torch._dynamo.reset()


def gradients(call, net, kind, bf16=False, batch=4):
    net.zero_grad()
    z, t, y = inputs(kind, batch)
    loss = Objective(DiffusionConfig())(call, z, inputs(kind, batch, 1)[0], t, y)
    loss.backward()
    return loss.detach(), {name: param.grad.clone() for name, param in net.named_parameters()}


@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["JiT", pytest.param("MMJiT", marks=pytest.mark.long)])
def test_compiled_blocks_compute_what_eager_ones_do(kind, bf16):
    """By Inductor, which fuses and so rounds in other places: in float32 within 1e-4; in bf16 it is as near to the float32 gradients as eager is."""
    torch._dynamo.reset()
    net = network(kind)
    other = copy.deepcopy(net)
    loss, wanted = gradients(Parallel(net, CPU, False), net, kind)
    rounding = {name: 1e-4 * value.norm() for name, value in wanted.items()}
    if bf16:
        eager = gradients(Parallel(net, CPU, True), net, kind)[1]
        rounding = {name: 1.5 * (eager[name] - value).norm() + 1e-3 * value.norm() for name, value in wanted.items()}
    loss_compiled, found = gradients(Parallel(other, CPU, bf16, compile=True), other, kind)
    torch.testing.assert_close(loss_compiled, loss, rtol=1e-2 if bf16 else 1e-5, atol=0)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= rounding[name], name


def test_a_compiled_loss_is_the_loss():
    torch._dynamo.reset()
    x_pred, x, z_t = torch.randn(3, 2, 3, 8, 8)
    t = torch.tensor([0.2, 0.99])
    torch.testing.assert_close(compiled(v_loss)(x_pred, x, z_t, t, 0.05), v_loss(x_pred, x, z_t, t, 0.05), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["JiT", "MMJiT"])
def test_training_and_drawing_have_graphs_of_their_own_and_soon_make_no_more(kind, graphs):
    net = network(kind)
    train, (draw, _) = Parallel(net, CPU, False, compile=True), for_drawing(net, CPU, False, compile=True)

    def epoch():
        for _ in range(2):
            gradients(train, net, kind)

    def evaluation():
        with torch.no_grad():
            for batch in (4, 8, 3, 6):
                draw(*inputs(kind, batch))

    epoch()
    of_training = len(graphs)
    assert of_training == (2 if kind == "JiT" else 3)  # without and with context tokens; text blocks, double blocks, the last one
    evaluation()
    both = len(graphs)
    assert both == 3 * of_training  # for a first batch, then for any
    epoch(), evaluation(), epoch(), evaluation()
    assert len(graphs) == both


def test_a_graph_break_is_an_error(graphs):
    net = network()
    forward = net.blocks[1].forward
    net.blocks[1].forward = lambda *tensors: (torch._dynamo.graph_break(), forward(*tensors))[1]
    with pytest.raises(torch._dynamo.exc.Unsupported):
        gradients(Parallel(net, CPU, False, compile=True), net, "JiT")


def test_drawing_sees_the_weights_that_training_changes_and_no_dropout():
    net = network(depth=4, proj_drop=0.5, attn_drop=0.5)
    train, (draw, _) = Parallel(net, CPU, False), for_drawing(net, CPU, False)
    z, t, y = inputs("JiT", 2)
    assert net.training and torch.equal(draw(z, t, y), draw(z, t, y)) and not torch.equal(train(z, t, y), train(z, t, y))
    before = draw(z, t, y)
    for param in net.parameters():
        param.data = param.data * 1.5  # as averages are swapped in
    after = draw(z, t, y)
    assert not torch.allclose(before, after) and torch.equal(after, net.eval()(z, t, y))
    assert [name for name, _ in twin(net).named_parameters()] == [name for name, _ in net.named_parameters()]
    assert all(mine is yours for mine, yours in zip(twin(net).parameters(), net.parameters()))


@pytest.mark.parametrize("kind", ["JiT", "MMJiT"])
@pytest.mark.parametrize("compile", [False, True])
def test_checkpointed_blocks_give_the_same_gradients_and_keep_less(kind, compile, graphs):
    drops = {"proj_drop": 0.3, "attn_drop": 0.2} if kind == "JiT" else {}
    kept, found = {}, {}
    for recompute in (False, True):
        net = network(kind, **drops)
        net.grad_checkpointing = recompute
        call, sizes = Parallel(net, CPU, False, compile), []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor):
            found[recompute] = gradients(call, net, kind)
        kept[recompute] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]
    assert torch.equal(found[True][0], found[False][0])
    assert all(torch.equal(found[True][1][name], value) for name, value in found[False][1].items())


def test_a_compiled_run_trains_evaluates_resumes_and_draws_as_an_eager_one(text_data, llm_folder, tmp_path, graphs, monkeypatch):
    """And makes no graph after its first epoch and the evaluation that follows."""
    from evaluation.online import OnlineEvaluation

    counts, evaluate = [], OnlineEvaluation.__call__
    monkeypatch.setattr(OnlineEvaluation, "__call__", lambda self, *args: (evaluate(self, *args), counts.append(len(graphs)))[0])
    common = ["--batch_size", 2, "--accum_iter", 2, "--proj_dropout", "0.2", "--online_eval", "--eval_freq", 1, "--interval_min", "0.3", "--log_freq", 1]
    run(*flags(text_data, llm_folder(), tmp_path / "eager", *common, "--epochs", 3))
    assert counts == [0, 0, 0]
    for epochs in (2, 3):
        more = ["--epochs", epochs, "--compile", "--resume", tmp_path / "compiled"]
        run(*flags(text_data, llm_folder(), tmp_path / "compiled", *common, *more))
    assert counts[3] == counts[4] == counts[5] > 0
    assert_same_training(weights(tmp_path / "eager"), weights(tmp_path / "compiled"), exact=False)
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        run("--generate", "--resume", str(tmp_path / name), "--device", "cpu", "--prompt", "赤い三", *more)
    pictures = [np.asarray(Image.open(tmp_path / name / "samples" / "0000.png"), dtype=int) for name in ("eager", "compiled")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_compiled_blocks_train_under_ddp(text_data, llm_folder, tmp_path, graphs, monkeypatch):
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        with socket.socket() as found:
            found.bind(("localhost", 0))
            port = str(found.getsockname()[1])
        for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
            monkeypatch.setenv(key, value)
        try:
            run(*flags(text_data, llm_folder(), tmp_path / name, "--batch_size", 4, "--epochs", 1, *more))
        finally:
            dist.shutdown()
    assert graphs
    assert_same_training(weights(tmp_path / "eager"), weights(tmp_path / "compiled"), exact=False)


def test_a_block_is_one_graph_under_ddp_however_large(graphs):
    shape = {"hidden_size": 1024, "depth": 2, "num_heads": 2, "in_context_len": 2, "in_context_start": 0}
    net = models_jit.JiT(16, 8, num_classes=2, **shape)  # 45 MiB of weights a block; DDP's buckets have 25
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        call = parallel.Parallel(net, CPU, bf16=False, compile=True)
        call(torch.randn(1, 3, 16, 16), torch.rand(1), torch.zeros(1, dtype=torch.long)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == 1  # both blocks are alike


def test_adapters_train_in_compiled_blocks(text_data, llm_folder, tmp_path, graphs):
    run(*flags(text_data, llm_folder(), tmp_path / "base", "--batch_size", 4, "--epochs", 1))
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        lora = ["--init_from", tmp_path / "base", "--lora_rank", 4, "--batch_size", 4, "--epochs", 2, *more]
        run(*flags(text_data, llm_folder(), tmp_path / name, *lora))
    assert graphs
    assert_same_training(weights(tmp_path / "eager"), weights(tmp_path / "compiled"), exact=False)


def test_what_compiling_needs_is_told_before_anything_is_compiled(monkeypatch, capsys):
    monkeypatch.setattr(parallel.shutil, "which", lambda name: None)
    assert not uses_compile(None, CPU) and not uses_compile(False, CPU)
    with pytest.raises(UserError, match=r"--compile needs a compiler \(g\+\+\)"):
        uses_compile(True, CPU)
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    cuda = torch.device("cuda", 0)
    parallel.tell_lacking.cache_clear()
    assert not uses_compile(None, cuda) and not uses_compile(None, cuda)
    assert capsys.readouterr().out.count("a compiler (gcc) was not found") == 1
    monkeypatch.setattr(parallel.shutil, "which", lambda name: name)
    assert uses_compile(None, cuda) and not uses_compile(None, cuda, usual=False) and uses_compile(True, cuda, usual=False) and uses_compile(True, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(parallel.sysconfig, "get_paths", lambda scheme: {"include": "/no/such/folder"})
        with pytest.raises(UserError, match="--compile needs Python.h"):
            uses_compile(True, cuda)
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: False)
    with pytest.raises(UserError, match="--compile needs Triton"):
        uses_compile(True, cuda)


def test_a_gpu_that_only_emulates_bf16_computes_in_float32(monkeypatch):
    """One before compute capability 8, on which Inductor compiles nothing in bf16."""
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    monkeypatch.setattr(parallel.shutil, "which", lambda name: name)
    for newer in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, newer=newer: newer or including_emulation)
        assert uses_bf16("auto", cuda) == newer and uses_bf16("bf16", cuda) and not uses_bf16("fp32", cuda) and not uses_bf16("auto", CPU)
        assert usual_dtype(cuda) == ("bf16" if newer else "fp32") and usual_dtype(CPU) == "fp32"
        assert uses_compile(None, cuda, bf16=True) == newer and uses_compile(None, cuda)
    with pytest.raises(UserError, match="--compile needs a GPU that computes in bf16"):
        uses_compile(True, cuda, bf16=True)
