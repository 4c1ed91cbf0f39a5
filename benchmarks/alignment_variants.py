"""main_jit.py with the networks besides that benchmarks/alignment.py compares: other sizes, and tokens read in other ways.  `python -m benchmarks.alignment_variants FLAGS`.

Sizes: `Nano9` JiT with nine blocks, at the parameters of MMJiT-Nano; `Zero` JiT-Nano whose tokens enter at block 0;
`W96` either, 96 wide. Pictures are decoded once a process, and on a GPU a network is one CUDA graph. Ways: `-TokensUnturned` has no RoPE on the tokens;
`-TokensUngated` adaLN on the picture alone; `-TokensRefined` two blocks of the text's own before; `-TokensMasked` hides padding from the attention in place of a mask token; `-TokensPooled` adds the mean of the tokens to adaLN.
"""

from collections.abc import Iterable
from functools import partial
from itertools import compress, product

import numpy as np
import torch
from torch import Tensor, nn

import config
import main_jit
import models_jit
import models_mmjit
from datasets import stream
from util.parallel import Parallel
from util.text import Text, Y
from util.workers import in_processes, own_cores

SIZES = {
    "JiT": {
        "Nano9": (128, 9, 4, 32, 3, 8),
        "Zero": (128, 6, 4, 32, 0, 8),
        "W96": (96, 6, 3, 32, 2, 8),
    },
    "MMJiT": {"W96": (96, 6, 3, 2.6667, 32)},
}


def hide_padding(net: models_jit.JiT) -> models_jit.JiT:
    """Captions' padding is seen by nothing; a dropped caption leaves the picture to itself."""
    seen: dict[str, Tensor] = {}

    def remember(net: nn.Module, inputs: tuple[Tensor, Tensor, Text]) -> None:
        _, _, y = inputs
        patches = torch.ones(len(y), net.pos_embed.shape[1], dtype=torch.bool, device=y.device)
        seen["mask"] = torch.cat([y.mask, patches], dim=1)[:, None, None]

    def mask(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"attn_mask": seen["mask"]}

    net.register_forward_pre_hook(remember)
    net.embed = lambda y: y  # the mask is wanted at every call
    for block in net.blocks[net.in_context_start :]:
        block.attn.register_forward_pre_hook(mask, with_kwargs=True)
    return net


class PooledBeside(models_jit.TimeEmbedder):
    """The time, and the mean of the caption's tokens through a linear layer, as the pooled vector enters adaLN in -Text models."""

    def __init__(self, width: int, text_dim: int):
        super().__init__(width)
        self.pooled = nn.Linear(text_dim, width)
        self.y: Text | None = None

    def forward(self, t: Tensor) -> Tensor:
        mask = self.y.mask[..., None]
        return super().forward(t) + self.pooled((self.y.states * mask).sum(1) / mask.sum(1).clamp_min(1))


def add_pooled(net: models_jit.JiT) -> models_jit.JiT:
    before = net.t_embedder
    net.t_embedder = PooledBeside(net.pos_embed.shape[-1], net.y_embedder.proj.in_features)
    net.t_embedder.mlp = before.mlp
    nn.init.xavier_uniform_(net.t_embedder.pooled.weight)
    nn.init.zeros_(net.t_embedder.pooled.bias)
    net.register_forward_pre_hook(lambda net, inputs: setattr(net.t_embedder, "y", inputs[2]))
    net.embed = lambda y: y
    return net


class Refined(models_jit.TokenProjector):
    """Two blocks on the text alone, as MM-JiT has them, before it meets the picture."""

    def __init__(self, before: models_jit.TokenProjector, num_heads: int):
        width = before.proj.out_features
        super().__init__(before.proj.in_features, width)
        self.proj, self.mask_token, self.head_width = before.proj, before.mask_token, width // num_heads
        self.blocks = nn.ModuleList(models_mmjit.TextBlock(width, num_heads, 2.6667) for _ in range(2))
        models_jit.initialize_linears(self.blocks)

    def forward(self, y: Text) -> Tensor:
        text, rope = super().forward(y), models_mmjit.rope_of(models_mmjit.text_angles(y.mask.shape[1], self.head_width, y.mask.device))
        for block in self.blocks:
            text = block(text, rope)
        return text


def refine(net: models_jit.JiT) -> models_jit.JiT:
    net.y_embedder = Refined(net.y_embedder, net.blocks[0].attn.num_heads)
    return net


def unturn(net: models_jit.JiT) -> models_jit.JiT:
    """No RoPE on the caption's tokens."""
    net.rope_with_context = net.rope
    for block in net.blocks[net.in_context_start :]:
        block.attn.num_prefix_tokens = net.in_context_len
    return net


class UngatedBlock(models_jit.Block):
    """adaLN on the picture alone."""

    context = 0

    def forward(self, x: Tensor, c: Tensor, rope: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + self.on_picture(self.attn(self.on_picture(self.norm1(x), 1 + scale1, shift1), rope=rope), gate1)
        return x + self.on_picture(self.mlp(self.on_picture(self.norm2(x), 1 + scale2, shift2)), gate2)

    def on_picture(self, x: Tensor, factor: Tensor, term: Tensor | None = None) -> Tensor:
        picture = x[:, self.context :] * factor[:, None]
        return torch.cat([x[:, : self.context], picture if term is None else picture + term[:, None]], dim=1)


def ungate(net: models_jit.JiT) -> models_jit.JiT:
    for block in net.blocks[net.in_context_start :]:
        block.__class__, block.context = UngatedBlock, net.in_context_len
    return net


WAYS = {"Unturned": unturn, "Ungated": ungate, "Refined": refine, "Masked": hide_padding, "Pooled": add_pooled}  # several may be joined, in this order


def build(name: str, **kwargs) -> models_jit.JiT:
    """models_jit.build_model, which knows the ways too."""
    joined = config.parse_model_name(name).suffix.removeprefix("-Tokens")
    ways = [way for way in WAYS if way in joined]
    net = plain(name.removesuffix(joined) if ways else name, **kwargs)
    for way in ways:
        WAYS[way](net)
    return net


class Plain(nn.Module):
    """A network that takes nothing but tensors."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, z_t: Tensor, t: Tensor, *y: Tensor) -> Tensor:
        return self.net(z_t, t, Text(*y) if len(y) == 2 else y[0])


def call(parallel: Parallel, z_t: Tensor, t: Tensor, y: Y) -> Tensor:
    """Parallel.__call__; on a GPU by a graph, since small networks spend nearly all of a step on starting kernels.  Batches are all of one size."""
    if parallel.device.type != "cuda":
        return parallel.call(z_t, t, y)
    tensors = (z_t, t, *((y.states, y.mask) if isinstance(y, Text) else (y,)))
    if parallel not in graphs:
        assert not parallel.bf16
        graphs.clear()
        graphs[parallel] = recorded(parallel.net, tensors)
    return graphs[parallel](*tensors)


def recorded(net: nn.Module, tensors: tuple[Tensor, ...]) -> nn.Module:
    """The network's forward and backward as CUDA graphs, its matrix products in TF32."""
    torch.set_float32_matmul_precision("high")
    return torch.cuda.make_graphed_callables(Plain(net), tuple(tensor.clone() for tensor in tensors))


graphs: dict[Parallel, nn.Module] = {}
Parallel.__call__ = call


def decode(path: str, size: int) -> np.ndarray:
    return plain_picture(stream.PictureDataset([path], stream.View(size)), 0).numpy()


def decode_some(paths: Iterable[str], size: int) -> dict[str, np.ndarray]:
    return {path: decode(path, size) for path in paths}


def decode_all(paths: Iterable[str], size: int) -> None:
    """Once, on all cores, for this process and those that are forked from it."""
    paths = list(paths)
    parts = [paths[first : first + 256] for first in range(0, len(paths), 256)]
    for _, decoded in in_processes(partial(decode_some, size=size), parts, own_cores(), "try again"):
        pictures.update(decoded)


def picture(dataset: stream.PictureDataset, index: int, n: int | None = None) -> Tensor:
    path = dataset.paths[index]
    if path not in pictures:
        pictures[path] = decode(path, dataset.img_size)
    return torch.from_numpy(pictures[path])


pictures: dict[str, np.ndarray] = {}
plain_picture, stream.PictureDataset.picture = stream.PictureDataset.picture, picture
plain, models_jit.build_model = models_jit.build_model, build
for chosen in product((False, True), repeat=len(WAYS)):
    config.CONDITIONS["JiT", f"-Tokens{''.join(compress(WAYS, chosen))}"] = "tokens"
for family, module in (("JiT", models_jit), ("MMJiT", models_mmjit)):
    module.SIZES.update(SIZES[family])
    config.SIZES[family] += tuple(SIZES[family])

if __name__ == "__main__":
    main_jit.main()
