"""Listening sockets, and hosts as an address has them."""

from __future__ import annotations

import socket

from arllm.runtime.errors import InputError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError: the address is taken, or none of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(f"can't listen on {host}:{port}: {error.strerror or error}") from None


def bracketed(host: str) -> str:
    """A host before a port: IPv6 addresses stand in brackets."""
    return f"[{host}]" if ":" in host else host
