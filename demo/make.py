#!/usr/bin/env python3
"""Draw the demo's pictures and write what is said about them in the file layouts of the real data sets.

    python demo/make.py data/demo       train/ and held_out/, about different pictures

A picture of 64 x 64 has one to three things in its quarters (the second of a pair can have four): shapes in colours and
two sizes, digits, short words. Below train/ and held_out/, with N of 1,000 and 100 (--scenes):

    coco/train2017/000000000000.jpg ...     the pictures of LLaVA and of the pairs
    llava/detail_23k.json                   N descriptions
    llava/complex_reasoning_77k.json        N questions that take a step of thought
    llava/conversation_58k.json             N conversations of one to three rounds; one round about each picture of a pair
    MIMIC-IT/CGD_instructions.json          N pairs of pictures that differ in one thing, three questions about each
    SparklesDialogueCC/, SparklesDialogueVG/    N dialogues about two or three pictures, in CC all shown at once
"""
import argparse
import json
import random
import shutil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, FINE = 64, 2  # pixels of a picture; so many times finer it is drawn
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 50), "blue": (40, 70, 220), "yellow": (240, 200, 30)}
INK = 20, 20, 20
SHAPES, SIZES = ("circle", "square", "triangle"), {"small": 0.22, "large": 0.42}  # radius, of a quarter's side
WORDS = "sun", "cat", "map", "joy"
PLACES = "top left", "top right", "bottom left", "bottom right"
NUMBERS = "None", "One", "Two", "Three", "Four"


# ---- scenes: a dict of place -> thing, a thing is a tuple of words ---------------------------------------------------

def thing(rng):
    """("large", "red", "circle"), ("digit", "7") or ("word", "sun")"""
    kind = rng.random()
    if kind < 0.7:
        return rng.choice(tuple(SIZES)), rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
    return ("digit", str(rng.randrange(10))) if kind < 0.85 else ("word", rng.choice(WORDS))


def scene(rng):
    """One to three things"""
    places = rng.sample(PLACES, rng.randint(1, 3))
    return {place: thing(rng) for place in PLACES if place in places}


def changed(before, rng):
    """A scene that differs from another at one place"""
    after, place = dict(before), rng.choice(PLACES)
    after.pop(place, None)
    if place not in before or not after or rng.random() < 0.8:
        after[place] = next(new for new in iter(lambda: thing(rng), None) if new != before.get(place))
    return {place: after[place] for place in PLACES if place in after}


def name(what):
    """"a large red circle", "the digit 7", "the word sun" or "nothing" """
    return "nothing" if what is None else f"{'a' if len(what) == 3 else 'the'} {' '.join(what)}"


def listed(names):
    """"a small red circle, the digit 7 and the word sun" """
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part) or "nothing"


def sentence(text):
    """With a capital and a full stop"""
    return text[0].upper() + text[1:] + "."


def draw(things, rng):
    """A scene as a picture on a light ground, each thing somewhere near the middle of its quarter"""
    half = SIDE * FINE // 2
    picture = Image.new("RGB", (2 * half, 2 * half), tuple(rng.randint(225, 255) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    for place, what in things.items():
        x, y = (half * ((side in place) + 0.5) + FINE * rng.uniform(-2, 2) for side in ("right", "bottom"))
        if len(what) == 2:
            font = ImageFont.load_default(half * (0.85 if what[0] == "digit" else 0.5))
            pen.text((x, y), what[1], INK, font, "mm")
            continue
        r, colour = half * SIZES[what[0]] * rng.uniform(0.9, 1.05), COLOURS[what[1]]
        if what[2] == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), colour)
        elif what[2] == "square":
            pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), colour)
        else:
            pen.regular_polygon((x, y + 0.15 * r, 1.1 * r), 3, fill=colour)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


# ---- what is said about them -----------------------------------------------------------------------------------------

def introduced(names):
    """"Here are image 1 and image 2. " """
    return f"Here {'are' if names[1:] else 'is'} {listed(names)}. " if names else ""


def described(things):
    """All that is in a scene"""
    return sentence(listed([f"{name(what)} at the {place}" for place, what in things.items()]))


def about_one(things, rng, where=""):
    """A question about one picture and its answer. where: "" or " in image 2" """
    place, kind = rng.choice(PLACES), rng.choice(["things", "shapes", "at", "at", "where", "colour", "read", "is there"])
    seen = list(things.values())
    if kind == "things":
        return f"How many things are there{where}?", sentence(NUMBERS[len(seen)])
    if kind == "shapes":
        return f"How many shapes are there{where}?", sentence(NUMBERS[sum(len(what) == 3 for what in seen)])
    if kind == "where" and len(set(seen)) == len(seen):
        there, what = rng.choice(list(things.items()))
        return f"Where is the {' '.join(what)}{where}?", sentence(f"at the {there}")
    for what in rng.sample(seen, len(seen)):
        if kind == "colour" and sum(other[-1] == what[-1] for other in seen) == 1 and len(what) == 3:
            return f"What colour is the {what[2]}{where}?", sentence(what[1])
        if kind == "read" and sum(other[0] == what[0] for other in seen) == 1 and len(what) == 2:
            return f"Which {what[0]} can be read{where}?", sentence(name(what))
    if kind == "is there":
        asked = rng.choice(seen) if rng.random() < 0.5 else thing(rng)
        there = "Yes." if any(asked[-2:] == what[-2:] for what in seen) else "No."
        return (f"Is there a {' '.join(asked[1:])}{where}?" if len(asked) == 3 else f"Can {name(asked)} be read{where}?"), there
    return f"What is at the {place}{where}?", sentence(name(things.get(place)))


def reasoning(things, rng):
    """A question that takes a step of thought"""
    shaped = [what for what in things.values() if len(what) == 3]
    if not shaped or rng.random() < 0.4:
        left, right = (sum(side in place for place in things) for side in ("left", "right"))
        more = "Left." if left > right else "Right." if right > left else "Neither."
        return "On which side are more things?", more
    word = rng.choice(rng.choice(shaped)[1:])
    rest = [name(what) for what in things.values() if word not in what]
    return f"What is left if every {word + ' thing' if word in COLOURS else word} is taken away?", sentence(listed(rest))


def about_all(scenes, names, rng):
    """A question about several pictures, called by these names, and its answer"""
    kind = rng.choice(["one", "one", "which", "which", "more"])
    if kind == "more" and len(scenes) == 2:
        first, second = map(len, scenes)
        return (f"Which has more things, {names[0]} or {names[1]}?",
                "Neither." if first == second else sentence(names[first < second]))
    if kind == "which":
        kinds = [{what[-2:] for what in things.values()} for things in scenes]
        alone = [(n, what) for n, own in enumerate(kinds) for what in sorted(own) if sum(what in other for other in kinds) == 1]
        if alone:
            n, what = rng.choice(alone)
            return f"Which image has {'a' if what[0] in COLOURS else 'the'} {' '.join(what)}?", sentence(names[n])
    n = rng.randrange(len(scenes))
    return about_one(scenes[n], rng, f" in {names[n]}")


def difference(before, after, names):
    """What was changed from one scene to another"""
    place = next(place for place in PLACES if before.get(place) != after.get(place))
    return (f"What is the difference between {names[0]} and {names[1]}?",
            sentence(f"at the {place}, {names[0]} has {name(before.get(place))} and {names[1]} has {name(after.get(place))}"))


# ---- files -----------------------------------------------------------------------------------------------------------

def record(file, rounds):
    """One record of LLaVA's files: the picture stands before the first question"""
    turns = []
    for n, (question, answer) in enumerate(rounds):
        turns += [{"from": "human", "value": question if n else f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": file[:-4], "image": file, "conversations": turns}


def write(folder, count, rng):
    """train/ or held_out/: the files that the head of this file lists"""
    sparkles = "SparklesDialogueCC", "SparklesDialogueVG"
    for name in ("coco/train2017", "llava", "MIMIC-IT", *(f"{source}/{part}" for source in sparkles for part in ("images", "annotations"))):
        (folder / name).mkdir(parents=True)
    detail, reason, dialogue, pairs, number = [], [], [], {}, 0

    def shown(things, into="coco/train2017", digits=12):
        nonlocal number
        file, number = f"{number:0{digits}}.jpg", number + 1
        draw(things, rng).save(folder / into / file, quality=95, subsampling=0)
        return file

    for n in range(count):
        things = scene(rng)
        file = shown(things)
        detail.append(record(file, [("Describe the image.", described(things))]))
        reason.append(record(file, [reasoning(things, rng)]))
        dialogue.append(record(file, [about_one(things, rng) for _ in range(rng.randint(1, 3))]))
    for n in range(count):
        before = scene(rng)
        both, names = (before, changed(before, rng)), ("image 1", "image 2")
        files = [shown(things) for things in both]
        for file, things in zip(files, both):
            dialogue.append(record(file, [about_one(things, rng)]))
        ids = [f"CGD_INS_{n}_{i}" for i in range(3)]
        for i, (question, answer) in enumerate([difference(*both, names), *(about_all(both, names, rng) for _ in range(2))]):
            pairs[ids[i]] = {"instruction": question, "answer": answer, "image_ids": [f"CGD_IMG_{file[:-4]}" for file in files],
                             "rel_ins_ids": [other for other in ids if other != ids[i]]}
    for source in sparkles:
        dialogues = []
        for n in range(count // 2):
            scenes, files, said = [], [], []
            for fresh in ([rng.randint(2, 3), 0] if source == sparkles[0] else [2, 1]):
                new = [scene(rng) for _ in range(fresh)]
                scenes += new
                files += [shown(things, f"{source}/images", 1)[:-4] for things in new]
                question, answer = about_all(scenes, [f"IMAGE#{file}" for file in files], rng)
                said.append({"role": "user", "content": introduced(
                    [f"IMAGE#{file}<Img><ImageHere></Img>" for file in files[len(files) - fresh:]]) + question,
                             "images": [{"image_id": file, "caption": described(things)} for file, things in
                                        zip(files[len(files) - fresh:], new)]})
                said.append({"role": "assistant", "content": answer})
            dialogues.append({"dialogue": said})
        (folder / source / f"annotations/{source}.json").write_text(json.dumps(dialogues))
    for file, content in (("llava/detail_23k", detail), ("llava/complex_reasoning_77k", reason), ("llava/conversation_58k", dialogue),
                          ("MIMIC-IT/CGD_instructions", {"meta": {}, "data": pairs})):
        (folder / f"{file}.json").write_text(json.dumps(content))


def main():
    """The command line"""
    parser = argparse.ArgumentParser(description="Draw the demo's pictures and write what is said about them.")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--scenes", type=int, default=1000, help="N of the head of this file (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of everything drawn (%(default)s)")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} is already there; remove it to draw it anew")
    unfinished = args.out.with_name(f".{args.out.name}.unfinished")  # a half of it is never taken for the whole
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished / "train", args.scenes, random.Random(f"train {args.seed}"))
    write(unfinished / "held_out", args.scenes // 10, random.Random(f"held out {args.seed}"))
    unfinished.rename(args.out)


if __name__ == "__main__":
    main()
