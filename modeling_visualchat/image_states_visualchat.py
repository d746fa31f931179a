"""
What a decoder makes of images: their keys and values at every layer, which no conversation changes.

An image token attends only to itself, so its hidden states depend on its own embedding alone, and only its keys know a
position, by rotation. [`ImageReader`] takes images through an unmodified decoder at position 0, where a rotation turns
nothing, and notes what each layer would cache. [`KeyRotation`] turns such keys to where the images stand in a
conversation, with the decoder's own rotary embedding.

Dimensions: N images of a batch, U different ones among them, `length` tokens an image, K key/value heads, D head size.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.utils import output_capturing

from .plan_visualchat import IMAGE, take


@dataclass(frozen=True, eq=False)
class ImageStates:
    """
    The images of a batch, each different one once.

    Args:
        features (`torch.Tensor` of shape `(U, length, text hidden)`): Projected features, the decoder's input.
        index (`list` of N `int`): For each image of the batch which of the different ones it is.
        keys (`list` of `torch.Tensor` of shape `(U, K, length, D)`): For each layer; empty until the decoder has read
            the images.
        values (`list` of `torch.Tensor` of shape `(U, K, length, D)`): For each layer.
        outputs (`torch.Tensor` of shape `(U, length, text hidden)`, *optional*): The decoder's output, if it was asked
            for.
        is_rotated (`bool`): Whether the keys are those of a place in a conversation, and of no use in another.
    """

    features: torch.Tensor
    index: list[int]
    keys: list[torch.Tensor] = field(default_factory=list, repr=False)
    values: list[torch.Tensor] = field(default_factory=list, repr=False)
    outputs: torch.Tensor | None = field(default=None, repr=False)
    is_rotated: bool = False

    @classmethod
    def of_features(cls, features: list[torch.Tensor]) -> "ImageStates":
        """From one tensor (length, text hidden) an image; images that share a tensor are one."""
        different = {id(feature): feature for feature in features}
        numbers = {key: number for number, key in enumerate(different)}
        return cls(torch.stack(list(different.values())), [numbers[id(feature)] for feature in features])

    def select(self, images: list[int]) -> "ImageStates":
        """The batch that has these images of this one, in this order; nothing is copied."""
        return replace(self, index=[self.index[image] for image in images])

    def expand(self, states: torch.Tensor) -> torch.Tensor:
        """(U, …) to (N, …)."""
        if not self.has_repeats(len(states)):
            return states
        return states[torch.tensor(self.index, device=states.device)]

    def has_repeats(self, num_different: int | None = None) -> bool:
        """Whether the batch is not just the different images in order."""
        return self.index != list(range(len(self.features) if num_different is None else num_different))

    def token_index(self) -> torch.Tensor:
        """For each image token of the batch, in order, its row among the tokens of the different images."""
        length = self.features.shape[1]
        return (torch.tensor(self.index)[:, None] * length + torch.arange(length)).flatten()


def same_images(pixel_values: torch.Tensor) -> list[int]:
    """For each image (N, …) the number of the first one that equals it, counting different ones alone."""
    if len(pixel_values) < 2:
        return list(range(len(pixel_values)))
    flat = pixel_values.detach().flatten(1)
    sums = zip(flat.sum(dim=1, dtype=torch.float64).tolist(), flat[:, ::7].sum(dim=1, dtype=torch.float64).tolist())
    different: dict[tuple, list[tuple[int, int]]] = {}
    numbers, count = [], 0
    for image, pair in enumerate(sums):
        candidates = different.setdefault(pair, [])
        number = next((number for other, number in candidates if torch.equal(flat[other], flat[image])), None)
        if number is None:
            number, count = count, count + 1
            candidates.append((image, number))
        numbers.append(number)
    return numbers


def has_dropout(module: nn.Module) -> bool:
    """Whether what a module computes is random, or depends on the rest of its batch, as in some training."""
    if not module.training:
        return False
    rates = ("p", "drop_prob", "dropout", "attention_dropout")
    return any(
        part.training
        and (
            isinstance(part, nn.modules.batchnorm._BatchNorm)
            or any(isinstance(rate := getattr(part, name, None), float) and rate > 0 for name in rates)
        )
        for part in module.modules()
    )


def hooks_of(module: nn.Module) -> list[Callable]:
    """The hooks of a module that may change what it computes, or count on its end; not those that only record."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if getattr(hook, "func", hook).__module__ != output_capturing.__name__]


class AllReadError(Exception):
    """Nothing reads an image beyond the keys and values of the last layer."""


class ImageReader:
    """
    Stands in for a plan while images go through the decoder: notes their keys and values.

    Args:
        last_layer (`int`, *optional*): The layer after whose keys and values to stop, by an [`AllReadError`].
    """

    def __init__(self, last_layer: int | None = None):
        self.last_layer = last_layer
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.num_calls = 0

    def attend(self, module: nn.Module, query, key, value, scaling: float | None, dropout: float) -> torch.Tensor:
        """An image token's output is its own value: (N, H, length, D) to (N, length, H, D)."""
        layer: Any = module.layer_idx
        self.num_calls += 1
        # With gradient checkpointing a layer comes by again in the backward pass.
        self.keys.setdefault(layer, key)
        self.values.setdefault(layer, value)
        if layer == self.last_layer:
            raise AllReadError
        groups = query.shape[1] // value.shape[1]
        value = value if groups == 1 else value.repeat_interleave(groups, dim=1)
        return value.transpose(1, 2).contiguous()


class WithoutQueries(TorchFunctionMode):
    """
    Leaves out the projections of queries, which nothing reads of an image, where they are plain linear layers.

    Args:
        decoder (`nn.Module`): The decoder.
    """

    def __init__(self, decoder: nn.Module):
        super().__init__()
        projections = [module for name, module in decoder.named_modules() if name.endswith(".q_proj")]
        self.weights = {id(module.weight) for module in projections if type(module) is nn.Linear}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear and len(args) > 1 and id(args[1]) in self.weights:
            return args[0].new_zeros(()).expand(*args[0].shape[:-1], args[1].shape[0])
        return function(*args, **(kwargs or {}))


def read_images(
    decode: Callable[..., Any],
    images: ImageStates,
    rotation: "KeyRotation",
    is_watched: bool,
    needs_outputs: bool,
    position_ids: torch.Tensor | None = None,
) -> ImageStates:
    """
    Takes images through a decoder, and leaves out what nothing reads: queries, and beyond the keys and values of the
    last layer everything.

    Args:
        decode (`Callable`): Runs the decoder, given `inputs_embeds`, `position_ids` and `mmca_plan`.
        images (`ImageStates`): With features alone.
        rotation (`KeyRotation`): Of the decoder.
        is_watched (`bool`): Whether somebody counts on every module being run to its end; then nothing is left out.
        needs_outputs (`bool`): Whether somebody reads the decoder's output for the images.
        position_ids (`torch.Tensor` of shape `(U, length)`, *optional*): Where the images stand, to have keys that are
            rotated already. Without, they are as they are before rotation.
    """
    stops_early = not needs_outputs and not is_watched
    reader = ImageReader(rotation.num_layers - 1 if stops_early else None)
    is_rotated = position_ids is not None
    if position_ids is None:
        position_ids = torch.zeros(images.features.shape[:2], dtype=torch.long, device=images.features.device)
    outputs = None
    shortcut = contextlib.nullcontext() if is_watched else WithoutQueries(rotation.decoder)
    with contextlib.suppress(AllReadError), shortcut:
        outputs = decode(images.features, position_ids, reader).last_hidden_state
    keys, values = ([states[layer] for layer in range(rotation.num_layers)] for states in (reader.keys, reader.values))
    return replace(
        images,
        keys=keys if is_rotated else [rotation.undo_scaling(states, layer) for layer, states in enumerate(keys)],
        values=values,
        outputs=outputs,
        is_rotated=is_rotated,
    )


class KeyRotation:
    """
    How the layers of a decoder rotate their keys, found out by trying.

    Args:
        decoder (`nn.Module`): The decoder.
        layers (`list`): For each layer the kind of its rotary embedding and the function that applies it, or `None`
            where keys know no position.
    """

    def __init__(self, decoder: nn.Module, layers: list[tuple[str | None, Callable] | None]):
        self.decoder: Any = decoder
        self.layers = layers
        self.factors: dict[str | None, float] = {}

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @classmethod
    @torch.no_grad()
    def find(cls, decoder: Any, decode: Callable[..., Any], like: torch.Tensor) -> "KeyRotation | None":
        """
        Compares the keys of two made-up tokens at position 0 with their keys elsewhere, layer by layer.

        Args:
            decoder (`nn.Module`): The decoder.
            decode (`Callable`): Runs it, given `inputs_embeds`, `position_ids` and `mmca_plan`.
            like (`torch.Tensor`): An embedding, for its dtype and device.

        Returns:
            `None` if the keys of some layer cannot be had that way.
        """
        if not hasattr(decoder, "rotary_emb") or not hasattr(sys.modules[type(decoder).__module__], _APPLY):
            return None
        generator = torch.Generator().manual_seed(0)
        token = torch.randn(1, 2, decoder.config.hidden_size, generator=generator).to(like.device, like.dtype)
        positions = torch.tensor([[3, 17]], device=like.device)
        readers = [ImageReader(), ImageReader()]
        with _all_in_evaluation(decoder):
            for reader, position_ids in zip(readers, (torch.zeros_like(positions), positions)):
                decode(token, position_ids, reader)
        num_layers = decoder.config.num_hidden_layers
        if sorted(readers[0].keys) != list(range(num_layers)) or readers[0].num_calls != num_layers:
            return None  # some layer attends by other means, or more than once
        kinds = sorted(set(getattr(decoder.config, "layer_types", None) or ())) if _knows_kinds(decoder) else [None]
        rotation = cls(decoder, [])
        origin = rotation.tables(torch.zeros_like(positions), token)
        rotation.factors = {kind: float(cos.max()) for kind, (cos, _) in origin.items()}
        for layer in range(len(readers[0].keys)):
            still, turned = readers[0].keys[layer], readers[1].keys[layer]
            rotation.layers.append(None)
            for candidate in [
                *((kind, apply) for kind in kinds for apply in (rotate_keys, rotate_part_of_keys)),
                None,
            ]:
                rotation.layers[layer] = candidate
                if rotation._explains(layer, still, turned, positions):
                    break
            else:
                return None
        return rotation

    def _explains(self, layer: int, still: torch.Tensor, turned: torch.Tensor, positions: torch.Tensor) -> bool:
        tables = self.tables(positions, still)
        try:
            difference = self.apply(self.undo_scaling(still, layer), layer, tables) - turned
        except RuntimeError:  # shapes that do not fit
            return False
        tolerance = 1e-4 if still.dtype in (torch.float32, torch.float64) else 3e-2
        return float(difference.float().norm()) <= tolerance * float(turned.float().norm())

    def tables(self, position_ids: torch.Tensor, like: torch.Tensor) -> dict[str | None, tuple]:
        """The cosines and sines at positions (B, I), each (B, I, rotated size), for each kind of layer."""
        # Not by a call of the module, which ZeRO-3 counts: a rank whose batch has no image would fall out of step.
        rotary = self.decoder.rotary_emb.forward
        if not _knows_kinds(self.decoder):
            return {None: rotary(like, position_ids)}
        kinds = sorted(set(self.decoder.config.layer_types))
        return {kind: rotary(like, position_ids, kind) for kind in kinds}

    def apply(self, keys: torch.Tensor, layer: int, tables: dict[str | None, tuple]) -> torch.Tensor:
        """Rotates the keys (B, K, I, D) of a layer."""
        found = self.layers[layer]
        if found is None:
            return keys
        kind, rotate = found
        cos, sin = (table.to(keys.device) for table in tables[kind])
        return rotate(getattr(sys.modules[type(self.decoder).__module__], _APPLY), keys, cos, sin)

    def undo_scaling(self, keys: torch.Tensor, layer: int) -> torch.Tensor:
        """Keys from position 0 without the factor that some rotary embeddings (YaRN) put on their tables."""
        found = self.layers[layer]
        if found is None:
            return keys
        factor = self.factors[found[0]]
        return keys if factor == 1.0 else keys / factor


_APPLY = "apply_rotary_pos_emb"


@contextlib.contextmanager
def _all_in_evaluation(module: nn.Module):
    """No dropout anywhere in a module, and every part afterwards as it was."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _knows_kinds(decoder: Any) -> bool:
    return "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters


def rotate_keys(apply: Callable, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return apply(keys[:, :0], keys, cos, sin)[1]


def rotate_part_of_keys(apply: Callable, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The leading part of each head alone, where the decoder cuts it off outside of its function."""
    size = cos.shape[-1]
    return torch.cat([rotate_keys(apply, keys[..., :size], cos, sin), keys[..., size:]], dim=-1)


@dataclass(frozen=True, eq=False)
class PlacedImages:
    """
    The keys and values of images where they stand in the conversations of a batch; a plan's `images`.

    Args:
        images (`ImageStates`): Images that the decoder has read.
        shape (`tuple`): B and I.
        index (`torch.Tensor` of shape `(B, I)`, *optional*): For each image place the token it holds, see
            [`ImageStates.token_index`], any at padding; without, one after the other.
        rotation (`KeyRotation`, *optional*): Of the decoder, for keys that are not rotated.
        tables (`dict`, *optional*): Its tables at the positions of the places.
    """

    images: ImageStates
    shape: tuple[int, int]
    index: torch.Tensor | None = None
    rotation: KeyRotation | None = None
    tables: dict[str | None, tuple] = field(default_factory=dict, repr=False)

    def __call__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, rotated, and values of a layer, each (B, K, I, D)."""
        keys, values = (self._place(states[layer]) for states in (self.images.keys, self.images.values))
        return keys if self.rotation is None else self.rotation.apply(keys, layer, self.tables), values

    def _place(self, states: torch.Tensor) -> torch.Tensor:
        tokens = states.transpose(1, 2).flatten(0, 1)
        if self.index is None:
            return tokens.unflatten(0, self.shape).transpose(1, 2)
        return tokens[self.index.to(states.device)].transpose(1, 2)


def place_images(
    images: ImageStates, kinds: torch.Tensor, is_image: torch.Tensor, position_ids: torch.Tensor, rotation: KeyRotation
) -> PlacedImages:
    """
    Args:
        images (`ImageStates`): Images that the decoder has read, in the order of the batch.
        kinds (`torch.Tensor` of shape `(B, Q)`): Kinds of the current positions, see [`MMCAPlan`].
        is_image (`torch.Tensor` of shape `(B, Q)`): Where image tokens are, padding included; on the CPU.
        position_ids (`torch.Tensor` of shape `(B, Q)`): Positions.
        rotation (`KeyRotation`): Of the decoder.
    """
    numbers = (is_image.flatten().cumsum(0) - 1).view(is_image.shape).clamp(min=0)
    columns = [(row == IMAGE).nonzero()[:, 0] for row in kinds]
    order = nn.utils.rnn.pad_sequence(columns, batch_first=True)
    order_of_tokens = images.token_index()[take(numbers, order)]
    num_tokens, shape = images.features.shape[:2].numel(), (order.shape[0], order.shape[1])
    is_plain = num_tokens == order.numel() and bool((order_of_tokens.flatten() == torch.arange(num_tokens)).all())
    index = None if is_plain else order_of_tokens.to(images.features.device)
    if images.is_rotated:
        return PlacedImages(images, shape, index)
    tables = rotation.tables(take(position_ids, order.to(position_ids.device)), images.features)
    return PlacedImages(images, shape, index, rotation, tables)
