"""A kept conversation under any sequence of turns, edits, crops and interruptions answers as a fresh one."""

import contextlib

import pytest
import torch
from conftest import IMAGE_SEQ_LENGTH, IMAGE_TOKEN_ID, TEXT_CONFIGS, interrupt, make_model, pixels, tokens
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from transformers import LlamaConfig

from modeling_visualchat import ConversationCache, ImageMemory
from modeling_visualchat.weights_key_visualchat import image_key


GREEDY = {
    "max_new_tokens": 3,
    "min_new_tokens": 3,
    "return_dict_in_generate": True,
    "output_logits": True,
    "suppress_tokens": [0],
}
LIMIT = 40  # positions after which the longrope model changes its frequencies
SEEDS = st.integers(0, 3)


def longrope_config():
    parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": LIMIT,
        "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    }  # fmt: skip
    return LlamaConfig(**{**TEXT_CONFIGS["llama"]().to_dict(), "rope_parameters": parameters})


def make(kind: str, monkeypatch):
    if kind == "longrope":
        config = longrope_config()
        monkeypatch.setitem(TEXT_CONFIGS, "llama", lambda: config)
    model = make_model("mistral" if kind == "windowed" else "llama")
    if kind == "eager":
        model.set_attn_implementation("eager")
    return model


class Conversation(RuleBasedStateMachine):
    """A conversation of text and images, and a cache that has seen earlier states of it."""

    model: torch.nn.Module
    monkeypatch: pytest.MonkeyPatch

    @initialize()
    def start(self):
        self.cache, self.memory = ConversationCache(), ImageMemory()
        self.ids, self.images = tokens(3, "I", 2), [0]

    @property
    def inputs(self):
        passed = {"pixel_values": pixels(*self.images)} if self.images else {}
        return {"inputs": self.ids, **passed}

    def uses_memory(self, wanted: bool) -> dict:
        usable = wanted and self.images and self.model.model.supports_conversation_cache()
        return {"image_memory": self.memory} if usable else {}

    def run(self, cache, options):
        torch.manual_seed(0)
        output = self.model.generate(**self.inputs, past_key_values=cache, **{**GREEDY, "do_sample": False, **options})
        return output.sequences, torch.stack(output.logits, dim=1)

    @rule(
        options=st.sampled_from(
            [{}, {}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"prefill_chunk_size": 4}]
        ),
        remembers=st.booleans(),
        cropped=st.booleans(),
    )
    def answer(self, options, remembers, cropped):
        """The same tokens and logits as without a cache, or a refusal that leaves the cache as it was."""
        if cropped:
            keys = [[image_key(image) for image in pixels(*self.images)] if self.images else []]
            self.cache.keep_shared(self.ids, keys, IMAGE_TOKEN_ID)
        before = self.cache.get_seq_length()
        fresh = {name: value for name, value in options.items() if name != "prefill_chunk_size"}
        expected = self.run(None, fresh)
        try:
            actual = self.run(self.cache, {**options, **self.uses_memory(remembers)})
        except ValueError as refused:
            known = ("Pass an empty cache", "pass an empty cache", "start from an empty cache", "nothing new")
            assert any(part in str(refused) for part in known), refused
            assert self.cache.get_seq_length() == before
            self.cache.reset()
            return
        assert torch.equal(actual[0], expected[0])
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-4)
        if self.cache.num_rows == 1:
            self.ids = actual[0]
        else:
            self.cache.reset()

    @rule(length=st.integers(1, 4), seed=SEEDS)
    def write(self, length, seed):
        self.ids = torch.cat([self.ids, tokens(length, seed=seed)], dim=1)

    @rule(image=SEEDS)
    def show(self, image):
        self.ids = torch.cat([self.ids, tokens("I", 1)], dim=1)
        self.images.append(image)

    @rule(image=SEEDS, number=st.integers(0, 5))
    def replace(self, image, number):
        if self.images:
            self.images[number % len(self.images)] = image

    @rule(number=st.integers(0, 5))
    def remove(self, number):
        if self.images:
            number %= len(self.images)
            first = (self.ids[0] == IMAGE_TOKEN_ID).nonzero()[number * IMAGE_SEQ_LENGTH]
            self.ids = torch.cat([self.ids[:, :first], self.ids[:, first + IMAGE_SEQ_LENGTH :]], dim=1)
            del self.images[number]

    @rule(place=st.integers(0, 60), change=st.integers(1, 9))
    def edit(self, place, change):
        text = (self.ids[0] != IMAGE_TOKEN_ID).nonzero()[:, 0]
        place = text[place % len(text)]
        self.ids = self.ids.clone()
        self.ids[0, place] = 3 + (self.ids[0, place] + change) % 200

    @rule(count=st.integers(1, 12))
    def crop(self, count):
        self.cache.crop(-count)

    @rule()
    def forget(self):
        self.cache.reset()

    @rule(layer=st.integers(0, 1), place=st.integers(0, 2))
    def be_interrupted(self, layer, place):
        with self.monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt, ValueError):
            interrupt(patch, self.model.model.language_model.layers[layer].mlp, place)
            self.run(self.cache, {})


@pytest.mark.parametrize("kind", ["two streams", "eager", "windowed", "longrope"])
def test_any_sequence_of_changes_answers_as_a_fresh_conversation(kind, monkeypatch):
    machine = type("Machine", (Conversation,), {"model": make(kind, monkeypatch), "monkeypatch": monkeypatch})
    options = {"max_examples": 25, "stateful_step_count": 12, "deadline": None, "derandomize": True}
    run_state_machine_as_test(
        machine, settings=settings(**options, suppress_health_check=list(HealthCheck), database=None)
    )
