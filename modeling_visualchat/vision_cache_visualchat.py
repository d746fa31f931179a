"""
The cache of vision features: a frozen vision tower runs once an image, and later epochs of training skip it.

The projector is trained, so what is cached is the tower's output before it. The key of an entry is made of the
preprocessed pixels (the image and its preprocessing), the tower's weights and configuration, and the layers read.
"""

import warnings
from typing import Any

import torch

from .tensor_store_visualchat import TensorStore
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
    hooks), it runs as without a cache, with a warning.

    Args:
        max_bytes (`int`, *optional*, defaults to 4 GiB): Maximum bytes in memory.
        device (`str` or `torch.device`, *optional*): Device of the entries, as in `"cpu"`; by default
            that of the tower.
        folder (`str` or `Path`, *optional*): Also stores features on disk, as safetensors; processes may share it.
        max_disk_bytes (`int`, *optional*, defaults to 64 GiB): Maximum bytes of the folder. An image takes length x
            width x bytes of a number: 0.5 MiB for 256 tokens of 1024 numbers in bfloat16.

    Attributes:
        hits, misses (`int`): Images found, and images computed.
        nbytes (`int`): Bytes in memory.

    Raises:
        `ValueError`: a limit below 0, or a folder that is a file.
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
        Vision features, from the cache or, for images not in it, computed together.

        Args:
            model (`VisualChatModel`): The model.
            pixel_values (`torch.Tensor` of shape `(N, channels, height, width)`): Preprocessed pixels, all unique.
            layers (`list[int]`): The layers of the tower that are read.
            strategy (`str`): `"full"`, or `"default"` without the first token.

        Returns:
            `torch.Tensor` of shape `(N, length, layers x vision hidden)`.
        """
        tower, device = model.vision_tower, next(model.vision_tower.parameters()).device
        tower_key = weights_key(tower, f"{FORMAT} {layers} {strategy}".encode())
        keys = [f"{tower_key}-{image_key(image)}" for image in pixel_values]
        found = {key: entry["features"] for key in keys if (entry := self._get(key, device)) is not None}
        missing = [number for number, key in enumerate(keys) if key not in found]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if missing:
            computed = model.run_vision_tower(
                pixel_values[torch.tensor(missing, device=pixel_values.device)], layers, strategy
            )
            for number, features in zip(missing, computed[1]):
                found[keys[number]] = features
                self._put(keys[number], {"features": features.clone()})
        return torch.stack([found[key].to(device) for key in keys])
