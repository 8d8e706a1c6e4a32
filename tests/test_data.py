"""Template, tokens, readers, concatenation, batches. python -m pytest tests/test_data.py"""
import collections
import json
import random

import pytest
import torch
from conftest import FIXTURES

from data import Samples, Tokenizer, Turn, collate, concatenate, encode, epoch_samples, hold_out, read_dataset
from mmca import IMAGE, PAD, TEXT
from vision import InputError, read_preprocessing

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


def llava_files(folder, conversations=4):
    """A miniature of LLaVA's three files, with the fixtures' pictures"""
    (folder / "llava").mkdir(parents=True)
    (folder / "coco").mkdir()
    (folder / "coco/train2017").symlink_to(IMAGES)
    names = sorted(path.name for path in IMAGES.iterdir())
    records = [{"id": str(i), "image": names[i % 4], "conversations": [
        {"from": "human", "value": f"What is  in\n{i}?\n<image>"}, {"from": "gpt", "value": f"It is {i}.\nYes."},
        {"from": "human", "value": "And then?"}, {"from": "gpt", "value": "Nothing."},
        {"from": "human", "value": "No answer?"}]} for i in range(conversations)]
    for name in ("detail_23k", "complex_reasoning_77k", "conversation_58k"):
        (folder / f"llava/{name}.json").write_text(json.dumps(records))
    return folder


def test_the_two_llava_readers(tmp_path):
    folder, picture = llava_files(tmp_path), str(tmp_path / "coco/train2017/alpha_rgba.png")
    one = read_dataset("llava", folder, None, 0)
    assert len(one) == 8 and one[0] == one[4] == [Turn("What is in 0?", "It is 0.\nYes.", [picture])]
    many = read_dataset("llava_dial", folder, None, 0)
    assert len(many) == 4 and many[0] == one[0] + [Turn("And then?", "Nothing.", [])]
    assert len(read_dataset("llava", folder, 3, 0)) == 3 and read_dataset("llava", folder, 3, 0) != read_dataset("llava", folder, 3, 1)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="'lava' is not known; the known ones are llava, llava_dial"):
        read_dataset("lava", tmp_path, None, 0)
    with pytest.raises(InputError, match="detail_23k.json is missing: the LLaVA-Instruct-150K files"):
        read_dataset("llava", tmp_path, None, 0)
    folder = llava_files(tmp_path)
    file = folder / "llava/conversation_58k.json"
    file.write_text('[{"id": 0, "image": "a.png", "conversations": []}, {"id": 1, "conversations": []}]')
    with pytest.raises(InputError, match="record 1 .* 'image' not found"):
        read_dataset("llava_dial", folder, None, 0)
    for said in ({"from": "gpt", "value": "first"}, {"from": "human", "value": None}):
        file.write_text(json.dumps([{"image": "a.png", "conversations": [said]}]))
        with pytest.raises(InputError, match="record 0: the texts of human and gpt should take turns"):
            read_dataset("llava_dial", folder, None, 0)
    file.write_text("[1, 2")
    with pytest.raises(InputError, match="not valid JSON: .* at line 1"):
        read_dataset("llava_dial", folder, None, 0)
    (tmp_path / "x.model").write_text("no tokenizer")
    with pytest.raises(InputError, match="x.model is no SentencePiece model"):
        Tokenizer(tmp_path / "x.model")


def test_concatenation_uses_each_conversation_once_in_groups_of_equal_chance():
    conversations = [[Turn(str(i), "a", [f"{i}.png"])] for i in range(10_000)]
    groups = concatenate(conversations, 3, random.Random(5))
    assert sorted(int(turn.question) for group in groups for turn in group) == list(range(10_000))
    sizes = collections.Counter(map(len, groups[:-1]))
    assert set(sizes) == {1, 2, 3} and all(abs(n / len(groups) - 1 / 3) < 0.03 for n in sizes.values())
    assert all(group == [Turn(turn.question, "a", turn.images) for turn in group] for group in groups[:10])


def test_epochs_differ_and_repeat_by_seed():
    sets = [[[Turn(f"{s}{i}", "a")] for i in range(30)] for s in "xy"]
    first = epoch_samples(sets, [2, 1], 7, 0)
    assert first == epoch_samples(sets, [2, 1], 7, 0) != epoch_samples(sets, [2, 1], 7, 1)
    assert sorted(t.question for g in first for t in g) == sorted(t.question for s in sets for g in s for t in g)
    training, held_out = hold_out(sets[0], 0.2, 7)
    assert len(held_out) == 6 and sorted(c[0].question for c in training + held_out) == sorted(c[0].question for c in sets[0])


def test_a_batch_pads_at_the_right_and_holds_each_picture_once():
    names = [str(IMAGES / name) for name in ("alpha_rgba.png", "landscape_rgb.png")]
    conversations = [[Turn("a", "b", names)], [Turn("a longer question", "b", [names[1]]), Turn("c", "d", [names[0], names[1]])]]
    samples = Samples(conversations, TOKENIZER, 17, read_preprocessing(FIXTURES / "tiny-clip", 56), 4096, 8)
    batch = collate([samples[0], samples[1]])
    assert batch["pixels"].shape == (2, 3, 56, 56) and batch["image_index"].tolist() == [0, 1, 1, 0, 1]
    for row, example in enumerate((samples[0], samples[1])):
        T = len(example.input_ids)
        assert torch.equal(batch["input_ids"][row, :T], example.input_ids)
        assert (batch["modality"][row, T:] == PAD).all() and (batch["labels"][row, T:] == -100).all()
    assert (batch["modality"] != PAD).sum(1).tolist() == [len(samples[0].input_ids), len(samples[1].input_ids)]


def test_a_tokenizer_learned_from_data(tmp_path):
    conversations = [[Turn(f"what color is the {shape}?", color)] for shape in ("cat", "dog") for color in ("red", "blue")]
    tokenizer = Tokenizer.train(conversations, 100_000, tmp_path / "t.model")
    assert 256 < len(tokenizer) < 1000, "smaller than asked, because the data cannot fill it"
    assert tokenizer.decode(tokenizer.encode("what color is the zebra ☃?\n")) == "what color is the zebra ☃?\n"
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    with pytest.raises(InputError, match="no tokenizer can be learned"):
        Tokenizer.train(conversations, 20, tmp_path / "t.model")
