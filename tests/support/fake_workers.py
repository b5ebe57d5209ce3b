"""Workers without models: the calls of the actors in `outrider.cluster.actors`, answers from a script."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from outrider.cluster.actors import Workers
from outrider.cluster.admission import Admission
from outrider.cluster.api import ServedModel
from outrider.cluster.coordinator import Coordinator
from outrider.cluster.text import Decoder
from outrider.cluster.text_bound import TextBound
from outrider.configs.schema import Config, SamplingConfig, TargetConfig, TreeConfig
from outrider.workers.sampling.grammars import Grammars
from outrider.workers.sequences.origin import Origin
from outrider.workers.sequences.sequence import Request, RequestStats, TokenEvent, TokenLogprobs
from outrider.workers.weights.token_texts import TokenTexts

FAKE_CONFIG = Config(
    target=TargetConfig(model="random:fake", tp_size=2, max_context=200),
    tree=TreeConfig(max_nodes=16, max_depth=8),
    sampling=SamplingConfig(max_tokens=50),
)
ROUND_S = 0.002
EOS_TOKEN_IDS = (0,)


class CharTokenizer:
    """A token is a character."""

    chat_template = "fake, reads tools"
    bos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(char) for char in text]

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(token)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool,
        tokenize: bool,
        **arguments: object,
    ) -> str:
        assert add_generation_prompt
        assert not tokenize
        told = [f"[{name}={value}]" for name, value in arguments.items()]
        return "".join([*told, *(f"<{message['role']}>{message['content']}" for message in messages)])


class CharDecoder:
    def add(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return ""


class CharBound(TextBound):
    def __init__(self) -> None: ...

    def exceeds(self, text: str, max_tokens: int) -> bool:
        return len(text) > 10 * max_tokens


@dataclass(frozen=True)
class CharAdmission(Admission):
    def decoder(self) -> Decoder:
        return CharDecoder()

    def describe(self) -> ServedModel:
        return ServedModel(self.max_context, tuple(bytes([code]) for code in range(self.vocab_size)))


def char_admission(config: Config, report: Callable[[str, int, int], None]) -> CharAdmission:
    """What `prepare_admission` gives, for texts of ASCII."""
    report("download", 1, 1)
    tokenizer: Any = CharTokenizer()
    texts = TokenTexts(tuple(bytes([code]) for code in range(128)), EOS_TOKEN_IDS, EOS_TOKEN_IDS)
    limit, grammars = config.target.max_context, Grammars(128, lambda: texts)
    return CharAdmission(config, tokenizer, CharBound(), 128, limit, EOS_TOKEN_IDS, grammars)


class FakeTarget:
    """A rank that waits until it is told to stop."""

    def __init__(self) -> None:
        self.death = ""
        self.was_aborted = False
        self._stop = threading.Event()

    def abort(self) -> None:
        self.was_aborted = True
        self._stop.set()

    def load(self) -> None: ...

    def open_store(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def connect(self, host: str, port: int, epoch: int) -> None: ...

    def run(self) -> None:
        self._stop.wait()
        if self.death:
            raise RuntimeError(self.death)

    def progress(self) -> list[Any]:
        return []

    def stats(self) -> dict[str, Any]:
        return {"busy_s": {"forward": 1.0, "wait": 1.0}}

    def trace_events(self) -> list[dict[str, Any]]:
        return [{"name": "forward", "ph": "X", "ts": 0.0, "dur": 1.0, "args": {}}]

    def stop(self) -> None:
        self._stop.set()

    def die(self, reason: str) -> None:
        self.death = reason
        self._stop.set()


class FakeDraft(FakeTarget):
    """Gives each request the text that `answer(prompt)` says, three tokens a round, the last two "drafted"."""

    def __init__(self, answer: Callable[[str], str], targets: Sequence[FakeTarget]) -> None:
        super().__init__()
        self.submitted: list[Request] = []
        self.cancelled: list[str] = []
        self._answer = answer
        self._targets = targets
        self._left: dict[str, list[int]] = {}
        self._emitted: dict[str, int] = {}
        self._events: queue.Queue[TokenEvent] = queue.Queue()

    def profile(self) -> None: ...

    def calibrate(self, request: Request) -> list[str]:
        assert request.sampling.is_greedy
        return [f"a text after {len(request.prompt_tokens)} tokens was hard"]

    def submit(self, requests: list[Request]) -> None:
        for request in requests:
            prompt = "".join(map(chr, request.prompt_tokens))
            self._emitted[request.id] = 0
            self._left[request.id] = [ord(char) for char in self._answer(prompt)]
            self.submitted.append(request)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def next_events(self, timeout_s: float) -> list[TokenEvent]:
        try:
            return [self._events.get(timeout=min(timeout_s, 0.02))]
        except queue.Empty:
            return []

    def run(self) -> None:
        while not self._stop.wait(ROUND_S):
            for request in self.submitted:
                if request.id in self._left:
                    self._events.put(self._round(request))
        for target in () if self.death else self._targets:
            target.stop()
        if self.death:
            raise RuntimeError(self.death)

    def _round(self, request: Request) -> TokenEvent:
        room = request.sampling.max_tokens - self._emitted[request.id]
        tokens = self._left[request.id][: min(3, room)]
        self._left[request.id] = self._left[request.id][len(tokens) :]
        self._emitted[request.id] += len(tokens)
        reason = ""
        if request.id in self.cancelled:
            tokens, reason = [], "cancelled"
        elif self._emitted[request.id] == request.sampling.max_tokens:
            reason = "length"
        elif not self._left[request.id]:
            reason = "stop"
        if reason:
            del self._left[request.id]
        count = len(tokens)
        logprobs = (TokenLogprobs(-0.5, ()),) * count if request.sampling.logprobs else ()
        stats = RequestStats(num_rounds=-(-self._emitted[request.id] // 3))
        origins = (Origin.TARGET, Origin.DRAFT, Origin.DRAFT)[:count]
        return TokenEvent(request.id, tuple(tokens), origins, logprobs, reason, "", stats)


class LocalHandle:
    """Calls a fake as the Coordinator calls an actor: `handle.method.remote(...)` is awaitable."""

    def __init__(self, worker: FakeTarget, threads: ThreadPoolExecutor) -> None:
        self._worker = worker
        self._threads = threads

    def __getattr__(self, name: str) -> "LocalMethod":
        return LocalMethod(getattr(self._worker, name), self._threads)


@dataclass(frozen=True)
class LocalMethod:
    call: Callable[..., Any]
    threads: ThreadPoolExecutor

    def remote(self, *args: object) -> "asyncio.Future[Any]":
        return asyncio.get_running_loop().run_in_executor(self.threads, self.call, *args)


@dataclass(frozen=True)
class FakeDeployment:
    """A started Coordinator and the fakes behind it."""

    coordinator: Coordinator
    draft: FakeDraft
    targets: tuple[FakeTarget, ...]
    warnings: list[str]  # of the start


@asynccontextmanager
async def fake_deployment(
    answer: Callable[[str], str], config: Config = FAKE_CONFIG
) -> AsyncIterator[FakeDeployment]:
    """Brings a Coordinator up on fakes in this event loop, and down again."""
    targets = tuple(FakeTarget() for _ in range(config.target.tp_size))
    draft = FakeDraft(answer, targets)
    with ThreadPoolExecutor(32) as threads:
        handles = tuple(LocalHandle(target, threads) for target in targets)
        workers = Workers(handles, LocalHandle(draft, threads))
        coordinator = Coordinator(config, lambda _: workers, char_admission)
        try:
            warnings = await coordinator.start()
            yield FakeDeployment(coordinator, draft, targets, warnings)
        finally:
            for worker in (draft, *targets):
                worker.stop()
            await coordinator.stop()


def endless(prompt: str) -> str:
    """An answer that does not end within a test."""
    return "and so on " * 100_000
