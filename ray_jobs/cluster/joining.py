"""Joining a cluster that is there: whether an address answers, is Ray, and takes this process, in seconds."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dsmip.errors import UserError
from ray_jobs.cluster import environment  # noqa: F401  (first: Ray reads its variables when it is imported)

# isort: split
import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address_or_die

_CONNECT_SECONDS = 10.0  # Ray itself tries for 40 s and more, and prints each try
_ANSWER_SECONDS = 20.0  # of a head that has much else to do
_ASKS_WHO_IT_IS = "/ray.rpc.NodeInfoGcsService/GetClusterId"  # what Ray's own clients ask first
_NO_ENTRY = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def join(address: str, **options: Any) -> None:
    """Connects this process to the cluster of RAY_ADDRESS.

    Args:
        address: HOST:PORT, ray://HOST:PORT, or auto.
        options: of `ray.init`.

    Raises:
        UserError: no cluster answers there, or it refuses this process.
    """
    check_address(address)
    with _refusals_in_words(address):
        ray.init(**options)


def check_address(address: str) -> None:
    """Checks that a cluster answers there and takes this process.

    Raises:
        UserError: None does.
    """
    with _refusals_in_words(address):
        _check(address)


@contextmanager
def _refusals_in_words(address: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        why = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), repr(error))
        raise UserError(f"RAY_ADDRESS={address}: {why}; name a running cluster, or unset it for a local Ray") from error


def _check(address: str) -> None:
    """Checks that a Ray answers there and takes this process's token.

    Raises:
        OSError: Nothing answers.
        ConnectionError: What answers is no Ray, or refuses.
        ValueError: It is no address.
    """
    client = address.startswith("ray://")
    target = canonicalize_bootstrap_address_or_die(address) if address == "auto" else address.removeprefix("ray://")
    socket.create_connection(_host_and_port(target), timeout=_CONNECT_SECONDS).close()
    channel = init_grpc_channel(target)
    try:
        grpc.channel_ready_future(channel).result(timeout=_ANSWER_SECONDS)
        if not client:
            channel.unary_unary(_ASKS_WHO_IT_IS)(b"", timeout=_ANSWER_SECONDS)
    except grpc.FutureTimeoutError:
        raise ConnectionError("what answers there is no Ray") from None
    except grpc.RpcError as error:
        if error.code() in _NO_ENTRY:
            raise ConnectionError(f"the cluster does not take {_whose_token()} (docs/cluster.md, Tokens)") from None
        raise ConnectionError(f"Ray does not answer there ({error.code().name})") from None
    finally:
        channel.close()


def _host_and_port(target: str) -> tuple[str, int]:
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535 or "/" in host:
        raise ValueError("is not auto, HOST:PORT or ray://HOST:PORT")
    return host.strip("[]"), int(port)


def _whose_token() -> str:
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return "commands without a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "the token of RAY_AUTH_TOKEN"
    return f"the token in {os.environ.get('RAY_AUTH_TOKEN_PATH') or '~/.ray/auth_token'}"
