"""Training-time test (EAGLE-3, arXiv 2503.01840): K steps, each fed with the drafter's own last output.

The literal picture, tokens a b c d e f at positions 0..5 and labels from c on. A row is anchored at a position
p >= 1, and rotated by its place p + k - 1.

    step 0: reads token p      and feature(p - 1), the target's     -> guesses token p + 1
    step 1: reads token p + 1  and step 0's output of anchor p      -> guesses token p + 2
    step k: reads token p + k  and step k - 1's output of anchor p  -> guesses token p + k + 1

    anchor 1 (b): step 0 guesses c, step 1 d, step 2 e, step 3 f
    anchor 2 (c): step 0 guesses d, step 1 e, step 2 f
    anchor 3 (d): step 0 guesses e, step 1 f

which is what a server does with a context that ends at p: true features up to there, its own behind.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from outrider.kernels.transfers import upload
from outrider.workers.draft_heads.eagle3 import Eagle3Drafter
from outrider.workers.draft_heads.mtp import MtpDrafter
from outrider.workers.model.rope import RotaryEmbedding
from outrider.workers.training.feature_batch import FeatureBatch
from outrider.workers.training.heads import HeadLoss, label_weights
from outrider.workers.training.metrics import StepCounts
from outrider.workers.training.unrolled_attention import unrolled_attention


class UnrolledConfig(Protocol):
    """What the configurations of methods of this kind have in common."""

    @property
    def unrolled_steps(self) -> int: ...

    @property
    def step_decay(self) -> float: ...

    @property
    def loss(self) -> str: ...


Unrolled = Eagle3Drafter | MtpDrafter


@dataclass(frozen=True)
class Anchors:
    """Where the rows of one step read and write. A rows, those of all texts back to back.

    Attributes:
        rows: int64 [A], which of the step-0 rows each is anchored at.
        kept: int64 [A], which of the previous step's rows goes on as each.
        read_tokens: int64 [A], index into the batch's tokens of what it reads.
        positions: int64 [A], rotary position.
        learned: int64 [L], which of the A rows guess a label.
        laws: int64 [L], index into the batch's tokens of the position whose law they guess.
    """

    rows: Tensor
    kept: Tensor
    read_tokens: Tensor
    positions: Tensor
    learned: Tensor
    laws: Tensor


class _Indices(NamedTuple):
    """What the device is told of a step, int64 each.

    Attributes:
        tokens: [A], read by each row.
        places: [A], where each row lies in the `Grid`.
        kept, positions: [A], as in `Anchors`.
        learned: [L], as in `Anchors`.
        chains: [L], index into the batch's tokens: where the chain of guesses of each label began.
    """

    tokens: Tensor
    places: Tensor
    kept: Tensor
    positions: Tensor
    learned: Tensor
    chains: Tensor


def plan_steps(lengths: list[int], is_label: Tensor, num_steps: int) -> list[Anchors]:
    """The rows of each step: see the picture in the module. Step 0 has all of a text but its first token; later
    steps only what goes on to guess labels."""
    sizes = torch.tensor(lengths)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    ends = starts + sizes.repeat_interleave(sizes)
    index = torch.arange(len(starts))
    anchors = index[index > starts]  # [R], all positions but the first of each text
    ends, starts = ends[anchors], starts[anchors]
    steps: list[Anchors] = []
    rows = torch.arange(len(anchors))
    previous = rows
    for step in range(num_steps):
        label = anchors[rows] + step + 1
        guesses = label < ends[rows]
        guesses[guesses.clone()] = is_label[label[guesses]]
        if step:
            # What is not learned is not needed: nobody else reads a row of a later step.
            rows, guesses = rows[guesses], guesses[guesses]
        kept = torch.searchsorted(previous, rows)
        read = anchors[rows] + step
        learned = guesses.nonzero().squeeze(1)
        steps.append(Anchors(rows, kept, read, read - 1 - starts[rows], learned, read[learned]))
        previous = rows
        rows = rows if step else rows[learned]
    return steps


class UnrolledTraining(nn.Module):
    """A drafter and its loss over K unrolled steps.

    Attributes:
        drafter: what is trained.
        head_loss: of its LM head.
    """

    def __init__(
        self,
        drafter: Unrolled,
        embedding: Tensor,
        config: UnrolledConfig,
        dtype: torch.dtype,
    ) -> None:
        """embedding: [V, hidden], the target's, which is not trained. dtype: of products."""
        super().__init__()
        self.drafter = drafter
        self.head_loss = HeadLoss(drafter.lm_head, config.loss)
        self.config = config
        self.dtype = dtype
        self._embedding = [embedding]  # in a list: no part of what is trained, saved or shared out
        model = drafter.model
        self._rope = RotaryEmbedding(model, model.layers[0].rope, torch.float32, embedding.device)

    @abstractmethod
    def features(self, batch: FeatureBatch) -> Tensor:
        """The target's [N, hidden] at each token, as the drafter reads them."""

    @property
    def num_guesses(self) -> int:
        """Tokens that are guessed behind a context."""
        return self.config.unrolled_steps

    def set_progress(self, fraction: float) -> None:
        """Nothing here changes with the part of the steps that is done."""

    def count_labels(self, batch: FeatureBatch) -> Tensor:
        """float32 [K]: of a batch, how many labels each step's loss is the mean over."""
        steps = plan_steps(batch.lengths, batch.is_label, self.num_guesses)
        within = self.head_loss.has(batch.greedy)
        return torch.tensor([float(within[step.laws].sum()) for step in steps])

    def forward(self, batch: FeatureBatch, totals: Tensor, measure: bool) -> tuple[Tensor, StepCounts]:
        """The loss: over steps k the sum of step_decay**k times the mean over labels.

        Args:
            totals: float32 [K], what each mean is divided by: labels of all ranks and forwards of this step.
            measure: also count how often the drafter's guesses are the target's choice; slower.
        """
        enabled = self.dtype != torch.float32
        with torch.autocast(batch.device.type, dtype=self.dtype, enabled=enabled):
            return self._unroll(batch, totals, measure)

    def _unroll(self, batch: FeatureBatch, totals: Tensor, measure: bool) -> tuple[Tensor, StepCounts]:
        drafter, device = self.drafter, batch.device
        window = drafter.model.layers[0].window
        steps = [
            step
            for number, step in enumerate(plan_steps(batch.lengths, batch.is_label, self.num_guesses))
            if not number or len(step.rows)
        ]
        grid = Grid(batch.lengths)
        sizes = [len(step.learned) for step in steps]
        laws = torch.cat([step.laws for step in steps])
        known = self.head_loss.has(batch.greedy[laws])
        of_steps = [
            _Indices(
                batch.tokens[step.read_tokens],
                grid.places[step.rows],
                step.kept,
                step.positions,
                step.learned,
                step.laws - number,
            )
            for number, step in enumerate(steps)
        ]
        before, of_laws, learned, *flat = upload(
            [
                steps[0].read_tokens - 1,
                laws,
                known.nonzero().squeeze(1),
                *(array for indices in of_steps for array in indices),
            ],
            device,
        )
        width = len(_Indices._fields)
        of_steps = [_Indices(*flat[start : start + width]) for start in range(0, len(flat), width)]
        features = self.features(batch).index_select(0, before)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        outputs: list[Tensor] = []
        for number, step in enumerate(of_steps):
            if number:
                features = features.index_select(0, step.kept)
            embedded = self._embedding[0][step.tokens].to(self.dtype)
            cos, sin = (table.to(self.dtype)[:, None] for table in self._rope(step.positions))

            def attend(
                q: Tensor,
                k: Tensor,
                v: Tensor,
                cos: Tensor = cos,
                sin: Tensor = sin,
                places: Tensor = step.places,
            ) -> Tensor:
                keys.append(grid.spread(rotated(k, cos, sin), places, q.shape[1] // k.shape[1]))
                values.append(grid.spread(v, places, q.shape[1] // k.shape[1]))
                laid = grid.spread(rotated(q, cos, sin), places, 1)
                found = unrolled_attention(laid, keys, values, q.shape[-1] ** -0.5, window)
                return grid.gather(found, places)

            features = drafter(embedded, features, attend)
            outputs.append(features.index_select(0, step.learned))
        # The heads of all steps at once: what each label counts for stands in its weight.
        weights = label_weights(self.config.step_decay, totals, sizes)
        loss, guesses = self.head_loss(
            drafter.normed(torch.cat(outputs)), batch.soft.at(of_laws), learned, weights, measure
        )
        counts = StepCounts(self.num_guesses, len(batch.tokens), device)
        num_learned = [int(part.sum()) for part in known.split(sizes)]
        for number, of_step in enumerate(guesses.split(sizes)):
            counts.add(number, num_learned[number], of_step, of_steps[number].chains)
        return loss, counts


class Grid:
    """Rows of texts back to back <-> [B, H, T, D], a line per text: attention wants lines.

    Attributes:
        places: int64 [R], on the host: where each step-0 row lies in the lines.
    """

    def __init__(self, lengths: list[int]) -> None:
        """Of the step-0 rows: each text has one less than it has tokens."""
        sizes = torch.tensor(lengths) - 1
        self.num_texts, self.width = len(lengths), int(sizes.max())
        text = torch.arange(len(lengths)).repeat_interleave(sizes)
        place = torch.arange(int(sizes.sum())) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        self.places = text * self.width + place

    def spread(self, rows: Tensor, places: Tensor, repeat: int) -> Tensor:
        """[A, H, D] -> [B, H * repeat, T, D], each head `repeat` times, the rows at these places; zeros elsewhere."""
        _, H, D = rows.shape
        grid = rows.new_zeros(self.num_texts * self.width, H, D).index_copy(0, places, rows)
        grid = grid.view(self.num_texts, self.width, H, D).transpose(1, 2)
        return grid.repeat_interleave(repeat, dim=1) if repeat > 1 else grid.contiguous()

    def gather(self, grid: Tensor, places: Tensor) -> Tensor:
        """[B, H, T, D] -> [A, H * D], the rows at these places."""
        return grid.transpose(1, 2).reshape(self.num_texts * self.width, -1).index_select(0, places)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [A, H, D]; cos and sin [A, 1, D / 2]. Dimension i goes with i + D/2, as in the models."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
