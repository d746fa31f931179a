"""
Late rotation: keys as before rotation, rotated to a position by the decoder's own rotary embedding.

Rotary embeddings (RoFormer, arXiv 2104.09864) rotate keys by their position and turn nothing at position 0. The layout
is read from the configuration and the rotary module: a table for each layer type where the module has several, layers
without rotation, and the leading part of each head where the rotation is partial. [`probe_decoder`] verifies it once
on a small replica of the decoder, in float32, at far positions and with random weights.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from .attention_visualchat import PlanNotDeliveredError
from .skip_queries_visualchat import SkipQueryProjections


# Decoders in which layers of full attention have no rotation, by model type.
ROTARY_IN_SLIDING_LAYERS_ONLY = {
    "afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone4_5_text", "exaone_moe", "flint",
}  # fmt: skip
TOLERANCE = 1e-4  # of the relative error in float32
PROBE_LENGTH = 4  # tokens


class KeyRotation:
    """How the layers of a decoder rotate their keys; a `ValueError` for a decoder without a rotary module."""

    def __init__(self, decoder: Any):
        name = type(decoder).__name__
        if not hasattr(decoder, "rotary_emb") or not hasattr(sys.modules[type(decoder).__module__], _APPLY):
            raise ValueError(f"{name} has no module rotary_emb with a function {_APPLY}")
        config = decoder.config
        self.decoder = decoder
        self.num_layers: int = config.num_hidden_layers
        layer_types = getattr(config, "layer_types", None) or [None] * self.num_layers
        has_tables = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
        # For each layer the key of its table, a layer type where the module has a table for each.
        self.table_of = [layer_type if has_tables else None for layer_type in layer_types]
        self.is_rotated = [
            _is_rotated(config, layer, layer_type) for layer, layer_type in enumerate(layer_types[: self.num_layers])
        ]

    def tables(self, position_ids: torch.Tensor, like: torch.Tensor) -> dict[str | None, tuple]:
        """The cosines and sines at positions (B, I), each (B, I, rotated size), by layer type."""
        # Not by a call of the module, which ZeRO-3 counts: a rank whose batch has no image would fall out of step.
        rotary = self.decoder.rotary_emb.forward
        arguments = {key: () if key is None else (key,) for key in dict.fromkeys(self.table_of)}
        return {key: rotary(like, position_ids, *layer_type) for key, layer_type in arguments.items()}

    def turn_tables(
        self, shifts: torch.Tensor, like: torch.Tensor, backwards: bool = False
    ) -> dict[str | None, tuple]:
        """
        As [`tables`], in float32, for what is rotated already and moves by a number of positions (B, I): without the
        factor that some rotary embeddings (YaRN) put on their tables.
        """
        turns = {}
        for key, (cos, sin) in self.tables(shifts, like.float()).items():
            factor = (cos.square() + sin.square()).sqrt()
            turns[key] = (cos / factor, (-sin if backwards else sin) / factor)
        return turns

    def rotate(self, keys: torch.Tensor, layer: int, tables: dict[str | None, tuple]) -> torch.Tensor:
        """
        Rotates the keys (B, K, I, D) of a layer, in the dtype of the tables; layers without a rotation leave them as
        they are.
        """
        if not self.is_rotated[layer]:
            return keys
        cos, sin = (table.to(keys.device) for table in tables[self.table_of[layer]])
        apply = getattr(sys.modules[type(self.decoder).__module__], _APPLY)
        size = cos.shape[-1]
        rotated = apply(keys[:, :0, :, :size].to(cos.dtype), keys[..., :size].to(cos.dtype), cos, sin)[1]
        rotated = rotated.to(keys.dtype)
        return rotated if size == keys.shape[-1] else torch.cat([rotated, keys[..., size:]], dim=-1)


_APPLY = "apply_rotary_pos_emb"


def _is_rotated(config: Any, layer: int, layer_type: str | None) -> bool:
    if getattr(config, "no_rope_layers", None):
        return bool(config.no_rope_layers[layer])
    if config.model_type in ROTARY_IN_SLIDING_LAYERS_ONLY and config.sliding_window is not None:
        return layer_type == "sliding_attention"
    return True


def run_with_plan(
    decoder: Any, embeds: torch.Tensor, position_ids: torch.Tensor, plan: Any, past_key_values=None, **kwargs
) -> BaseModelOutputWithPast:
    """Runs a decoder with a plan in place of masks."""
    no_mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=embeds.device)
    layer_types = getattr(decoder.config, "layer_types", None)
    kwargs.setdefault("use_cache", past_key_values is not None)
    return decoder(
        inputs_embeds=embeds,
        attention_mask=no_mask if layer_types is None else dict.fromkeys(layer_types, no_mask),
        position_ids=position_ids,
        past_key_values=past_key_values,
        layer_plan=plan,
        **kwargs,
    )


@dataclass(frozen=True)
class DecoderProbe:
    """What two streams can do with a decoder."""

    rotation: KeyRotation | None = None  # its layout, if it could be read
    no_two_streams: str | None = None  # why text and images cannot go through it apart
    no_late_rotation: str | None = None  # why keys cannot be rotated late
    skips_queries: bool = False  # whether nothing but attention reads the query projections
    is_final: bool = True  # whether trying again would say the same


@torch.no_grad()
def probe_decoder(decoder: Any, make_stream: Callable[[], Any]) -> DecoderProbe:
    """Tries a decoder on a small replica with random weights, so that neither its weights nor its hooks matter."""
    name = type(decoder).__name__
    try:
        rotation = KeyRotation(decoder)
        replica = build_replica(decoder)
        last = min(_longest_position(decoder.config), 100_000) - PROBE_LENGTH
        offsets = torch.tensor([[max(0, min(offset, last))] for offset in (1, 17, 1021, last)], device="cpu")
        positions = offsets + torch.arange(PROBE_LENGTH, device="cpu")
        embeds = _draw((1, PROBE_LENGTH, replica.config.hidden_size), _seeded()).expand(len(offsets), -1, -1)
        streams = [make_stream(), make_stream()]
        origin = streams[0].positions(embeds)
        outputs = [
            run_with_plan(replica, embeds, position_ids, stream).last_hidden_state
            for stream, position_ids in zip(streams, (origin, positions))
        ]
        with SkipQueryProjections(replica):
            skipped = run_with_plan(replica, embeds, positions, make_stream()).last_hidden_state
        skips_queries = torch.equal(skipped, outputs[1])
    except (MemoryError, torch.OutOfMemoryError) as error:
        return DecoderProbe(no_two_streams=f"{name} cannot be tried: {error}", is_final=False)
    except PlanNotDeliveredError as error:
        return DecoderProbe(no_two_streams=str(error).rstrip("."))
    except Exception as error:  # a replica is foreign code: whatever it raises is the reason
        return DecoderProbe(no_two_streams=f"{name} cannot be tried: {type(error).__name__}: {error}")
    num_layers = rotation.num_layers
    if sorted(streams[0].keys) != list(range(num_layers)) or streams[0].num_calls != num_layers:
        return DecoderProbe(no_two_streams=f"the layers of {name} do not attend exactly once each")
    reason = _no_late_rotation(KeyRotation(replica), streams, outputs, origin, positions)
    reason = None if reason is None else f"{name}: {reason}"
    return DecoderProbe(rotation, no_late_rotation=reason, skips_queries=skips_queries)


def _no_late_rotation(rotation: KeyRotation, streams, outputs, origin, positions) -> str | None:
    """Why the keys of images computed at the origin are not, once rotated, those of images at other positions."""
    # Float32 tells far angles apart only as far as this.
    tolerance = TOLERANCE + positions[:, 0] * 2.0**-23
    tables = rotation.turn_tables(positions - origin, outputs[0])
    for layer in range(rotation.num_layers):
        expected = streams[1].keys[layer]
        try:
            difference = _relative_error(rotation.rotate(streams[0].keys[layer], layer, tables), expected)
        except (RuntimeError, KeyError) as mismatch:  # shapes that do not fit, a layer type without a table
            return f"its keys cannot be rotated late: {mismatch}"
        if not bool((difference <= tolerance).all()):
            return f"its keys in layer {layer} are off by {float(difference.max()):.2%} when they are rotated late"
    difference = _relative_error(*outputs)
    if not bool((difference <= tolerance).all()):
        return f"its image tokens depend on their position, by {float(difference.max()):.2%}"
    return None


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each row (B, …)."""
    return (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


def build_replica(decoder: Any) -> Any:
    """The decoder with the same layers and head size, but narrow, with random weights in float32 on the CPU."""
    config = copy.deepcopy(decoder.config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    narrow = {
        "hidden_size": 2 * head_dim, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8,
        "pad_token_id": None, "intermediate_size": 8, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    }  # fmt: skip
    for name, value in narrow.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, value)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            replica = type(decoder)(config).float().eval()
    finally:
        torch.set_default_dtype(default_dtype)
    generator = _seeded()
    for parameter in replica.parameters():
        values = _draw(parameter.shape, generator)
        parameter.copy_(values / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1 + 0.2 * values)
    return replica


def _draw(shape, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def _seeded() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def rotary_limit(text_config: Any) -> int | None:
    """The length from which a rotary embedding changes its frequencies, if it is of a type that does."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    tables = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    tables = [table for table in tables if table.get("rope_type") in ("dynamic", "longrope")]
    default = getattr(text_config, "original_max_position_embeddings", None) or text_config.max_position_embeddings
    return min((table.get("original_max_position_embeddings") or default for table in tables), default=None)


def _longest_position(text_config: Any) -> int:
    return rotary_limit(text_config) or getattr(text_config, "max_position_embeddings", None) or 2048
