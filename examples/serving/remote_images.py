"""Images at URLs, of hosts that are allowed, at public addresses, without redirects."""

import ipaddress
import socket
import time
from collections.abc import Collection

from huggingface_hub.utils import httpx

from .images import invalid_image


SECONDS = 20.0
PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # addresses of the other kind, public or not


def download_image(url: str, hosts: Collection[str], max_bytes: int, param: str | None = None) -> bytes:
    """
    The encoded image at a URL. The connection is made to the address that was checked, whatever the name of the host
    resolves to the next time.

    Args:
        url (`str`): The URL.
        hosts (`Collection[str]`): Allowed hosts; one with another port than the usual is written with it.
        max_bytes (`int`): Maximum bytes.
        param (`str`, *optional*): The field of the request, for errors.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise invalid_image(f"{url[:80]!r} is not a URL: {error}.", param) from None
    name = parsed.host.lower()
    usual = PORTS.get(parsed.scheme, 0)
    port = parsed.port or usual
    host = name if port == usual else f"{name}:{port}"
    if not usual or not name or host not in hosts or parsed.userinfo:
        message = f"Images are not fetched from {parsed.scheme}://{host}; send the image as a data URI."
        raise invalid_image(message, param)
    try:
        address = find_public_address(name, port)
        return _get(parsed.copy_with(host=address), parsed, max_bytes)
    except (OSError, httpx.HTTPError, ValueError) as error:
        raise invalid_image(f"The image at {url[:80]!r} cannot be fetched: {error}.", param) from None


def find_public_address(host: str, port: int) -> str:
    """An address of a host; a `ValueError` if any of its addresses is not public."""
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not addresses or not all(map(is_public, addresses)):
        raise ValueError("its host has an address that is not public")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an address is neither loopback, link-local, private, reserved nor one that stands for such."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64 or ip.teredo:
            return False
        ip = embedded or ip
    return ip.is_global and not ip.is_multicast


def _get(url: httpx.URL, named: httpx.URL, max_bytes: int) -> bytes:
    until, data = time.monotonic() + SECONDS, b""
    headers = {"Host": named.netloc.decode(), "Accept-Encoding": "identity"}
    options = {"headers": headers, "extensions": {"sni_hostname": named.host}}
    # A proxy of the environment would resolve the name once more.
    with (
        httpx.Client(follow_redirects=False, trust_env=False, timeout=SECONDS / 2) as client,
        client.stream("GET", url, **options) as response,
    ):
        if response.status_code != 200:
            what = "a redirect" if response.is_redirect else f"status {response.status_code}"
            raise ValueError(f"it answers with {what}")
        for part in response.iter_raw():
            data += part
            if len(data) > max_bytes:
                raise ValueError(f"it has more than {max_bytes:,} bytes")
            if time.monotonic() > until:
                raise ValueError(f"it takes more than {SECONDS:g} seconds")
    return data
