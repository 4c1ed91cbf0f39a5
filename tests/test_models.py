"""The network: names, shapes, initial values, and its forward pass against formulas written out here a second time."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import wake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models_mmjit
from config import SIZES as NAMES
from config import SOLVERS, parse_model_name
from denoiser import SOLVERS as STEPS
from models_jit import SIZES, Block, JiT, JiT_models, RMSNorm, SwiGLU, build_model, sincos_table
from util.text import Text

COUNTS = {  # millions of trained parameters, 1000 classes or an LLM 3072 wide
    "JiT-B/16": 131.12, "JiT-B/32": 133.19, "JiT-L/16": 458.88, "JiT-L/32": 461.53, "JiT-H/16": 952.51, "JiT-H/32": 956.06,
    "JiT-B/16-Text": 132.72, "JiT-B/32-Text": 134.78, "JiT-L/16-Text": 461.00, "JiT-L/32-Text": 463.66, "JiT-H/16-Text": 955.17,
    "JiT-H/32-Text": 958.71,
    "JiT-B/16-Tokens": 132.75, "JiT-B/32-Tokens": 134.82, "JiT-L/16-Tokens": 461.05, "JiT-L/32-Tokens": 463.70, "JiT-H/16-Tokens": 955.23,
    "JiT-H/32-Tokens": 958.77,
}  # fmt: skip


KINDS = {"": {"num_classes": 10}, "-Text": {"text_dim": 24}, "-Tokens": {"text_dim": 24, "text_len": 7}}
MASKS = torch.tensor([[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]).bool()


def nano(kind: str = "", input_size: int = 16):
    torch.manual_seed(0)
    return build_model(f"JiT-Nano/4{kind}", input_size=input_size, **KINDS[kind])


def conditions(kind: str):
    """y of three pictures."""
    torch.manual_seed(1)
    return {"": torch.tensor([0, 7, 10]), "-Text": torch.randn(3, 24), "-Tokens": Text(torch.randn(3, 7, 24), MASKS)}[kind]


class Devices(TorchDispatchMode):
    """Of all tensors that are made meanwhile: `found`."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found |= {tensor.device.type for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)}
        return out


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name, monkeypatch):
    monkeypatch.setattr("models_jit.JiT.initialize_weights", lambda self: None)
    known = parse_model_name(name)
    text = {"labels": {}, "pooled": {"text_dim": 3072}, "tokens": {"text_dim": 3072, "text_len": 77}}[known.condition]
    with torch.device("meta"):
        net = JiT_models[name](input_size=16 * known.patch, **text)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(COUNTS[name], abs=0.005)


def test_the_papers_models_and_any_patch_size():
    assert set(JiT_models) == set(COUNTS)
    assert parse_model_name("JiT-G/14-Text") == ("JiT", "G", 14, "-Text")
    for wrong in ("JiT-B16", "JiT-X/16", "JiT-B/0", "JiT-B/16-text", "jit-B/16", "MMJiT-G/16", "JiT-M/16", "MMJiT-B/16-Text", "MMJiT-B/16-AdaLN"):
        with pytest.raises(ValueError, match="JiT-SIZE/PATCH"):
            parse_model_name(wrong)
    for name, given in (("JiT-Nano/4-Text", {}), ("JiT-Nano/4-Tokens", {"text_dim": 8}), ("JiT-Nano/4", {"text_dim": 8})):
        with pytest.raises(ValueError, match="text_dim"):
            build_model(name, input_size=16, **given)


def test_depth_heads_and_context_of_the_papers_sizes():
    found = {size: (depth, heads, start, count) for size, (_, depth, heads, _, start, count) in SIZES.items() if size in "BLHG"}
    assert found == {"B": (12, 12, 4, 32), "L": (24, 16, 8, 32), "H": (32, 16, 10, 32), "G": (40, 16, 10, 32)}


def test_state_dict_has_the_published_names_and_shapes():
    c, h, p, d, lc = 128, int(4 * 128 * 2 / 3), 4, 32, 8
    wanted = {
        "pos_embed": (1, 16, c), "in_context_posemb": (1, lc, c), "y_embedder.embedding_table.weight": (11, c),
        "t_embedder.mlp.0.weight": (c, 256), "t_embedder.mlp.0.bias": (c,), "t_embedder.mlp.2.weight": (c, c), "t_embedder.mlp.2.bias": (c,),
        "x_embedder.proj1.weight": (d, 3, p, p), "x_embedder.proj2.weight": (c, d, 1, 1), "x_embedder.proj2.bias": (c,),
        "final_layer.norm_final.weight": (c,), "final_layer.linear.weight": (p * p * 3, c), "final_layer.linear.bias": (p * p * 3,),
        "final_layer.adaLN_modulation.1.weight": (2 * c, c), "final_layer.adaLN_modulation.1.bias": (2 * c,),
    }  # fmt: skip
    for i in range(6):
        wanted |= {f"blocks.{i}.{name}": shape for name, shape in {
            "norm1.weight": (c,), "norm2.weight": (c,), "attn.qkv.weight": (3 * c, c), "attn.qkv.bias": (3 * c,), "attn.q_norm.weight": (32,),
            "attn.k_norm.weight": (32,), "attn.proj.weight": (c, c), "attn.proj.bias": (c,), "mlp.w12.weight": (2 * h, c), "mlp.w12.bias": (2 * h,),
            "mlp.w3.weight": (c, h), "mlp.w3.bias": (c,), "adaLN_modulation.1.weight": (6 * c, c), "adaLN_modulation.1.bias": (6 * c,),
        }.items()}  # fmt: skip
    assert {name: tuple(value.shape) for name, value in nano().state_dict().items()} == wanted
    shared = {name: shape for name, shape in wanted.items() if not name.startswith("y_embedder.")}
    text = {"y_embedder.proj.weight": (c, 24), "y_embedder.proj.bias": (c,)}
    tokens = {"in_context_posemb": (1, 7, c), "y_embedder.mask_token": (1, 1, c)}
    for kind, more in (("-Text", text), ("-Tokens", text | tokens)):
        assert {name: tuple(value.shape) for name, value in nano(kind).state_dict().items()} == shared | more


@pytest.mark.parametrize("kind", KINDS)
def test_initial_values(kind):
    net = nano(kind)
    for name, value in net.state_dict().items():
        if name.endswith(".bias") or "adaLN" in name or name == "final_layer.linear.weight":
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif name.startswith("t_embedder") or name in ("in_context_posemb", "y_embedder.embedding_table.weight", "y_embedder.mask_token"):
            assert value.std().item() == pytest.approx(0.02, rel=0.1), name
        elif name != "pos_embed":
            fan_out, fan_in = value.shape[0], value[0].numel()
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert value.abs().max() <= bound, name
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_a_fresh_block_is_the_identity_and_a_fresh_network_is_zero():
    net, x, c = nano(), torch.randn(2, 16, 128), torch.randn(2, 128)
    assert torch.equal(net.blocks[0](x, c, net.rope), x)
    assert not net(torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([1, 10])).any()


def test_position_table_is_column_first_sines_before_cosines():
    table = sincos_table(16, 3).view(3, 3, 16)
    for row in range(3):
        for column in range(3):
            angles = [[index * 10000 ** (-k / 4) for k in range(4)] for index in (column, row)]
            wanted = [f(a) for half in angles for f in (math.sin, math.cos) for a in half]
            torch.testing.assert_close(table[row, column], torch.tensor(wanted))


def rotate_pairs(x, grid):
    """RoPE as complex numbers: (.., N, D), first half of D from the row, second from the column."""
    d = x.shape[-1]
    row, column = (index.flatten() for index in torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij"))
    frequency = 10000.0 ** (-2 * torch.arange(d // 4) / (d // 2))
    return turned(x, torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=1))


def turned(x, angle):
    """Pairs (2 j, 2 j + 1) as complex numbers, by those angles."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def reference_forward(state, z, t, y, depth, heads, start, lc, patch):
    """JiT from its description, with plain matrix products and no module of ours."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def modulated(x, shift, scale):
        return x * (1 + scale[:, None]) + shift[:, None]

    batch, grid, width = len(z), z.shape[-1] // patch, state["pos_embed"].shape[-1]
    angle = t[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    time = linear(F.silu(linear(torch.cat([angle.cos(), angle.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    if isinstance(y, Text):
        c, in_context = F.silu(time), torch.where(y.mask[..., None], linear(y.states, "y_embedder.proj"), state["y_embedder.mask_token"])
    else:
        y = state["y_embedder.embedding_table.weight"][y] if "y_embedder.embedding_table.weight" in state else linear(y, "y_embedder.proj")
        c, in_context = F.silu(time + y), y[:, None].expand(-1, lc, -1)
    patches = z.view(batch, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5).reshape(batch, grid * grid, -1)
    x = patches @ state["x_embedder.proj1.weight"].flatten(1).T @ state["x_embedder.proj2.weight"].flatten(1).T
    x = x + state["x_embedder.proj2.bias"] + state["pos_embed"]
    for i in range(depth):
        b = f"blocks.{i}"
        if i == start:
            x = torch.cat([in_context + state["in_context_posemb"], x], 1)
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(c, f"{b}.adaLN_modulation.1").view(batch, 6, width).unbind(1)
        qkv = linear(modulated(rms(x, state[f"{b}.norm1.weight"]), shift1, scale1), f"{b}.attn.qkv")
        q, k, v = qkv.view(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        q, k = rms(q, state[f"{b}.attn.q_norm.weight"]), rms(k, state[f"{b}.attn.k_norm.weight"])
        context = x.shape[1] - grid * grid
        places = torch.arange(context)[:, None] if isinstance(y, Text) else torch.zeros(context, 1)  # labels and pooled text are not turned
        angles = places * 10000.0 ** (-2 * torch.arange(width // heads // 2) / (width // heads))
        q, k = (torch.cat([turned(part[:, :, :context], angles), rotate_pairs(part[:, :, context:], grid)], 2) for part in (q, k))
        attention = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1) @ v
        x = x + gate1[:, None] * linear(attention.transpose(1, 2).reshape(batch, -1, width), f"{b}.attn.proj")
        gate, value = linear(modulated(rms(x, state[f"{b}.norm2.weight"]), shift2, scale2), f"{b}.mlp.w12").chunk(2, -1)
        x = x + gate2[:, None] * linear(F.silu(gate) * value, f"{b}.mlp.w3")
    shift, scale = linear(c, "final_layer.adaLN_modulation.1").chunk(2, -1)
    tokens = linear(modulated(rms(x[:, lc:], state["final_layer.norm_final.weight"]), shift, scale), "final_layer.linear")
    out = torch.zeros_like(z)
    for n in range(grid * grid):
        r, col = n // grid * patch, n % grid * patch
        out[:, :, r : r + patch, col : col + patch] = tokens[:, n].view(batch, patch, patch, 3).permute(0, 3, 1, 2)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_forward_equals_the_written_out_network(kind):
    net, y = wake(nano(kind)).eval(), conditions(kind)
    z, t = torch.randn(3, 3, 16, 16), torch.tensor([0.0, 0.37, 1.0])
    with torch.no_grad():
        wanted = reference_forward(net.state_dict(), z, t, y, depth=6, heads=4, start=2, lc=7 if kind == "-Tokens" else 8, patch=4)
        assert wanted.std() > 0.1
        torch.testing.assert_close(net(z, t, y), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_say(kind):
    net = wake(nano(kind))
    net(torch.randn(3, 3, 16, 16), torch.tensor([0.0, 0.37, 1.0]), conditions(kind)).square().mean().backward()
    assert not [name for name, param in net.named_parameters() if param.grad is None or not param.grad.any()]


def test_states_where_there_is_no_token_have_no_say():
    net, y, z, t = wake(nano("-Tokens")).eval(), conditions("-Tokens"), torch.randn(3, 3, 16, 16), torch.rand(3)
    for garbage in (1e4, float("nan")):
        assert torch.equal(net(z, t, Text(y.states.masked_fill(~y.mask[..., None], garbage), y.mask)), net(z, t, y))
    other = net(z, t, Text(y.states.masked_fill(y.mask[..., None], 1.0), y.mask))
    assert ((other - net(z, t, y)).flatten(1).abs().amax(1) > 1e-3).tolist() == MASKS.any(1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_makes_nothing_on_another_device(kind):
    """A copy from the CPU would wait for the GPU in every step."""
    net, y = nano(kind).to("meta"), conditions(kind).to("meta")
    with Devices() as devices:
        net(torch.empty(3, 3, 16, 16, device="meta"), torch.empty(3, device="meta"), y)
    assert devices.found == {"meta"}


@pytest.mark.parametrize("depth, first, end", [(5, 1, 3), (6, 1, 3), (7, 1, 3), (12, 3, 9), (24, 6, 18), (32, 8, 24), (40, 10, 30)])
def test_dropout_acts_in_the_middle_half_only(depth, first, end):
    net = JiT(16, 4, hidden_size=32, depth=depth, num_heads=2, attn_drop=0.1, proj_drop=0.2, num_classes=10)
    found = [(block.attn.attn_drop.p, block.attn.proj_drop.p, block.mlp.drop.p) for block in net.blocks]
    assert found == [(0.1, 0.2, 0.2) if first <= i < end else (0, 0, 0) for i in range(depth)]


def test_swiglu_drops_what_enters_its_last_layer():
    mlp, x = SwiGLU(16, drop=0.5), torch.randn(2, 5, 16)
    torch.manual_seed(0)
    out = mlp(x)
    torch.manual_seed(0)
    gate, value = mlp.w12(x).chunk(2, -1)
    assert torch.equal(out, mlp.w3(F.dropout(F.silu(gate) * value, 0.5)))


def test_norm_of_bf16_is_taken_in_float32_and_rounded_once():
    norm, x = wake(RMSNorm(64)), torch.randn(8, 64).bfloat16()
    assert norm(x).dtype == torch.bfloat16 and torch.equal(norm(x), norm(x.float()).bfloat16())


def test_context_tokens_are_not_rotated():
    block = wake(Block(64, 2, context_tokens=4, attn_drop=0, proj_drop=0)).eval()
    net = nano()
    x, c = torch.randn(1, 20, 64), torch.randn(1, 64)
    rope = net.rope  # 16 patches, head width 32: the same as here
    turned = block(x[:, [1, 0, 2, 3, *range(4, 20)]], c, rope)[:, [1, 0, 2, 3, *range(4, 20)]]
    torch.testing.assert_close(turned, block(x, c, rope))  # the order of context tokens is nothing to a block
    swapped = block(x[:, [0, 1, 2, 3, 5, 4, *range(6, 20)]], c, rope)[:, [0, 1, 2, 3, 5, 4, *range(6, 20)]]
    assert (swapped - block(x, c, rope)).abs().max() > 1e-4  # that of patches is


def test_a_captions_tokens_are_rotated_by_their_places():
    net = wake(nano("-Tokens")).eval()
    with torch.no_grad():
        net.in_context_posemb.zero_()  # so that RoPE alone tells places apart
    y, z, t = conditions("-Tokens"), torch.randn(3, 3, 16, 16), torch.rand(3)
    y = Text(y.states, torch.ones_like(y.mask))
    order = [1, 0, *range(2, 7)]
    assert (net(z, t, Text(y.states[:, order], y.mask)) - net(z, t, y)).abs().max() > 1e-3
    net.rope_with_context[:7] = net.rope_with_context[:1]
    torch.testing.assert_close(net(z, t, Text(y.states[:, order], y.mask)), net(z, t, y), rtol=1e-4, atol=1e-5)


def test_the_names_that_flags_know_are_those_of_the_code():
    assert tuple(SIZES) == NAMES["JiT"] and tuple(models_mmjit.SIZES) == NAMES["MMJiT"] and tuple(STEPS) == SOLVERS
