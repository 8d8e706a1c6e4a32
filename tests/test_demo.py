"""The demo's drawings, what is said about them, its two models, and new ones. python -m pytest tests/test_demo.py"""
import argparse
import hashlib
import json
import random
import re
import shutil
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT
from PIL import Image, ImageColor
from safetensors import safe_open

from data import Epoch, Tokenizer, Turn, read_datasets
from mmca import attention_matrix
from model import load_llama, load_vit
from vision import InputError

sys.path.insert(0, str(ROOT / "demo"))
import bases  # noqa: E402
import figures  # noqa: E402
import make  # noqa: E402
import new_models  # noqa: E402
from new_models import learn_tokenizer  # noqa: E402

NAMES = ["llava", "llava_dial", "otter_mimicit_cgd", "llava_otter_blend", "sparkles_dialogue"]


def draw(*command):
    """demo/make.py with these words"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make.py", *map(str, command)])
        make.main()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The demo's data, small"""
    folder = tmp_path_factory.mktemp("demo") / "small"
    draw(folder, "--scenes", "32")
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
    assert [len(data.records) for data in sets] == [8, 4, 32, 2, 2, 32]
    for data in sets:
        assert len(data.left_out) == (240 if "blend" in data.name else 0), "LLaVA's are about the first two pairs"
        for turns in Epoch([data], None, 0, 0):
            assert 1 <= sum(len(turn.images) for turn in turns) <= 8
            assert len(turns) == 8 or "cgd" not in data.name and "three" not in data.name
            assert all(turn.question and turn.answer.endswith(".") and "IMAGE#" not in turn.question + turn.answer for turn in turns)


def test_a_folder_that_is_there_is_kept(drawn, capsys):
    """As this command makes it, it is not drawn anew; of another version or other flags it is named"""
    draw(drawn, "--scenes", "32")
    assert capsys.readouterr().out == f"{drawn} is already there\n"
    with pytest.raises(SystemExit) as stopped:
        draw(drawn)
    assert stopped.value.code and f"{drawn} is already there, not as this command makes it; remove it" in capsys.readouterr().err
    assert (drawn / "train/three.json").exists()


@pytest.mark.parametrize("folder", [ROOT / "demo", ROOT / "demo/causal"])
def test_the_bases_are_small_and_whole(folder):
    files = [file for name in ("vision_model", "language_model") for file in (folder / name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 4e6
    assert load_vit(folder / "vision_model").config.image_tokens == 5
    language = load_llama(folder / "language_model")
    assert len(Tokenizer(folder / "language_model/tokenizer.model")) == language.config.vocab_size


def test_the_bases_are_those_that_the_readme_states():
    stated = re.findall(r"^([0-9a-f]{64})  (\S+)$", (ROOT / "demo/README.md").read_text(), re.MULTILINE)
    assert len(stated) == 6
    for checksum, name in stated:
        assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == checksum, name


def test_what_the_language_model_is_told_answers_what_it_is_asked():
    """Questions about several pictures, answered again from the words alone that stand in their place"""
    number = {name.lower(): i for names in make.NAMES for i, name in enumerate(names)}
    checked, rng = Counter(), random.Random(0)

    def thing(said):
        return " ".join(said.removeprefix("a ").removeprefix("the ").split()[-2:])

    for n in range(300):
        shown = []  # the words of the quarters of each picture
        for turn in bases.about_some(rng, bases.LESSONS[n % len(bases.LESSONS)]):
            for rows in map(bases.tell, turn.images):
                assert rows.shape == (5, 3)
                first, *quarters = [" ".join(bases.WORDS[i] for i in row if i) for row in rows.tolist()]
                assert first == "picture" and all(q.startswith(place) for q, place in zip(quarters, make.PLACES))
                shown.append([thing(q.removeprefix(place).strip()) for q, place in zip(quarters, make.PLACES)])
            question, answer = turn.question.lower(), turn.answer.lower().rstrip(".")
            if asked := re.search(r"which image has (.*)\?", question):
                assert [thing(asked[1]) in things for things in shown] == [i == number[answer] for i in range(len(shown))], turn
            elif asked := re.search(r"which has more things, (.*) or (.*)\?", question):
                counts = [4 - shown[number[name]].count("nothing") for name in asked.groups()]
                assert answer == ("neither" if counts[0] == counts[1] else asked[1 + (counts[1] > counts[0])]), turn
            elif asked := re.search(r"what is at the (.*) in (.*)\?", question):
                assert thing(answer) == shown[number[asked[2]]][make.PLACES.index(asked[1])], turn
            elif asked := re.search(r"how many things are in (.*)\?", question):
                assert answer == make.NUMBERS[4 - shown[number[asked[1]]].count("nothing")].lower(), turn
            checked[re.sub(" (a|the|in) .*|,.*", "", question.rpartition(". ")[2])] += bool(asked)
        assert 1 <= len(shown) <= 3
    assert min(checked[kind] for kind in ("which image has", "which has more things", "what is at", "how many things are")) > 30, checked


def made(monkeypatch, out, *flags):
    """demo/bases.py of a few steps -> its exit code, 0 if it came to its end"""
    monkeypatch.setattr(sys, "argv", ["bases.py", str(out), "--steps", "7", "3", *flags])
    try:
        bases.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_both_bases_are_made_from_nothing_and_by_one_that_was_stopped_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bases, "SAVE_EVERY", 2)
    monkeypatch.setattr(bases, "TEXTS", 300)
    assert made(monkeypatch, tmp_path / "whole") == 0
    said = capsys.readouterr().out
    for part in ("language_model", "vision_model"):
        for file in (tmp_path / "whole/model" / part).iterdir():
            assert f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file}" in said
        assert {file.name for file in (tmp_path / "whole/model" / part).iterdir()} == {file.name for file in (ROOT / "demo" / part).iterdir()}

    # stopped behind five of seven steps of the first training, and, gone on with from its fourth, behind two of the second's
    for stop in (5, 5):
        steps = iter(range(stop))
        schedule = bases.schedule
        with monkeypatch.context() as patch:
            patch.setattr(bases, "schedule", lambda step, **sizes: (next(steps), schedule(step, **sizes))[1])
            with pytest.raises(StopIteration):
                made(monkeypatch, tmp_path / "stopped")
    assert made(monkeypatch, tmp_path / "stopped") == 0
    whole, stopped = content(tmp_path / "whole/model"), content(tmp_path / "stopped/model")
    assert whole == stopped

    capsys.readouterr()
    assert made(monkeypatch, tmp_path / "whole", "--steps", "7", "4") == 2, "a state of other steps is not gone on with"
    assert capsys.readouterr().err == f"bases.py: {tmp_path}/whole is not a folder that this command has begun; remove it, or name another\n"


def test_bases_that_have_never_met_mmca(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bases, "TEXTS", 300)
    met = []

    class Spy(bases.VisualChat):
        def forward(self, *args, **batch):
            met.append((type(self.vision_model), self.attention))
            return super().forward(*args, **batch)

    monkeypatch.setattr(bases, "VisualChat", Spy)
    assert made(monkeypatch, tmp_path, "--attention", "causal") == 0
    assert met == 7 * [(bases.Told, "causal")] + 3 * [(bases.ViT, "causal")]
    assert made(monkeypatch, tmp_path) == 2, "a folder of the other attention is not gone on with"
    assert "is not a folder that this command has begun" in capsys.readouterr().err


def test_a_tokenizer_learned_from_data(tmp_path):
    conversations = [[Turn(f"what color is the {shape}?", color)] for shape in ("cat", "dog") for color in ("red", "blue")]
    tokenizer = learn_tokenizer(conversations, 100_000, tmp_path / "t.model")
    assert 256 < len(tokenizer) < 1000, "smaller than asked, because the data cannot fill it"
    assert tokenizer.decode(tokenizer.encode("what color is the zebra ☃?\n")) == "what color is the zebra ☃?\n"
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    with pytest.raises(InputError, match="no tokenizer can be learned"):
        learn_tokenizer(conversations, 20, tmp_path / "t.model")
    half = learn_tokenizer([*conversations, [Turn("half a \ud83d character", "\udc00")]], 100_000, tmp_path / "t.model")
    assert half.decode(half.encode("half a \ud83d character")) == "half a ? character"
    han = [[Turn("".join(map(chr, range(0x4e00 + 10 * n, 0x4e00 + 10 * n + 10))), "好")] for n in range(40)]
    with pytest.raises(InputError, match=r"with vocab_size 384, as the language model's config.json has it: its characters take \d+$") as error:
        learn_tokenizer(han, 384, tmp_path / "t.model")
    enough = int(str(error.value).split()[-1])
    assert len(learn_tokenizer(han, enough, tmp_path / "t.model")) == enough, "what it names is enough"


def sizes_alone(folder, tower="tiny-clip", **changes):
    """Folders of a language model and a vision tower with a config.json alone, some settings of the first changed"""
    for name, source in (("language", "tiny-llama"), ("vision", tower)):
        (folder / name).mkdir(parents=True)
        shutil.copy(FIXTURES / source / "config.json", folder / name)
    file = folder / "language/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def new(monkeypatch, folder, out, *flags):
    """demo/new_models.py on the folders that `sizes_alone` made -> its exit code, 0 if it came to its end"""
    command = ["new_models.py", "--language_model", folder / "language", "--vision_model", folder / "vision", "--data_path", FIXTURES / "datasets",
               "--datasets", "llava", "llava_dial", "--out", out, *flags]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    try:
        new_models.main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def content(folder):
    """All that is below a folder: name -> bytes, None for a folder"""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("tower", ["tiny-clip", "tiny-qwen-visual"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_models_are_folders_that_open_in_the_sizes_of_their_configs(tmp_path, monkeypatch, capsys, tower, tied):
    folder, out = sizes_alone(tmp_path / "sizes", tower, vocab_size=400, tie_word_embeddings=tied), tmp_path / "some/out"
    shutil.copy(FIXTURES / "tiny-clip/preprocessor_config.json", folder / "vision")
    assert new(monkeypatch, folder, out) == 0
    language, vision = load_llama(out / "language_model"), load_vit(out / "vision_model")
    base, tokenizer = load_vit(FIXTURES / tower), Tokenizer(out / "language_model/tokenizer.model")
    config = json.loads((out / "language_model/config.json").read_text())
    assert config == json.loads((folder / "language/config.json").read_text()) and config["vocab_size"] == 400
    assert language.model.embed_tokens.weight.shape == (len(tokenizer), 64) and language.config.vocab_size == len(tokenizer) == 400
    assert (len(language.model.layers), language.config.head_dim, language.config.num_key_value_heads) == (3, 16, 2)
    assert (language.lm_head.weight is language.model.embed_tokens.weight) == tied
    shapes = {name: parameter.shape for name, parameter in base.named_parameters()}
    shapes |= {"attn_pool.query": (256, 128), "attn_pool.pos_embed": (256, 128)} if tower == "tiny-qwen-visual" else {}  # a config has no number of queries
    assert {name: parameter.shape for name, parameter in vision.named_parameters()} == shapes
    for name in ("config.json", "preprocessor_config.json"):
        assert (out / "vision_model" / name).read_bytes() == (folder / "vision" / name).read_bytes()
    for part, prefix in (("language_model", ""), ("vision_model", "vision_model." if tower == "tiny-clip" else "")):
        with safe_open(out / part / "model.safetensors", "pt") as file:
            assert all(file.get_slice(name).get_dtype() == "F32" and name.startswith(prefix) for name in file.keys())
    words, pictures = (sum(p.numel() for p in model.parameters()) for model in (language, vision))
    assert capsys.readouterr().out == f"{words:,} parameters in {out}/language_model, {pictures:,} in {out}/vision_model\n"
    assert set(content(tmp_path / "some")) == {
        "out", "out/language_model", "out/language_model/config.json", "out/language_model/model.safetensors", "out/language_model/tokenizer.model",
        "out/vision_model", "out/vision_model/config.json", "out/vision_model/model.safetensors", "out/vision_model/preprocessor_config.json"}


def test_new_models_are_random_by_their_seed(tmp_path, monkeypatch):
    folder = sizes_alone(tmp_path / "sizes", vocab_size=3000)
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        assert new(monkeypatch, folder, tmp_path / name, "--seed", seed) == 0
    one, again, two = (content(tmp_path / name) for name in ("one", "again", "two"))
    assert one == again and one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} == {"language_model/model.safetensors", "vision_model/model.safetensors"}
    for load, part in ((load_llama, "language_model"), (load_vit, "vision_model")):
        for (name, first), second in zip(load(tmp_path / "one" / part).named_parameters(), load(tmp_path / "two" / part).parameters()):
            assert name.endswith("bias") or "norm" in name or "layrnorm" in name or not torch.equal(first, second), name
            assert first.isfinite().all() and ("norm" in name or "bias" in name or first.std() > 0), name
    size = json.loads(one["language_model/config.json"])["vocab_size"]
    assert 384 < size < 3000, "smaller than asked, because the data cannot fill it"
    assert size == len(Tokenizer(tmp_path / "one/language_model/tokenizer.model")) == load_llama(tmp_path / "one/language_model").config.vocab_size


def test_new_models_learn_their_pieces_from_the_samples_asked_for_or_keep_their_own(tmp_path, monkeypatch):
    folder = sizes_alone(tmp_path / "sizes", vocab_size=3000)
    for name, flags in (("all", []), ("few", ["--samples", "1"])):
        assert new(monkeypatch, folder, tmp_path / name, *flags) == 0
    whole, few = (Tokenizer(tmp_path / name / "language_model/tokenizer.model") for name in ("all", "few"))
    assert len(few) < len(whole)
    own = FIXTURES / "tokenizer.model"
    shutil.copy(own, folder / "language")
    assert new(monkeypatch, folder, tmp_path / "own", "--datasets", "lava") == 0, "no data is read"
    assert (tmp_path / "own/language_model/tokenizer.model").read_bytes() == own.read_bytes()
    assert load_llama(tmp_path / "own/language_model").config.vocab_size == len(Tokenizer(own))


def test_new_models_replace_nothing_and_leave_nothing_half_written(tmp_path, monkeypatch, capsys):
    """What cannot be done is one sentence and exit code 2"""
    folder, small, out = sizes_alone(tmp_path / "sizes"), sizes_alone(tmp_path / "small", vocab_size=20), tmp_path / "out"

    def refused(*flags, folder=folder):
        before = content(tmp_path)
        assert new(monkeypatch, folder, out, *flags) == 2
        said = capsys.readouterr()
        assert not said.out and said.err.count("\n") == 1 and said.err.startswith("new_models.py: "), said.err
        assert content(tmp_path) == before
        return said.err

    assert "data set 'lava' is not known" in refused("--datasets", "lava")
    assert "nowhere/config.json cannot be read" in refused("--language_model", tmp_path / "nowhere")
    assert "nowhere/config.json cannot be read" in refused("--vision_model", tmp_path / "nowhere")
    assert "not supported by this LLaMA-2: model_type = 'clip'" in refused("--language_model", folder / "vision")
    assert "no tokenizer can be learned from this data with vocab_size 20" in refused(folder=small)
    for weights in ("language/model.safetensors", "language/model-00001-of-00002.safetensors", "vision/pytorch_model.bin"):
        (folder / weights).write_bytes(b"weights")
        assert f"{(folder / weights).parent} already holds weights, which random numbers would replace" in refused()
        (folder / weights).unlink()
    for part in ("language_model", "vision_model"):
        (out / part).mkdir(parents=True)
        assert f"{out / part} is already there; remove it, or name another --out" in refused()
        (out / part).rmdir()
    assert new(monkeypatch, folder, out) == 0, "an --out that holds other things is no obstacle"


def test_the_figure_in_readme_shows_m():
    """The committed file: the colour in the middle of each entry of MMCA's matrix, and of a row that CrA has not"""
    picture, modality = Image.open(ROOT / "assets/mmca.png").convert("RGB"), torch.tensor([[1, 1, 2, 2, 2, 1, 1, 1, 1, 1]])

    def seen(panel, row, column):
        left = figures.LEFT + panel * (10 * figures.CELL + figures.GAP)
        colour = picture.getpixel((left + column * figures.CELL + 9, figures.TOP + row * figures.CELL + 9))
        return [ImageColor.getrgb(figures.COLOURS[m]) for m in range(3)].index(colour)
    assert [[seen(2, row, column) for column in range(10)] for row in range(10)] == attention_matrix(modality, modality)[0].tolist()
    assert [seen(1, 3, column) for column in range(10)] == [0] * 10 and [seen(0, 3, column) for column in range(10)] == [1] * 4 + [0] * 6


def test_readme_counts_the_lines_of_the_files():
    """The table "Read in this order": lines above the first `# ---- what serves it`, and all"""
    rows = re.findall(r"^\| \[(\w+\.py)\].* \| (\d+) \| (\d+) \|$", (ROOT / "README.md").read_text(), re.M)
    counted = []
    for file, *_ in rows:
        lines = (ROOT / file).read_text().splitlines()
        counted.append((file, str(next(n for n, line in enumerate(lines) if line.startswith("# ---- what serves it"))), str(len(lines))))
    assert len(rows) == 6 and counted == rows
