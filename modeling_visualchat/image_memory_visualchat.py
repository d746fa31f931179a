"""
The image memory: the states of images, computed once and reused in any conversation.

With MMCA an image depends only on itself and the weights, so its projected features, its keys and values at every
layer, and its output can be reused exactly: at another position, beside other images, in another process.
[`ImageMemory`] keeps them under a key of everything that they depend on, with least-recently-used eviction.
"""

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from .image_states_visualchat import ImageStates, same_images
from .quantized_states_visualchat import BITS, QuantizedStates, quantization_primitives
from .tensor_store_visualchat import Entry, TensorStore
from .weights_key_visualchat import has_dropout, hooked_modules, image_key, weights_key


PARTS = ("data", "scale", "zero")  # of quantized states
FORMAT = b"visualchat image states 3"  # to be increased when what is kept, or its form, changes


class ImageMemory(TensorStore):
    """
    A bounded store of image states.

    ```python
    >>> memory = ImageMemory(max_bytes=2 * 2**30, folder="image_memory")
    >>> model.generate(**inputs, image_memory=memory)
    ```

    It may be used with several models; each sees only its own entries, and none after its weights, adapters or dtype
    have changed. Every call takes a checksum of the weights, about the cost of one generated token; once only after
    `model.freeze()`.

    Args:
        bits (`int`, *optional*): Keeps keys and values in 8 or 4 bits by torchao, with a small error, see
            [`QuantizedStates`]; by default as they are computed.
        options: Arguments, as well as attributes and errors, are those of [`TensorStore`].

    Raises:
        `ValueError`: another number of bits.
        `ImportError`: torchao, which 8 and 4 bits require, is not installed.
    """

    def __init__(self, *options, bits: int | None = None, **named_options):
        super().__init__(*options, **named_options)
        if bits not in (None, *BITS):
            raise ValueError(f"bits={bits!r}: keys and values are kept in 8 or 4 bits, or by default as they are.")
        if bits is not None:
            quantization_primitives()  # raises its error before the first image
        self.bits = bits

    @torch.no_grad()
    def get_states(self, model: Any, pixel_values: torch.Tensor) -> ImageStates:
        """
        The states of images, from the memory or, for those not in it, computed together.

        Args:
            model (`VisualChatModel`): The model.
            pixel_values (`torch.Tensor` of shape `(N, channels, height, width)`): Preprocessed pixels.

        Raises:
            `ValueError`: no image, or a model whose dropout is on, whose weights are offloaded or sharded, or that
                cannot compute images apart from a conversation.
        """
        model = getattr(model, "model", model)
        if len(pixel_values) == 0:
            raise ValueError("There are no images; pixel_values is empty.")
        if has_dropout(model):
            raise ValueError(
                "With dropout an image is never the same twice: call model.eval() to use an image memory."
            )
        if hooked := hooked_modules(model):
            warnings.warn(
                f"The image memory is not used: {hooked[0]} has hooks or a forward of its own, which may change what "
                "it computes.",
                stacklevel=3,
            )
            return model.compute_image_states(pixel_values)
        model_key = weights_key(model, FORMAT + str(self.bits or "").encode())
        index = same_images(pixel_values)
        unique = pixel_values[[index.index(number) for number in range(max(index) + 1)]]
        keys = [f"{model_key}-{image_key(image)}" for image in unique]

        def compute(missing: list[int]) -> list[Entry]:
            states = model.compute_image_states(unique[missing])
            return [_to_entry(states, number, self.bits) for number in states.index]

        entries = self.get_entries(keys, model.get_input_embeddings().weight.device, compute)
        features, outputs = (
            torch.stack([entry[name] for entry in entries]) if name in entries[0] else None
            for name in ("features", "outputs")
        )
        # By reference: every conversation reads the tensors of the memory itself.
        image_keys, values = ([*zip(*(_layers(entry, name) for entry in entries))] for name in ("keys", "values"))
        assert features is not None
        return ImageStates(features, index, image_keys, values, outputs, pixel_values=unique)


def _to_entry(states: ImageStates, number: int, bits: int | None) -> Entry:
    """One of the unique images, in tensors of its own."""
    entry = {"features": states.features[number].clone()}
    if states.outputs is not None:
        entry["outputs"] = states.outputs[number].clone()
    for name, layers in (("keys", states.keys), ("values", states.values)):
        for layer, images in enumerate(layers):
            if bits is None:
                entry[f"{name}.{layer}"] = images[number].clone(memory_format=torch.contiguous_format)
            else:
                quantized = QuantizedStates.quantize(images[number], bits)
                entry |= {f"{name}.{layer}.{part}": getattr(quantized, part) for part in PARTS}
                entry[f"{name}.{layer}.bits"] = torch.tensor(bits)
    return entry


def _layers(entry: Entry, name: str) -> Iterator[Any]:
    """The keys or values of an entry, layer by layer."""
    for layer in itertools.count():
        prefix = f"{name}.{layer}"
        if f"{prefix}.bits" in entry:
            data, scale, zero = (entry[f"{prefix}.{part}"] for part in PARTS)
            yield QuantizedStates(data, scale, zero, int(entry[f"{prefix}.bits"]))
        elif prefix in entry:
            yield entry[prefix]
        else:
            return
