"""What users would run instead: transformers `generate`, greedy or sampled, plain, assisted or with lookup.

`BaselineProcess` runs it in a process of its own that sleeps between requests, so that several engines can
take turns on the same cores. `python -m outrider.workers.baselines` is that process: JSON lines in and out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from outrider.workers.answer import Completion
from outrider.workers.memory import peak_memory_bytes
from outrider.workers.sequences.sequence import KeptAccount, RequestStats

BaselineMode = Literal["transformers", "transformers-assisted", "transformers-lookup"]
BASELINE_MODES: tuple[BaselineMode, ...] = ("transformers", "transformers-assisted", "transformers-lookup")

LOOKUP_NUM_TOKENS = 10


@dataclass(frozen=True)
class BaselineRequest:
    """One prompt for `TransformersBaseline.generate`."""

    mode: BaselineMode
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class BaselineSpec:
    """What a baseline process loads: `target` and `draft` as `target.model` in the configuration."""

    target: str
    draft: str
    """Empty: no assistant model."""

    dtype: str
    num_threads: int
    cache_dir: str
    stop_token_ids: tuple[int, ...]


class _TimingStreamer(BaseStreamer):
    """Notes when tokens arrive; the first thing transformers puts is the prompt."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        new = value.flatten().tolist()
        self.tokens += new
        self.times += [time.perf_counter()] * len(new)

    def end(self) -> None:
        pass


class TransformersBaseline:
    """Answers one request at a time with `target.generate`, all other settings left at their defaults."""

    def __init__(
        self, target: PreTrainedModel, draft: PreTrainedModel | None, stop_token_ids: Sequence[int]
    ) -> None:
        self._target = target.eval()
        self._draft = draft.eval() if draft is not None else None
        self._stop_token_ids = list(stop_token_ids)

    def generate(self, request: BaselineRequest) -> Completion:
        """Runs `request`; raises ValueError if it wants an assistant and there is none."""
        options: dict[str, Any] = {"max_new_tokens": request.max_tokens, "do_sample": request.temperature > 0}
        if request.temperature > 0:
            options |= {"temperature": request.temperature, "top_k": request.top_k, "top_p": request.top_p}
            options |= {"min_p": request.min_p} if request.min_p > 0 else {}
        if request.repetition_penalty != 1.0:
            options["repetition_penalty"] = request.repetition_penalty
        if self._stop_token_ids:
            options |= {"eos_token_id": self._stop_token_ids, "pad_token_id": self._stop_token_ids[0]}
        if request.mode == "transformers-assisted":
            if self._draft is None:
                raise ValueError("mode transformers-assisted needs draft.model in the configuration")
            options["assistant_model"] = self._draft
        elif request.mode == "transformers-lookup":
            options["prompt_lookup_num_tokens"] = LOOKUP_NUM_TOKENS

        row_counts: list[int] = []

        def count_rows(_module: torch.nn.Module, _args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            row_counts.append(int(inputs["input_ids"].shape[1]))

        prompt = torch.tensor([request.prompt_tokens], dtype=torch.int64)
        streamer = _TimingStreamer()
        torch.manual_seed(request.seed)
        counting = self._target.register_forward_pre_hook(count_rows, with_kwargs=True)
        begin = time.perf_counter()
        try:
            with torch.inference_mode():
                self._target.generate(
                    prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, **options
                )
        finally:
            counting.remove()
        total_s = time.perf_counter() - begin
        num_steps = len(row_counts)
        tokens = tuple(streamer.tokens)
        stats = RequestStats(
            num_rounds=num_steps,
            # Rows that were neither prompt nor the one token each further step has to feed.
            num_drafted=sum(row_counts) - len(request.prompt_tokens) - (num_steps - 1),
            # Every step adds one token of the target's own, the rest was drafted.
            num_accepted=len(tokens) - num_steps,
        )
        return Completion(
            tokens=tokens,
            token_times_s=tuple(at - begin for at in streamer.times),
            total_s=total_s,
            num_prompt_tokens=len(request.prompt_tokens),
            finish_reason="stop" if tokens and tokens[-1] in self._stop_token_ids else "length",
            stats=stats,
        )


class BaselineProcess:
    """A process with transformers in it; `generate` blocks. A context manager."""

    def __init__(self, spec: BaselineSpec) -> None:
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "outrider.workers.baselines"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(spec.num_threads)},
        )
        self._ask({"spec": asdict(spec)})

    @property
    def pid(self) -> int:
        return self._process.pid

    def generate(self, request: BaselineRequest) -> Completion:
        reply = self._ask({"request": asdict(request)})
        stats = {**_with_tuples(reply["stats"]), "kept": KeptAccount(**reply["stats"]["kept"])}
        return Completion(**{**_with_tuples(reply), "stats": RequestStats(**stats)})

    def peak_memory_bytes(self) -> int:
        return int(self._ask({"peak_memory": True})["peak_memory_bytes"])

    def close(self) -> None:
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def __enter__(self) -> BaselineProcess:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            last_words = self._log.read().strip().splitlines()[-1:]
            raise RuntimeError(f"the transformers process ended: {''.join(last_words)}")
        reply: dict[str, Any] = json.loads(line)
        if "refused" in reply:
            raise ValueError(reply["refused"])
        return reply


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists alone."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _load(spec: BaselineSpec) -> TransformersBaseline:
    from outrider.workers.weights.progress import silent
    from outrider.workers.weights.reference import load_transformers
    from outrider.workers.weights.resolver import resolve

    torch.set_num_threads(spec.num_threads)
    dtype = getattr(torch, spec.dtype)
    cache_dir = Path(spec.cache_dir).expanduser()
    target = load_transformers(resolve(spec.target, cache_dir, silent, "target.model"), dtype)
    draft = None
    if spec.draft:
        draft = load_transformers(resolve(spec.draft, cache_dir, silent, "draft.model"), dtype)
    return TransformersBaseline(target, draft, spec.stop_token_ids)


def serve() -> None:
    """Answers JSON lines from stdin on stdout until stdin ends: first the spec, then requests."""
    replies = sys.stdout
    sys.stdout = sys.stderr  # a library that prints must not end up in the replies
    baseline: TransformersBaseline | None = None
    for line in sys.stdin:
        message = json.loads(line)
        reply: dict[str, Any]
        try:
            if "spec" in message:
                baseline = _load(BaselineSpec(**_with_tuples(message["spec"])))
                reply = {"loaded": True}
            elif "request" in message:
                assert baseline is not None
                reply = asdict(baseline.generate(BaselineRequest(**_with_tuples(message["request"]))))
            else:
                reply = {"peak_memory_bytes": peak_memory_bytes()}
        except ValueError as error:
            reply = {"refused": str(error)}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve()
