"""What the digits model has learned: accuracy on held-out scans, a picture of its chats, and the loss curve."""

import random
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import torch
from digits import ONE_IMAGE, TWO_IMAGES, DigitConversations
from matplotlib import pyplot
from tqdm.auto import tqdm
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from modeling_visualchat import VisualChatForConditionalGeneration
from processing_visualchat import VisualChatProcessor


@torch.no_grad()
def hold_conversations(model, processor, conversations: list[list[dict]], batch_size: int = 64) -> list[list[str]]:
    """
    The model's answers to the user's turns of finished conversations, round by round, its own answers as history.

    Args:
        conversations (`list[list[dict]]`): Messages; the assistant's are ignored.

    Returns:
        `list[list[str]]`: for every conversation its answers.
    """
    answers = [[] for _ in conversations]
    histories = [[] for _ in conversations]
    num_rounds = [len(messages) // 2 for messages in conversations]
    for turn in tqdm(range(max(num_rounds)), desc="Chatting about held-out images", unit="round"):
        active = [index for index, rounds in enumerate(num_rounds) if turn < rounds]
        for index in active:
            histories[index].append(conversations[index][2 * turn])
        for start in range(0, len(active), batch_size):
            batch = active[start : start + batch_size]
            inputs = processor.apply_chat_template(
                [histories[index] for index in batch],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left"},
            ).to(model.device)
            generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            texts = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(batch, texts):
                answers[index].append(text.strip())
                histories[index].append({"role": "assistant", "content": text.strip() or "(nothing)"})
    return answers


def most_frequent_answers(scans: list, num_conversations: int = 2000) -> dict[str, str]:
    """The best guess from the text alone: for every question its most frequent answer in training."""
    counts = defaultdict(Counter)
    conversations = DigitConversations(scans, num_conversations, seed=2)
    for index in range(num_conversations):
        for question, _, answer in rounds_of(conversations[index]["messages"]):
            counts[question][answer] += 1
    return {question: counter.most_common(1)[0][0] for question, counter in counts.items()}


def rounds_of(messages: list[dict]) -> list[tuple[str, list, str]]:
    """`(question, images, answer)` of every round."""
    return [
        (user["content"][-1]["text"], [block["image"] for block in user["content"][:-1]], assistant["content"])
        for user, assistant in zip(messages[::2], messages[1::2])
    ]


def evaluate(model, processor, train_scans: list, test_scans: list, num_conversations: int = 300) -> tuple[list, list]:
    """
    Exact match on conversations about held-out scans.

    Returns:
        The rows of the table, `(kind, images, asked, exact match, chance, text-only guess)`, and the chats,
        `(rounds, answers)`.
    """
    conversations = DigitConversations(test_scans, num_conversations, seed=1)
    messages = [conversations[index]["messages"] for index in range(num_conversations)]
    answers = hold_conversations(model, processor, messages)
    guesses = most_frequent_answers(train_scans)
    right, guessed, asked = Counter(), Counter(), Counter()
    chats = []
    for conversation, given in zip(messages, answers):
        rounds = rounds_of(conversation)
        chats.append((rounds, given))
        for (question, _, expected), answer in zip(rounds, given):
            asked[question] += 1
            right[question] += answer == expected
            guessed[question] += guesses[question] == expected
    rows = [
        (
            question.text,
            question.num_images,
            asked[question.text],
            right[question.text] / asked[question.text],
            1 / question.num_answers,
            guessed[question.text] / asked[question.text],
        )
        for question in ONE_IMAGE + TWO_IMAGES
    ]
    return rows, chats


def summarize(rows: list) -> list:
    """One row for the questions about one image and one for those across two, every question asked counting once."""
    summary = []
    for num_images, name in ((1, "all about one image"), (2, "all across two images")):
        of_kind = [row for row in rows if row[1] == num_images]
        total = sum(row[2] for row in of_kind)
        means = [sum(row[column] * row[2] for row in of_kind) / total for column in (3, 4, 5)]
        summary.append((name, num_images, total, *means))
    return summary


def format_table(rows: list) -> str:
    lines = [f"{'question':<30} {'images':>6} {'asked':>6} {'exact match':>12} {'chance':>8} {'text only':>10}"]
    lines += [
        f"{kind:<30} {images:>6} {asked:>6} {match:>12.1%} {chance:>8.1%} {guess:>10.1%}"
        for kind, images, asked, match, chance, guess in rows
    ]
    return "\n".join(lines)


def draw_chats(chats: list, path: Path, num_chats: int = 6) -> None:
    """A picture of some chats: the images as they are shown, the questions, and answers in green or red."""
    figure, axes = pyplot.subplots(2, num_chats // 2, figsize=(4.2 * num_chats / 2, 10))
    for axis, (rounds, answers) in zip(axes.flat, chats[:num_chats]):
        axis.set_axis_off()
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        height = 1.0
        number = 0
        for (question, images, expected), answer in zip(rounds, answers):
            for image in images:
                number += 1
                inset = axis.inset_axes([0.42 * ((number - 1) % 2) + 0.02, height - 0.14, 0.3, 0.13])
                inset.imshow(image, cmap="gray", interpolation="nearest")
                inset.set_xticks([])
                inset.set_yticks([])
                inset.set_title(f"Image {number}", fontsize=8, pad=2)
            height -= 0.20 if images else 0.02
            axis.text(0.02, height, question, fontsize=10, va="top", family="monospace")
            is_right = answer == expected
            shown = answer if is_right else f"{answer or '(nothing)'}  (it is: {expected})"
            axis.text(0.02, height - 0.04, shown, fontsize=10, va="top", color="green" if is_right else "red", weight="bold")
            height -= 0.09
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_loss(log_history: list[dict], path: Path) -> None:
    points = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    figure, axis = pyplot.subplots(figsize=(7, 4))
    axis.plot(*zip(*points))
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss (nats a token)")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def report(folder: str, train_scans: list, test_scans: list, log_history: list[dict], num_conversations: int = 300) -> list:
    """Loads the checkpoint just saved, evaluates it, and leaves the table, the pictures and some scans beside it."""
    folder = Path(folder)
    unset_hf_deepspeed_config()
    model = VisualChatForConditionalGeneration.from_pretrained(folder).eval()
    processor = VisualChatProcessor.from_pretrained(folder)
    rows, chats = evaluate(model, processor, train_scans, test_scans, num_conversations)
    summary = summarize(rows)
    table = format_table([*rows, *summary])
    (folder / "accuracy.txt").write_text(table + "\n")
    draw_chats(chats, folder / "chats.png")
    draw_loss(log_history, folder / "loss.png")
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    sample = random.Random(0).sample(test_scans, 10)
    for index, (image, digit) in enumerate(sample):
        image.resize((128, 128), resample=0).save(pictures / f"{index}-is-{digit}.png")
    first, second = (f"{pictures}/{index}-is-{digit}.png" for index, (_, digit) in enumerate(sample[:2]))
    print(
        f"\nExact match on {len(test_scans)} scans that training never saw\n\n{table}\n\n"
        f"Chats: {folder / 'chats.png'}    loss: {folder / 'loss.png'}    checkpoint: {folder}\n"
        f"Talk to it:\n\n    python examples/chat.py {folder} --image {first} --image {second}\n"
    )
    return summary
