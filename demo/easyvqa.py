#!/usr/bin/env python3
"""Turn the public easy-VQA set into LLaVA's file layout, so that real pictures and questions can be trained on.

    pip download --no-deps easy-vqa==1.0 -d data                     (3 MB, MIT licence, by Victor Zhou)
    python demo/easyvqa.py data/easy_vqa-1.0-py3-none-any.whl data/easyvqa

The train part (4,000 pictures of 64 x 64, 38,575 questions, 13 answers) becomes, below data/easyvqa,

    coco/train2017/000000000000.png ...       each picture as published, and seven times with its shape moved to another place
                                              and every other time mirrored: no question is about places
    llava/detail_23k.json                     a description of each of these, put together from the published answers
    llava/complex_reasoning_77k.json          one sample a picture as published: its last question
    llava/conversation_58k.json               every question about each of these, a round each
    alone/llava/conversation_58k.json         one question about each of these, as the test part asks, without rounds before
                                              it; every other one names what is seen: as published, seven of eight colours
                                              asked for are not there, and a model can live by answering so

and the official test part (1,000 pictures, 9,673 questions) becomes

    test.json                                 a script for chat.py: every question alone with its picture
    test_answers.csv                          the answers, in the same order

    python demo/easyvqa.py score data/easyvqa/test_answers.csv answers.csv      exact match of the answers that chat.py gave
"""
import csv
import io
import json
import random
import sys
import zipfile
from pathlib import Path

from PIL import Image, ImageChops, ImageOps

VARIANTS = 8
COLOURS = "black", "blue", "brown", "gray", "green", "red", "teal", "yellow"
SHAPES = "circle", "rectangle", "triangle"


def questions_of(archive, part):
    """{picture: [(question, answer), ...]} of one part, pictures in order of their number"""
    rounds = {}
    for question, answer, image in json.loads(archive.read(f"easy_vqa/data/{part}/questions.json")):
        rounds.setdefault(image, []).append((question, answer))
    return dict(sorted(rounds.items()))


def record(name, rounds):
    """One record of LLaVA's files: the picture stands before the first question"""
    turns = []
    for n, (question, answer) in enumerate(rounds):
        turns.append({"from": "human", "value": question if n else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": name[:-4], "image": name, "conversations": turns}


def true(question_and_answer):
    """Whether what a yes-or-no question names is in the picture: yes to "is there", no to "is there not" """
    question, answer = question_and_answer
    return (answer == "no") == bool({"no", "not"} & set(question.rstrip("?").split()))


def description(rounds):
    """"a red circle": what the answers about a picture say of its only shape, or None if they do not say enough"""
    said = set()
    for question, answer in rounds:
        words = question.rstrip("?").split()
        said.update({answer} | set(words) if words[0] == "what" else words if true((question, answer)) else ())
    colour, shape = said & set(COLOURS), said & set(SHAPES)
    return f"a {colour.pop()} {shape.pop()}" if len(colour) == len(shape) == 1 else None


def moved(picture, rng):
    """The picture with its shape at another place; its background is of one colour"""
    background = Image.new("RGB", picture.size, max(picture.getcolors(picture.width * picture.height))[1])
    left, top, right, bottom = ImageChops.difference(picture, background).getbbox()
    shape = picture.crop((left, top, right, bottom))
    background.paste(shape, (rng.randint(0, picture.width - shape.width), rng.randint(0, picture.height - shape.height)))
    return background


def main(wheel, out):
    """Write the files that the head of this file lists"""
    out, archive = Path(out), zipfile.ZipFile(wheel)
    if out.exists():
        print(f"{out} is already there; remove it to make it anew", file=sys.stderr)
        sys.exit(2)
    # the last stays empty: the records below alone/ show the pictures of the first
    for folder in ("coco/train2017", "coco/test2017", "llava", "alone/llava", "alone/coco/train2017"):
        (out / folder).mkdir(parents=True)
    files = {"llava/detail_23k": [], "llava/complex_reasoning_77k": [], "llava/conversation_58k": [],
             "alone/llava/conversation_58k": []}
    train = questions_of(archive, "train")
    for image, rounds in train.items():
        picture = Image.open(io.BytesIO(archive.read(f"easy_vqa/data/train/images/{image}.png"))).convert("RGB")
        for n in range(VARIANTS):
            name, variant = f"{n}{image:011d}.png", moved(picture, random.Random(f"{image} {n}")) if n else picture
            (ImageOps.mirror(variant) if n % 2 else variant).save(out / "coco/train2017" / name)
            files["llava/conversation_58k"].append(record(name, rounds))
            asked = [r for r in rounds if r[1] in ("yes", "no") and true(r)] if n % 2 else rounds
            one = record(name, [(asked or rounds)[n % len(asked or rounds)]])
            files["alone/llava/conversation_58k"].append(one | {"image": f"../../../coco/train2017/{name}"})
            if description(rounds):
                files["llava/detail_23k"].append(record(name, [("what does the image show?", description(rounds))]))
        files["llava/complex_reasoning_77k"].append(record(f"0{image:011d}.png", rounds[-1:]))
    for name, records in files.items():
        (out / f"{name}.json").write_text(json.dumps(records))
    script, answers = {}, []
    for image, rounds in questions_of(archive, "test").items():
        (out / f"coco/test2017/{image:012d}.png").write_bytes(archive.read(f"easy_vqa/data/test/images/{image}.png"))
        for question, answer in rounds:
            script[f"{len(answers):05d}"] = [[question, f"coco/test2017/{image:012d}.png"]]
            answers.append([f"{len(answers):05d}", answer])
    (out / "test.json").write_text(json.dumps(script))
    with open(out / "test_answers.csv", "w", newline="") as file:
        csv.writer(file).writerows([["test_name", "answer"], *answers])
    print(f"{len(train)} pictures x {VARIANTS} to train on, {len(answers)} test questions in {out}")


def score(expected, answers):
    """Print the share of questions whose answer is exactly the expected one, whole and by kind of answer"""
    expected, answers = ({row["test_name"]: row["answer"] for row in csv.DictReader(open(file, newline=""))}
                         for file in (expected, answers))
    right = {}
    for name, answer in expected.items():
        kind = answer if answer in ("yes", "no") else "shape" if answer in ("circle", "rectangle", "triangle") else "colour"
        right.setdefault(kind, []).append(answers.get(name) == answer)
    for kind, marks in sorted(right.items()):
        print(f"{kind:<8}{sum(marks):5} of {len(marks):5}  {sum(marks) / len(marks):.2%}")
    marks = [mark for marks in right.values() for mark in marks]
    print(f"{'all':<8}{sum(marks):5} of {len(marks):5}  {sum(marks) / len(marks):.2%}")


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "score":
        score(*sys.argv[2:])
    elif len(sys.argv) == 3:
        main(*sys.argv[1:])
    else:
        sys.exit(__doc__)
