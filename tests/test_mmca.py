"""MMCA against its definition. python -m pytest tests/test_mmca.py"""
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import sequence as whole, tiny_model

import mmca
from mmca import IMAGE, PAD, TEXT, attend, attend_explicit, attention_matrix, make_pattern, softmax
from model import KVCache, LlamaConfig, LlamaModel

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


def by_position(function, who, x):  # `who.arrange` or `who.restore` of x (B, H, T, d)
    return function(x.transpose(1, 2)).transpose(1, 2)


def cached(k, v, modality, kind, Tq):
    """A KVCache that has read all but the last Tq positions, in two rounds -> its part for the pass of those"""
    stop = modality.shape[1] - Tq
    cache = KVCache(LlamaModel(LlamaConfig(1, 1, 1, k.shape[1], k.shape[1], k.shape[3], 1)).to(k.dtype), modality.shape[1])
    for start, stop in ((0, stop // 2), (stop // 2, stop)):
        part = modality[:, start:stop]
        who = make_pattern(part, cache.append(part), kind)
        keys, values = (by_position(who.arrange, who, x[:, :, start:stop]) for x in (k, v))
        layer = cache.layer(0, who)
        layer.add_words(keys[:, :, :who.num_words], values[:, :, :who.num_words])
        layer.add_images(keys[:, :, who.num_words:], values[:, :, who.num_words:])
        cache.advance(who)
    part = modality[:, stop:]
    return cache.layer(0, make_pattern(part, cache.append(part), kind))


def fast(q, k, v, modality, kind, fill=1):
    """`attend` for queries (B, H, Tq, d) that are the last of the Tk positions, all in reading order. What was before them comes from a cache"""
    Tq, Tk = q.shape[2], k.shape[2]
    who = make_pattern(modality[:, Tk - Tq:], modality, kind, fill)
    layer = cached(k, v, modality, kind, Tq) if Tq < Tk else None
    q, k, v = (by_position(who.arrange, who, x[:, :, x.shape[2] - Tq:]) for x in (q, k, v))
    return by_position(who.restore, who, attend(q[:, :, :who.num_words], k, v, who, layer))


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
    for out in (fast(q, k, v, modality, kind), attend_explicit(q, k, v, M)):
        assert out.shape == (B, H, Tq, d) and out.isfinite().all()
        grads = torch.autograd.grad((out * weight)[real].sum(), (q, k, v))
        assert all(g.isfinite().all() for g in grads)
        results.append((out.detach().masked_fill(~real, 0), *grads))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    judge = by_hand(q.detach(), k.detach(), v.detach(), query_modality, modality, kind)
    torch.testing.assert_close(results[0][0].double(), judge, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["TTTTTT", "IIITTT", "TTTIII", "TTIITTIIIT", "IIIIII", "TIIT  /TTTTTT/IITTIT/TTTI  ",
                                  "TTTI/TTTT", " TTI/TI T", "    TIT/TTTTIIT", "TTTTI /TTTTTT"])
def test_attend_is_the_formula(kind, text):
    """No picture, picture first, picture last, several, padding, grouped heads; queries that continue what was read before"""
    modality = sequence(text)
    one = len(text.split("/")) == 1 and " " not in text  # a cache holds one conversation
    for Tq in {1, 2, len(text) // 2, len(text)} if one else {modality.shape[1]}:
        compare(modality, Tq, kind)
        compare(modality, Tq, kind, H=3, K=3)


@pytest.mark.parametrize("kind", KINDS)
def test_attend_is_the_formula_for_random_patterns(kind):
    g = torch.Generator().manual_seed(1)
    for seed in range(12):
        B, T = torch.randint(1, 5, (), generator=g).item(), torch.randint(3, 40, (), generator=g).item()
        modality, Tq = random_modality(g, B, T), torch.randint(1, T + 1, (), generator=g).item()
        compare(modality, T, kind, H=4, K=[1, 2, 4][seed % 3], seed=seed)
        compare(modality[:1].masked_fill(modality[:1] == PAD, TEXT), Tq, kind, H=4, K=[1, 2, 4][seed % 3], seed=seed)


def test_words_come_first_and_what_is_arranged_can_be_restored():
    modality, x = sequence("TITTI /IIT TT/TTTTTT"), torch.arange(18).view(3, 6)
    who = make_pattern(modality, modality)
    assert who.num_words == 6 and who.positions[:2, :6].tolist() == [[0, 2, 3, 6, 6, 6], [2, 4, 5, 6, 6, 6]]
    assert who.positions[:, 6:].tolist() == [[4, 1], [1, 0], [6, 6]], "the newest first; position 6 fills up"
    assert who.arrange(x)[0].tolist() == [0, 2, 3, 5, 5, 5, 4, 1]
    assert torch.equal(who.restore(who.arrange(x)), x.masked_fill(modality == PAD, 0))
    causal = make_pattern(modality, modality, "causal")
    assert causal.num_words == 6 and causal.positions.shape == (3, 6) and torch.equal(causal.arrange(x)[2], x[2])


def test_a_rule_of_your_own_is_an_edit_of_the_mask():
    """Here: a word sees the image tokens of the last four positions alone"""
    modality = sequence("TIITTIT/ITTITTT")
    q, k, v = (torch.randn(2, 2, 7, 8) for _ in range(3))
    who, M, position = make_pattern(modality, modality), attention_matrix(modality, modality), torch.arange(7)
    query, key = who.positions[:, None, :who.num_words, None], who.positions[:, None, None, who.num_words:]
    edited = replace(who, image_mask=(key < query) & (query - key <= 4))
    ours = edited.restore(attend(*(by_position(who.arrange, who, x)[:, :, :rows] for x, rows in ((q, who.num_words), (k, None), (v, None))), edited).transpose(1, 2))
    theirs = attend_explicit(q, k, v, M.masked_fill((M == 2) & (position[:, None] - position > 4), 0))
    torch.testing.assert_close(ours.transpose(1, 2), theirs)


def test_a_rule_by_which_image_tokens_see_more_is_not_read_once(monkeypatch):
    """Chat asks `attention_matrix`, not the name: keys and values of a picture would be those of one place in one text"""
    def earlier_text(query, key, kind="mmca"):
        return attention_matrix(query, key, kind) | attention_matrix(query, key, "causal") * (query == IMAGE)[:, :, None] * (key == TEXT)[:, None]
    (ids, modality), logits = whole("TTITTIT"), []
    for rule, kept in ((attention_matrix, KVCache), (earlier_text, torch.Tensor)):
        model = monkeypatch.setattr(mmca, "attention_matrix", rule) or tiny_model()
        pictures, cache = [model.keep_picture(picture) for picture in torch.ones(2, 17, 64).tril()], KVCache(model.language_model.model, ids.shape[1])
        assert {type(picture) for picture in pictures} == {kept}
        logits += [model.extend(ids[:, :20], modality[:, :20], cache, pictures[:1]), model.extend(ids[:, 20:], modality[:, 20:], cache, pictures[1:])]
    torch.testing.assert_close(logits[2:], logits[:2])  # as before: what is computed is said by `attend`


def test_rows_that_fill_up_change_nothing():
    """A GPU gets multiples of 8"""
    modality = sequence("TIIITTTIIT/TTTTTTTIT /IT        ")
    q, k, v = (torch.randn(3, 2, 10, 8) for _ in range(3))
    assert [make_pattern(modality, modality, "mmca", fill).image_mask.shape[3] for fill in (1, 8)] == [5, 8]
    torch.testing.assert_close(fast(q, k, v, modality, "mmca", 8), fast(q, k, v, modality, "mmca"))


def test_softmax_gives_the_weights_of_the_second_term():
    """For /look: rows sum to one over the image tokens before them, or to zero where there are none"""
    g, modality = torch.Generator().manual_seed(4), sequence("TIITTIT")
    q, k = torch.randn(1, 4, 7, 8, generator=g), torch.randn(1, 2, 7, 8, generator=g)
    who = make_pattern(modality, modality)
    q_words, images = by_position(who.arrange, who, q)[:, :, :who.num_words], by_position(who.arrange, who, k)[:, :, who.num_words:]
    weights = softmax(q_words, images, who.image_mask)
    expected = softmax(q, k, (attention_matrix(modality, modality) == 2)[:, None])
    torch.testing.assert_close(weights.flip(3), expected[:, :, modality[0] == TEXT][..., modality[0] == IMAGE])
    assert torch.allclose(weights.sum(3)[0, 0], torch.tensor([0.0, 1, 1, 1]))


def test_m_of_figure_2_and_of_the_example():
    modality = sequence("TTIIITTTTT")
    expected = ["1000000000", "1100000000", "0010000000", "0001000000", "0000100000", "1122210000", "1122211000",
                "1122211100", "1122211110", "1122211111"]
    assert ["".join(map(str, row)) for row in attention_matrix(modality, modality)[0].tolist()] == expected
    assert (attention_matrix(modality, modality, "causal")[0] == torch.ones(10, 10).tril()).all()
    modality, lines = sequence("TTIIT"), [line for line in mmca.__doc__.replace("·", "0").splitlines() if " 0 " in line]
    M, who = attention_matrix(modality, modality)[0], make_pattern(modality, modality)
    assert [[int(m) for m in line.split()[2:17]] for line in lines if line[4].isdigit()] == torch.cat([M, M == 1, M == 2], 1).tolist()
    assert who.positions.tolist() == [[0, 1, 4, 3, 2]] and "positions 0 1 4, 3 2" in lines[0]
    assert [line[-3:] for line in lines if "query " in line] == ["0 0", "0 0", "1 1"] and who.image_mask[0, 0].tolist() == [[False] * 2] * 2 + [[True] * 2]


def test_text_weights_sum_to_two_where_pictures_are_seen():
    modality = sequence("TIIT")
    q, k, v = torch.randn(1, 1, 4, 2), torch.randn(1, 1, 4, 2), torch.ones(1, 1, 4, 2)
    assert torch.allclose(fast(q, k, v, modality, "mmca")[0, 0, :, 0], torch.tensor([1.0, 1.0, 1.0, 2.0]))


def test_strictly_causal_and_pictures_see_only_themselves():
    g = torch.Generator().manual_seed(3)
    modality = random_modality(g, 3, 24)
    q, k, v = (torch.randn(3, 2, 24, 4, generator=g) for _ in range(3))
    before = fast(q, k, v, modality, "mmca")
    for j in range(24):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, j] += 1
        moved = (fast(*changed, modality, "mmca") - before).abs().amax((1, 3)) > 1e-5
        moved &= modality != PAD
        assert not moved[:, :j].any(), "a token before j moved"
        assert not (moved & (modality == IMAGE))[:, j + 1:].any(), "an image row other than j moved"


def test_no_square_matrix_of_floats():
    """The fast path's largest tensor is far below T x T, forward and backward."""
    modality = sequence("T" * 8 + "I" * 1500 + "T" * 40)
    T = modality.shape[1]
    q, k, v = (torch.randn(1, 1, T, 8, requires_grad=True) for _ in range(3))
    sizes, who = [], make_pattern(modality, modality)
    q, k, v = (by_position(who.arrange, who, x) for x in (q, k, v))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        attend(q[:, :, :who.num_words], k, v, who).sum().backward()
    assert max(sizes) <= max(who.image_mask.numel(), 8 * T * 2)


def test_a_mechanism_that_is_not_known_is_named():
    with pytest.raises(ValueError, match="mmca, causal, cross; not 'mcma'"):
        attention_matrix(sequence("TT"), sequence("TT"), "mcma")
    with pytest.raises(ValueError, match="not 'mcma'"):
        tiny_model("mcma")


@pytest.mark.slow
def test_command_draws_m_of_a_given_sequence_and_compares_the_two_ways():
    out = subprocess.run([sys.executable, "mmca.py", "a b <image> c"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [line.split()[-4:] for line in out.splitlines() if line.startswith(("a ", "b ", "<image> ", "c "))]
    assert rows == [list("1..."), list("11.."), list("..1."), list("1121")]
    assert float(out.split("differ by ")[1].split()[0]) < 1e-5


def test_a_gpu_gets_a_mask_and_grouped_heads_one_at_a_time(monkeypatch):
    """Of its fused kernels flash attention alone takes grouped heads, and no mask: torch would make all scores (B, H, n, m). On the CPU both at once are six times faster for a word"""
    given, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, v, mask, is_causal, enable_gqa):
        given.append((q.device.type, mask is not None, k.shape[1], v.shape[1], enable_gqa))
        return kernel(q, k, v, mask, is_causal=is_causal, enable_gqa=enable_gqa)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    modality = sequence("TTIITT")
    for device in ("cpu", "meta"):  # the device that holds no numbers stands for a GPU
        q, k, v = (torch.randn(1, heads, rows, 16, device=device) for heads, rows in ((8, 4), (2, 6), (2, 6)))
        attend(q, k, v, replace(make_pattern(modality, modality), image_mask=make_pattern(modality, modality).image_mask.to(device)))
    assert given == [("cpu", False, 2, 2, True), ("cpu", True, 2, 2, True), ("meta", False, 2, 2, True), ("meta", True, 8, 8, False)]
