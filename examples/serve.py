"""
Serves a saved VisualChat checkpoint by OpenAI's API.

    python examples/serve.py CHECKPOINT [--port 8000] [--api_keys FILE] [--image_memory FOLDER]

Requests are answered in batches, and an image is computed once for all of them. Without API keys (one a line in
--api_keys, or separated by commas in VISUALCHAT_API_KEYS), only programs on this machine may connect, and web pages of
other sites are refused.
"""

import os
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import uvicorn
from loading import add_image_memory_arguments, add_model_arguments, load_model, make_image_memory
from serving.app import make_app
from serving.conversations import Limits
from serving.engine import Engine, EngineMemory
from serving.gate import is_loopback
from transformers import logging


MIB = 2**20


def make_parser() -> ArgumentParser:
    """The flags."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0 for any that is free")
    parser.add_argument("--name", help="name of the model in requests; by default that of the checkpoint")
    parser.add_argument("--api_keys", help="file of API keys, one a line; by default VISUALCHAT_API_KEYS, with commas")
    add_image_memory_arguments(parser)
    parser.add_argument("--max_batch", type=int, default=16, help="maximum conversations of a batch")
    parser.add_argument("--max_waiting", type=int, default=64, help="maximum conversations that wait for a batch")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="maximum tokens of an answer")
    parser.add_argument("--max_images", type=int, default=20, help="maximum images of a conversation")
    parser.add_argument("--max_megapixels", type=float, default=100, help="maximum of its images together")
    parser.add_argument("--max_body", type=int, default=32, help="maximum MiB of a request, or of an image at a URL")
    parser.add_argument("--max_stored", type=int, default=256, help="maximum MiB of the stored images of an API key")
    parser.add_argument("--timeout", type=float, default=300, help="maximum seconds until an answer is complete")
    parser.add_argument(
        "--allow_image_hosts", nargs="+", default=(), metavar="HOST", help="hosts whose image URLs are fetched"
    )
    return parser


def read_keys(arguments: Namespace) -> list[str]:
    """The API keys; ends the program if there are none and others than this machine could connect."""
    text = os.environ.get("VISUALCHAT_API_KEYS", "").replace(",", "\n")
    if arguments.api_keys is not None:
        try:
            text = Path(arguments.api_keys).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"error: --api_keys: {error}") from error
    keys = [key for line in text.splitlines() if (key := line.strip())]
    if arguments.api_keys is not None and not keys:
        raise SystemExit(f"error: --api_keys: {arguments.api_keys} holds no key")
    if not keys and not is_loopback(arguments.host):
        raise SystemExit(
            f"error: --host {arguments.host} lets other machines connect; set API keys by --api_keys FILE or "
            "VISUALCHAT_API_KEYS"
        )
    return keys


def load_engine(arguments: Namespace) -> Engine:
    """The engine of a checkpoint; ends the program if it cannot be loaded, or has no use for a flag."""
    logging.set_verbosity_error()
    model, processor = load_model(arguments)
    if not processor.tokenizer.is_fast:
        raise SystemExit(f"error: {arguments.checkpoint} has no tokenizer.json, which streams are decoded by")
    memory = make_image_memory(model, arguments, EngineMemory)
    return Engine(model, processor, memory, arguments.max_batch, arguments.max_waiting)


def model_name(arguments: Namespace) -> str:
    """The name of the model in requests."""
    return arguments.name or Path(arguments.checkpoint).resolve().name


def run(engine: Any, arguments: Namespace, keys: list[str], replicas: int = 1) -> None:
    """Serves an engine, which may stand for several replicas, until a signal ends the program."""
    limits = Limits(
        max_images=arguments.max_images,
        max_pixels=int(arguments.max_megapixels * 1e6),
        max_body=arguments.max_body * MIB,
        max_new_tokens=arguments.max_new_tokens,
        max_requests=replicas * arguments.max_batch + arguments.max_waiting,
        max_stored=arguments.max_stored * MIB,
        seconds=arguments.timeout,
        image_hosts=[host.lower() for host in arguments.allow_image_hosts],
    )
    app = make_app(engine, engine.processor, model_name(arguments), limits, keys)
    uvicorn.run(app, host=arguments.host, port=arguments.port, access_log=False)


def main() -> None:
    arguments = make_parser().parse_args()
    keys = read_keys(arguments)
    run(load_engine(arguments), arguments, keys)


if __name__ == "__main__":
    main()
