"""
Puts load on a server of `serve.py`: many clients that hold conversations about shared images, streamed.

    python examples/serve.py CHECKPOINT --max_batch 50 --max_new_tokens 64
    python examples/benchmarks/serve_load.py --url http://127.0.0.1:8000/v1 --streams 50 --seconds 120

Each conversation is one of a few, whose answer is known from before, when it was asked alone: any other answer is one
that was mixed up. With --pid, the memory of the server's process at a quarter of the time and at the end is printed.
"""

import asyncio
import base64
import io
import os
import random
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path
from typing import Any

import openai
from PIL import Image


def make_conversations(number: int) -> list[list[dict[str, Any]]]:
    """Conversations about one to three of a few images, which differ in a word."""
    images = []
    for color in range(5):
        Image.new("RGB", (32, 24), (color * 50, 255 - color * 40, 90)).save(data := io.BytesIO(), "png")
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        images.append({"type": "image_url", "image_url": {"url": url}})
    chosen = random.Random(0)
    return [
        [
            {
                "role": "user",
                "content": [*chosen.sample(images, 1 + index % 3), {"type": "text", "text": f"No. {index}?"}],
            }
        ]
        for index in range(number)
    ]


def memory_of(pid: int) -> float:
    """Resident memory of a process in MiB, on Linux."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Load:
    """Clients that ask until a time, and what has become of their requests."""

    def __init__(self, client: openai.AsyncOpenAI, model: str, max_tokens: int):
        self.client, self.model, self.max_tokens = client, model, max_tokens
        self.outcomes: Counter[str] = Counter()
        self.waits: list[float] = []  # seconds to the first text

    async def ask(self, messages: list[dict[str, Any]]) -> str:
        """A streamed answer."""
        started, text = time.perf_counter(), ""
        options: dict[str, Any] = {"messages": messages, "max_tokens": self.max_tokens, "stream": True}
        stream = await self.client.chat.completions.create(model=self.model, **options)
        async for chunk in stream:
            if not text and chunk.choices[0].delta.content:
                self.waits.append(time.perf_counter() - started)
            text += chunk.choices[0].delta.content or ""
        return text

    async def hold(self, conversations: list, expected: list[str], number: int, until: float) -> None:
        """Asks one conversation after the other."""
        chosen = random.Random(number)
        while time.perf_counter() < until:
            index = chosen.randrange(len(conversations))
            try:
                is_right = await self.ask(conversations[index]) == expected[index]
                self.outcomes["right" if is_right else "mixed up"] += 1
            except openai.RateLimitError as error:
                self.outcomes["429"] += 1
                await asyncio.sleep(float(error.response.headers["Retry-After"]))
            except openai.OpenAIError as error:
                self.outcomes[type(error).__name__] += 1


async def run(url: str, key: str, streams: int, seconds: float, max_tokens: int, pid: int | None) -> dict[str, Any]:
    """The outcomes of the requests, and the memory of the server's process."""
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=600) as client:
        load = Load(client, (await client.models.list()).data[0].id, max_tokens)
        conversations = make_conversations(12)
        expected = [await load.ask(each) for each in conversations]
        load.waits.clear()
        until = time.perf_counter() + seconds
        clients = [asyncio.ensure_future(load.hold(conversations, expected, i, until)) for i in range(streams)]
        await asyncio.sleep(seconds / 4)
        memory = [] if pid is None else [memory_of(pid)]
        await asyncio.gather(*clients)
        memory += [] if pid is None else [memory_of(pid)]
    waits = sorted(load.waits) or [float("nan")]
    return {
        "outcomes": dict(load.outcomes),
        "requests per second": round(load.outcomes["right"] / seconds, 1),
        "median seconds to the first text": round(waits[len(waits) // 2], 3),
        "memory in MiB": [round(each, 1) for each in memory],
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="URL of the server")
    parser.add_argument("--key", default="none", help="API key")
    parser.add_argument("--streams", type=int, default=50, help="number of clients")
    parser.add_argument("--seconds", type=float, default=120, help="how long they ask")
    parser.add_argument("--max_tokens", type=int, default=32, help="maximum tokens of an answer")
    parser.add_argument("--pid", type=int, help="process of the server, whose memory is measured")
    results = asyncio.run(run(**vars(parser.parse_args())))
    for name, value in results.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
