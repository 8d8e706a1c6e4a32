"""The demo's drawings, what is said about them, and its two models. python -m pytest tests/test_demo.py"""
import argparse
import json
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT
from PIL import Image

from data import DATASETS, Epoch, Tokenizer, read_datasets
from model import load_llama, load_vit

sys.path.insert(0, str(ROOT / "demo"))
import make  # noqa: E402

NAMES = ["llava", "llava_dial", "otter_mimicit_cgd", "llava_otter_blend", "sparkles_dialogue"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The demo's data, small"""
    folder = tmp_path_factory.mktemp("demo") / "small"
    subprocess.run([sys.executable, ROOT / "demo/make.py", folder, "--scenes", "20"], check=True)
    return folder


def seen(file):
    """What the pixels of a picture say: place -> the colour of the thing there, "ink" for digits and words"""
    picture, inks = Image.open(file).convert("RGB"), {**make.COLOURS, "ink": make.INK}
    things = {}
    for place in make.PLACES:
        x, y = (32 * (side in place) for side in ("right", "bottom"))
        pixels = [picture.getpixel((x + i, y + j)) for i in range(32) for j in range(32)]
        near = Counter(name for pixel in pixels for name, ink in inks.items() if sum(abs(a - b) for a, b in zip(pixel, ink)) < 60)
        if near:
            things[place] = near.most_common(1)[0][0]
    return things


def test_descriptions_say_what_the_pixels_show(drawn):
    for record in json.loads((drawn / "train/llava/detail_23k.json").read_text()):
        said = record["conversations"][1]["value"].lower().rstrip(".").replace(" and ", ", ").split(", ")
        said = {place: next((c for c in make.COLOURS if c in part.split()), "ink") for part in said for place in make.PLACES if place in part}
        assert said == seen(drawn / "train/coco/train2017" / record["image"]), record


def test_pairs_differ_where_they_are_said_to(drawn):
    pairs = json.loads((drawn / "train/MIMIC-IT/CGD_instructions.json").read_text())["data"]
    asked = [pair for pair in pairs.values() if "difference" in pair["instruction"]]
    assert len(asked) == 20
    for pair in asked:
        before, after = (seen(drawn / f"train/coco/train2017/{i.removeprefix('CGD_IMG_')}.jpg") for i in pair["image_ids"])
        place = next(place for place in make.PLACES if place in pair["answer"].lower())
        assert {p: c for p, c in before.items() if p != place} == {p: c for p, c in after.items() if p != place}, pair
        assert ("image 1 has nothing" in pair["answer"]) == (place not in before) and ("2 has nothing" in pair["answer"]) == (place not in after)


def test_the_readers_of_the_real_data_sets_read_it(drawn):
    for part, count in (("train", 20), ("held_out", 2)):
        args = argparse.Namespace(datasets=NAMES, concatenate=None, samples=["all"], seed=0, data_path=drawn / part, out=drawn)
        for data in read_datasets(args):
            assert not data.left_out and not data.missing and len(data.drafts) >= count and data.name in DATASETS
            for turns in Epoch([data], [range(len(data.drafts))], 0, 0):
                assert 1 <= sum(len(turn.images) for turn in turns) <= 8
                assert all(turn.question and turn.answer.endswith(".") and "IMAGE#" not in turn.question + turn.answer for turn in turns)


def test_a_folder_that_is_there_is_kept(drawn):
    again = subprocess.run([sys.executable, ROOT / "demo/make.py", drawn], capture_output=True, text=True)
    assert again.returncode and str(drawn) in again.stderr and "Traceback" not in again.stderr


def test_the_bases_are_small_and_whole():
    files = [file for name in ("vision_model", "language_model") for file in (ROOT / "demo" / name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 4e6
    assert load_vit(ROOT / "demo/vision_model").config.image_tokens == 5
    language = load_llama(ROOT / "demo/language_model")
    assert len(Tokenizer(ROOT / "demo/language_model/tokenizer.model")) == language.config.vocab_size


def test_the_text_of_the_language_model_says_what_its_words_stand_for():
    """Questions about several pictures, answered again from the words alone that stand in their place"""
    number = {name.lower(): i for names in make.NAMES for i, name in enumerate(names)}
    checked, rng = Counter(), random.Random(0)

    def word(said):
        return re.sub(r"\d", lambda digit: make.NUMBERS[int(digit[0])].lower(), "".join(said.split()[1:]) or said)

    for _ in range(300):
        shown = []  # place -> what is there, of each picture
        for turn in make.conversation(rng, 3):
            for words in re.findall(r"picture tl(\w+) tr(\w+) bl(\w+) br(\w+)", turn["question"]):
                shown.append([one.lower() for one in words])
            question, answer = turn["question"].lower(), turn["answer"].lower().rstrip(".")
            if asked := re.search(r"which image has (.*)\?", question):
                assert [word(asked[1]) in things for things in shown] == [i == number[answer] for i in range(len(shown))], turn
            elif asked := re.search(r"which has more things, (.*) or (.*)\?", question):
                counts = [4 - shown[number[name]].count("nothing") for name in asked.groups()]
                assert answer == ("neither" if counts[0] == counts[1] else asked[1 + (counts[1] > counts[0])]), turn
            elif asked := re.search(r"what is at the (.*) in (.*)\?", question):
                assert word(answer) == shown[number[asked[2]]][make.PLACES.index(asked[1])], turn
            elif asked := re.search(r"how many things are in (.*)\?", question):
                assert answer == make.NUMBERS[4 - shown[number[asked[1]]].count("nothing")].lower(), turn
            elif question.startswith("picture") and answer.startswith("image"):
                assert answer == f"image {len(shown)}", turn
            checked[re.sub(" (a|the|in) .*|,.*", "", question.rpartition(". ")[2])] += bool(asked)
    assert min(checked[kind] for kind in ("which image has", "which has more things", "what is at", "how many things are")) > 30, checked
