"""The digits model and its processor, both created from scratch."""

from study.scans import WORDS, load_scans
from study.tiny_model import build_model

from modeling_visualchat import VisualChatForConditionalGeneration
from processing_visualchat import VisualChatProcessor

from .conversations import DigitConversations


def build_digits_model(**config_kwargs) -> tuple[VisualChatForConditionalGeneration, VisualChatProcessor]:
    """A vision tower of two layers and a Llama of three, with a tokenizer of the conversations."""
    scans, _ = load_scans()
    conversations = DigitConversations(scans, 500)
    texts = [
        f"### Image {number}: \n### Question: {block['text']}\n### Answer: {answer['content']}"
        for index in range(len(conversations))
        for messages in [conversations[index]["messages"]]
        for number, (user, answer) in enumerate(zip(messages[::2], messages[1::2]), start=1)
        for block in user["content"][-1:]
    ]
    texts += [" ".join(WORDS), "You are a powerful vision-language assistant."]
    return build_model(texts, 3, **{"cross_layer_interval": 1, **config_kwargs})
