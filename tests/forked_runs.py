"""
Runs `finetune.py` many times, each in a fork of one process that has imported everything: a start takes a second.

Reads a run as JSON from each line of its input, and writes how it ended as JSON:

    {"script": "finetune", "flags": […], "processes": 1, "signal": 9, "moment": 30, "delay": 0.01, "log": "FILE"}
    {"codes": [-9]}

A moment is the begin or end of a training or prediction step, or a change in the output folder; `step` instead of
`moment` counts the former only. The signal is sent to all processes, a delay (seconds) after the first one has reached
the moment.
"""

import importlib
import json
import os
import socket
import sys
import time
import traceback
from functools import cache
from pathlib import Path


EXAMPLES = Path(__file__).parents[1] / "examples"
OUTPUTS = {"finetune": "--output_dir", "generate": "--output"}  # by script
EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree", "step")


def run(job: dict) -> dict:
    """Runs one job, and says how its processes ended."""
    size = job.get("processes", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    reader, writer = os.pipe()
    children = []
    for rank in range(size):
        if (child := os.fork()) == 0:
            os.close(reader)
            if size > 1:
                launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in launched.items()} | {"MASTER_ADDR": "127.0.0.1"}
            train(job, writer if rank == 0 else None)
        children.append(child)
    os.close(writer)
    numbers, modules = {"moment": 0, "step": 0}, []
    with os.fdopen(reader) as pipe:
        for line in map(json.loads, pipe):
            if isinstance(line, list):
                modules = line
                continue
            for kind in line.split():
                numbers[kind] += 1
                if numbers[kind] == job.get(kind):
                    time.sleep(job.get("delay", 0.0))
                    for child in children:
                        os.kill(child, job["signal"])
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for name in modules:  # that a fork had to import; the next one has them
        importlib.import_module(name)
    return {"codes": codes}


def train(job: dict, pipe: int | None) -> None:
    """The child: runs the script, and ends without the parent's cleaning up."""
    with open(job["log"], "a") as log:  # of all processes
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = [f"{job['script']}.py", *job["flags"]]
    folder, code = job["flags"][job["flags"].index(OUTPUTS[job["script"]]) + 1], 0
    known = set(sys.modules)
    if pipe is not None:
        sys.addaudithook(lambda event, values: report(event, values, folder, pipe))
    try:
        importlib.import_module(job["script"]).main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
        print(ended, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    if pipe is not None:
        os.write(pipe, (json.dumps(sorted(set(sys.modules) - known)) + "\n").encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def report(event: str, values: tuple, folder: str, pipe: int) -> None:
    """Writes a line for each moment; `shutil.rmtree` removes files by names within an open folder."""
    if event in EVENTS and (not values or str(values[0]).startswith(folder) or event == "os.remove"):
        os.write(pipe, b'"moment step"\n' if event == "step" else b'"moment"\n')


def prepare() -> None:
    """Imports the script, and leaves out of it what the tests do not need: threads, and the demo's report."""
    sys.path.insert(0, str(EXAMPLES))
    import digits.train
    import finetune
    import torch
    from transformers import Trainer

    torch.set_num_threads(1)
    finetune.set_cpu_threads = lambda *arguments: None
    digits.train.report = lambda *arguments: None
    digits.train.load_scans = cache(digits.train.load_scans)
    digits.train.load_scans()
    for name in ("training_step", "prediction_step"):
        setattr(Trainer, name, with_moments(getattr(Trainer, name)))


def with_moments(step):
    """A step with a moment at its begin and at its end."""

    def stepped(*arguments, **options):
        sys.audit("step")
        result = step(*arguments, **options)
        sys.audit("step")
        return result

    return stepped


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to it
    prepare()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
