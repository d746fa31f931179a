"""A folder of entries that processes share: at its limit, and beside processes that remove what is being read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, pixels
from test_finetune import environment

from modeling_visualchat import ImageMemory, VisionFeatureCache
from modeling_visualchat.tensor_store_visualchat import TensorStore


KEYS = [f"{number:040x}-{number:040x}" for number in range(20)]


def entry(number: int, size: int = 64) -> dict[str, torch.Tensor]:
    return {"keys.0": torch.full((size,), float(number)), "values.0": torch.arange(size) + number}


@pytest.fixture
def folder(tmp_path):
    TensorStore(folder=tmp_path)._put(KEYS[1], entry(1))
    return tmp_path


def test_a_file_that_goes_between_its_two_openings_is_a_miss(folder, monkeypatch):
    """`safe_open` reads the header through one opening and maps the tensors through another one."""
    opened = []
    from_file = torch.UntypedStorage.from_file

    def gone(filename, *args, **kwargs):
        opened.append(filename)
        Path(filename).unlink(missing_ok=True)
        return from_file(filename, *args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", gone)
    assert TensorStore(folder=folder)._get(KEYS[1], torch.device("cpu")) is None
    assert opened, "safetensors opens a file once; this test no longer tests anything"


def test_a_file_that_goes_before_its_time_is_set_is_still_read(folder, monkeypatch):
    utime = os.utime

    def gone(path, *args):
        Path(path).unlink(missing_ok=True)
        return utime(path, *args)

    monkeypatch.setattr(os, "utime", gone)
    found = TensorStore(folder=folder)._get(KEYS[1], torch.device("cpu"))
    assert torch.equal(found["keys.0"], entry(1)["keys.0"])


@pytest.mark.parametrize("error", [RuntimeError, OSError, ValueError])
def test_whatever_a_read_raises_is_a_miss(folder, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error("unable to open file <x> in read-only mode: No such file or directory (2)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", fail)
    with pytest.warns(UserWarning, match="cannot be used and is computed again"):
        assert TensorStore(folder=folder)._get(KEYS[1], torch.device("cpu")) is None


def test_a_file_that_is_cut_while_it_is_mapped_is_not_used(folder):
    path = folder / f"{KEYS[1]}.safetensors"
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.warns(UserWarning, match="cannot be used"):
        assert TensorStore(folder=folder)._get(KEYS[1], torch.device("cpu")) is None


def test_an_entry_read_does_not_hold_on_to_its_file(folder):
    """An entry whose file is overwritten in place keeps its values."""
    found = TensorStore(folder=folder)._get(KEYS[1], torch.device("cpu"))
    path = folder / f"{KEYS[1]}.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(found["keys.0"], entry(1)["keys.0"])


@pytest.mark.parametrize("what", ["stat", "unlink"])
def test_files_that_go_while_the_folder_shrinks_end_nothing(folder, monkeypatch, what):
    store = TensorStore(folder=folder, max_disk_bytes=1)
    original = getattr(Path, what)

    def gone(self, *args, **kwargs):
        if self.suffix == ".safetensors" and self.parent == folder and os.path.exists(self):
            os.unlink(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, what, gone)
    store._put(KEYS[2], entry(2))


def test_a_folder_that_goes_ends_nothing(folder):
    store = TensorStore(folder=folder, max_bytes=0)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert store._get(KEYS[1], torch.device("cpu")) is None
    store._put(KEYS[2], entry(2))
    assert store._get(KEYS[2], torch.device("cpu")) is not None


WORKER = """
import sys, random, warnings
import torch
from conftest import make_model, pixels
from modeling_visualchat import ImageMemory, VisionFeatureCache

folder, seed, rounds, kind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
warnings.simplefilter("error")
model = make_model().requires_grad_(False).model
names = {"memory": ImageMemory, "features": VisionFeatureCache}
store = names[kind](max_bytes=0, folder=folder, max_disk_bytes=int(sys.argv[5]))
rng = random.Random(seed)
with torch.no_grad():
    expected = {image: model.compute_image_states(pixels(image)).outputs for image in range(8)}
    features = {image: model.get_image_features(pixels(image)).pooler_output[0] for image in range(8)}
    for _ in range(rounds):
        images = rng.sample(range(8), 2)
        if kind == "memory":
            found = store.get_states(model, pixels(*images)).outputs
            right = torch.cat([expected[image] for image in images])
        else:
            model.vision_cache = store
            found = torch.stack(model.get_image_features(pixels(*images)).pooler_output)
            right = torch.stack([features[image] for image in images])
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
print(store.hits, store.misses)
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("kind", ["memory", "features"])
def test_processes_at_the_limit_of_a_folder_end_none_of_them(tmp_path, kind):
    """Three entries of room for eight images: nearly every write of a process removes what another one reads."""
    one = {"memory": ImageMemory, "features": VisionFeatureCache}[kind](folder=tmp_path)
    model = make_model().requires_grad_(False).model
    if kind == "memory":
        one.get_states(model, pixels(0))
    else:
        model.vision_cache = one
        with torch.no_grad():
            model.get_image_features(pixels(0))
    limit = 3 * next(tmp_path.iterdir()).stat().st_size
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    variables = {**environment(), "OMP_NUM_THREADS": "1"}
    tests = str(Path(__file__).parent)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [tests, variables.get("PYTHONPATH"), *sys.path]))
    workers = [
        subprocess.Popen(
            [*command, str(seed), "200", kind, str(limit)], env=variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for seed in range(2)
    ]  # fmt: skip
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], [error[-2000:] for _, error in outputs]
    for output, _ in outputs:
        hits, misses = map(int, output.split()[-2:])
        assert hits > 0 and misses > 8
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= 2 * limit
    assert not list(tmp_path.glob("*.part"))
