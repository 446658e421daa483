"""A completion server double over real HTTP: it speaks vLLM's or SGLang's dialect, and fails when it is told to."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

EOS = 2
# What a fault does: takes the handler and the request's body, and answers in the server's place when it returns True.
Fault = Callable[["Handler", dict[str, Any]], bool]


def served_ids(body: dict[str, Any]) -> list[int]:
    """The completion of a request: a function of its prompt and seed, ended by EOS or by its limit."""
    length = 1 + (sum(body["prompt"]) + body["seed"]) % 12
    ids = [*((7 * body["seed"] + 3 * i) % 50 + 3 for i in range(length)), EOS]
    return ids[: body["max_tokens"]]


@dataclass
class Double:
    """One server. ``faults`` are asked in order before each completion but the probe of the start.

    Attributes:
        asked: prompts served or failed, by seed.
        most: requests that were in flight at once at most.
        change: of a completion's JSON, before it goes out.
        on_get: faults by the path of a GET request.
    """

    faults: list[Fault] = field(default_factory=list)
    models: list[dict[str, Any]] = field(
        default_factory=lambda: [{"id": "tiny-lrm", "root": "tiny-lrm", "max_model_len": 2048, "owned_by": "vllm"}]
    )
    dialect: str = "vllm"
    key: str | None = None
    seconds: float = 0.0
    change: Callable[[dict[str, Any], dict[str, Any]], Any] | None = None
    on_get: dict[str, Fault] = field(default_factory=dict)
    health: int = 200
    probes_ok: bool = True
    asked: Counter[int] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    most: int = 0
    hung_up: int = 0

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.port = 0
        self.start()

    def start(self) -> None:
        double = self

        class Bound(Handler):
            server_double = double

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 256

            def handle_error(self, request: Any, client_address: Any) -> None:
                with double.lock:  # the client hung up, or a fault closed the connection
                    double.hung_up += 1

        self.server = Server(("127.0.0.1", self.port), Bound)
        self.port = self.server.server_address[1]
        self.open: set[Any] = set()
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def die(self) -> None:
        """As a killed process: the port closes, and every connection with it."""
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(2)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_double: Double

    def setup(self) -> None:
        super().setup()
        self.server_double.open.add(self.connection)

    def finish(self) -> None:
        self.server_double.open.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, payload: Any, headers: dict[str, str] | None = None) -> None:
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        double = self.server_double
        if (fault := double.on_get.get(self.path)) is not None and fault(self, {}):
            return
        if self.path == "/health":
            self.reply(double.health, b"")
        elif double.key and self.headers["Authorization"] != f"Bearer {double.key}":
            self.reply(401, {"error": f"no such key: {self.headers['Authorization']}"})
        elif self.path == "/v1/models":
            self.reply(200, {"object": "list", "data": double.models})
        elif self.path == {"vllm": "/version", "sglang": "/server_info"}[double.dialect]:
            self.reply(200, {"version": "9.9"})
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        double = self.server_double
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        probe = body["max_tokens"] == 1 and body["seed"] == 0
        with double.lock:
            double.headers.append(dict(self.headers))
            if not probe:
                double.bodies.append(body)
                double.asked[body["seed"]] += 1
            double.in_flight += 1
            double.most = max(double.most, double.in_flight)
        try:
            if not (probe and double.probes_ok) and any(fault(self, body) for fault in double.faults):
                return
            time.sleep(0 if probe else double.seconds)
            self.reply(200, self.completion(body))
        finally:
            with double.lock:
                double.in_flight -= 1

    def completion(self, body: dict[str, Any]) -> Any:
        double = self.server_double
        ids = served_ids(body)
        stopped = ids[-1] == EOS
        choice: dict[str, Any] = {"index": 0, "text": "?", "finish_reason": "stop" if stopped else "length"}
        if double.dialect == "sglang":
            assert body["top_k"] == -1 or body["top_k"] >= 1  # SGLang refuses 0
            choice |= {"matched_stop": EOS if stopped else None}
        else:
            choice |= {"stop_reason": None}
        if body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": body["prompt"]}
        payload = {
            "object": "text_completion",
            "choices": [choice],
            "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids)},
        }
        return double.change(payload, body) if double.change else payload


# --- faults -----------------------------------------------------------------------------------------------------


def _first(times: int) -> Callable[[], bool]:
    """True for the first ``times`` calls, from any thread."""
    left, lock = [times], threading.Lock()

    def mine() -> bool:
        with lock:
            left[0] -= 1
            return left[0] >= 0

    return mine


def status(code: int, times: int, headers: dict[str, str] | None = None, message: str = "no") -> Fault:
    """The first ``times`` requests are answered with an error."""
    first = _first(times)

    def fault(handler: Handler, body: dict[str, Any]) -> bool:
        if mine := first():
            handler.reply(code, {"error": {"message": message, "code": code}}, headers)
        return mine

    return fault


def for_seed(seed: int, code: int) -> Fault:
    """One request fails for ever."""

    def fault(handler: Handler, body: dict[str, Any]) -> bool:
        if body["seed"] == seed:
            handler.reply(code, {"error": {"message": f"cannot do {seed}"}})
        return body["seed"] == seed

    return fault


def drop_connection(times: int) -> Fault:
    """Half an answer, then the connection breaks."""
    first = _first(times)

    def fault(handler: Handler, body: dict[str, Any]) -> bool:
        if mine := first():
            handler.send_response(200)
            handler.send_header("Content-Length", "5000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
            handler.wfile.flush()
            handler.connection.shutdown(2)
            handler.close_connection = True
        return mine

    return fault


@dataclass
class Sent:
    """What an ``endless`` fault got rid of before the client hung up."""

    n_bytes: int = 0
    n_answers: int = 0
    hung_up: int = 0


def endless(
    sent: Sent,
    *,
    most: int,
    seconds: float = 0.0,
    code: int = 200,
    headers: dict[str, str] | None = None,
    piece: bytes = b" " * 65536,
    compress: Callable[[bytes], bytes] | None = None,
) -> Fault:
    """A body in chunks that goes on until the client hangs up, or ``most`` bytes (before compression) are out.

    Args:
        seconds: between two pieces.
        compress: of each piece, by a compressor that is the body's own.
    """

    def fault(handler: Handler, body: dict[str, Any]) -> bool:
        sent.n_answers += 1
        handler.send_response(code)
        handler.send_header("Transfer-Encoding", "chunked")
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        out = 0
        try:
            while out < most:
                data = compress(piece) if compress else piece
                if data:
                    handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                out += len(piece)
                sent.n_bytes += len(data)
                time.sleep(seconds)
            handler.wfile.write(b"0\r\n\r\n")
        except OSError:
            sent.hung_up += 1
        handler.close_connection = True
        return True

    return fault


def at_most(n: int) -> Fault:
    """429 for what exceeds ``n`` requests in flight, as a gateway with a limit of its own."""

    def fault(handler: Handler, body: dict[str, Any]) -> bool:
        if handler.server_double.in_flight > n:
            handler.reply(429, {"error": {"message": "too many"}}, None)
            return True
        return False

    return fault


def at_random(share: float, seed: int) -> Fault:
    """A share of the requests meets one of the passing faults."""
    draw = random.Random(seed)
    lock = threading.Lock()

    def fault(handler: Handler, body: dict[str, Any]) -> bool:
        with lock:
            bad, which = draw.random() < share, draw.randrange(4)
        if not bad:
            return False
        passing = [status(429, 1), status(500, 1), status(503, 1, {"Retry-After": "0"}), drop_connection(1)]
        return passing[which](handler, body)

    return fault
