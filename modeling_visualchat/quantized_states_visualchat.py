"""
Keys and values of images in 8 or 4 bits, by torchao: in an image memory they take a quarter or a seventh of their size
in float32, and are dequantized where a layer reads them.

Every vector of a key or value, or every 32 numbers of it in 4 bits, has a scale and a zero point of its own.
"""

from dataclasses import dataclass
from typing import Any

import torch


BITS = (8, 4)
GROUP_OF_4_BITS = 32  # numbers with a common scale


@dataclass(frozen=True, eq=False)
class QuantizedStates:
    """
    A tensor (K, L, D) in few bits.

    Args:
        data (`torch.Tensor` of shape `(K, L, D)`, or `(K, L, D / 2)` in 4 bits): Unsigned bytes.
        scale (`torch.Tensor` of shape `(K, L, groups)`): Of each group, in float16.
        zero (`torch.Tensor` of shape `(K, L, groups)`): What stands for zero, unsigned bytes.
        bits (`int`): 8 or 4.
    """

    data: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int

    @classmethod
    def quantize(cls, states: torch.Tensor, bits: int) -> "QuantizedStates":
        """The states (K, L, D) in 8 or 4 bits."""
        primitives, size = quantization_primitives(), states.shape[-1]
        group = GROUP_OF_4_BITS if bits == 4 and size % GROUP_OF_4_BITS == 0 else size
        block, limits = (1, 1, group), (torch.uint8, 0, 2**bits - 1)
        scale, zero = primitives.choose_qparams_affine(
            states.float(), primitives.MappingType.ASYMMETRIC, block, *limits, eps=2.0**-14
        )
        shape = (*states.shape[:-1], size // group)
        scale, zero = scale.view(shape).half(), zero.view(shape).to(torch.uint8)
        data = primitives.quantize_affine(states.float(), block, scale.float(), zero.int(), *limits).contiguous()
        return cls(data[..., ::2] | data[..., 1::2] << 4 if bits == 4 else data, scale, zero, bits)

    def to(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The states (K, L, D) on a device, in a dtype."""
        data, scale, zero = (part.to(device) for part in (self.data, self.scale, self.zero))
        if self.bits == 4:
            data = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)
        block, limits = (1, 1, data.shape[-1] // scale.shape[-1]), (torch.uint8, 0, 2**self.bits - 1)
        return quantization_primitives().dequantize_affine(
            data, block, scale.float(), zero.int(), *limits, output_dtype=dtype
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of the states."""
        return (self.data.shape[0], self.data.shape[1], self.data.shape[2] * 8 // self.bits)

    @property
    def nbytes(self) -> int:
        """The bytes that are kept."""
        return self.data.nbytes + self.scale.nbytes + self.zero.nbytes


def quantization_primitives() -> Any:
    """The functions of torchao; an `ImportError` that says how to install it."""
    try:
        from torchao.quantization import quant_primitives
    except ImportError as error:
        raise ImportError("An image memory in 8 or 4 bits requires torchao: pip install torchao.") from error
    return quant_primitives
