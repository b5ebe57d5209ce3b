"""A head of low rank learns the law that it is given."""

import torch
from torch import Tensor

from outrider.workers.draft_heads.lm_head import DenseLmHead
from outrider.workers.draft_heads.slim import SlimSettings, fit, quality, slim_start


def test_distilling_brings_a_head_closer_to_the_law_than_where_it_starts() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    head = DenseLmHead(32, torch.arange(100))
    # Rows lie in a few directions, which a start from other rows knows nothing of.
    rows = torch.randn(1024, 4, generator=generator) @ torch.randn(4, 32, generator=generator)

    def teacher(index: Tensor) -> Tensor:
        return head(rows[index]).detach()

    start = slim_start(head, 4, torch.randn(64, 32))
    before = quality(start, rows, teacher, 256)
    losses: list[float] = []
    settings = SlimSettings(4, passes=4, batch_rows=64, learning_rate=1e-2)
    fit(start, rows, teacher, settings, lambda done, total, loss: losses.append(loss))
    after = quality(start, rows, teacher, 256)
    assert len(losses) == 4 * 16
    assert after.kl < 0.2 * before.kl
    assert after.agreement > before.agreement
    perfect = quality(head, rows, teacher, 256)
    assert perfect.kl < 1e-6
    assert perfect.agreement == 1.0
    assert perfect.acceptance > 1 - 1e-6
