"""A conversation round by round. python -m pytest tests/test_chat.py"""
import argparse
import csv
import io
import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import FIXTURES, ROOT, all_logits, tiny_model

import chat as chat_module
from chat import Chat, attachments, pick, repl, run_script, stream
from data import Tokenizer, Turn, encode
from vision import InputError

TOKENIZER = Tokenizer(FIXTURES / "tokenizer.model")
PICTURES = [str(path) for path in sorted((FIXTURES / "tiny-clip/images").iterdir())]
ROUNDS = [("What is this?", PICTURES[:1]), ("And now?", []), ("Compare ### them.", PICTURES[1:3]), ("Why?", [])]
KINDS = "mmca", "causal", "cross"
ARGS = argparse.Namespace(max_new_tokens=6, temperature=0.0, top_p=1.0, seed=0)


class Spy:
    """A model that notes the ids it reads, round by round"""

    def __init__(self, model):
        self.model, self.ids, self.features = model, [], 0
        self.read_, self.encode_ = model.read, model.encode_images
        model.read, model.encode_images = self.read, self.encode_images

    def read(self, ids, *rest):
        self.ids += ids[0].tolist()
        return self.read_(ids, *rest)

    def encode_images(self, pixels):
        self.features += len(pixels)
        return self.encode_(pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_every_round_continues_the_cache_as_if_read_at_once(kind):
    """The ids are those of training for the same answers, each is read once, and the greedy answers are those of a
    decoder that computes everything again for every token."""
    model = tiny_model(kind)
    spy, talk = Spy(model), Chat(model, TOKENIZER)
    said, limits = [], [6, 1, 4, 3]
    for (question, pictures), limit in zip(ROUNDS, limits):
        said.append(list(talk.ask(question, pictures, limit)))
    ids, modality, features = [], [], []
    for n, ((question, pictures), answer) in enumerate(zip(ROUNDS, said)):
        part = encode([Turn(question, None, pictures)], TOKENIZER, 17, None if n == 0 else len(features))
        ids, modality = ids + part.input_ids.tolist(), modality + part.modality.tolist()
        features += [talk.look_at(path) for path in pictures]
        for token in answer:
            logits = all_logits(model, torch.tensor([ids]), torch.tensor([modality]), torch.stack(features))[0, -1]
            assert token == logits.argmax(), f"round {n}"
            ids, modality = ids + [token], modality + [1]
        ids, modality = ids + [TOKENIZER.eos], modality + [1]
    assert spy.ids == ids[:len(spy.ids)] and ids[len(spy.ids):] in ([TOKENIZER.eos], [said[-1][-1], TOKENIZER.eos])
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
    assert spy.ids + talk.pending == encode(conversation, TOKENIZER, 17).input_ids.tolist()


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


def test_a_bad_picture_or_a_full_cache_changes_nothing():
    model = tiny_model()
    talk = Chat(model, TOKENIZER)
    before = list(talk.ask("What is this?", PICTURES[:1], 2))
    state = talk.cache.length, talk.shown, list(talk.pending)
    with pytest.raises(InputError, match="cannot be read"):
        list(talk.ask("And this?", ["nowhere.png"]))
    with pytest.raises(InputError, match="the conversation is full"):
        list(talk.ask("long " * 5000))
    assert state == (talk.cache.length, talk.shown, talk.pending)
    talk.clear()
    assert list(talk.ask("What is this?", PICTURES[:1], 2)) == before


def test_greedy_and_nucleus_sampling():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert pick(logits) == 0
    draws = Counter(pick(logits, 1.0, 1.0, generator) for generator in [torch.Generator().manual_seed(1)] for _ in range(4000))
    assert all(abs(draws[i] / 4000 - p) < 0.03 for i, p in enumerate([0.5, 0.25, 0.15, 0.1]))
    generator = torch.Generator().manual_seed(1)
    assert {pick(logits, 1.0, 0.7, generator) for _ in range(300)} == {0, 1}
    assert {pick(logits, 1.0, 1e-9, generator) for _ in range(50)} == {0}
    seeds = [[pick(logits, 2.0, 0.9, g) for _ in range(20)] for s in (1, 1, 2) for g in [torch.Generator().manual_seed(s)]]
    assert seeds[0] == seeds[1] != seeds[2]


def test_streaming_never_prints_half_a_character_or_a_control_character():
    text = "a cat ☃ 猫 and 🐈 end"
    ids = TOKENIZER.encode(text)
    parts = list(stream(iter(ids), TOKENIZER))
    assert "".join(parts) == text and not any("\ufffd" in part for part in parts) and len(parts) > 5
    escape = TOKENIZER.encode("\x1b[31mred\x07")
    assert "".join(stream(iter(escape), TOKENIZER)) == "[31mred"
    assert "".join(stream(iter(TOKENIZER.encode("☃")[:-1]), TOKENIZER)), "an answer cut inside a character still ends"


def test_words_that_are_pictures_are_attached(tmp_path, capsys):
    from PIL import Image
    for name in ("a.png", "b c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b c.png")
    assert attachments(f"what is {a} here?") == ([a], "what is here?")
    assert attachments(f'"{b}" and {b.replace(" ", chr(92) + " ")}?') == ([b], f"and {b.replace(' ', chr(92) + ' ')}?")
    assert attachments(f"{b.replace(' ', chr(92) + ' ')} file://{b.replace(' ', '%20')} why") == ([b, b], "why")
    assert attachments("it's  a 'quoted' word") == ([], "it's  a 'quoted' word")
    assert attachments("see nowhere.png") == ([], "see nowhere.png") and "no picture nowhere.png" in capsys.readouterr().out


def talk_through(lines, monkeypatch, capsys):
    talk = Chat(tiny_model(), TOKENIZER)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    repl(talk, ARGS)
    return talk, capsys.readouterr().out


def test_nothing_typed_ends_the_conversation(monkeypatch, capsys):
    lines = [f"{PICTURES[0]} what is it?", "/image nowhere.png", f"/image {PICTURES[1]}", "", "and this?", "/image 'unclosed",
             "/unknown", "\x1b[A\x00", "~nobody.png about ~100 people?",
             "x" * 5000 + ".png", "half a character: \udcff", "/" + "y" * 5000, "/clear", "hello", "/quit", "never read"]
    talk, out = talk_through(lines, monkeypatch, capsys)
    assert "nowhere.png cannot be read" in out and "No closing quotation" in out and "a new conversation" in out
    assert talk.shown == 0 and talk.cache.images == 0


def test_the_end_of_piped_input_ends_it(monkeypatch, capsys):
    talk, out = talk_through([f"what is {PICTURES[0]}", "and this?"], monkeypatch, capsys)
    assert talk.shown == 1 and talk.cache.images == 17


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


def test_scripts_write_the_csv_of_the_original(tmp_path):
    (tmp_path / "pictures").symlink_to(FIXTURES / "tiny-clip/images")
    (tmp_path / "b c.png").symlink_to(PICTURES[1])
    script = {"one": [["What?", "pictures/alpha_rgba.png 'b c.png'"], ["Why, \"so\"?"]], "two": [["Hello"]]}
    (tmp_path / "ask.json").write_text(json.dumps(script))
    run_script(Chat(tiny_model(), TOKENIZER), tmp_path / "ask.json", tmp_path / "a.csv", ARGS)
    rows = list(csv.reader(open(tmp_path / "a.csv", newline="")))
    assert rows[0] == ["test_name", "image_path", "question", "answer"]
    assert [row[:3] for row in rows[1:]] == [["one", "pictures/alpha_rgba.png 'b c.png'", "What?"], ["one", "", 'Why, "so"?'], ["two", "", "Hello"]]
    talk = Chat(tiny_model(), TOKENIZER)
    assert rows[1][3] == TOKENIZER.decode(list(talk.ask("What?", [tmp_path / "pictures/alpha_rgba.png", tmp_path / "b c.png"], 6)))
    (tmp_path / "bad.json").write_text(json.dumps({"one": [["What?", "nowhere.png"]]}))
    with pytest.raises(InputError, match="there is no picture .*nowhere.png"):
        run_script(talk, tmp_path / "bad.json", tmp_path / "b.csv", ARGS)
    assert not (tmp_path / "b.csv").exists()


def test_command_without_a_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "chat.py", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "is no checkpoint" in done.stderr and "Traceback" not in done.stderr
