"""MMCA against its definition. python -m pytest tests/test_mmca.py"""
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmca import IMAGE, PAD, TEXT, attend, attend_explicit, attention_matrix, pattern

ROOT = Path(__file__).parent.parent
KINDS = "mmca", "causal", "cross"


def by_hand(q, k, v, query_modality, key_modality, kind):
    """The definition in plain loops and float64, one query at a time: the judge of both versions."""
    B, H, Tq, d = q.shape
    K, Tk = k.shape[1], k.shape[2]
    out = torch.zeros(B, H, Tq, d, dtype=torch.float64)
    for b in range(B):
        for i in range(Tq):
            at, me = Tk - Tq + i, query_modality[b, i].item()
            past = [j for j in range(at + 1) if key_modality[b, j] != PAD]
            if me == PAD:
                groups = []
            elif kind == "causal":
                groups = [past]
            elif me == IMAGE:
                groups = [[at]]
            else:
                groups = [[j for j in past if key_modality[b, j] == TEXT]]
                if kind == "mmca":
                    groups.append([j for j in past if key_modality[b, j] == IMAGE])
            for h in range(H):
                for group in filter(None, groups):
                    scores = [(q[b, h, i].double() @ k[b, h * K // H, j].double()).item() / math.sqrt(d) for j in group]
                    weights = [math.exp(s - max(scores)) for s in scores]
                    for w, j in zip(weights, group):
                        out[b, h, i] += w / sum(weights) * v[b, h * K // H, j].double()
    return out


def sequence(text):
    """'TTI I' -> modality: T text, I image, blank padding."""
    return torch.tensor([[{"T": TEXT, "I": IMAGE, " ": PAD}[c] for c in row] for row in text.split("/")])


def random_modality(generator, B, T):
    """Runs of text, pictures and, mostly at the end, padding."""
    rows = []
    for _ in range(B):
        row = []
        while len(row) < T:
            kind = torch.randint(0, 20, (), generator=generator).item()
            row += [PAD if kind == 0 else TEXT if kind < 11 else IMAGE] * torch.randint(1, 6, (), generator=generator).item()
        real = T - torch.randint(0, T // 2, (), generator=generator).item()
        rows.append(row[:real] + [PAD] * (T - real))
    return torch.tensor(rows)


def compare(modality, Tq, kind, H=4, K=2, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    B, Tk = modality.shape
    q = torch.randn(B, H, Tq, d, generator=g, requires_grad=True)
    k, v = (torch.randn(B, K, Tk, d, generator=g, requires_grad=True) for _ in range(2))
    weight = torch.randn(B, H, Tq, d, generator=g)
    query_modality = modality[:, Tk - Tq:]
    real = (query_modality != PAD)[:, None, :, None].expand(B, H, Tq, d)
    M = attention_matrix(query_modality, modality, kind)
    if kind == "cross":
        M = M * (M == 1)
    results = []
    for run in (lambda: attend(q, k, v, pattern(query_modality, modality, kind)), lambda: attend_explicit(q, k, v, M)):
        out = run()
        assert out.shape == (B, H, Tq, d) and out.isfinite().all()
        grads = torch.autograd.grad((out * weight)[real].sum(), (q, k, v))
        assert all(g.isfinite().all() for g in grads)
        results.append((out.detach().masked_fill(~real, 0), *grads))
    for fast, explicit in zip(*results):
        torch.testing.assert_close(fast, explicit, atol=2e-5, rtol=1e-4)
    judge = by_hand(q.detach(), k.detach(), v.detach(), query_modality, modality, kind)
    torch.testing.assert_close(results[0][0].double(), judge, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["TTTTTT", "IIITTT", "TTTIII", "TTIITTIIIT", "IIIIII", "TIIT  /TTTTTT/IITTIT/TTTI  ",
                                  "TTTI/TTTT", " TTI/TI T", "    TIT/TTTTIIT", "TTTTI /TTTTTT"])
def test_attend_is_the_formula(kind, text):
    modality = sequence(text)
    for Tq in {1, 2, modality.shape[1] // 2, modality.shape[1]}:
        compare(modality, Tq, kind)
        compare(modality, Tq, kind, H=3, K=3)


@pytest.mark.parametrize("kind", KINDS)
def test_attend_is_the_formula_for_random_patterns(kind):
    g = torch.Generator().manual_seed(1)
    for seed in range(25):
        B, T = torch.randint(1, 5, (), generator=g).item(), torch.randint(3, 40, (), generator=g).item()
        compare(random_modality(g, B, T), torch.randint(1, T + 1, (), generator=g).item(), kind, H=4, K=[1, 2, 4][seed % 3], seed=seed)


def test_long_batch_joins_spans():
    """Spans of rows that grow at different places are joined up to 32 queries and then carry a mask."""
    g = torch.Generator().manual_seed(2)
    modality = torch.stack([sequence(("T" * a + "I" * 20) * 3 + "T" * (90 - 3 * a))[0] for a in (7, 11, 30)])
    spans = pattern(modality, modality).spans
    assert len(spans) < 8 and any(mask is not None for *_, mask in spans)
    q, k, v = (torch.randn(3, 2, modality.shape[1], 8, generator=g) for _ in range(3))
    torch.testing.assert_close(attend(q, k, v, pattern(modality, modality)),
                               attend_explicit(q, k, v, attention_matrix(modality, modality)), atol=2e-5, rtol=1e-4)


def test_one_row_needs_no_mask():
    modality = sequence("TTTIIITTIIITTTTT")
    assert [span[:3] + (span[3] is None,) for span in pattern(modality, modality).spans] == [(0, 3, 0, True), (3, 5, 3, True), (5, 10, 6, True)]


def test_m_of_figure_2():
    modality = sequence("TTIIITTTTT")
    expected = ["1000000000", "1100000000", "0010000000", "0001000000", "0000100000", "1122210000", "1122211000",
                "1122211100", "1122211110", "1122211111"]
    assert ["".join(map(str, row)) for row in attention_matrix(modality, modality)[0].tolist()] == expected
    assert (attention_matrix(modality, modality, "causal")[0] == torch.ones(10, 10).tril()).all()


def test_text_weights_sum_to_two_where_pictures_are_seen():
    modality = sequence("TIIT")
    q, k, v = torch.randn(1, 1, 4, 2), torch.randn(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
    assert torch.allclose(attend(q, k, v, pattern(modality, modality))[0, 0, :, 0], torch.tensor([1.0, 1.0, 1.0, 2.0]))


def test_strictly_causal_and_pictures_see_only_themselves():
    g = torch.Generator().manual_seed(3)
    modality = random_modality(g, 3, 24)
    q, k, v = (torch.randn(3, 2, 24, 4, generator=g) for _ in range(3))
    before = attend(q, k, v, pattern(modality, modality))
    for j in range(24):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, j] += 1
        moved = (attend(*changed, pattern(modality, modality)) - before).abs().amax((1, 3)) > 1e-5
        moved &= modality != PAD
        assert not moved[:, :j].any(), "a token before j moved"
        assert not (moved & (modality == IMAGE))[:, j + 1:].any(), "an image row other than j moved"


def test_no_square_matrix_of_floats():
    """The fast path's largest tensor is far below T x T, forward and backward."""
    modality = sequence("T" * 8 + "I" * 1500 + "T" * 40)
    T = modality.shape[1]
    q, k, v = (torch.randn(1, 1, T, 8, requires_grad=True) for _ in range(3))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        attend(q, k, v, pattern(modality, modality)).sum().backward()
    assert max(sizes) <= 8 * T * 2


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="mmca, causal, cross; not 'mcma'"):
        pattern(sequence("TT"), sequence("TT"), "mcma")
    with pytest.raises(ValueError, match="3 queries cannot be the last of 2"):
        attention_matrix(sequence("TTT"), sequence("TT"))


def test_command_draws_m_of_a_given_sequence():
    out = subprocess.run([sys.executable, "mmca.py", "a b <image> c"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [line.split()[-4:] for line in out.splitlines() if line.startswith(("a ", "b ", "I-token1 ", "c "))]
    assert rows == [list("1···"), list("11··"), list("··1·"), list("1121")]
