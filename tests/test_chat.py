"""A conversation round by round. python -m pytest tests/test_chat.py"""
import csv
import inspect
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, ROOT, all_logits, tiny_model
from PIL import Image

import chat as chat_module
from chat import Chat, FixedStep, RowLinear, attachments, lay_out, look, look_sheet, pick, repl, run_script, save, start_readline, stream
from data import Tokenizer, Turn, encode, own
from mmca import TEXT, attention_matrix, make_pattern
from model import KVCache, Llama, LlamaConfig, make_projection, rotary, rotate
from vision import InputError, load_image, preprocess

TOKENIZER = Tokenizer(FIXTURES / "tokenizer.model")
PICTURES = [str(path) for path in sorted((FIXTURES / "tiny-clip/images").iterdir())]
ROUNDS = [("What is this?", PICTURES[:1]), ("And now?", []), ("Compare ### them.", PICTURES[1:3]), ("Why?", [])]
KINDS = "mmca", "causal", "cross"
ANSWERING = {"max_new_tokens": 6}


class Spy:
    """A model that notes the ids it reads, round by round"""

    def __init__(self, model):
        self.model, self.ids, self.features = model, [], 0
        self.read_, self.encode_ = model.extend, model.encode_images
        model.extend, model.encode_images = self.read, self.encode_images

    def read(self, ids, *rest):
        self.ids += ids[0].tolist()
        return self.read_(ids, *rest)

    def encode_images(self, pixels):
        self.features += len(pixels)
        return self.encode_(pixels)


@torch.inference_mode()
def features_of(model, path):
    pixels = preprocess(load_image(path), model.preprocessing)[None]
    return model.encode_images(pixels.to(model.language_model.model.norm.weight.device))[0]


def assert_cache_is_one_pass(talk, atol=1e-4):
    """The logits with which the cache goes on are those of one pass over everything that was said"""
    ids, modality, _ = talk.said()
    paths = [path for r in talk.rounds[talk.first:] for path in r.turn.images]
    features = torch.stack([features_of(talk.model, path) for path in paths]) if paths else None
    talk.cache.truncate(len(ids) - 1)
    ids_, modality = (torch.tensor([part], device=talk.device) for part in (ids, modality))
    expected = all_logits(talk.model, ids_, modality, features)[0, -1].float()
    torch.testing.assert_close(talk.catch_up(), expected, atol=atol, rtol=1e-3)
    assert talk.cache.length == len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_every_round_continues_the_cache_as_if_read_at_once(kind):
    """The ids are those of training for the same answers, each is read once, and the greedy answers are those of a
    decoder that computes everything again for every token."""
    model, reference = tiny_model(kind), tiny_model(kind)
    spy, talk = Spy(model), Chat(model, TOKENIZER)
    said, limits = [], [6, 1, 4, 3]
    for (question, pictures), limit in zip(ROUNDS, limits):
        said.append(list(talk.ask(question, pictures, limit)))
    ids, modality, features = [], [], []
    for n, ((question, pictures), answer) in enumerate(zip(ROUNDS, said)):
        part = encode([Turn(question, None, pictures)], TOKENIZER, 17, None if n == 0 else len(features))
        ids, modality = ids + part.input_ids.tolist(), modality + part.modality.tolist()
        features += [features_of(reference, path) for path in pictures]
        for token in answer:
            logits = all_logits(reference, torch.tensor([ids]), torch.tensor([modality]), torch.stack(features))[0, -1]
            assert token == logits.argmax(), f"round {n}"
            ids, modality = ids + [token], modality + [1]
        ids, modality = ids + [TOKENIZER.eos], modality + [1]
    assert spy.ids == ids[:len(spy.ids)] and ids[len(spy.ids):] == [said[-1][-1], TOKENIZER.eos]
    assert spy.features == 3, "a picture is encoded once in its life"


def test_ids_in_chat_are_those_of_training():
    model = tiny_model()
    spy, talk, answer = Spy(model), Chat(model, TOKENIZER), TOKENIZER.encode("It is a cat.")
    conversation = []
    for question, pictures in ROUNDS:
        conversation.append(Turn(question, "It is a cat.", pictures))
        tokens = talk.ask(question, pictures, len(answer))
        forced = iter(answer + [TOKENIZER.eos])
        original, chat_module.pick = chat_module.pick, lambda *_: next(forced)
        try:
            list(tokens)
        finally:
            chat_module.pick = original
    said = talk.said()[0]
    assert said[:len(spy.ids)] == spy.ids and said + [TOKENIZER.eos] == encode(conversation, TOKENIZER, 17).input_ids.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_read_once_in_its_life(kind, tmp_path):
    """By its content: after /clear, at another place, under another name; and the answers are those of reading it anew"""
    spy = Spy(tiny_model(kind))
    talk, copy = Chat(spy.model, TOKENIZER), tmp_path / "copy.png"
    shutil.copy(PICTURES[1], copy)
    list(talk.ask("What is this?", PICTURES[:2], 3))
    talk.clear()
    again = [list(talk.ask("Well?", [PICTURES[2], copy, PICTURES[0]], 5)), list(talk.ask("And now?", [PICTURES[0]], 5))]
    assert spy.features == 3
    fresh = Chat(tiny_model(kind), TOKENIZER)
    assert again == [list(fresh.ask("Well?", [PICTURES[2], PICTURES[1], PICTURES[0]], 5)), list(fresh.ask("And now?", PICTURES[:1], 5))]
    assert_cache_is_one_pass(talk)
    shutil.copy(PICTURES[3], copy)
    spy.features = 0
    talk.look_at(copy)
    assert spy.features == 1, "the name is not the content"


def test_known_pictures_take_no_more_memory_than_allowed():
    spy = Spy(tiny_model())
    one = spy.model.keep_picture(features_of(spy.model, PICTURES[0])).nbytes
    talk, spy.features = Chat(spy.model, TOKENIZER, 2.5 * one), 0
    for path in (0, 1, 0, 2):
        talk.look_at(PICTURES[path])
    assert spy.features == 3 and sum(picture.nbytes for picture in talk.known.values()) == 2 * one
    talk.look_at(PICTURES[0])
    assert spy.features == 3, "used again after picture 1, which was forgotten in its place"
    talk.look_at(PICTURES[1])
    assert spy.features == 4
    answer = list(talk.ask("All of them?", PICTURES[:4], 5))
    nothing = Chat(tiny_model(), TOKENIZER, 0)
    assert answer == list(nothing.ask("All of them?", PICTURES[:4], 5)) and not nothing.known
    assert_cache_is_one_pass(talk)


@pytest.mark.parametrize("kind", KINDS)
def test_when_the_context_is_full_the_oldest_rounds_are_let_go(kind):
    """What is left goes on exactly as if the conversation had begun there, but for the numbers of the pictures"""
    model = tiny_model(kind)
    model.language_model.config.max_position_embeddings = 300
    talk, notices, first = Chat(model, TOKENIZER), [], 0
    for n in range(12):
        tokens = talk.ask(f"What is this, number {n}?", PICTURES[n % 4:n % 4 + 1] if n % 3 == 0 else [], 9)
        notice, _ = talk.notice, list(tokens)
        assert talk.cache.length < 300 and talk.first >= first and len(talk.rounds) == n + 1
        assert all(bool(r.pictures) == (bool(r.turn.images) and n >= talk.first) for n, r in enumerate(talk.rounds))
        if talk.first > first:
            said = TOKENIZER.decode(talk.said()[0])
            assert talk.rounds[talk.first].turn.question in said and f"number {talk.first - 1}?" not in said
            shown = sum(len(r.turn.images) for r in talk.rounds)
            assert f"### Image {shown}:" in said or not talk.said()[2]
            assert notice == f"the context of 300 tokens is full: rounds up to {talk.first} are let go, with their pictures"
            notices.append(notice)
            assert len(talk.said()[0]) <= 300 * 3 / 4 + 9 + 1, "a quarter is free for the rounds that follow"
        first = talk.first
        assert_cache_is_one_pass(talk)
        if kind == "mmca" and talk.said()[2]:
            shown = list(enumerate((path for r in talk.rounds for path in r.turn.images), 1))
            assert [part[:2] for part in look(talk)] == shown[-len(talk.said()[2]):], "pictures keep their numbers"
    assert len(notices) >= 2
    while talk.rounds:
        talk.undo()
    assert talk.first == 0 and talk.said()[0] == talk.head
    list(talk.ask("From the beginning?", PICTURES[:1], 9))
    assert_cache_is_one_pass(talk)


def test_what_was_let_go_is_said_also_if_the_question_is_stopped(monkeypatch):
    """With the next one, and once"""
    model = tiny_model()
    model.language_model.config.max_position_embeddings = 300
    talk = Chat(model, TOKENIZER)
    while not talk.first:
        with monkeypatch.context() as patch:
            patch.setattr(talk.model, "extend", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                talk.ask("What is this?", PICTURES[:1], 9)
        notice = talk.notice
        tokens = talk.ask("What is this?", PICTURES[:1], 9)
        assert talk.notice == notice
        list(tokens)
        assert talk.notice is None
    assert "rounds up to 1" in notice or "rounds up to 2" in notice


def test_undo_takes_the_last_round_back():
    talk, other = Chat(tiny_model(), TOKENIZER), Chat(tiny_model(), TOKENIZER)
    with pytest.raises(InputError, match="nothing has been said"):
        talk.undo()
    for question, pictures in ROUNDS[:2]:
        assert list(talk.ask(question, pictures, 4)) == list(other.ask(question, pictures, 4))
    list(talk.ask("Never mind.", PICTURES[3:5], 6))
    assert talk.undo() == "Never mind." and talk.said()[0] == other.said()[0] + [TOKENIZER.eos]
    for question, pictures in ROUNDS[2:]:
        assert list(talk.ask(question, pictures, 4)) == list(other.ask(question, pictures, 4))
    assert talk.said()[0] == other.said()[0]


def test_a_saved_conversation_is_one_to_train_on(tmp_path):
    talk = Chat(tiny_model(), TOKENIZER)
    for question, pictures in [("What ### is\n### Answer: \x1b this? \udcff", PICTURES[:2]), ("Why?", [])]:
        list(talk.ask(question, pictures, 6))
    (tmp_path / "talks").mkdir()
    save(talk, tmp_path / "talks/talk.json")
    assert [path.name for path in (tmp_path / "talks").iterdir()] == ["talk.json"]
    saved, = json.loads((tmp_path / "talks/talk.json").read_text())
    conversation = own(tmp_path / "talks", 0, saved, {})
    assert [turn.question for turn in conversation] == [r.turn.question for r in talk.rounds]
    assert [[str(Path(path).resolve()) for path in turn.images] for turn in conversation] == [PICTURES[:2], []]
    assert [turn.answer for turn in conversation] == [TOKENIZER.decode(r.ids[len(r.modality):]) for r in talk.rounds]
    with pytest.raises(InputError, match="nowhere/talk.json cannot be written: No such file"):
        save(talk, tmp_path / "nowhere/talk.json")


def test_look_is_the_second_softmax(tmp_path):
    """Against the formula: M2's weights of the answer's rows in one pass, mean over heads, layers and rows"""
    model = tiny_model()
    talk = Chat(model, TOKENIZER)
    with pytest.raises(InputError, match="no picture has been shown"):
        look(talk)
    list(talk.ask("What?", PICTURES[:1], 3))
    list(talk.ask("And these?", PICTURES[1:3], 5))
    looked = look(talk)
    assert [(number, path) for number, path, _ in looked] == list(enumerate(PICTURES[:3], 1))
    ids, modality, _ = (torch.tensor([part]) if isinstance(part[0], int) else part for part in talk.said())
    inputs, weights = [], []
    hooks = [layer.self_attn.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0])))
             for layer in model.language_model.model.layers]
    all_logits(model, ids, modality, torch.stack([features_of(model, path) for path in PICTURES[:3]]))
    for hook in hooks:
        hook.remove()
    config, M = model.language_model.config, attention_matrix(modality, modality)
    cos, sin = rotary(torch.arange(ids.shape[1])[None], config, torch.float32)
    for attention, x in inputs:
        x = make_pattern(modality, modality).restore(x.clone())
        q, k = (rotate(proj(x).unflatten(2, (-1, config.head_dim)).transpose(1, 2), cos, sin) for proj in (attention.q_proj, attention.k_proj))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q @ k.transpose(2, 3) / config.head_dim ** 0.5).masked_fill((M != 2)[:, None], -torch.inf)
        weights.append(scores.softmax(-1)[0, :, -6:-1].mean((0, 1)).detach())
    expected = torch.stack(weights).mean(0)[modality[0] == 2].view(3, 17)
    torch.testing.assert_close(torch.stack([part for *_, part in looked]), expected, atol=1e-5, rtol=1e-3)
    talk.cache.truncate(len(talk.head))  # as after an interrupt while what was left was read anew
    torch.testing.assert_close(torch.stack([part for *_, part in look(talk)]), expected, atol=1e-5, rtol=1e-3)
    assert abs(float(expected.sum()) - 1) < 1e-5 and expected.max() / expected.min() > 1.05
    assert_cache_is_one_pass(talk)
    with pytest.raises(InputError, match="no look: it takes MMCA"):
        look(Chat(tiny_model("causal"), TOKENIZER))


def test_the_sheet_of_look_is_orange_where_the_weights_are_large(tmp_path):
    """Over what the model sees of each picture, side by side"""
    wide, square = tmp_path / "wide.png", tmp_path / "square.png"
    whole = Image.new("RGB", (200, 100), "blue")
    whole.paste("white", (50, 0, 150, 100))
    whole.save(wide)
    Image.new("RGB", (30, 30), "white").save(square)
    weights = torch.zeros(2, 17)
    weights[0, 0], weights[0, 1 + 4 * 1 + 2], weights[1, 1 + 4 * 3] = 9, 1, 0.5  # class token, row 1 column 2, row 3 column 0
    sheet = look_sheet([(3, str(wide), weights[0]), (4, str(square), weights[1])], tiny_model().preprocessing)
    assert sheet.size == (1024, 512)
    blue = torch.tensor(list(sheet.getchannel("B").get_flattened_data())).view(512, 1024).float()  # orange has none
    cells = [part.reshape(4, 128, 4, 128)[:, 48:96, :, 48:96].mean((1, 3)) for part in (blue[:, :512], blue[:, 512:])]
    assert cells[0].argmin() == 4 * 1 + 2 and cells[1].argmin() == 4 * 3
    assert cells[0].min() < 130 < cells[1].min() < 190 and all(part.flatten().sort()[0][8] > 240 for part in cells)
    assert sheet.getpixel((500, 300))[0] > 240, "what is cut off at the sides is not shown"
    captions = blue[:40, :512], blue[:40, 512:]
    assert all((part < 100).any() for part in captions) and not torch.equal(*captions)


def test_an_interrupted_answer_leaves_a_whole_conversation():
    model = tiny_model()
    spy, talk = Spy(model), Chat(model, TOKENIZER)
    tokens = talk.ask("What is this?", PICTURES[:1])
    kept = [next(tokens), next(tokens)]
    tokens.close()
    list(talk.ask("And now?", [], 1))
    first = encode([Turn("What is this?", None, PICTURES[:1])], TOKENIZER, 17).input_ids.tolist()
    second = encode([Turn("And now?", None)], TOKENIZER, 17, shown=1).input_ids.tolist()
    expected = first + kept + [TOKENIZER.eos] + second
    assert spy.ids[:len(expected)] == expected


def test_a_bad_picture_or_a_full_cache_changes_nothing(monkeypatch):
    model = tiny_model()
    talk = Chat(model, TOKENIZER)
    before = list(talk.ask("What is this?", PICTURES[:1], 2))
    talk.rounds[-1].ids.append(TOKENIZER.eos)
    state = talk.said()
    with pytest.raises(InputError, match="cannot be read"):
        list(talk.ask("And this?", ["nowhere.png"]))
    with pytest.raises(InputError, match="too long for a context of 2048"):
        list(talk.ask("long " * 5000))
    with monkeypatch.context() as patch:
        patch.setattr(talk.model.language_model.model.norm, "forward", lambda x: 1 / 0)  # late, when pictures are placed
        with pytest.raises(ZeroDivisionError):
            talk.ask("And this?", PICTURES[1:3])
    assert state == talk.said()
    assert_cache_is_one_pass(talk)
    talk.clear()
    assert list(talk.ask("What is this?", PICTURES[:1], 2)) == before


def test_greedy_and_nucleus_sampling():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert pick(logits) == 0
    draws = Counter(pick(logits, 1.0, 1.0, generator) for generator in [torch.Generator().manual_seed(1)] for _ in range(4000))
    assert all(abs(draws[i] / 4000 - p) < 0.03 for i, p in enumerate([0.5, 0.25, 0.15, 0.1]))
    generator = torch.Generator().manual_seed(1)
    assert {pick(logits, 1.0, 0.7, generator) for _ in range(300)} == {0, 1}
    assert {pick(logits, 1.0, 0.5, generator) for _ in range(300)} == {0}, "the smallest set"
    assert {pick(logits.flip(0) + 9, 1e-30, 1.0, generator) for _ in range(50)} == {3}, "the limit is the best"
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert {pick(logits.to(dtype), 1.0, 0.7, generator) for _ in range(300)} == {0, 1}
    assert {pick(logits, 1.0, 1e-9, generator) for _ in range(50)} == {0}
    seeds = [[pick(logits, 2.0, 0.9, g) for _ in range(20)] for s in (1, 1, 2) for g in [torch.Generator().manual_seed(s)]]
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_linear_layers_for_one_row_change_nothing_but_the_layout(tied, threads, monkeypatch):
    model, before = tiny_model(), torch.get_num_threads()
    llama = model.language_model
    if tied:
        llama.lm_head.weight = llama.model.embed_tokens.weight
    ids, batches, bmm = torch.randint(3, 500, (1, 9)), [], torch.bmm

    def counted(rows, columns):
        batches.append(len(columns))
        return bmm(rows, columns)
    monkeypatch.setattr(torch, "bmm", counted)

    def logits(*lengths):
        cache, start = KVCache(llama.model, 9), 0
        for length in lengths:
            given = model.extend(ids[:, start:start + length], torch.full((1, length), TEXT), cache)
            start += length
        return given

    def memory():
        return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in llama.parameters()}.values())
    expected, values, size = logits(9), {name: p.clone() for name, p in llama.named_parameters()}, memory()
    torch.set_num_threads(threads)
    try:
        lay_out(llama)
        assert memory() == size and all(torch.equal(p, values[name]) for name, p in llama.named_parameters())
        assert isinstance(llama.model.layers[0].mlp.gate_proj, RowLinear) and llama.lm_head.weight.stride() == (1, 512)
        for lengths in ((9,), (8, 1), (1,) * 9):
            torch.testing.assert_close(logits(*lengths), expected, atol=1e-5, rtol=1e-5)
        layers = 7 * len(llama.model.layers)  # the head has one row always, these ten times
        assert batches == [{1: 1, 2: 2, 3: 4}[threads]] * (2 + 10 * (layers + 1))
        llama.lm_head.weight.data *= 2
        torch.testing.assert_close(logits(8, 1), logits(9), atol=1e-4, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def graphs(monkeypatch):
    """A GPU's graphs on a CPU -> those that were made: what is to be noted runs once more at each replay"""
    made, capture = [], FixedStep.capture

    class Graph:
        def __init__(self):
            made.append(self)
            self.replayed = 0

        def replay(self):
            self.replayed += 1
            self.step.logits.copy_(self.step.forward())

    def noted(step):
        capture(step)
        step.graph.step = step
    monkeypatch.setattr(FixedStep, "capture", noted)
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: forward)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return made


def as_on_gpu(talk):
    """A conversation whose words are read in fixed shapes; places that were not written hold some number"""
    for buffer in (*talk.cache.keys, *talk.cache.values):
        buffer.fill_(3)
    talk.fixed = True
    return talk


class Both(Chat):
    """A conversation whose every word is read twice, as on a CPU and in fixed shapes; the second goes on"""
    apart = 1e-5

    def extend(self, token):
        length, self.fixed = self.cache.length, False
        expected = super().extend(token)
        assert self.cache.length == length + 1
        self.cache.truncate(length)
        for buffer in (*self.cache.keys, *self.cache.values):
            buffer[:, :, self.cache.num_words] = 7
        self.fixed = True
        logits = super().extend(token)
        assert self.fixed and self.cache.length == length + 1
        torch.testing.assert_close(logits, expected, atol=self.apart, rtol=0)
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_word_in_fixed_shapes_is_a_word_read(kind, graphs):
    """15 random conversations: pictures first, last, several, none, rounds taken back and let go, sizes doubled in between"""
    model, seen = tiny_model(kind).double(), Counter()
    model.language_model.config.max_position_embeddings = 1200
    for seed in range(15):
        dice, talk = random.Random(seed), as_on_gpu(Both(model, TOKENIZER))
        for _ in range(dice.randrange(3, 8)):
            pictures = dice.choices(PICTURES, k=dice.choice([0, 0, 1, 1, 3, 8]))
            tokens = talk.ask(dice.choice(["Why?", "What is this?", "long " * dice.randrange(300)]), pictures, dice.randrange(1, 7))
            seen["let go"] += talk.notice is not None
            list(tokens)
            seen["no picture"] += not talk.cache.num_image_tokens
            if dice.random() < 0.2:
                talk.undo()
                seen["undo"] += 1
        assert_cache_is_one_pass(talk)
        seen["grown"] += len(talk.steps) > 1
        seen.update(talk.steps.keys())
    assert all(seen[what] for what in ("let go", "no picture", "undo", "grown", 512, 1024, 2048)), seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_word_in_fixed_shapes_is_one_graph(kind, monkeypatch):
    """Also where there is room for image tokens and none is held: that term is zero"""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    torch._dynamo.reset()
    model = tiny_model(kind)
    for pictures in (PICTURES[:2], []):
        talk = as_on_gpu(Chat(model, TOKENIZER))
        talk.fixed = False
        list(talk.ask("What is this?", pictures, 4))
        length = talk.cache.length
        expected = talk.extend(9)
        talk.cache.truncate(length)
        step = FixedStep(model, talk.cache, 512, False)
        step.state.copy_(torch.tensor([9, talk.cache.num_words, talk.cache.num_image_tokens]))
        with torch.inference_mode():
            logits = torch.compile(step.forward, fullgraph=True, backend="aot_eager")()
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_layers_are_compiled_for_the_capture_alone(monkeypatch, graphs):
    """Whatever happens meanwhile"""
    model, compiled = tiny_model("cross"), []
    layers = [*model.language_model.model.layers, *model.cross_attention]

    def compile(forward, dynamic):
        compiled.append(forward)
        assert dynamic is False, "a mask whose size is not known is not aligned"
        return lambda *inputs: failure() if failure else forward(*inputs)
    monkeypatch.setattr(torch, "compile", compile)
    talk = Chat(model, TOKENIZER)
    list(talk.ask("What is this?", PICTURES[:2], 4))

    def interrupt():
        raise KeyboardInterrupt

    def fail():
        raise torch._dynamo.exc.InternalTorchDynamoError("inductor raised\n  no compiler\nsomewhere\nand much more")
    with torch._dynamo.config.patch(recompile_limit=8):  # as it is, and will be again
        for failure, error in ((interrupt, KeyboardInterrupt), (None, None), (fail, RuntimeError)):
            step = FixedStep(model, talk.cache, 512, True)
            with pytest.raises(error) if error else torch.inference_mode():
                step.capture()
            assert (step.graph is None) == bool(error) and not any("forward" in vars(layer) for layer in layers)
        assert torch._dynamo.config.recompile_limit > 4, "sizes in a context of 4096"
    assert len(compiled) == 3 * len(layers)
    FixedStep(model, talk.cache, 512, False).capture()
    assert len(compiled) == 3 * len(layers)


def test_a_graph_is_made_once_for_each_size(monkeypatch, graphs):
    """And replayed for each word but the first, whose logits come with the question; the layers have run once before"""
    forward, ran = FixedStep.forward, []

    def counted(self):
        ran.append(self.graph)
        return forward(self)
    monkeypatch.setattr(FixedStep, "forward", counted)
    talk, plain = as_on_gpu(Chat(tiny_model(), TOKENIZER)), Chat(tiny_model(), TOKENIZER)
    for question, pictures, count in (("What is this?", [], 5), ("And these?", PICTURES[:2], 7), ("long " * 200, PICTURES[2:3], 3)):
        answer = list(talk.ask(question, pictures, count))
        assert answer == list(plain.ask(question, pictures, count)) and len(answer) == count
    assert list(talk.steps) == [512, 1024] and [graph.replayed for graph in graphs] == [4 + 6, 2]
    assert ran.count(None) == 2 * 2, "once before, once for the graph"


@pytest.mark.parametrize("when", ["compiled", "noted", "replayed"])
def test_an_answer_comes_without_a_graph_where_none_can_be_made(when, monkeypatch, graphs, capsys):
    """No compiler: a graph of layers as they are. No memory, an old driver: the words are those of a CPU. Said once"""
    talk, plain = as_on_gpu(Chat(tiny_model(), TOKENIZER)), Chat(tiny_model(), TOKENIZER)

    def fail(*_, **__):
        raise torch._dynamo.exc.InternalTorchDynamoError("no \x1bcompiler") if when == "compiled" else torch.OutOfMemoryError("no memory")
    if when == "compiled":
        monkeypatch.setattr(torch, "compile", fail)
    elif when == "noted":
        monkeypatch.setattr(torch.cuda, "graph", fail)
    else:
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", fail)
    for question, pictures in (("What is this?", PICTURES[:1]), ("Why?", []), ("And these?", PICTURES[1:3])):
        assert list(talk.ask(question, pictures, 6)) == list(plain.ask(question, pictures, 6))
    assert_cache_is_one_pass(talk)
    said = capsys.readouterr().err
    if when == "compiled":
        assert said == "chat.py: without compiled layers from here on, slower (no compiler)\n" and talk.fixed and talk.steps
    else:
        assert said == "".join(f"chat.py: without {what} from here on, slower (no memory)\n" for what in ("compiled layers", "a graph"))
        assert not talk.fixed and not talk.steps, "what was noted takes memory"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "bfloat16"])
def test_a_graph_on_a_gpu_is_a_word_read(kind, compiled, monkeypatch):
    """The last with LLaMA-2-7B's proportions, a key for each query, in a GPU's own format and an odd context"""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    torch._dynamo.reset()
    model, half = tiny_model("mmca" if kind == "bfloat16" else kind), kind == "bfloat16"
    if half:
        with torch.device("cuda"):
            language = Llama(LlamaConfig(256, 512, 3, 4, 4, 64, 512, 2050))
        model.language_model, model.projection = language, make_projection("linear", model.vision_model.config, language.config)
    model = model.to("cuda", torch.bfloat16 if half else torch.float32)
    talk = Both(model, TOKENIZER)
    talk.compiled, talk.apart = compiled, 0.1 if half else 1e-4
    assert talk.fixed and all(not buffer.any() for buffer in (*talk.cache.keys, *talk.cache.values))
    for question, pictures in [*ROUNDS, ("long " * 300, PICTURES[2:4]), ("And so?", [])]:
        list(talk.ask(question, pictures, 20))
    talk.undo()
    list(talk.ask("Really?", PICTURES[:1], 20, temperature=1.0, generator=torch.Generator().manual_seed(1)))
    assert len(talk.steps) > 1 and all(step.graph for step in talk.steps.values()) and talk.compiled == compiled
    assert_cache_is_one_pass(talk, talk.apart)


def test_streaming_never_prints_half_a_character_or_a_control_character():
    text = "a cat ☃ 猫 and 🐈 end"
    ids = TOKENIZER.encode(text)
    parts = list(stream(iter(ids), TOKENIZER))
    assert "".join(parts) == text and not any("\ufffd" in part for part in parts) and len(parts) > 5
    escape = TOKENIZER.encode("\x1b[31mred\x07")
    assert "".join(stream(iter(escape), TOKENIZER)) == "[31mred"
    assert "".join(stream(iter(TOKENIZER.encode("☃")[:-1]), TOKENIZER)), "an answer cut inside a character still ends"


@pytest.mark.parametrize("line, rest", [
    ("What is in cat.png?", "What is in ?"), ("Compare cat.png, and tell me", "Compare , and tell me"), ("cat.png: why?", ": why?"),
    ("What is in ./cat.png ?", "What is in ?"), ("{folder}/cat.png\tand", "and"), ("~/cat.png why", "why"), ("see <file://{folder}/cat.png>.", "see <>."),
    ('"my cat (1).png" why', "why"), ("my\\ cat\\ \\(1\\).png why", "why"), ("'my cat (1).png', \"it's.png\" and it's cat.png", ", and it's"),
    ("What's in cat.png's corner?", "What's in 's corner?"), ("“cat.png”", ""), ("(cat.png)", ""), ("[cat.png](cat.png)", ""), ("cat.png,cat.png and cat.png...", ", and ..."), ("cat.png's colour", "'s colour"),
    ("猫 cat.png。", "猫 。"), ("这张cat.png是什么颜色", "这张是什么颜色"), ("cat.pngは何ですか", "は何ですか"), ("猫.PNG?", ""), ("image=cat.png+cat.png", "image=+"),
    ('cat.png what does f() do, and [] or ""?', 'what does f() do, and [] or ""?')])
def test_files_of_pictures_are_attached_and_a_mark_around_a_name_is_not_part_of_it(tmp_path, monkeypatch, capsys, line, rest):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("cat.png", "my cat (1).png", "it's.png", "猫.PNG"):
        Image.new("RGB", (4, 4)).save(name, "PNG")
    line = line.format(folder=tmp_path)
    found, question = attachments(line)
    assert (len(found), question) == (len(re.findall(r"\.png", line, re.IGNORECASE)), rest) and not capsys.readouterr().out
    assert all(Image.open(path).size == (4, 4) for path in found)


def test_pictures_are_attached_in_the_order_of_the_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b c.png", "d.png"):
        Image.new("RGB", (4, 4)).save(name)
    assert attachments('a.png "b c.png" d.png why?') == (["a.png", "b c.png", "d.png"], "why?")


@pytest.mark.parametrize("line", ["nowhere.heic?", "nowhere.png, please", "x/cat.png", "my-cat.png", "https://example.org/cat.png", "svg.svg.png",
                                  '"my cat.png"'])
def test_a_name_of_no_file_gets_a_notice_and_stays_a_word(tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("cat.png")
    assert attachments(line) == ([], line)
    assert re.fullmatch(r"\(no picture .+: taken as a word\)\n", capsys.readouterr().out)


@pytest.mark.parametrize("line", ["it's  a 'quoted' word", "notes.txt", "cat.png.bak", "cat.png.What", "cat.png~", "cat.png/x", "cat.pngs", "what is .png"])
def test_what_does_not_end_like_a_picture_is_a_word(tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("cat.png")
    assert attachments(line) == ([], line) and not capsys.readouterr().out.replace("(no picture .png: taken as a word)\n", "")


@pytest.mark.parametrize("part", ["a", "a.", "'a.png ", "'", "\\a", ".png", "猫"])
def test_a_long_line_is_looked_through_at_once(part):
    """Each of its characters a few times, not as often as there are characters"""
    began = time.process_time()
    attachments(part * (20_000 // len(part)))
    assert time.process_time() - began < 2


@pytest.mark.slow
def test_tab_completes_the_name_of_a_file(tmp_path):
    """On a terminal, by readline alone"""
    import pty
    (tmp_path / "cat.png").touch()
    program = inspect.getsource(start_readline) + "\nimport sys\nstart_readline()\nprint(f'read {input()!r}')"
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, "-c", program])
    os.write(terminal, b"look at ca\t\n")
    shown = b""
    with suppress(OSError):  # the end
        while part := os.read(terminal, 1000):
            shown += part
    os.waitpid(pid, 0)
    assert b"read 'look at cat.png" in shown


def talk_through(lines, monkeypatch, capsys):
    talk = Chat(tiny_model(), TOKENIZER)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    repl(talk, ANSWERING)
    return talk, capsys.readouterr().out


def test_nothing_typed_ends_the_conversation(monkeypatch, capsys):
    lines = [f"{PICTURES[0]} what is it?", "/image nowhere.png", f"/image {PICTURES[1]}", "", "and this?", "/image 'unclosed",
             "/unknown", "\x1b[A\x00", "~nobody.png about ~100 people?",
             "x" * 5000 + ".png", "half a character: \udcff", "/" + "y" * 5000, "/clear", "hello", "/quit", "never read"]
    talk, out = talk_through(lines, monkeypatch, capsys)
    assert "nowhere.png cannot be read" in out and "No closing quotation" in out and "a new conversation" in out
    assert not talk.said()[2] and talk.cache.num_image_tokens == 0


def test_the_end_of_piped_input_ends_it(monkeypatch, capsys):
    talk, out = talk_through([f"what is {PICTURES[0]}", "and this?"], monkeypatch, capsys)
    assert len(talk.said()[2]) == 1 and talk.cache.num_image_tokens == 17


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(monkeypatch, capsys):
    steps = iter([5, 7, KeyboardInterrupt])

    def interrupted(*_):
        step = next(steps, 2)
        if step is KeyboardInterrupt:
            raise step
        return step
    monkeypatch.setattr(chat_module, "pick", interrupted)
    talk, out = talk_through(["what?", "again?"], monkeypatch, capsys)
    assert "(stopped" in out
    expected = encode([Turn("what?", None)], TOKENIZER, 17).input_ids.tolist() + [5, 7, 2]
    expected += encode([Turn("again?", None)], TOKENIZER, 17, shown=0).input_ids.tolist()
    assert talk.cache.length == len(expected)


def test_commands(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_bytes(b"\x89PNG")
    talk, out = talk_through(["/undo", "/look", "/save", "/save a.json", "/image " + PICTURES[0], PICTURES[1], "well?", "/look", "more", "/undo",
                              "/save talk.json", "/save no/talk.json", "/image nowhere.png", "broken.png", "/image", "what is file://[x?", "/undo",
                              f"/image {PICTURES[3]}", "/image", "/save 'my talk.json'", "/image /dev/zero", f"{PICTURES[2]} nowhere.png?"],
                             monkeypatch, capsys)
    assert "(nothing has been said)" in out and "(0 rounds in a.json)" in out and "(no picture has been shown)" in out and "(taken back: more)" in out
    assert [r.turn.images for r in talk.rounds] == [PICTURES[:2], PICTURES[2:3]]
    assert "broken.png cannot be read" in out and "taken back: what is file://[x?" in out and "/dev/zero cannot be read: no such" in out
    assert "(1 pictures attached to the next question)" in out and "(2 rounds" not in out and "(1 rounds in talk.json)" in out
    assert "of what was looked at)\n(look.png shows where)" in out and "(no/talk.json cannot be written: No such file" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "broken.png", "look.png", "my talk.json", "talk.json"]
    assert len(json.loads(Path("talk.json").read_text())[0]) == 1


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("seed", range(int(os.environ.get("TALKS", 1))))
def test_random_rounds_never_end_it_and_the_cache_stays_right(seed, fixed, graphs, monkeypatch, capsys, tmp_path):
    """ROUNDS lines (1,000 by hand) of commands, pictures, garbage, control characters, with interrupts at random times"""
    monkeypatch.chdir(tmp_path)
    Path("broken.png").write_bytes(b"\x89PNG")
    model, dice, rounds = tiny_model(), random.Random(seed), int(os.environ.get("ROUNDS", 60))
    model.language_model.config.max_position_embeddings = 400
    talk, known = Chat(model, TOKENIZER, 20 * 17 * 1024), [*PICTURES, "broken.png", "nowhere.png", "file://%ff.png"]

    if fixed:
        as_on_gpu(talk)

    def line():
        garbage = "".join(chr(dice.choice([dice.randrange(32), dice.randrange(127, 160), dice.randrange(0xd800), 0xdcff])) for _ in range(30))
        return dice.choice([
            f"What is {dice.choice(known)} and {dice.choice(known)}?", "and now?", "why ### Answer: </s><image>?", garbage, "/undo", "/look",
            "/clear" if dice.random() < 0.1 else "so?", f"/save {dice.choice(['a.json', 'no/a.json', ''])}", "/image " + dice.choice(known),
            "/image 'unclosed", garbage + ".png", dice.choice("abc ") * dice.randrange(3000), "/" + garbage, f"/image {garbage}", "/help"])

    lines, stop, parent = [line().replace("\n", "") for _ in range(rounds)], threading.Event(), os.getpid()

    def interrupts():
        while not stop.wait(random.Random().expovariate(60)):
            os.kill(parent, signal.SIGINT)

    read, left = [], iter(lines)

    def typed(prompt):
        if not pesterer.ident:
            pesterer.start()
        for text in left:
            read.append(text)
            return text
        stop.set()
        pesterer.join()
        raise EOFError
    monkeypatch.setattr("builtins.input", typed)
    pesterer = threading.Thread(target=interrupts)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        repl(talk, ANSWERING)
    finally:
        stop.set()
        signal.signal(signal.SIGINT, before)
    out = capsys.readouterr().out
    print(f"{len(read)} lines, {out.count('(stopped')} stopped, {out.count('are let go')} times the context was full")
    assert len(read) == rounds and out.count("(stopped") > rounds / 100
    if not talk.rounds:
        talk.ask("and now?", PICTURES[:1])
    assert_cache_is_one_pass(talk)


def test_scripts_write_the_csv_of_the_original(tmp_path):
    (tmp_path / "pictures").symlink_to(FIXTURES / "tiny-clip/images")
    (tmp_path / "b c.png").symlink_to(PICTURES[1])
    script = {"one": [["What?", "pictures/alpha_rgba.png 'b c.png'"], ["Why, \"so\"?"]], "two": [["Hello"]]}
    (tmp_path / "ask.json").write_text(json.dumps(script))
    run_script(Chat(tiny_model(), TOKENIZER), tmp_path / "ask.json", tmp_path / "a.csv", ANSWERING)
    rows = list(csv.reader(open(tmp_path / "a.csv", newline="")))
    assert rows[0] == ["test_name", "image_path", "question", "answer"]
    assert [row[:3] for row in rows[1:]] == [["one", "pictures/alpha_rgba.png 'b c.png'", "What?"], ["one", "", 'Why, "so"?'], ["two", "", "Hello"]]
    talk = Chat(tiny_model(), TOKENIZER)
    assert rows[1][3] == TOKENIZER.decode(list(talk.ask("What?", [tmp_path / "pictures/alpha_rgba.png", tmp_path / "b c.png"], 6)))
    for wrong in ([["What?"]], {"one": {}}, {"one": ""}, {"one": ["What?"]}, {"one": None}, {"one": [["What?", "a.jpg", "b.jpg"]]}, {"one": [["What?", None]]}, {"one": [[]]}):
        (tmp_path / "bad.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="bad.json"):
            run_script(talk, tmp_path / "bad.json", tmp_path / "b.csv", ANSWERING)
    (tmp_path / "bad.json").write_text('{"one": [["Who?"]], "two": [["Hello"]], "one": [["Why?"]]}')
    with pytest.raises(InputError, match="bad.json cannot be read: the name 'one' stands twice"):
        run_script(talk, tmp_path / "bad.json", tmp_path / "b.csv", ANSWERING)
    assert not (tmp_path / "b.csv").exists()


def test_a_script_leaves_out_what_cannot_be_asked_and_loses_no_answer(tmp_path, monkeypatch, capsys):
    """Each answer is in the file when it is there, and a file that is there is not touched"""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    script = {"one": [["Half a \ud83d character?"], ["And this?", "broken.png"], ["Or?", "nowhere.png"], ["Long?", "n" * 300 + ".png"], ["So?", "'unclosed"], ["long " * 5000], ["Why?"]]}
    (tmp_path / "ask.json").write_text(json.dumps(script))
    talk, out = Chat(tiny_model(), TOKENIZER), tmp_path / "a.csv"
    ask, seen = talk.ask, []

    def noted(question, *rest, **more):
        seen.append(out.read_text())
        return ask(question, *rest, **more)
    talk.ask = noted
    run_script(talk, tmp_path / "ask.json", out, ANSWERING)
    rows = list(csv.reader(open(out, newline="")))
    assert [row[2] for row in rows[1:]] == ["Half a ? character?", "Why?"] and rows[1] in csv.reader(seen[1].splitlines())
    said = capsys.readouterr()
    assert all(text in said.err for text in ("broken.png cannot be read", "nowhere.png cannot be read", "File name too long", "No closing quotation", "too long for a context"))
    assert said.out == f"2 answers in {out}\n"
    before = out.read_bytes()
    for name in ("a.csv", "no/a.csv", "."):
        with pytest.raises(InputError, match="cannot be written"):
            run_script(talk, tmp_path / "ask.json", tmp_path / name, ANSWERING)
    assert out.read_bytes() == before


@pytest.mark.slow
def test_command_without_a_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "chat.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "config.json cannot be read" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_cache_that_does_not_fit_is_a_sentence(tmp_path):
    """A context of so many tokens that no machine holds their keys and values"""
    tiny_model().save_pretrained(tmp_path / "it", TOKENIZER)
    file = tmp_path / "it/language_model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 10 ** 13}))
    done = subprocess.run([sys.executable, "chat.py", str(tmp_path / "it")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "chat.py: out of memory" in done.stderr and "Traceback" not in done.stderr, done.stderr
