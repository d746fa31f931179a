"""
Many conversations about the same images, which read one copy of their keys and values.

    python examples/benchmarks/conversations.py                       # 64 conversations, 20 images, a few minutes
    python examples/benchmarks/conversations.py --conversations 8 --images 4 --repeats 2

Four tables: attention of one token of each conversation, with a copy of the images in each and by reference; decoding
one token of each, in a batch and one after the other; the time to the first token of a conversation whose images are
in an image memory, beside that of a prefill; and what an image memory in 8 or 4 bits takes, and its error.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

import torch
from attention import SMALL, build
from measuring import DEVICE, DTYPE, Measured, compare
from torch import nn

from modeling_visualchat import ConversationCache, ImageMemory
from modeling_visualchat.placed_images_visualchat import Place, PlacedImages
from modeling_visualchat.plan_visualchat import Run


LENGTH = 256  # tokens of an image
NUM_TEXT = 32  # text tokens of a conversation
HEADS, SIZE = 8, 64


def show(title: str, rows: dict[str, Measured], mebibytes: dict[str, float] | None = None) -> None:
    """Prints a table; ratios are to its first row."""
    print(f"\n{title:<52}  ratio       quartiles        ms  MiB of images")
    for name, each in rows.items():
        low, high = each.quartiles
        held = "" if mebibytes is None else f"{mebibytes[name]:,.1f}"
        print(f"{name:<52} {each.ratio:6.3f}  {low:.3f} to {high:.3f}  {1000 * each.seconds:8.1f}  {held:>13}")


@torch.no_grad()
def attention(num_conversations: int, num_images: int, repeats: int) -> None:
    """One attention layer of one token of each conversation."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=DTYPE)

    keys, values = (draw(num_images, HEADS, LENGTH, SIZE) for _ in range(2))
    query = draw(num_conversations, HEADS, 1, SIZE)
    rows = [[Place(image, 0, LENGTH, 0) for image in range(num_images)]] * num_conversations
    placed = PlacedImages([list(keys)], [list(values)], rows)
    copies = [states.contiguous() for states in placed.of_layer(0, query).keys_values()]
    runs = [[Run(0, 1, 0, num_images * LENGTH)]] * num_conversations

    def by_reference():
        images = placed.of_layer(0, query)
        reads = images.reads(runs, 1)
        assert reads is not None
        return reads.attend(query, images, None)

    def in_copies():
        return nn.functional.scaled_dot_product_attention(query, *copies).transpose(1, 2)

    torch.testing.assert_close(by_reference(), in_copies(), rtol=1e-2, atol=1e-2 if DTYPE is torch.bfloat16 else 1e-4)
    measured = compare({"a copy in each conversation": in_copies, "by reference": by_reference}, repeats)
    held = [sum(states.nbytes for states in kept) / 2**20 for kept in (copies, (keys, values))]
    show(f"attention, one token of {num_conversations} conversations", measured, dict(zip(measured, held)))


@torch.no_grad()
def decoding(num_conversations: int, num_images: int, repeats: int) -> None:
    """One token of each conversation through the decoder, and the first token of one conversation."""
    model = build((num_images, LENGTH, NUM_TEXT), {}, 8, SMALL)
    size, memory = model.config.vision_config.image_size, ImageMemory()
    images = torch.randn(num_images, 3, size, size, device=DEVICE, dtype=DTYPE)
    model.freeze()
    states = memory.get_states(model, images)
    ids = torch.full((1, num_images * LENGTH + NUM_TEXT), 7, device=DEVICE)
    ids[:, : num_images * LENGTH] = model.config.image_token_id
    types = nn.functional.pad((ids == model.config.image_token_id).long(), (0, 1))
    position = torch.tensor([[ids.shape[1]]], device=DEVICE)

    def start(rows: int) -> ConversationCache:
        cache = ConversationCache()
        shown = states.select([*range(num_images)] * rows)
        model(ids.expand(rows, -1), image_states=shown, past_key_values=cache, logits_to_keep=1)
        return cache

    together, alone = start(num_conversations), [start(1) for _ in range(num_conversations)]

    def step(cache: ConversationCache) -> None:
        rows = cache.num_rows
        model(
            ids[:, -1:].expand(rows, -1),
            mm_token_type_ids=types.expand(rows, -1),
            position_ids=position.expand(rows, -1),
            past_key_values=cache,
        )
        cache.crop(-1)

    variants = {
        "one after the other": lambda: [step(cache) for cache in alone],
        "together": lambda: step(together),
    }
    measured = compare(variants, repeats)
    held = {"one after the other": image_bytes(*alone) / 2**20, "together": image_bytes(together) / 2**20}
    show(f"decoding, one token of {num_conversations} conversations", measured, held)

    order = torch.randperm(num_images).tolist()

    def first_token(image_memory: ImageMemory | None) -> None:
        model.generate(ids, pixel_values=images[order], image_memory=image_memory, max_new_tokens=1, do_sample=False)

    variants = {"no image known": lambda: first_token(None), "all images known": lambda: first_token(memory)}
    show(f"first token, {num_images} images in any order", compare(variants, repeats))
    exact = model(ids, image_states=states, logits_to_keep=1).logits
    print("\nimages kept in few bits                               MiB  relative error of the logits")
    for bits in (None, 8, 4):
        memory = ImageMemory(bits=bits)
        kept = memory.get_states(model, images)
        error = (model(ids, image_states=kept, logits_to_keep=1).logits - exact).norm() / exact.norm()
        name = "as computed" if bits is None else f"{bits} bits"
        size = sum(states.nbytes for layer in (*kept.keys, *kept.values) for states in layer) / 2**20
        print(f"{name:<52} {size:6.1f}  {float(error):.5f}")


def image_bytes(*caches: ConversationCache) -> int:
    """The bytes of the keys and values of images that caches hold or refer to."""
    tensors = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for cache in caches
        if cache.placed_images is not None
        for layer in (*cache.placed_images.keys, *cache.placed_images.values)
        for tensor in layer
    }
    return sum(tensors.values())


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=64, help="number of conversations")
    parser.add_argument("--images", type=int, default=20, help="images that each of them shows")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats of each measurement")
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = (arguments.conversations, arguments.images, arguments.repeats)
    print(f"{arguments.conversations} conversations, {arguments.images} images of {LENGTH} tokens, {DTYPE}, {DEVICE}")
    attention(*sizes)
    decoding(*sizes)


if __name__ == "__main__":
    main()
