# SPDX-License-Identifier: Apache-2.0
"""The accept/reject test of speculative decoding as a mask."""

import pytest
import torch

from minigold.disagree import KNOWN_BEFORE, LEAST, acceptance, choose, weights


@pytest.mark.parametrize("where", KNOWN_BEFORE)
def test_what_is_no_number_is_trained(where: str) -> None:
    """So that the step fails by it, and does not go on with the rest."""
    acceptance_C = torch.tensor([1.0, torch.nan, 1.0])
    generator = torch.Generator().manual_seed(0)
    assert choose(acceptance_C, where=where, threshold=0.5, generator=generator)[1]


def test_acceptance_is_the_clipped_ratio_and_zero_where_unscorable() -> None:
    student_C = torch.tensor([-1.0, -2.0, -1.0, torch.nan])
    teacher_C = torch.tensor([-3.0, -1.0, -1.0, torch.nan])
    scorable_C = torch.tensor([True, True, True, False])
    expected_C = torch.tensor([-2.0, 0.0, 0.0, -torch.inf]).exp()
    torch.testing.assert_close(acceptance(student_C, teacher_C, scorable_C), expected_C)


def test_all_and_reject() -> None:
    accepted_C = torch.tensor([0.0, 0.49, 0.5, 1.0])
    assert choose(accepted_C, where="all").tolist() == [True] * 4
    assert choose(accepted_C, where="reject", threshold=0.5).tolist() == [True, True, False, False]


@pytest.mark.parametrize("a", [0.0, 0.3, 0.85, 0.9, 0.97, 1.0])
def test_weighted_counts_each_chunk_once_on_average(a: float) -> None:
    """Drawn with 1 - a, at least a tenth, and counted by the inverse."""
    n, g = 200_000, torch.Generator().manual_seed(0)
    a_C = torch.full((n,), a)
    drawn_C = choose(a_C, where="weighted", generator=g)
    rate = drawn_C.double().mean().item()
    assert rate == pytest.approx(max(1 - a, LEAST), abs=0.003)
    assert weights(a_C)[drawn_C].double().sum().item() / n == pytest.approx(1, abs=0.03)
    if a == 0:
        assert drawn_C.all()


def test_sampled_rejects_with_probability_one_minus_a() -> None:
    n = 40_000
    for a in (0.0, 0.1, 0.5, 0.93, 1.0):
        g = torch.Generator().manual_seed(0)
        rate = choose(torch.full((n,), a), where="sampled", generator=g).double().mean().item()
        assert abs(rate - (1 - a)) <= 4 * (a * (1 - a) / n) ** 0.5


def test_with_one_tokenizer_it_fires_at_the_total_variation_distance() -> None:
    g = torch.Generator().manual_seed(0)
    student_V, teacher_V = torch.randn(2, 9, generator=g).double().softmax(-1)
    ids_C = torch.multinomial(student_V, 60_000, replacement=True, generator=g)
    ones_C = torch.ones(len(ids_C), dtype=torch.bool)
    accepted_C = acceptance(student_V.log()[ids_C], teacher_V.log()[ids_C], ones_C)
    rate = choose(accepted_C, where="sampled", generator=g).double().mean().item()
    assert rate == pytest.approx((student_V - teacher_V).abs().sum().item() / 2, abs=0.01)


def test_seeded() -> None:
    accepted_C = torch.full((50,), 0.5)
    draws = [
        choose(accepted_C, where="sampled", generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_unknown_where_is_refused() -> None:
    with pytest.raises(ValueError, match="one of all, weighted, sampled, reject, got 'soft-or'"):
        choose(torch.ones(1), where="soft-or")
