"""A resampler: learned queries on a grid that read the patches of an image, and positions on grids."""

import math

import torch
from torch import nn
from transformers import initialization as init


def sine_cosine_positions(grid_size: int, width: int) -> torch.Tensor:
    """
    Fixed positions (grid_size x grid_size, width) of a grid, row by row.

    The first half of the width is that of the column, the second that of the row. A half holds the sines, then the
    cosines, of `position / 10000^(i / quarter)` for `i` below a quarter of the width.
    """
    quarter = width // 4
    angles = torch.arange(grid_size)[:, None] / 10000.0 ** (torch.arange(quarter) / quarter)
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)
    columns, rows = line[None, :].expand(grid_size, -1, -1), line[:, None].expand(-1, grid_size, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


def interpolate_positions(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Positions of a square grid (length, width) for a grid of rows and columns: bicubic, computed in float32."""
    size = math.isqrt(len(positions))
    if grid == (size, size):
        return positions
    square = positions.float().unflatten(0, (1, size, size)).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)


class Resampler(nn.Module):
    """
    Learned queries on a square grid that read patches by one cross-attention; parameter names are Qwen-VL's.

    The positions are fixed, and saved nevertheless: published checkpoints hold them, in the precision of their
    training.

    Args:
        grid_size (`int`): Height and width of the grid of queries.
        width (`int`): Width of queries and output.
        num_heads (`int`): Number of heads.
        patch_width (`int`): Width of the patches.
        patch_bias (`bool`): Whether the projection of the patches has a bias.
        eps (`float`): Epsilon of the LayerNorms.
    """

    def __init__(self, grid_size: int, width: int, num_heads: int, patch_width: int, patch_bias: bool, eps: float):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(grid_size**2, width))
        self.pos_embed = nn.Buffer(sine_cosine_positions(grid_size, width))
        self.kv_proj = nn.Linear(patch_width, width, bias=patch_bias)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps=eps)
        self.ln_kv = nn.LayerNorm(width, eps=eps)

    def init_own_parameters(self) -> None:
        """Sets what is no weight of a layer, as far as it was not loaded."""
        init.trunc_normal_(self.query, std=0.02)
        length, width = self.pos_embed.shape  # not those of the queries, which ZeRO-3 shards
        init.copy_(self.pos_embed, sine_cosine_positions(math.isqrt(length), width))

    def forward(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """
        Args:
            patches (`torch.Tensor` of shape `(N, length, patch_width)`):
                The patches of images, row by row; tokens before them (class, registers) have no position.
            grid (`tuple[int, int]`): Rows and columns of patches.

        Returns:
            `torch.Tensor` of shape `(N, grid_size x grid_size, width)`
        """
        values = self.ln_kv(self.kv_proj(patches))
        positions = interpolate_positions(self.pos_embed, grid).to(values.dtype)
        keys = values + nn.functional.pad(positions, (0, 0, values.shape[1] - len(positions), 0))
        queries = (self.ln_q(self.query) + self.pos_embed.to(values.dtype)).expand(len(values), -1, -1)
        return self.attn(queries, keys, values, need_weights=False)[0]


__all__ = ["Resampler", "interpolate_positions", "sine_cosine_positions"]
