"""An OpenAI-compatible chat-completions endpoint: a question, an answer; what may pass is asked again, with a bound."""

import json
import os
import threading
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from dsmip.errors import ReportedError, UserError, first_line, refuse_secret
from dsmip.messages import HIDDEN

KEY_VARIABLE = "DSMIP_ENDPOINT_KEY"
_PATH = "/chat/completions"
_MAY_PASS = frozenset({408, 409, 425, 429})  # and all of 500 and above
_MAX_BYTES = 1 << 22
_LONGEST_WAIT = 60.0


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """Where and how to ask.

    Attributes:
        url: Up to `/v1`, or with `/chat/completions`.
        model: As the endpoint calls it.
        at_once: How many questions are under way at a time.
        timeout: Seconds without a sign of an answer.
        retries: How often a question is asked again.
        wait: Seconds before it is for the first time; each later wait is twice as long.
    """

    url: str
    model: str
    at_once: int = 8
    timeout: float = 60.0
    retries: int = 5
    wait: float = 1.0


class EndpointAway(ReportedError):
    """An endpoint that cannot be reached, is overloaded or fails, also when asked again; later it may answer."""

    may_pass = True


class Stopped(Exception):
    """Nobody wants the answer any more."""


class Endpoint:
    """Asks an endpoint; any number of threads may."""

    def __init__(self, options: EndpointOptions) -> None:
        """
        Raises:
            UserError: The URL is none of http or https, or holds a secret; the key cannot be sent.
        """
        refuse_secret(options.url, "--url")
        if not _is_address(options.url):
            raise UserError(f"--url {options.url}: expected an address such as http://localhost:8000/v1")
        self.options = options
        self.address = options.url.rstrip("/")
        self.address += "" if self.address.endswith(_PATH) else _PATH
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"{KEY_VARIABLE}: holds characters that no key has")
        self._opener = build_opener(_NoRedirect())
        self._stop = threading.Event()

    def stop(self) -> None:
        """Ends the waits of questions that are under way."""
        self._stop.set()

    def ask(self, text: str) -> str:
        """The model's answer.

        Raises:
            EndpointAway: It fails, or is too slow, as often as it may.
            UserError: It refuses the question, or its answer is no chat completion.
            Stopped: `stop` was called while it waited.
        """
        wait = self.options.wait
        for attempt in range(self.options.retries + 1):
            try:
                return self._answer(self._post(text))
            except _Passing as error:
                if attempt == self.options.retries:
                    times = f"{attempt + 1} times" if attempt else "once"
                    raise EndpointAway(f"endpoint {self.address} has failed {times}: {error}") from None
                if self._stop.wait(min(max(wait, error.wait), _LONGEST_WAIT)):
                    raise Stopped from None
                wait *= 2
        raise AssertionError("the last attempt returns or raises")

    def _post(self, text: str) -> bytes:
        body = {"model": self.options.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = Request(self.address, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.options.timeout) as response:
                content: bytes = response.read(_MAX_BYTES)
                return content
        except HTTPError as error:
            said = self._without_key(_said(error))
            if error.code in _MAY_PASS or error.code >= 500:
                raise _Passing(f"HTTP {error.code}", _retry_after(error.headers.get("Retry-After"))) from None
            raise UserError(
                f"endpoint {self.address} refuses: HTTP {error.code}: {' '.join(said.split())[:200]}; "
                f"see --url, --model and the variable {KEY_VARIABLE}"
            ) from None
        except (OSError, HTTPException) as error:
            raise _Passing(first_line(error)) from None

    def _answer(self, content: bytes) -> str:
        try:
            answer = json.loads(content)["choices"][0]["message"]["content"]
            if not isinstance(answer, str):
                raise TypeError("its content is no text")
        except (ValueError, LookupError, TypeError, RecursionError):
            shown = " ".join(self._without_key(content[:200].decode("utf-8", "replace")).split())
            raise UserError(
                f"endpoint {self.address} answers with no chat completion: {shown!r}; --url should lead to an "
                "OpenAI-compatible API, such as http://localhost:8000/v1"
            ) from None
        return answer

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, HIDDEN) if self._key else text


class _Passing(Exception):
    """Asked again it may be answered.

    Attributes:
        wait: Seconds that the endpoint asks for.
    """

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class _NoRedirect(HTTPRedirectHandler):
    """Follows nothing: a key must not go to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _is_address(url: str) -> bool:
    """Whether a text is an address of http or https."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    plain = url.isascii() and url.isprintable() and " " not in url
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0


def _said(error: HTTPError) -> str:
    """The beginning of what came with a refusal."""
    with error:
        try:
            return error.read(2000).decode("utf-8", "replace")
        except (OSError, HTTPException):
            return ""


def _retry_after(value: str | None) -> float:
    try:
        seconds = float(value or 0)
    except ValueError:  # a date
        return 0.0
    return seconds if seconds > 0 else 0.0  # NaN is no time
