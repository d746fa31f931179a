"""
What a frozen vision tower makes of images, computed once: later epochs of training skip the tower.

The projector learns, so what is kept is the tower's output before it. An entry is found by the preprocessed pixels
(that is, by image and preprocessing), the tower's weights and configuration, and the layers that are read.
"""

import json
import warnings
from typing import Any

import torch

from .image_memory_visualchat import (
    describe_switches,
    fingerprint_image,
    fingerprint_weights,
    is_elsewhere,
    watched_modules,
)
from .image_states_visualchat import has_dropout
from .tensor_store_visualchat import TensorStore


FORMAT = b"visualchat vision features 1"  # to be counted up when what is kept, or its form, changes


class VisionFeatureCache(TensorStore):
    """
    A bounded store of vision features.

    ```python
    >>> model.set_trainable("multi_modal_projector", "input_embeddings")  # the vision tower is frozen
    >>> model.model.vision_cache = VisionFeatureCache(folder="vision_features")
    ```

    The tower has to be frozen. Where what it computes cannot be told by its weights (they are sharded by ZeRO-3, or
    somebody has hooked it) it runs as without a cache, with a warning. The weights are summed up again when one of
    them is another tensor or was written to; a write through `.data` alone is not seen.

    Args:
        max_bytes (`int`, *optional*, defaults to 4 GiB): The most that it holds in memory.
        device (`str` or `torch.device`, *optional*): Where to hold it, as in `"cpu"`; by default where the tower is.
        folder (`str` or `Path`, *optional*): Keeps features on disk too, as safetensors; processes may share it.
        max_disk_bytes (`int`, *optional*, defaults to 64 GiB): The most that the folder holds. An image takes length x
            width x bytes of a number: 0.5 MiB for 256 tokens of 1024 numbers in bfloat16.

    Attributes:
        hits, misses (`int`): Images that were found, and that had to be computed.
        nbytes (`int`): What it holds in memory.

    Raises:
        `ValueError`: a limit below 0, or a folder that is a file.
    """

    _has_warned = False
    _tower_key: tuple[Any, str] | None = None

    def serves(self, tower: Any) -> bool:
        """
        Whether the output of a tower can be kept.

        Raises:
            `ValueError`: a tower that learns in this call, or whose dropout is on.
        """
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters()):
            raise ValueError("The vision tower learns, so its features cannot be kept: freeze it, or use no cache.")
        if has_dropout(tower):
            raise ValueError("The vision tower's dropout is on, so its features differ each time: use no cache.")
        reason = None
        if any(map(is_elsewhere, tower.parameters())):
            reason = "its weights are sharded or offloaded"
        elif watched := watched_modules(tower):
            reason = f"{watched[0]} has hooks or a forward of its own"
        if reason is not None and not self._has_warned:
            warnings.warn(f"The features of the vision tower are not kept: {reason}.", stacklevel=2)
            self._has_warned = True
        return reason is None

    @torch.no_grad()
    def read(self, model: Any, pixel_values: torch.Tensor, layers: list[int], strategy: str) -> torch.Tensor:
        """
        Vision features, kept or computed together.

        Args:
            model (`VisualChatModel`): The model.
            pixel_values (`torch.Tensor` of shape `(N, channels, height, width)`): Preprocessed pixels, all different.
            layers (`list[int]`): The layers of the tower that are read.
            strategy (`str`): Which of their tokens.

        Returns:
            `torch.Tensor` of shape `(N, length, layers x vision hidden)`.
        """
        tower, device = model.vision_tower, next(model.vision_tower.parameters()).device
        tower_key = self._fingerprint_tower(tower, layers, strategy)
        keys = [f"{tower_key}-{fingerprint_image(image)}" for image in pixel_values]
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

    def _fingerprint_tower(self, tower: Any, layers: list[int], strategy: str) -> str:
        config = tower.config
        described = [config.to_dict(), getattr(config, "_attn_implementation", None), layers, strategy]
        text = json.dumps(described, sort_keys=True, default=str)
        weights = [*tower.parameters(), *tower.buffers()]
        versions = [
            (id(weight), weight.data_ptr(), weight._version, weight.dtype, weight.device) for weight in weights
        ]
        state = (text, describe_switches(tower), versions)
        if self._tower_key is None or self._tower_key[0] != state:
            self._tower_key = (state, fingerprint_weights(tower, FORMAT + text.encode()))
        return self._tower_key[1]
