"""Deployments whose workers are killed while they answer."""

import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from outrider.cluster.api import EngineError, GenerationRequest
from outrider.cluster.engine import Engine

PLAIN = {"max_nodes": 0}


def asked(number: int, num_tokens: int) -> GenerationRequest:
    """Greedy and sampled ones, with what depends on the text so far."""
    sampling: dict[str, object] = {"max_tokens": num_tokens, "ignore_eos": True}
    if number % 2:
        sampling |= {"temperature": 0.8, "top_p": 0.95, "seed": number, "frequency_penalty": 0.5}
    return GenerationRequest(f"once upon a time {number}", sampling)


class Listener:
    """Reads one stream in a thread of its own."""

    def __init__(self, engine: Engine, request: GenerationRequest) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.times_s: list[float] = []  # when tokens came
        self.end = ""  # the finish reason, or the error
        self._stream = engine.stream(request.prompt, request.sampling)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the stream stands still"

    def _listen(self) -> None:
        try:
            for piece in self._stream:
                self.tokens += piece.tokens
                self.text += piece.text
                self.times_s.append(time.monotonic())
                self.end = piece.finish_reason
        except Exception as error:
            self.end = f"{type(error).__name__}: {error}"


def worker_pids(engine: Engine) -> dict[str, int]:
    """Of the workers that stand now, by name; none while some are started again."""
    stats = engine.stats()
    return {name: said["pid"] for name, said in stats.items() if "pid" in said}


def coordinator_pids() -> list[int]:
    """Of the Coordinators that this process's Ray runs: one, or none for a moment."""
    return actor_pids("Coordinator")


def actor_pids(title: str) -> list[int]:
    """Of the actors whose class is called so and that this process's Ray runs, those that wait to take a place
    included."""
    started = {process.pid: name_of(process) for process in psutil.Process().children(recursive=True)}
    return [pid for pid, name in started.items() if name.startswith("ray::") and title in name]


def name_of(process: psutil.Process) -> str:
    """As the process calls itself; empty where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def all_stand(engine: Engine, num_processes: int = 3) -> bool:
    """Whether each worker (of two ranks and a drafter) has a process of its own: no stand-in works for a drafter."""
    try:
        return len(set(worker_pids(engine).values())) == num_processes
    except EngineError:  # one was lost just now
        return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def shared_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """What these have mapped of /dev/shm that has a name there."""
    mapped = {Path(entry.path) for process in processes for entry in process.memory_maps()}
    return {path for path in mapped if path.is_relative_to("/dev/shm") and path.exists()}
