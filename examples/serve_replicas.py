"""
Serves a saved VisualChat checkpoint by OpenAI's API, by replicas of the model on Ray Serve.

    python examples/serve_replicas.py CHECKPOINT --replicas 2 [--gpus 1] [--port 8000] [--api_keys FILE]

The API and the flags are those of serve.py. This process checks and tokenizes requests and stores images; replicas
answer in batches. A conversation is sent to the replica that its first image belongs to, by consistent hashing of its
pixels, so that its rounds, and other conversations about this image, find it computed. If the batch of that replica is
full, the next one on the ring answers; a conversation without images is sent to any. /health is ok while a replica
runs, and Ray Serve restarts one that has ended. /metrics counts for all replicas; what waits there has no text yet.

Ray is started on this machine. With RAY_ADDRESS, replicas are started on the machines of that cluster, which need this
repository and the checkpoint at the same paths.
"""

import asyncio
import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from loading import count
from serve import load_engine, make_parser, model_name, read_keys, run
from serving.replies import Request

from modeling_visualchat.chat_session_visualchat import Usage
from modeling_visualchat.weights_key_visualchat import image_key


try:
    import ray
    from ray import serve as ray_serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
except ImportError as error:
    raise SystemExit(f'error: {error}; run pip install -c constraints.txt -e ".[replicas]"') from error


ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
MAX_BACKOFF = 0.05  # seconds until the replicas are asked for room again
LOGGING = {"log_level": "WARNING", "enable_access_log": False}


class Replica:
    """A model, and the engine that answers with it."""

    def __init__(self, arguments: Namespace):
        try:
            self.engine = load_engine(arguments)
        except SystemExit as error:  # would end the process, and Ray would not learn why
            raise RuntimeError(str(error)) from error

    def describe(self) -> tuple[Any, Any]:
        """The configuration of the model, and its processor."""
        return self.engine.config, self.engine.processor

    async def answer(self, request: Request) -> AsyncIterator[tuple[str, Usage | None]]:
        """The reply of the engine."""
        reply = self.engine.submit(request)
        try:
            async for event in reply:
                yield event
        finally:
            reply.cancel()

    def check_health(self) -> None:
        """What Ray Serve calls, to restart a replica that fails."""
        if not self.engine.is_alive:
            raise RuntimeError("The engine has ended.")


class RemoteReply:
    """The reply of a replica, as an engine on this machine would give it; see [`Reply`]."""

    def __init__(self, events: DeploymentResponseGenerator, seconds: float, waiting: set):
        self.events, self.seconds, self.waiting = events, seconds, waiting
        self.started = time.perf_counter()
        waiting.add(self)

    def cancel(self) -> None:
        """Ends the answer: nobody reads it."""
        self.waiting.discard(self)
        self.events.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[str, Usage | None]]:
        first_token_seconds = None
        try:
            while True:
                async with asyncio.timeout(self.started + self.seconds - time.perf_counter()):
                    event = await anext(self.events, None)
                if event is None:
                    return
                text, usage = event
                self.waiting.discard(self)
                first_token_seconds = first_token_seconds or time.perf_counter() - self.started
                yield text, usage and replace(usage, first_token_seconds=first_token_seconds)
        except TimeoutError:
            raise TimeoutError(f"The answer took more than {self.seconds:g} seconds.") from None
        finally:
            self.cancel()


class RemoteEngine:
    """
    The engines of all replicas, as one; see [`Engine`].

    Args:
        handle (`DeploymentHandle`): The replicas.
    """

    def __init__(self, handle: DeploymentHandle):
        self.config, self.processor = handle.describe.remote().result()
        self.handle = handle.options(method_name="answer", stream=True)
        self._waiting: set[RemoteReply] = set()

    @property
    def num_waiting(self) -> int:
        """The number of conversations without a text of their answers yet."""
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether a replica runs."""
        application = ray_serve.status().applications[self.handle.app_name]
        return application.deployments[self.handle.deployment_name].replica_states.get("RUNNING", 0) > 0

    def submit(self, request: Request) -> RemoteReply:
        """The reply to a request, an asynchronous iterator of `(text, usage)`."""
        handle = self.handle
        if request.pixel_values is not None:
            handle = handle.options(session_id=image_key(request.pixel_values[0]))
        return RemoteReply(handle.remote(request), request.seconds, self._waiting)

    def close(self) -> None:
        """Ends the replicas, once everything is answered."""
        ray_serve.delete(self.handle.app_name)


def make_replicas_parser() -> ArgumentParser:
    """The flags: those of serve.py, and those of the replicas."""
    parser = make_parser()
    parser.description = __doc__
    parser.add_argument("--replicas", type=count, default=2, help="number of replicas, each with --gpus and --cpus")
    parser.add_argument("--cpus", type=float, default=1, help="CPU cores, and threads, of a replica")
    return parser


def deploy(arguments: Namespace) -> DeploymentHandle:
    """
    Starts the replicas.

    Raises:
        `SystemExit`: Ray has not as many GPUs or CPU cores, or a replica cannot load the checkpoint.
    """
    there = ray.cluster_resources()
    num_gpus = min(1, there.get("GPU", 0)) if arguments.gpus is None else arguments.gpus
    for kind, flag, each in (("GPU", "--gpus", num_gpus), ("CPU", "--cpus", arguments.cpus)):
        if arguments.replicas * each > there.get(kind, 0):
            raise SystemExit(
                f"error: --replicas {arguments.replicas} with {flag} {each:g} need {arguments.replicas * each:g}, and "
                f"Ray has {there.get(kind, 0):g}; ask for less, or add machines to the cluster"
            )
    ray_serve.start(proxy_location="Disabled", logging_config=LOGGING)
    deployment = ray_serve.deployment(
        Replica,
        num_replicas=arguments.replicas,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": num_gpus},
        max_ongoing_requests=arguments.max_batch,
        max_constructor_retry_count=1,
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,
            request_router_kwargs={"num_fallback_replicas": arguments.replicas - 1},
            max_backoff_s=MAX_BACKOFF,
        ),
    )
    name = model_name(arguments)
    try:
        return ray_serve.run(deployment.bind(arguments), name=name, route_prefix=None, logging_config=LOGGING)
    except RuntimeError as error:
        ray_serve.delete(name)
        raise SystemExit(f"error: {error}") from error


def main() -> None:
    arguments = make_replicas_parser().parse_args()
    keys = read_keys(arguments)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(os.environ.get("RAY_ADDRESS", "local"), include_dashboard=False)
    try:
        run(RemoteEngine(deploy(arguments)), arguments, keys, arguments.replicas)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
