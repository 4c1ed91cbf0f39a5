"""main_jit.py with the networks besides that benchmarks/alignment.py compares: other sizes, and tokens read in other ways.  `python -m benchmarks.alignment_variants FLAGS`.

Sizes: `Nano9` JiT with nine blocks and `Nano5` MM-JiT with five, at the parameters of MMJiT-Nano; `Zero` JiT-Nano whose tokens enter at block 0;
`W96` either, 96 wide. Pictures are decoded once a process, and on a GPU a network is one CUDA graph. Ways: `-TokensMasked` hides padding from the attention in place of a mask token; `-TokensPooled` adds the mean of the tokens to adaLN.
"""

import os
from functools import cache

import torch
from torch import Tensor, nn

import config
import main_jit
import models_jit
import models_mmjit
from datasets import stream
from datasets.transforms import center_crop, open_rgb, to_uint8
from util.parallel import Parallel
from util.text import Text, Y

SIZES = {
    "JiT": {"Nano9": (128, 9, 4, 32, 3, 8), "Zero": (128, 6, 4, 32, 0, 8), "W96": (96, 6, 3, 32, 2, 8)},
    "MMJiT": {"Nano5": (128, 5, 4, 2.6667, 32), "W96": (96, 6, 3, 2.6667, 32), "W96x5": (96, 5, 3, 2.6667, 32)},
}


def hide_padding(net: models_jit.JiT) -> models_jit.JiT:
    """Captions' padding is seen by nothing; a dropped caption leaves the picture to itself."""
    seen: dict[str, Tensor] = {}

    def remember(net: nn.Module, inputs: tuple[Tensor, Tensor, Text]) -> None:
        _, _, y = inputs
        patches = torch.ones(len(y), net.pos_embed.shape[1], dtype=torch.bool, device=y.device)
        seen["mask"] = torch.cat([y.mask, patches], dim=1)[:, None, None]

    def mask(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | ({"attn_mask": seen["mask"]} if attention.num_prefix_tokens else {})

    net.register_forward_pre_hook(remember)
    for block in net.blocks:
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


def add_pooled(net: models_jit.JiT, text_dim: int) -> models_jit.JiT:
    before = net.t_embedder
    net.t_embedder = PooledBeside(net.pos_embed.shape[-1], text_dim)
    net.t_embedder.mlp = before.mlp
    nn.init.xavier_uniform_(net.t_embedder.pooled.weight)
    nn.init.zeros_(net.t_embedder.pooled.bias)
    net.register_forward_pre_hook(lambda net, inputs: setattr(net.t_embedder, "y", inputs[2]))
    return net


def build(name: str, **kwargs) -> models_jit.JiT:
    """models_jit.build_model, which knows the ways too."""
    way = config.parse_model_name(name).suffix.removeprefix("-Tokens")
    net = plain(name.removesuffix(way) if way in ("Masked", "Pooled") else name, **kwargs)
    if way == "Masked":
        return hide_padding(net)
    return add_pooled(net, kwargs["text_dim"]) if way == "Pooled" else net


class Plain(nn.Module):
    """A network that takes nothing but tensors."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, z_t: Tensor, t: Tensor, *y: Tensor) -> Tensor:
        return self.net(z_t, t, Text(*y) if len(y) == 2 else y[0])


def call(parallel: Parallel, z_t: Tensor, t: Tensor, y: Y) -> Tensor:
    """Parallel.__call__; on a GPU by a graph, since small networks spend nearly all of a step on starting kernels.  Batches are all of one size."""
    if parallel.device.type != "cuda" or os.environ.get("EAGER"):
        return parallel.call(z_t, t, y)
    tensors = (z_t, t, *((y.states, y.mask) if isinstance(y, Text) else (y,)))
    if parallel not in graphs:
        assert not parallel.bf16
        graphs.clear()
        graphs[parallel] = torch.cuda.make_graphed_callables(Plain(parallel.net), tuple(tensor.clone() for tensor in tensors))
    return graphs[parallel](*tensors)


graphs: dict[Parallel, nn.Module] = {}
Parallel.__call__ = call


@cache
def decoded(path: str, size: int) -> Tensor:
    return to_uint8(center_crop(open_rgb(path), size))


stream.PictureDataset.picture = lambda dataset, index: decoded(dataset.paths[index], dataset.img_size)
plain, models_jit.build_model = models_jit.build_model, build
for way in ("Masked", "Pooled"):
    config.CONDITIONS["JiT", f"-Tokens{way}"] = "tokens"
for family, module in (("JiT", models_jit), ("MMJiT", models_mmjit)):
    module.SIZES.update(SIZES[family])
    config.SIZES[family] += tuple(SIZES[family])

if __name__ == "__main__":
    main_jit.main()
