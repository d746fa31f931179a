"""
VisualChat as a model of lmms-eval (0.7 or later), which finds it by its entry point:

    python -m lmms_eval --model visualchat --model_args pretrained=CHECKPOINT --tasks mmmu_val --batch_size 8

Tasks that compare likelihoods (`multiple_choice`, `loglikelihood`) need `--force_simple`: lmms-eval builds them only
for its simple interface, in which a question is one text and a list of images.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from tqdm.auto import tqdm

from ..conversation_visualchat import is_image
from ..image_loading_visualchat import load_image
from .answering import Answerer, AnswerOptions
from .evaluation import load_model


IMAGE_TAG = "<image>"
WINDOW = 16  # batches of requests that are opened and sorted by length together, which bounds the memory of images
MAX_NEW_TOKENS = 1024  # of a task that names no number, as in the models of lmms-eval
# Generation options of tasks that are used, beside `until`, `do_sample` and `temperature`.
PASSED_ON = ("max_new_tokens", "top_p", "top_k", "num_beams", "repetition_penalty")


class Question(NamedTuple):
    """A conversation to answer, opened in its batch."""

    row: int  # among the requests
    messages: list[dict]
    num_tokens: int


class VisualChat(lmms):
    """
    The chat interface: messages with interleaved images.

    Args:
        pretrained (`str`): Folder or name of a checkpoint.
        dtype (`str`, *optional*, defaults to `"auto"`): The dtype of the weights, by default that of the checkpoint.
        device (`str`, *optional*): By default the device of the process, as accelerate chooses it.
        batch_size (`int`, *optional*, defaults to 1): Conversations that are answered together.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Runs code beside the checkpoint for its
            tokenizer or image processor; the model's code is that of this package.

    Raises:
        `ValueError`: a batch size that is no number, a checkpoint that lacks weights, or a task that shows anything
            but images.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        trust_remote_code: bool = False,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}; use a number from 1 up.")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device if device is None or self._world_size > 1 else device
        _, model, processor = load_model(pretrained, None, self.device, dtype, trust_remote_code)
        model.freeze()
        self.batch_size = int(batch_size)
        self.answerer: Any = Answerer(model, processor, AnswerOptions(), self.batch_size, Path())

    def clean(self) -> None:
        self.answerer = None
        super().clean()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """
        An answer to each request, up to the first of its strings `until`. Sampled answers use the random numbers of
        torch, which lmms-eval seeds. A question that is too long for the model gets an empty answer and a warning.
        """
        read = [self._read_request(request) for request in requests]
        groups = defaultdict(list)  # by generation options, which are those of a batch
        for index, (_, options) in enumerate(read):
            groups[json.dumps(options, sort_keys=True, default=str)].append(index)
        answers = [""] * len(requests)
        progress = self._show_progress(len(requests))
        for indices in groups.values():
            options = read[indices[0]][1]
            arguments, until = self._generate_arguments(options)
            for batch in self._make_batches(indices, lambda index: read[index][0]()):
                fitting = [each for each in batch if each.num_tokens <= self.answerer.limit]
                texts = self.answerer.generate([each.messages for each in fitting], **arguments) if fitting else []
                for question, text in zip(fitting, texts):
                    answers[question.row] = cut(text, until)
                if num_long := len(batch) - len(fitting):
                    logger.warning(f"{num_long} questions are longer than the model reads and get empty answers.")
                progress.update(len(batch))
        progress.close()
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """
        For each request, the mean negative log-probability of the tokens of its continuation as the answer (nats), of
        which lmms-eval takes the lowest, and whether greedy decoding gives it. The end token counts.

        Raises:
            `ValueError`: a question that is too long for the model; no number would be neutral among the options.
        """

        def open_messages(index: int) -> list[dict]:
            context, continuation, *rest = requests[index].args
            visuals: Sequence[Any] = []
            if rest:  # without, the likelihood of an option by itself is asked for
                doc_to_visual, *place = rest
                visuals = doc_to_visual(self._find_document(*place)) or []
                continuation = continuation(self._find_document(*place)) if callable(continuation) else continuation
            answer = self.answerer.to_plain(continuation.strip())  # the template has the space before it
            return [*self._open([ask(context, visuals)]), {"role": "assistant", "content": answer}]

        scores: list[Any] = [None] * len(requests)
        progress = self._show_progress(len(requests))
        for batch in self._make_batches(range(len(requests)), open_messages):
            if batch[0].num_tokens > self.answerer.limit:
                task, document = requests[batch[0].row].task_name, requests[batch[0].row].doc_id
                raise ValueError(
                    f"Document {document} of {task} takes {batch[0].num_tokens:,} tokens, and the model reads "
                    f"{self.answerer.limit:,}; leave it out with --offset and --limit, or leave the task out."
                )
            for question, score in zip(batch, self.answerer.score_answers([each.messages for each in batch])):
                # Since 0.7, lmms-eval turns a bare pair into text, which its metrics cannot read.
                scores[question.row] = GenerationResult((-score.total / score.num_tokens, score.is_greedy))
            progress.update(len(batch))
        progress.close()
        return scores

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError(
            "VisualChat answers no tasks of generate_until_multi_round, in which a task asks again after each answer; "
            "conversations of several rounds are evaluated by examples/evaluate.py."
        )

    def _read_request(self, request: Any) -> tuple[Callable[[], list[dict]], dict]:
        """The function that opens the messages of a request, and its generation options."""
        _, doc_to_messages, options, *place = request.args
        return lambda: self._open(doc_to_messages(self._find_document(*place))), options or {}

    def _find_document(self, doc_id: int, task: str, split: str) -> dict:
        return self.task_dict[task][split][doc_id]

    def _open(self, messages: list[dict]) -> list[dict]:
        """Messages of lmms-eval as the processor takes them, with their images open."""
        return [{**message, "content": self._open_content(message["content"])} for message in messages]

    def _open_content(self, blocks: list[dict]) -> list[dict]:
        content = []
        for block in place_images(blocks):
            if is_image(block):
                content.append({"type": "image", "image": load_image(block["url"])})
            elif block["type"] == "text":
                content.append({"type": "text", "text": self.answerer.to_plain(block["text"])})
            else:
                raise ValueError(f"The task shows {block['type']}, and VisualChat reads text and images only.")
        return content

    def _make_batches(self, indices: Sequence[int], open_messages: Callable) -> Iterator[list[Question]]:
        """Batches of questions of similar length, the longest of a window first."""
        size, indices = self.batch_size, [*indices]
        for start in range(0, len(indices), WINDOW * size):
            questions = []
            for index in indices[start : start + WINDOW * size]:
                messages = open_messages(index)
                asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
                questions.append(Question(index, messages, self.answerer.count_tokens(asked)))
            questions.sort(key=lambda each: each.num_tokens, reverse=True)
            yield from (questions[first : first + size] for first in range(0, len(questions), size))

    def _generate_arguments(self, options: dict) -> tuple[dict[str, Any], list[str]]:
        """The arguments of `generate`, whatever the checkpoint's generation config says, and the strings that stop."""
        until, temperature = options.get("until") or [], options.get("temperature")
        until = [text for text in ([until] if isinstance(until, str) else until) if text]
        do_sample = options.get("do_sample", temperature is not None) and temperature != 0
        arguments: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, "top_p": None, "top_k": None}
        arguments |= {name: options[name] for name in PASSED_ON if options.get(name) is not None}
        if do_sample:
            arguments |= {"temperature": float(1.0 if temperature is None else temperature)}
        else:
            arguments |= {"temperature": None, "top_p": None, "top_k": None}
        if until:
            arguments |= {"stop_strings": until, "tokenizer": self.answerer.processor.tokenizer}
        if unused := sorted({*options} - {*PASSED_ON, "until", "do_sample", "temperature"}):
            logger.warning(f"Generation options of the task that are not used: {', '.join(unused)}.")
        return {**arguments, "do_sample": bool(do_sample)}, until

    def _show_progress(self, total: int) -> tqdm:
        return tqdm(total=total, desc="Answering", disable=self.rank > 0)


class VisualChatSimple(VisualChat):
    """The simple interface: one text and a list of images, before it or in the places of `<image>`."""

    is_simple = True

    def _read_request(self, request: Any) -> tuple[Callable[[], list[dict]], dict]:
        context, options, doc_to_visual, *place = request.args
        return lambda: self._open([ask(context, doc_to_visual(self._find_document(*place)) or [])]), options or {}


def ask(text: str, visuals: Sequence[Any]) -> dict:
    """The message of a question, its images first."""
    blocks = [{"type": "image", "url": visual} for visual in visuals]
    return {"role": "user", "content": [*blocks, {"type": "text", "text": text}]}


def place_images(blocks: list[dict]) -> list[dict]:
    """The content of a message, its images in the places of `<image>` if its texts hold as many of them."""
    images = [block for block in blocks if is_image(block)]
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    if not images or sum(text.count(IMAGE_TAG) for text in texts) != len(images):
        return blocks
    placed: list[dict] = []
    for text in texts:
        for number, piece in enumerate(text.split(IMAGE_TAG)):
            placed += [images.pop(0)] if number > 0 else []
            placed += [{"type": "text", "text": piece}] if piece.strip() else []
    return placed + [block for block in blocks if not is_image(block) and block["type"] != "text"]


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings."""
    return text[: min([found for each in until if (found := text.find(each)) >= 0], default=len(text))].strip()


MODULE = "processing_visualchat.evaluation.lmms_eval_model"
MANIFEST = ModelManifest(
    "visualchat", simple_class_path=f"{MODULE}.VisualChatSimple", chat_class_path=f"{MODULE}.VisualChat"
)
