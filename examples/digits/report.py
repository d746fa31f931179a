"""Evaluates the digits model: accuracy on held-out scans, a picture of its chats, and the loss curve."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path

import torch
from drawn_chats import draw_chats
from huggingface_hub import EvalResult
from matplotlib import pyplot
from tqdm.auto import tqdm
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from modeling_visualchat import VisualChatForConditionalGeneration
from modeling_visualchat.model_card_visualchat import CARD, VisualChatCard
from processing_visualchat import VisualChatProcessor

from .conversations import OF_ONE, OF_TWO, DigitConversations, Question


@torch.no_grad()
def hold_conversations(model, processor, conversations: list[list[dict]], batch_size: int = 64) -> list[list[str]]:
    """
    Answers the user turns of conversations round by round, with the model's own answers as history.

    Args:
        conversations (`list[list[dict]]`): Messages; those of the assistant are ignored.

    Returns:
        `list[list[str]]`: the answers of each conversation.
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
    """The text-only baseline: the most frequent answer to each question in training."""
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
        The rows of the table, `(name, asked, exact match, chance, text only)`: one for each question, then all
        questions about one image, all across two images, and those across two images that open a conversation, where
        no earlier answer has named a digit. And the chats, `(rounds, answers)`.
    """
    conversations = DigitConversations(test_scans, num_conversations, seed=1)
    messages = [conversations[index]["messages"] for index in range(num_conversations)]
    answers = hold_conversations(model, processor, messages)
    guesses = most_frequent_answers(train_scans)
    chats = [(rounds_of(conversation), given) for conversation, given in zip(messages, answers)]
    questions = {question.text: question for question in OF_ONE + OF_TWO}
    asked = [
        (questions[text], turn, answer == expected, guesses[text] == expected)
        for rounds, given in chats
        for turn, ((text, _, expected), answer) in enumerate(zip(rounds, given))
    ]
    rows = [summarize(text, [entry for entry in asked if entry[0].text == text]) for text in questions]
    across = [entry for entry in asked if entry[0].num_images == 2]
    rows += [
        summarize("all about one image", [entry for entry in asked if entry[0].num_images == 1]),
        summarize("all across two images", across),
        summarize("  of these, asked first", [entry for entry in across if entry[1] == 0]),
    ]
    return rows, chats


def summarize(name: str, asked: list[tuple[Question, int, bool, bool]]) -> tuple[str, int, float, float, float]:
    """A row of the table from `(question, turn, is right, text-only guess is right)` of each question asked."""
    total = len(asked)
    chance = sum(1 / question.num_answers for question, *_ in asked) / total
    return name, total, sum(entry[2] for entry in asked) / total, chance, sum(entry[3] for entry in asked) / total


def format_table(rows: list) -> str:
    lines = [f"{'question':<30} {'asked':>6} {'exact match':>12} {'chance':>8} {'text only':>10}"]
    lines += [
        f"{name:<30} {asked:>6} {match:>12.1%} {chance:>8.1%} {guess:>10.1%}"
        for name, asked, match, chance, guess in rows
    ]
    return "\n".join(lines)


def draw_loss(log_history: list[dict], path: Path) -> None:
    points = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    figure, axis = pyplot.subplots(figsize=(7, 4))
    axis.plot(*zip(*points))
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss (nats/token)")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def add_to_card(folder: Path, rows: list) -> None:
    """Adds the table to the model card of the checkpoint, and its sums to the metadata."""
    card = VisualChatCard.load(folder / CARD)
    card.write("results", "digits", f"Exact match on held-out scans:\n\n```\n{format_table(rows)}\n```")
    card.data.model_name = folder.absolute().name
    card.data.eval_results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="digits",
            dataset_name="questions about held-out scans of handwritten digits",
            dataset_config=name,
            metric_type="exact_match",
            metric_value=round(match, 4),
        )
        for name, _, match, *_ in rows
        if name.startswith("all")
    ]
    card.save(folder / CARD)


def write_examples(folder: Path, digits: list[int]) -> None:
    """Writes questions about the pictures of a checkpoint, which `web_demo.py` offers."""
    lines = []
    for question in (OF_ONE[0], *OF_TWO[2:]):
        blocks = [{"type": "image", "path": f"pictures/{index}-is-{digit}.png"} for index, digit in enumerate(digits)][
            : question.num_images
        ]
        user = {"role": "user", "content": [*blocks, {"type": "text", "text": question.text}]}
        answer = {"role": "assistant", "content": question.answer(*digits[: question.num_images])}
        lines.append(json.dumps({"messages": [user, answer]}) + "\n")
    (folder / "examples.jsonl").write_text("".join(lines))


def report(
    folder: str, train_scans: list, test_scans: list, log_history: list[dict], num_conversations: int = 300
) -> list:
    """Evaluates a saved checkpoint, and writes the table, the pictures and some scans into its folder."""
    folder = Path(folder)
    unset_hf_deepspeed_config()
    model = VisualChatForConditionalGeneration.from_pretrained(folder).eval()
    processor = VisualChatProcessor.from_pretrained(folder)
    rows, chats = evaluate(model, processor, train_scans, test_scans, num_conversations)
    table = format_table(rows)
    (folder / "accuracy.txt").write_text(table + "\n")
    add_to_card(folder, rows)
    draw_chats(chats[:8], folder / "chats.png")
    draw_loss(log_history, folder / "loss.png")
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    sample = random.Random(0).sample(test_scans, 10)
    for index, (image, digit) in enumerate(sample):
        image.resize((128, 128), resample=0).save(pictures / f"{index}-is-{digit}.png")
    write_examples(folder, [digit for _, digit in sample])
    first, second = (f"{pictures}/{index}-is-{digit}.png" for index, (_, digit) in enumerate(sample[:2]))
    print(
        f"\nExact match on {len(test_scans)} held-out scans\n\n{table}\n\n"
        f"Chats: {folder / 'chats.png'}    loss: {folder / 'loss.png'}    checkpoint: {folder}\n"
        f"Talk to it:\n\n    python examples/chat.py {folder} --image {first} --image {second}\n"
        f"    python examples/web_demo.py {folder}\n"
    )
    return rows
