"""The server answers as the model does by itself, keeps clients apart, and survives whatever they send."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai
import pytest
import serve
import uvicorn
from benchmarks import serve_load
from conftest import IMAGE_SEQ_LENGTH, draw_picture, make_model, make_processor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import gate, remote_images
from serving.app import make_app
from serving.conversations import Conversations, Limits
from serving.engine import Engine, EngineMemory
from serving.errors import ApiError
from serving.image_store import ImageStore
from serving.schemas import ChatRequest, parse
from serving.text import AnswerText
from starlette.testclient import TestClient
from test_finetune import EXAMPLES
from transformers.cli.serve import Serve


KEYS = ("first-key", "second-key")
LIMITS = Limits(max_images=6, max_pixels=100_000, max_body=200_000, max_new_tokens=1000, seconds=60)


def encode(picture, kind="png", **options):
    picture.save(data := io.BytesIO(), kind, **options)
    return data.getvalue()


def uri(picture):
    return f"data:image/png;base64,{base64.b64encode(encode(picture)).decode()}"


def show(*pictures, text="What is it?"):
    """A message of the user, as OpenAI's API has it."""
    blocks = [{"type": "image_url", "image_url": {"url": uri(picture)}} for picture in pictures]
    return {"role": "user", "content": [*blocks, {"type": "text", "text": text}]}


def direct(model, processor, messages, max_new_tokens):
    """The answer of the model by itself, to messages of the processor."""
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,
    )
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(tokens, skip_special_tokens=True).strip(), inputs["input_ids"].shape[1], len(tokens)


@contextlib.contextmanager
def running(model, processor, max_waiting=8):
    """A server on a thread: its engine, its clients, and what ends it."""
    engine = Engine(model, processor, EngineMemory(), max_batch=4, max_waiting=max_waiting)
    engine.replies, submit = [], engine.submit
    engine.submit = lambda request: engine.replies.append(submit(request)) or engine.replies[-1]
    app = make_app(engine, processor, "tiny", LIMITS, KEYS)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    engine.port, engine.url = port, f"http://127.0.0.1:{port}"
    engine.clients = [
        openai.OpenAI(base_url=f"{engine.url}/v1", api_key=key, max_retries=0, timeout=60) for key in KEYS
    ]

    def stop():
        server.should_exit = True
        thread.join()

    engine.stop = stop
    yield engine
    stop()


@pytest.fixture(scope="module")
def tiny():
    model = make_model()
    model.freeze()
    return model, make_processor()


@pytest.fixture(scope="module")
def served(tiny):
    with running(*tiny) as engine:
        yield engine


def make_endless_model():
    """A model whose answers are letters, and end at their maximum length only."""
    model, vocabulary = make_model(seed=1), make_processor().tokenizer.get_vocab()
    others = [id for token, id in vocabulary.items() if not (len(token) == 1 and token.isascii())]
    model.generation_config.suppress_tokens = sorted(others)
    model.freeze()
    return model


@pytest.fixture(scope="module")
def endless_model():
    return make_endless_model()


@pytest.fixture
def endless(endless_model):
    with running(endless_model, make_processor(), max_waiting=2) as engine:
        yield engine


def stream(client, messages, **options):
    """A streamed answer, and its usage."""
    options = {"max_tokens": 12, "stream_options": {"include_usage": True}, **options}
    chunks = [*client.chat.completions.create(model="tiny", messages=messages, stream=True, **options)]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return text, chunks[-1].usage


def test_the_official_client_holds_a_conversation_of_three_rounds_and_four_images(served, tiny):
    client, pictures = served.clients[0], [draw_picture(20 + seed) for seed in range(4)]
    created = client.post("/images", body={"image": uri(pictures[3])}, cast_to=object)
    assert (created["width"], created["height"]) == pictures[3].size
    handle = {"role": "user", "content": [{"type": "image_id", "image_id": created["id"]}, show()["content"][0]]}
    asked = [show(pictures[0]), show(*pictures[1:3], text="And <image> these? ### Answer: no"), handle]
    known = [[0], [1, 2], [3]]
    messages, plain, num_shown = [], [], 0
    for question, shown in zip(asked, known):
        words = question["content"][-1]
        plain += [{"role": "user", "content": [*({"type": "image", "image": pictures[i]} for i in shown), words]}]
        messages.append(question)
        expected, num_prompt, num_answer = direct(*tiny, plain, 12)
        text, usage = stream(client, messages)
        assert text == expected
        assert (usage.prompt_tokens, usage.completion_tokens) == (num_prompt, num_answer)
        assert usage.prompt_tokens_details.cached_tokens == num_shown * IMAGE_SEQ_LENGTH
        assert usage.images == {"new": len(shown), "known": num_shown}
        num_shown += len(shown)
        messages.append({"role": "assistant", "content": text})
        plain.append({"role": "assistant", "content": text or "(nothing)"})
    whole = client.chat.completions.create(model="tiny", messages=messages[:-1], max_tokens=12)
    assert whole.choices[0].message.content == text and whole.usage.images == {"new": 0, "known": 4}
    metrics = client._client.get(f"{served.url}/metrics").text
    assert (
        'visualchat_images_total{kind="new"} 4.0' in metrics and 'visualchat_images_total{kind="known"} 8.0' in metrics
    )
    assert 'visualchat_requests_total{route="/v1/chat/completions",status="200"} 4.0' in metrics


def test_the_responses_api_gives_the_same_text(served, tiny):
    client, picture = served.clients[0], draw_picture(31)
    expected, num_prompt, num_answer = direct(
        *tiny,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]},
        ],
        12,
    )
    content = [{"type": "input_image", "image_url": uri(picture)}, {"type": "input_text", "text": "What?"}]
    asked = {"model": "tiny", "input": [{"role": "user", "content": content}], "instructions": "Be brief."}
    whole = client.responses.create(**asked, max_output_tokens=12)
    assert whole.output_text == expected and whole.status in ("completed", "incomplete")
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (num_prompt, num_answer)
    with client.responses.stream(**asked, max_output_tokens=12) as events:
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == expected
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_requests_of_a_batch_do_not_change_each_other(served, tiny):
    asked = [
        ([show(draw_picture(40), text="What is it?")], {"max_tokens": 3}),
        ([show(draw_picture(41), draw_picture(40), text="Two of them.")], {"max_tokens": 20}),
        ([{"role": "user", "content": "No image, but a longer question than the others have."}], {}),
        ([show(draw_picture(40))], {"temperature": 1.0, "seed": 3, "top_p": 0.9}),
        ([show(draw_picture(42))], {"temperature": 1.3, "seed": 4}),
    ]
    alone = [stream(served.clients[0], messages, **options)[0] for messages, options in asked]
    assert alone[2] == direct(*tiny, asked[2][0], 12)[0]
    with ThreadPoolExecutor(5) as pool:
        together = [pool.submit(stream, served.clients[0], messages, **options) for messages, options in asked]
    assert [each.result()[0] for each in together] == alone
    assert len(set(alone)) == 5


def test_a_model_without_an_image_memory_is_served(tiny):
    model, processor = make_model(attention_type="causal"), tiny[1]
    engine, picture = Engine(model, processor), draw_picture(0)
    words = {"type": "text", "text": "What is it?"}
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, words]}]

    async def answer():
        conversations = Conversations(engine, processor, ImageStore(0), LIMITS)
        request = conversations.prepare(parse(ChatRequest, json.dumps(body).encode()), "owner")
        return [part async for part in engine.submit(request)]

    body = {"model": "tiny", "messages": [show(picture)], "max_tokens": 8}
    parts = asyncio.run(answer())
    engine.close()
    assert "".join(text for text, _ in parts) == direct(model, processor, messages, 8)[0]
    assert (parts[-1][1].new_images, parts[-1][1].known_images) == (1, 0)


def test_what_is_of_one_key_is_of_no_other(served, tiny):
    first, second = served.clients
    secret, picture = "the password is swordfish", draw_picture(50)
    id = first.post("/images", body={"image": uri(picture)}, cast_to=object)["id"]
    prefix = {"role": "user", "content": [{"type": "image_id", "image_id": id}, {"type": "text", "text": secret}]}
    # A client learns nothing of the images of others, which are not computed again.
    misses = served.memory.misses
    shown = [stream(client, [show(picture)])[1] for client in (first, second, second)]
    assert [usage.images["known"] for usage in shown] == [0, 0, 1]
    assert [usage.prompt_tokens_details.cached_tokens for usage in shown] == [0, 0, IMAGE_SEQ_LENGTH]
    assert served.memory.misses == misses + 1
    stream(first, [prefix])
    for attempt in (
        lambda: second.get(f"/images/{id}", cast_to=object),
        lambda: second.delete(f"/images/{id}", cast_to=object),
        lambda: stream(second, [prefix]),
        lambda: second.get(f"/images/{id[:-1]}{'A' if id[-1] != 'A' else 'B'}", cast_to=object),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            attempt()
        assert caught.value.code == "image_not_found"
    # The same beginning, at the same time: each answer is that of its own conversation.
    endings = ["and mine is tuna.", "and mine is cod!"]
    messages = [[show(draw_picture(51 + i), text=f"{secret}, {end}")] for i, end in enumerate(endings)]
    with ThreadPoolExecutor(2) as pool:
        answers = [*pool.map(stream, (first, second), messages)]
    for i, (text, _) in enumerate(answers):
        blocks = [{"type": "image", "image": draw_picture(51 + i)}, messages[i][0]["content"][-1]]
        assert text == direct(*tiny, [{"role": "user", "content": blocks}], 12)[0]
        assert not any(word in text for word in ("swordfish", "tuna", "cod"))
    first.delete(f"/images/{id}", cast_to=object)
    with pytest.raises(openai.NotFoundError):
        stream(first, [prefix])
    with pytest.raises(openai.AuthenticationError):
        first.with_options(api_key="third-key").models.list()


def test_stored_images_are_bounded(tiny):
    with in_process(tiny, Limits(max_stored=500)) as client:
        ids = [client.post("/v1/images", content=encode(draw_picture(i)), headers=PNG).json()["id"] for i in range(6)]
        statuses = [client.get(f"/v1/images/{id}").status_code for id in ids]
    assert statuses[0] == 404 and statuses[-1] == 200 and statuses == sorted(statuses, reverse=True)


PNG = {"Content-Type": "image/png"}
HEADERS = {"Authorization": f"Bearer {KEYS[0]}"}


@contextlib.contextmanager
def in_process(tiny, limits=LIMITS, keys=KEYS):
    """A server in this process, without a network."""
    engine = Engine(*tiny, EngineMemory())
    with TestClient(make_app(engine, tiny[1], "tiny", limits, keys), headers=HEADERS) as client:
        yield client


@pytest.fixture(scope="module")
def local(tiny):
    with in_process(tiny) as client:
        yield client


def ask(client, **fields):
    return client.post("/v1/chat/completions", json={"model": "tiny", "messages": [show()], "max_tokens": 2, **fields})


def with_url(url):
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


BROKEN = encode(Image.effect_noise((100, 80), 90))[:300]
SVG = "data:image/svg+xml;base64,PHN2Zy8+"
REFUSED = {
    "no messages": ({"messages": []}, "invalid_conversation"),
    "an unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    "an unknown field": ({"logit_bias": {}}, "Unknown or unsupported field: logit_bias"),
    "an unknown field of a message": (
        {"messages": [{"role": "user", "content": "x", "why": 1}]},
        "Unknown or unsupported field: messages.0.why",
    ),
    "a path": (
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}]},
        "messages.0.content.0",
    ),
    "two questions": ({"messages": [show(), show()]}, "user and assistant take turns"),
    "an image of the assistant": (
        {"messages": [show(), {**show(draw_picture(0)), "role": "assistant"}]},
        "Only the user shows images",
    ),
    "another model": ({"model": "gpt"}, "There is no model 'gpt'"),
    "too many images": ({"messages": [show(*[draw_picture(0)] * 7)]}, "shows 7 images, and 6 are allowed"),
    "too many tokens": ({"max_tokens": 2000}, "2,000 tokens are asked for"),
    "a long text": ({"messages": [{"role": "user", "content": "x" * 1100}]}, "1024"),
    "a broken image": (with_url(f"data:image/png;base64,{base64.b64encode(BROKEN).decode()}"), "truncated or broken"),
    "a huge image": (with_url(uri(Image.new("1", (30_000, 30_000)))), "too many pixels"),
    "a large image": (with_url(uri(Image.new("1", (400, 300)))), "120,000 pixels, and 100,000 are allowed"),
    "text for an image": (with_url(base64.b64encode(b"no image" * 20).decode()), "Not an image"),
    "another type": (with_url(SVG), "A data URI of type 'image/svg+xml'"),
    "a data URI without base64": (with_url("data:image/png,abc"), "is not of the form"),
    "an image that is not base64": (with_url("no base64!"), "Neither a data URI nor base64"),
    "a file": (with_url("file:///etc/passwd"), "Neither a data URI nor base64"),
    "a URL": (with_url("http://127.0.0.1/x.png"), "Images are not fetched from http://127.0.0.1"),
    "a temperature": ({"temperature": -1}, "temperature: Input should be greater than or equal to 0; got -1"),
}


@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_answered_is_refused_with_the_reason(local, fields, message):
    response = ask(local, **fields)
    assert response.status_code in (400, 404)
    assert {"message", "type", "param", "code"} == response.json()["error"].keys()
    assert message in response.text.replace("\\n", "\n")


def test_other_paths_bodies_and_keys_have_errors_of_the_same_form(local):
    for response, status in (
        (local.get("/v1/nothing"), 404),
        (local.get("/v1/chat/completions"), 405),
        (local.post("/v1/chat/completions", content=b'{"model": "tiny", "messa'), 400),
        (local.post("/v1/chat/completions", content=b"[" * 100_000), 400),
        (local.post("/v1/images", content=b"x" * 200_001), 413),
        (local.post("/v1/images", content=iter([b"x" * 150_000] * 2)), 413),
        (local.get("/v1/models", headers={"Authorization": "Bearer no"}), 401),
    ):
        assert response.status_code == status and response.json()["error"]["message"]
    assert local.get("/health", headers={"Authorization": ""}).json()["status"] == "ok"


def test_the_first_frame_of_an_animated_image_is_read(local, tiny):
    frames = [draw_picture(seed) for seed in (60, 61)]
    data = encode(frames[0], "gif", save_all=True, append_images=frames[1:])
    texts = []
    for each in (data, encode(Image.open(io.BytesIO(data)).convert("RGB"))):
        id = local.post("/v1/images", content=each, headers=PNG).json()["id"]
        content = [{"type": "image_id", "image_id": id}, {"type": "text", "text": "What?"}]
        texts.append(ask(local, messages=[{"role": "user", "content": content}], max_tokens=9).json()["choices"])
    assert texts[0] == texts[1]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("<image>"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "image_id", "input_image", "video"])},
    optional={
        "text": st.text(max_size=9) | st.just("<image><eos> ### Answer: x"),
        "image_url": st.sampled_from([SVG, uri(draw_picture(0)), "http://localhost/"]) | JSON_VALUES,
        "image_id": st.text(max_size=9),
    },
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]),
        "content": st.text(max_size=9) | st.lists(BLOCK, max_size=3) | JSON_VALUES,
    }
)
FIELDS = {
    "max_tokens": st.integers(-1, 3) | JSON_VALUES,
    "temperature": st.floats(-1, 3),
    "top_p": st.floats(-1, 2),
    "seed": st.integers(),
    "stop": st.text(max_size=2) | st.lists(st.text(max_size=2), max_size=5),
    "stream": st.booleans(),
    "input": st.lists(MESSAGE, max_size=3) | JSON_VALUES,
    "other": JSON_VALUES,
}
BODY = st.fixed_dictionaries(
    {"model": st.just("tiny"), "messages": st.lists(MESSAGE, max_size=4)}, optional=FIELDS
).map(lambda body: json.dumps({"max_tokens": 2, **body}).encode())
PATHS = ["/v1/chat/completions", "/v1/responses", "/v1/images"]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), body=BODY | JSON_VALUES.map(lambda body: json.dumps(body).encode()) | st.binary())
def test_no_body_is_a_fault_of_the_server(local, path, body):
    response = local.post(path, content=body)
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        assert response.json()["error"]["message"]


def test_a_client_that_goes_away_frees_its_place(endless):
    with endless.clients[0].chat.completions.create(
        model="tiny", messages=[show(text="x")], max_tokens=900, stream=True
    ) as events:
        next(iter(events))
    with socket.create_connection(("127.0.0.1", endless.port)) as client:  # one that waits for all of its answer
        body = json.dumps({"model": "tiny", "messages": [show(text="y")], "max_tokens": 900}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: len(endless.replies) == 2)
    until(lambda: [reply.finish_reason for reply in endless.replies] == ["stopped"] * 2)
    assert all(len(reply.text.tokens) < 900 for reply in endless.replies)


def until(condition, seconds=20):
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_conversation_joins_those_that_are_being_answered(endless, endless_model):
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(stream, endless.clients[0], messages=[show(text="x")], max_tokens=800)
        until(lambda: endless.replies and len(endless.replies[0].text.tokens) > 2)
        messages = [show(draw_picture(1), draw_picture(2), text="Which?")]
        text, _ = stream(endless.clients[1], messages=messages, max_tokens=5)
        assert not long.done()
        content = [{"type": "image", "image": draw_picture(1)}, {"type": "image", "image": draw_picture(2)}]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": "Which?"}]}]
        assert text == direct(endless_model, make_processor(), messages, 5)[0]
        messages = [{"role": "user", "content": "x"}]
        assert long.result()[0] == direct(endless_model, make_processor(), messages, 800)[0]


def test_a_full_server_says_when_to_try_again_and_finishes_what_it_began(endless):
    ask = {"messages": [show(text="x")], "max_tokens": 20}
    with ThreadPoolExecutor(6) as pool:
        running = []
        for number in range(1, 5):  # until the batch is full; no more than two may wait for it
            running.append(pool.submit(stream, endless.clients[0], **{**ask, "max_tokens": 800}))
            until(lambda number=number: len(endless.replies) == number and endless.num_waiting == 0)
        running += [pool.submit(stream, endless.clients[0], **ask) for _ in range(2)]
        until(lambda: endless.num_waiting == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            stream(endless.clients[1], **ask)
        assert caught.value.response.headers["retry-after"] == "1"
        endless.stop()
        texts = [each.result()[0] for each in running]
        assert texts[4] == texts[5] and texts[0].startswith(texts[4])
        assert [reply.finish_reason for reply in endless.replies] == ["length"] * 6
    with pytest.raises(openai.APIConnectionError):
        endless.clients[0].models.list()


def test_an_answer_that_takes_too_long_ends(endless_model):
    with in_process((endless_model, make_processor()), Limits(seconds=0.1)) as client:
        response = ask(client, max_tokens=900)
    assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"


def test_requests_in_progress_and_slow_bodies_are_limited():
    async def call(body_seconds=0.0, max_requests=1):
        async def app(scope, receive, send):
            raise AssertionError

        async def receive():
            await asyncio.sleep(body_seconds)
            return {"type": "http.disconnect"}

        door = gate.Gate(app, (), max_requests, 9, 0.02, lambda scope, status: statuses.append(status))
        await door({"type": "http", "path": "/", "headers": [(b"host", b"localhost")], "method": "GET"}, receive, send)

    async def send(message):
        pass

    statuses = []
    asyncio.run(call(max_requests=0))
    asyncio.run(call(body_seconds=1))
    asyncio.run(call())  # a body that is cut off
    assert statuses == [429, 408]


def test_a_text_that_comes_by_tokens_is_the_decoded_text(tiny):
    tokenizer = tiny[1].tokenizer
    for text in ("  Grüße, 你好 🙂 \n", "\ufffd", "", " a b  c "):
        tokens = [*tokenizer(text).input_ids, 200, 1, 201]
        answer = AnswerText(tokenizer)
        parts = [*map(answer.put, tokens), answer.finish()]
        assert "".join(parts) == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    answer = AnswerText(tokenizer, stop=("END", "\n\n"))
    parts = [answer.put(token) for token in tokenizer("one EN two END three").input_ids if not answer.is_stopped]
    assert "".join([*parts, answer.finish()]) == "one EN two" and answer.is_stopped


PRIVATE = ["127.0.0.1", "10.0.0.1", "169.254.169.254", "192.168.0.1", "0.0.0.0", "100.64.0.1", "224.0.0.1", "::1"]
PRIVATE += ["fe80::1", "fd00::1", "::ffff:127.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "::"]


def test_addresses_that_are_not_public_are_refused(monkeypatch):
    assert not any(map(remote_images.is_public, PRIVATE))
    assert remote_images.is_public("8.8.8.8") and remote_images.is_public("2606:4700::1111")
    for host in ("localhost", "127.0.0.1"):
        with pytest.raises(ApiError, match="an address that is not public"):
            remote_images.download_image(f"http://{host}/x.png", [host], 100)
    for url in ("http://user:x@localhost/", "http://other/", "ftp://localhost/", "http://localhost:81/", "http://["):
        with pytest.raises(ApiError, match=r"Images are not fetched|is not a URL"):
            remote_images.download_image(url, ["localhost"], 100)


def test_an_image_is_fetched_from_the_address_that_was_checked(monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            hosts.append(self.headers["Host"])
            self.send_response(302 if self.path == "/redirect" else 200)
            self.send_header("Location", "http://127.0.0.1/")
            self.end_headers()
            self.wfile.write(b"" if self.path == "/redirect" else b"image")

        def log_message(self, *_):
            pass

    hosts, resolved = [], []
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()

    def resolve(host, port, *_, **__):
        resolved.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))]

    monkeypatch.setattr(remote_images, "is_public", lambda address: True)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    name = f"images.test:{server.server_port}"
    try:
        assert remote_images.download_image(f"http://{name}/x", [name], 5) == b"image"
        assert hosts == [name] and resolved[0] == "images.test" and "images.test" not in resolved[1:]
        with pytest.raises(ApiError, match="more than 4 bytes"):
            remote_images.download_image(f"http://{name}/x", [name], 4)
        with pytest.raises(ApiError, match="answers with a redirect"):
            remote_images.download_image(f"http://{name}/redirect", [name], 5)
        assert len(hosts) == 3
    finally:
        server.shutdown()
        server.server_close()


def test_other_machines_need_a_key(tmp_path, monkeypatch):
    def keys(*flags):
        return serve.read_keys(serve.make_parser().parse_args(["checkpoint", *flags]))

    monkeypatch.delenv("VISUALCHAT_API_KEYS", raising=False)
    assert keys() == keys("--host", "::1") == []
    for host in ("0.0.0.0", "::", "example.org", "192.168.0.1"):
        with pytest.raises(SystemExit, match="lets other machines connect"):
            keys("--host", host)
    (tmp_path / "keys").write_text("one\n\n two \n")
    assert keys("--host", "0.0.0.0", "--api_keys", str(tmp_path / "keys")) == ["one", "two"]
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(SystemExit, match="holds no key"):
        keys("--api_keys", str(tmp_path / "keys"))
    monkeypatch.setenv("VISUALCHAT_API_KEYS", "one, two")
    assert keys("--host", "0.0.0.0") == ["one", "two"]


def test_a_server_without_keys_refuses_web_pages_of_other_sites(tiny):
    accepted = ("localhost", "127.0.0.1:8000", "127.8.0.1", "[::1]:8000", "LOCALHOST:1")
    refused = ("evil.test", "localhost.evil.test:8000", "192.168.0.1", "0.0.0.0", "[::1", "", "127.0.0.1@evil.test")
    with in_process(tiny, keys=()) as client:
        for path in ("/v1/models", "/health", "/metrics"):
            assert [client.get(path, headers={"Host": host}).status_code for host in accepted] == [200] * 5
            assert [client.get(path, headers={"Host": host}).status_code for host in refused] == [403] * 7
        # What a page may send without asking first; browsers name its site.
        body = json.dumps({"model": "tiny", "messages": [show()], "max_tokens": 2})
        for origin, status in {"http://localhost:3000": 200, "https://evil.test": 403, "null": 403}.items():
            headers = {"Host": "localhost", "Origin": origin, "Content-Type": "text/plain"}
            response = client.post("/v1/chat/completions", content=body, headers=headers)
            assert response.status_code == status
        error = response.json()["error"]
        assert error["code"] == "not_local" and "Origin 'null' is not this machine" in error["message"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, endless_model):
    folder = tmp_path_factory.mktemp("tiny")
    endless_model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_script_bears_load_and_finishes_what_it_began(checkpoint):
    environment = {**os.environ, "VISUALCHAT_API_KEYS": KEYS[0]}
    command = [sys.executable, str(EXAMPLES / "serve.py"), str(checkpoint), "--port", "0", "--max_batch", "16"]
    process = subprocess.Popen([*command, "--name", "tiny"], stderr=subprocess.PIPE, text=True, env=environment)
    try:
        url = next(found[0] for line in process.stderr if (found := re.findall(r"http://\S+:\d+", line)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        results = asyncio.run(serve_load.run(f"{url}/v1", KEYS[0], 50, 5, 16, process.pid))
        assert results["outcomes"].keys() <= {"right", "429"} and results["outcomes"]["right"] > 50
        before, after = results["memory in MiB"]
        assert after < 1.05 * before
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEYS[0], max_retries=0)
        events = client.chat.completions.create(model="tiny", messages=[show()], max_tokens=200, stream=True)
        next(iter(events))
        process.terminate()
        assert [*events][-1].choices[0].finish_reason == "length"
        assert process.wait(20) in (0, -signal.SIGTERM)
    finally:
        process.kill()


@pytest.mark.slow
def test_transformers_serve_holds_the_same_conversation(checkpoint, endless_model):
    processor = make_processor()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(force_model=str(checkpoint), host="127.0.0.1", port=port, device="cpu", non_blocking=True)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=3)
    pictures = [draw_picture(20 + seed) for seed in range(4)]
    messages, plain = [], []
    try:
        until(lambda: server.server.started)
        for shown in ([0], [1, 2], [3]):
            messages.append(show(*(pictures[i] for i in shown)))
            blocks = [{"type": "image", "image": pictures[i]} for i in shown]
            plain.append({"role": "user", "content": [*blocks, messages[-1]["content"][-1]]})
            chunks = client.chat.completions.create(
                model=str(checkpoint), messages=messages, stream=True, max_tokens=12
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            expected, _, _ = direct(endless_model, processor, plain, 12)
            assert text.strip() == expected
            messages.append({"role": "assistant", "content": expected})
            plain.append({"role": "assistant", "content": expected})
    finally:
        server.kill_server()
