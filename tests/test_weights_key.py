"""
One notion of the same weights: each way of changing weights or behaviour against each of the things that are kept.

What is kept is an image memory, a cache of vision features, a chat session, and a cache passed to `generate`. After a
change each gives what a fresh one gives; a cache passed to `generate` may also refuse by a `ValueError`.
"""

import copy
import shutil
import warnings
from contextlib import ExitStack

import pytest
import torch
from conftest import draw_picture, make_model, make_processor, pixels, tokens
from peft import LoraConfig, get_peft_model
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, parametrize
from transformers import LogitsProcessorList

from modeling_visualchat import (
    ChatSession,
    ConversationCache,
    ImageMemory,
    VisionFeatureCache,
    VisualChatForConditionalGeneration,
)
from modeling_visualchat.weights_key_visualchat import weights_key


OPTIONS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
RECORD = {"return_dict_in_generate": True, "output_logits": True}


class Subject:
    """A model, the adapters around it, and what has to be undone after a test."""

    def __init__(self, adapters: bool = False, **kwargs):
        self.model = make_model(**kwargs)
        self.stack = ExitStack()
        if adapters:
            torch.manual_seed(0)
            config = LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
            self.adapted = get_peft_model(self.model, config).eval()
            self.adapted.add_adapter("other", config)
            self.model = self.adapted.base_model.model
        self.model.requires_grad_(False)

    @property
    def mlps(self):
        """One module of the vision tower and one of the decoder."""
        inner = self.model.model
        return [inner.vision_tower.encoder.layers[0].mlp, inner.language_model.layers[0].mlp]


def step(optimizer, **options):
    def change(subject):
        generator = torch.Generator().manual_seed(7)
        parameters = [p for n, p in subject.model.named_parameters() if "embed" not in n and "lm_head" not in n]
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        optimizer(parameters, **{"lr": 0.02, **options}).step()
        for parameter in parameters:
            parameter.requires_grad_(False).grad = None

    return change


def other_weights(subject):
    return make_model(seed=5).state_dict()


def assign(subject):
    subject.model.load_state_dict(other_weights(subject), assign=True)
    subject.model.requires_grad_(False)


def write_data(subject):
    for mlp in subject.mlps:
        for parameter in mlp.parameters():
            parameter.data.mul_(1.5)


def swap_data(subject):
    for mlp in subject.mlps:
        for parameter in mlp.parameters():
            parameter.data = parameter.data * 1.5


def write_numpy(subject):
    for mlp in subject.mlps:
        for parameter in mlp.parameters():
            parameter.detach().numpy()[...] *= 1.5


def replace_modules(subject):
    inner = subject.model.model
    other = make_model(seed=5).model
    # Not whole layers of the tower: transformers records their outputs by hooks that it sets once.
    inner.vision_tower.encoder.layers[0].mlp = other.vision_tower.encoder.layers[0].mlp
    inner.language_model.layers[0].mlp = other.language_model.layers[0].mlp


def hooks(register):
    def change(subject):
        for mlp in subject.mlps:
            subject.stack.callback(register(mlp).remove)

    return change


def plain_activation(subject):
    for mlp in subject.mlps:
        name = "activation_fn" if hasattr(mlp, "activation_fn") else "act_fn"
        delattr(mlp, name)
        setattr(mlp, name, torch.tanh)  # a function, which no list of modules shows


def double(module, args, output):
    return output * 2


def replace_forward(subject):
    for mlp in subject.mlps:
        mlp.forward = lambda states, forward=mlp.forward: forward(states) * 2


def replace_forward_of_the_class(subject):
    for kind in map(type, subject.mlps):
        forward = kind.forward
        kind.forward = lambda self, states, forward=forward: forward(self, states) * 2
        subject.stack.callback(setattr, kind, "forward", forward)


def global_hook(subject):
    kinds = tuple(map(type, subject.mlps))
    handle = register_module_forward_hook(lambda m, args, out: out * 2 if isinstance(m, kinds) else None)
    subject.stack.callback(handle.remove)


def global_pre_hook(subject):
    kinds = tuple(map(type, subject.mlps))
    handle = register_module_forward_pre_hook(
        lambda m, args: tuple(a * 2 for a in args) if isinstance(m, kinds) else None
    )
    subject.stack.callback(handle.remove)


class Scale(torch.nn.Module):
    def forward(self, weight):
        return weight * 1.5


def parametrization(subject):
    for mlp in subject.mlps:
        name = "fc1" if hasattr(mlp, "fc1") else "up_proj"
        parametrize.register_parametrization(getattr(mlp, name), "weight", Scale())


def factor_that_is_no_weight(subject):
    """No weight, hook or class tells it: an attribute of a module that its result depends on."""
    subject.model.model.vision_tower.encoder.layers[0].self_attn.scale *= 3
    subject.model.model.language_model.layers[0].self_attn.scaling *= 3


def activation(subject):
    for mlp in subject.mlps:
        name = "activation_fn" if hasattr(mlp, "activation_fn") else "act_fn"
        setattr(mlp, name, torch.nn.Tanh())


def rotary_frequencies(subject):
    subject.model.model.language_model.rotary_emb.inv_freq.mul_(0.3)


def autocast(subject):
    subject.stack.enter_context(torch.autocast("cpu", torch.bfloat16))


def adapters(change):
    change.adapters = True
    return change


@adapters
def adapter_off(subject):
    subject.adapted.base_model.disable_adapter_layers()


@adapters
def adapter_merged(subject):
    subject.adapted.merge_adapter()


@adapters
def adapter_other(subject):
    subject.adapted.set_adapter("other")
    subject.model.requires_grad_(False)


@adapters
def adapter_scaled(subject):
    for part in subject.model.modules():
        if isinstance(getattr(part, "scaling", None), dict):
            part.scale_layer(3.0)


@adapters
def adapter_deleted(subject):
    subject.adapted.set_adapter("other")
    subject.adapted.delete_adapter("default")
    subject.model.requires_grad_(False)


@adapters
def adapter_unloaded(subject):
    subject.model = subject.adapted.unload()


@adapters
def adapter_merged_and_unloaded(subject):
    subject.model = subject.adapted.merge_and_unload()


@adapters
def adapter_step_fused(subject):
    parameters = [p for n, p in subject.model.named_parameters() if "lora_" in n]
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=0.1, fused=True).step()
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None


CHANGES = {
    "adamw plain": step(torch.optim.AdamW, foreach=False),
    "adamw foreach": step(torch.optim.AdamW, foreach=True),
    "adamw fused": step(torch.optim.AdamW, fused=True),
    "adam fused": step(torch.optim.Adam, fused=True),
    "adam capturable-free amsgrad": step(torch.optim.Adam, amsgrad=True),
    "sgd plain": step(torch.optim.SGD, foreach=False),
    "sgd foreach": step(torch.optim.SGD, foreach=True),
    "sgd fused": step(torch.optim.SGD, fused=True),
    "adagrad fused": step(torch.optim.Adagrad, fused=True),
    "load_state_dict": lambda subject: subject.model.load_state_dict(other_weights(subject)),
    "load_state_dict assign": assign,
    "a write through data": write_data,
    "other data": swap_data,
    "a write through numpy": write_numpy,
    "other layers": replace_modules,
    "forward hook": hooks(lambda mlp: mlp.register_forward_hook(double)),
    "forward pre-hook": hooks(lambda mlp: mlp.register_forward_pre_hook(lambda m, args: (args[0] * 2,))),
    "hook with kwargs": hooks(
        lambda mlp: mlp.register_forward_hook(lambda m, args, kwargs, out: out * 2, with_kwargs=True)
    ),
    "a hook of all modules": global_hook,
    "a pre-hook of all modules": global_pre_hook,
    "a forward of its own": replace_forward,
    "another forward of the class": replace_forward_of_the_class,
    "parametrization": parametrization,
    "another activation": activation,
    "an activation that is no module": plain_activation,
    "a factor that is no weight": factor_that_is_no_weight,
    "rotary frequencies": rotary_frequencies,
    "bfloat16": lambda subject: subject.model.to(torch.bfloat16),
    "float64": lambda subject: subject.model.double(),
    "autocast": autocast,
    "eager kernel": lambda subject: subject.model.set_attn_implementation("eager"),
    "masked route": lambda subject: subject.model.set_route("masked"),
    "adapter off": adapter_off,
    "adapter merged": adapter_merged,
    "another adapter": adapter_other,
    "adapter scaled": adapter_scaled,
    "adapter deleted": adapter_deleted,
    "adapter unloaded": adapter_unloaded,
    "adapter merged and unloaded": adapter_merged_and_unloaded,
    "adapter trained, fused": adapter_step_fused,
}
# After these the result is the same up to rounding, so that a kept state may be used.
NEUTRAL = {"float64", "eager kernel", "masked route", "adapter merged", "adapter merged and unloaded"}
NOT_OF_THE_TOWER = {"rotary frequencies"}


def close(actual, expected, name):
    actual, expected = actual.double(), expected.double()
    finite = torch.isfinite(expected)
    actual, expected = actual[finite], expected[finite]
    if name in ("bfloat16", "autocast"):  # within two roundings, of all numbers together
        assert (actual - expected).norm() < 2 * torch.finfo(torch.bfloat16).eps * expected.norm()
    else:
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.fixture(params=CHANGES)
def changed(request):
    """A model, a change of it, and the name of the change; undone afterwards."""
    change = CHANGES[request.param]
    subject = Subject(adapters=getattr(change, "adapters", False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield subject, change, request.param
        subject.stack.close()


def logits(model, ids, images, **kwargs):
    with torch.no_grad():
        return torch.stack(model.generate(ids, pixel_values=images, **OPTIONS, **RECORD, **kwargs).logits, dim=1)


def matters(before, after, name):
    """The change is one that a kept state would show."""
    if name not in NEUTRAL:
        assert (before.double() - after.double()).abs().max() > (1e-3 if name != "autocast" else 1e-6)


def test_an_image_memory_gives_after_a_change_what_a_fresh_one_gives(changed):
    subject, change, name = changed
    ids, images, memory = tokens(2, "I", 3, "I", 2), pixels(0, 1), ImageMemory()
    before = logits(subject.model, ids, images, image_memory=memory)
    change(subject)
    expected = logits(subject.model, ids, images)
    matters(before, expected, name)
    if name == "eager kernel":
        with pytest.raises(ValueError, match="on the sdpa kernel"):
            logits(subject.model, ids, images, image_memory=memory)
        return
    close(logits(subject.model, ids, images, image_memory=memory), expected, name)


@torch.no_grad()
def features(model):
    return torch.stack(model.get_image_features(pixels(0, 1)).pooler_output)


def test_a_cache_of_vision_features_gives_after_a_change_what_a_fresh_one_gives(changed):
    subject, change, name = changed
    subject.model.model.vision_cache = VisionFeatureCache()
    before = features(subject.model)
    change(subject)
    actual = features(subject.model)
    subject.model.model.vision_cache = None
    expected = features(subject.model)
    if name not in NOT_OF_THE_TOWER:
        matters(before, expected, name)
    close(actual, expected, name)


class Recorder:
    """Keeps the scores of every step."""

    def __init__(self):
        self.scores = []

    def __call__(self, ids, scores):
        self.scores.append(scores.clone())
        return scores


def scores_of(session, turn):
    recorder = Recorder()
    session.generate_kwargs["logits_processor"] = LogitsProcessorList([recorder])
    turn(session)
    return torch.stack(recorder.scores, dim=1)


def test_a_chat_session_answers_after_a_change_as_a_new_one(changed):
    subject, change, name = changed
    session = subject.model.start_chat(make_processor(), **OPTIONS)
    session.ask("What is it?", [draw_picture(0)])
    messages = [*copy.deepcopy(session.messages), {"role": "user", "content": [{"type": "text", "text": "So?"}]}]
    change(subject)
    session.model = subject.model
    actual = scores_of(session, lambda session: session.ask("So?"))
    new = ChatSession(subject.model, make_processor(), **OPTIONS)
    close(actual, scores_of(new, lambda session: session.answer(messages)), name)


def test_a_cache_passed_to_generate_is_not_continued_silently_after_a_change(changed):
    subject, change, name = changed
    cache, ids, images = ConversationCache(), tokens(2, "I", 3, "I", 2), pixels(0, 1)
    with torch.no_grad():
        answered = subject.model.generate(ids, pixel_values=images, past_key_values=cache, **OPTIONS)
    longer = torch.cat([answered, tokens(3, seed=4)], dim=1)
    change(subject)
    expected = logits(subject.model, longer, images)
    try:
        actual = logits(subject.model, longer, images, past_key_values=cache)
    except ValueError:
        return
    close(actual, expected, name)


def test_a_hook_that_goes_between_two_turns_is_seen_by_a_cache_passed_to_generate():
    subject, cache = Subject(), ConversationCache()
    ids, images = tokens(2, "I", 3), pixels(0)
    CHANGES["forward hook"](subject)
    answered = subject.model.generate(ids, pixel_values=images, past_key_values=cache, **OPTIONS)
    subject.stack.close()
    longer = torch.cat([answered, tokens(3, seed=4)], dim=1)
    expected = logits(subject.model, longer, images)
    try:
        actual = logits(subject.model, longer, images, past_key_values=cache)
    except ValueError:
        return
    close(actual, expected, "hook")


@pytest.mark.parametrize("kind", ["memory", "features", "session"])
def test_after_freeze_a_plain_step_and_loading_are_still_noticed(kind):
    for name in ("adamw plain", "adamw foreach", "load_state_dict", "load_state_dict assign", "other data"):
        subject = Subject()
        subject.model.freeze()
        if kind == "session":
            session = subject.model.start_chat(make_processor(), **OPTIONS)
            session.ask("What?", [draw_picture(0)])
            key = session.cache.model_key
            CHANGES[name](subject)
            session.ask("So?")
            assert session.cache.model_key != key
            continue
        memory, model = ImageMemory(), subject.model
        model.model.vision_cache = VisionFeatureCache() if kind == "features" else None

        def run(model=model, memory=memory):
            if kind == "features":
                return features(model)
            return logits(model, tokens(2, "I", 3), pixels(0), image_memory=memory)

        run()
        CHANGES[name](subject)
        actual = run()
        model.model.vision_cache = None
        close(actual, run(memory=None), name)


def test_the_key_of_a_decoder_does_not_change_by_itself():
    """A forward pass, in evaluation and in training without dropout, generation and a probe leave the key."""
    subject = Subject()
    key = weights_key(subject.model.model)
    logits(subject.model, tokens(2, "I", 3), pixels(0))
    assert weights_key(subject.model.model) == key
    subject.model.train()
    subject.model(tokens(2, "I", 3), pixels(0))
    subject.model.eval()
    assert weights_key(subject.model.model) == key


def test_the_key_is_that_of_the_weights_wherever_the_checkpoint_is(tmp_path):
    make_model().save_pretrained(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    first, second = (
        VisualChatForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("first", "second")
    )
    assert weights_key(first) == weights_key(second) and weights_key(first.model) == weights_key(second.model)
    second.lm_head.weight.data[0, 0] += 1
    assert weights_key(first) != weights_key(second)


def test_spectral_norm_and_weight_norm_enter_by_what_they_are_computed_from():
    subject, memory = Subject(), ImageMemory()
    projection = subject.model.model.language_model.layers[0].self_attn.k_proj
    parametrizations.weight_norm(projection)
    ids, images = tokens(2, "I", 3), pixels(0)
    before = logits(subject.model, ids, images, image_memory=memory)
    projection.parametrizations.weight.original0.data.mul_(3)
    expected = logits(subject.model, ids, images)
    assert (before - expected).abs().max() > 1e-3
    close(logits(subject.model, ids, images, image_memory=memory), expected, "weight norm")
