"""MM-JiT: names, shapes, initial values, and its forward pass against formulas written out here a second time, from the description of the release."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import wake
from test_models import Devices, rms
from torch.nn.attention import SDPBackend, sdpa_kernel

from models_jit import sincos_table
from models_mmjit import SIZES, build_model, picture_angles, rope_of, rotate, text_angles
from util.text import Text

RELEASED = {"MMJiT-B/16": 258.1, "MMJiT-B/32": 260.2, "MMJiT-L/16": 911.8}  # millions of parameters in the files, for a text encoder 1024 wide
TRAINED = {  # millions, for the same encoder
    "MMJiT-Nano/4": 2.774, "MMJiT-Ti/16": 11.578, "MMJiT-S/16": 45.505, "MMJiT-M/16": 572.466, "MMJiT-XL/16": 1907.632,
}  # fmt: skip
MASKS = torch.tensor([[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 1, 0, 1]]).bool()


def nano():
    torch.manual_seed(0)
    return build_model("MMJiT-Nano/4", input_size=16, text_dim=24)


def inputs(seed: int = 1):
    """z_t, t and y of four pictures."""
    torch.manual_seed(seed)
    return torch.randn(4, 3, 16, 16), torch.tensor([0.0, 0.37, 0.9, 1.0]), Text(torch.randn(4, 7, 24), MASKS)


def count_of(state, name):
    return len({key.split(".")[1] for key in state if key.startswith(f"{name}.")})


def turned(x, angle):
    """RoPE as complex numbers, j and j + D / 2 a pair.  x: (.., T, D); angle: (T, D / 2)."""
    real, imaginary = x.chunk(2, -1)
    out = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([out.real, out.imag], -1)


def angles(length, grid, d):
    """Of text by its index, then of the picture by row and column: (length + grid * grid, D / 2)."""
    text = torch.tensor([[i * 10000.0 ** (-2 * j / d) for j in range(d // 2)] for i in range(length)])
    frequency = [10000.0 ** (-2 * j / (d // 2)) for j in range(d // 4)]
    picture = torch.tensor([[index * f for index in (row, column) for f in frequency] for row in range(grid) for column in range(grid)])
    return torch.cat([text, picture])


def reference_forward(state, z, states, mask, heads, patch):
    """MM-JiT from its description, with plain matrix products and no module of ours."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(()))

    def attention(q, k, v, block):  # each (B, T, C), rotated by `rotation` after the norm of the heads
        q, k, v = (part.view(batch, -1, heads, width // heads).transpose(1, 2) for part in (q, k, v))
        q, k = (turned(rms(part, state[f"{block}.{name}.weight"]), rotation[: part.shape[2]]) for part, name in ((q, "q_norm"), (k, "k_norm")))
        out = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1) @ v
        return out.transpose(1, 2).reshape(batch, -1, width)

    def mlp(x, name):
        return linear(F.silu(linear(x, f"{name}.w1")) * linear(x, f"{name}.w3"), f"{name}.w2")

    batch, length, grid, width = len(z), mask.shape[1], z.shape[-1] // patch, state["img_embedder.proj2.weight"].shape[0]
    rotation = angles(length, grid, width // heads)
    patches = z.view(batch, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5).reshape(batch, grid * grid, -1)
    picture = patches @ state["img_embedder.proj1.weight"].flatten(1).T @ state["img_embedder.proj2.weight"].flatten(1).T
    picture = picture + state["img_embedder.proj2.bias"] + sincos_table(width, grid)
    text = linear(torch.where(mask[..., None], states, state["mask_token"]), "txt_embedder")
    for i in range(count_of(state, "txt_preamble_blocks")):
        b = f"txt_preamble_blocks.{i}"
        q, k, v = linear(rms(text, state[f"{b}.norm1.weight"]), f"{b}.qkv").chunk(3, -1)
        text = text + linear(attention(q, k, v, b), f"{b}.attn_proj")
        text = text + mlp(rms(text, state[f"{b}.norm2.weight"]), f"{b}.mlp")
    depth = count_of(state, "double_blocks")
    for i in range(depth):
        b = f"double_blocks.{i}"
        seen = rms(picture, state[f"{b}.img_norm1.weight"])
        read = linear(rms(text, state[f"{b}.txt_norm1.weight"]), f"{b}.txt_qkv").chunk(3, -1)
        q, k, v = (torch.cat(pair, 1) for pair in zip(read, linear(seen, f"{b}.img_qkv").chunk(3, -1)))
        read, seen = attention(q, k, v, b).split([length, grid * grid], 1)
        picture = picture + linear(seen, f"{b}.img_attn_proj")
        picture = picture + mlp(rms(picture, state[f"{b}.img_norm2.weight"]), f"{b}.img_mlp")
        if i < depth - 1:  # what the last block would make of the text is read by nothing
            text = text + linear(read, f"{b}.txt_attn_proj")
            text = text + mlp(rms(text, state[f"{b}.txt_norm2.weight"]), f"{b}.txt_mlp")
    tokens = linear(rms(picture, state["final_layer.norm_final.weight"]), "final_layer.linear")
    return tokens.view(batch, grid, grid, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).reshape(z.shape)


def test_forward_equals_the_written_out_network():
    net, (z, t, y) = wake(nano()).eval(), inputs()
    with torch.no_grad():
        wanted = reference_forward(net.state_dict(), z, y.states, y.mask, heads=4, patch=4)
        assert wanted.std() > 0.1
        torch.testing.assert_close(net(z, t, y), wanted, rtol=1e-4, atol=1e-5)


def test_the_time_is_not_read():
    net, (z, t, y) = wake(nano()).eval(), inputs()
    assert torch.equal(net(z, t, y), net(z, t.flip(0), y))


def test_state_dict_has_the_released_names_and_shapes_of_all_that_is_used():
    c, d, p, h, width = 128, 32, 4, 344, 24  # 344: 128 x 2.6667 = 341, rounded up to a multiple of 8
    mlp = {"w1.weight": (h, c), "w3.weight": (h, c), "w2.weight": (c, h)}
    heads = {"q_norm.weight": (32,), "k_norm.weight": (32,)}
    wanted = {
        "img_embedder.proj1.weight": (d, 3, p, p), "img_embedder.proj2.weight": (c, d, 1, 1), "img_embedder.proj2.bias": (c,),
        "mask_token": (1, 1, width), "txt_embedder.weight": (c, width),
        "final_layer.norm_final.weight": (c,), "final_layer.linear.weight": (p * p * 3, c), "final_layer.linear.bias": (p * p * 3,),
    }  # fmt: skip
    for i in range(2):
        block = {"norm1.weight": (c,), "norm2.weight": (c,), "qkv.weight": (3 * c, c), "qkv.bias": (3 * c,), "attn_proj.weight": (c, c), "attn_proj.bias": (c,)}
        block |= heads | {f"mlp.{name}": shape for name, shape in mlp.items()}
        wanted |= {f"txt_preamble_blocks.{i}.{name}": shape for name, shape in block.items()}
    for i in range(6):
        block = dict(heads)
        for stream in ("img", "txt"):
            block |= {f"{stream}_norm1.weight": (c,), f"{stream}_qkv.weight": (3 * c, c), f"{stream}_qkv.bias": (3 * c,)}
            if (stream, i) != ("txt", 5):  # what the last block would make of the text is read by nothing
                block |= {f"{stream}_norm2.weight": (c,), f"{stream}_attn_proj.weight": (c, c), f"{stream}_attn_proj.bias": (c,)}
                block |= {f"{stream}_mlp.{name}": shape for name, shape in mlp.items()}
        wanted |= {f"double_blocks.{i}.{name}": shape for name, shape in block.items()}
    assert {name: tuple(value.shape) for name, value in nano().state_dict().items()} == wanted


def test_initial_values():
    for key, value in nano().state_dict().items():
        if key.endswith(".bias") or key == "final_layer.linear.weight":
            assert not value.any(), key
        elif "norm" in key:
            assert (value == 1).all(), key
        elif key == "mask_token":
            assert value.std().item() == pytest.approx(0.02, rel=0.4)  # 24 numbers
        else:
            fan_out, fan_in = value.shape[0], value[0].numel()
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert value.abs().max() <= bound, key
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), key


def test_a_fresh_network_is_zero():
    z, t, y = inputs()
    assert not nano()(z, t, y).any()


def parameters(name: str) -> float:
    with torch.device("meta"):
        net = build_model(name, input_size=512, text_dim=1024)
    return sum(param.numel() for param in net.parameters()) / 1e6


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_are_the_released_ones_less_those_that_nothing_uses(name):
    c, _, _, ratio, _ = SIZES[name.split("-")[1].split("/")[0]]
    hidden = math.ceil(int(c * ratio) / 8) * 8
    embedders = (256 * c + c) + (c * c + c) + 1024 * c  # of the time and of pooled text
    last = (c * c + c) + c + 3 * c * hidden  # txt_attn_proj, txt_norm2 and txt_mlp of the last block
    assert parameters(name) == pytest.approx(RELEASED[name] - (embedders + last) / 1e6, abs=0.05)


@pytest.mark.parametrize("name", TRAINED)
def test_parameters_that_are_trained(name):
    assert parameters(name) == pytest.approx(TRAINED[name], abs=0.005)


def test_states_where_there_is_no_token_have_no_say():
    net, (z, t, y) = wake(nano()).eval(), inputs()
    for garbage in (1e4, float("nan")):
        assert torch.equal(net(z, t, Text(y.states.masked_fill(~y.mask[..., None], garbage), y.mask)), net(z, t, y))
    other = net(z, t, Text(y.states.masked_fill(y.mask[..., None], 1.0), y.mask))
    assert ((other - net(z, t, y)).flatten(1).abs().amax(1) > 1e-3).tolist() == MASKS.any(1).tolist()


def test_mask_tokens_are_attended_to():
    net, (z, t, y) = wake(nano()).eval(), inputs()
    longer = Text(F.pad(y.states, (0, 0, 0, 1)), F.pad(y.mask, (0, 1)))
    assert (net(z, t, longer) - net(z, t, y)).abs().max() > 1e-4


def test_every_parameter_is_in_the_graph_and_has_a_say():
    for mask in (MASKS, torch.ones_like(MASKS), torch.zeros_like(MASKS)):  # whatever a batch holds: DDP is not told to look for unused ones
        net, (z, t, y) = wake(nano()), inputs()
        net(z, t, Text(y.states, mask)).square().mean().backward()
        unused = {key for key, param in net.named_parameters() if param.grad is None}
        silent = {key for key, param in net.named_parameters() if not param.grad.any()}
        assert not unused
        assert silent == ({"mask_token"} if mask.all() else set())


def test_rope_turns_pairs_half_a_head_apart():
    d, grid, x = 32, 4, torch.eye(32)
    for angle in (text_angles(7, d), picture_angles(grid, d)):
        for j in range(d // 2):
            wanted = torch.zeros(len(angle), d)
            wanted[:, j], wanted[:, j + d // 2] = angle[:, j].cos(), angle[:, j].sin()
            torch.testing.assert_close(rotate(x[j].expand(1, 1, len(angle), d), rope_of(angle))[0, 0], wanted)
    picture = picture_angles(grid, d).view(grid, grid, d // 2)
    assert torch.equal(picture[:, :1, : d // 4].expand(-1, grid, -1), picture[..., : d // 4]) and not picture[0, :, : d // 4].any()  # the row
    assert torch.equal(picture[:1, :, d // 4 :].expand(grid, -1, -1), picture[..., d // 4 :]) and not picture[:, 0, d // 4 :].any()  # the column
    assert torch.equal(picture[:, 0, : d // 4], picture[0, :, d // 4 :])


def test_where_a_token_stands_matters():
    net, (z, t, y) = wake(nano()).eval(), inputs()
    with torch.no_grad():
        drawn, shifted = net(z, t, y), net(z, t, Text(y.states.roll(1, 1), y.mask.roll(1, 1)))
    changes = (drawn - shifted).flatten(1).abs().amax(1)
    assert (changes[1:] > 1e-4).all() and changes[0] == 0  # a caption of mask tokens alone is the same, shifted
    block, angles, text, order = net.txt_preamble_blocks[0], text_angles(7, 32), torch.randn(2, 7, 128), [3, 0, 1, 2, 6, 5, 4]
    torch.testing.assert_close(block(text[:, order], rope_of(angles[order])), block(text, rope_of(angles))[:, order])  # by nothing but its angle
    torch.testing.assert_close(block(text, rope_of(angles + angles[3])), block(text, rope_of(angles)))  # and by that only relatively


@pytest.mark.parametrize("bf16", [False, True])
def test_flash_attention_takes_it_since_nothing_is_masked(bf16, monkeypatch):
    net, (z, t, y) = wake(nano()).eval(), inputs()
    calls, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **options: calls.append((args, options)) or attention(*args, **options))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        drawn = net(z, t, y)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        wanted = net(z, t, y)
    torch.testing.assert_close(drawn.float(), wanted, rtol=0, atol=0.05 if bf16 else 1e-5)
    assert len(calls) == 2 * (2 + 6) and all(len(args) == 3 and not options for args, options in calls)
    assert all(part.dtype == (torch.bfloat16 if bf16 else torch.float32) for args, _ in calls[:8] for part in args)


def test_shapes_are_the_same_whatever_the_captions(monkeypatch):
    net, (z, t, y) = nano(), inputs()
    shapes, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: shapes.append([part.shape for part in args]) or attention(*args))
    for mask in MASKS:
        net(z, t, Text(y.states, mask.expand(4, 7)))
    assert len(shapes) == 4 * 8 and shapes == shapes[:8] * 4
    assert shapes[:8] == [[(4, 4, 7, 32)] * 3] * 2 + [[(4, 4, 7 + 16, 32)] * 3] * 6


def test_a_forward_makes_nothing_on_another_device():
    """A copy from the CPU would wait for the GPU in every step."""
    with torch.device("meta"):
        net, (z, t, y) = nano(), inputs()
    with Devices() as devices:
        net(z, t, y.to("meta"))
    assert devices.found == {"meta"}
