"""Prometheus metrics of a server."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from modeling_visualchat.chat_session_visualchat import Usage

from .answers import count


SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """
    What is counted.

    Args:
        num_waiting (`Callable`): Conversations that wait for a batch.
    """

    def __init__(self, num_waiting: Callable[[], int]):
        self.registry = CollectorRegistry()
        options = {"namespace": "visualchat", "registry": self.registry}
        self.requests = Counter("requests", "Requests by route and status", ["route", "status"], **options)
        self.tokens = Counter("tokens", "Tokens: new and known of prompts, generated", ["kind"], **options)
        self.images = Counter("images", "Images of prompts, new or known to their API key", ["kind"], **options)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "Seconds until the first token", buckets=SECONDS, **options
        )
        Gauge("queue_length", "Conversations that wait for a batch", **options).set_function(num_waiting)

    def count_request(self, scope: dict, status: int) -> None:
        """Counts a request by its route; one that no route has seen is `refused`."""
        self.requests.labels(getattr(scope.get("route"), "path", "refused"), status).inc()

    def count_usage(self, usage: Usage, image_seq_length: int) -> None:
        """Counts what a client is told of its answer, so that the sums say no more."""
        tokens = count(usage, image_seq_length)
        self.tokens.labels("new").inc(tokens["prompt"] - tokens["cached"])
        self.tokens.labels("known").inc(tokens["cached"])
        self.tokens.labels("generated").inc(tokens["answer"])
        self.images.labels("new").inc(usage.new_images)
        self.images.labels("known").inc(usage.known_images)
        self.first_token.observe(usage.first_token_seconds)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)
