"""The training loop of one rank, on DeepSpeed's engine (ZeRO, arXiv 1910.02054)."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outrider.configs.training import OptimizerConfig, TrainingConfig
from outrider.workers.training import provenance
from outrider.workers.training.data import BatchPlan, Corpus
from outrider.workers.training.feature_batch import BatchReader, FeatureBatch
from outrider.workers.training.log import EvalLine, Line, RunLog, TrainLine
from outrider.workers.training.metrics import Measurement, measurement
from outrider.workers.training.tasks import Task, training_device

_CHECKPOINTS = "checkpoints"
_KEPT_CHECKPOINTS = 2


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Of step 0, 1, …: a linear warm-up, then down to `final_lr_fraction` along a cosine or a line."""
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    if config.schedule == "constant":
        return config.lr
    fraction = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * fraction)


def has_run(out: Path) -> bool:
    """Whether a run in this folder can go on from a checkpoint."""
    return (out / _CHECKPOINTS / "latest").exists()


class Trainer:
    """One rank. All ranks run the same calls in the same order."""

    def __init__(
        self, config: TrainingConfig, corpus: Corpus, task: Task, rank: int, rendezvous: Path
    ) -> None:
        """Joins the other ranks.

        Args:
            rendezvous: a file that no rank has opened yet, in a folder that all see.
        """
        self._config = config
        self._corpus = corpus
        self._task = task
        self._rank = rank
        self._out = Path(config.out).expanduser()
        self._device = training_device(config, rank)
        torch.set_num_threads(config.engine.num_threads)
        self._deepspeed = _deepspeed()
        os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed reads it nowhere else
        self._deepspeed.init_distributed(
            "nccl" if config.engine.device == "cuda" else "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=config.engine.ranks,
            auto_mpi_discovery=False,
        )
        optimizer = config.optimizer
        per_rank = optimizer.batch_tokens / config.engine.ranks
        self._num_forwards = max(1, math.ceil(per_rank / optimizer.micro_tokens))
        self._plan = BatchPlan(
            [len(text.tokens) for text in corpus.training],
            optimizer.batch_tokens,
            config.engine.ranks * self._num_forwards,
            config.seed,
        )
        self._engine = self._start_engine()
        self._step = 0
        self._trained_s = 0.0
        self._measured: Measurement | None = None

    def run(self, say: Callable[[Line], None]) -> Measurement:
        """Trains to the end, from the last checkpoint if there is one; what the held-out texts say at the end."""
        config = self._config
        self._resume()
        log = RunLog(self._out, self._step) if self._rank == 0 else None

        def tell(line: Line) -> None:
            if log is not None:
                log.write(line)
                say(line)

        window = _Window()
        while self._step < config.optimizer.steps:
            begin = time.perf_counter()
            window.add(self._train_step())
            self._step += 1
            window.seconds += time.perf_counter() - begin
            last = self._step == config.optimizer.steps
            measures, keeps = (
                last or self._step % every == 0 for every in (config.eval_every, config.checkpoint_every)
            )
            if last or measures or keeps or self._step % config.log_every == 0:
                line = self._line(window)
                self._trained_s += window.seconds
                tell(line)
                window = _Window()
            if measures:
                self._measured = self.measure()
                tell(EvalLine(self._step, self._measured))
            if keeps:
                self._checkpoint()
        if log is not None:
            log.close()
        return self._measured if self._measured is not None else self.measure()

    def close(self) -> None:
        """Leaves the other ranks."""
        self._engine.destroy()
        self._deepspeed.comm.destroy_process_group()

    def _start_engine(self) -> Any:
        config = self._config.optimizer
        groups = [
            {"params": parameters, "lr": config.lr * factor, "factor": factor}
            for parameters, factor in self._task.lr_factors
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self._num_forwards,
            "gradient_clipping": config.clip,
            "zero_optimization": {"stage": self._config.engine.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 30,
        }
        engine, *_ = self._deepspeed.initialize(
            model=self._task.module.to(self._device),
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )
        return engine

    def _train_step(self) -> _StepResult:
        """One optimizer step."""
        config, engine = self._config, self._engine
        rate = learning_rate(config.optimizer, self._step)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        engine.module.set_progress(self._step / config.optimizer.steps)
        # Dropout depends on the step alone, so that a run that was interrupted goes on as if it had not been.
        torch.manual_seed(config.seed * 1_000_003 + self._step)
        groups = self._plan.groups(self._step)
        mine = groups[self._rank :: config.engine.ranks]
        batches = [self._read(self._task.training, group, groups) for group in mine]
        totals = self._added_up(sum(engine.module.count_labels(batch) for batch in batches))
        totals = totals.to(self._device)
        found = []
        for batch in batches:
            loss, counts = engine(batch.to(self._device), totals, False)
            # The engine takes means over ranks and forwards; the loss is a mean over labels already.
            engine.backward(loss * (config.engine.ranks * self._num_forwards))
            engine.step()
            found.append((loss.detach(), counts.sums))
        num_tokens = sum(len(self._corpus.training[index].tokens) for group in groups for index in group)
        losses, sums = zip(*found, strict=True)
        return _StepResult(sum(losses[1:], losses[0]), sum(sums[1:], sums[0]), num_tokens)

    @torch.no_grad()
    def measure(self) -> Measurement:
        """What the held-out texts say; all ranks share them."""
        size, limit = self._config.engine.ranks, self._config.optimizer.micro_tokens
        lengths = [len(text.tokens) for text in self._corpus.held_out]
        groups: list[list[int]] = [[]]
        for index in sorted(range(len(lengths)), key=lengths.__getitem__):
            if groups[-1] and sum(lengths[other] for other in groups[-1]) + lengths[index] > limit:
                groups.append([])
            groups[-1].append(index)
        groups += [[] for _ in range(-len(groups) % size)]  # every rank runs as many forwards
        module = self._engine.module
        module.eval()
        sums, chains = torch.zeros(()), torch.zeros(())
        for group in groups[self._rank :: size]:
            batch = self._read(self._task.held_out, group, groups).to(self._device)
            _, counts = module(batch, module.count_labels(batch).to(self._device), True)
            sums, chains = sums + counts.sums.cpu(), chains + counts.chains.cpu()
        module.train()
        joined = self._added_up(torch.cat((sums, chains), dim=1))
        return measurement(joined[:, :-2], joined[:, -2:])

    def _read(self, reader: BatchReader, group: list[int], groups: list[list[int]]) -> FeatureBatch:
        if group:
            return reader.read(group)
        # Nothing for this rank: it goes along with a text that it learns nothing of.
        return reader.read(max(groups, key=len)[:1]).without_labels()

    def _added_up(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self._config.engine.ranks > 1:
            values = values.to(self._device)
            self._deepspeed.comm.all_reduce(values)
        return values.cpu()

    def _line(self, window: _Window) -> TrainLine:
        """Of the steps since the last line, whose end is waited for. Raises ValueError where a loss is no number."""
        begin = time.perf_counter()
        joined = self._added_up(torch.cat((window.loss[None], window.sums.flatten())))
        window.seconds += time.perf_counter() - begin
        loss = joined[0].item() / window.num_steps
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss became {loss} in the {window.num_steps} steps up to {self._step}: "
                "optimizer.lr must be lower"
            )
        sums = joined[1:].view_as(window.sums)
        found = measurement(sums, torch.zeros(len(sums), 2))
        per_step = window.seconds / window.num_steps
        return TrainLine(
            step=self._step,
            loss=loss,
            losses=found.losses,
            acceptances=found.acceptances,
            lr=learning_rate(self._config.optimizer, self._step - 1),
            tokens_per_s=window.num_tokens / window.seconds,
            passes=self._plan.passes(self._step),
            left_s=per_step * (self._config.optimizer.steps - self._step),
        )

    def _resume(self) -> None:
        if not has_run(self._out):
            return
        folder = self._out / _CHECKPOINTS
        path, state = self._engine.load_checkpoint(str(folder), load_module_strict=False)
        if path is None:
            raise ValueError(f"out: the checkpoint in {folder} cannot be read; remove it to begin again")
        if state["texts_sha256"] != self._corpus.digest:
            raise ValueError(f"out: {self._out} was trained on other texts than texts.directories hold")
        self._step, self._trained_s = state["step"], state["trained_s"]
        self._measured = state["measured"]

    def _checkpoint(self) -> None:
        """The state of the run, to go on from; and the drafter as it is now, to use."""
        state = {
            "step": self._step,
            "trained_s": self._trained_s,
            "texts_sha256": self._corpus.digest,
            "measured": self._measured,
        }
        folder = self._out / _CHECKPOINTS
        self._engine.save_checkpoint(
            str(folder), tag=f"step-{self._step}", client_state=state, exclude_frozen_parameters=True
        )
        with self._whole_weights():
            if self._rank == 0:
                drafter = self._out / "drafter"
                measured = self._measured
                self._task.save(drafter, measured.accuracies if measured is not None else ())
                self._provenance().write(drafter)
                steps = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
                for old in steps[:-_KEPT_CHECKPOINTS]:
                    shutil.rmtree(old)

    def _whole_weights(self) -> AbstractContextManager[None]:
        """Within it this rank sees all weights, whatever ZeRO stage shares them out."""
        if self._config.engine.zero_stage < 3:
            return nullcontext()
        gathered: AbstractContextManager[None] = self._deepspeed.zero.GatheredParameters(
            list(self._engine.module.parameters())
        )
        return gathered

    def _provenance(self) -> provenance.Provenance:
        config, corpus = self._config, self._corpus
        gpu = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else ""
        return provenance.Provenance(
            command=provenance.command(),
            commit=provenance.commit(),
            versions=provenance.versions(),
            config=asdict(config),
            texts_sha256=corpus.digest,
            num_texts=len(corpus.training),
            num_tokens=sum(len(text.tokens) for text in corpus.training),
            num_held_out=len(corpus.held_out),
            seed=config.seed,
            step=self._step,
            passes=self._plan.passes(self._step),
            hours=self._trained_s / 3600,
            machine=provenance.machine(config.engine.num_threads, gpu),
            measured=asdict(self._measured) if self._measured is not None else {},
        )


@dataclass(frozen=True)
class _StepResult:
    """Of this rank. Tensors are on its device, where they may not be ready yet."""

    loss: Tensor
    sums: Tensor
    num_tokens: int


class _Window:
    """The steps since the last line."""

    def __init__(self) -> None:
        self.loss = torch.zeros(())
        self.sums = torch.zeros(())
        self.num_steps = self.num_tokens = 0
        self.seconds = 0.0

    def add(self, step: _StepResult) -> None:
        first = not self.num_steps
        self.loss = step.loss if first else self.loss + step.loss
        self.sums = step.sums if first else self.sums + step.sums
        self.num_steps += 1
        self.num_tokens += step.num_tokens


def _deepspeed() -> Any:
    """DeepSpeed, imported late: it takes seconds, and looks for compilers."""
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError("training needs the package deepspeed: pip install 'outrider[train]'") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its all-reduce over shared memory would be compiled for minutes, and leaves files behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
