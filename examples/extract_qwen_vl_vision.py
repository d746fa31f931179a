"""
Takes the vision tower out of a Qwen-VL or Qwen-VL-Chat checkpoint, for `join.py --vision`.

    python examples/extract_qwen_vl_vision.py Qwen-VL-Chat qwen_vl_vision

The checkpoint is a folder with its config.json and its weights, as safetensors or `.bin` files; of shards, those with
the tower suffice. Its last parameter, `proj`, is left out, as in arXiv 2309.14327. Memory: the tower.
"""

import json
import re
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from checkpoint_files import open_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPImageProcessor

from configuration_visualchat import VisualChatQwenVisionConfig
from modeling_visualchat import VisualChatQwenVisionModel


PREFIX = "transformer.visual."
NAMES = {
    "hidden_size": "output_dim",
    "embed_dim": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
}


def read_config(checkpoint: Path) -> VisualChatQwenVisionConfig:
    """The tower's configuration, from the section `visual` of a checkpoint's config.json."""
    path = checkpoint / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; pass the folder of a Qwen-VL checkpoint.")
    visual = json.loads(path.read_text()).get("visual", {})
    if missing := sorted({*NAMES.values(), "mlp_ratio"} - visual.keys()):
        raise ValueError(
            f'{path} has no {", ".join(missing)} in a section "visual", so this is no Qwen-VL checkpoint of the first '
            "generation (Qwen-VL or Qwen-VL-Chat)."
        )
    sizes = {ours: visual[theirs] for ours, theirs in NAMES.items()}
    try:
        return VisualChatQwenVisionConfig(**sizes, intermediate_size=int(visual["width"] * visual["mlp_ratio"]))
    except StrictDataclassError as error:
        raise ValueError(f'The section "visual" of {path} describes no tower of Qwen-VL: {error}') from error


def find_shards(checkpoint: Path) -> list[Path]:
    """The files that hold the tower, by the index if there is one; safetensors before `.bin`."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = checkpoint / f"{stem}.{suffix}.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            names = {name for key, name in weight_map.items() if key.startswith(PREFIX)}
            if not names:
                raise ValueError(f"{index} lists no key below {PREFIX}; this is no Qwen-VL checkpoint.")
        else:
            names = {path.name for path in checkpoint.glob(f"{stem}*.{suffix}")}
            for first, total in re.findall(r"^(.+-)\d+-of-(\d+)\.", "\n".join(names), re.MULTILINE):
                names |= {f"{first}{number:0{len(total)}}-of-{total}.{suffix}" for number in range(1, int(total) + 1)}
        if missing := sorted(name for name in names if not (checkpoint / name).is_file()):
            raise ValueError(f"{checkpoint} lacks {', '.join(missing)}; download the missing shards.")
        if names:
            return [checkpoint / name for name in sorted(names)]
    raise ValueError(f"{checkpoint} holds no model*.safetensors and no pytorch_model*.bin.")


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tower's weights by their names in the tower, without `proj`."""
    readers = {key: read for shard in find_shards(checkpoint) for key, read in open_weights(shard).items()}
    names = {key.removeprefix(PREFIX): key for key in readers if key.startswith(PREFIX)}
    return {name: readers[key]() for name, key in names.items() if name != "proj"}


def check_weights(weights: dict[str, torch.Tensor], model: VisualChatQwenVisionModel) -> None:
    """Compares names and shapes with those of the tower."""
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    wrong = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    if wrong:
        listed = "; ".join(
            f"{PREFIX}{key}: expected {expected.get(key, 'no such key')}, found {found.get(key, 'no such key')}"
            for key in wrong[:5]
        )
        raise ValueError(f"{len(wrong)} keys do not fit the tower that config.json describes. {listed}.")


def extract(checkpoint: Path, output: Path) -> VisualChatQwenVisionModel:
    """
    Writes the tower of a checkpoint, with its code and image processor, to a new folder.

    Raises:
        `ValueError`: missing files, a checkpoint of another layout or size, a pickle with more than tensors, or a
            folder that exists.
    """
    if output.exists():
        raise ValueError(f"{output} exists; choose another folder, or remove it.")
    config = read_config(checkpoint)
    weights = read_weights(checkpoint)
    with torch.device("meta"):
        model = VisualChatQwenVisionModel(config)
    check_weights(weights, model)
    model.load_state_dict(weights, assign=True)
    # The whole image, squeezed, as Qwen-VL was trained; the original implementation of arXiv 2309.14327 crops it.
    size = {"height": config.image_size, "width": config.image_size}
    image_processor = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        written = Path(folder) / output.name
        model.save_pretrained(written)
        image_processor.save_pretrained(written)
        written.rename(output)
    return model


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a Qwen-VL or Qwen-VL-Chat checkpoint")
    parser.add_argument("output", type=Path, help="folder to write, which must not exist")
    arguments = parser.parse_args()
    try:
        model = extract(arguments.checkpoint, arguments.output)
    except ValueError as error:
        parser.error(str(error))
    print(f"{arguments.output}: {model.num_parameters():,} parameters in {model.dtype}")


if __name__ == "__main__":
    main()
