# SPDX-License-Identifier: Apache-2.0
"""A teacher behind a real HTTP server: equal to one in process, and never wrong in silence."""

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import math
import re
import runpy
import socket
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minigold as mg
from minigold import wire
from minigold.carry import Reading
from minigold.events import CHUNK
from minigold.http_teacher import LONGEST, is_address, open_server
from minigold.load import LanguageModel, load
from minigold.pair import make_pair
from minigold.rollout import collect, sample_answers
from minigold.tiers import limited
from minigold.train import distill
from minigold.wire import ServerError, Wire, wire_to
from teacher_server import Fault, Server, serving
from test_cli import run, write_rows
from test_train import CONFIG, PROMPTS
from tiny_folders import tiny_folder
from tiny_models import tiny_model
from tokenizers_for_tests import byte_bpe, sentencepiece_bpe

KINDS = ("vllm", "sglang")
FAST: dict[str, Any] = {"patience": 5.0, "timeout": 5.0}
READINGS = [
    Reading([1, 2, 3], [10, 20, 30, 40]),
    Reading([5], []),
    Reading([7, 8], [100]),
    Reading([3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5]),
]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again sooner."""
    monkeypatch.setattr(wire, "FIRST", 0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's folder."""
    work = tmp_path_factory.mktemp("served")
    return tiny_folder(work / "teacher", "llama", byte_bpe(), end="<|im_end|>", seed=2)


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return load(folder)


@lru_cache(maxsize=1)
def new_student() -> LanguageModel:
    return tiny_model("gemma3_text", sentencepiece_bpe(), end="</s>", seed=1)


def student() -> LanguageModel:
    return copy.deepcopy(new_student())


# ------------------------------------------------------------------- equal to one in process
@pytest.mark.parametrize("k", [0, 1, 6, 10**4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_is_what_the_model_says_in_process(
    model: LanguageModel, folder: Path, kind: str, k: int
) -> None:
    k = min(k, model.n_tokens)
    with serving(model, kind) as server:
        teacher = open_server(server.url, folder, top_k=k, **FAST)
        assert (teacher.tier, teacher.top_k) == ("topk" if k else "tokens", k)
        assert (teacher.name, teacher.context) == ("tiny", model.context - 1)
        told = teacher.tell(READINGS, micro_batch=2)
    for one, own, reading in zip(
        told, limited(model, k).tell(READINGS, micro_batch=2), READINGS, strict=True
    ):
        assert len(one.logp_M) == len(reading.ids) + 1
        torch.testing.assert_close(one.logp_M, own.logp_M, atol=2e-5, rtol=0)
        for row, ids_K, logp_K in zip(range(len(one.logp_M)), one.id_MK, one.logp_MK, strict=True):
            found, known = (
                {i: x for i, x in zip(ids.tolist(), logps.tolist(), strict=True) if x > -math.inf}
                for ids, logps in ((ids_K, logp_K), (own.id_MK[row], own.logp_MK[row]))
            )
            assert found.keys() == known.keys()
            assert all(found[i] == pytest.approx(known[i], abs=2e-5) for i in found)


@pytest.mark.parametrize("k", [0, 12, 10**4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_over_http_is_the_run_in_process(
    model: LanguageModel, folder: Path, kind: str, k: int
) -> None:
    """With all of the vocabulary, that of the dense teacher."""
    config = dataclasses.replace(CONFIG, steps=2, events="prefix" if k else CHUNK)
    inside: Any = model if k > model.n_tokens else limited(model, k)
    with serving(model, kind) as server:
        # all of the vocabulary takes seconds on a busy machine
        teacher = open_server(server.url, folder, top_k=min(k, model.n_tokens), timeout=60)
        over = distill(student(), teacher, PROMPTS, config)
    own = distill(student(), inside, PROMPTS, config)
    for one, other in zip(over, own, strict=True):
        assert one["chunks"] == other["chunks"]
        keys = ("loss", "grad_norm", "reverse_kl_per_byte", "other_mass_teacher")
        for key in keys if k else keys[:3]:
            assert one[key] == pytest.approx(other[key], rel=2e-3, abs=1e-5), key


def test_requests_are_sent_together_but_no_more_than_asked_for(
    model: LanguageModel, folder: Path
) -> None:
    with serving(model) as server:
        server.edits.append(whole(lambda a: (time.sleep(0.05), a)[1]))
        for n in (1, 3):
            teacher = open_server(server.url, folder, connections=n, **FAST)
            server.most_at_once = 0
            teacher.tell([Reading([1], [2])] * 7, micro_batch=1)
            assert server.most_at_once == n


def test_a_batch_stays_in_its_order(model: LanguageModel, folder: Path) -> None:
    with serving(model) as server:
        slow = [0.15, 0.1, 0.05, 0.0]

        def late(path: str, body: Any, answer: Any) -> Any:
            if path == "/v1/completions" and len(body["prompt"]) < 12:
                time.sleep(slow[len(body["prompt"]) % 4])
            return answer

        server.edits.append(late)
        teacher = open_server(server.url, folder, **FAST)
        sizes = [len(one.logp_M) for one in teacher.tell(READINGS, micro_batch=1)]
    assert sizes == [len(one.ids) + 1 for one in READINGS]


# ------------------------------------------------------------------------- answers that do not fit
Edit = Callable[[list[Any]], Any]


def one_place(change: Callable[[dict[str, Any], int], Any]) -> Callable[..., Any]:
    """Of vLLM: edits the place of the last token but one."""

    def edit(path: str, body: Any, answer: Any) -> Any:
        if path == "/v1/completions" and not isinstance(body["prompt"], str):
            places = answer["choices"][0]["prompt_logprobs"]
            at = len(body["prompt"]) - 2
            changed = change(places[at], body["prompt"][at])
            places[at] = places[at] if changed is None else changed
        return answer

    return edit


def whole(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Edits the whole answer to a list of tokens."""

    def edit(path: str, body: Any, answer: Any) -> Any:
        return change(answer) if path in ("/v1/completions", "/generate") else answer

    return edit


def put(place: dict[str, Any], i: Any, logp: Any) -> None:
    place[str(i)] = {"logprob": logp, "rank": 1, "decoded_token": ""}


def without(place: dict[str, Any], i: int) -> dict[str, Any]:
    return {key: value for key, value in place.items() if key != str(i)}


def least_but(place: dict[str, Any], i: int) -> str:
    return min((key for key in place if key != str(i)), key=lambda key: place[key]["logprob"])


VLLM_FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "without the given token": (one_place(without), "got no log-probability of the given token"),
    "a positive one": (one_place(lambda p, i: put(p, i, 0.5)), r"got a log-probability of 0\.5"),
    "null": (one_place(lambda p, i: put(p, i, None)), "got a log-probability of None"),
    "text": (one_place(lambda p, i: put(p, i, "-1.0")), r"got a log-probability of -1\.0"),
    "true": (one_place(lambda p, i: put(p, i, True)), "got a log-probability of True"),
    "NaN": (one_place(lambda p, i: put(p, i, math.nan)), r"expected JSON .*NaN is no number of JSON"),
    "infinite": (one_place(lambda p, i: put(p, i, -math.inf)), r"expected JSON .*-Infinity is no"),
    "out of range": (
        whole(lambda a: re.sub(r"-\d+\.\d+", "-1e999", json.dumps(a)).encode()),
        "got a log-probability of -inf",
    ),
    "what stands for NaN": (one_place(lambda p, i: put(p, i, -9999.0)), "stands for -inf or NaN"),
    "an entry that is a number": (
        one_place(lambda p, i: {**p, str(i): -1.0}), "got TypeError"
    ),
    "no logprob in an entry": (one_place(lambda p, i: {**p, str(i): {}}), "got KeyError 'logprob'"),
    "a key that is no id": (one_place(lambda p, _: put(p, "the", -9.0)), "got ValueError"),
    "a negative id": (
        one_place(lambda p, i: {**without(p, int(least_but(p, i))), "-5": {"logprob": -30.0}}),
        "got a token -5",
    ),
    "more than one in sum": (
        one_place(lambda p, _: {key: {"logprob": -0.1} for key in p}), "add up to"
    ),
    "one too few": (
        one_place(lambda p, i: without(without(p, int(least_but(p, i))), least_but(without(p, int(least_but(p, i))), i))),
        r"expected 5 listed tokens .* got [34] tokens in that of token \d+",
    ),
    "two too many": (
        one_place(lambda p, _: {**p, "401": {"logprob": -30.0}, "402": {"logprob": -30.0}}),
        r"got [78] tokens in that of token \d+ of the answer; nothing was tr",
    ),
    "an empty place": (one_place(lambda *_: {}), "got no log-probability of the given token"),
    "a place that is null": (
        whole(lambda a: a["choices"][0]["prompt_logprobs"].__setitem__(2, None) or a),
        "got TypeError",
    ),
    "one place too few": (
        whole(lambda a: a["choices"][0]["prompt_logprobs"].pop() and a),
        r"expected log-probabilities of (\d+) given tokens .*, got \d+ places for \1 tokens",
    ),
    "places of a neighbour": (
        whole(lambda a: a["choices"][0]["prompt_logprobs"].insert(1, a["choices"][0]["prompt_logprobs"].pop()) or a),
        "got no log-probability of the given token",
    ),
    "no places": (
        whole(lambda a: a["choices"][0].__setitem__("prompt_logprobs", None) or a),
        "got -1 places",
    ),
    "no key for them": (
        whole(lambda a: a["choices"][0].pop("prompt_logprobs") and a), "KeyError 'prompt_logprobs'"
    ),
    "no choices": (whole(lambda _: {"choices": []}), "got ValueError"),
    "two choices": (whole(lambda a: {"choices": a["choices"] * 2}), "got ValueError"),
    "a list": (whole(lambda a: [a]), "got TypeError"),
    "null alone": (whole(lambda _: None), "got TypeError"),
    "ids of another prompt": (
        whole(lambda a: a["choices"][0].__setitem__("prompt_token_ids", [1, 2]) or a),
        "got other tokens than were given",
    ),
    "no JSON": (whole(lambda _: b"<html>Bad Gateway</html>"), "expected JSON .* got '<html>Bad Ga"),
    "deep JSON": (whole(lambda _: b"[" * 10**5 + b"]" * 10**5), "expected JSON of"),
    "torn JSON": (whole(lambda a: json.dumps(a).encode()[:-20]), "expected JSON of"),
    "no UTF-8": (whole(lambda _: b'"\xff\xfe'), "expected JSON of"),
    "a huge answer": (whole(lambda _: b" " * 2**23), "expected at most [0-9,]+ bytes of"),
}  # fmt: skip


def taught(server: Server, folder: Path, before: Any = None, **settings: Any) -> Any:
    """Opens the server, then spoils its answers, and trains; the student and whether it moved."""
    teacher = open_server(server.url, folder, **{"top_k": 5, **FAST, **settings})
    one = student()
    weights = [p.clone() for p in one.decoder.parameters()]
    if before:
        before()
    try:
        return distill(one, teacher, PROMPTS, dataclasses.replace(CONFIG, steps=2))
    finally:
        pairs = zip(weights, one.decoder.parameters(), strict=True)
        taught.moved = not all(torch.equal(a, b) for a, b in pairs)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", VLLM_FAULTS)
def test_an_answer_that_does_not_fit_is_refused(
    model: LanguageModel, folder: Path, name: str
) -> None:
    edit, message = VLLM_FAULTS[name]
    with serving(model) as server:
        teacher = open_server(server.url, folder, top_k=5, **FAST)
        server.edits.append(after_the_probe(edit))
        with pytest.raises(ServerError, match=message):
            teacher.tell(READINGS[3:], micro_batch=1)


def after_the_probe(edit: Callable[..., Any]) -> Callable[..., Any]:
    probed = [False]

    def edited(path: str, body: Any, answer: Any) -> Any:
        first, probed[0] = not probed[0], True
        return answer if first else edit(path, body, answer)

    return edited


@pytest.mark.parametrize("name", ["without the given token", "one too few", "no JSON"])
def test_no_step_is_trained_on_an_answer_that_does_not_fit(
    model: LanguageModel, folder: Path, name: str
) -> None:
    edit, message = VLLM_FAULTS[name]
    with serving(model) as server, pytest.raises(ServerError, match=message):
        taught(server, folder, lambda: server.edits.append(after_the_probe(edit)))
    assert not taught.moved  # type: ignore[attr-defined]


def sglang_fault(change: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    def edit(path: str, body: Any, answer: Any) -> Any:
        if path == "/generate":
            change(answer["meta_info"])
        return answer

    return edit


SGLANG_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "one token too few": (lambda m: m["input_token_logprobs"].pop(), "got \\d+ places for"),
    "another token": (lambda m: m["input_token_logprobs"][2].__setitem__(1, 77), "other tokens than"),
    "token 0 in place of another": (
        lambda m: m["input_token_logprobs"][2].__setitem__(1, 0), "other tokens than were given"
    ),
    "null": (lambda m: m["input_token_logprobs"][1].__setitem__(0, None), "log-probability of None"),
    "positive": (lambda m: m["input_token_logprobs"][1].__setitem__(0, 3.0), "two log-probabilities|of 3"),
    "one list too few": (lambda m: m["input_top_logprobs"].pop(), "got \\d+ lists for"),
    "a short list": (lambda m: m["input_top_logprobs"][1].pop(), "a token twice, or of another length"),
    "a token twice": (
        lambda m: m["input_top_logprobs"][1].__setitem__(1, m["input_top_logprobs"][1][0]),
        "a list with a token twice",
    ),
    "no lists": (lambda m: m.pop("input_top_logprobs"), "expected 5 listed tokens .* got 1 tokens"),
    "no tokens": (lambda m: m.pop("input_token_logprobs"), "KeyError 'input_token_logprobs'"),
    "a null list": (lambda m: m["input_top_logprobs"].__setitem__(1, None), "got TypeError"),
}  # fmt: skip


@pytest.mark.parametrize("name", SGLANG_FAULTS)
def test_an_answer_of_sglang_that_does_not_fit_is_refused(
    model: LanguageModel, folder: Path, name: str
) -> None:
    change, message = SGLANG_FAULTS[name]
    with serving(model, "sglang") as server:
        teacher = open_server(server.url, folder, top_k=5, **FAST)
        server.edits.append(sglang_fault(change))
        with pytest.raises(ServerError, match=message):
            teacher.tell(READINGS[3:], micro_batch=1)


def test_sglang_writes_0_for_the_last_id_of_a_vocabulary(folder: Path, tmp_path: Path) -> None:
    tokenizer = byte_bpe()
    n = tokenizer.get_vocab_size()
    exact = tiny_folder(tmp_path / "exact", "llama", tokenizer, end="<|im_end|>", rows=n)
    with serving(load(exact), "sglang") as server:
        teacher = open_server(server.url, exact, **FAST)
        assert len(teacher.tell([Reading([1], [n - 1, 5])], micro_batch=1)[0].logp_M) == 3


# ------------------------------------------------------------- servers that go, and come back
def test_a_server_that_dies_and_comes_back_changes_nothing(
    model: LanguageModel, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It dies between the answers of a step; the run waits for it."""
    config = dataclasses.replace(CONFIG, steps=2)
    with serving(model) as server:
        teacher = open_server(server.url, folder, top_k=5, patience=30, timeout=5)
        whole_run = distill(student(), teacher, PROMPTS, config)
        left = [9]

        def die(path: str, body: Any, answer: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                threading.Thread(target=server.stop).start()
                threading.Timer(1.0, server.start).start()
            if left[0] <= 0 and left[0] > -4:
                raise Fault(cut=None)
            return answer

        server.edits.append(die)
        with caplog.at_level(logging.WARNING, "minigold"):
            broken_run = distill(student(), teacher, PROMPTS, config)
        assert left[0] <= -4
    assert "it is tried again in 0.1 s" in caplog.text
    for one, other in zip(whole_run, broken_run, strict=True):
        assert one["loss"] == other["loss"]
        assert one["grad_norm"] == other["grad_norm"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(503, b"starting"), Fault(500, b"CUDA out of memory"), Fault(429, b"later"),
        Fault(200, b'{"choices": []}' * 100, cut=30), Fault(cut=None), Fault(502, b"<html>"),
    ],
    ids=["503", "500", "429", "torn", "hung up", "502"],
)  # fmt: skip
def test_what_passes_is_tried_again(model: LanguageModel, folder: Path, fault: Fault) -> None:
    with serving(model) as server:
        teacher = open_server(server.url, folder, **FAST)
        times = [2]

        def fail(path: str, body: Any, answer: Any) -> Any:
            times[0] -= 1
            if times[0] >= 0:
                raise fault
            return answer

        server.edits.append(fail)
        assert len(teacher.tell(READINGS[:1], micro_batch=1)) == 1
        assert times[0] < 0


def test_a_slow_answer_is_given_up_and_asked_for_again(model: LanguageModel, folder: Path) -> None:
    with serving(model) as server:
        teacher = open_server(server.url, folder, timeout=1.0, patience=20)
        delays = [1.6]

        def slow(path: str, body: Any, answer: Any) -> Any:
            if delays and path == "/v1/completions":
                time.sleep(delays.pop())
            return answer

        server.edits.append(slow)
        begun = time.monotonic()
        assert len(teacher.tell(READINGS, micro_batch=1)) == len(READINGS)
        assert 1.0 < time.monotonic() - begun < 15


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (b"", b"x"),
        (b"HTTP/1.1 200 OK\r\n", b"X-More: 1\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", b" "),  # whole JSON, wherever it is cut
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
    ids=["status", "headers", "continue", "body", "body without length", "chunks"],
)
def test_a_server_that_drips_is_given_up_in_time(first: bytes, drop: bytes) -> None:
    """Each byte comes in time, the answer never does."""
    ended = threading.Event()

    def drip(listener: socket.socket) -> None:
        with listener.accept()[0] as client, contextlib.suppress(OSError):
            client.sendall(first)
            while not ended.wait(0.05):
                client.sendall(drop)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        # were it not given up, it would end by itself
        last = threading.Timer(6, ended.set)
        last.start()
        port, begun = listener.getsockname()[1], time.monotonic()
        one = wire_to(f"http://127.0.0.1:{port}", timeout=0.5, patience=0, connections=1)
        with pytest.raises(ServerError, match=r"/x, got no whole answer within 0\.5 s; start"):
            one.ask("/x", most=10**6)
        assert time.monotonic() - begun < 5
        last.cancel()
        ended.set()
        thread.join()


def test_an_address_without_a_port_has_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of `[::1]` is not 1."""
    asked: list[Any] = []

    def refuse(address: Any, *_: Any, **__: Any) -> None:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    for url in ("http://[::1]", "https://[::1]", "http://host", "http://host:81"):
        with pytest.raises(ServerError, match="ConnectionRefusedError"):
            wire_to(url, timeout=1, patience=0, connections=1).ask("/x", most=10)
    assert asked == [("::1", 80), ("::1", 443), ("host", 80), ("host", 81)]


@pytest.mark.parametrize("dead", [True, False])
def test_a_server_that_stays_away_ends_the_run_in_time(
    model: LanguageModel, folder: Path, dead: bool
) -> None:
    def leave() -> None:
        if dead:
            server.stop()
        else:
            server.edits.append(lambda *_: (_ for _ in ()).throw(Fault(503, b"overloaded")))

    with serving(model) as server:
        begun = time.monotonic()
        message = "expected an answer of .*, got " + (
            "Conn" if dead else r"status 503 \(overloaded\)"
        )
        with pytest.raises(ServerError, match=message + r".*--teacher-patience is how long"):
            taught(server, folder, leave, patience=2.0)
        assert time.monotonic() - begun < 20
    assert not taught.moved  # type: ignore[attr-defined]


def test_one_failure_ends_all_requests_of_a_step(model: LanguageModel, folder: Path) -> None:
    with serving(model) as server:
        teacher = open_server(server.url, folder, connections=2, **FAST)

        def refuse(path: str, body: Any, answer: Any) -> Any:
            if body and len(body["prompt"]) == 3:
                raise Fault(400, b"no")
            return answer

        server.edits.append(refuse)
        server.asked.clear()
        with pytest.raises(ServerError, match=r"expected status 200 of .*, got 400 \(no\)"):
            teacher.tell([Reading([1], [2])] * 40, micro_batch=1)
        assert len(server.asked) < 10
        server.edits.clear()
        assert len(teacher.tell(READINGS, micro_batch=1)) == len(READINGS)


@pytest.mark.parametrize("when", ["between steps", "in a step"])
def test_another_model_behind_the_same_address_is_refused(
    model: LanguageModel, folder: Path, when: str
) -> None:
    other = tiny_model("llama", byte_bpe(), end="<|im_end|>", seed=9)
    with serving(model) as server:
        teacher = open_server(server.url, folder, **FAST)
        n_asked = [0]

        def swap(path: str, body: Any, answer: Any) -> Any:
            n_asked[0] += 1
            if n_asked[0] == 3:
                server.model = other
                raise Fault(503)
            return answer

        if when == "between steps":
            server.model = other
        else:
            server.edits.append(swap)
        with pytest.raises(
            ServerError, match="to serve the model that it served at the start, got"
        ):
            teacher.tell(READINGS, micro_batch=1)


@pytest.mark.parametrize("other", [False, True])
def test_a_run_goes_on_with_the_model_that_it_began_with(
    model: LanguageModel, folder: Path, tmp_path: Path, other: bool
) -> None:
    """A server may have another one by then, under the same name and with the same tokenizer."""
    prompts = [mg.data.Prompt("hello", line=1)]
    config = mg.Config(steps=2, batch_size=1, max_new_tokens=4, student_plain=True,
                       teacher_plain=True, save_every=1, warmup=0)  # fmt: skip
    student, out = tmp_path / "student", tmp_path / "run"
    tiny_folder(student, "llama", sentencepiece_bpe(), end="</s>")
    with serving(model) as server:
        told = functools.partial(open_server, server.url, folder, top_k=4, **FAST)
        distill(load(student), told(), prompts, config, out=out, stop=lambda: True)
        if other:
            server.model = tiny_model("llama", byte_bpe(), end="<|im_end|>", seed=9)
        again = functools.partial(distill, load(student), told(), prompts, config)
        if other:
            told_so = r"model behind --teacher \(\d\.\d{3} nats a token off"
            with pytest.raises(ValueError, match=told_so):
                again(out=out, resume=True)
        else:
            assert len(again(out=out, resume=True)) == 2


def test_rounding_is_not_another_model(model: LanguageModel, folder: Path) -> None:
    with serving(model) as server:
        teacher = open_server(server.url, folder, **FAST)
        noise = np.random.default_rng(0)

        def jitter(path: str, body: Any, answer: Any) -> Any:
            for place in answer["choices"][0]["prompt_logprobs"][1:]:
                for entry in place.values():
                    entry["logprob"] = min(0.0, entry["logprob"] + noise.normal(scale=0.01))
            return answer

        server.edits.append(jitter)
        assert len(teacher.tell(READINGS[1:2], micro_batch=1)) == 1


# ---------------------------------------------------------------------------- at the start
def test_what_a_server_is_is_found_out(model: LanguageModel, folder: Path) -> None:
    for kind in KINDS:
        with serving(model, kind) as server:
            assert open_server(server.url, folder, **FAST).kind == kind
            assert open_server(server.url + "/", folder, **FAST).kind == kind
    with serving(model, "sglang") as server:
        assert open_server(server.url + "/v1", folder, **FAST).kind == "vllm"
        assert open_server(server.url + "/v1/completions", folder, **FAST).kind == "vllm"
        assert open_server(server.url + "/generate", folder, **FAST).kind == "sglang"


def test_a_server_that_lists_no_tokens_is_of_the_tier_tokens(
    model: LanguageModel, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def given_only(path: str, body: Any, answer: Any) -> Any:
        if path == "/v1/completions":
            choice = answer["choices"][0]
            choice["prompt_logprobs"] = [
                p and dict([*p.items()][:1]) for p in choice["prompt_logprobs"]
            ]
        return answer

    with serving(model) as server:
        server.edits.append(given_only)
        teacher = open_server(server.url, folder, top_k=7, **FAST)
        assert (teacher.tier, teacher.top_k) == ("tokens", 0)
        assert "lists no tokens, although --teacher-top-k is 7" in caplog.text
        with pytest.raises(ValueError, match=r"tier tokens can serve .* use --events chunk"):
            distill(student(), teacher, PROMPTS, CONFIG)


def test_all_that_there_are_is_enough(model: LanguageModel, folder: Path) -> None:
    """More tokens than the vocabulary has: the server lists all of them."""
    with serving(model) as server:
        real = server.vllm
        server.vllm = lambda body: real(  # type: ignore[method-assign]
            {**body, "prompt_logprobs": min(body["prompt_logprobs"], model.n_tokens)}
        )
        assert open_server(server.url, folder, top_k=10**5, **FAST).top_k == model.n_tokens


def edit_models(**changes: Any) -> Callable[..., Any]:
    def edit(path: str, body: Any, answer: Any) -> Any:
        if path == "/v1/models":
            answer["data"][0] |= changes
        return answer

    return edit


@pytest.mark.parametrize(
    ("edit", "settings", "message"),
    [
        (edit_models(owned_by="llamacpp"), {}, "owned by 'llamacpp'; if it speaks as one of them, say"),
        (lambda *_: {"data": []}, {}, "expected a list of models at"),
        (lambda *_: [], {}, "expected a list of models at"),
        (lambda *_: b"<html>", {}, "expected JSON of"),
        (None, {"top_k": 21}, r"got 400 \(.*greater than max allowed: 20.*; lower --teacher-top-k, or start"),
        (None, {"model": "other"}, "--teacher-model to be one of tiny, got other"),
        (None, {"top_k": -1}, "--teacher-top-k at least 0, got -1"),
        (None, {"connections": 0}, "--teacher-connections at least 1, got 0"),
        (None, {"timeout": 0.0}, r"--teacher-timeout at least 1, got 0\.0"),
        (None, {"timeout": 1e10}, r"--teacher-timeout at most 1,000,000, got 10000000000\.0"),
        (None, {"patience": math.nan}, "--teacher-patience at least 0, got nan"),
        (whole(lambda _: {"choices": [{"text": "x"}]}), {}, "KeyError 'prompt_logprobs' .* cannot be a t"),
        (one_place(lambda p, i: put(p, i, 1.5) if len(p) > 1 else None), {}, r"of 1\.5"),
        (one_place(lambda p, _: put(p, 400, -40.0) or put(p, 401, -40.0) if len(p) > 1 else None), {},
         "expected 20 listed tokens .*; lower --teacher-top-k"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_be_a_teacher_is_refused_at_once(
    model: LanguageModel, folder: Path, edit: Any, settings: dict[str, Any], message: str
) -> None:
    with serving(model, most=20) as server:
        server.edits += [edit] if edit else []
        with pytest.raises((ServerError, ValueError), match=message):
            open_server(server.url, folder, **{**FAST, "patience": 60.0, **settings})


def test_no_server_is_told_at_once(folder: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(
        ServerError, match=r"expected an answer of http://127\.0\.0\.1:9/v1/models, got Conn"
    ):
        open_server("http://127.0.0.1:9", folder, patience=60)
    assert time.monotonic() - begun < 30  # half of its patience


def test_the_folder_of_another_tokenizer_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", "gemma3_text", sentencepiece_bpe(), end="</s>")
    for kind in KINDS:
        with (
            serving(model, kind) as server,
            pytest.raises(
                ServerError,
                match=r"to cut text into the tokens of .*other, got .*--teacher-tokenizer",
            ),
        ):
            open_server(server.url, other, **FAST)


def test_a_bos_that_the_server_puts_first_is_no_other_tokenizer(
    model: LanguageModel, folder: Path
) -> None:
    for kind in KINDS:
        with serving(model, kind) as server:
            ids_of = server._ids
            server._ids = lambda prompt, ids_of=ids_of: (  # type: ignore[method-assign]
                [0, *ids_of(prompt)] if isinstance(prompt, str) else prompt
            )
            assert open_server(server.url, folder, **FAST).kind == kind


def test_one_of_several_models_is_named(model: LanguageModel, folder: Path) -> None:
    with serving(model) as server:
        server.others = [{"id": "adapter", "parent": "tiny", "owned_by": "vllm"}]
        assert open_server(server.url, folder, **FAST).name == "tiny"
        assert open_server(server.url, folder, model="adapter", **FAST).name == "adapter"
        server.others.append({"id": "second", "owned_by": "vllm", "max_model_len": 50})
        with pytest.raises(
            ValueError, match="one of tiny, adapter, second, got none; name the one"
        ):
            open_server(server.url, folder, **FAST)
        assert open_server(server.url, folder, model="second", **FAST).context == 49


def test_a_key_is_sent_if_there_is_one(
    model: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model, key="secret") as server:
        monkeypatch.delenv("MINIGOLD_TEACHER_KEY", raising=False)
        with pytest.raises(ServerError, match=r"got 401 .*; set MINIGOLD_TEACHER_KEY"):
            open_server(server.url, folder, **FAST)
        monkeypatch.setenv("MINIGOLD_TEACHER_KEY", "secret")
        teacher = open_server(server.url, folder, **FAST)
        assert "secret" not in repr(teacher)
        monkeypatch.setenv("MINIGOLD_TEACHER_KEY", " secret\r\n")  # as from a mounted file
        assert open_server(server.url, folder, **FAST).wire.key == "secret"


@pytest.mark.parametrize(
    "key", ["secret\nX-More: 1", "secret\x7f", "sécret", "secret€", "secret\udcff"]
)
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(
    work: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("MINIGOLD_TEACHER_KEY", key)
    code, out, err = train(
        work, "http://127.0.0.1:9", "none", "--teacher-tokenizer", str(work / "teacher")
    )
    assert (code, out) == (2, "")
    assert err == (
        "minigold: expected printable ASCII in MINIGOLD_TEACHER_KEY, got other characters (not shown "
        "here); copy the key again\n"
    )


@pytest.mark.parametrize(
    "url",
    ["http://", "http://host:port", "http://host:99999", "http://u:p@host", "http://host/?model=x", "ftp://host",
     "http://h ost", "http://a..b:80", f"http://{'a' * 64}", "http://h\x7fost", "http://h\udcffost",
     "http://host/a b", "http://host/é"],
)  # fmt: skip
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected an address as http://host:port"):
        wire_to(url, timeout=1, patience=1, connections=1)


def test_addresses() -> None:
    for url in ("http://host:8000", "https://host", "http://[::1]:80/a/b"):
        assert wire_to(url + "/", timeout=1, patience=1, connections=1).url == url
        assert is_address(url)
    assert not is_address("owner/http")
    assert wire_to("http://bücher.example/%C3%A9", timeout=1, patience=1, connections=1).host
    # the longest time-out is one that sockets take
    one = wire_to("http://127.0.0.1:9", timeout=LONGEST, patience=0, connections=1)
    with pytest.raises(ServerError, match="ConnectionRefusedError"):
        one.ask("/x", most=10)
    assert wire_to("https://host", timeout=1, patience=1, connections=1).scheme == "https"


def test_waiting_can_be_stopped() -> None:
    """What stops a run ends its back-off, too."""
    one = Wire("http", "127.0.0.1", 9, "", timeout=1, patience=60, connections=2)
    threading.Timer(0.3, one.stopped.set).start()
    begun = time.monotonic()
    with pytest.raises(ServerError, match="Conn"):
        one.ask("/x", most=10)
    assert time.monotonic() - begun < 30  # half of its patience


def test_a_completion_longer_than_the_context_is_not_sent(
    model: LanguageModel, folder: Path
) -> None:
    with serving(model) as server:
        teacher = open_server(server.url, folder, **FAST)
        side = make_pair(student(), teacher).events.teacher
        server.asked.clear()
        with pytest.raises(
            ValueError, match="at most 199 tokens for the teacher tiny, its context"
        ):
            teacher.read([Reading([1] * 150, [2] * 49)], side=side, micro_batch=1, temperature=1)
        assert server.asked == []
        teacher.read([Reading([1] * 150, [2] * 48)], side=side, micro_batch=1, temperature=1)


def test_masks_and_chunks_are_those_of_the_model_in_process(
    model: LanguageModel, folder: Path
) -> None:
    """The log-probabilities that decide where to train are the same at every tier."""
    config = dataclasses.replace(CONFIG, events=CHUNK)
    with serving(model) as server:
        teacher = open_server(server.url, folder, top_k=0, **FAST)
        pair, inside = (
            make_pair(student(), teacher, events=CHUNK),
            make_pair(student(), model, events=CHUNK),
        )
        answers, side = sample_answers(pair, PROMPTS, config, number=1)
        for one, other in zip(
            collect(pair, answers, side, config),
            collect(inside, answers, side, config),
            strict=True,
        ):
            np.testing.assert_allclose(one.teacher_logp_C, other.teacher_logp_C, atol=1e-4)


# ------------------------------------------------------------------------- the command line
@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    work = tmp_path_factory.mktemp("http")
    tiny_folder(work / "student", "gemma3_text", sentencepiece_bpe(), begin="<s>", end="</s>")
    write_rows(
        work / "prompts.jsonl", [{"prompt": "the fox", "completion": "is here", "answer": "x"}] * 3
    )
    (work / "teacher").symlink_to(folder)
    return work


def train(work: Path, url: str, out: str, *more: str) -> tuple[int, str, str]:
    return run(
        "train", "--teacher", url, "--student", work / "student", "--prompts", work / "prompts.jsonl",
        "--out", work / out, "--steps", "2", "--max-new-tokens", "6", "--batch-size", "2",
        "--plain-prompt", *more,
    )  # fmt: skip


def test_train_and_eval_over_http(work: Path, model: LanguageModel) -> None:
    tokenizer = "--teacher-tokenizer", str(work / "teacher")
    with serving(model) as server:
        code, out, err = train(work, server.url, "run", *tokenizer, "--teacher-top-k", "8")
        assert code == 0, err
        assert "teacher tiny: tier topk (8 tokens a position), it says the likeliest tokens" in err
        assert json.loads(out.splitlines()[-1])["step"] == 2
        config = json.loads((work / "run" / "config.json").read_text("utf-8"))
        assert (config["teacher"], config["teacher_tier"], config["teacher_top_k"]) == (
            "tiny",
            "topk",
            8,
        )
        assert config["teacher_server"] == "vllm"
        assert (work / "run" / "report.html").is_file()

        code, _, err = train(work, server.url, "run0", *tokenizer, "--teacher-top-k", "0")
        assert (code, "use --events chunk" in err) == (2, True)
        assert not (work / "run0").exists()
        code, _, err = train(
            work, server.url, "run0", *tokenizer, "--teacher-top-k", "0", "--events", "chunk",
            "--eval-prompts", str(work / "prompts.jsonl"),
        )  # fmt: skip
        assert code == 0, err
        assert "tier tokens, it says the log-probability" in err
        assert (work / "run0" / "report.html").is_file()

        for k in ("8", "0"):
            code, out, err = run(
                "eval", "--teacher", server.url, *tokenizer, "--teacher-top-k", k, "--student",
                work / "student", "--prompts", work / "prompts.jsonl", "--json", "--plain-prompt",
                "--max-new-tokens", "6",
            )  # fmt: skip
            figures = json.loads(out)
            assert (code, figures["forward_kl"]) == (0, None), err
            assert figures["bits_per_byte_teacher"] > 0


def test_a_run_over_http_goes_on_at_another_port(work: Path, model: LanguageModel) -> None:
    more = "--teacher-tokenizer", str(work / "teacher"), "--save-every", "1"
    with serving(model) as server:
        assert train(work, server.url, "resumed", *more)[0] == 0
    with serving(model) as server:
        code, _, err = train(work, server.url, "resumed", *more, "--resume")
        assert code == 0, err
        code, _, err = train(work, server.url, "resumed", *more, "--resume", "--teacher-top-k", "3")
        assert (code, "teacher_top_k (20 then, 3 now)" in err) == (2, True)


def test_what_an_answer_that_is_too_long_asks_for_is_possible(
    work: Path, model: LanguageModel
) -> None:
    more = "--teacher-tokenizer", str(work / "teacher"), "--save-every", "1"
    checkpoint = work / "long" / "checkpoints" / "step-1"

    def leave(path: str, body: Any, answer: Any) -> Any:
        if checkpoint.exists():
            raise Fault(400, b"gone")
        return answer

    with serving(model) as server:
        server.edits = [leave]
        assert train(work, server.url, "long", *more)[0] == 2
        server.edits = [edit_models(max_model_len=12)]
        code, _, err = train(work, server.url, "long", *more, "--resume")
        told = err.splitlines()[-1]
        assert (code, "at most 11 tokens for the teacher tiny, its context, got" in told) == (
            2,
            True,
        )
        assert (
            "goes on with --resume only with the longer context, else begin a new one (--out)"
            in told
        )
        assert "from its last checkpoint (that folder as --student)" in told
        server.edits = []
        less = "--max-new-tokens", "3"
        code, _, err = train(work, server.url, "long", *more, *less, "--resume")
        assert (code, "--max-new-tokens (6 then, 3 now)" in err) == (2, True)
        code, _, err = train(work, server.url, "new", *more, *less, "--student", str(checkpoint))
        assert code == 0, err
        code, out, err = train(work, server.url, "long", *more, "--resume")
        assert (code, json.loads(out.splitlines()[-1])["step"]) == (0, 2), err


def test_options_of_a_server_are_refused_without_one(work: Path) -> None:
    code, _, err = train(work, "http://127.0.0.1:9", "none")
    assert (code, err.count("\n")) == (2, 1)
    assert "expected --teacher-tokenizer with http://127.0.0.1:9, got none" in err
    for dry in ((), ("--dry-run",)):
        for option, value in (("top-k", "5"), ("timeout", "3"), ("tokenizer", "x")):
            more = f"--teacher-{option}", value, *dry
            code, out, err = train(work, str(work / "teacher"), "none", *more)
            assert (code, out) == (2, "")
            assert f"expected --teacher-{option} with a server as --teacher" in err
    code, _, err = train(work, "http://127.0.0.1:9", "none", "--dry-run")
    assert (code, "expected a folder or hub name as --teacher with --dry-run" in err) == (2, True)
    code, _, err = train(
        work, "http://127.0.0.1:9", "none", "--teacher-tokenizer", str(work / "teacher")
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "expected an answer of http://127.0.0.1:9/v1/models" in err
    assert not (work / "none").exists()


def test_the_example_compares_a_server_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = Path(__file__).parent.parent / "examples" / "check_server.py"

    def said(*args: str | Path) -> list[str]:
        monkeypatch.setattr("sys.argv", [str(example), *map(str, args)])
        runpy.run_path(str(example), run_name="__main__")
        return re.findall(r"given tokens (\S+) nats .* listed ones (\S+); other tokens listed in (\d+)",
                          capsys.readouterr().out)  # fmt: skip

    said("--make", tmp_path / "model")
    made = load(tmp_path / "model")
    with serving(made) as server:
        same = said("--server", server.url, "--folder", tmp_path / "model", "--texts", "3")
    assert [float(one[0]) < 1e-5 and float(one[1]) < 1e-5 for one in same] == [True] * 4
    with torch.no_grad():
        made.decoder.head.weight_VD.mul_(1.5)
    with serving(made) as server:
        other = said("--server", server.url, "--folder", tmp_path / "model", "--texts", "3")
    assert all(float(one[0]) > 1e-3 for one in other)
