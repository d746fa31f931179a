"""The VisualChat processor: conversations with images in, token ids, pixels and labels out."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL.Image import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.utils.chat_template_utils import render_jinja_template

from .answers_visualchat import PIECES_TEMPLATE, split_answers
from .chat_template_visualchat import chat_template as default_chat_template
from .conversation_visualchat import drop_nulls, text_to_blocks, validate_conversation
from .image_loading_visualchat import load_image


IGNORE_INDEX = -100
READS_BLOCKS = re.compile(r"""['"]image['"]""")  # in a chat template: messages are lists of blocks


class VisualChatProcessor(ProcessorMixin):
    """
    An image processor, a tokenizer and the chat template.

    Args:
        image_processor, tokenizer: Those of vision tower and language model; `<image>` is a token.
        image_seq_length (`int`): Tokens that one image takes, `config.image_seq_length` of the model.
        chat_template (`str`, *optional*): By default the format of arXiv 2309.14327.
        image_token (`str`, *optional*, defaults to `"<image>"`): The placeholder of an image.

    Raises:
        `ValueError`: the tokenizer does not know the placeholder, or has no end-of-sequence token.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length: int | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        **kwargs,
    ):
        if tokenizer is None or image_processor is None:
            raise ValueError("VisualChatProcessor needs an image_processor and a tokenizer.")
        if not isinstance(image_seq_length, int) or image_seq_length < 1:
            raise ValueError(
                "image_seq_length must be the number of tokens of an image (config.image_seq_length), "
                f"got {image_seq_length}."
            )
        if image_token not in tokenizer.get_vocab():
            raise ValueError(f"The tokenizer has no token {image_token}; from_vision_text_pretrained adds it.")
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has no end-of-sequence token, without which an answer never ends.")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template or default_chat_template(image_token), **kwargs
        )

    @classmethod
    def from_vision_text_pretrained(
        cls, vision: str, text: str, image_seq_length: int, image_token: str = "<image>", **kwargs
    ) -> "VisualChatProcessor":
        """
        Joins the image processor of a vision encoder and the tokenizer of a language model, which learns `<image>`.

        Args:
            vision (`str`): Name or folder of the encoder.
            text (`str`): Name or folder of the language model, or a `.gguf` file.
            image_seq_length (`int`): Tokens that one image takes, `config.image_seq_length` of the model.
            image_token (`str`, *optional*, defaults to `"<image>"`): The placeholder of an image.
        """
        path = Path(text)
        folder, source = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(text), {})
        tokenizer = AutoTokenizer.from_pretrained(folder, **source)
        tokenizer.add_special_tokens({"extra_special_tokens": [image_token]}, replace_extra_special_tokens=False)
        max_length = getattr(AutoConfig.from_pretrained(folder, **source), "max_position_embeddings", None)
        if max_length is not None:
            tokenizer.model_max_length = min(tokenizer.model_max_length, max_length)
        image_processor = AutoImageProcessor.from_pretrained(vision)
        return cls(image_processor, tokenizer, image_seq_length, image_token=image_token, **kwargs)

    @staticmethod
    def load_image(source) -> Image:
        """See [`load_image`]."""
        return load_image(source)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in `ProcessorMixin.save_pretrained`, without a trace of where the tokenizer was loaded from."""
        for key in ("is_local", "local_files_only"):
            self.tokenizer.init_kwargs.pop(key, None)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """
        Args:
            images: An image, a list, or a list for every text; anything [`load_image`] takes.
            text (`str` or `list[str]`): Text with one `<image>` for every image, as the chat template writes it.

        Returns:
            [`BatchFeature`] with `input_ids`, `attention_mask` and `mm_token_type_ids` of shape (B, S), and
            `pixel_values` of shape (images of the whole batch, channels, height, width) if there are images.

        Raises:
            `ValueError`: more or fewer `<image>` marks than images, or a text longer than the model reads.
        """
        if isinstance(images, (list, tuple)) and isinstance(text, (list, tuple)) and len(images) == len(text):
            for row, (sample, pictures) in enumerate(zip(text, images)):
                num_marks = sample.count(self.image_token)
                if isinstance(pictures, (list, tuple)) and num_marks != len(pictures):
                    raise ValueError(
                        f"Text {row} of the batch holds {num_marks} {self.image_token} marks, and {len(pictures)} "
                        "images were passed for it; write one mark for every image."
                    )
        kwargs.setdefault("return_mm_token_type_ids", True)
        inputs = super().__call__(images=images, text=text, **kwargs)
        masks = inputs.get("attention_mask", inputs.get("input_ids", ()))
        for row, mask in enumerate(masks):
            num_tokens = int(sum(mask)) if "attention_mask" in inputs else len(mask)
            if num_tokens > self.tokenizer.model_max_length:
                raise ValueError(
                    f"Text {row} of the batch has {num_tokens} tokens, {self.image_seq_length} for an image; the "
                    f"model reads {self.tokenizer.model_max_length}. Leave out rounds or images; a cut could go "
                    "through an image."
                )
        return inputs

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Opens every image before anything else happens, the same object once."""
        return super().prepare_inputs_layout(_load_images(images, {}), text, videos, audio, **kwargs)

    def _process_images(self, images, **kwargs):
        """Preprocesses an image that occurs several times, as the same object, once."""
        flat = make_flat_list_of_images(images)
        unique = {id(image): image for image in flat}
        if len(unique) == len(flat):
            return super()._process_images(images, **kwargs)
        inputs, replacements = super()._process_images([*unique.values()], **kwargs)
        numbers = dict(zip(unique, range(len(unique))))
        index = [numbers[id(image)] for image in flat]
        for name, values in inputs.items():
            inputs[name] = [values[number] for number in index] if isinstance(values, list) else values[index]
        return inputs, [replacements[number] for number in index]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """One `<image>` in the text becomes as many as the image takes tokens."""
        return self.image_token * self.image_seq_length

    def apply_chat_template(
        self, conversation, chat_template: str | None = None, return_labels: bool = False, **kwargs
    ) -> str | list[str] | BatchFeature | list:
        """
        Renders a conversation, or a batch of them; `tokenize=True, return_dict=True` prepares it for the model.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): Messages, see [`validate_conversation`].
            chat_template (`str`, *optional*): Another template. To one that reads images, a text is passed as a block.
            return_labels (`bool`, *optional*, defaults to `False`): Adds `labels` of shape (B, S): the ids of the
                answers with their end-of-sequence token, -100 elsewhere and in answers with a weight of 0. Where the
                template writes no such token after an answer, it is added (see [`split_answers`]).
            kwargs: As in `ProcessorMixin.apply_chat_template`; arguments of the tokenizer go into `processor_kwargs`.
                `sanitize_control_tokens=True` lets a user write `<image>` and other special tokens in words (not with
                labels).

        Raises:
            `ValueError`: a conversation that is not valid, or an image that cannot be read.
            `FileNotFoundError`: an image that is not there.
        """
        template = self._resolve_chat_template(chat_template)
        is_batched = isinstance(conversation, (list, tuple)) and bool(conversation)
        is_batched = is_batched and isinstance(conversation[0], (list, tuple))
        conversations = [
            self._read(messages, template, f"Conversation {index}" if is_batched else "The conversation", kwargs)
            for index, messages in enumerate(conversation if is_batched else [conversation])
        ]
        if not kwargs.get("tokenize"):
            kwargs.pop("sanitize_control_tokens", None)  # of text as it is written, transformers refuses it
        if not return_labels:
            return super().apply_chat_template(conversations if is_batched else conversations[0], template, **kwargs)

        for messages in conversations:
            messages[0] = {**messages[0], "pieces": self._split_answers(messages, template)}
        return_tensors = kwargs.pop("return_tensors", None)
        kwargs.update(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        conversation = conversations if is_batched else conversations[0]
        inputs = super().apply_chat_template(conversation, PIECES_TEMPLATE, **kwargs)
        masks = inputs.pop("assistant_masks")
        inputs["labels"] = [
            [int(token) if is_answer else IGNORE_INDEX for token, is_answer in zip(row, mask)]
            for row, mask in zip(inputs["input_ids"], masks)
        ]
        return inputs.convert_to_tensors(return_tensors)

    def split_answers(self, conversation: list[dict]) -> list[tuple[str, bool]]:
        """The text of a conversation in training, in pieces with and without a loss, see [`split_answers`]."""
        return self._split_answers(self._read(conversation, self._resolve_chat_template(None)), self.chat_template)

    def _split_answers(self, messages: list[dict], template: str) -> list[tuple[str, bool]]:
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return split_answers(messages, template, partial(self._render, template), [self.tokenizer.eos_token, *special])

    def _render(self, template: str, messages: list[dict], **kwargs) -> tuple[str, Sequence[tuple[int, int]]]:
        """The text of messages, and the spans that the template marks if they are asked for."""
        (messages,), _ = self._normalize_conversations(messages)
        texts, spans = render_jinja_template(
            [messages], chat_template=template, **self.tokenizer.special_tokens_map, **kwargs
        )
        return texts[0], spans[0] if spans else ()

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The tokens that would begin, end or pad a conversation, or show an image, if a text held them."""
        named = (self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token)
        return (self.image_token, *(token for token in named if token))

    def _read(self, messages, template: str, name: str = "The conversation", kwargs: dict | None = None) -> list[dict]:
        """Validates a conversation, and brings it to the form that a template reads."""
        messages = drop_nulls(messages)
        self._validate(messages, name, kwargs or {})
        return text_to_blocks(messages) if READS_BLOCKS.search(template) else list(messages)

    def _validate(self, messages, name: str, kwargs: dict) -> None:
        # Marked as plain text, a special token in a user's words does no harm.
        forbidden = () if kwargs.get("sanitize_control_tokens") else self.control_tokens
        validate_conversation(messages, forbidden, name)
        if kwargs.get("tokenize") and not (kwargs.get("processor_kwargs") or {}).get("images"):
            for index, message in enumerate(messages):
                for block in message["content"] if not isinstance(message["content"], str) else ():
                    if block["type"] == "image" and not {"image", "path", "url", "base64"} & block.keys():
                        raise ValueError(
                            f"{name}, message {index} has an image without a source; give it a path, url, base64 "
                            "or image."
                        )

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs):
        """How many tokens images of the given sizes (height, width in pixels) take, for serving engines."""
        from transformers.processing_utils import MultiModalData

        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )


def _load_images(images, loaded: dict[int, Image]):
    if images is None:
        return None
    if isinstance(images, (list, tuple)):
        return [_load_images(image, loaded) for image in images]
    if id(images) not in loaded:
        loaded[id(images)] = load_image(images.numpy(force=True) if isinstance(images, torch.Tensor) else images)
    return loaded[id(images)]


VisualChatProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["VisualChatProcessor"]
