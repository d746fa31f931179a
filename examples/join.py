"""
Joins a vision encoder and a language model into a VisualChat checkpoint, ready for `finetune.py`.

    python examples/join.py --vision facebook/dinov2-small --text HuggingFaceTB/SmolLM2-135M-Instruct --output joined

Both are names on the Hub or folders; the language model can also be a `.gguf` file. The new projector is untrained.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from checkpoints import add_attention_options, attention_options, write
from PIL import Image

from modeling_visualchat import PROJECTORS, VisualChatForConditionalGeneration
from processing_visualchat import VisualChatProcessor


@torch.no_grad()
def check(model: VisualChatForConditionalGeneration, processor: VisualChatProcessor) -> None:
    """Passes one blank image through both before anything is written: their image lengths have to match."""
    messages = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (64, 64))}]}]
    model(**processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt"))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--vision", required=True, help="name or folder of a vision encoder")
    parser.add_argument("--text", required=True, help="name or folder of a language model, or a .gguf file")
    parser.add_argument("--output", required=True, type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--projector_type", default="linear", choices=list(PROJECTORS), help="type of the projector")
    add_attention_options(parser)
    parser.add_argument("--vision_feature_layer", type=int, default=-1, help="hidden state of the encoder to use")
    parser.add_argument("--image_seq_length", type=int, help="tokens per image, by default what the encoder outputs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the new projector's weights")
    arguments = parser.parse_args()
    if arguments.output.exists() and any(arguments.output.iterdir()):
        parser.error(f"the output folder {arguments.output} exists and is not empty; choose another --output")

    torch.manual_seed(arguments.seed)
    model = VisualChatForConditionalGeneration.from_vision_text_pretrained(
        arguments.vision,
        arguments.text,
        projector_type=arguments.projector_type,
        **attention_options(arguments),
        vision_feature_layer=arguments.vision_feature_layer,
        **({} if arguments.image_seq_length is None else {"image_seq_length": arguments.image_seq_length}),
    )
    processor = VisualChatProcessor.from_vision_text_pretrained(
        arguments.vision, arguments.text, image_seq_length=model.config.image_seq_length
    )
    check(model, processor)
    write(model, processor, arguments.output)


if __name__ == "__main__":
    main()
