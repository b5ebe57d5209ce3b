import pytest
import torch

from outrider.kernels.rope_append import rope_append


def rotate_by_hand(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """(x_i, x_{i + D/2}) turned by angle i, one number at a time."""
    out = x.clone()
    half = x.shape[-1] // 2
    for n in range(x.shape[0]):
        for head in range(x.shape[1]):
            for i in range(half):
                a, b = x[n, head, i], x[n, head, i + half]
                cos, sin = angles[n, i].cos(), angles[n, i].sin()
                out[n, head, i], out[n, head, i + half] = a * cos - b * sin, b * cos + a * sin
    return out


@pytest.mark.parametrize("fused", [True, False])
def test_rotates_queries_and_keys_and_writes_the_cache_at_its_slots(fused: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 3 + 2 + 2, 8, generator=generator)
    q, k, v = qkv.split((3, 2, 2), dim=1)  # views, as a fused projection gives them
    if not fused:
        q, k = q.clone(), k.clone()
    angles = torch.randn(3, 4, generator=generator)
    k_pages = torch.full((4, 2, 2, 8), 7.0)
    v_pages = torch.full((4, 2, 2, 8), 8.0)
    slots = torch.tensor([5, 0, 6])
    rotated = rope_append(q, k, v, angles.cos(), angles.sin(), slots, k_pages, v_pages)
    torch.testing.assert_close(rotated, rotate_by_hand(q, angles))
    rows = k_pages.view(8, 2, 8)
    torch.testing.assert_close(rows[slots], rotate_by_hand(k, angles))
    assert torch.equal(v_pages.view(8, 2, 8)[slots], v)
    others = [1, 2, 3, 4, 7]
    assert (rows[others] == 7.0).all()
    assert (v_pages.view(8, 2, 8)[others] == 8.0).all()


def test_inputs_are_not_changed() -> None:
    q, k, v = torch.randn(1, 2, 4), torch.randn(1, 1, 4), torch.randn(1, 1, 4)
    before = (q.clone(), k.clone(), v.clone())
    angle = torch.tensor([[0.5, 1.0]])
    rope_append(
        q, k, v, angle.cos(), angle.sin(), torch.tensor([1]), torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)
    )
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
