"""
Seeds faults into a copy of the code, one at a time, and checks that the tests catch each.

    python tests/seeded_faults.py             # all of them, some minutes; the exit status is 1 if one is missed
    python tests/seeded_faults.py window      # those whose names contain a word
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parent.parent
COPIED = ("configuration_visualchat", "modeling_visualchat", "processing_visualchat", "examples", "tests")


@dataclass(frozen=True)
class Fault:
    """A change of one line of `modeling_visualchat/`, and the tests that have to catch it."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]

    def seed(self, root: Path) -> None:
        """Puts the fault into a copy of the repository; a `ValueError` if the line is not there exactly once."""
        path = root / "modeling_visualchat" / f"{self.file}_visualchat.py"
        text = path.read_text()
        if text.count(self.right) != 1:
            raise ValueError(f"{path.name} has {text.count(self.right)} times {self.right!r}; update the fault.")
        path.write_text(text.replace(self.right, self.wrong))


FAULTS = (
    Fault(
        "queries turned the wrong way to images",
        "placed_images",
        "like, backwards=True)",
        "like, backwards=False)",
        ("test_shared_images.py", "-k", "by_reference"),
    ),
    Fault(
        "the factor of a rotation taken a second time",
        "key_rotation",
        "(cos / factor, ",
        "(cos, ",
        ("test_shared_images.py", "-k", "scaled_rotation"),
    ),
    Fault(
        "images of a row that joins taken for others",
        "placed_images",
        "numbers[place.image]) for place in more",
        "place.image) for place in more",
        ("test_shared_images.py", "-k", "join"),
    ),
    Fault(
        "an image prefix short by one",
        "plan",
        "torch.searchsorted(image, text) + past_images",
        "(torch.searchsorted(image, text) - 1).clamp(min=0) + past_images",
        ("test_exactness.py",),
    ),
    Fault(
        "keys of images a position late",
        "key_rotation",
        "rotary(like, position_ids, *layer_type)",
        "rotary(like, position_ids + 1, *layer_type)",
        ("test_image_memory.py", "-k", "exact_too"),
    ),
    Fault(
        "a wrong image reused",
        "image_memory",
        "{image_key(image)}",
        "{image_key(unique[0])}",
        ("test_image_memory.py", "-k", "those_without"),
    ),
    Fault(
        "attention across packed conversations",
        "plan",
        "    if plan.text_lengths is None:",
        "    if True:",
        ("test_plan.py", "-k", "packed"),
    ),
    Fault(
        "text that reads an image before the last one",
        "plan",
        "run.first_key + n * image_seq_length)",
        "max(run.first_key, run.first_key + n * image_seq_length - 1))",
        ("test_attention_types.py", "-k", "both_routes and last"),
    ),
    Fault(
        "joint text that reads the next token",
        "plan",
        ".tril(start - first)",
        ".tril(start - first + 1)",
        ("test_attention_types.py", "-k", "both_routes and joint"),
    ),
    Fault(
        "a window too long",
        "route",
        "_longest_sequence(inputs) >= window",
        "_longest_sequence(inputs) >= 100 * window",
        ("test_plan.py", "test_generation.py", "-k", "window"),
    ),
    Fault(
        "a crop that forgets images",
        "cache",
        "[[(start, key) for start, key in row if start < length] for row in self.images]",
        "[[] for row in self.images]",
        ("test_image_memory.py", "-k", "earlier_round"),
    ),
    Fault(
        "a changed image taken for the cached one",
        "cache",
        "differs[row, start] |= known.get(start) != key",
        "pass",
        ("test_conversation_states.py",),
    ),
    Fault(
        "versions of frozen weights ignored",
        "weights_key",
        "if frozen[0] == versions:",
        "if frozen[0] is not None:",
        ("test_weights_key.py", "-k", "after_freeze"),
    ),
    Fault(
        "weights that are not in the key",
        "weights_key",
        "    digest.update(_checksum_of_weights(module))\n",
        "",
        ("test_weights_key.py", "-k", "image_memory"),
    ),
)


def is_caught(fault: Fault) -> bool:
    """Whether a test fails with the fault in place."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in COPIED:
            shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "hub_card.md"):
            shutil.copy(REPOSITORY / name, root)
        fault.seed(root)
        files = [str(root / "tests" / part) if part.endswith(".py") else part for part in fault.tests]
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *files]
        variables = {**os.environ, "PYTHONPATH": str(root)}
        run = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True)
    if run.returncode not in (0, 1):
        raise RuntimeError(f"The tests of {fault.name!r} did not run:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == 1


def main(words: list[str]) -> int:
    chosen = [fault for fault in FAULTS if all(word in fault.name for word in words)]
    missed = 0
    for fault in chosen:
        caught = is_caught(fault)
        missed += not caught
        print(f"{'caught' if caught else 'MISSED'}  {fault.name}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
