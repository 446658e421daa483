"""vLLM in process: one request a sample, each completion handed over as soon as it is done.

An AsyncLLM lives in an event loop of a background thread. Its workers are spawned, never forked: a forked worker
inherits the parent's OpenMP threads and was many times slower on a CPU. Tested with vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from calset.builder.engines import cpu_sharing
from calset.builder.engines.base import (
    CLOSED,
    RESUME_HINT,
    Completion,
    EngineUnavailable,
    Request,
    RequestFeed,
    check_same_shapes,
    wait_on,
)
from calset.builder.model.sampling import Sampling
from calset.errors import EngineError, InputError, first_line, import_problem

if TYPE_CHECKING:
    from calset.builder.model.info import ModelInfo

T = TypeVar("T")
# Reads process ids, one a line, until "done" or the end of the pipe; then ends those processes (by pidfd: a number may
# be used again).
_REAPER = """
import contextlib, os, signal, sys
processes = []
for line in sys.stdin:
    if line == "done\\n":
        sys.exit()
    with contextlib.suppress(ProcessLookupError):
        processes.append(os.pidfd_open(int(line)))
for process in processes:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGKILL)
"""
START_POLL_SECONDS = 0.05
CPU_SEQUENCES = 128
_DONE = object()


class VllmEngine:
    """A running vLLM engine.

    Args:
        concurrency: sequences decoded at once (``max_num_seqs``); vLLM's default on a GPU, 128 on a CPU.
        verbose: let vLLM log.
        options: further vLLM engine arguments by their own names, e.g. ``tensor_parallel_size``.

    Raises:
        InputError: vLLM cannot be imported (EngineUnavailable), or does not know an option.
        EngineError: vLLM did not start.
    """

    name = "vllm"

    def __init__(
        self,
        model: ModelInfo,
        *,
        max_model_len: int,
        device: str | None = None,
        dtype: str = "auto",
        concurrency: int | None = None,
        verbose: bool = False,
        **options: Any,
    ) -> None:
        _prepare_environment(verbose)
        self.version = _import_vllm()
        self.shares_cores = _is_on_cpu()
        self.max_model_len = max_model_len
        self.loaded = model.revision
        self._folder = model.folder
        self._stop_token_ids = list(model.eos_token_ids)
        self._llm: Any = None
        self._reaper: _Reaper | None = None
        self._counter = 0
        self._feeder: asyncio.Task[None] | None = None
        arguments = self._arguments(model, device, dtype, concurrency, verbose, options)
        # More than what runs, so that the scheduler always has the next prompt at hand; not much more, since an
        # adaptive build decides late, and better, what comes next.
        self._slots = (arguments.max_num_seqs or 256) * max(1, arguments.data_parallel_size)
        self._in_flight = self._slots + max(16, self._slots // 4)
        self._loop = cpu_sharing.beside(self).event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="calset-vllm", daemon=True)
        self._thread.start()
        self._start(arguments)

    def _arguments(
        self, model: ModelInfo, device: str | None, dtype: str, concurrency: int | None, verbose: bool, options: dict
    ) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform

        if device not in (None, "auto", current_platform.device_type):
            raise InputError(
                f"this vLLM runs on {current_platform.device_type}, not on {device}; use --engine transformers there"
            )
        arguments: dict[str, Any] = {
            "model": model.location,
            "revision": None if model.is_local else model.revision,
            "tokenizer_revision": None if model.is_local else model.revision,
            "max_model_len": self.max_model_len,
            "max_num_seqs": concurrency,
            "dtype": dtype,
            "load_format": "safetensors",
            "trust_remote_code": False,
            "generation_config": "vllm",  # sampling is calset's, not the model folder's
            "enable_prefix_caching": True,  # the k samples of a problem share their prompt
            "disable_log_stats": True,
            "use_tqdm_on_load": verbose,
        }
        if self.shares_cores:
            arguments |= {
                "max_num_seqs": concurrency or CPU_SEQUENCES,
                "enforce_eager": True,
                # A seeded request whose prefill is split kills the CPU engine ("CPU Generator does not use offset").
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(self.max_model_len, 4096),
            }
        try:
            return AsyncEngineArgs(**(arguments | options))
        except TypeError as error:
            raise InputError(f"vLLM does not know this engine option: {error}") from error

    def _start(self, arguments: Any) -> None:
        import multiprocessing

        from vllm.v1.engine.async_llm import AsyncLLM

        async def start() -> Any:
            return AsyncLLM.from_engine_args(arguments)

        before = set(multiprocessing.active_children())
        self._reaper = _Reaper()
        starting = asyncio.run_coroutine_threadsafe(start(), self._loop)
        try:
            # A start takes most of a minute, in which the parent may be killed as well.
            while not starting.done():
                wait([starting], timeout=START_POLL_SECONDS)
                self._reaper.watch(p.pid for p in set(multiprocessing.active_children()) - before if p.pid)
            self._llm = starting.result()
        except BaseException as error:
            # A start cannot be interrupted; its processes can.
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            self.close()
            if isinstance(error, Exception):
                raise EngineError(f"vLLM did not start: {first_line(error)}") from error
            raise

    def stream(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Completions as they finish; at most a quarter more than ``concurrency`` (or 16) requests are in flight.

        Raises:
            EngineError: the engine died.
        """
        if self._llm is None:
            raise EngineError(CLOSED)
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()

        async def begin() -> asyncio.Task[None]:
            if self._llm is None:  # closed by another thread
                raise EngineError(CLOSED)
            task = asyncio.create_task(self._feed(requests, sampling, results))
            # Not by _feed itself: a task cancelled before its first step runs none of its code.
            task.add_done_callback(lambda _: results.put(_DONE))
            return task

        self._feeder = self._wait(begin())
        try:
            while True:
                for item in cpu_sharing.beside(self).drain(results):
                    if item is _DONE:
                        return
                    if isinstance(item, BaseException):
                        raise EngineError(f"vLLM failed ({first_line(item)}); {RESUME_HINT}") from item
                    yield item
        finally:
            self.cancel()
            self._feeder = None

    def cancel(self) -> None:
        feeder = self._feeder
        if feeder is not None:
            with suppress(RuntimeError):  # the loop is closed, and nothing runs
                self._loop.call_soon_threadsafe(feeder.cancel)

    async def _feed(self, requests: Iterable[Request], sampling: Sampling, results: queue.SimpleQueue[Any]) -> None:
        loop, changed, running = asyncio.get_running_loop(), asyncio.Event(), 0

        async def run(request: Request) -> None:
            nonlocal running
            try:
                results.put(await self._complete(request, sampling))
            finally:
                running -= 1
                changed.set()

        feed = RequestFeed(requests, notify=_waker(loop, changed))
        try:
            async with asyncio.TaskGroup() as group:
                while not feed.exhausted:
                    changed.clear()  # before the look: what comes after it sets it again
                    for request in feed.take(self._in_flight - running):
                        running += 1
                        group.create_task(run(request))
                    if not feed.exhausted:
                        await changed.wait()
                        if running >= self._slots:  # it has enough to do
                            await asyncio.sleep(cpu_sharing.beside(self).linger_seconds)
        except BaseExceptionGroup as errors:
            results.put(errors.exceptions[0])
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            results.put(error)
        finally:
            feed.close()

    async def _complete(self, request: Request, sampling: Sampling) -> Completion:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=request.seed,
            max_tokens=request.max_tokens,
            stop_token_ids=self._stop_token_ids,
            output_kind=RequestOutputKind.FINAL_ONLY,
            detokenize=False,
            structured_outputs=StructuredOutputsParams(json=request.json_schema) if request.json_schema else None,
        )
        self._counter += 1
        began, last = time.monotonic(), None
        prompt = _prompt(list(request.prompt_ids))
        async for output in self._llm.generate(prompt, params, request_id=f"{self._counter}-{request.key}"):
            last = output
        if last is None or not last.finished:
            raise EngineError(f"vLLM returned nothing for {request.key}")
        served = last.outputs[0]
        if served.finish_reason in (None, "abort"):
            # calset aborts by dropping the request; vLLM does it to all of them when a signal reaches its process.
            raise EngineError("vLLM is shutting down and gave up on its requests")
        seconds = time.monotonic() - began
        return Completion(request.key, tuple(served.token_ids), served.finish_reason, seconds)

    def load_weights(self, model: Path, revision: str) -> None:
        """Swap the weights in place, in a fraction of a second for a small model; a start takes most of a minute.

        Raises:
            EngineError: the tensors' names or shapes differ, requests are running, or it is a mixture of experts on a
                CPU.
        """
        shapes = check_same_shapes(self._folder, model)
        # vLLM 0.32 packs experts for its CPU kernels when it loads them first, and not when it loads them again: the
        # engine would answer with garbage.
        if self.shares_cores and any(".experts." in name for name in shapes):
            raise EngineError(
                f"vLLM on a CPU cannot swap the weights of a mixture of experts; start a new engine on {model}"
            )

        async def swap() -> None:
            # The prefix cache holds keys and values of the old weights.
            if not await self._llm.reset_prefix_cache():
                raise EngineError("requests are still running; let the stream end before loading other weights")
            await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model.resolve())})
            await self._llm.reset_prefix_cache()

        if self._llm is None:
            raise EngineError(CLOSED)
        try:
            self._wait(swap())
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM could not load the weights of {model}: {first_line(error)}") from error
        self.loaded = revision

    def close(self) -> None:
        """Stop vLLM's processes and the loop; may be called twice."""
        if self._loop.is_closed():
            return
        llm, self._llm = self._llm, None

        async def finish() -> None:
            if llm is not None:
                llm.shutdown(timeout=5)
            # vLLM leaves tasks behind that would complain when the loop goes.
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        with suppress(Exception):
            asyncio.run_coroutine_threadsafe(finish(), self._loop).result(timeout=60)
        if self._reaper is not None:
            self._reaper.dismiss()
            self._reaper = None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        if not self._thread.is_alive():
            self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return wait_on(work, self._loop, self._thread)


def _prompt(token_ids: list[int]) -> Any:
    """Token ids as vLLM's own renderer would hand them on, which spares each request the way through a thread pool."""
    try:
        from vllm.inputs.engine import tokens_input
    except ImportError:  # an older vLLM
        from vllm import TokensPrompt

        return TokensPrompt(prompt_token_ids=token_ids)
    return tokens_input(token_ids)


def _waker(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> Callable[[], None]:
    """Sets an event of a loop from another thread; nothing when the loop is closed."""

    def wake() -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(event.set)

    return wake


class _Reaper:
    """Ends the processes it watches when this one dies without a word.

    vLLM's engine process outlives a parent that was killed, and holds the device. In a process group of its own, so
    that what ends the parent's group leaves it to do its work. Does nothing where there is no pidfd (Linux has it).
    """

    def __init__(self) -> None:
        self._watched: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None
        if hasattr(os, "pidfd_open"):
            command = [sys.executable, "-S", "-c", _REAPER]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)

    def watch(self, pids: Iterable[int]) -> None:
        """Add processes; those it watches already are left out."""
        new = set(pids) - self._watched
        self._watched |= new
        if new:
            self._write("".join(f"{pid}\n" for pid in new))

    def dismiss(self) -> None:
        """Let the processes be; may be called once."""
        self._write("done\n")
        if self._process is not None:
            self._process.communicate()

    def _write(self, text: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.write(text.encode())
                self._process.stdin.flush()


def _import_vllm() -> str:
    """vLLM's version, once all of it that is used here is imported: it is lazy, so ``import vllm`` proves little.

    Raises:
        EngineUnavailable: a broken installation, with the remedy.
    """
    try:
        import vllm
        import vllm.engine.arg_utils
        import vllm.v1.engine.async_llm
        from vllm.platforms import current_platform  # noqa: F401
    except Exception as error:  # RuntimeError too: "operator torchvision::nms does not exist"
        why = import_problem(error, "install the vLLM that fits this machine, or use --engine transformers")
        raise EngineUnavailable(f"vLLM is installed but cannot be imported: {why}") from error
    return vllm.__version__


def _is_on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def _prepare_environment(verbose: bool) -> None:
    """vLLM is set by environment variables, read at its import; whatever the user has set wins."""
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_KVCACHE_SPACE": str(_kv_cache_gib()),
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is the caller's, who may print JSON there
    }
    if not verbose:
        defaults |= {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
        # vLLM reads its level after its import, which already warns.
        logging.getLogger("vllm").setLevel(logging.ERROR)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _kv_cache_gib() -> int:
    """A quarter of the free memory, between 1 and 8 GiB; only the CPU backend reads it."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        free = 8.0
    return max(1, min(8, int(free / 4)))
