"""What an EAGLE-3 drafter's tree costs by the clock, with levels that wait for the host and without."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from outrider.kernels.proposals import NUM_SAMPLED_KINDS
from outrider.workers.drafting.eagle3 import Eagle3Method
from outrider.workers.drafting.engine import DraftEngine
from outrider.workers.drafting.method import MethodContext, Verified, VerifiedStep
from outrider.workers.drafting.slots import DraftedSlots
from outrider.workers.first_gpu.deployments import configuration
from outrider.workers.first_gpu.report import Row, milliseconds, passed_or_failed
from outrider.workers.first_gpu.setting import Setting
from outrider.workers.sequences.hidden import HiddenRows
from outrider.workers.sequences.params import SamplingParams
from outrider.workers.sequences.sequence import DraftOptions, Request, Sequence
from outrider.workers.trace import Tracer
from outrider.workers.weights.progress import silent
from outrider.workers.weights.random_source import RandomSource

NUM_LEVELS, MAX_NODES = 5, 64
NUM_SEEN = 20  # proposals of each kind, all accepted
PROMPT = tuple(range(5, 75))
LAWS = {
    "greedy": SamplingParams(temperature=0.0),
    "top-p": SamplingParams(temperature=0.8, top_p=0.9, seed=3),
}


def grown_drafts(setting: Setting, head: Path) -> list[Row]:
    """Of one sequence, each level of up to six nodes. On a CPU nothing grows without the host."""
    further = [f"draft.eagle3.model={head}", "draft.methods=[eagle3]"]
    config = configuration(setting, "bfloat16", "kernel" if setting.on_gpu else "sdpa", further=further)
    target = RandomSource(setting.model_spec()).config
    slots = DraftedSlots(1, MAX_NODES, NUM_LEVELS)
    drafting = DraftEngine(slots)
    tracer = Tracer("draft", False)
    context = MethodContext(config, target, setting.device, slots, drafting.estimator, tracer, silent)
    method = Eagle3Method.build(context)
    drafting.add(method)
    # Untrained, it would not be trusted further than a level or two.
    kinds = np.arange(1, 1 + NUM_SAMPLED_KINDS).repeat(NUM_SEEN)
    drafting.estimator.observe(kinds, np.ones(len(kinds), dtype=np.bool_))
    count = len(PROMPT)
    taps = dict.fromkeys(method.needs.layers, torch.randn(count, target.hidden_size).to(setting.device))
    rows, zero = [], np.zeros(1, dtype=np.int64)

    def draft(sampling: SamplingParams, expand: Callable[[], object]) -> tuple[float, set[tuple[int, ...]]]:
        """Median seconds, and the paths of the tree."""
        seconds = []
        for _ in range(1 + setting.sizes.replays):
            request = Request("0", PROMPT, sampling, DraftOptions(("eagle3",), MAX_NODES, NUM_LEVELS))
            sequence = Sequence(request, [*PROMPT, 3], slot=0)
            drafting.start(sequence)
            step = VerifiedStep(sequence, 0, 0, np.arange(count), count, np.zeros(1, dtype=np.int64))
            drafting.observe(Verified((step,), HiddenRows(taps, zero, zero)))
            while method.read(zero):
                pass
            setting.synchronize()
            begun = time.perf_counter()
            expand()
            seconds.append(time.perf_counter() - begun)
            tree = {tuple(drafting.trees.path(0, n)) for n in range(int(drafting.trees.num_nodes[0]))}
            drafting.finish(sequence)
        return median(seconds), tree

    def one_by_one() -> list[int]:
        return [drafting.expand(method, zero) for _ in range(NUM_LEVELS)]

    for law, sampling in LAWS.items():
        what = f"eagle3, a tree of {NUM_LEVELS} levels, {law}"
        alone_s, alone = draft(sampling, one_by_one)
        rows.append(milliseconds(f"{what}: level by level", alone_s))
        if method.grows_alone:
            grown_s, grown = draft(sampling, lambda: drafting.expand(method, zero, NUM_LEVELS - 1))
            rows.append(milliseconds(f"{what}: without the host", grown_s))
            common = len(alone & grown) / max(1, len(alone))
            problems = [] if common > 0.8 else [f"{common:.0%} of the tree's paths are those of the host's"]
            rows.append(passed_or_failed(f"{what}: the same tree", problems, f"{common:.0%} of the paths"))
    drafting.close()
    return rows
