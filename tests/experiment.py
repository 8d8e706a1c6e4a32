"""The paper's claim at the size of a laptop: MMCA learns from as few samples as cross attention, at the cost of causal attention.

    python tests/experiment.py            causal, cross and mmca from demo/'s two models, 5 sizes of training set, 5 seeds each; at one
                                          size other rules for the image tokens, no LoRA, and (3 seeds) the three with three times
                                          the steps: 114 runs, one for each core at a time
    python tests/experiment.py --seeds 1  a fifth of it
    python tests/experiment.py --quick    causal, cross and mmca, 2 sizes, 1 seed, a third of the steps: minutes

Every run is a line in --out: the same command goes on where it was stopped, and prints at once where all is there. The data are the
demo's (`python demo/make.py data/demo`); what is trained, and how, is the demo's too, but without DeepSpeed, in one process and one
thread for each run. The figure needs matplotlib, as nothing else here does.
"""
import argparse
import hashlib
import json
import math
import os
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import model as visualchat  # noqa: E402
from data import Epoch, Tokenizer, collate, encode, read_datasets  # noqa: E402
from mmca import IMAGE, TEXT, attend_explicit, attention_matrix, make_pattern  # noqa: E402
from model import VisualChat, add_lora, load_llama, load_vit  # noqa: E402
from vision import load_image, positive, preprocess, read_preprocessing  # noqa: E402

# demo/flags: its data sets and their factors of concatenation
SETS = {"llava": 6, "llava_dial": 2, "otter_mimicit_cgd": 1, "sparkles_dialogue": 1, "data/demo/train/three.json": 1}
BATCH, RATE, RANK, WARMUP = 8, 6e-3, 16, 0.1  # and so are these
SIZES, STEPS = (250, 500, 1000, 2000, 4000), 600  # the same steps for every size
ABLATED, LONGER = 2000, 1800  # the size at which everything else is tried, and the larger number of steps
KINDS = "which_of_two", "difference", "one_of_two", "more_things", "which_of_three", "one_of_three", "describe", "one_picture"
ALONE = KINDS[-2:]  # the rest is asked about several pictures


# ---- other rules: modality (B, T) -> an edited M (B, T, T), and whether the sum of its two softmaxes is halved ---------

def union(modality):
    """One softmax over all that MMCA sees"""
    return attention_matrix(modality, modality).clamp(max=1), False


def earlier_text(modality):
    """Image tokens look at the text before them too, as the original's code lets them"""
    M, T = attention_matrix(modality, modality), modality.shape[1]
    past = torch.ones(T, T, dtype=torch.bool, device=M.device).tril()
    return M.masked_fill(past & (modality == IMAGE)[:, :, None] & (modality == TEXT)[:, None, :], 1), False


def own_number(modality):
    """Image tokens see the number in their picture's heading too, and nothing else: it stands two places before the first of them"""
    M, image = attention_matrix(modality, modality), modality == IMAGE
    place = torch.arange(modality.shape[1], device=modality.device)                          # (T)
    begins = image & ~image.roll(1, 1)                                                       # (B, T)
    number = (place * begins).cummax(1).values - 2                                           # (B, T)
    return M.masked_fill(image[:, :, None] & (place == number[:, :, None]), 1), False


def average(modality):
    """The mean of the two softmaxes instead of their sum, where a row has both"""
    return attention_matrix(modality, modality), True


MECHANISMS = {"causal": ("causal", None, RANK), "cross": ("cross", None, RANK), "mmca": ("mmca", None, RANK)}
ABLATIONS = {"one softmax over the union": ("mmca", union, RANK), "image tokens see earlier text": ("mmca", earlier_text, RANK),
             "image tokens see their number": ("mmca", own_number, RANK),
             "average instead of sum": ("mmca", average, RANK), "causal without LoRA": ("causal", None, 0), "mmca without LoRA": ("mmca", None, 0)}
VARIANTS = MECHANISMS | ABLATIONS  # name: attention, rule, rank of LoRA


def use_rule(rule):
    """Let VisualChat attend by `attend_explicit` and a rule's M: every token asks, as a word does under "causal", in reading order"""
    def order(modality, *_, **fill):
        who = make_pattern(modality, modality, "causal")
        who.rule = rule(modality)
        return who

    def look(q, k, v, who, cache=None):
        M, halved = who.rule
        out = attend_explicit(q, k, v, M)
        return out * torch.where((M == 2).any(-1), 0.5, 1.0)[:, None, :, None] if halved else out

    visualchat.make_pattern, visualchat.attend = order, look


# ---- one run ---------------------------------------------------------------------------------------------------------

def conversations(folder, datasets, seed, factors=None):
    """The conversations of some data sets in an order that the seed draws; factors: of concatenation"""
    args = argparse.Namespace(datasets=datasets, samples=["all"], concatenate=factors, seed=seed, data_path=folder, out=folder)
    sets = read_datasets(args)
    return list(Epoch(sets, None, seed, 0))


def held_out(data):
    """What is measured: {kind of question: conversations of one round about new scenes}"""
    return {kind: conversations(data / "held_out", [f"{data}/held_out/{kind}.json"], 0) for kind in KINDS}


def features_of(files, tower, preprocessing):
    """The frozen tower's features of every picture: {file: (P, Dv)}"""
    known = {}
    with torch.inference_mode():
        for n in range(0, len(files), 64):
            pixels = torch.stack([preprocess(load_image(file), preprocessing) for file in files[n:n + 64]])  # (64, 3, S, S)
            known.update(zip(files[n:n + 64], tower(pixels)))
    return known


def run(job):
    """Train on `size` conversations, measure on all that are held out -> what stands in a line of --out"""
    name, size, seed, steps, data, language_model, vision_model = job
    torch.set_num_threads(1)
    training, test = conversations(data / "train", list(SETS), seed, list(SETS.values()))[:size], held_out(data)
    attention, rule, rank = VARIANTS[name]
    if rule:
        use_rule(rule)
    torch.manual_seed(seed)
    model = VisualChat(load_vit(vision_model), load_llama(language_model), attention)
    if rank:
        add_lora(model.language_model.model.layers, rank)
    model.set_trained()
    files = sorted({image for talk in chain(training, *test.values()) for turn in talk for image in turn.images})
    features = features_of(files, model.vision_model, read_preprocessing(vision_model, model.vision_model.config.image_size))
    model.vision_model.forward = lambda features: features  # frozen: it has been asked once
    tokenizer = Tokenizer(language_model / "tokenizer.model")

    def examples(talks):
        encoded = [encode(talk, tokenizer, model.image_tokens) for talk in talks]
        for example in encoded:
            example.pixels = [features[image] for image in example.images]
        return encoded

    training, test = examples(training), {kind: examples(talks) for kind, talks in test.items()}

    trained, rise = [p for p in model.parameters() if p.requires_grad], round(WARMUP * steps)
    optimizer = torch.optim.AdamW(trained, RATE, (0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / rise if step < rise else (
        1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2)
    rng, left, began = random.Random(seed), [], time.process_time()
    for _ in range(steps):
        while len(left) < BATCH:
            left += rng.sample(training, len(training))
        now, left = sorted(left[:BATCH], key=lambda example: len(example.input_ids)), left[BATCH:]
        count = sum(int((example.labels != -100).sum()) for example in now)
        for half in (now[:BATCH // 2], now[BATCH // 2:]):  # of like lengths: less is padded
            (model(**collate(half))[0].sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    seconds, right = time.process_time() - began, {}
    with torch.inference_mode():
        for kind, asked in test.items():
            _, hits = model(**collate(asked))                                                # (tokens of all answers)
            answers = hits.split([int((example.labels != -100).sum()) for example in asked])
            right[kind] = sum(bool(answer.all()) for answer in answers)
    return {"kind": name, "size": size, "seed": seed, "steps": steps, "seconds": round(seconds, 1),
            "trained": sum(p.numel() for p in trained), "asked": {kind: len(asked) for kind, asked in test.items()}, "right": right}


# ---- all of them, the tables and the figure --------------------------------------------------------------------------

def spread(values):
    """Mean and standard deviation over the seeds, as text; of one seed its value"""
    values = [100 * value for value in values]
    return f"{statistics.mean(values):5.1f}" + (f" ± {statistics.stdev(values):3.1f}" if values[1:] else " " * 6)


def share(line, kinds):
    """The share of these kinds of questions that a run answered exactly"""
    return sum(line["right"][kind] for kind in kinds) / sum(line["asked"][kind] for kind in kinds)


def always_the_same(talks):
    """A line as of a run that answers each question by the most frequent answer of its kind: {kind: conversations}"""
    answers = {kind: Counter(turn.answer for turn, in asked) for kind, asked in talks.items()}
    return {"asked": {kind: each.total() for kind, each in answers.items()}, "right": {kind: max(each.values()) for kind, each in answers.items()}}


def table(lines, guess):
    """Print a row for each mechanism, size of training set and number of steps: held-out exact match in percent by kind of question"""
    columns = {kind: [kind] for kind in KINDS} | {"several pictures": [kind for kind in KINDS if kind not in ALONE]}
    rows = defaultdict(list)
    for line in lines:
        rows[line["size"], line["steps"], line["kind"]].append(line)
    print(f"{'samples':>7}{'steps':>7}  {'':28}" + "".join(f"{column:>18}" for column in columns) + f"{'trained':>12}{'s / step':>10}{'seeds':>7}")
    print(f"{'':16}{'the most frequent answer':28}" + "".join(f"{spread([share(guess, names)]):>18}" for names in columns.values()))
    for (size, steps, kind), runs in sorted(rows.items(), key=lambda row: (*row[0][:2], list(VARIANTS).index(row[0][2]))):
        seconds = statistics.median(line["seconds"] / steps for line in runs)
        print(f"{size:7}{steps:7}  {kind:28}" + "".join(f"{spread([share(line, names) for line in runs]):>18}" for names in columns.values())
              + f"{runs[0]['trained']:12,}{seconds:10.3f}{len(runs):7}")


def figure(lines, file):
    """Accuracy against the number of training samples, one panel for each kind of question, bars over the seeds"""
    try:
        import matplotlib
    except ImportError:
        return print("no figure: it is drawn by matplotlib (pip install matplotlib)")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    drawing, panels = pyplot.subplots(2, len(KINDS) // 2, figsize=(13, 6), sharex=True, sharey=True)
    for panel, kind in zip(panels.flat, KINDS):
        for name in MECHANISMS:
            runs = {size: [100 * share(line, [kind]) for line in lines if line["kind"] == name and line["size"] == size] for size in SIZES}
            runs = {size: values for size, values in runs.items() if values}
            panel.errorbar(list(runs), [statistics.mean(values) for values in runs.values()],
                           [statistics.stdev(values) if values[1:] else 0 for values in runs.values()], marker="o", capsize=3, label=name)
        panel.set(title=kind.replace("_", " "), xscale="log", xlabel="training samples", xticks=SIZES, xticklabels=SIZES)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    drawing.supylabel("held-out exact match, %")
    drawing.legend(*panels[0, 0].get_legend_handles_labels(), loc="upper center", ncols=len(MECHANISMS), frameon=False)
    drawing.tight_layout(rect=(0, 0, 1, 0.93))
    drawing.savefig(file, dpi=110)
    print(f"the figure is in {file}")


def identity(data, language_model, vision_model):
    """What a run depends on besides its own numbers, as a few letters: bases, data, recipe"""
    whole = hashlib.sha256(f"{SETS} {BATCH} {RATE} {RANK} {WARMUP}".encode())
    for file in sorted([*data.rglob("*.json"), language_model / "model.safetensors", vision_model / "model.safetensors"]):
        whole.update(file.read_bytes())
    return whole.hexdigest()[:12]


def main():
    """The command line"""
    parser = argparse.ArgumentParser(description="Causal attention, cross attention and MMCA on the demo's data.")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--seeds", type=positive, default=5, metavar="N", help="runs of each kind (%(default)s)")
    some.add_argument("--quick", action="store_true", help="2 sizes, 1 seed, 200 steps, no ablations")
    parser.add_argument("--out", type=Path, default=Path("out/experiment.jsonl"), help="a line for each run; those that are there are kept")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character
    args = parser.parse_args()
    data = Path("data/demo")
    if not data.is_dir():
        parser.error(f"{data} is not there; python demo/make.py {data} draws it")
    folders = data, ROOT / "demo/language_model", ROOT / "demo/vision_model"
    sizes, seeds, steps = (SIZES[1::2], 1, 200) if args.quick else (SIZES, args.seeds, STEPS)
    wanted = [(kind, size, seed, steps) for seed in range(1, seeds + 1) for size in sizes for kind in MECHANISMS]
    if not args.quick:
        wanted += [(name, ABLATED, seed, steps) for seed in range(1, seeds + 1) for name in ABLATIONS]
        wanted += [(name, ABLATED, seed, LONGER) for seed in range(1, min(seeds, 3) + 1) for name in MECHANISMS]
    names, same = ("kind", "size", "seed", "steps"), identity(*folders)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    lines = {tuple(line[name] for name in names): line for line in lines if line["identity"] == same}
    missing = sorted((run for run in wanted if run not in lines), key=lambda run: run[2])  # seed by seed
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that begin now: a run takes one core
    with get_context("spawn").Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:  # Ctrl-C, or a run that fails, ends all
        for line in tqdm(pool.imap_unordered(run, [(*each, *folders) for each in missing]), total=len(missing), unit="run", disable=not missing):
            lines[tuple(line[name] for name in names)] = line
            with open(args.out, "a") as file:
                print(json.dumps(line | {"identity": same}), file=file)
    table([lines[each] for each in wanted], always_the_same(held_out(data)))
    figure([lines[each] for each in wanted if each[3] == steps], args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
