"""MM-JiT: JiT with the caption's tokens in joint attention (MiniT2I, the blog and code of JiT's authors of June 2026; names of the released files).

Two streams, text and picture, meet in every block's attention, each with weights of its own. There is no time and no adaLN: the network reads the
noise level from the picture. Shapes: B batch, L text tokens, N patches, C width, D head width, p patch size, G = image size / p.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import parse_model_name
from models_jit import BottleneckPatchEmbed, RMSNorm, initialize_linears, run, sincos_table, text_angles, unpatchify
from util.text import Embedded, Text

Rope = tuple[Tensor, Tensor]  # cosines and sines of the angles of RoPE, (T, D / 2) each, float32: taken once for all blocks


def rope_of(angles: Tensor) -> Rope:
    return angles.cos(), angles.sin()


def picture_angles(grid: int, head_width: int) -> Tensor:
    """(G * G, D / 2), row-major: those of the row, then those of the column."""
    frequencies = 10000.0 ** (-torch.arange(0, head_width // 2, 2) / (head_width // 2))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    return torch.cat([index.flatten()[:, None] * frequencies for index in (row, column)], dim=1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """RoPE on pairs (j, j + D / 2).  x: (B, heads, T, D)."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = rope
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(x)


class SwiGLU(nn.Module):
    def __init__(self, width: int, ratio: float):
        super().__init__()
        hidden = -(-int(width * ratio) // 8) * 8
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Attention(nn.Module):
    """Base of the blocks: q and k normalised and rotated.  Nothing is masked, so every kernel of fused attention will do."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_norm = RMSNorm(width // num_heads)
        self.k_norm = RMSNorm(width // num_heads)

    def attend(self, qkv: Tensor, rope: Rope) -> Tensor:  # (B, T, 3 C) -> (B, T, C)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class TextBlock(Attention):
    """A plain pre-norm block on the text alone."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__(width, num_heads)
        self.norm1 = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attn_proj = nn.Linear(width, width)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, mlp_ratio)

    def forward(self, text: Tensor, rope: Rope) -> Tensor:  # (B, L, C) -> (B, L, C)
        text = text + self.attn_proj(self.attend(self.qkv(self.norm1(text)), rope))
        return text + self.mlp(self.norm2(text))


class DoubleBlock(Attention):
    """Joint attention over [text, picture], and an MLP for each.  The last block's text goes nowhere and is not made."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, last: bool):
        super().__init__(width, num_heads)
        self.last = last
        for stream in ("img",) if last else ("img", "txt"):
            setattr(self, f"{stream}_attn_proj", nn.Linear(width, width))
            setattr(self, f"{stream}_norm2", RMSNorm(width))
            setattr(self, f"{stream}_mlp", SwiGLU(width, mlp_ratio))
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_norm1", RMSNorm(width))
            setattr(self, f"{stream}_qkv", nn.Linear(width, 3 * width))

    def forward(self, text: Tensor, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """text: (B, L, C); x: (B, N, C); rope: of all L + N.  Returns: text and x."""
        length = text.shape[1]
        qkv = torch.cat([self.txt_qkv(self.txt_norm1(text)), self.img_qkv(self.img_norm1(x))], dim=1)
        seen = self.attend(qkv, rope)
        x = x + self.img_attn_proj(seen[:, length:])
        x = x + self.img_mlp(self.img_norm2(x))
        if not self.last:
            text = text + self.txt_attn_proj(seen[:, :length])
            text = text + self.txt_mlp(self.txt_norm2(text))
        return text, x


class FinalLayer(nn.Module):
    def __init__(self, width: int, out_dim: int):
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, out_dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C) -> (B, N, p p 3)
        return self.linear(self.norm_final(x))


class MMJiT(nn.Module):
    """net(z_t, t, y) -> x_pred: the clean picture, predicted from the noisy one and a caption's tokens.

    Where a caption has no token, and everywhere for the null, the learned mask token stands in, and is attended to. The time t is not used.
    """

    def __init__(
        self,
        input_size: int = 512,
        patch_size: int = 16,
        in_channels: int = 3,
        hidden_size: int = 768,
        depth: int = 17,
        text_blocks: int = 2,
        num_heads: int = 12,
        mlp_ratio: float = 2.6667,
        text_dim: int = 1024,
        bottleneck_dim: int = 128,
    ):
        super().__init__()
        assert input_size % patch_size == 0, f"image size {input_size} is not a multiple of the patch size {patch_size}"
        grid, self.head_width = input_size // patch_size, hidden_size // num_heads
        self.patch_size, self.in_channels = patch_size, in_channels
        self.grad_checkpointing = False  # whether blocks are computed again in the backward pass
        self.img_embedder = BottleneckPatchEmbed(patch_size, in_channels, bottleneck_dim, hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, text_dim))
        self.txt_embedder = nn.Linear(text_dim, hidden_size, bias=False)
        self.register_buffer("pos_embed", sincos_table(hidden_size, grid)[None], persistent=False)
        self.register_buffer("angles", picture_angles(grid, self.head_width), persistent=False)
        self.txt_preamble_blocks = nn.ModuleList(TextBlock(hidden_size, num_heads, mlp_ratio) for _ in range(text_blocks))
        self.double_blocks = nn.ModuleList(DoubleBlock(hidden_size, num_heads, mlp_ratio, i == depth - 1) for i in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * in_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        initialize_linears(self)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def y_embedder(self) -> nn.Module:
        """Where the text comes in, by the name that it has in JiT."""
        return self.txt_embedder

    @property
    def repeated(self) -> list[nn.Module]:
        """What is compiled, or recomputed, one by one."""
        return [*self.txt_preamble_blocks, *self.double_blocks]

    def embed(self, y: Text) -> Embedded:
        """The caption before it meets the picture, (B, L, C)."""
        text = self.txt_embedder(torch.where(y.mask[..., None], y.states, self.mask_token))
        rope = rope_of(text_angles(text.shape[1], self.head_width, text.device))
        for block in self.txt_preamble_blocks:
            text = run(block, text, rope, recompute=self.grad_checkpointing)
        return Embedded(text)

    def forward(self, z_t: Tensor, t: Tensor, y: Text | Embedded) -> Tensor:
        """z_t: (B, 3, H, W); t: (B,), in [0, 1]; y: (B, L, text_dim), or what `embed` made of it.  Returns: x_pred, (B, 3, H, W)."""
        text = (y if isinstance(y, Embedded) else self.embed(y)).value
        places = torch.cat([text_angles(text.shape[1], self.head_width, text.device), self.angles])
        x, rope = self.img_embedder(z_t) + self.pos_embed, rope_of(places)
        for block in self.double_blocks:
            text, x = run(block, text, x, rope, recompute=self.grad_checkpointing)
        return unpatchify(self.final_layer(x), self.patch_size, self.in_channels)


# B and L are the released ones, M and XL those of the release's code, without weights; Nano, Ti and S are ours, for small data and CPUs.
_COLUMNS = ("hidden_size", "depth", "num_heads", "mlp_ratio", "bottleneck_dim")
SIZES = {
    "Nano": (128, 6, 4, 2.6667, 32),
    "Ti": (192, 12, 3, 2.6667, 32),
    "S": (384, 12, 6, 2.6667, 64),
    "B": (768, 17, 12, 2.6667, 128),
    "M": (1024, 22, 16, 2.6667, 128),
    "L": (1248, 23, 24, 2.7, 128),
    "XL": (1536, 33, 24, 2.6667, 128),
}


def build_model(name: str, **kwargs) -> MMJiT:
    """The network called `name`; `kwargs` are MMJiT's own."""
    known = parse_model_name(name)
    return MMJiT(patch_size=known.patch, **dict(zip(_COLUMNS, SIZES[known.size])), **kwargs)
