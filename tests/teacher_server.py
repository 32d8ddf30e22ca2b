# SPDX-License-Identifier: Apache-2.0
"""A small model behind HTTP, as stock vLLM (`/v1/completions`) and SGLang (`/generate`) serve one.

What is answered follows the sources of vLLM 0.32 and SGLang 0.5.23, for what a teacher needs of
them. Faults are functions of (path, body, answer) that return another answer, or raise `Fault`.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from minigold.load import LanguageModel

__all__ = ["Fault", "Server", "serving"]

Edit = Callable[[str, Any, Any], Any]


class Fault(Exception):  # noqa: N818
    """Answer with this status and these bytes; `cut` of them, or hang up before any if None."""

    def __init__(self, status: int = 500, body: bytes = b"", cut: int | None = -1) -> None:
        self.status, self.body, self.cut = status, body, cut
        super().__init__(status)


class Server:
    """A model, served on a port of this machine while `running`.

    Args:
        kind: vllm, sglang.
        most: the largest number of listed tokens that is served.
        key: the bearer token that is asked for.
        name: by which the model is served.
    """

    def __init__(
        self, model: LanguageModel, kind: str = "vllm", *, most: int = 10**6, key: str = "",
        name: str = "tiny",
    ) -> None:  # fmt: skip
        self.model, self.kind, self.most, self.key, self.name = model, kind, most, key, name
        self.others: list[dict[str, Any]] = []  # models beside it
        self.edits: list[Edit] = []
        self.asked: list[tuple[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self.port = 0
        self.lock = threading.Lock()
        self.http: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """On the port that it had before, if it was stopped."""
        self.http = _HTTP(("127.0.0.1", self.port), _handler(self))
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self.http:
            self.http.shutdown()
            self.http.server_close()
        self.http = None

    # -- what is answered ------------------------------------------------------------------------

    def answer(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            own = {"id": self.name, "object": "model", "owned_by": self.kind, "root": self.name,
                   "parent": None, "max_model_len": self.model.context}  # fmt: skip
            return {"object": "list", "data": [own, *self.others]}
        if path == "/v1/completions":
            return self.vllm(body)
        if path == "/generate" and self.kind == "sglang":
            return self.sglang(body)
        raise Fault(404, b'{"detail": "Not Found"}')

    def edited(self, path: str, body: Any, key: str | None) -> Any:
        if self.key and key != f"Bearer {self.key}":
            raise Fault(401, b'{"error": "Unauthorized"}')
        answer = self.answer(path, body)
        for edit in self.edits:
            answer = edit(path, body, answer)
        return answer

    def vllm(self, body: Any) -> Any:
        ids, k = self._ids(body["prompt"]), body["prompt_logprobs"]
        if k > self.most:
            told = (
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most}"
            )
            raise Fault(400, json.dumps({"error": {"message": told, "code": 400}}).encode())
        if body["model"] not in (self.name, *(one["id"] for one in self.others)):
            raise Fault(404, b'{"error": {"message": "The model does not exist."}}')
        if len(ids) + body["max_tokens"] > self.model.context:
            raise Fault(400, b'{"error": {"message": "maximum context length"}}')
        places: list[Any] = [None]
        for logp_V, i in zip(self._logps(ids), ids[1:], strict=True):
            top = logp_V.topk(k).indices.tolist()
            listed = dict.fromkeys([i, *top])  # the given token first
            ranks = {j: n for n, j in enumerate(top, start=1)}
            places.append({
                str(j): {"logprob": max(float(logp_V[j]), -9999.0), "rank": ranks.get(j, k + 1),
                         "decoded_token": self.model.tokenizer.decode([j])}
                for j in listed
            })  # fmt: skip
        choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length",
                  "prompt_logprobs": places, "prompt_token_ids": None}  # fmt: skip
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "model": self.name,
            "choices": [choice],
        }

    def sglang(self, body: Any) -> Any:
        ids = self._ids(body["text"] if "text" in body else body["input_ids"])
        start, k = body["logprob_start_len"], body["top_logprobs_num"]
        assert body["return_logprob"] is True
        logps = self._logps(ids)[start:]
        last = self.model.decoder.config.vocab_size - 1
        given = [[None, ids[start], None]]
        given += [
            [float(logp_V[i]), i if i < last else 0, None]
            for logp_V, i in zip(logps, ids[start + 1 :], strict=True)
        ]
        tops: list[Any] = [None]
        tops += [
            [[float(logp_V[j]), j, None] for j in logp_V.topk(k).indices.tolist()]
            for logp_V in logps
        ]
        meta = {"id": "1", "finish_reason": {"type": "length", "length": 0}, "prompt_tokens": len(ids),
                "input_token_logprobs": given, "output_token_logprobs": []}  # fmt: skip
        return {"text": "", "meta_info": meta | ({"input_top_logprobs": tops} if k else {})}

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.model.tokenizer.encode(prompt, add_special_tokens=False).ids
        assert all(type(i) is int for i in prompt)
        return prompt

    @torch.no_grad()
    def _logps(self, ids: list[int]) -> Tensor:
        """Row i: of what follows token i, the last one left out."""
        with self.lock:
            hidden_SD = self.model.decoder(torch.tensor([ids]))[0]
        return self.model.decoder.head.logits(hidden_SD[:-1]).log_softmax(-1)


class _HTTP(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for them

    def handle_error(self, *_: Any) -> None:
        """Clients hang up in these tests."""


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: Any) -> None:
            with server.lock:
                server.asked.append((self.path, body))
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                made = self.made(body)
            finally:
                with server.lock:  # before the answer goes out, which lets the next request come
                    server.at_once -= 1
            self.send(*made)

        def made(self, body: Any) -> tuple[int, bytes, int | None]:
            try:
                answer = server.edited(self.path, body, self.headers["Authorization"])
            except Fault as fault:
                return fault.status, fault.body, fault.cut
            raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            return 200, raw, -1

        def send(self, status: int, raw: bytes, cut: int | None) -> None:
            if cut is None:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw if cut < 0 else raw[:cut])

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def serving(model: LanguageModel, kind: str = "vllm", **settings: Any) -> Iterator[Server]:
    """A server that runs for a while."""
    server = Server(model, kind, **settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()
