"""
The cache of vision features: a frozen vision tower runs once an image, and later epochs of training skip it.

The projector is trained, so what is cached is the tower's output before it. The key of an entry is made of the
preprocessed pixels (the image and its preprocessing), the tower's weights and configuration, and the layers read.
"""

import warnings
from typing import Any

import torch

from .tensor_store_visualchat import Entry, TensorStore
from .weights_key_visualchat import has_dropout, hooked_modules, image_key, is_elsewhere, weights_key


FORMAT = "visualchat vision features 2"  # to be increased when what is cached, or its form, changes


class VisionFeatureCache(TensorStore):
    """
    A bounded store of vision features.

    ```python
    >>> model.set_trainable("multi_modal_projector", "input_embeddings")  # the vision tower is frozen
    >>> model.model.vision_cache = VisionFeatureCache(folder="vision_features")
    ```

    The tower has to be frozen. Where its weights do not tell what it computes (they are sharded by ZeRO-3, or it has
    hooks), it runs as without a cache, with a warning. An image takes length x width x bytes of a number: 0.5 MiB for
    256 tokens of 1024 numbers in bfloat16. Arguments, attributes and errors are those of [`TensorStore`].
    """

    _has_warned = False

    def supports(self, tower: Any) -> bool:
        """
        Whether the output of a tower can be cached.

        Raises:
            `ValueError`: a tower that is trained in this call, or whose dropout is on.
        """
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters()):
            raise ValueError(
                "The vision tower is trained, so its features differ each time: freeze it, or use no cache."
            )
        if has_dropout(tower):
            raise ValueError("The vision tower's dropout is on, so its features differ each time: use no cache.")
        reason = None
        if any(map(is_elsewhere, tower.parameters())):
            reason = "its weights are sharded or offloaded"
        elif hooked := hooked_modules(tower):
            reason = f"{hooked[0]} has hooks or a forward of its own"
        if reason is not None and not self._has_warned:
            warnings.warn(f"The features of the vision tower are not cached: {reason}.", stacklevel=2)
            self._has_warned = True
        return reason is None

    @torch.no_grad()
    def get_features(self, model: Any, pixel_values: torch.Tensor, layers: list[int], strategy: str) -> torch.Tensor:
        """
        The features (N, length, layers x vision hidden) of images, from the cache or, for those not in it, computed
        together; see [`VisualChatModel.run_vision_tower`].
        """
        tower, device = model.vision_tower, next(model.vision_tower.parameters()).device
        tower_key = weights_key(tower, f"{FORMAT} {layers} {strategy}".encode())
        keys = [f"{tower_key}-{image_key(image)}" for image in pixel_values]

        def compute(missing: list[int]) -> list[Entry]:
            features = model.run_vision_tower(pixel_values[missing], layers, strategy)[1]
            return [{"features": image.clone()} for image in features]

        return torch.stack([entry["features"] for entry in self.get_entries(keys, device, compute)])
