"""The one client for requests to other servers. It decides by the address that is really connected to.

A host's name is resolved once, every address of it is checked, and the connection goes to a checked address: a name that means
something else a moment later gains nothing. Each redirect is a new connection and is checked the same way; credentials do not
travel to another origin (httpx2 sees to that), and a redirect never leads from https to http. Hosts that an admin named in the
settings may lie in a private network.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import httpcore2
import httpx2

from lmweb.errors import OutboundFailed, OutboundRefused

CONNECT_SECONDS: Final = 10.0
READ_SECONDS: Final = 20.0
MAX_REDIRECTS: Final = 8

_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def client(trusted_hosts: Iterable[str] = (), *, on_response: Callable[[httpx2.Response], None] | None = None) -> httpx2.Client:
    """Return a client that reaches public addresses and ``trusted_hosts`` only.

    Its requests raise ``OutboundRefused`` for other addresses and ``OutboundFailed`` when a server cannot be reached or does not
    answer; a body that is cut off while it is streamed raises ``httpx2.TransportError``. ``on_response`` sees every answer first.
    """
    hooks: dict[str, list[Callable[..., Any]]] = {
        "request": [_check_scheme],
        "response": [_check_redirect, *([on_response] if on_response else [])],
    }
    transport = _GuardedTransport(frozenset(host.lower() for host in trusted_hosts))
    return httpx2.Client(transport=transport, follow_redirects=True, max_redirects=MAX_REDIRECTS, event_hooks=hooks)


def is_public(address: Address) -> bool:
    """Return whether an address is one of the public internet, also where an IPv6 address stands for an IPv4 one."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address.sixtofour is not None:
            address = address.sixtofour
        elif address.teredo is not None:
            return False
        elif address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.is_global and not address.is_multicast


def checked_addresses(host: str, port: int, trusted_hosts: frozenset[str]) -> list[str]:
    """Return the addresses of a host. Raises ``OutboundRefused`` if one is not public and the host not trusted, ``OutboundFailed``."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise OutboundFailed(f"The server {host[:100]} cannot be found. Is there a connection to the internet?") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if host.lower().rstrip(".") not in trusted_hosts:
        for address in addresses:
            if not is_public(ipaddress.ip_address(address.split("%")[0])):
                raise OutboundRefused(
                    f"The server {host[:100]} has an address in a private network. An admin can allow it in LMWEB_OUTBOUND_HOSTS."
                )
    return addresses


class _GuardedBackend(httpcore2.NetworkBackend):
    """Opens connections to checked addresses only."""

    def __init__(self, trusted_hosts: frozenset[str]) -> None:
        self._trusted_hosts = trusted_hosts
        self._backend = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Connect to the first address that answers."""
        failure: Exception = httpcore2.ConnectError(f"{host} has no address")
        for address in checked_addresses(host, port, self._trusted_hosts):
            try:
                return self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure


class _GuardedTransport(httpx2.HTTPTransport):
    """A transport whose pool connects through the guard, with time limits that a caller can shorten but not leave out."""

    def __init__(self, trusted_hosts: frozenset[str]) -> None:
        super().__init__()
        # httpx2 offers no way to hand a network backend to its pool.
        self._pool = httpcore2.ConnectionPool(
            ssl_context=httpx2.create_ssl_context(),
            max_connections=32,
            max_keepalive_connections=8,
            keepalive_expiry=15.0,
            network_backend=_GuardedBackend(trusted_hosts),
        )

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request."""
        request.extensions = {**request.extensions, "timeout": _limited(request.extensions.get("timeout") or {})}
        try:
            return super().handle_request(request)
        except httpx2.TimeoutException:
            raise OutboundFailed(f"The server {request.url.host} does not answer.") from None
        except httpx2.TransportError as error:
            raise OutboundFailed(f"The server {request.url.host} cannot be reached ({_reason(error)}).") from None


def _limited(timeouts: Mapping[str, float | None]) -> dict[str, float]:
    limits = {"connect": CONNECT_SECONDS, "read": READ_SECONDS, "write": READ_SECONDS, "pool": CONNECT_SECONDS}
    return {name: min(timeouts.get(name) or limit, limit) for name, limit in limits.items()}


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:200]


def _check_scheme(request: httpx2.Request) -> None:
    if request.url.scheme not in {"http", "https"}:
        raise OutboundRefused(f"Requests to '{request.url.scheme[:20]}:' addresses are not sent.")


def _check_redirect(response: httpx2.Response) -> None:
    target = response.headers.get("Location", "")
    if response.is_redirect and response.request.url.scheme == "https" and target.lower().startswith("http:"):
        raise OutboundRefused(f"{response.request.url.host} leads from https to an unprotected address. That is not followed.")
