"""
Images in conversations, by reference: where the tokens of an image stand, and how text reads them there.

The keys and values of an image are those of the beginning of a conversation ([`ImageStates`]), whoever looks at it and
wherever it stands. A rotary score depends on the distance of query and key only, so text at position p reads an image
that begins at position s in one of two ways:

    (R[p] q) . (R[s] k)     the keys are turned forward to s, in a copy: for many text tokens, one layer at a time
    (R[-s] R[p] q) . k      the query is turned back by s, and nothing is copied: for few, as in decoding

In the second form, the queries of all conversations that read an image are one matrix, so 64 conversations about the
same images read one copy of their keys and values. Turns are computed in float32; in bfloat16, scores are rounded as
in transformers' eager attention.

Dimensions: B rows, I image slots of a row, U unique images of L tokens, P reads of an image by a row, H query heads, K
key/value heads (G queries for each), D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from .image_states_visualchat import ImageStates
from .key_rotation_visualchat import KeyRotation
from .plan_visualchat import IMAGE, Run, TwoStreamPlan
from .quantized_states_visualchat import QuantizedStates


MAX_BY_REFERENCE = 64  # text tokens of a batch


class Place(NamedTuple):
    """Consecutive image slots of a row, which consecutive tokens of an image fill."""

    image: int  # among the unique images
    first: int  # token of the image
    length: int
    shift: int  # by how many positions they stand after those of the image by itself


@dataclass(eq=False)
class PlacedImages:
    """The images of a batch of conversations, each unique one once."""

    keys: Sequence[Sequence[torch.Tensor]]  # of each layer and image (K, L, D); a tensor (U, K, L, D) if made together
    values: Sequence[Sequence[torch.Tensor]]
    rows: list[list[Place]]
    rotation: KeyRotation | None = None  # of the keys, if they are rotated at all
    _by_row: dict[int, "PlacedImages"] = field(default_factory=dict, init=False, repr=False)
    _tables: dict | None = field(default=None, init=False, repr=False)  # of the rotation, for all layers
    _reads: dict[tuple, "ImageReads | None"] = field(default_factory=dict, init=False, repr=False)

    @property
    def lengths(self) -> list[int]:
        """The number of image slots of each row."""
        return [sum(place.length for place in row) for row in self.rows]

    def extend(self, other: "PlacedImages") -> "PlacedImages":
        """These images, and others behind them in each row; an image in both is the same one."""
        mine, new = list(self.keys[0]), list(other.keys[0])  # of a tensor, what is listed exists only here
        known = {_identity(keys): number for number, keys in enumerate(mine)}
        numbers: list[int] = []
        added: list[int] = []
        for number, keys in enumerate(new):
            if _identity(keys) not in known:
                known[_identity(keys)] = len(mine) + len(added)
                added.append(number)
            numbers.append(known[_identity(keys)])

        def joined(layers, others):
            return [[*images, *(more[number] for number in added)] for images, more in zip(layers, others)]

        rows = [
            [*row, *(place._replace(image=numbers[place.image]) for place in more)]
            for row, more in zip(self.rows, other.rows)
        ]
        keys, values = joined(self.keys, other.keys), joined(self.values, other.values)
        return PlacedImages(keys, values, rows, self.rotation or other.rotation)

    def cut(self, lengths: list[int]) -> "PlacedImages | None":
        """The first slots of each row, and only the images that are left; `None` if there are none."""
        if lengths == self.lengths:
            return self
        rows = []
        for row, remaining in zip(self.rows, lengths):
            places = []
            for place in row:
                if remaining > 0:
                    places.append(place._replace(length=min(place.length, remaining)))
                remaining -= place.length
            rows.append(places)
        return self.select(range(len(rows)), rows)

    def select(self, indices: Sequence[int], rows: list[list[Place]] | None = None) -> "PlacedImages | None":
        """Some of the rows, and only the images that are left; `None` if there are none."""
        rows = [(self.rows if rows is None else rows)[index] for index in indices]
        used = sorted({place.image for row in rows for place in row})
        if not used:
            return None
        numbers = {image: number for number, image in enumerate(used)}
        rows = [[place._replace(image=numbers[place.image]) for place in row] for row in rows]
        if len(used) == len(self.keys[0]):
            return PlacedImages(self.keys, self.values, rows, self.rotation)
        keys, values = ([[layer[image] for image in used] for layer in layers] for layers in (self.keys, self.values))
        return PlacedImages(keys, values, rows, self.rotation)

    def contiguous(self) -> "PlacedImages":
        """These images in memory as they are read; those of an image memory are so already."""
        keys, values = (
            [images.contiguous() if isinstance(images, torch.Tensor) else images for images in layers]
            for layers in (self.keys, self.values)
        )
        return PlacedImages(keys, values, self.rows, self.rotation)

    def with_rows(self, before: int, after: int) -> "PlacedImages":
        """These images with rows before and after that show none."""
        rows = [*([] for _ in range(before)), *self.rows, *([] for _ in range(after))]
        return PlacedImages(self.keys, self.values, rows, self.rotation)

    def of_layer(self, layer: int, like: torch.Tensor) -> "LayerImages":
        """What the text of a layer reads, on the device and in the dtype of its queries."""
        return LayerImages(self, layer, like)

    @cached_property
    def shifts(self) -> torch.Tensor | None:
        """By how many positions each slot (B, I) is turned; `None` for no turn."""
        if self.rotation is None or not any(place.shift for row in self.rows for place in row):
            return None
        return self._by_slot(lambda place: torch.full((place.length,), place.shift))

    @cached_property
    def tokens(self) -> torch.Tensor | None:
        """Of each slot (B, I) its row among the tokens of images made together; `None` for all of them in order."""
        num_images, length = len(self.keys[0]), self.keys[0][0].shape[1]
        tokens = self._by_slot(lambda place: torch.arange(place.length) + place.image * length + place.first)
        return None if torch.equal(tokens.flatten(), torch.arange(num_images * length)) else tokens

    def _by_slot(self, of_place: Callable[[Place], torch.Tensor]) -> torch.Tensor:
        """The numbers of each place's slots, side by side in their rows (B, I)."""
        empty = torch.zeros(0, dtype=torch.long)
        rows = [torch.cat([empty, *map(of_place, row)]) for row in self.rows]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def reads(self, runs: list[list[Run]], num_text: int, like: torch.Tensor) -> "ImageReads | None":
        """
        How the text slots (B, T) of some runs read their images by reference; `None` where copies serve better: for
        many slots, in training, or if an image is cut.
        """
        if len(runs) * num_text > MAX_BY_REFERENCE or torch.is_grad_enabled():
            return None
        bounds = [[(0, 0)] * num_text for _ in runs]
        for row, row_runs in enumerate(runs):
            for run in row_runs:
                bounds[row][run.start : run.end] = [(run.first_key, run.end_key)] * (run.end - run.start)
        key = tuple(slot for row in bounds for slot in row)
        if key not in self._reads:
            if len(self._reads) > 1:  # those of two halves of the heads
                self._reads.clear()
            self._reads[key] = ImageReads.make(self, key, num_text, like)  # the next token has the same
        return self._reads[key]


def _identity(keys: Any) -> int:
    """Tells whether keys are those of the same image, as an image memory returns them."""
    return id(keys.data) if isinstance(keys, QuantizedStates) else id(keys)


@dataclass(frozen=True, eq=False)
class LayerImages:
    """The images of a batch, as one decoder layer reads them."""

    placed: PlacedImages
    layer: int
    like: torch.Tensor  # the queries
    heads: slice = field(default_factory=lambda: slice(None))  # of keys and values that are read

    def keys_of(self, image: int) -> torch.Tensor:
        """Keys (K, L, D) of an image, as at the beginning of a conversation."""
        return self.placed.keys[self.layer][image].to(self.like.device, self.like.dtype)[self.heads]

    def values_of(self, image: int) -> torch.Tensor:
        """Values (K, L, D) of an image."""
        return self.placed.values[self.layer][image].to(self.like.device, self.like.dtype)[self.heads]

    def keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, turned to where the images stand, and values, each (B, K, I, D)."""
        keys, values = (
            self._place(layers[self.layer])[:, self.heads] for layers in (self.placed.keys, self.placed.values)
        )
        shifts = self.placed.shifts
        if shifts is None or self.placed.rotation is None:
            return keys, values
        if self.placed._tables is None:
            self.placed._tables = self.placed.rotation.turn_tables(shifts.to(keys.device), keys)
        return self.placed.rotation.rotate(keys, self.layer, self.placed._tables), values

    def _place(self, images: Sequence[Any]) -> torch.Tensor:
        device, dtype, rows = self.like.device, self.like.dtype, self.placed.rows
        if isinstance(images, torch.Tensor):
            tokens = images.transpose(1, 2).flatten(0, 1).to(device, dtype)
            if self.placed.tokens is None:
                return tokens.unflatten(0, (len(rows), -1)).transpose(1, 2)
            return tokens[self.placed.tokens.to(device)].transpose(1, 2)
        states = [image.to(device, dtype) for image in images]
        lengths = self.placed.lengths
        blocks, length = list[torch.Tensor](), max(lengths)
        for row in rows:
            parts = [states[place.image][:, place.first : place.first + place.length] for place in row]
            parts.append(states[0].new_zeros(states[0].shape[0], length - lengths[len(blocks)], states[0].shape[2]))
            blocks.append(torch.cat(parts, dim=1))
        return torch.stack(blocks) if len(blocks) > 1 else blocks[0][None]

    def row(self, row: int) -> "LayerImages":
        """The images of one row."""
        by_row = self.placed._by_row
        if row not in by_row:
            by_row[row] = self.placed.select([row]) or PlacedImages(self.placed.keys, self.placed.values, [[]])
        return replace(self, placed=by_row[row], like=self.like[row : row + 1])

    def reads(self, runs: list[list[Run]], num_text: int) -> "ImageReads | None":
        """See [`PlacedImages.reads`]."""
        return self.placed.reads(runs, num_text, self.like)


@dataclass(frozen=True, eq=False)
class ImageReads:
    """
    The images that text slots read, by reference: R slots (B x T), of which each reads whole images, M at most. P is
    the number of these reads.
    """

    images: list[int]  # that are read
    counts: list[int]  # by how many slots each
    slots: torch.Tensor  # (P,): the slot of each read; reads are in the order of `images`
    by_slot: torch.Tensor | None  # (R, M): the reads of each slot; `None` if reads are in this order anyway
    by_read: torch.Tensor | None  # (P,): of each read its place in the flattened (R, M)
    missing: torch.Tensor | None  # (R, M): `True` where a slot reads fewer images
    is_empty: torch.Tensor | None  # (R,): `True` for a slot that reads none
    tables: dict[str | None, tuple] | None  # that turn the query of each read back, (1, P, rotated size)
    shape: tuple[int, int]  # R and M

    @classmethod
    def make(
        cls, placed: PlacedImages, bounds: Sequence[tuple[int, int]], num_text: int, like: torch.Tensor
    ) -> "ImageReads | None":
        """The reads of the image slots within the bounds of each text slot; `None` if an image is not read whole."""
        reads: list[tuple[int, int, int, int]] = []  # image, slot, number in the slot, shift
        for slot, (first, end) in enumerate(bounds):
            number = start = 0
            for place in placed.rows[slot // num_text]:
                if first <= start < end:
                    length = placed.keys[0][place.image].shape[1]
                    if place.first or place.length != length or start + length > end:
                        return None
                    reads.append((place.image, slot, number, place.shift))
                    number += 1
                start += place.length
        if len({placed.keys[0][image].shape[1] for image, *_ in reads}) != 1:
            return None
        reads.sort()
        images, slots, numbers, shifts = map(list, zip(*reads))
        shape = (len(bounds), max(numbers) + 1)
        by_slot = torch.full(shape, -1)
        by_slot[slots, numbers] = torch.arange(len(reads))
        is_plain = bool((by_slot.flatten() == torch.arange(shape[0] * shape[1])).all())
        unique, counts = torch.tensor(images).unique(return_counts=True)
        tables = None
        if placed.rotation is not None and any(shifts):
            tables = placed.rotation.turn_tables(torch.tensor([shifts], device=like.device), like, backwards=True)
        missing, places = by_slot < 0, torch.tensor(slots) * shape[1] + torch.tensor(numbers)
        return cls(
            images=unique.tolist(),
            counts=counts.tolist(),
            slots=torch.tensor(slots, device=like.device),
            by_slot=None if is_plain else by_slot.clamp(min=0).to(like.device),
            by_read=None if is_plain else places.to(like.device),
            missing=missing.to(like.device) if bool(missing.any()) else None,
            is_empty=missing.all(dim=1).to(like.device) if bool(missing.all(dim=1).any()) else None,
            tables=tables,
            shape=shape,
        )

    def scores(self, query: torch.Tensor, images: LayerImages, scaling: float | None) -> torch.Tensor:
        """Queries (B, H, T, D) to scores (K, G, R, M x L)."""
        turned = query.transpose(0, 1).flatten(1, 2)[None, :, self.slots.to(query.device)]  # (1, H, P, D)
        if self.tables is not None:
            rotation: Any = images.placed.rotation
            turned = rotation.rotate(turned, images.layer, self.tables)
        turned = turned[0] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        parts = []
        for image, part in zip(self.images, turned.split(self.counts, dim=1)):
            key = images.keys_of(image)
            part = part.unflatten(0, (len(key), -1))
            parts.append((part.flatten(1, 2) @ key.mT).unflatten(1, part.shape[1:3]))
        scores = torch.cat(parts, dim=2)  # (K, G, P, L)
        if self.by_slot is None:
            scores = scores.unflatten(2, self.shape)
        else:
            scores = scores[:, :, self.by_slot.to(query.device)]
        if self.missing is not None:
            scores = scores.masked_fill(self.missing.to(query.device)[:, :, None], float("-inf"))
        return scores.flatten(3)

    def weigh(self, weights: torch.Tensor, images: LayerImages) -> torch.Tensor:
        """Weights (K, G, R, M x L) of the values to their sum (B, T, H, D)."""
        parts = weights.unflatten(3, (self.shape[1], -1)).flatten(2, 3)
        parts = parts if self.by_read is None else parts[:, :, self.by_read.to(parts.device)]  # (K, G, P, L)
        sums = []
        for image, part in zip(self.images, parts.split(self.counts, dim=2)):
            value = images.values_of(image)
            sums.append((part.flatten(1, 2) @ value).unflatten(1, part.shape[1:3]))
        summed = torch.cat(sums, dim=2)  # (K, G, P, D)
        output = summed.new_zeros(*summed.shape[:2], self.shape[0], summed.shape[3])
        output = output.index_add(2, self.slots.to(output.device), summed)
        return output.flatten(0, 1).transpose(0, 1).contiguous().unflatten(0, (len(images.placed.rows), -1))

    def attend(
        self, query: torch.Tensor, images: LayerImages, scaling: float | None, dropout: float = 0.0
    ) -> torch.Tensor:
        """A softmax of its own over the images: (B, H, T, D) to (B, T, H, D), zero for a slot that reads none."""
        weights = self.scores(query, images, scaling).softmax(dim=-1, dtype=torch.float32)
        if self.is_empty is not None:
            weights = weights.masked_fill(self.is_empty.to(weights.device)[:, None], 0.0)
        return self.weigh(nn.functional.dropout(weights, dropout, dropout > 0.0).to(query.dtype), images)


def place_images(
    states: ImageStates,
    plan: TwoStreamPlan,
    is_image: torch.Tensor,
    position_ids: torch.Tensor,
    rotation: KeyRotation | None = None,
) -> PlacedImages:
    """Images with keys and values, at the image tokens (B, Q), padding included, of a plan."""
    numbers = is_image.flatten().cumsum(0).view(is_image.shape) - 1
    length = states.features.shape[1]
    tokens, is_turned = states.token_index(), rotation is not None and not states.is_rotated
    rows = []
    for row, (token_types, positions) in enumerate(zip(plan.token_types, position_ids.cpu())):
        columns = (token_types == IMAGE).nonzero()[:, 0]
        images, first = tokens[numbers[row, columns]] // length, tokens[numbers[row, columns]] % length
        shifts = positions[columns] - first if is_turned else torch.zeros_like(first)
        runs = torch.stack([images, first - torch.arange(len(first)), shifts])
        (image, offset, shift), counts = runs.unique_consecutive(dim=1, return_counts=True)
        starts = counts.cumsum(0) - counts
        fields = (image, offset + starts, counts, shift)
        rows.append([Place(*place) for place in zip(*(each.tolist() for each in fields))])
    return PlacedImages(states.keys, states.values, rows, rotation if is_turned else None)


def in_place(keys: Any, values: Any) -> PlacedImages:
    """Keys, turned, and values (B, K, I, D) of a layer that fill all slots of each row."""
    return PlacedImages([keys], [values], [[Place(row, 0, keys.shape[2], 0)] for row in range(len(keys))])
