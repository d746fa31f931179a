"""A real language model and a real vision encoder, joined for the study: frozen, but for projector and embeddings."""

import random
from collections import defaultdict
from pathlib import Path

import torch
from packaged_parts import save_dinov2, save_smollm2
from picture_tasks import NUM_VARIANTS
from pictures import SIZE, Picture
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from modeling_visualchat import VisionFeatureCache, VisualChatForConditionalGeneration
from modeling_visualchat.weights_key_visualchat import freeze
from processing_visualchat import VisualChatProcessor


IMAGE_SEQ_LENGTH = 16
FEATURE_LAYER = -2  # the last is tuned for saliency
TEMPERATURE = 0.07  # of the softmax over cosines


def save_parts(folder: Path) -> None:
    """Writes both parts as checkpoints, unless they are there."""
    for name, save in (("dinov2", save_dinov2), ("smollm2", save_smollm2)):
        if not (folder / name / "model.safetensors").exists():
            save(folder / name)


def build_pretrained(
    folder: Path, chat_template: str, **config_kwargs
) -> tuple[VisualChatForConditionalGeneration, VisualChatProcessor]:
    """
    Joins the parts in a folder by a perceiver.

    Features of images are kept in the folder. New image tokens are as large as embeddings of words (the standard
    deviation over all numbers).

    Args:
        folder (`Path`): Where [`save_parts`] has written them.
        chat_template (`str`): That of the processor.
        config_kwargs: Fields of [`VisualChatConfig`], as the attention type.
    """
    vision, text = str(folder / "dinov2"), str(folder / "smollm2")
    model = VisualChatForConditionalGeneration.from_vision_text_pretrained(
        vision,
        text,
        projector_type="perceiver",
        image_seq_length=IMAGE_SEQ_LENGTH,
        vision_feature_layer=FEATURE_LAYER,
        **config_kwargs,
    )
    processor = VisualChatProcessor.from_vision_text_pretrained(
        vision, text, IMAGE_SEQ_LENGTH, chat_template=chat_template
    )
    processor.image_processor.size = {"shortest_edge": SIZE}
    model.model.vision_cache = VisionFeatureCache(device="cpu", folder=folder / "features")
    freeze(model.model.vision_tower)
    with torch.no_grad():
        projector = model.model.multi_modal_projector
        projector.linear.weight *= model.get_input_embeddings().weight.std() / (
            projector.linear.weight.std() * projector.linear.in_features**0.5
        )
    return model, processor


def draw_features(
    model: VisualChatForConditionalGeneration,
    processor: VisualChatProcessor,
    pictures: list[Picture],
    variants: list[int],
) -> torch.Tensor:
    """Features (N, patches and class token, vision hidden) of variants of pictures, from the cache if possible."""
    images = [picture.render(variant) for picture, variant in zip(pictures, variants)]
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return model.model.vision_cache.get_features(model.model, pixel_values, [FEATURE_LAYER], "full")


def fit_projector(
    model: VisualChatForConditionalGeneration,
    processor: VisualChatProcessor,
    pictures: list[Picture],
    steps: int,
    seed: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
) -> None:
    """
    Fits the projector to the names of pictures, without the language model, as a start for training with it.

    Each image token is to point where the embedding of its name does (the mean over the tokens of the name), among the
    names of all pictures: a softmax over cosines. It is to be as long as they are. Every name is drawn equally often.
    """
    rng = random.Random(seed)
    by_name: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        by_name[picture.concept].append(picture)
    names = sorted(by_name)
    targets = embed_names(model, processor, names)
    length, directions = targets.norm(dim=-1).mean(), nn.functional.normalize(targets, dim=-1)
    projector = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    for _ in range(steps):
        drawn = rng.sample(range(len(names)), batch_size)
        shown = [rng.choice(by_name[names[index]]) for index in drawn]
        features = draw_features(model, processor, shown, [rng.randrange(NUM_VARIANTS) for _ in shown])
        tokens = projector(features)
        logits = nn.functional.normalize(tokens, dim=-1) @ directions.T / TEMPERATURE
        labels = torch.tensor(drawn).repeat_interleave(tokens.shape[1])
        excess = tokens.norm(dim=-1) / length - 1
        (nn.functional.cross_entropy(logits.flatten(0, 1), labels) + excess.pow(2).mean()).backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@torch.no_grad()
def embed_names(
    model: VisualChatForConditionalGeneration, processor: VisualChatProcessor, names: list[str]
) -> torch.Tensor:
    """Embeddings (names, text hidden), each the mean over the tokens of a name."""
    embeddings = model.get_input_embeddings().weight
    return torch.stack([embeddings[processor.tokenizer(f" {name}")["input_ids"]].mean(dim=0) for name in names])
