"""JiT, the plain Transformer on pixel patches (Li and He, "Back to Basics", arXiv:2511.13720).

Shapes: B batch, N patches, L text tokens, T = N + context tokens, C width, D head width, p patch size. The state dict's names, shapes and
layouts are those of the published checkpoints. This file knows no loss, no LLM and no device; text comes in as one vector a picture, or as one a token.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, RotaryEmbeddingCat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import parse_model_name
from util.text import Embedded, Text


class RMSNorm(nn.RMSNorm):
    """In float32 whatever the input, which keeps its type: under autocast q and k are bf16 and the weight is not."""

    def __init__(self, width: int, **kwargs):
        super().__init__(width, eps=1e-6, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type_as(x)


def sincos_table(width: int, grid: int) -> Tensor:
    """Fixed 2-D position table: sines and cosines of the column, then of the row.

    Returns: (grid * grid, width), row-major.  Angles: index * 10000^(-k / (width / 4)), k = 0 .. width / 4 - 1.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    halves = [index.flatten()[:, None] * frequencies for index in (column, row)]
    return torch.cat([table for angle in halves for table in (angle.sin(), angle.cos())], dim=1).float()


def text_angles(length: int, head_width: int, device: torch.device | None = None) -> Tensor:
    """RoPE of a caption's tokens by their places: (L, D / 2), made on the device, where a copy would wait: index * 10000^(-2 j / D)."""
    return torch.arange(length, device=device)[:, None] * 10000.0 ** (-torch.arange(0, head_width, 2, device=device) / head_width)


def interleaved(angles: Tensor) -> Tensor:
    """Angles of the pairs (2 j, 2 j + 1) as timm takes them: (T, D / 2) -> (T, 2 D), sines, then cosines."""
    return torch.cat([angles.sin(), angles.cos()], dim=1).repeat_interleave(2, dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x: (B, T, C); shift, scale: (B, C)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def adaln(width: int, chunks: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))


class TimeEmbedder(nn.Module):
    """Time t in [0, 1], unscaled, to a vector: 128 cosines and 128 sines, then an MLP."""

    frequency_width = 256

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequency_width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:  # (B,) -> (B, C)
        half = self.frequency_width // 2
        angle = t[:, None] * 10000.0 ** (-torch.arange(half, device=t.device, dtype=torch.float32) / half)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """Class labels to vectors; the last row of the table is the null label of guidance."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:  # (B,) int64 -> (B, C)
        return self.embedding_table(y)


class TextProjector(nn.Module):
    """Pooled features of the frozen LLM to the network's width: all that is trained of the text path."""

    def __init__(self, text_dim: int, width: int):
        super().__init__()
        self.proj = nn.Linear(text_dim, width)

    def forward(self, y: Tensor) -> Tensor:  # (B, text_dim) -> (B, C)
        return self.proj(y)


class TokenProjector(nn.Module):
    """The states of a caption's tokens to the network's width; a learned mask token where there is none."""

    def __init__(self, text_dim: int, width: int):
        super().__init__()
        self.proj = nn.Linear(text_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, y: Text) -> Tensor:  # (B, L, text_dim) -> (B, L, C)
        return torch.where(y.mask[..., None], self.proj(y.states), self.mask_token)


class BottleneckPatchEmbed(nn.Module):
    """Patches through a low-rank linear layer, 3 p p -> d' -> C (the paper's section 4.3 and figure 4).

    The published files hold its matrices as those of convolutions.
    """

    def __init__(self, patch_size: int, in_channels: int, bottleneck_dim: int, width: int):
        super().__init__()
        self.proj1 = nn.Conv2d(in_channels, bottleneck_dim, patch_size, patch_size, bias=False)
        self.proj2 = nn.Conv2d(bottleneck_dim, width, 1)

    def forward(self, z: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, N, C)
        patches = F.linear(patchify(z, self.proj1.kernel_size[0]), self.proj1.weight.flatten(1))
        return F.linear(patches, self.proj2.weight.flatten(1), self.proj2.bias)


class SwiGLU(nn.Module):
    def __init__(self, width: int, drop: float):
        super().__init__()
        hidden = int(4 * width * 2 / 3)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.drop(F.silu(gate) * value))


class Block(nn.Module):
    """Attention (qk-norm, 2-D RoPE on the patches only) and SwiGLU, each under adaLN-Zero: the identity at the start."""

    def __init__(self, width: int, num_heads: int, context_tokens: int, attn_drop: float, proj_drop: float):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = AttentionRope(
            width,
            num_heads,
            num_prefix_tokens=context_tokens,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=RMSNorm,
            qk_norm=True,
        )
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, proj_drop)
        self.adaLN_modulation = adaln(width, 6)

    def forward(self, x: Tensor, c: Tensor, rope: Tensor) -> Tensor:  # (B, T, C), (B, C), (N, 2 D) -> (B, T, C)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rope=rope)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out_dim: int):
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, out_dim)
        self.adaLN_modulation = adaln(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (B, N, C), (B, C) -> (B, N, p p 3)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def run(block: nn.Module, *inputs: Tensor, recompute: bool):
    """What a block makes; with `recompute` it is made again in the backward pass, and its inputs alone are kept until then."""
    return checkpoint(block, *inputs, use_reentrant=False) if recompute and torch.is_grad_enabled() else block(*inputs)


def initialize_linears(net: nn.Module) -> None:
    """Xavier-uniform with zero bias, the patch convolutions too."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: the patch convolutions are linear layers
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def patchify(z: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) -> (B, N, 3 p p), each token (channel, row, column), as the weights of a convolution are."""
    p, (batch, channels, height, width) = patch_size, z.shape
    return z.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * p * p)


def unpatchify(tokens: Tensor, patch_size: int, channels: int) -> Tensor:
    """(B, N, p p 3), each token (row, column, channel) -> (B, 3, H, W)."""
    p, grid = patch_size, int(tokens.shape[1] ** 0.5)
    x = tokens.reshape(-1, grid, grid, p, p, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, grid * p, grid * p)


class JiT(nn.Module):
    """net(z_t, t, y) -> x_pred: the clean picture, predicted from the noisy one.

    y is what the picture is conditioned on: labels (B,) int64, or, with `text_dim`, pooled text features (B, text_dim).
    It is added to the time embedding for adaLN and, repeated, forms the in-context tokens put in front of the patches
    from block `in_context_start` on. With `text_len` too, y is a Text of so many tokens a caption: they are the in-context tokens
    themselves, turned by RoPE as MM-JiT's are (which word goes with which is hardly learned without; benchmarks/README.md), and adaLN takes the
    time alone. Dropout acts in the middle half of the blocks only.
    """

    def __init__(
        self,
        input_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_classes: int = 1000,
        text_dim: int | None = None,
        text_len: int | None = None,
        bottleneck_dim: int = 128,
        in_context_len: int = 32,
        in_context_start: int = 4,
    ):
        super().__init__()
        assert input_size % patch_size == 0, f"image size {input_size} is not a multiple of the patch size {patch_size}"
        grid = input_size // patch_size
        self.patch_size, self.in_channels = patch_size, in_channels
        self.grad_checkpointing = False  # whether blocks are computed again in the backward pass
        self.in_context_len, self.in_context_start = text_len or in_context_len, in_context_start
        in_context_len = self.in_context_len

        self.t_embedder = TimeEmbedder(hidden_size)
        if text_dim is None:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        else:
            self.y_embedder = (TokenProjector if text_len else TextProjector)(text_dim, hidden_size)
        self.x_embedder = BottleneckPatchEmbed(patch_size, in_channels, bottleneck_dim, hidden_size)
        self.register_buffer("pos_embed", sincos_table(hidden_size, grid)[None])
        self.in_context_posemb = nn.Parameter(torch.zeros(1, in_context_len, hidden_size))
        rope = RotaryEmbeddingCat(hidden_size // num_heads, in_pixels=False, feat_shape=[grid, grid]).get_embed()
        self.register_buffer("rope", rope, persistent=False)
        text_rope = interleaved(text_angles(text_len or 0, hidden_size // num_heads))
        self.register_buffer("rope_with_context", torch.cat([text_rope, rope]), persistent=False)  # labels and pooled text are not turned
        unturned = 0 if text_len else in_context_len

        def block(i: int) -> Block:
            drops = (attn_drop, proj_drop) if depth // 4 <= i < depth // 4 * 3 else (0.0, 0.0)
            return Block(hidden_size, num_heads, unturned if i >= in_context_start else 0, *drops)

        self.blocks = nn.ModuleList(block(i) for i in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * in_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        initialize_linears(self)
        for weight in (self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight, self.in_context_posemb):
            nn.init.normal_(weight, std=0.02)
        if isinstance(self.y_embedder, LabelEmbedder):
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        if isinstance(self.y_embedder, TokenProjector):
            nn.init.normal_(self.y_embedder.mask_token, std=0.02)
        for layer in (*self.blocks, self.final_layer):  # adaLN-Zero, last: nothing above may undo it
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def repeated(self) -> list[nn.Module]:
        """What is compiled, or recomputed, one by one."""
        return [*self.blocks]

    def embed(self, y: Tensor | Text) -> Embedded:
        """(B, C) of a label or a vector, (B, L, C) of tokens."""
        return Embedded(self.y_embedder(y))

    def forward(self, z_t: Tensor, t: Tensor, y: Tensor | Text | Embedded) -> Tensor:
        """z_t: (B, 3, H, W); t: (B,) in [0, 1]; y: (B,) labels, (B, text_dim) features or Text, or what `embed` made.  Returns: x_pred, (B, 3, H, W)."""
        c, context = self.t_embedder(t), (y if isinstance(y, Embedded) else self.embed(y)).value
        if context.ndim == 2:  # one vector a picture
            c, context = c + context, context[:, None]
        x, rope = self.x_embedder(z_t) + self.pos_embed, self.rope
        for i, block in enumerate(self.blocks):
            if i == self.in_context_start:
                x, rope = torch.cat([context + self.in_context_posemb, x], dim=1), self.rope_with_context
            x = run(block, x, c, rope, recompute=self.grad_checkpointing)
        return unpatchify(self.final_layer(x[:, self.in_context_len :], c), self.patch_size, self.in_channels)


# The paper's table 9 for B, L, H, G; Nano, Ti and S are ours, for small data and CPUs.
_COLUMNS = ("hidden_size", "depth", "num_heads", "bottleneck_dim", "in_context_start", "in_context_len")
SIZES = {
    "Nano": (128, 6, 4, 32, 2, 8),
    "Ti": (192, 12, 3, 32, 4, 32),
    "S": (384, 12, 6, 64, 4, 32),
    "B": (768, 12, 12, 128, 4, 32),
    "L": (1024, 24, 16, 128, 8, 32),
    "H": (1280, 32, 16, 256, 10, 32),
    "G": (1664, 40, 16, 256, 10, 32),
}


def build_model(name: str, **kwargs) -> JiT:
    """The network called `name`; `kwargs` are JiT's own (a -Text model needs `text_dim`, a -Tokens model `text_len` too)."""
    known = parse_model_name(name)
    wanted = {"labels": (), "pooled": ("text_dim",), "tokens": ("text_dim", "text_len")}[known.condition]
    given = tuple(key for key in ("text_dim", "text_len") if kwargs.get(key) is not None)
    if given != wanted:
        raise ValueError(f"{name} takes {' and '.join(wanted) or 'no text_dim'}, the width of the LLM and the tokens of a caption, not {given}")
    return JiT(patch_size=known.patch, **dict(zip(_COLUMNS, SIZES[known.size])), **kwargs)


JiT_models = {
    name: partial(build_model, name) for text in ("", "-Text", "-Tokens") for size in "BLH" for patch in (16, 32) for name in [f"JiT-{size}/{patch}{text}"]
}
