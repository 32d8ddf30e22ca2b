# SPDX-License-Identifier: Apache-2.0
"""Requests in, the JSON of a server's answers out: time-outs, retries, several at a time.

What passes (no connection, a server that starts again, an answer that is torn) is tried again for a
while; what does not is an error at once. The standard library's client: proxies and redirects are
not followed, and a connection serves one request.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from socket import SHUT_RDWR, socket
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from http.client import HTTPResponse

__all__ = ["ServerError", "Wire", "wire_to"]

log = logging.getLogger("minigold")
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # what a server says that is busy, or starts
FIRST, LONGEST = 0.5, 30.0  # seconds between tries: doubled from the first to the longest
SHOWN = 200  # characters of an answer in a message
T = TypeVar("T")


class ServerError(OSError):
    """A server that does not come back, or whose answer is not what was asked for."""


class _PassingError(Exception):
    """It may be better in a while."""


@dataclass(frozen=True)
class Wire:
    """The way to a server.

    Args:
        prefix: of all paths, without a slash at its end.
        timeout: seconds for one exchange, its last byte included.
        patience: seconds for which what passes is tried again.
        connections: requests at a time.
        key: sent as a bearer token, if there is one.
        stopped: ends the waiting of all threads.
        quiet: until when no more is said of trouble, by `time.monotonic`.
        troubled: something was tried again since this was cleared.
    """

    scheme: str
    host: str
    port: int | None
    prefix: str
    timeout: float
    patience: float
    connections: int
    key: str = field(default="", repr=False)
    stopped: threading.Event = field(default_factory=threading.Event)
    troubled: threading.Event = field(default_factory=threading.Event)
    quiet: list[float] = field(default_factory=lambda: [0.0])

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{f':{self.port}' if self.port else ''}{self.prefix}"

    def ask(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        most: int,
        patience: float | None = None,
    ) -> Any:
        """The value of the answer to a GET, or to a POST of `body`.

        Args:
            most: bytes of an answer.
            patience: in place of the wire's own.

        Raises:
            ServerError: it does not come in time, is refused, too large or no JSON.
        """
        limit = time.monotonic() + (self.patience if patience is None else patience)
        delay = FIRST
        while True:
            try:
                return self._exchange(path, body, most)
            except _PassingError as error:
                self.troubled.set()
                if time.monotonic() + delay > limit or self.stopped.is_set():
                    raise ServerError(
                        f"expected an answer of {self.url}{path}, got {error}; start the server "
                        "again or check the address (--teacher-patience is how long a run waits)"
                    ) from error
                if time.monotonic() >= self.quiet[0]:  # not once a thread
                    self.quiet[0] = time.monotonic() + delay
                    log.warning("%s: %s; it is tried again in %.1f s", self.url, error, delay)
                self.stopped.wait(delay)
                delay = min(2 * delay, LONGEST)

    def together(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """What the jobs return, in their order; the first error ends all of them."""
        done: dict[int, T] = {}
        errors: list[Exception] = []
        left, lock = iter(enumerate(jobs)), threading.Lock()

        def work() -> None:
            while not self.stopped.is_set():
                with lock:
                    i, job = next(left, (-1, None))
                if job is None:
                    return
                try:
                    done[i] = job()
                except Exception as error:  # noqa: BLE001 - it is raised again below
                    errors.append(error)
                    self.stopped.set()

        self.stopped.clear()
        # daemons: who stops a run does not wait for answers
        threads = [
            threading.Thread(target=work, daemon=True)
            for _ in range(min(self.connections, len(jobs)))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:
            self.stopped.set()
            raise
        self.stopped.clear()
        if errors:
            raise errors[0]
        return [done[i] for i in range(len(jobs))]

    def _exchange(self, path: str, body: dict[str, Any] | None, most: int) -> Any:
        from http.client import (  # 25 ms: only if used
            HTTPConnection,
            HTTPException,
            HTTPSConnection,
        )

        kind = HTTPSConnection if self.scheme == "https" else HTTPConnection
        until = time.monotonic() + self.timeout
        # the port in any case: without one, it is looked for in the host, as of [::1]
        connection = kind(self.host, self.port or kind.default_port, timeout=self.timeout)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        method = "GET" if body is None else "POST"
        try:
            connection.connect()
            with _cut_at(until, connection.sock):
                connection.request(method, self.prefix + path, data, headers)
                with closing(connection.getresponse()) as response:
                    raw = _body(response, most)
            if time.monotonic() >= until:  # an answer that is cut may look whole
                raise TimeoutError
        except (OSError, HTTPException) as error:
            if isinstance(error, TimeoutError) or time.monotonic() >= until:
                raise _PassingError(f"no whole answer within {self.timeout:g} s") from error
            raise _PassingError(f"{type(error).__name__} ({error})") from error
        finally:
            connection.close()
        if response.status in AGAIN:
            raise _PassingError(f"status {response.status} ({_shown(raw)})")
        if response.status != 200:
            hint = "; set MINIGOLD_TEACHER_KEY" if response.status in (401, 403) else ""
            if b"max allowed" in raw:
                hint = "; lower --teacher-top-k, or start the server with --max-logprobs"
            raise ServerError(
                f"expected status 200 of {self.url}{path}, got {response.status} ({_shown(raw)}){hint}"
            )
        if len(raw) > most:
            raise ServerError(
                f"expected at most {most:,} bytes of {self.url}{path} for what was asked, got more; "
                "check that it is the server that you mean"
            )
        try:
            return json.loads(raw, parse_constant=_refused)
        except (ValueError, RecursionError) as error:
            raise ServerError(
                f"expected JSON of {self.url}{path}, got {_shown(raw)!r} ({error}); check that it is "
                "the server that you mean"
            ) from error


def wire_to(url: str, *, timeout: float, patience: float, connections: int, key: str = "") -> Wire:
    """The way to an address `http://host:port`, perhaps with a path.

    Raises:
        ValueError: it is no such address, or the key cannot be sent.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
        sent = (parts.hostname or "").encode("idna").decode() + parts.path
    except ValueError as error:
        raise ValueError(
            f"expected an address as http://host:port, got {url!r} ({error})"
        ) from error
    if re.search(r"[^!-~]", sent):
        raise ValueError(
            f"expected an address as http://host:port without spaces, its path in ASCII, got {url!r}; "
            "write %20 for a space in the path"
        )
    key = key.strip()  # a file that holds one ends in a new line
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            "expected printable ASCII in MINIGOLD_TEACHER_KEY, got other characters (not shown here); "
            "copy the key again"
        )
    more = parts.query or parts.fragment or parts.username or parts.password
    if parts.scheme not in ("http", "https") or not parts.hostname or more:
        raise ValueError(
            f"expected an address as http://host:port, with a path or without, got {url!r}; give a "
            "key in MINIGOLD_TEACHER_KEY, if the server wants one"
        )
    return Wire(
        parts.scheme,
        parts.hostname,
        port,
        parts.path.rstrip("/"),
        timeout,
        patience,
        connections,
        key,
    )


@contextmanager
def _cut_at(until: float, used: socket) -> Iterator[None]:
    """Ends all reading at that time: a socket's own time-out begins again with each byte."""

    def cut() -> None:
        with suppress(OSError):  # it is closed
            socket.shutdown(used, SHUT_RDWR)  # of what is below TLS, which another thread is using

    timer = threading.Timer(until - time.monotonic(), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _body(response: HTTPResponse, most: int) -> bytes:
    """The answer, or a little more than `most` bytes of it."""
    from http.client import IncompleteRead

    parts, size = [], 0
    while size <= most:
        part = response.read1(2**16)
        if not part:
            break
        parts.append(part)
        size += len(part)
    if size <= most and response.length:  # of those that were promised
        raise IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _shown(raw: bytes) -> str:
    text = " ".join(raw[: 4 * SHOWN].decode("utf-8", "replace").split())
    return text[:SHOWN] + "…" * (len(text) > SHOWN)
