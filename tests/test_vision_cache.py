"""Vision features of a frozen tower: computed once, the same as without a cache, and never of something else."""

import copy
import pickle
import warnings

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, make_model, pixels, tokens

from modeling_visualchat import VisionFeatureCache


def make_trainee(**kwargs):
    """A model whose projector and embeddings learn, and a list of the batches that its tower has seen."""
    model = make_model(**kwargs).set_trainable().train()
    run, seen = model.model._run_vision_tower, []

    def count(pixel_values, **options):
        seen.append(len(pixel_values))
        return run(pixel_values, **options)

    model.model._run_vision_tower = count
    return model, seen


def learn(model, *seeds):
    ids = tokens(2, *["I", 1] * len(seeds))
    output = model(ids, pixels(*seeds), labels=ids.masked_fill(ids == IMAGE_TOKEN_ID, -100))
    model.zero_grad()
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), gradients


@pytest.mark.parametrize("projector_type", ["linear", "vit"])
def test_training_is_the_same_and_the_tower_runs_once_an_image(tmp_path, projector_type):
    plain, _ = make_trainee(projector_type=projector_type)
    model, seen = make_trainee(projector_type=projector_type)
    model.model.vision_cache = VisionFeatureCache(folder=tmp_path)
    for seeds in ((0, 1), (1, 2, 1), (0, 2), (2, 0, 1)):
        loss, gradients = learn(model, *seeds)
        expected_loss, expected = learn(plain, *seeds)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == expected.keys() and any("projector" in name for name in expected)
        for name in expected:
            torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-5)
    assert seen == [2, 1] and len(list(tmp_path.iterdir())) == 3
    assert (model.model.vision_cache.hits, model.model.vision_cache.misses) == (6, 3)
    other, seen = make_trainee(projector_type=projector_type)
    other.model.vision_cache = VisionFeatureCache(folder=tmp_path)
    learn(other, 0, 1, 2)
    assert seen == []
    assert copy.deepcopy(other.model).vision_cache is other.model.vision_cache


def change_weight(model):
    model.model.vision_tower.requires_grad_(False)
    parameter = max(model.model.vision_tower.parameters(), key=torch.numel)
    with torch.no_grad():
        parameter[0, 0] += 1e-3


def change_layer(model):
    model.config.vision_feature_layer = model.model.config.vision_feature_layer = -2


def change_dtype(model):
    model.model.vision_tower.double()
    model.model.multi_modal_projector.double()


@pytest.mark.parametrize("change", [change_weight, change_layer, change_dtype])
def test_another_tower_or_layer_is_a_miss(change):
    model, seen = make_trainee()
    model.model.vision_cache = VisionFeatureCache()
    with torch.no_grad():
        model.get_image_features(pixels(0))
        change(model)
        actual = model.get_image_features(pixels(0)).pooler_output[0]
        model.model.vision_cache = None
        expected = model.get_image_features(pixels(0)).pooler_output[0]
    assert seen == [1, 1, 1]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_tower_that_learns_or_drops_out_is_refused():
    model, _ = make_trainee()
    model.model.vision_cache = VisionFeatureCache()
    model.set_trainable("vision_tower")
    with pytest.raises(ValueError, match="The vision tower is trained"):
        learn(model, 0)
    model.set_trainable()
    next(part for part in model.model.vision_tower.modules() if hasattr(part, "dropout")).dropout = 0.1
    with pytest.raises(ValueError, match="dropout is on"):
        learn(model, 0)
    learn(model.eval(), 0)
    fresh = make_model()  # whose tower could learn, but not here
    fresh.model.vision_cache = VisionFeatureCache()
    fresh.generate(tokens(2, "I", 3), pixel_values=pixels(0), max_new_tokens=2)
    assert fresh.model.vision_cache.misses == 1
    copied = pickle.loads(pickle.dumps(fresh.model.vision_cache))
    assert len(copied) == 0 and copied.misses == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_features_too(reentrant):
    model, seen = make_trainee()
    plain, _ = make_trainee()
    model.model.vision_cache = VisionFeatureCache()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):
        loss, gradients = learn(model, 0, 1)
    expected_loss, expected = learn(plain, 0, 1)
    assert seen == [2] and model.model.vision_cache.hits == 2
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-5)


def test_a_hooked_tower_runs_and_says_so_once():
    model, seen = make_trainee()
    model.model.vision_cache = VisionFeatureCache()
    hook = model.model.vision_tower.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="are not cached: .* has hooks"):
        learn(model, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(model, 0)
        hook.remove()
        learn(model, 0)
        learn(model, 0)
    assert seen == [1, 1, 1] and model.model.vision_cache.hits == 1
