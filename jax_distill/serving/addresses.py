"""Where the server listens, and what to call that."""

import ipaddress
import socket
from collections.abc import Sequence

import tornado.netutil


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets of an address; port 0 takes a free one.

    Raises:
      ValueError: there is no such address here, or it is taken.
    """
    try:
        return tornado.netutil.bind_sockets(port, host)
    except OSError as error:
        raise ValueError(
            f"--host={host} --port={port}: {error.strerror or error}; give another, --port=0 for"
            " one that is free"
        ) from None


def shown(host: str, sockets: Sequence[socket.socket]) -> str:
    """Where the page is, for people: the address that opens it here, and the others'.

    Args:
      host: that the sockets were made for.
      sockets: as `listen` makes them.
    """
    port, bound = sockets[0].getsockname()[1], _bound(sockets)
    if any(address.is_unspecified for address in bound):
        here, there = _url("localhost", port), _url(socket.gethostname(), port)
        return f"{here} (from other machines: {there})"
    # A name for the loopback address that is not localhost would be refused as a stranger's.
    named = host.lower() == "localhost" or not is_local(sockets)
    return _url(host if named else str(bound[0]), port)


def is_local(sockets: Sequence[socket.socket]) -> bool:
    """Whether only this machine reaches them."""
    return all(address.is_loopback for address in _bound(sockets))


def _url(host: str, port: int) -> str:
    return (
        f"http://[{host.replace('%', '%25')}]:{port}/" if ":" in host else f"http://{host}:{port}/"
    )


def _bound(sockets: Sequence[socket.socket]) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    return [ipaddress.ip_address(one.getsockname()[0]) for one in sockets]
