"""Answers of a model to conversations: many at a time, round by round."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from modeling_visualchat import ImageMemory

from ..conversation_visualchat import is_image
from ..data.files import digest_of
from .pictures import Picture, open_picture, save_thumbnail
from .records import Example, Round


NOTHING = "(nothing)"  # stands for an empty answer in the history, as in `ChatSession`
IGNORE_INDEX = -100
PLAIN = "plain"


class Item(NamedTuple):
    """A conversation to hold: an example as it is, or a variant of it that tests robustness."""

    example: Example
    variant: str = PLAIN
    is_shown: bool = False  # on the page, for which thumbnails are kept

    @property
    def id(self) -> str:
        return f"{self.variant}/{self.example.key}"


@dataclass(frozen=True)
class AnswerOptions:
    """
    How conversations are answered.

    Args:
        history (`str`, *optional*, defaults to `"own"`): What a round sees as the answers before it: the model's own,
            or the `"references"`.
        max_new_tokens (`int`, *optional*, defaults to 256): Maximum tokens of an answer.
        temperature (`float`, *optional*, defaults to 0): 0 for greedy answers, or the temperature of sampled ones.
        top_p (`float`, *optional*, defaults to 1): The probability mass that is sampled from.
        seed (`int`, *optional*, defaults to 0): Of sampled answers. Each round has random numbers of its own, so that
            an answer depends neither on its batch nor on the process.
        scores_options (`bool`, *optional*, defaults to `False`): Computes the log-probability of each option.
    """

    history: str = "own"
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    scores_options: bool = False

    def __post_init__(self):
        for name, is_valid, wanted in (
            ("history", self.history in ("own", "references"), "own or references"),
            ("max_new_tokens", self.max_new_tokens > 0, "a number from 1 up"),
            ("temperature", self.temperature >= 0, "0 for greedy answers, or a number above"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, up to 1"),
        ):
            if not is_valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {wanted}.")


class AnswerScore(NamedTuple):
    """
    How likely an answer is. Its end token counts, as in training: an answer is what the model would have to generate.
    """

    total: float  # log-probability, nats
    num_tokens: int
    is_greedy: bool  # whether each of its tokens is the most likely one


class Generated(NamedTuple):
    """An answer of the model."""

    text: str
    num_prompt_tokens: int  # of the conversation before it, with its images
    num_tokens: int  # with its end token
    is_ended: bool  # by the model, not at the maximum length


class SeededSampling(LogitsProcessor):
    """
    Adds Gumbel noise to log-probabilities, so that the highest is a sample of them. Each row draws from a generator of
    its own.
    """

    def __init__(self, seeds: Sequence[str]):
        self.generators = [torch.Generator().manual_seed(int(digest_of(seed.encode())[:15], 16)) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=each) for each in self.generators])
        noise = -(-uniform.clamp(1e-20, 1 - 1e-7).log()).log()
        return scores + noise.to(scores.device, scores.dtype)


@dataclass
class _Conversation:
    """A conversation while it is held."""

    item: Item
    messages: list[dict]
    rounds: list[dict] = field(default_factory=list)
    images: list[str] = field(default_factory=list)


class Answerer:
    """
    Holds conversations with a model.

    Args:
        model (`VisualChatForConditionalGeneration`): The model, in evaluation mode.
        processor (`VisualChatProcessor`): Its processor.
        options ([`AnswerOptions`]): How conversations are answered.
        batch_size (`int`): Maximum rows of a batch, of conversations or of options.
        thumbnails (`Path`): The folder of the thumbnails of shown items.
        memory ([`ImageMemory`], *optional*): Where images are looked up; by default an empty one, if the model can
            use one.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        options: AnswerOptions,
        batch_size: int,
        thumbnails: Path,
        memory: ImageMemory | None = None,
    ):
        self.model, self.processor, self.options = model, processor, options
        self.batch_size, self.thumbnails = batch_size, thumbnails
        # Images that come again, in a later round or another conversation, are not computed again.
        self.memory = self.make_memory() if memory is None else memory
        self.control_tokens = [processor.image_token, *processor.tokenizer.all_special_tokens]

    def make_memory(self) -> ImageMemory | None:
        """An empty image memory, or `None` if the model cannot use one."""
        return ImageMemory() if self.model.model.supports_conversation_cache() else None

    @property
    def limit(self) -> int:
        """The maximum number of tokens of a question with all before it."""
        return self.processor.tokenizer.model_max_length

    def make_batches(self, items: Sequence[Item]) -> list[list[Item]]:
        """Items with similar numbers of rounds and tokens together, the longest first."""

        def length(item: Item) -> tuple[int, int]:
            example = item.example
            texts = [block["text"] for each in example.rounds for block in each.content if not is_image(block)]
            return len(example.rounds), self.estimate_tokens(texts, example.num_images)

        return make_batches(items, self.batch_size, length)

    def estimate_tokens(self, texts: Sequence[str], num_images: int) -> int:
        """About the number of tokens of texts and images, without a tokenizer."""
        return sum(map(len, texts)) // 4 + num_images * self.processor.image_seq_length

    def answer(self, items: Sequence[Item]) -> list[dict]:
        """The lines of `answers.jsonl` for a batch of items."""
        conversations = [self._start(item) for item in items]
        for number in range(max(len(item.example.rounds) for item in items)):
            active = [each for each in conversations if number < len(each.item.example.rounds)]
            for conversation in active:
                self._ask(conversation, conversation.item.example.rounds[number])
            for conversation, text, fault in zip(active, *self._generate(active)):
                self._note(conversation, conversation.item.example.rounds[number], text, fault)
        return [describe(each.item, each.images, each.rounds) for each in conversations]

    def _start(self, item: Item) -> _Conversation:
        system = item.example.system
        return _Conversation(item, [] if system is None else [{"role": "system", "content": self.to_plain(system)}])

    def _ask(self, conversation: _Conversation, asked: Round) -> None:
        content, digests = self.open_content(asked.content, conversation.item)
        conversation.messages.append({"role": "user", "content": content})
        conversation.images += digests

    def open_content(self, blocks: Sequence[dict], item: Item) -> tuple[list[dict], list[str]]:
        """The content of a question with its images open, and their digests."""
        content: list[dict] = []
        digests: list[str] = []
        for block in blocks:
            if is_image(block):
                picture = self.open(block, item)
                content.append(picture.block)
                digests.append(picture.digest)
            else:
                content.append({"type": "text", "text": self.to_plain(block["text"])})
        return content, digests

    def open(self, block: dict, item: Item) -> Picture:
        """An image of an item; its thumbnail is kept if the item is shown."""
        picture = open_picture(block, item.id)
        if item.is_shown:
            save_thumbnail(picture, self.thumbnails)
        return picture

    def to_plain(self, text: str) -> str:
        """Text in which no special token is spelled out, which the tokenizer would read as one."""
        for token in self.control_tokens:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _note(self, conversation: _Conversation, asked: Round, text: str, fault: str) -> None:
        """Keeps an answer, and continues the history with it or with the reference."""
        line = describe_round(asked, text, len(conversation.images), fault)
        if self.options.scores_options and asked.choices and not fault:
            line["option_scores"] = self._score_options(conversation.messages, asked.choices)
        conversation.rounds.append(line)
        use_reference = self.options.history == "references" and asked.references
        answer = self.to_plain(asked.references[0] if use_reference else text)
        conversation.messages.append({"role": "assistant", "content": answer or NOTHING, "weight": 0})

    def count_tokens(self, messages: list[dict]) -> int:
        """The number of tokens of a conversation up to its next answer."""
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        num_images = sum(is_image(block) for message in messages for block in message["content"])
        num_tokens = len(self.processor.tokenizer(text, verbose=False)["input_ids"])
        return num_tokens + num_images * (self.processor.image_seq_length - 1)

    def find_fault(self, messages: list[dict]) -> str:
        """Why a conversation cannot be answered: it is longer than the model reads."""
        num_tokens = self.count_tokens(messages)
        return f"{num_tokens:,} tokens; the model reads {self.limit:,}" if num_tokens > self.limit else ""

    def generate(self, conversations: list[list[dict]], **kwargs) -> list[str]:
        """Answers to the last questions of conversations, by the arguments of `generate`."""
        return [answer.text for answer in self.generate_counted(conversations, **kwargs)]

    def generate_counted(self, conversations: list[list[dict]], **kwargs) -> list[Generated]:
        """As [`generate`], with the numbers of tokens."""
        inputs = self._prepare(conversations, add_generation_prompt=True)
        generated = self.model.generate(**inputs, image_memory=self.memory, **kwargs)
        generated = generated[:, inputs["input_ids"].shape[1] :].cpu()
        end_tokens = self.model.generation_config.eos_token_id
        end_tokens = end_tokens if isinstance(end_tokens, list) else [] if end_tokens is None else [end_tokens]
        is_end = torch.isin(generated, torch.tensor(end_tokens, dtype=generated.dtype))
        is_ended = is_end.any(dim=1)
        num_tokens = torch.where(is_ended, is_end.int().argmax(dim=1) + 1, generated.shape[1])
        texts = [text.strip() for text in self.processor.batch_decode(generated, skip_special_tokens=True)]
        num_prompt_tokens = inputs["attention_mask"].sum(dim=1)
        counts = zip(texts, num_prompt_tokens.tolist(), num_tokens.tolist(), is_ended.tolist())
        return [Generated(*count) for count in counts]

    def _generate(self, conversations: Sequence[_Conversation]) -> tuple[list[str], list[str]]:
        """Answers to the last questions, and why there is none."""
        faults = [self.find_fault(each.messages) for each in conversations]
        texts = [""] * len(faults)
        rows = [row for row, fault in enumerate(faults) if not fault]
        if rows:
            seeds = [f"{conversations[row].item.id} {len(conversations[row].rounds)}" for row in rows]
            answers = self.generate([conversations[row].messages for row in rows], **self.generate_options(seeds))
            for row, answer in zip(rows, answers):
                texts[row] = answer
        return texts, faults

    def generate_options(self, seeds: Sequence[str] = ()) -> dict[str, Any]:
        """The arguments of `generate`, whatever the checkpoint's generation config says; a seed for each row."""
        options = self.options
        arguments: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": False, "num_beams": 1}
        arguments |= {"temperature": None, "top_p": None, "top_k": None}
        if options.temperature > 0:
            steps = [TemperatureLogitsWarper(options.temperature)]
            steps += [TopPLogitsWarper(options.top_p)] if options.top_p < 1 else []
            sampling = SeededSampling([f"{options.seed} {seed}" for seed in seeds])
            arguments["logits_processor"] = LogitsProcessorList([*steps, sampling])
        return arguments

    def _prepare(self, conversations: list[list[dict]], **kwargs) -> Any:
        return self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
            **kwargs,
        ).to(self.model.device)

    def _score_options(self, messages: list[dict], choices: Sequence[str]) -> list[tuple[float, int, float]]:
        """For each option, the log-probability and number of tokens of its text, and the one of its letter."""
        answers = [*map(self.to_plain, choices), *string.ascii_uppercase[: len(choices)]]
        rows = [[*messages, {"role": "assistant", "content": answer}] for answer in answers]
        scores: list[AnswerScore] = []
        for start in range(0, len(rows), self.batch_size):
            scores += self.score_answers(rows[start : start + self.batch_size])
        texts, letters = scores[: len(choices)], scores[len(choices) :]
        return [(text.total, text.num_tokens, letter.total) for text, letter in zip(texts, letters)]

    @torch.no_grad()
    def score_answers(self, conversations: list[list[dict]]) -> list[AnswerScore]:
        """The log-probability of the last answer of each conversation."""
        inputs = self._prepare(conversations, return_labels=True)
        labels = inputs.pop("labels")
        is_answer = labels != IGNORE_INDEX
        num_kept = int(labels.shape[1] - is_answer.int().argmax(dim=1).min()) + 1
        if self.memory is not None and "pixel_values" in inputs:
            inputs["image_states"] = self.memory.get_states(self.model, inputs.pop("pixel_values"))
        logits = self.model(**inputs, logits_to_keep=num_kept, use_cache=False).logits[:, :-1].float()
        labels, is_answer = labels[:, 1 - num_kept :], is_answer[:, 1 - num_kept :]
        found = logits.log_softmax(dim=-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        totals = (found * is_answer).sum(dim=1)
        is_greedy = ((logits.argmax(dim=-1) == labels) | ~is_answer).all(dim=1)
        return [*map(AnswerScore, totals.tolist(), is_answer.sum(dim=1).tolist(), is_greedy.tolist())]


def make_batches(items: Sequence[Any], batch_size: int, length: Callable[[Any], Any]) -> list[list[Any]]:
    """Items of similar length together, the longest first."""
    ordered = sorted(items, key=length, reverse=True)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def describe(item: Item, images: list[str], rounds: list[dict]) -> dict[str, Any]:
    """A line of `answers.jsonl`."""
    example = item.example
    return {
        "id": item.id,
        "key": example.key,
        "variant": item.variant,
        "groups": example.groups,
        "images": images,  # the digests of their pixels
        "rounds": rounds,
    }


def describe_round(asked: Round, text: str, num_images: int, fault: str = "") -> dict[str, Any]:
    """A round of a line of `answers.jsonl`, `num_images` being those shown so far."""
    question = " ".join("<image>" if is_image(block) else block["text"] for block in asked.content)
    line: dict[str, Any] = {"question": question, "num_images": num_images, "answer": text}
    line |= {"references": [*asked.references], "choices": [*asked.choices]}
    return line | ({"fault": fault} if fault else {})
