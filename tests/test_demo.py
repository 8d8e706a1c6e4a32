"""The demo's drawings, what is said about them, and its two models. python -m pytest tests/test_demo.py"""
import argparse
import json
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from data import Epoch, Tokenizer, read_datasets
from model import load_llama, load_vit

sys.path.insert(0, str(ROOT / "demo"))
import make  # noqa: E402

NAMES = ["llava", "llava_dial", "otter_mimicit_cgd", "llava_otter_blend", "sparkles_dialogue"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The demo's data, small"""
    folder = tmp_path_factory.mktemp("demo") / "small"
    subprocess.run([sys.executable, ROOT / "demo/make.py", folder, "--scenes", "32"], check=True)
    return folder


def seen(file):
    """What the pixels of a picture say: place -> the colour of the thing there, "ink" for digits and words"""
    picture, inks, things = np.asarray(Image.open(file).convert("RGB"), int), {**make.COLOURS, "ink": make.INK}, {}
    for place in make.PLACES:
        x, y = (32 * (side in place) for side in ("right", "bottom"))
        near = {name: int((abs(picture[y:y + 32, x:x + 32] - ink).sum(-1) < 60).sum()) for name, ink in inks.items()}
        if any(near.values()):
            things[place] = max(near, key=near.get)
    return things


def test_descriptions_say_what_the_pixels_show(drawn):
    for record in json.loads((drawn / "train/llava/detail_23k.json").read_text()):
        said = record["conversations"][1]["value"].lower().rstrip(".").replace(" and ", ", ").split(", ")
        said = {place: next((c for c in make.COLOURS if c in part.split()), "ink") for part in said for place in make.PLACES if place in part}
        assert said == seen(drawn / "train/coco/train2017" / record["image"]), record


def colour(said):
    """What `seen` finds of a thing: "a red circle" -> "red", "the digit 2" -> "ink", "nothing" -> None"""
    said = said.lower().rstrip(".")
    return None if said == "nothing" else next((c for c in make.COLOURS if c in said.split()), "ink")


def talks_of(file):
    """Conversations in own JSON -> for each question [(pictures so far, as `seen` sees them; question, answer)]"""
    for talk in json.loads(file.read_text()):
        shown, asked = [], []
        for turn in talk:
            shown = shown + [seen(file.parent / image) for image in turn.get("images", [])]
            asked.append((shown, turn["question"], turn["answer"]))
        yield asked


def pairs_of(file):
    """The same of CGD's pairs"""
    groups = {}
    for record in json.loads(file.read_text())["data"].values():
        groups.setdefault(tuple(record["image_ids"]), []).append((record["instruction"], record["answer"]))
    for images, asked in groups.items():
        shown = [seen(file.parent.parent / f"coco/train2017/{i.removeprefix('CGD_IMG_')}.jpg") for i in images]
        yield [(shown, *one) for one in asked]


def test_answers_about_several_pictures_say_what_the_pixels_show(drawn):
    """Colours and places from the pixels; what they cannot tell, from the descriptions in the same conversation"""
    held_out = [talk for file in (drawn / "held_out").glob("*.json") for talk in talks_of(file)]
    talks = [*talks_of(drawn / "train/three.json"), *pairs_of(drawn / "train/MIMIC-IT/CGD_instructions.json"), *held_out]
    checked = Counter()
    for talk in talks:
        told = {int(q[15]) - 1: a.lower() for _, q, a in talk if q.startswith("Describe image")}
        for shown, question, answer in talk:
            kind = " ".join(question.split()[:3])
            if asked := re.match(r"Which image has (.*)\?", question):
                right = int(answer[6]) - 1
                assert colour(asked[1]) in shown[right].values(), (question, answer)
                if told.keys() >= set(range(len(shown))):
                    words = asked[1].removeprefix("a ")
                    assert [words in told[n] for n in range(len(shown))] == [n == right for n in range(len(shown))], (question, answer, told)
            elif asked := re.match(r"At the (.*), image 1 has (.*) and image 2 has (.*)\.", answer):
                for n in (0, 1):
                    assert shown[n].get(asked[1]) == colour(asked[n + 2]), (question, answer)
                    assert {**shown[n], asked[1]: 0} == {**shown[0], asked[1]: 0}, "they differ elsewhere too"
            elif asked := re.match(r"What is at the (.*) in image (.)\?", question):
                assert shown[int(asked[2]) - 1].get(asked[1]) == colour(answer), (question, answer)
            elif asked := re.match(r"How many (things|shapes) are in image (.)\?", question):
                inks = shown[int(asked[2]) - 1].values()
                assert answer == make.NUMBERS[sum(asked[1] == "things" or ink != "ink" for ink in inks)] + ".", (question, answer)
            elif question == "Which has more things, image 1 or image 2?":
                first, second = map(len, shown)
                assert answer == ("Neither." if first == second else "Image 1." if first > second else "Image 2."), shown
            elif asked := re.match(r"Describe (?:image (.)|the image)\.", question):
                described = shown[int(asked[1] or len(shown)) - 1]
                assert all(f"{c} " in answer.lower() for c in described.values() if c != "ink") and answer.count(" at the ") == len(described)
                kind = "Describe"
            else:
                continue
            checked[kind] += 1
    assert min(checked[kind] for kind in ("Which image has", "What is at", "How many things", "How many shapes", "Which has more", "Describe")) >= 30, checked
    assert checked["What is the"] > 32 + 10, "differences, and not those alone that are held out"


def test_no_question_comes_twice_and_three_pictures_come_at_once_or_in_turn(drawn):
    talks = list(talks_of(drawn / "train/three.json"))
    assert {len(talk[0][0]) for talk in talks} == {1, 2, 3} and all(len(talk[-1][0]) == 3 for talk in talks)
    for talk in [*talks, *pairs_of(drawn / "train/MIMIC-IT/CGD_instructions.json")]:
        assert len({question for _, question, _ in talk}) == len(talk) == 8


def test_each_kind_of_question_is_held_out_as_the_first_of_a_conversation(drawn):
    pictures = {"which_of_two": 2, "difference": 2, "one_of_two": 2, "more_things": 2, "which_of_three": 3, "one_of_three": 3, "describe": 1, "one_picture": 1}
    assert {file.stem for file in (drawn / "held_out").glob("*.json")} == set(pictures)
    for kind, count in pictures.items():
        talks = list(talks_of(drawn / f"held_out/{kind}.json"))
        assert len(talks) == 32 and all(len(talk) == 1 and len(talk[0][0]) == count for talk in talks), kind


def test_the_readers_of_the_real_data_sets_read_it(drawn):
    names = [*NAMES, f"{drawn}/train/three.json"]
    args = argparse.Namespace(datasets=names, concatenate=None, samples=["all"], seed=0, data_path=drawn / "train", out=drawn)
    sets = read_datasets(args)
    assert [len(data.drafts) for data in sets] == [8, 4, 32, 2, 2, 32]
    for data in sets:
        assert not data.missing and len(data.left_out) == (240 if "blend" in data.name else 0), "LLaVA's are about the first two pairs"
        for turns in Epoch([data], [range(len(data.drafts))], 0, 0):
            assert 1 <= sum(len(turn.images) for turn in turns) <= 8
            assert len(turns) == 8 or "cgd" not in data.name and "three" not in data.name
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
