"""Template, tokens, readers, concatenation, batches. python -m pytest tests/test_data.py"""
import argparse
import base64
import collections
import json
import os
import random
import shutil
import subprocess
import sys
from functools import partial, reduce
from operator import getitem
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, ROOT, tiny_model

from data import (DATASETS, DESCRIBE, REASON, Epoch, Samples, Tokenizer, Turn, collate, concatenate, encode, hold_out, picture_index,
                  read_datasets)
from mmca import IMAGE, PAD, TEXT
from vision import InputError, load_image, read_preprocessing

TOKENIZER = Tokenizer(FIXTURES / "tokenizer.model")
IMAGES = FIXTURES / "tiny-clip/images"
CATS = [Turn("please describe the image.", "It's a cute black cat.", ["a.png"]),
        Turn("What's the difference between the three cats?", "The colors of the three cats are different.", ["b.png", "c.png"])]


def test_ids_are_those_of_sentencepiece():
    cases = json.loads((FIXTURES / "tokenizer_expected.json").read_text())["cases"]
    assert len(cases) == 20
    for case in cases:
        assert TOKENIZER.encode(case["text"]) == case["sentencepiece_ids"]


def pieces(example):
    """The example as text: runs of words decoded, pictures and end tokens named, trained parts in brackets"""
    out, ids = [], example.input_ids.tolist()
    kinds = [(m, label != -100, i in (1, 2) and m == TEXT)
             for i, m, label in zip(ids, example.modality.tolist(), example.labels.tolist())]
    start = 0
    for stop in range(1, len(ids) + 1):
        if stop == len(ids) or kinds[stop] != kinds[start]:
            kind, trained, special = kinds[start]
            text = f"<{stop - start}>" if kind == IMAGE else {1: "<s>", 2: "</s>"}[ids[start]] if special else TOKENIZER.decode(ids[start:stop])
            out.append(f"[{text}]" if trained else text)
            start = stop
    return out


def test_the_template_of_the_post():
    assert pieces(encode(CATS, TOKENIZER, 3)) == [
        "<s>", "You are a powerful vision-language assistant. \n\n### Image 1:", "<3>",
        "\n### Question: please describe the image. \n### Answer:", "[It's a cute black cat.]", "[</s>]",
        "\n\n### Image 2:", "<3>", "\n### Image 3:", "<3>",
        "\n### Question: What's the difference between the three cats? \n### Answer:",
        "[The colors of the three cats are different.]", "[</s>]"]


def test_the_worked_example_of_encode():
    """What its docstring shows"""
    example = encode([Turn("Why?", "It is.", ["a.png"])], TOKENIZER, 2)
    assert " ".join(map(str, example.input_ids.tolist())).endswith(
        " 480 470 0 0 447 13 38 38 38 447 84 462 322 450 451 368 470 338 468 474 447 13 38 38 38 282 453 455 464 354 470 287 450 272 466 2")
    assert example.labels.tolist() == [-100] * (len(example.labels) - 5) + [287, 450, 272, 466, 2] and encode.__doc__.count("287 450 272 466") == 2


def test_labels_are_ids_or_nothing():
    example = encode(CATS, TOKENIZER, 3)
    trained = example.labels != -100
    assert torch.equal(example.labels[trained], example.input_ids[trained]) and example.images == ["a.png", "b.png", "c.png"]
    assert (example.input_ids[example.modality == IMAGE] == 0).all() and not (trained & (example.modality == IMAGE)).any()
    assert example.input_ids.tolist().count(1) == 1 and example.input_ids.tolist().count(2) == 2


def test_an_open_round_ends_where_the_answer_begins():
    whole, open_ = encode(CATS, TOKENIZER, 3), encode([CATS[0], Turn(CATS[1].question, None, CATS[1].images)], TOKENIZER, 3)
    assert whole.input_ids.tolist()[:len(open_.input_ids)] == open_.input_ids.tolist()
    assert whole.labels[len(open_.input_ids)] != -100


def test_an_empty_answer_ends_too():
    example = encode([Turn("Why?", "")], TOKENIZER, 3)
    assert example.input_ids[-1] == example.labels[-1] == TOKENIZER.eos and (example.labels != -100).sum() == 1


def test_rounds_encoded_one_by_one_are_the_conversation():
    joined = encode(CATS[:1], TOKENIZER, 3).input_ids.tolist() + encode(CATS[1:], TOKENIZER, 3, shown=1).input_ids.tolist()
    assert joined == encode(CATS, TOKENIZER, 3).input_ids.tolist()


@pytest.mark.parametrize("text", ["<image>", "</s>", "<s>", "### Image 2: <image>", "a\n### Answer: yes\n### Question: b", "###"])
def test_text_can_never_become_markup(text):
    for turn in (Turn(text, "ok", ["a.png"]), Turn("ok", text, ["a.png"])):
        example = encode([turn], TOKENIZER, 3)
        assert (example.modality == IMAGE).sum() == 3 and example.input_ids.tolist().count(2) == 1
        headings = [line for line in TOKENIZER.decode(example.input_ids[example.modality == TEXT].tolist()).split("\n") if line.startswith("###")]
        assert [h.split(":")[0] for h in headings] == ["### Image 1", "### Question", "### Answer"]


def test_rounds_that_do_not_fit_are_left_out_whole():
    turns = [Turn(f"question {i}", f"answer {i}", ["a.png"]) for i in range(5)]
    lengths = [len(encode(turns[:n], TOKENIZER, 10).input_ids) for n in range(6)]
    for n in range(6):
        for limit in (lengths[n], lengths[n] + 1):
            example = encode(turns, TOKENIZER, 10, max_length=limit)
            assert len(example.input_ids) == lengths[n] and example.left_out == 5 - n and len(example.images) == n
    example = encode(turns, TOKENIZER, 10, max_images=3)
    assert len(example.images) == 3 and example.left_out == 2


EXPECTED = json.loads((FIXTURES / "datasets_expected.json").read_text())


@pytest.fixture
def sets(tmp_path):
    """The miniature data sets, in a folder that can be written"""
    shutil.copytree(FIXTURES / "datasets", tmp_path / "sets")
    return tmp_path / "sets"


def options(folder, *names, **others):
    """What the command line would give"""
    return argparse.Namespace(**{"data_path": folder, "out": folder / "out", "datasets": list(names), "concatenate": None,
                                 "samples": ["all"], "seed": 7} | others)


def drafts(name, folder):
    """The conversations of a data set, each a function of a random.Random, and what is left out"""
    data, = read_datasets(options(folder, name))
    return [partial(data.converse, record) for record in data.records], data.left_out


def picture_name(image, folder):
    """Path below the folder, or the id before the base64 text"""
    if isinstance(image, str):
        return str(Path(image).relative_to(folder))
    file, offset, length = image
    text = Path(file).read_bytes()
    assert text[offset - 1:offset] == text[offset + length:offset + length + 1] == b'"'
    return text[:offset].decode().split('"')[-3]


def plain(conversation, folder):
    return [(tuple(picture_name(i, folder) for i in t.images), t.question, t.answer) for t in conversation]


def expected_turns(turns):
    return [(tuple(t.get("images", ())), t["question"], t["answer"]) for t in turns]


def check(entry, said):
    """One drawn conversation against an entry of the expected file -> which of the alternatives it was"""
    turns = expected_turns(entry["turns"])
    if "style_choice" in entry:
        styles = [expected_turns(t) for t in entry["style_choice"].values()]
        assert said in styles
        return styles.index(said)
    if "blend" in entry:
        return check_blend(entry["blend"], said)
    if entry.get("order") == "rounds_shuffled":
        pictures = [images for images, _, _ in turns if images]
        assert [images for images, _, _ in said] == pictures + [()] * (len(turns) - 1), "all pictures go with the first round"
        assert sorted(t[1:] for t in said) == sorted(t[1:] for t in turns)
        return tuple(t[1] for t in said)
    (raw,) = entry["turns"] if "pair_choice" in raw_choices(entry) or "question_choice" in raw_choices(entry) else (None,)
    if raw is None:
        assert said == turns
        return 0
    ((images, question, answer),) = said
    assert images == tuple(raw["images"])
    if "pair_choice" in raw:
        assert {"question": question, "answer": answer} in raw["pair_choice"]["values"]
    else:
        assert answer in raw["answer_choice"]["values"] if "answer_choice" in raw else answer == raw["answer"]
        choice = raw["question_choice"]
        prompts = DESCRIBE if choice["kind"] == "own_list" else [choice["prefix"] + why for why in REASON]
        assert question in prompts
    return question, answer


def raw_choices(entry):
    return {key for turn in entry["turns"] for key in turn if key.endswith("_choice")}


def check_blend(blend, said):
    """Each picture in order with conversations of its own, whole, before the next; then rounds of the pair"""
    rest, unseen, counts = list(said), [], []
    for picture, part in zip(blend["images"], blend["llava"]):
        known = [[(t["question"], t["answer"]) for t in c] for c in part["conversations"]]
        used = []
        while True:
            match = [c for c in known if c not in used and [t[1:] for t in rest[:len(c)]] == c]
            if not match:
                break
            images = [t[0] for t in rest[:len(match[0])]]
            assert images == ([(picture,)] if not used else [()]) + [()] * (len(images) - 1)
            used.append(match[0])
            rest = rest[len(match[0]):]
        assert part["at_least"] <= len(used) <= part["at_most"]
        counts.append(len(used))
        unseen += [] if used else [picture]
    assert 1 <= len(rest) <= blend["cgd"]["at_most"] and len({t[1] for t in rest}) == len(rest)
    assert all({"question": q, "answer": a} in blend["cgd"]["rounds"] for _, q, a in rest)
    assert [t[0] for t in rest] == [tuple(unseen)] + [()] * (len(rest) - 1)
    return *counts, len(rest)


@pytest.mark.parametrize("name", DATASETS)
def test_reader_gives_what_is_expected(name, sets):
    """Record for record, in 60 draws; what is left out, and why"""
    found, left_out = drafts(name, sets)
    entries = EXPECTED["datasets"][name]
    assert len(found) == len(entries)
    assert left_out == [f"{d['record']}: {d['why']}" for d in EXPECTED["dropped"].get(name, [])]
    for draft, entry in zip(found, entries):
        drawn = [check(entry, plain(draft(random.Random(n)), sets)) for n in range(60)]
        free = raw_choices(entry) or "style_choice" in entry or "order" in entry and len(entry["turns"]) > 1
        assert (len(set(drawn)) > 1) == bool(free) or "blend" in entry, "what may be chosen is chosen anew"
        assert drawn[:5] == [check(entry, plain(draft(random.Random(n)), sets)) for n in range(5)]
    for draft in found:
        for image in (image for turn in draft(random.Random(0)) for image in turn.images):
            assert load_image(image).size == tuple(EXPECTED["picture_sizes"][picture_name(image, sets)])


def test_blended_samples_hold_to_the_rule(sets):
    """Every number of conversations and of rounds that the rule allows, about equally often, in 10,000 draws"""
    for draft, entry in zip(drafts("llava_otter_blend", sets)[0], EXPECTED["datasets"]["llava_otter_blend"]):
        counts = [check_blend(entry["blend"], plain(draft(random.Random(n)), sets)) for n in range(10_000 // 3)]
        ranges = [(p["at_least"], p["at_most"]) for p in (*entry["blend"]["llava"], entry["blend"]["cgd"])]
        for (least, most), seen in zip(ranges, zip(*counts)):
            share = collections.Counter(seen)
            assert set(share) == set(range(least, most + 1))
            assert all(abs(n / len(counts) - 1 / (most + 1 - least)) < 0.05 for n in share.values())


def test_your_own_conversations(tmp_path):
    shutil.copytree(IMAGES, tmp_path / "pictures")
    (tmp_path / "mine.json").write_text(json.dumps([
        [{"images": ["pictures/palette_p.png"], "question": "a", "answer": "b"}, {"question": "c <image>", "answer": "d", "images": None}],
        [{"images": ["pictures/alpha_rgba.png", "gone.png"], "question": "e", "answer": "f"}]]))
    (mine,) = read_datasets(options(tmp_path, str(tmp_path / "mine.json")))
    assert list(Epoch([mine], [[0]], 0, 0)) == [[Turn("a", "b", [f"{tmp_path}/pictures/palette_p.png"]), Turn("c <image>", "d")]]
    assert mine.left_out == [f"{tmp_path}/gone.png: no such picture"] and mine.factor == 1


@pytest.mark.parametrize("field", ["image", "picture", "Images", "answers"])
def test_a_field_of_your_own_conversations_that_is_not_known_is_refused(tmp_path, field):
    """Else a picture would be left out without a word"""
    shutil.copy(IMAGES / "palette_p.png", tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps([[], [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d", field: "palette_p.png"}]]))
    with pytest.raises(InputError, match=rf"mine.json\[1\] has a wrong or missing field: '{field}' is none of answer, images, question"):
        read_datasets(options(tmp_path, str(tmp_path / "mine.json")))


def test_records_of_llava_that_are_not_as_they_should_be(sets):
    """Without a marker the picture stands first; what cannot be understood is left out, counted and named"""
    def record(*said, **more):
        return {"conversations": [{"from": who, "value": text} for who, text in said], **more}

    pair = ("human", "What?"), ("gpt", "A cat.")
    records = [record(*pair, image="a.jpg"), record(*pair, ("human", "And <image>?"), ("gpt", "A dog."), image="b.jpg"),
               record(("gpt", "Hello."), *pair, image="c.jpg"), record(("system", "Be good."), *pair, image="d.jpg"), record(*pair, image=None),
               record(("human", "<image> What?"), ("gpt", "A cat.")), record(image="e.jpg"), record(pair[0], image="f.jpg"),
               record(*pair, pair[0], image="g.jpg"), record(*pair, ("gpt", "More."), image="h.jpg")]
    (sets / "llava/conversation_58k.json").write_text(json.dumps(records))
    for letter in "abcdefgh":
        (sets / f"coco/train2017/{letter}.jpg").touch()
    found, left_out = drafts("llava_dial", sets)
    shown = [[[Path(image).name for image in turn.images] for turn in draft(random.Random(0))] for draft in found]
    assert shown == [[["a.jpg"]], [[], ["b.jpg"]], [[]], [["g.jpg"]], [["h.jpg"]]]
    turns, marker, none = "human and gpt do not take turns", "a marker and no picture", "no round"
    assert left_out == [f"conversation_58k[{n}]: {why}" for n, why in ((2, turns), (3, turns), (5, marker), (6, none), (7, none))]
    assert set(left_out) <= set(drafts("llava_otter_blend", sets)[1])
    (sets / "llava/detail_23k.json").write_text(json.dumps(records[:3]))
    (sets / "llava/complex_reasoning_77k.json").write_text("[]")
    found, left_out = drafts("llava", sets)
    assert [len(draft(random.Random(0))) for draft in found] == [1, 1] and left_out == [f"detail_23k[2]: {turns}"]


def break_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def refused(sets, name, **others):
    with pytest.raises(InputError) as error:
        read_datasets(options(sets, name, **others))
    return str(error.value)


def test_what_is_missing_is_named(sets):
    assert "'lava' is not known; the known ones are llava, llava_dial" in refused(sets, "lava")
    assert "--samples has 2 values for 1 data sets" in refused(sets, "llava", samples=[1, 2])
    assert "nowhere.json cannot be read: No such file" in refused(sets, str(sets / "nowhere.json"))
    llava = sets / "llava/detail_23k.json"
    llava.write_text("[1, 2")
    assert "cannot be read: " in refused(sets, "llava") and "line 1 column" in refused(sets, "llava")
    llava.unlink()
    assert "detail_23k.json is missing: liuhaotian/LLaVA-Instruct-150K on Hugging Face has it" in refused(sets, "llava_otter_blend")
    for name, folder in (("minigpt4", "cc_sbu_align/image"), ("ocr_vqa", "OCR_VQA/images"), ("coco_caption", "coco/2014"),
                         ("sparkles_dialogue", "SparklesDialogueVG/images"), ("otter_mimicit_cgd", "coco/train2017")):
        shutil.rmtree(sets / folder)
        assert f"{folder} is missing: " in refused(sets, name) and "has it" in refused(sets, name)
    (sets / "MIMIC-IT/TVC.json").unlink()
    assert "TVC.json is missing: pufanyi/MIMICIT" in refused(sets, "otter_mimicit_tvc")


@pytest.mark.parametrize("case", """
llava               llava/detail_23k.json                  [2,"conversations",1,"value"]  -     [2] 'value'
llava               llava/detail_23k.json                  [1]                            7     [1] 'int' object is not
llava_dial          llava/conversation_58k.json            [1,"conversations",1,"value"]  5     [1] [
llava_otter_blend   MIMIC-IT/CGD_instructions.json         ["data","CGD_INS_000000","image_ids"]    -    ['CGD_INS_000000'] 'image_ids'
otter_mimicit_cgd   MIMIC-IT/CGD_instructions.json         ["data","CGD_INS_000000","rel_ins_ids"]  "a"  ['CGD_INS_000000'] 'a' should be
otter_mimicit_cgd   MIMIC-IT/CGD_instructions.json         ["data"]                       -     ['meta'] 'image_ids'
otter_mimicit_sd    MIMIC-IT/SD_instructions.json          ["data","SD_INS_00002","image_ids"]  ["x",3]  ['SD_INS_00002'] ['x', 3] should
sparkles_dialogue   SparklesDialogueVG/annotations/SparklesDialogueVG.json  [0,"dialogue",0,"role"]    -  [0] 'role'
sparkles_dialogue   SparklesDialogueVG/annotations/SparklesDialogueVG.json  [0,"dialogue",0,"images"]  "14"  [0] string indices
minigpt4            cc_sbu_align/filter_cap.json           ["annotations",3,"caption"]    7     [3] [
coco_caption        coco_caption/dataset.json              ["images",0,"sentences",4,"raw"]  5  [0] [
ocr_vqa             OCR_VQA/dataset.json                   ["0590012347","questions"]  "why"    ['0590012347'] 'why' should be
aokvqa              aokvqa/annotations/aokvqa_v1p0_train.json  [1,"correct_choice_idx"]  4      [1] list index out of range
aokvqa              aokvqa/annotations/aokvqa_v1p0_train.json  [0,"question"]          null     [0] unsupported operand
mine.json           mine.json                              [0,0,"images"]           "a.jpg"     [0] 'a.jpg' should be
mine.json           mine.json                              [1,0,"answer"]              3        [1] ['why?', 3] should be
mine.json           mine.json                              [1]                         null     [1] 'NoneType' object is not
""".strip().splitlines())
def test_a_record_that_is_not_as_it_should_be_is_named(sets, case):
    """Data set, file, what is taken away or replaced by what in it -> file, record and what is wrong, before any model is opened"""
    name, file, path, value, said = case.split(maxsplit=4)
    (sets / "mine.json").write_text(json.dumps([[{"question": "why?", "answer": "so."}]] * 2))
    *way, last = json.loads(path)
    content = json.loads((sets / file).read_text())
    inner = reduce(getitem, way, content)
    inner.pop(last) if value == "-" else inner.__setitem__(last, json.loads(value))
    (sets / file).write_text(json.dumps(content))
    where, what = said.split(" ", 1)
    assert f"{sets / file}{where} has a wrong or missing field: {what}" in refused(sets, str(sets / name) if name == file else name)


@pytest.mark.parametrize("broken", ["", "[]", '{"a": "aGk="', '{"a": "aGk=",, "b": "aGk="}', '{"a": ["x"]}', '{"a": "aGk=", "b',
                                    '{"a": "aGk="} {"b": "aGk="}', '{"a": 3}', "x" * 70_000 + '"a": "b"',
                                    '{"a": "aGk="}' + " " * 10_000 + "x"])
def test_a_broken_picture_file_is_named(sets, broken):
    (sets / "MIMIC-IT/SD.json").write_text(broken)
    assert f"{sets}/MIMIC-IT/SD.json is {'no JSON object' if broken else 'empty'}" in refused(sets, "otter_mimicit_sd")
    assert not list(sets.rglob("*.index"))


def test_the_index_of_a_picture_file_is_made_once(sets, monkeypatch):
    """Kept below --out, made anew when the file changes"""
    file = sets / "MIMIC-IT/SD.json"
    first, _ = drafts("otter_mimicit_sd", sets)
    (index,) = (sets / "out").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("data.look_through", None)  # the file is not looked through again
        drafts("otter_mimicit_sd", sets)
    pictures = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(pictures.items()))).replace("/", "\\/"))
    again, _ = drafts("otter_mimicit_sd", sets)
    assert len(list((sets / "out").iterdir())) == 2 and index.name.startswith("SD.json.")
    assert [d(random.Random(0))[0].images for d in first] != [d(random.Random(0))[0].images for d in again]
    (file.parent / "x").write_bytes(base64.b64decode(pictures["SD_IMG_00000_1"]))
    same = load_image(again[0](random.Random(0))[0].images[0])
    assert same.tobytes() == load_image(file.parent / "x").tobytes(), "also where / is written as \\/"
    file.write_text(json.dumps({"large": "A" * (1 << 24), **pictures}, indent=1))
    assert load_image(drafts("otter_mimicit_sd", sets)[0][0](random.Random(0))[0].images[0]).tobytes() == same.tobytes()
    shutil.copytree(sets / "MIMIC-IT", sets / "elsewhere/MIMIC-IT")
    (sets / "elsewhere/MIMIC-IT/SD.json").write_text(json.dumps({"other": pictures["SD_IMG_00000_1"]}))
    indexes = [picture_index(folder / "MIMIC-IT/SD.json", sets / "out") for folder in (sets, sets / "elsewhere")]
    assert len(indexes[0]) == 1 + len(pictures) and list(indexes[1]) == ["other"], "two of one name"


def test_concatenation_uses_each_conversation_once_in_groups_of_equal_chance():
    conversations = [[Turn(str(i), "a", [f"{i}.png"])] for i in range(10_000)]
    groups = concatenate(conversations, 3, random.Random(5))
    assert sorted(int(turn.question) for group in groups for turn in group) == list(range(10_000))
    sizes = collections.Counter(map(len, groups[:-1]))
    assert set(sizes) == {1, 2, 3} and all(abs(n / len(groups) - 1 / 3) < 0.03 for n in sizes.values())
    assert all(group == [Turn(turn.question, "a", turn.images) for turn in group] for group in groups[:10])


def test_epochs_differ_and_repeat_by_seed(sets):
    """Every choice depends on seed, epoch and index alone; each conversation is used once an epoch"""
    parts = [read_datasets(options(sets, name))[0] for name in DATASETS]
    whole = [range(len(data.records)) for data in parts]
    first, again, second = (list(Epoch(parts, whole, 7, epoch)) for epoch in (0, 0, 1))
    assert first == again != second
    for name in DATASETS:
        n = list(DATASETS).index(name)
        used = [i for epoch in (0, 1) for group in Epoch(parts, whole, 7, epoch).groups for m, i in group if m == n]
        assert sorted(used) == sorted([*whole[n], *whole[n]])
    alone = Epoch(parts[1:2], [[3]], 7, 0)[0]
    assert any(alone == first[i][k:k + len(alone)] for i in range(len(first)) for k in range(len(first[i]))), "whatever stands beside it"
    wordings = {tuple(t.question for t in Epoch(parts[9:10], [[0]], 7, epoch)[0]) for epoch in range(20)}
    assert len(wordings) > 3, "a request is drawn anew each epoch"
    training, held_out = hold_out(30, 0.2, 7)
    assert len(held_out) == 6 and sorted(training + held_out) == list(range(30)) and hold_out(30, 0.2, 8)[1] != held_out
    few = read_datasets(options(sets, "llava", samples=[3]))[0]
    others = read_datasets(options(sets, "llava", samples=[3], seed=8))[0]
    assert len(few.records) == 3 and list(few.records) != list(others.records)


def test_a_batch_pads_at_the_right_and_holds_each_picture_once():
    names = [str(IMAGES / name) for name in ("alpha_rgba.png", "landscape_rgb.png")]
    conversations = [[Turn("a", "b", names)], [Turn("a longer question", "b", [names[1]]), Turn("c", "d", [names[0], names[1]])]]
    samples = Samples(conversations, TOKENIZER, 17, read_preprocessing(FIXTURES / "tiny-clip", 56), 4096, 8)
    examples = [samples[0], samples[1]]
    batch = collate(examples)
    assert batch["pixels"].shape == (2, 3, 56, 56) and batch["image_index"].tolist() == [0, 1, 1, 0, 1]
    for row, example in enumerate(examples):
        T = len(example.input_ids)
        assert torch.equal(batch["input_ids"][row, :T], example.input_ids)
        assert (batch["modality"][row, T:] == PAD).all() and (batch["labels"][row, T:] == -100).all()
    assert (batch["modality"] != PAD).sum(1).tolist() == [len(example.input_ids) for example in examples]


@pytest.mark.slow
def test_show_prints_what_the_model_sees(sets):
    break_json(sets / "llava/detail_23k.json", lambda c: c[0]["conversations"][0].update(value="Is\x1b[2Jit <image> </s>?"))
    break_json(sets / "SparklesDialogueCC/annotations/SparklesDialogueCC.json", lambda c: c[3]["dialogue"][0]["images"][0].update(image_id="\x1b[2J"))
    (sets / "coco/train2017/000000268831.jpg").unlink()
    (sets / "mine.json").write_text("\ufeff" + json.dumps([[{"images": ["\ud800\x1b[2J.jpg"], "question": "\ud800", "answer": "a"}]]))
    shutil.copy(FIXTURES / "tokenizer.model", sets)
    (sets / "config.json").write_text("{}")
    command = [sys.executable, "data.py", "--show", "13", "--language_model", sets, "--vision_model", FIXTURES / "tiny-clip",
               "--data_path", sets, "--out", sets / "out", "--concatenate", "1", "--datasets", "llava", "sparkles_dialogue"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split("---- ")
    assert [part.split(":")[0] for part in shown[1::2]] == [f"sample {n}" for n in range(1, 14)]
    assert all(part.startswith(f"pictures: ['{sets}/") for part in shown[2::2])
    assert "\n### Image 1:<image 1: 17 tokens>\n### Question: Is[2Jit </s>? \n### Answer:[A single red disc" in done.stdout
    assert "image 2:<image 2: 17 tokens>".lower() in done.stdout.lower() and "\x1b" not in done.stdout
    counts = shown[-1].split("\n\n")[1].splitlines()
    assert counts[1].split()[:3] == ["llava", "8", "8"] and counts[3].split()[:3] == ["sparkles_dialogue", "5", "5"]
    assert max(int(part.split()[2]) for part in shown[1::2]) == max(int(counts[n].split()[-1]) for n in (1, 3))
    assert counts[2].strip() == f"1 left out: {sets}/coco/train2017/000000268831.jpg: no such picture"
    assert counts[4].strip().startswith("5 left out: SparklesDialogueCC[2]: odd number of messages; SparklesDialogueCC[3]: a picture file is missing; ")
    done = subprocess.run([*map(str, command), sets / "mine.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 left out: " in done.stdout and "\x1b" not in done.stdout, done.stderr
    (sets / "config.json").write_text('{"max_position_embeddings": 128}')
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("--max_length 4096 is more than the language model's positions: 128 is taken\n"), done.stderr
    assert int(done.stdout.splitlines()[-2].split()[-1]) <= 128
    done = subprocess.run([*map(str, command), "lava"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("data.py: data set 'lava' is not known") and "Traceback" not in done.stderr


@pytest.mark.slow
def test_show_on_a_terminal_that_lacks_a_character(tmp_path):
    """PYTHONIOENCODING=ascii, as in cron and in containers"""
    (tmp_path / "zh.json").write_text(json.dumps([[{"question": "这是什么?", "answer": "猫"}]]))
    tiny_model().save_pretrained(tmp_path / "it", TOKENIZER)
    command = [sys.executable, "data.py", "--show", "1", "--checkpoint", tmp_path / "it", "--out", tmp_path / "out", "--datasets", tmp_path / "zh.json"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "### Question: ????? \n### Answer:[?][</s>]" in done.stdout, done.stdout + done.stderr


def test_a_record_without_a_question_or_a_caption_is_left_out(sets):
    break_json(sets / "OCR_VQA/dataset.json", lambda c: c["0590012347"].update(questions=[]))
    assert drafts("ocr_vqa", sets)[1][0] == "0590012347: no round"
    break_json(sets / "coco_caption/dataset.json", lambda c: c["images"][0].update(sentences=[]))
    assert drafts("coco_caption", sets)[1] == ["dataset[0]: no round"]
