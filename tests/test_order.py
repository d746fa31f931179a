"""The same samples in the same order, on any number of processes and after a resume in the middle of an epoch."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import draw_picture
from record_order import SAVE_STEP
from test_finetune import environment


SCRIPT = Path(__file__).with_name("record_order.py")


def record(num_processes, config, output, *checkpoint):
    """For every step the conversations of all ranks, in the order of ranks."""
    output.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_processes]
    completed = subprocess.run(
        [*map(str, command), str(SCRIPT), str(config), str(output), *map(str, checkpoint)],
        env=environment(), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-3000:]
    ranks = [json.loads((output / f"{rank}.json").read_text()) for rank in range(num_processes)]
    return [[where for batch in batches for where in batch] for batches in zip(*ranks)]


@pytest.mark.slow
@pytest.mark.processes
def test_order_is_the_same_on_any_number_of_processes_and_after_a_resume(tmp_path):
    rng = random.Random(0)
    records = []
    for number in range(150):
        if number < 10:
            draw_picture(number).save(tmp_path / f"{number}.png")
        question = {"from": "human", "value": "<image>Hm?"}
        turns = [question, {"from": "gpt", "value": "y" * rng.randrange(1, 90)}]
        records.append({"conversations": turns, "image": f"{number % 10}.png"})
    (tmp_path / "x.json").write_text(json.dumps(records))
    config = tmp_path / "mixture.yaml"
    config.write_text(
        f"data_root: {tmp_path}\nseed: 5\neval_share: 0.2\nsources: [{{name: x, path: x.json, concatenate: 2}}]"
    )
    alone = record(1, config, tmp_path / "one")
    assert len(alone) > 2 * SAVE_STEP and alone[0] != alone[len(alone) // 2]
    for num_processes in (2, 4):
        assert record(num_processes, config, tmp_path / str(num_processes)) == alone
    checkpoint = tmp_path / "2" / "run" / f"checkpoint-{SAVE_STEP}"
    assert record(2, config, tmp_path / "resumed", checkpoint) == alone[SAVE_STEP:]
