"""
The conversations that an engine answers now: a row each of one batch.

With a [`ConversationCache`], a row joins while others are being answered, and leaves at its end; images are read by
reference, so all rows that show an image read one copy. A model that cannot use one is answered by `generate`, in
batches that begin and end together.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from modeling_visualchat import ConversationCache, ImageMemory
from modeling_visualchat.image_states_visualchat import same_images
from modeling_visualchat.plan_visualchat import IMAGE, PADDING

from .replies import Reply


MAX_SHOWN = 100_000  # images whose clients are known
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


class EngineMemory(ImageMemory):
    """An image memory that tells a client whether it has shown an image before, and not whether others have."""

    keys: Sequence[str] = ()  # of the unique images of the last call

    def __init__(self, *options, **named_options):
        super().__init__(*options, **named_options)
        self._shown_by: OrderedDict[str, set[str]] = OrderedDict()  # since an image was computed

    def get_entries(self, keys, device, compute):
        """See [`TensorStore`]."""
        self.keys = keys

        def forget(missing: list[int]) -> list:
            for number in missing:
                self._shown_by.pop(keys[number], None)
            return compute(missing)

        return super().get_entries(keys, device, forget)

    def is_new(self, number: int, owner: str) -> bool:
        """Whether an owner shows a unique image of the last call for the first time since it was computed."""
        owners = self._shown_by.setdefault(self.keys[number], set())
        self._shown_by.move_to_end(self.keys[number])
        if len(self._shown_by) > MAX_SHOWN:
            self._shown_by.popitem(last=False)
        is_new = owner not in owners
        owners.add(owner)
        return is_new


class JoinedBatch:
    """
    Rows that join and leave, on one [`ConversationCache`].

    Args:
        model (`VisualChatForConditionalGeneration`): The model.
        tokenizer (`PreTrainedTokenizerFast`): Its tokenizer, for padding.
        memory ([`EngineMemory`], *optional*): Where images are looked up.

    Attributes:
        replies (`list[Reply]`): The rows.
    """

    def __init__(self, model: Any, tokenizer: Any, memory: EngineMemory | None):
        self.model, self.tokenizer, self.memory = model, tokenizer, memory
        config = model.generation_config
        self.suppressed = sorted({*(config.suppress_tokens or ()), model.config.image_token_id})
        self.clear()

    def clear(self) -> None:
        """Drops all rows."""
        self.replies: list[Reply] = []
        self.processors: list[LogitsProcessorList] = []
        self.cache = ConversationCache()
        self.scores: torch.Tensor | None = None  # of the next token, (rows, vocabulary)

    @torch.no_grad()
    def join(self, replies: Sequence[Reply]) -> None:
        """Reads the conversations of new rows."""
        inputs, pixel_values = pad(replies, self.tokenizer)
        inputs = inputs.to(self.model.device)
        cache, images = ConversationCache(), {}
        if pixel_values is not None:
            pixel_values = pixel_values.to(self.model.device)
            if self.memory is None:
                images = {"pixel_values": pixel_values}
            else:
                images = {"image_states": self.memory.get_states(self.model, pixel_values)}
            count_new_images(replies, pixel_values, self.memory)
        positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        options = {"past_key_values": cache, "position_ids": positions, "logits_to_keep": 1}
        scores = self.model(**inputs, **images, **options).logits[:, -1].float()
        if self.scores is None:
            self.cache, self.scores = cache, scores
        else:
            self.cache.append_rows(cache)
            self.scores = torch.cat([self.scores, scores])
        self.replies += replies
        self.processors += [reply.request.processors for reply in replies]

    @torch.no_grad()
    def step(self) -> None:
        """Hands each row its next token; those that need another one stay."""
        assert self.scores is not None
        self.scores[:, self.suppressed] = float("-inf")
        ids = torch.zeros(1, 0, dtype=torch.long, device=self.scores.device)
        rows = zip(self.processors, self.scores.split(1))
        tokens = torch.cat([processors(ids, scores).argmax(dim=1) for processors, scores in rows])
        staying = deliver(self.replies, tokens.tolist())
        if not staying:
            return self.clear()
        if len(staying) < len(self.replies):
            self.cache.batch_select_indices(torch.tensor(staying))
            self.cache.compact()
            self.replies, self.processors = (
                [each[row] for row in staying] for each in (self.replies, self.processors)
            )
        types, device = self.cache.token_types, self.model.device
        positions = self.cache.position_ids.max(dim=1, keepdim=True).values + 1
        output = self.model(
            tokens[staying][:, None],
            attention_mask=torch.nn.functional.pad(types != PADDING, (0, 1), value=True).long().to(device),
            mm_token_type_ids=torch.nn.functional.pad(types == IMAGE, (0, 1)).long().to(device),
            position_ids=positions.to(device),
            past_key_values=self.cache,
        )
        self.scores = output.logits[:, -1].float()


class WholeBatch:
    """Rows that begin and end together, by `generate`; see [`JoinedBatch`]."""

    def __init__(self, model: Any, tokenizer: Any, memory: EngineMemory | None):
        self.model, self.tokenizer, self.memory = model, tokenizer, memory
        self.replies: list[Reply] = []

    def clear(self) -> None:
        """There are never rows between two calls."""

    def join(self, replies: Sequence[Reply]) -> None:
        """Answers the conversations of new rows."""
        inputs, pixel_values = pad(replies, self.tokenizer)
        delivery = RowDelivery(replies)
        if pixel_values is not None:
            inputs["pixel_values"] = pixel_values
            delivery.before_first = lambda: count_new_images(replies, pixel_values, self.memory)
        self.model.generate(
            **inputs.to(self.model.device),
            **GREEDY,
            image_memory=self.memory,
            max_new_tokens=max(reply.request.max_new_tokens for reply in replies),
            logits_processor=LogitsProcessorList([RowSampling([reply.request.processors for reply in replies])]),
            stopping_criteria=StoppingCriteriaList([delivery]),
        )

    def step(self) -> None:
        """All is answered by [`join`]."""


class RowSampling(LogitsProcessor):
    """Changes the scores of each row by processors of its own."""

    def __init__(self, rows: Sequence[LogitsProcessorList]):
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.rows, input_ids.split(1), scores.split(1))
        return torch.cat([processors(ids, row) for processors, ids, row in pairs])


class RowDelivery(StoppingCriteria):
    """
    Hands the new token of each row to its reply, and ends the rows whose replies need no more. It takes the place of
    a streamer, which gets tokens only after it is decided which rows end.
    """

    def __init__(self, replies: Sequence[Reply]):
        self.replies = replies
        self.before_first: Callable[[], None] | None = None

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        if self.before_first is not None:
            self.before_first()
            self.before_first = None
        staying = deliver(self.replies, input_ids[:, -1].tolist())
        return torch.tensor([row not in staying for row in range(len(self.replies))], device=input_ids.device)


def deliver(replies: Sequence[Reply], tokens: list[int]) -> list[int]:
    """Hands each reply its next token, and returns the rows of those that need another one."""
    for reply, token in zip(replies, tokens):
        try:
            reply.put(token)
        except Exception as error:  # of one row, and no reason to end the others
            reply.fail(error)
    return [row for row, reply in enumerate(replies) if reply.is_due()]


def pad(replies: Sequence[Reply], tokenizer: Any) -> tuple[Any, torch.Tensor | None]:
    """The tokens of new rows, padded on the left, and their images."""
    rows = {"input_ids": [reply.request.input_ids for reply in replies]}
    images = [reply.request.pixel_values for reply in replies if reply.request.pixel_values is not None]
    return tokenizer.pad(rows, padding_side="left", return_tensors="pt"), torch.cat(images) if images else None


def count_new_images(replies: Sequence[Reply], pixel_values: torch.Tensor, memory: EngineMemory | None) -> None:
    """Notes how many images of each reply are new to its client: the server may have computed them for another."""
    index = iter(same_images(pixel_values))
    for reply in replies:
        images = {next(index) for _ in range(reply.num_images)}
        if memory is None or not memory.keys:
            reply.new_images = len(images)
        else:
            reply.new_images = sum(memory.is_new(number, reply.request.owner) for number in images)
