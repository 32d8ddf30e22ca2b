# SPDX-License-Identifier: Apache-2.0
"""Values, gradients and worked examples of the loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minigold.events import Events, match
from minigold.loss import (
    BEFORE,
    FIRST,
    INSIDE,
    REST,
    Carry,
    ChunkRows,
    Rows,
    chunk_losses,
    divergence,
    gold_loss,
    look,
)
from minigold.model import Head
from minigold.offsets import Vocabulary
from reference_losses import SlowSide, divergence_of, gkd, law_of, loss_of
from test_events import words

BETAS = (0.0, 1e-4, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0)


NOTHING = Carry(
    torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
)


def one_token_rows(n: int, ids: list[int]) -> ChunkRows:
    """Every chunk is one shared token."""
    own = Rows(torch.arange(n), torch.arange(n), torch.tensor(ids), torch.full((n,), FIRST))
    return ChunkRows(
        own,
        torch.arange(n),
        torch.tensor(ids),
        torch.zeros(n),
        NOTHING,
        torch.zeros(n, dtype=torch.bool),
    )


def random_rows(n_chunks: int, v: int, w: int, n_events: int, seed: int) -> ChunkRows:
    """Chunks of every kind: rows before them, further tokens, what the teacher carries over."""
    g = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(0, n, (1,), generator=g))

    table, observed, carry = [], [], []
    for c in range(n_chunks):
        before = [[BEFORE, INSIDE][below(2)] for _ in range(below(4))]
        kinds = [*before, FIRST, *([REST] * below(3))]
        observed.append(kinds[-1] == REST or below(2) == 0)
        table += [(c, below(v), kind) for kind in kinds]
        if below(2):
            carry += [(c, event, 0.3 / (1 + event)) for event in {below(n_events), n_events}]
    return ChunkRows(
        Rows(torch.arange(len(table)), *torch.tensor(table).T.contiguous()),
        torch.arange(n_chunks),
        torch.tensor([below(w) for _ in range(n_chunks)]),
        -3 * torch.rand(n_chunks, generator=g) - 0.1,
        Carry(
            torch.tensor([row[0] for row in carry], dtype=torch.int64),
            torch.tensor([row[1] for row in carry], dtype=torch.int64),
            torch.tensor([row[2] for row in carry]),
        ),
        torch.tensor(observed),
    )


STUDENT = words("hel", "hello", "help", "xyz", "h", ".", ".")
TEACHER = words("hel", "lo", "h", ".", "heliu")
PAIR = match(STUDENT, TEACHER)
STUDENT_OVER = words("h", "e", "l", "hel", "hell", "x", ".")  # tokens over whole chunks
TEACHER_OVER = words("h", "e", "l", "x", ".")
SELF = match(
    Vocabulary((b".", b".", b"a", b"", b""), ("text", "text", "text", "end", "special")),
    Vocabulary((b".", b".", b"a", b"", b""), ("text", "text", "text", "end", "end")),
    stops=[4],
)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_one_tokenizer_is_gkd_in_value_and_gradient(beta: float) -> None:
    """Duplicates (ids 0 and 1) and two stops (3 and 4) included."""
    g = torch.Generator().manual_seed(1)
    student_NV = (3 * torch.randn(7, 5, generator=g)).requires_grad_()
    teacher_NW = 3 * torch.randn(7, 5, generator=g)
    rows = one_token_rows(7, [0, 1, 2, 3, 4, 0, 1])
    ours = chunk_losses(student_NV, teacher_NW, rows=rows, events=SELF, beta=beta)
    (ours_grad,) = torch.autograd.grad(ours.sum(), student_NV)
    theirs = gkd(student_NV, teacher_NW, beta)
    (theirs_grad,) = torch.autograd.grad(theirs.sum(), student_NV)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours_grad, theirs_grad, atol=1e-6, rtol=1e-5)


def test_half_precision_is_compared_in_float32() -> None:
    s_NX, t_NX = torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([[0.4, 0.6, 0.0]])
    for beta in BETAS:
        found = divergence(s_NX.half(), t_NX.half(), beta=beta)
        torch.testing.assert_close(found, divergence(s_NX, t_NX, beta=beta), atol=1e-3, rtol=0)


def test_no_chunk_is_no_loss() -> None:
    rows, logits_NV = one_token_rows(0, []), torch.zeros(2, 5)
    with pytest.raises(ValueError, match="expected at least one chunk, got none; leave the step"):
        chunk_losses(logits_NV, logits_NV, rows=rows, events=SELF, beta=0.0)
    with pytest.raises(ValueError, match="expected at least one chunk, got none; leave the step"):
        gold_loss(
            logits_NV, logits_NV, student_head=None, teacher_head=None, rows=rows, events=SELF,
            beta=0.0, weight=1.0,
        )  # fmt: skip


def test_padded_rows_do_not_count() -> None:
    """A vocabulary padded with -inf rows of no token gives the same value and gradient."""
    texts, roles = (b".", b"a", b""), ("text", "text", "end")
    small = match(Vocabulary(texts, roles), Vocabulary(texts, roles))
    wide = match(
        Vocabulary((*texts, b"", b""), (*roles, "none", "none")),
        Vocabulary((*texts, b"", b""), (*roles, "none", "none")),
    )
    g = torch.Generator().manual_seed(2)
    student_NV, teacher_NW = torch.randn(4, 3, generator=g), torch.randn(4, 3, generator=g)
    results = []
    for events, n_pad in ((small, 0), (wide, 2)):
        leaf_NV = student_NV.clone().requires_grad_()
        padded_NV = torch.nn.functional.pad(leaf_NV, (0, n_pad), value=-torch.inf)
        teacher_padded_NW = torch.nn.functional.pad(teacher_NW, (0, n_pad), value=-torch.inf)
        loss_C = chunk_losses(
            padded_NV, teacher_padded_NW, rows=one_token_rows(4, [0, 1, 2, 0]),
            events=events, beta=0.5,
        )  # fmt: skip
        loss_C.sum().backward()
        results.append((loss_C.detach(), leaf_NV.grad))
    torch.testing.assert_close(results[0], results[1])
    assert results[0][1] is not None and results[0][1].isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
def test_student_equal_to_teacher_gives_nothing(beta: float) -> None:
    """Loss 0 and gradient 0 for every beta, one tokenizer."""
    logits_NV = 4 * torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    leaf_NV = logits_NV.clone().requires_grad_()
    loss_C = chunk_losses(
        leaf_NV, logits_NV, rows=one_token_rows(6, [0, 1, 2, 3, 4, 2]),
        events=SELF, beta=beta,
    )  # fmt: skip
    loss_C.sum().backward()
    assert loss_C.abs().max() < 1e-17
    assert leaf_NV.grad is not None
    assert leaf_NV.grad.abs().max() < 1e-7


@pytest.mark.parametrize("beta", BETAS)
def test_models_that_agree_on_texts_give_nothing_across_tokenizers(beta: float) -> None:
    """The student's `hello` and the teacher's `hel` are the same statement."""
    events = match(words("a", "hello", pieces={}), words("a", "hel", "lo"))
    assert events.n_events == 2
    shared = match(words("a", "hel", "hello"), words("a", "hel", "lo"))
    student_NV = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    teacher_NW = torch.tensor([[0.5, 0.4, 1e-30, 0.1]]).log()
    rows = one_token_rows(1, [0])
    loss_C = chunk_losses(student_NV, teacher_NW, rows=rows, events=shared, beta=beta)
    assert loss_C.item() == pytest.approx(0, abs=1e-6)


def test_helping_cannot_hide_behind_hel() -> None:
    """design: the observed chunk is an event of its own. Student: helping .5, hel .5; teacher: hel."""
    events = match(words("hel", "helping"), words("hel", "p", "ing"))
    student_NV = torch.tensor([[0.5, 0.5, 1e-30]]).log()
    teacher_NW = torch.tensor([[1.0, 1e-30, 1e-30, 1e-30]]).log()
    own = Rows(*torch.tensor([[0], [0], [1], [FIRST]]))
    teacher_logp_C = torch.tensor([math.log(0.01)])

    def loss(*, observed: bool) -> float:
        rows = ChunkRows(
            own,
            torch.tensor([0]),
            torch.tensor([0]),
            teacher_logp_C,
            NOTHING,
            torch.tensor([observed]),
        )
        return chunk_losses(student_NV, teacher_NW, rows=rows, events=events, beta=1.0).item()

    assert loss(observed=False) == pytest.approx(0, abs=1e-6)
    expected = 0.5 * math.log(0.5 / 0.99) + 0.5 * math.log(0.5 / 0.01)
    assert expected == pytest.approx(1.6144, abs=1e-4)
    assert loss(observed=True) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("swapped", [False, True])
def test_one_law_of_texts_spelled_in_two_ways_costs_nothing(beta: float, swapped: bool) -> None:
    """design: hello .9, hel p .1 on one side; hel, then lo .9, p .1 on the other.

    After hel the first is certain of p, but hello speaks for lo: both say lo .9, p .1.
    """
    long, short = words("hello", "hel", "lo", "p"), words("hel", "lo", "p")
    before_long = torch.tensor([0.9, 0.1, 0, 0, 0]).log()
    after_long = torch.tensor([0, 0, 0, 1.0, 0]).log()
    after_short = torch.tensor([0, 0.9, 0.1, 0]).log()
    p_event = 2
    if swapped:  # the student has hello
        events = match(long, short)
        own = Rows(*torch.tensor([[0, 1], [0, 0], [1, 3], [BEFORE, FIRST]]))
        student_NV, teacher_CW, carry = torch.stack([before_long, after_long]), after_short, NOTHING
    else:
        events = match(short, long)
        lo = torch.tensor([events.event_bytes.index(b"lo")])
        own = Rows(*torch.tensor([[0], [0], [2], [FIRST]]))
        carry = Carry(torch.tensor([0]), lo, torch.tensor([0.9]))
        student_NV, teacher_CW = after_short[None], after_long
    assert events.event_bytes[p_event] == b"p"
    rows = ChunkRows(
        own, torch.tensor([0]), torch.tensor([3]), torch.zeros(1), carry, torch.tensor([False])
    )
    loss_C = chunk_losses(student_NV, teacher_CW[None], rows=rows, events=events, beta=beta)
    assert loss_C.item() == pytest.approx(0, abs=1e-6)
    without = ChunkRows(
        Rows(torch.tensor([0]), own.chunk_N[-1:], own.ids_N[-1:], own.kind_N[-1:]),
        rows.teacher_place_C, rows.teacher_id_C, rows.teacher_logp_C, NOTHING, rows.observed_C,
    )  # fmt: skip
    blind_C = chunk_losses(
        student_NV[-1:], teacher_CW[None], rows=without, events=events, beta=beta
    )
    assert blind_C.item() > 1


def slow_path(
    prob: list[list[float]],
    side: SlowSide,
    path: list[tuple[int, int, int]],
    starts: int | None = None,
) -> tuple[float, dict[int, float]]:
    """Probability of some tokens in a row, and of single tokens that begin like the last ones and go on.

    These have to be the same event at each shared boundary on the way, and to begin at one of the
    first `starts` places.
    """
    longer: dict[int, float] = {}
    for k in range(len(path) if starts is None else starts):
        texts = [side.texts[i] for _, i, _ in path[k:]]
        lead = math.prod(prob[n][i] for n, i, _ in path[:k])
        for text, p in zip(side.texts, prob[path[k][0]], strict=True):
            joined = b"".join(texts)
            if not all(texts) or not text.startswith(joined) or text == joined:
                continue
            told_apart = any(
                side.event_of(text[len(b"".join(texts[:j])) :]) != side.event_of(texts[j])
                for j, (_, _, kind) in enumerate(path[k:])
                if kind in (BEFORE, FIRST)
            )
            if not told_apart:
                rest = side.event_of(text[len(joined) :])
                longer[rest] = longer.get(rest, 0.0) + p * lead
    return math.prod(prob[n][i] for n, i, _ in path), longer


def slow_losses(
    student_NV: Tensor,
    teacher_CW: Tensor,
    rows: ChunkRows,
    beta: float,
    sides: tuple[Vocabulary, Vocabulary],
) -> list[float]:
    """Chunk by chunk in plain Python, from the spellings."""
    names = match(*sides).event_bytes[:-1]
    ours, theirs = (SlowSide(one.token_bytes, one.roles, names, {}) for one in sides)
    student = student_NV.double().softmax(-1).tolist()
    teacher = teacher_CW.double().softmax(-1).tolist()
    table = torch.stack([rows.student.chunk_N, rows.student.ids_N, rows.student.kind_N], 1).tolist()
    losses = []
    for c in range(len(teacher)):
        own = [(n, i, kind) for n, (chunk, i, kind) in enumerate(table) if chunk == c]
        before, group = (
            [row for row in own if (row[2] in (BEFORE, INSIDE)) is is_before]
            for is_before in (True, False)
        )
        prob, carried = slow_path(student, ours, before)
        known = prob + sum(carried.values())
        stay, carried = prob / known, {e: m / known for e, m in carried.items()}
        first, observed = group[0][:2], bool(rows.observed_C[c])
        prob, longer = slow_path(student, ours, group if observed else group[:1])
        chunk_prob = stay * (prob + sum(longer.values()))
        if before and observed:  # tokens that begin before the chunk and reach over its end
            beyond = slow_path(student, ours, before + group, starts=len(before))[1]
            chunk_prob += sum(beyond.values()) / known
        mine = law_of(student[first[0]], ours, carried, stay)
        here = (rows.teacher_carry.chunk_K == c).nonzero()[:, 0].tolist()
        shares = {
            int(rows.teacher_carry.event_K[k]): float(rows.teacher_carry.mass_K[k]) for k in here
        }
        yours = law_of(teacher[c], theirs, shares, 1 - sum(shares.values()))
        source = (ours.events[first[1]], theirs.events[int(rows.teacher_id_C[c])])
        moved = (chunk_prob, math.exp(float(rows.teacher_logp_C[c])))
        losses.append(loss_of(mine, yours, source if observed else None, moved, beta))
    return losses


@pytest.mark.parametrize(
    ("sides", "n_chunks", "v"),
    [((STUDENT, TEACHER), 4, 8), ((STUDENT_OVER, TEACHER_OVER), 40, 3)],
    ids=["every token", "many over whole chunks"],
)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 1.0]))
def test_chunk_losses_equal_the_slow_version(
    sides: tuple[Vocabulary, Vocabulary], n_chunks: int, v: int, seed: int, beta: float
) -> None:
    """The first `v` tokens are taken. `hel` is `h`, and then a whole chunk `e`, and more."""
    g, events = torch.Generator().manual_seed(seed), match(*sides)
    rows = random_rows(n_chunks, v, 6, events.n_events, seed=seed)
    student_NV = torch.randn(len(rows.student.chunk_N), 8, generator=g)
    teacher_CW = torch.randn(n_chunks, 6, generator=g)
    got_C = chunk_losses(student_NV, teacher_CW, rows=rows, events=events, beta=beta)
    want_C = torch.tensor(slow_losses(student_NV, teacher_CW, rows, beta, sides))
    torch.testing.assert_close(got_C, want_C, atol=2e-5, rtol=2e-5)


def test_what_is_written_before_the_end_is_no_longer_token() -> None:
    """Half a character, and then an end of turn or a marker: whole characters are another path."""
    half = Vocabulary((b"\xc3", b"\xc3\xa9", b"a", b""), ("text", "text", "text", "end"))
    side = match(half, Vocabulary((b"\xc3", b"a", b""), ("text", "text", "end"))).student
    assert [x.tolist() for x in side.over([[(0, False)]])][:2] == [[0], [1]]
    assert [x.tolist() for x in side.over([[(0, False), (3, True)]])] == [[], [], []]
    assert not side.reaches_over([(0, False), (3, True)])


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_another_beta_is_refused_by_every_entrance(beta: float) -> None:
    rows, logits = one_token_rows(1, [0]), torch.zeros(1, 8)
    prob = torch.tensor([[0.5, 0.5]])
    with pytest.raises(ValueError, match=r"expected beta between 0 .* got"):
        divergence(prob, prob, beta=beta)
    for entrance, more in ((chunk_losses, {}), (gold_loss, {"weight": 1.0}), (look, {})):
        heads = {} if entrance is chunk_losses else {"student_head": None, "teacher_head": None}
        with pytest.raises(ValueError, match=r"expected beta between 0 .* got"):
            entrance(logits, torch.zeros(1, 6), rows=rows, events=PAIR, beta=beta, **heads, **more)


@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 3, 4)), ((3,), (3,)), ((2, 3), (2, 4))])
def test_other_tables_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"expected tables \[N, X\], got torch.Size"):
        divergence(*(torch.ones(shape) for shape in shapes), beta=0.5)


def test_what_has_no_event_costs_its_log() -> None:
    events = match(words("a", "zz"), words("a", "b"))
    student_NV = torch.tensor([[0.5, 0.3, 0.2]]).log()
    teacher_NW = torch.tensor([[0.5, 0.3, 0.2]]).log()
    loss = chunk_losses(
        student_NV,
        teacher_NW,
        rows=one_token_rows(1, [0]),
        events=events,
        beta=1.0,
    )
    assert loss.item() == pytest.approx(-math.log(0.7), abs=1e-6)


def test_the_hidden_mass_has_a_gradient_up_to_1() -> None:
    events = match(words("a", "zz"), words("a", "b"))
    for other in (0.4, 0.6, 0.9999):
        logits_NV = torch.tensor([[(1 - other) / 2, other, (1 - other) / 2]]).log().requires_grad_()
        chunk_losses(
            logits_NV, torch.tensor([[0.5, 1e-30, 0.5]]).log(), rows=one_token_rows(1, [0]),
            events=events, beta=1.0,
        ).sum().backward()  # fmt: skip
        assert logits_NV.grad is not None
        assert logits_NV.grad[0, 1].item() == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_blockwise_equals_dense_in_value_and_gradient(block: int, softcap: float | None) -> None:
    g = torch.Generator().manual_seed(4)
    rows = random_rows(7, 8, 6, PAIR.n_events, seed=5)
    n = len(rows.student.chunk_N)
    hidden_ND = torch.randn(n, 5, generator=g).double().requires_grad_()
    weight_VD = torch.randn(8, 5, generator=g).double().requires_grad_()
    teacher_hidden_CK = torch.randn(7, 3, generator=g).double()
    teacher_head = Head(torch.randn(6, 3, generator=g).double(), None)
    dense_C = chunk_losses(
        Head(weight_VD, softcap).logits(hidden_ND),
        teacher_head.logits(teacher_hidden_CK),
        rows=rows,
        events=PAIR,
        beta=0.5,
    )
    weight = 0.25
    dense = torch.autograd.grad(3 * weight * dense_C.sum(), [hidden_ND, weight_VD])
    ours = gold_loss(
        hidden_ND,
        teacher_hidden_CK,
        student_head=Head(weight_VD, softcap),
        teacher_head=teacher_head,
        rows=rows,
        events=PAIR,
        beta=0.5,
        weight=weight,
        block=block,
    )
    blockwise = torch.autograd.grad(3 * ours.total, [hidden_ND, weight_VD])
    torch.testing.assert_close(ours.loss_C, dense_C.detach())
    torch.testing.assert_close(ours.total.detach(), weight * dense_C.sum().detach())
    for got, want in zip(blockwise, dense, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def random_losses(events: Events, student_NV: Tensor, teacher_CW: Tensor, beta: float) -> Tensor:
    rows = random_rows(5, student_NV.shape[1], teacher_CW.shape[1], events.n_events, seed=6)
    return chunk_losses(student_NV, teacher_CW, rows=rows, events=events, beta=beta)


@given(st.integers(0, 2**32 - 1), st.sampled_from(BETAS), st.sampled_from([0.1, 1.0, 30.0]))
def test_never_negative_and_always_finite(seed: int, beta: float, scale: float) -> None:
    g = torch.Generator().manual_seed(seed)
    student_NV = scale * torch.randn(20, 8, generator=g)
    teacher_CW = scale * torch.randn(5, 6, generator=g)
    student_NV[0, 1:] = -torch.inf  # one-hot
    student_NV[1] *= 1e4
    student_NV.requires_grad_()
    loss_C = random_losses(PAIR, student_NV, teacher_CW, beta)
    loss_C.sum().backward()
    assert loss_C.min() >= -1e-6
    assert loss_C.isfinite().all()
    assert student_NV.grad is not None and student_NV.grad.isfinite().all()


PROBS = st.lists(st.floats(1e-6, 1.0), min_size=4, max_size=4)


@given(PROBS, PROBS, st.sampled_from(BETAS))
def test_divergence_equals_the_plain_sum(s: list[float], t: list[float], beta: float) -> None:
    student, teacher = ([x / sum(p) for x in p] for p in (s, t))
    ours = divergence(
        torch.tensor([student], dtype=torch.float64),
        torch.tensor([teacher], dtype=torch.float64),
        beta=beta,
    ).item()
    assert ours == pytest.approx(divergence_of(student, teacher, beta), abs=1e-9)


@given(PROBS, PROBS, st.sampled_from(BETAS))
def test_merging_events_never_raises_it(s: list[float], t: list[float], beta: float) -> None:
    student, teacher = (torch.tensor([p], dtype=torch.float64) / sum(p) for p in (s, t))
    merged = [torch.cat([p[:, :1] + p[:, 1:2], p[:, 2:]], dim=1) for p in (student, teacher)]
    assert (
        divergence(merged[0], merged[1], beta=beta)
        <= divergence(student, teacher, beta=beta) + 1e-12
    )


@given(PROBS, PROBS)
def test_continuous_in_beta(s: list[float], t: list[float]) -> None:
    student, teacher = (torch.tensor([p], dtype=torch.float64) / sum(p) for p in (s, t))
    for inner, end in ((0.0011, 0.0), (0.9989, 1.0)):
        at_end = divergence(student, teacher, beta=end).item()
        near = divergence(student, teacher, beta=inner).item()
        assert near == pytest.approx(at_end, rel=0.5, abs=1e-6)


def test_the_ends_are_the_two_kls_with_the_names_of_the_docs() -> None:
    student, teacher = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.4, 0.6]])
    forward = 0.4 * math.log(0.4 / 0.9) + 0.6 * math.log(0.6 / 0.1)
    reverse = 0.9 * math.log(0.9 / 0.4) + 0.1 * math.log(0.1 / 0.6)
    assert divergence(student, teacher, beta=0).item() == pytest.approx(forward, abs=1e-6)
    assert divergence(student, teacher, beta=1).item() == pytest.approx(reverse, abs=1e-6)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_beta_out_of_range_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="beta between 0"):
        divergence(torch.ones(1, 1), torch.ones(1, 1), beta=beta)


def test_low_precision_is_not_worse_than_the_input_rounding() -> None:
    g = torch.Generator().manual_seed(8)
    student_NV, teacher_CW = torch.randn(20, 8, generator=g), torch.randn(5, 6, generator=g)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = random_losses(PAIR, student_NV.to(dtype), teacher_CW.to(dtype), 0.5)
        exact = random_losses(
            PAIR, student_NV.to(dtype).double(), teacher_CW.to(dtype).double(), 0.5
        )
        torch.testing.assert_close(rounded, exact.float(), atol=1e-5, rtol=1e-5)
