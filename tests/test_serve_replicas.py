"""Replicas on Ray Serve answer as one server does; a conversation is sent to the replica that has its image."""

import asyncio
import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import serve_replicas
from conftest import draw_picture, make_processor
from test_finetune import EXAMPLES
from test_serve import KEYS, direct, make_endless_model, show, stream, until, uri


pytestmark = [pytest.mark.slow, pytest.mark.processes]
FLAGS = ["--port", "0", "--name", "tiny", "--replicas", "2", "--cpus", "0.5", "--gpus", "0", "--max_batch", "2"]


def processes_with(folder):
    """The processes that were started with a folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The script: its process, its clients, and its model."""
    model, checkpoint = make_endless_model(), tmp_path_factory.mktemp("tiny")
    model.save_pretrained(checkpoint)
    make_processor().save_pretrained(checkpoint)
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:  # for sockets
        environment = {**os.environ, "RAY_TMPDIR": folder, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        environment |= {"VISUALCHAT_API_KEYS": ",".join(KEYS), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(EXAMPLES / "serve_replicas.py"), str(checkpoint), *FLAGS]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
        process = subprocess.Popen(command, **options)
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if url := re.search(r"running on (http://\S+:\d+)", line):
                    break
            assert url, "".join(lines)
            threading.Thread(target=process.stdout.read, daemon=True).start()
            clients = [openai.OpenAI(base_url=f"{url[1]}/v1", api_key=key, max_retries=0, timeout=60) for key in KEYS]
            yield SimpleNamespace(model=model, url=url[1], clients=clients, process=process, folder=folder)
        finally:
            process.kill()
            process.wait()
            for pid in processes_with(folder):  # those that did not notice
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_more_replicas_than_ray_has_room_for_are_refused(monkeypatch):
    monkeypatch.setattr(serve_replicas.ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    for flags, message in (
        (["--replicas", "2"], "--replicas 2 with --gpus 1 need 2, and Ray has 1"),
        (["--replicas", "3", "--gpus", "0", "--cpus", "1.5"], "--replicas 3 with --cpus 1.5 need 4.5, and Ray has 4"),
    ):
        with pytest.raises(SystemExit, match=message):
            serve_replicas.deploy(serve_replicas.make_replicas_parser().parse_args(["checkpoint", *flags]))


def test_a_replica_that_does_not_answer_is_given_up():
    class Events:
        async def __anext__(self):
            await asyncio.sleep(9)

        def cancel(self):
            cancelled.append(self)

    async def read():
        return [event async for event in serve_replicas.RemoteReply(Events(), 0.01, waiting)]

    cancelled, waiting = [], set()
    with pytest.raises(TimeoutError, match=r"more than 0\.01 seconds"):
        asyncio.run(read())
    assert len(cancelled) == 1 and not waiting


def known(client, *pictures, **options):
    """How many of the images of a conversation were known."""
    return stream(client, [show(*pictures)], **options)[1].images["known"]


def find_elsewhere(client, picture, seeds):
    """A picture that belongs to the other replica than this one."""
    known(client, picture)
    for other in map(draw_picture, seeds):
        known(client, other)
        if known(client, picture, other) == 1:  # it was not known where the first is
            return other
    raise AssertionError("All images belong to one replica.")


def test_the_streamed_text_is_that_of_the_model(served):
    messages, plain = [], []
    for seed, question in enumerate(("What is it?", "And this?")):
        messages.append(show(draw_picture(seed), text=question))
        blocks = [{"type": "image", "image": draw_picture(seed)}, messages[-1]["content"][-1]]
        plain.append({"role": "user", "content": blocks})
        expected, num_prompt, num_answer = direct(served.model, make_processor(), plain, 12)
        text, usage = stream(served.clients[0], messages)
        assert text == expected and (usage.prompt_tokens, usage.completion_tokens) == (num_prompt, num_answer)
        assert usage.images == {"new": 1, "known": seed}
        for history in (messages, plain):
            history.append({"role": "assistant", "content": text})


def test_conversations_about_an_image_meet_and_other_images_spread(served):
    client, picture = served.clients[0], draw_picture(100)
    assert [known(client, picture) for _ in range(4)] == [0, 1, 1, 1]
    other = find_elsewhere(client, picture, range(101, 120))
    assert [known(client, picture), known(client, other)] == [1, 1]


def test_an_image_id_works_at_every_replica_and_for_its_key_only(served):
    client, picture = served.clients[0], draw_picture(120)
    other = find_elsewhere(client, picture, range(121, 140))
    id = client.post("/images", body={"image": uri(other)}, cast_to=object)["id"]
    handle = {"type": "image_id", "image_id": id}
    here, there = show(text="Which?"), show(picture, text="Which?")
    for message, shown in ((here, [other]), (there, [picture, other])):
        plain = show(*shown, text="Which?")
        message["content"].insert(-1, handle)
        answers = [stream(client, [each]) for each in (message, plain)]
        assert answers[0][0] == answers[1][0] and answers[0][1].images == {"new": 0, "known": len(shown)}
        with pytest.raises(openai.NotFoundError) as caught:
            stream(served.clients[1], [message])
        assert caught.value.code == "image_not_found"


def test_a_full_replica_is_helped_until_a_client_goes_away(served):
    client, picture, others = served.clients[0], draw_picture(140), [draw_picture(seed) for seed in range(141, 156)]
    for other in others:
        known(client, picture, other)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            options = {"messages": [show(picture)], "max_tokens": 900, "stream": True}
            events = stack.enter_context(client.chat.completions.create(model="tiny", **options))
            next(iter(events))
        assert known(client, picture, others.pop(), max_tokens=1) == 0
        started = time.monotonic()
    until(lambda: time.sleep(0.1) or known(client, picture, others.pop(), max_tokens=1) == 2)
    assert time.monotonic() - started < 5  # long before an answer of 900 tokens would have ended


def test_errors_have_the_form_of_the_api(served):
    http, key = served.clients[0]._client, {"Authorization": f"Bearer {KEYS[0]}"}
    for path, body, headers, status in (
        ("/v1/nothing", b"", key, 404),
        ("/v1/chat/completions", b'{"model": "tiny", "messa', key, 400),
        ("/v1/chat/completions", b"{}", {}, 401),
    ):
        response = http.post(f"{served.url}{path}", content=body, headers=headers)
        assert response.status_code == status and response.json()["error"]["message"]
    assert http.get(f"{served.url}/health").json() == {"status": "ok", "waiting": 0}


def test_a_signal_ends_all_processes_once_what_began_is_answered(served):
    events = served.clients[0].chat.completions.create(
        model="tiny", messages=[show(draw_picture(0))], max_tokens=100, stream=True
    )
    next(iter(events))
    served.process.terminate()
    assert [*events][-1].choices[0].finish_reason == "length"
    served.process.wait(60)
    until(lambda: not processes_with(served.folder))
