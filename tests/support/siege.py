"""A live `outrider serve tiny-random` under load that lasts: how it answers, what it needs, and what it leaves.

PYTHONPATH=src:tests python -m support.siege steady|leavers|kills|outlived [--seconds 60] [--streams 64] [a.b=c ...]

Every text is compared with plain decoding. Exits with 1 where something is not as it must be.
"""

import argparse
import itertools
import random
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median
from urllib.parse import urlsplit

import httpx

from outrider import Client
from outrider.cluster.client.calls import Options
from support.harm import kill
from support.household import Household
from support.serving import Server, running_server
from support.waiting import wait_until

NUM_TEXTS = 8  # different ones; each is asked for by several streams
TWO_RANKS = ("target.tp_size=2", "cluster.num_cpus_per_target=0.5")
_SOON_S = 2.0  # tokens of before a kill may come for a moment
_ANSWER_S = 600.0
_LEFT_S = 30.0
_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


@dataclass
class Streams:
    """Clients, each of which asks for one text after the other until it is told to end."""

    url: str
    num: int
    num_tokens: int
    waits_s: list[float] = field(default_factory=list)  # from asking to the last token, of each answer
    firsts_s: list[float] = field(default_factory=list)  # to the first
    times_s: list[float] = field(default_factory=list)  # when tokens came
    wrong: list[str] = field(default_factory=list)
    num_generated: int = 0
    num_parts: int = 0  # so far

    def __enter__(self) -> "Streams":
        with Client(self.url) as client:
            self._plain = [
                client.generate(prompt, {**options, "speculative": {"budget": 0}})
                for prompt, options in map(self._asked, range(NUM_TEXTS))
            ]
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask_again, args=(one,)) for one in range(self.num)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        """Lets each end its text."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _asked(self, number: int) -> tuple[str, Options]:
        """Greedy and sampled ones, with what depends on the text so far."""
        options: Options = {"max_tokens": self.num_tokens, "ignore_eos": True}
        if number % 2:
            options |= {"temperature": 0.8, "top_p": 0.95, "seed": number, "frequency_penalty": 0.5}
        return f"once upon a time {number}", options

    def _ask_again(self, stream: int) -> None:
        with Client(self.url, timeout_s=_ANSWER_S, max_retries=40) as client:
            for turn in itertools.count(stream):
                if self._over.is_set():
                    return
                self._ask(client, turn % NUM_TEXTS)

    def _ask(self, client: Client, number: int) -> None:
        begun_s, came_s = time.monotonic(), []
        stream = client.stream(*self._asked(number))
        try:
            for part in stream:
                self.num_parts += 1
                if part.tokens:
                    came_s.append(time.monotonic())
        except Exception as error:
            self.wrong.append(f"{type(error).__name__}: {error}")
            return
        answer, plain = stream.answer(), self._plain[number]
        if answer.tokens and [t.id for t in answer.tokens] != [t.id for t in plain.tokens]:
            self.wrong.append(f"other tokens than plain decoding's for text {number}")
        elif (answer.text, answer.finish_reason) != (plain.text, plain.finish_reason):
            self.wrong.append(f"another text than plain decoding's for text {number}")
        self.times_s += came_s
        self.firsts_s.append(came_s[0] - begun_s)
        self.waits_s.append(time.monotonic() - begun_s)
        self.num_generated += len(answer.tokens)


@dataclass
class Report:
    """What came of it. `figures`: by name. `faults`: what is not as it must be, whatever the machine does besides.
    `missed`: durations above their limits, which on a busy machine say little."""

    figures: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def note_answers(self, streams: Streams) -> None:
        self.figures["answers"] = f"{len(streams.waits_s)}, {streams.num_generated} tokens"
        self.figures["whole answer"] = _summary(streams.waits_s)
        self.figures["first token"] = _summary(streams.firsts_s)
        self.faults += [f"{number} x {what}" for what, number in Counter(streams.wrong).items()]

    def note_end(self, household: Household, server: Server) -> None:
        """After the end of a server."""
        before, after = household.growth_mib()
        self.figures["memory of all processes"] = f"{before:.0f} MiB, at the end {after:.0f} MiB"
        self.figures["server"] = f"ended with {server.process.returncode}"
        self.faults += [f"left: {what}" for what in household.left(_LEFT_S)]

    def __str__(self) -> str:
        lines = [f"{name}: {said}" for name, said in self.figures.items()]
        lines += [f"FAULT {what}" for what in self.faults] + [f"MISSED {what}" for what in self.missed]
        return "\n".join(lines)


@contextmanager
def besieged(overrides: Sequence[str], report: Report) -> Iterator[tuple[Server, Household]]:
    """A server, and what it starts; notes in the end what it has needed and left."""
    with running_server("tiny-random", overrides) as server, Household(server.process.pid) as household:
        yield server, household
    report.note_end(household, server)


def steady(seconds: float, num_streams: int, num_tokens: int, overrides: Sequence[str]) -> Report:
    """Many streams for so long."""
    report = Report()
    with besieged(overrides, report) as (server, _):
        with Streams(server.url, num_streams, num_tokens) as streams:
            begun_s = time.monotonic()
            time.sleep(seconds)
        report.note_answers(streams)
        took_s = time.monotonic() - begun_s
        report.figures["tokens per second"] = f"{streams.num_generated / took_s:.0f} in {took_s:.0f} s"
        _note_idle(report, server)
    if max(streams.waits_s) > 4 * median(streams.waits_s):
        report.missed.append("longest whole answer: more than 4 times the median")
    return report


def leavers(num_clients: int, num_waves: int, overrides: Sequence[str]) -> Report:
    """Clients that vanish in the middle of their answers, some with a connection that is reset."""
    report = Report()
    with besieged(overrides, report) as (server, _), Client(server.url) as client:
        plain = client.generate("go on", {"max_tokens": 100, "speculative": {"budget": 0}})
        for wave in range(num_waves):
            vanish(server.url, num_clients)
            begun_s = time.monotonic()
            _note_idle(report, server)
            report.figures[f"wave {wave}: idle after"] = f"{time.monotonic() - begun_s:.2f} s"
            if client.generate("go on", {"max_tokens": 100}).text != plain.text:
                report.faults.append("another text than plain decoding's afterwards")
    return report


def vanish(url: str, num_clients: int) -> None:
    """So many ask for long answers; when as many as have a place have read something all go without a word."""
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 0
    body = b'{"prompt": "go on", "max_tokens": 450, "ignore_eos": true, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    asked = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    clients = [socket.create_connection((host, port)) for _ in range(num_clients)]
    for one in clients:
        one.sendall(asked)
    wait_until(lambda: gauges(url)[0] > 0, _ANSWER_S)
    for one in clients[:4]:
        assert one.recv(4096).startswith(b"HTTP/1.1 200")
    for number, one in enumerate(clients):
        if number % 2:  # what the system does for a process that is killed with something unread
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()


def kills(
    seconds: float, every_s: float, num_streams: int, num_tokens: int, seed: int, overrides: Sequence[str]
) -> Report:
    """A random worker is killed again and again: a rank, the DraftWorker or the Coordinator, one that starts, too."""
    report, chance = Report(), random.Random(seed)
    killed: list[tuple[float, str, bool]] = []  # when, who, and whether the deployment stood
    with besieged(overrides, report) as (server, household):
        with Streams(server.url, num_streams, num_tokens) as streams:
            begun_s = time.monotonic()
            while time.monotonic() - begun_s < seconds and server.process.poll() is None:
                time.sleep(every_s)
                workers = household.workers()
                stood = httpx.get(f"{server.url}/ready").status_code == 200
                if workers:
                    pid = chance.choice(list(workers))
                    with suppress(ProcessLookupError):
                        kill(pid)
                    killed.append((time.monotonic(), workers[pid], stood))
        report.note_answers(streams)
        if server.process.poll() is None:
            _note_idle(report, server)
        else:
            report.faults.append(f"the server ended: {server.lines[-1:]}")
    times_s = sorted(streams.times_s)
    silences_s = [silence(times_s, since_s) for since_s, _, _ in killed]
    report.figures["kills"] = f"{len(killed)}"
    for silence_s, (killed_s, who, stood) in zip(silences_s, killed, strict=True):
        when = "" if stood else ", while others were started again"
        report.figures[f"at {killed_s - begun_s:.0f} s {who}{when}"] = f"{silence_s:.2f} s"
    report.figures["nothing came after a kill for"] = _summary(silences_s)
    for who in sorted({who for _, who, _ in killed}):
        own_s = [
            one for one, (_, name, stood) in zip(silences_s, killed, strict=True) if name == who and stood
        ]
        report.figures[f"after a kill of {who}, when all stood,"] = _summary(own_s)
    if silences_s and max(silences_s) > 10:
        report.missed.append("longest silence after a kill: more than 10 s")
    return report


def outlived(num_streams: int, num_tokens: int, overrides: Sequence[str]) -> Report:
    """The server's own process is killed in the middle of streams, and started again at the same address."""
    report = Report()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    at = [*overrides, f"server.port={port}"]
    with ExitStack() as ends:
        with running_server("tiny-random", at) as first, Household(first.process.pid) as household:
            streams = ends.enter_context(Streams(first.url, num_streams, num_tokens))
            wait_until(lambda: streams.num_parts > num_streams, _ANSWER_S)
            killed_s = time.monotonic()
            first.process.kill()
        report.faults += [f"left by the first: {what}" for what in household.left(_LEFT_S)]
        with besieged(at, report) as (second, _):
            stood_s = time.monotonic()
            ends.close()
            report.note_answers(streams)
            _note_idle(report, second)
    report.figures["another server stood after"] = f"{stood_s - killed_s:.2f} s"
    return report


def silence(times_s: Sequence[float], since_s: float) -> float:
    """The longest time without a token that begins soon after a kill."""
    gaps = [
        after - max(before, since_s)
        for before, after in itertools.pairwise(times_s)
        if after > since_s and before < since_s + _SOON_S
    ]
    return max(gaps, default=0.0)


def gauges(url: str) -> tuple[float, ...]:
    """Requests that run, those that wait, and the fraction of pages that are used."""
    text = httpx.get(f"{url}/metrics", timeout=_ANSWER_S).text
    return tuple(float(re.findall(rf"^{name}{{.*}} (.*)$", text, re.MULTILINE)[0]) for name in _GAUGES)


def _note_idle(report: Report, server: Server) -> None:
    """Nobody asks any longer: nothing may run, and all pages must be free."""
    try:
        wait_until(lambda: gauges(server.url) == (0, 0, 0), _LEFT_S)
    except (AssertionError, IndexError):
        report.faults.append(f"{_GAUGES} are {gauges(server.url)} when nobody asks")


def _summary(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    return f"{median(seconds):.2f} s (median of {len(seconds)}), {max(seconds):.2f} s (worst)"


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("steady", "leavers", "kills", "outlived"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between kills")
    parser.add_argument("--seed", type=int, default=0, help="who is killed")
    parser.add_argument("--clients", type=int, default=200, help="who vanish at once")
    parser.add_argument("--waves", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    overrides = [*TWO_RANKS, *given.overrides]
    runs: dict[str, Callable[[], Report]] = {
        "steady": lambda: steady(given.seconds, given.streams, given.tokens, overrides),
        "leavers": lambda: leavers(given.clients, given.waves, overrides),
        "kills": lambda: kills(
            given.seconds, given.every, given.streams, given.tokens, given.seed, overrides
        ),
        "outlived": lambda: outlived(given.streams, given.tokens, overrides),
    }
    report = runs[given.what]()
    print(report, flush=True)
    sys.exit(1 if report.faults or report.missed else 0)


if __name__ == "__main__":
    main()
