"""A head of low rank learns the law that it is given."""

from dataclasses import fields

import torch

from outrider.workers.draft_heads.lm_head import DenseLmHead
from outrider.workers.draft_heads.slim import (
    HeadRows,
    PairedRows,
    SlimSettings,
    fit,
    quality,
    slim_start,
)


def test_distilling_brings_a_head_closer_to_the_law_than_where_it_starts() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    head = DenseLmHead(32, torch.arange(100))
    # Rows lie in a few directions, which a start from other rows knows nothing of.
    read = torch.randn(1024, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
    rows, teacher = HeadRows(read, torch.arange(1024), read), head.weight.detach()
    start = slim_start(head, 4, torch.randn(64, 32))
    before = quality(start, rows, teacher, 256)
    losses: list[float] = []
    settings = SlimSettings(4, passes=4, batch_rows=64, learning_rate=1e-2)
    num_steps = fit(start, rows, teacher, settings, lambda done, total, loss: losses.append(loss))
    after = quality(start, rows, teacher, 256)
    assert len(losses) == num_steps == 4 * 16
    assert after.kl < 0.2 * before.kl
    assert after.agreement > before.agreement
    perfect = quality(head, rows, teacher, 256)
    assert perfect.kl < 1e-6
    assert perfect.agreement == 1.0
    assert perfect.acceptance > 1 - 1e-6


def test_beside_a_pair_term_a_head_learns_what_the_term_leaves_of_the_law() -> None:
    torch.manual_seed(0)
    head, read = DenseLmHead(32, torch.arange(50)), torch.randn(512, 32)
    pair_rows, successors = torch.randn(512, 3), 2.0 * torch.randn(50, 3)
    # The law is that of head and term together: rows beside what the term reads, under both matrices.
    both = torch.cat((read, pair_rows), dim=1)
    plain = HeadRows(read, torch.arange(512), both)
    rows = PairedRows(*(getattr(plain, field.name) for field in fields(plain)), pair_rows, successors)
    teacher = torch.cat((head.weight.detach(), successors), dim=1)
    assert quality(head, rows, teacher, 256).kl < 1e-6
    assert quality(head, plain, teacher, 256).kl > 1.0
    found = []
    for on in (rows, plain):
        slim = slim_start(head, 16, on.rows)
        fit(slim, on, teacher, SlimSettings(16, 20, 64, 1e-2), lambda done, total, loss: None)
        found.append(quality(slim, rows, teacher, 256).kl)
    assert found[0] < 0.5 * found[1]
