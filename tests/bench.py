"""Measurements, as ratios of medians within one run: timings drift, ratios do not. Not a test.

    python tests/bench.py mmca      the fast path against the formula and against plain causal
                                    attention
    python tests/bench.py mmca --threads 1
    python tests/bench.py mmca --device cuda --dtype bfloat16
    python tests/bench.py data      reading pictures for training against Pillow alone; picture
                                    files of gigabytes
    python tests/bench.py vision    CLIP's ViT-L/14 against transformers' (where that is installed)
    python tests/bench.py qwen      Qwen-VL's 2B encoder from ten shards in bfloat16: time and
                                    memory; writes 4 GB to TMPDIR
    python tests/bench.py chat      time to the first token with and without what is kept; tokens
                                    per second against transformers (where it is installed) and
                                    against the memory's rate; memory
    python tests/bench.py chat --device cuda
                                    the same with LLaMA-2-7B's sizes in bfloat16
    python tests/bench.py rows      what of the rows that a batch computes is no filler, as samples
                                    come and sorted inside a step
    python tests/bench.py gpu --device cuda
                                    LLaMA-2-7B's sizes behind ViT-L/14 in bfloat16: training steps
                                    of MMCA and CA, layers as they are and compiled, then under
                                    ZeRO-3; with `--device cpu` a rehearsal in tiny sizes
    python tests/bench.py scale     a model of 1 GB over two processes with ZeRO-3: memory while it
                                    is loaded and saved
    python tests/bench.py memory 70b qwen-vl --gpus 64 --length 2448
                                    what a model and its training take, by formulas; nothing is
                                    loaded
"""
import argparse
import base64
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from chat import Chat, pick  # noqa: E402
from data import Epoch, Samples, Tokenizer, Turn, collate, encode, read_datasets  # noqa: E402
from mmca import (  # noqa: E402
    IMAGE, PAD, TEXT, attend, attend_explicit, attention_matrix, make_pattern)
import model as model_file  # noqa: E402
from model import (  # noqa: E402
    Llama, LlamaConfig, VisualChat, make_vit, plain_weights, read_llama_config, save_weights,
    vit_sizes, write_json)
from vision import (  # noqa: E402
    InputError, QwenConfig, ViT, ViTConfig, positive, read_preprocessing, read_vit_config)

LANGUAGE = {
    "7b": LlamaConfig(4096, 11008, 32, 32, 32, 128, 32000),
    "13b": LlamaConfig(5120, 13824, 40, 40, 40, 128, 32000),
    "70b": LlamaConfig(8192, 28672, 80, 64, 8, 128, 32000)}
VISION = {
    "clip-l": ViTConfig(1024, 4096, 24, 16, 224, 14),
    "qwen-vl": QwenConfig(4096, 8192, 48, 16, 448, 14, "gelu", class_token=False, width=1664)}


# ---- what several of them need -------------------------------------------------------------------

def medians(functions, rounds, wait=lambda: None):
    """Run every function once a round, in turn -> median seconds of each, after one round to warm
    up. wait: for a GPU"""
    times = [[] for _ in functions]
    for n in range(rounds + 1):
        for function, taken in zip(functions, times):
            began = time.perf_counter()
            function()
            wait()
            if n:
                taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in times]


def synchronize(device):
    """Wait for a GPU"""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()


def conversation(pictures, text, image_tokens=256):
    """Modality of `text` words spread evenly between and around pictures"""
    parts = [
        text * (i + 1) // (pictures + 1) - text * i // (pictures + 1)
        for i in range(pictures + 1)]
    return [
        m
        for i, words in enumerate(parts)
        for m in [TEXT] * words + [IMAGE] * (image_tokens if i < pictures else 0)]


# ---- mmca ----------------------------------------------------------------------------------------

def bench_mmca(args):
    """Forward and backward of one layer's attention, 8 heads of 64"""
    H, d = 8, 64
    batches = {
        "8 pictures x 256 + 400 text":
            [conversation(8, 400)],
        "4 rows: 8, 6, 4, 2 pictures, padded":
            [conversation(n, 400 - 20 * n) for n in (8, 6, 4, 2)]}
    new = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    for name, rows in batches.items():
        T = max(map(len, rows))
        modality = torch.tensor(
            [row + [PAD] * (T - len(row)) for row in rows],
            device=args.device)                                             # (B, T)
        ready, M = make_pattern(modality, modality), attention_matrix(modality, modality)
        q, k, v = (
            torch.randn(len(rows), H, T, d, requires_grad=True, **new)      # (B, H, T, d)
            for _ in range(3))
        arranged_q = torch.randn(
            len(rows), H, ready.num_words, d,
            requires_grad=True, **new)                                      # (B, H, n, d)
        arranged_k, arranged_v = (
            torch.randn(
                len(rows), H, ready.positions.shape[1], d,
                requires_grad=True, **new)                                  # (B, H, n + m, d)
            for _ in range(2))

        def both(forward, *inputs):
            gradient = torch.randn_like(forward(*inputs))

            def run():
                forward(*inputs).backward(gradient)
                for tensor in inputs:
                    tensor.grad = None
            return run

        functions = {
            "causal attention (torch's scaled_dot_product_attention)":
                both(partial(F.scaled_dot_product_attention, is_causal=True), q, k, v),
            "MMCA, attend":
                both(partial(attend, pattern=ready), arranged_q, arranged_k, arranged_v),
            "MMCA, the formula word for word":
                both(partial(attend_explicit, M=M), q, k, v),
            "making the pattern (once a forward, for all layers)":
                lambda: make_pattern(modality, modality)}
        causal, *others = medians(
            list(functions.values()), args.rounds, partial(synchronize, args.device))

        texts = (modality == TEXT).sum(1)                                   # (B)
        seen = ((modality == IMAGE).cumsum(1) * (modality == TEXT)).sum(1)  # (B)
        pairs = (texts * (texts + 1) / 2 + seen).sum() / (len(rows) * T * (T + 1) / 2)
        print(f"\n{name}: B {len(rows)}, T {T}; "
              f"pairs that MMCA counts: {pairs:.2f} of causal attention's")
        for label, seconds in zip(functions, (causal, *others)):
            print(f"  {label:<56} {seconds * 1000:8.1f} ms  {seconds / causal:6.3f} of causal")


# ---- data ----------------------------------------------------------------------------------------

def photograph(seed, size=(500, 375)):
    """A made-up JPEG of about the size and detail of a photograph in COCO"""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8))
        .resize(size, Image.Resampling.BICUBIC)
        for n in (4, 24, 120)]
    file = io.BytesIO()
    Image.blend(Image.blend(layers[0], layers[1], 0.4), layers[2], 0.3).save(
        file, "JPEG", quality=90)
    return file.getvalue()


def bench_data(args):
    """Samples per second of one process; then a picture file of gigabytes, read as train.py reads
    it"""
    fixtures = Path(__file__).parent / "fixtures"
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for n in range(128):
            files.append(f"{folder}/{n}.jpg")
            Path(files[-1]).write_bytes(photograph(n))
        samples = Samples(
            [[Turn("What is to be seen?", "A picture of many colours.", [file])] for file in files],
            Tokenizer(fixtures / "tokenizer.model"),
            257,
            read_preprocessing("nowhere", 224),
            4096,
            8)

        def pillow():
            for file in files:
                with Image.open(file) as image:
                    image.convert("RGB").resize((298, 224), Image.Resampling.BICUBIC)

        def ours():
            for first in range(0, len(files), 8):
                collate([samples[n] for n in range(first, first + 8)])

        alone, whole = medians([pillow, ours], args.rounds)
        size = sum(Path(f).stat().st_size for f in files) / len(files)
        print(f"\n{len(files)} JPEGs of 500 x 375, {size / 1000:.0f} kB each, batches of 8")
        print("  Pillow, decode and resize                                 "
              f"{len(files) / alone:8.1f} pictures/s")
        print("  read, decode, resize, normalize, tokens, collate          "
              f"{len(files) / whole:8.1f} samples/s   {alone / whole:6.3f} of Pillow")
    small, large = (bench_picture_file(n, fixtures) for n in (400, 20_000))
    print(f"  more resident memory with the large file: {(large - small) / 1e6:.0f} MB")


def bench_picture_file(count, fixtures):
    """Train on a made-up MIMIC-IT/SD.json of count pictures, twice -> the most resident memory of
    all processes (bytes; pages that they share counted once)"""
    with tempfile.TemporaryDirectory() as folder:
        mimic = Path(folder, "sets/MIMIC-IT")
        mimic.mkdir(parents=True)
        photographs = [
            base64.b64encode(photograph(n, (700, 525))).decode() for n in range(20)]
        with open(mimic / "SD.json", "w") as file:
            for n in range(count):
                print(
                    "{" if n == 0 else ",", f'"SD_IMG_{n}": "{photographs[n % 20]}"', file=file)
            print("}", file=file)
        data = {
            f"SD_INS_{n}": {
                "instruction": "What moved?",
                "answer": "Nothing.",
                "image_ids": [f"SD_IMG_{n}", f"SD_IMG_{n + 1}"],
                "rel_ins_ids": []}
            for n in range(0, count, 2)}
        (mimic / "SD_instructions.json").write_text(json.dumps({"data": data}))
        shutil.copytree(fixtures / "tiny-llama", f"{folder}/llama")
        shutil.copy(fixtures / "tokenizer.model", f"{folder}/llama")
        print(f"\n{count} pictures in a file of {(mimic / 'SD.json').stat().st_size / 1e9:.2f} GB")

        args = argparse.Namespace(
            data_path=Path(folder, "sets"), out=Path(folder, "out"),
            datasets=["otter_mimicit_sd"], concatenate=None, samples=["all"], seed=0)
        for name in ("first", "second"):
            began = time.perf_counter()
            read_datasets(args)
            print(f"  {name} start: the data set is read in {time.perf_counter() - began:.2f} s")

        run = subprocess.Popen(
            [sys.executable, "train.py",
             "--language_model", f"{folder}/llama",
             "--vision_model", fixtures / "tiny-clip",
             "--data_path", f"{folder}/sets",
             "--datasets", "otter_mimicit_sd",
             "--max_steps", "12",
             "--batch_size", "8",
             "--epochs", "1",
             "--eval_fraction", "0",
             "--out", f"{folder}/out"],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE)
        most = 0
        while run.poll() is None:
            try:
                family = [
                    psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
                most = max(most, sum(process.memory_full_info().pss for process in family))
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.01)
        if run.returncode:
            sys.exit(run.stderr.read().decode())
        print(f"  training, 12 steps of 8: {most / 1e6:.0f} MB resident at most, "
              "process and workers together")
        return most


# ---- vision and qwen -----------------------------------------------------------------------------

def bench_vision(args):
    """ViT-L/14, random weights, the same in both, pictures per second in batches of 1 and 8"""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14}
    theirs = CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()
    ours = ViT(ViTConfig(**sizes)).eval()
    ours.load_state_dict({
        k.removeprefix("vision_model."): v
        for k, v in theirs.state_dict().items()
        if not k.endswith("position_ids")})
    with torch.inference_mode():
        for batch in (1, 8):
            pixels = torch.randn(batch, 3, 224, 224)                        # (N, 3, S, S)
            apart = (ours(pixels) - theirs(pixels).last_hidden_state).abs().max()
            mine, other = medians([lambda: ours(pixels), lambda: theirs(pixels)], args.rounds)
            print(f"\nViT-L/14, batches of {batch}; largest difference of a feature {apart:.1e}")
            print(f"  transformers {version('transformers')}, CLIPVisionModel, "
                  f"{theirs.config._attn_implementation:<21}{batch / other:8.3f} pictures/s")
            print("  ViT                                                       "
                  f"{batch / mine:8.3f} pictures/s   {other / mine:6.3f} of transformers")


def bench_qwen(args):
    """Write Qwen-VL's encoder with random weights as ten .bin shards, open it in a new process,
    encode a picture"""
    with tempfile.TemporaryDirectory() as folder:
        names, index = {}, {}
        with torch.device("meta"):
            for n, (name, parameter) in enumerate(make_vit(VISION["qwen-vl"]).named_parameters()):
                names.setdefault(f"pytorch_model-{n % 10 + 1:05d}-of-00010.bin", []).append(
                    (f"transformer.visual.{name}", parameter.shape))
        for file, shapes in names.items():
            torch.save(
                {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
                 for name, shape in shapes},
                f"{folder}/{file}")
            index.update({name: file for name, _ in shapes})
        Path(folder, "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
        sizes = {
            "width": 1664,
            "layers": 48,
            "heads": 16,
            "image_size": 448,
            "patch_size": 14,
            "mlp_ratio": 4.9231,
            "output_dim": 4096}
        Path(folder, "config.json").write_text(json.dumps({"visual": sizes}))
        weights = sum(2 * shape.numel() for shapes in names.values() for _, shape in shapes)
        print(f"\nQwen-VL's encoder in ten .bin shards, {weights / 1e9:.2f} GB of bfloat16")

        for dtype in ("bfloat16", "float16"):
            code = (
                "import sys, time, torch; sys.path.insert(0, '.'); "
                "from model import load_vit; began = time.perf_counter()\n"
                f"tower = load_vit({folder!r}, torch.{dtype}); "
                "opened = time.perf_counter() - began\n"
                "with torch.inference_mode(): "
                f"features = tower(torch.randn(1, 3, 448, 448, dtype=torch.{dtype}))\n"
                "assert features.shape == (1, 256, 4096) and features.isfinite().all()\n"
                "print(f'opened in {opened:.1f} s, "
                "a picture in {time.perf_counter() - began - opened:.1f} s')")
            run = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=Path(__file__).parent.parent,
                stdout=subprocess.PIPE,
                text=True)
            most = 0
            while run.poll() is None:
                most = max(most, anonymous(run.pid))
                time.sleep(0.005)
            print(f"  run in {dtype}: {run.stdout.read().strip()}; "
                  f"anonymous memory (RssAnon) at most {most / 1e9:.2f} GB, "
                  f"{most / weights:.2f} of the weights")


def anonymous(pid):
    """Anonymous memory of a process (RssAnon) in bytes; 0 when it has ended"""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


# ---- scale ---------------------------------------------------------------------------------------

def bench_scale(args):
    """Write a language model with random weights in float16, then load and save it in bfloat16 as
    train.py does"""
    tower = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14}
    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "vocab_size": 32000}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, config in (
                ("vision", {"model_type": "clip_vision_model", **tower}),
                ("language", sizes)):
            (folder / name).mkdir()
            write_json(folder / name / "config.json", config)
        shutil.copy(Path(__file__).parent / "fixtures/tokenizer.model", folder / "language")
        torch.set_default_dtype(torch.float16)
        model = Llama(read_llama_config(folder / "language"))
        weights = sum(2 * p.numel() for p in model.parameters())
        model_file.SHARD_BYTES = 2.5e8  # a quarter of the model, as 1 GB is of one of 4
        save_weights(plain_weights(model), folder / "language/model.safetensors")
        save_weights(
            plain_weights(make_vit(ViTConfig(**tower))), folder / "vision/model.safetensors")
        del model
        print(
            f"\na language model of {weights / 1e9:.2f} GB in 16 bit, two processes, ZeRO-3; "
            "anonymous memory (RssAnon) above that before",
            flush=True)
        launcher = [
            Path(sys.executable).with_name("deepspeed"),
            "--num_accelerators", "2",
            "--master_port", "29518"]
        subprocess.run(
            [*launcher, __file__, "scale_process", "--folder", folder],
            check=True,
            cwd=Path(__file__).parent.parent)


def scale_process(args):
    """One of the two processes"""
    sys.argv = [
        "train.py",
        "--language_model", f"{args.folder}/language",
        "--vision_model", f"{args.folder}/vision",
        "--out", args.folder,
        "--batch_size", "2",
        "--micro_batch_size", "1"]
    flags = train.command_line()
    device = torch.device("cpu")
    deepspeed = train.start_distributed(device)
    flags.dtype = torch.bfloat16
    settings = train.engine_settings(flags, 1)
    weights = sum(
        file.stat().st_size for file in Path(args.folder, "language").glob("*.safetensors"))
    model_file.SHARD_BYTES = 2.5e8
    most, stop = [0], threading.Event()

    def watch():
        while not stop.wait(0.002):
            most[0] = max(most[0], anonymous(os.getpid()))

    threading.Thread(target=watch).start()
    before = anonymous(os.getpid())
    model = None
    for what in ("loaded", "saved"):
        most[0], began = 0, time.perf_counter()
        if what == "loaded":
            model, tokenizer = train.make_model(flags, device, deepspeed, settings)
        else:
            model.save_pretrained(Path(args.folder, "saved"), tokenizer)
        more = most[0] - before
        sys.stdout.write(
            f"  process {torch.distributed.get_rank()}: "
            f"{what} in {time.perf_counter() - began:.1f} s, "
            f"at most {more / 1e6:.0f} MB, {more / weights:.2f} of the model; "
            f"then {(anonymous(os.getpid()) - before) / 1e6:.0f} MB\n")
        torch.distributed.barrier()
    stop.set()


# ---- chat ----------------------------------------------------------------------------------------

class Words(Tokenizer):
    """The fixtures' tokenizer for a model with a larger vocabulary, all of which it may say"""

    def __init__(self, size):
        super().__init__(Path(__file__).parent / "fixtures/tokenizer.model")
        self.size = size

    def __len__(self):
        return self.size


def chat_model(device="cpu"):
    """CLIP's ViT-L/14 before a LLaMA of the shape of SmolLM-135M (head and embedding apart) in
    float32, on a GPU before LLaMA-2-7B in bfloat16; MMCA, random weights, made on the device"""
    torch.manual_seed(0)
    cpu = torch.device(device).type == "cpu"
    torch.set_default_dtype(torch.float32 if cpu else torch.bfloat16)
    small = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=4096)
    with torch.device(device):
        language = Llama(small if cpu else LANGUAGE["7b"])
        model = VisualChat(ViT(VISION["clip-l"]), language).eval()
    model.language_model.lm_head.weight.data[2] = 0  # never `</s>`: all answers are of one length
    model.preprocessing = read_preprocessing("nowhere", 224)
    return model, Words(model.language_model.config.vocab_size)


def stopwatch(model, names, wait):
    """Take the time of some of a model's methods -> a dict of seconds that grows. wait: for a
    GPU"""
    spent = dict.fromkeys(names, 0.0)

    def watched(name, method):
        def run(*args):
            began = time.perf_counter()
            result = method(*args)
            wait()
            spent[name] += time.perf_counter() - began
            return result
        return run

    for name in names:
        setattr(model, name, watched(name, getattr(model, name)))
    return spent


def bench_chat(args):
    """Ten rounds, known pictures, decoding, memory"""
    wait, on_gpu = partial(synchronize, args.device), torch.device(args.device).type != "cpu"
    model, tokenizer = chat_model(args.device)
    size = sum(p.numel() for p in model.language_model.parameters()) / 1e6
    print(f"\na LLaMA of {size:.0f}M parameters, ViT-L/14 (257 tokens a picture), random weights, "
          "MMCA; answers of 24 tokens")
    spent = stopwatch(model, ["encode_images", "keep_picture", "extend"], wait)

    def ask(talk, question, images, prepare=lambda: None):
        """One round -> (seconds to the first token and of the parts up to it, the answer's 24
        tokens)"""
        spent.update(dict.fromkeys(spent, 0.0))
        began = time.perf_counter()
        prepare()
        tokens = talk.ask(question, images, 24)
        first = next(tokens)
        return [time.perf_counter() - began, *spent.values()], [first, *tokens]

    def forget():  # everything is computed again, as the original does
        anew.cache.truncate(0)
        anew.known.clear()
        anew.rounds = [
            replace(
                r,
                ids=list(r.ids),
                pictures=[anew.look_at(path) for path in r.turn.images])
            for r in talk.rounds]

    with tempfile.TemporaryDirectory() as folder:
        pictures = [f"{folder}/{n}.jpg" for n in range(13)]
        for n, file in enumerate(pictures):
            Path(file).write_bytes(photograph(n))
        talk, anew = Chat(model, tokenizer), Chat(model, tokenizer)
        ask(talk, "Warm up.", pictures[12:])
        talk.clear()

        print("seconds to the first token "
              "(vision tower, decoder on pictures, decoder on words):")
        for n in range(10):
            question = f"And what is to be seen in round number {n}, please?"
            shown = pictures[n // 2:n // 2 + 1] if n in (0, 2, 4, 6) else []
            again, expected = ask(anew, question, shown, forget)
            ours, said = ask(talk, question, shown)
            assert on_gpu or said == expected, "the answers differ"
            kept, again_ = (
                f"{first:6.2f} ({', '.join(f'{part:.2f}' for part in parts)})"
                for first, *parts in (ours, again))
            same = sum(one == other for one, other in zip(said, expected))
            print(f"  round {n + 1:2}, {len(talk.said()[0]):4} tokens {kept}"
                  f"   everything again {again_}"
                  f"   {again[0] / ours[0]:5.1f} times, {same} of 24 tokens the same")

        for what, question, shown in (
                ("8 pictures after /clear, read anew", "What do these have in common?",
                 pictures[4:12]),
                ("the round after that              ", "Why?",
                 []),
                ("8 pictures after /clear, known    ", "What do these have in common?",
                 pictures[4:12])):
            if shown:
                talk.clear()
            parts, _ = ask(talk, question, shown)
            print(f"  {what} {parts[0]:6.2f} ({', '.join(f'{part:.2f}' for part in parts[1:])})")

    bench_decoding(args, model, talk)
    if not on_gpu:
        subprocess.run(
            [sys.executable, __file__, "chat_memory", "--threads", str(args.threads)],
            check=True,
            # what is freed goes back to the system
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})


def bench_decoding(args, model, talk):
    """Tokens per second of greedy answers after 300 tokens: chat's, transformers', and the limit
    that reading the weights sets"""
    config, on_gpu = model.language_model.config, torch.device(args.device).type != "cpu"
    ids, steps = torch.randint(3, config.vocab_size, (1, 300), device=args.device), 48
    texts = torch.full_like(ids, TEXT)                                      # (1, 300)

    def ours(chat, count):
        chat.cache.truncate(0)
        said = [pick(model.extend(ids, texts, chat.cache))]
        while len(said) < count:
            said.append(pick(chat.extend(said[-1])))
        return said

    runs = {"chat": partial(ours, talk)}
    if on_gpu:
        began = time.perf_counter()
        ours(talk, 2)
        print("\nthe first two tokens, layers compiled and noted in a graph on the way: "
              f"{time.perf_counter() - began:.2f} s")
        for label in ("a graph of layers as they are", "without a graph"):
            chat = Chat(model, talk.tokenizer)
            chat.compiled, chat.fixed = False, label != "without a graph"
            runs[label] = partial(ours, chat)
    if find_spec("transformers"):
        from transformers import LlamaConfig as TheirConfig
        from transformers import LlamaForCausalLM
        with torch.device(args.device):
            theirs = LlamaForCausalLM(TheirConfig(**asdict(config), eos_token_id=None)).eval()
        theirs.load_state_dict(model.language_model.state_dict())

        def generate(count, **settings):
            return theirs.generate(
                ids, attention_mask=texts, max_new_tokens=count, do_sample=False, pad_token_id=0,
                **settings)[0, 300:].tolist()

        runs[f"transformers {version('transformers')}"] = generate
        if on_gpu:
            runs["transformers, static cache"] = partial(generate, cache_implementation="static")

    large = (
        torch.randn(8192, 16384, device=args.device) if not on_gpu
        else torch.randn(32768, 32768, device=args.device))
    row = torch.randn(1, 1, large.shape[1], device=args.device)
    limits = {"torch.mv with a large matrix": lambda: torch.mv(large, row[0, 0])}
    if not on_gpu:
        parts = large.view(args.threads, -1, large.shape[1]).transpose(1, 2)
        limits["the same in one part for each thread"] = (
            lambda: torch.bmm(row.expand(args.threads, 1, -1), parts))

    answers = {}
    for label in list(runs):  # once through: what compiles has compiled
        try:
            answers[label] = runs[label](steps + 1)
        except RuntimeError as error:  # transformers compiles where the cache is static
            print(f"{label} failed: {type(error).__name__} {str(error).splitlines()[0]}")
    functions = {
        (label, count): partial(runs[label], count)
        for label in answers
        for count in (1, steps + 1)}
    measured = functions | limits
    with torch.inference_mode():
        taken = medians(list(measured.values()), args.rounds, partial(synchronize, args.device))
    times = dict(zip(measured, taken))

    each = large.element_size()
    embedding = model.language_model.model.embed_tokens.weight
    read = each * (sum(p.numel() for p in model.language_model.parameters()) - embedding.numel())
    read += (
        2 * each * (300 + steps // 2)
        * config.num_hidden_layers * config.num_key_value_heads * config.head_dim)
    token = {
        label: (times[label, steps + 1] - times[label, 1]) / steps
        for label in answers}
    print(f"\ndecoding after 300 tokens, {read / 1e6:.0f} MB of weights and cache read for a token")
    for label, seconds in token.items():
        same = sum(one == other for one, other in zip(answers["chat"], answers[label]))
        assert on_gpu or same == steps + 1, "the answers differ"
        print(f"  {label:28} {1 / seconds:6.1f} tokens/s, {1000 * seconds:5.1f} ms; "
              f"chat is {seconds / token['chat']:5.2f} times as fast; "
              f"{same} of {steps + 1} tokens the same")
    for name in limits:
        rate = large.nbytes / times[name]
        print(f"  the limit by {name}, {rate / 1e9:.1f} GB/s: {1000 * read / rate:.1f} ms; "
              f"chat reaches {read / rate / token['chat']:.0%}")


# ---- rows ----------------------------------------------------------------------------------------

def bench_rows(args):
    """The demo's samples with 257 tokens a picture, two processes of micro-batches of 8"""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "demo/make.py", f"{folder}/demo"],
            check=True,
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.DEVNULL)
        sys.argv = [
            "train.py", "@demo/flags", "--data_path", f"{folder}/demo/train", "--out", folder]
        flags = train.command_line()
        flags.datasets[-1] = f"{folder}/demo/train/three.json"
        sets = read_datasets(flags)
        samples = Epoch(sets, None, 1234, 0)
        tokenizer = Tokenizer(
            Path(__file__).parent.parent / "demo/language_model/tokenizer.model")
        modality = [encode(turns, tokenizer, 257).modality for turns in samples]
    print(f"\n{len(samples)} samples of the demo, 257 tokens a picture, micro-batches of 8: "
          "share of the computed rows that are tokens")
    as_they_come = [range(n, min(n + 8, len(samples))) for n in range(0, len(samples), 8)]
    for step in (16, 128):
        flags.batch_size = step
        sorted_ = [
            part
            for rank in (0, 1)
            for part in train.deal(samples, flags, rank, 2)
            if part]
        assert sorted(n for part in sorted_ for n in part) == list(range(len(samples)))
        for attention in ("mmca", "causal"):
            shares = []
            for parts in (as_they_come, sorted_):
                padded = [
                    torch.nn.utils.rnn.pad_sequence(
                        [modality[n] for n in part], batch_first=True, padding_value=PAD)
                    for part in parts]                                      # of (B, T)
                computed = sum(
                    make_pattern(batch, batch, attention).positions.numel() for batch in padded)
                shares.append(sum(map(len, modality)) / computed)
            print(f"  {attention:7} steps of {step:3}: "
                  f"as they come {shares[0]:.3f}, sorted inside a step {shares[1]:.3f}")


# ---- gpu -----------------------------------------------------------------------------------------

def bench_gpu(args):
    """Recipe training: frozen layers, trained embedding and projection. Weights are made on the
    device"""
    torch.set_default_dtype(torch.bfloat16)
    device = torch.device(args.device)
    deepspeed = train.start_distributed(device)
    tiny, wait = device.type == "cpu", partial(synchronize, device)
    with torch.device(device):
        language = Llama(LlamaConfig(64, 128, 2, 4, 2, 16, 500) if tiny else LANGUAGE["7b"])
        tower = ViT(ViTConfig(64, 128, 2, 4, 28, 14) if tiny else VISION["clip-l"])
    model = VisualChat(tower, language).to(device)
    model.set_trained()
    side, P = 1024 if tiny else 8192, tower.config.image_tokens
    large = torch.randn(side, side, device=device)
    rate = 2 * side ** 3 / medians([lambda: large @ large], args.rounds, wait)[0]
    decoder = (
        sum(p.numel() for p in language.parameters())
        - language.model.embed_tokens.weight.numel())
    print(f"\n{decoder / 1e9:.2f}e9 parameters of a decoder behind a vision tower of {P} tokens "
          "a picture, random weights, frozen; embedding and projection trained")
    print(f"a product of two matrices of {side} x {side}: {rate / 1e12:.1f} TFLOPS; "
          "share: 4 x parameters x tokens / seconds, of that\n")
    batches = {
        "8 x (2 pictures + 396 words)": [conversation(2, 396, P)] * 8,
        "2 x (8 pictures + 400 words)": [conversation(8, 400, P)] * 2}

    def batch(rows):
        modality = torch.tensor(rows, device=device)                        # (B, T)
        ids = torch.randint(
            3, language.config.vocab_size, modality.shape,
            device=device) * (modality == TEXT)                             # (B, T)
        behind_a_word = F.pad(modality, (1, 0))[:, :-1] == TEXT             # (B, T)
        # half of the words are trained
        odd = torch.arange(modality.shape[1], device=device) % 2 == 1       # (T)
        labels = torch.where(
            (modality == TEXT) & behind_a_word & odd, ids, -100)            # (B, T)
        pictures = int((modality == IMAGE).sum()) // P
        pixels = torch.randn(
            pictures, 3, tower.config.image_size, tower.config.image_size,
            device=device)                                                  # (N, 3, S, S)
        return [ids, modality, labels, pixels, torch.arange(pictures, device=device)]

    def report(label, name, step):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step(), wait()
        first = time.perf_counter() - began
        seconds = medians([step], args.rounds, wait)[0]
        tokens = sum(map(len, batches[name]))
        memory = (
            f", {torch.cuda.max_memory_allocated() / 1e9:.0f} GB at most"
            if device.type == "cuda" else "")
        print(
            f"  {label:34} {name:28} {tokens / seconds:10,.0f} tokens/s, "
            f"share {4 * decoder * tokens / seconds / rate:.2f}{memory}; first step {first:.1f} s",
            flush=True)

    data = {name: batch(rows) for name, rows in batches.items()}
    trained = [p for p in model.parameters() if p.requires_grad]

    def step(name):
        model(*data[name])[0].mean().backward()
        model.zero_grad(set_to_none=True)

    flags = argparse.Namespace(
        batch_size=8, micro_batch_size=8, zero_stage=3, learning_rate=1e-5, dtype=torch.bfloat16,
        deepspeed_config=None)
    settings = train.engine_settings(flags, 1)
    for label in ("layers as they are", "compiled"):
        if label == "compiled":
            train.compile_layers(model, deepspeed, settings)
        for model.attention in ("causal", "mmca"):
            for name in batches:
                report(f"{model.attention}, {label}", name, partial(step, name))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings)

    def engine_step(name):
        engine.backward(engine(*data[name])[0].mean())
        engine.step()

    for model.attention in ("causal", "mmca"):
        name = next(iter(batches))
        report(f"{model.attention}, compiled, ZeRO-3", name, partial(engine_step, name))


# ---- the memory of chat, in a process of its own -------------------------------------------------

def chat_memory(args):
    """What tokens and pictures of a conversation add to a process's anonymous memory"""
    model, tokenizer = chat_model()
    config, talk = model.language_model.config, Chat(model, tokenizer)
    each = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    with tempfile.TemporaryDirectory() as folder:
        pictures = [f"{folder}/{n}.jpg" for n in range(9)]
        for n, file in enumerate(pictures):
            Path(file).write_bytes(photograph(n))
        list(talk.ask("Warm up.", pictures[8:], 8))
        print("\nmemory of a conversation (RssAnon)")
        before, held = anonymous(os.getpid()), talk.cache.length
        for _ in range(10):
            list(talk.ask("Go on. " * 20, [], 40))
        grown, tokens = anonymous(os.getpid()) - before, talk.cache.length - held
        print(f"  {tokens} tokens of text: {grown / tokens:9,.0f} bytes a token; "
              f"by the formula 2 L K d x 4 bytes: {each:,}")
        talk.clear()
        before = anonymous(os.getpid())
        for path in pictures[:8]:
            talk.look_at(path)
        grown = anonymous(os.getpid()) - before
        print(f"  8 pictures kept:     {grown / 8:10,.0f} bytes a picture; "
              f"by the formula 257 x 2 L K d x 4 bytes: {257 * each:,}")


# ---- memory --------------------------------------------------------------------------------------

def describe(language, vision, attention, projection):
    """Print the parts of a model: parameters, trained or frozen by the recipe, bytes -> it, on
    torch's meta device"""
    for name, known in ((language, LANGUAGE), (vision, VISION)):
        if name not in known and not Path(name).is_dir():
            raise InputError(f"{name} is neither a folder nor one of {', '.join(known)}")
    with torch.device("meta"):
        weights = [
            file for kind in ("*.safetensors", "*.bin") for file in Path(vision).glob(kind)]
        tower = make_vit(
            VISION.get(vision) or (vit_sizes if weights else read_vit_config)(vision))
        model = VisualChat(
            tower,
            Llama(LANGUAGE.get(language) or read_llama_config(language)),
            attention,
            projection)
    model.set_trained()
    parts = Counter()
    together = Counter({("together", "trained"): 0, ("together", "frozen"): 0})
    for name, parameter in model.named_parameters():
        depth = 3 if name.startswith("language_model.model") else 2 if "_model." in name else 1
        state = "trained" if parameter.requires_grad else "frozen"
        parts[".".join(name.split(".")[:depth]), state] += parameter.numel()
        together["together", state] += parameter.numel()
    together["together", ""] = together.total()
    print(f"{'part':36}{'parameters':>16}{'':10}{'bytes, 16 bit':>18}")
    for (name, state), count in (*parts.items(), *together.items()):
        print(f"{name:36}{count:16,}  {state:8}{2 * count:18,}")
    size = tower.config.image_size
    print(f"a picture of {size} x {size} takes {model.image_tokens} tokens")
    return model


def states(weights, trained, gpus, stage):
    """Bytes on each GPU of (weights, gradients, optimizer) for so many numbers in the whole model
    and trained ones.

    ZeRO, arXiv:1910.02054, section 3.1: 2 bytes a weight, 2 a gradient, 12 for Adam (weight,
    momentum and variance in float32). Section 5: stage 1 spreads the optimizer's over the GPUs, 2
    the gradients too, 3 the weights too."""
    sizes = (2 * weights, 3), (2 * trained, 2), (12 * trained, 1)
    return tuple(size // gpus if stage >= spread else size for size, spread in sizes)


def activations(config, tokens, checkpointing=False):
    """Bytes that the backward pass of the recipe (frozen layers) needs from a forward pass of so
    many tokens, 16 bit.

    Counted as arXiv:2205.05198, section 4.1, counts GPT's; attention's matrix is never kept (MMCA's
    mask is, 2 bytes for each word and image token of a sample, which is not counted: little beside
    the rest). Of each layer: two norms keep their input in float32 (8 D), attention q, k, v, its
    result and, for each head, the sum of its softmax (4 H d + 4 K d + 4 H), SwiGLU two halves and
    their product's factor (6 F). After them the last norm (4 D) and the logarithms of the head's
    softmax (4 V). With checkpointing each layer keeps its input (2 D), one of them all. Every token
    counts as a trained word: the most that it can be, since image tokens ask for nothing and are
    not trained."""
    D, F_, V = config.hidden_size, config.intermediate_size, config.vocab_size
    L = config.num_hidden_layers
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    layer = 8 * D + 4 * H * d + 4 * K * d + 4 * H + 6 * F_
    return tokens * ((L * 2 * D + layer if checkpointing else L * layer) + 4 * D + 4 * V)


def bench_memory(args):
    """Of a model's parts and, with --gpus, of training it, without communication buffers"""
    try:
        if len(args.sizes) != 2:
            raise InputError(
                "memory takes a language model and a vision tower: folders, or of "
                f"{', '.join(LANGUAGE)} and {', '.join(VISION)}")
        model = describe(*args.sizes, args.attention, args.projection)
    except InputError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
    if args.gpus:
        counts = [
            sum(p.numel() for p in model.parameters() if p.requires_grad or every)
            for every in (True, False)]
        names = "weights", "gradients", "optimizer", "together"
        print(f"\n{f'bytes on each of {args.gpus} GPUs':24}"
              + "".join(f"{name:>18}" for name in names))
        for stage in range(4):
            each = states(*counts, args.gpus, stage)
            print(f"{f'ZeRO {stage}':24}"
                  + "".join(f"{size:18,}" for size in (*each, sum(each))))
        for name, again in (("activations", False), ("with checkpointing", True)):
            size = activations(
                model.language_model.config, args.micro_batch_size * args.length, again)
            print(f"{name:24}{'':54}{size:18,}")


# ---- the command line ----------------------------------------------------------------------------

def main():
    """The command line"""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[
        "mmca", "data", "vision", "qwen", "scale", "scale_process", "chat", "chat_memory", "rows",
        "gpu", "memory"])
    parser.add_argument("sizes", nargs="*", metavar="SIZES",
                        help="of memory: a language model and a vision tower, folders or names")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=9, help="medians of so many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="of mmca, chat and gpu")
    parser.add_argument("--dtype", default="float32", help="of mmca")
    parser.add_argument("--attention", choices=["mmca", "causal", "cross"], default="mmca",
                        help="of memory")
    parser.add_argument("--projection", choices=["linear", "vit", "perceiver"], default="linear",
                        help="of memory")
    parser.add_argument("--gpus", type=positive,
                        help="of memory: also what training takes on each of so many")
    parser.add_argument("--micro_batch_size", type=positive, default=1,
                        help="of memory: samples at once on each")
    parser.add_argument("--length", type=positive, default=4096,
                        help="of memory: tokens of each sample")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as `model.choose_device`
    if args.what == "scale_process":
        return scale_process(args)
    if args.what == "chat_memory":
        return chat_memory(args)
    if args.what == "memory":
        return bench_memory(args)

    on_gpu = args.device.startswith("cuda")
    name = (
        torch.cuda.get_device_name(args.device) if on_gpu
        else f"{platform.machine()}, {args.threads} threads")
    dtype = "bfloat16" if args.what == "gpu" or args.what == "chat" and on_gpu else args.dtype
    print(f"{name}, torch {torch.__version__}, {dtype}")
    benches = {
        "mmca": bench_mmca,
        "data": bench_data,
        "vision": bench_vision,
        "qwen": bench_qwen,
        "scale": bench_scale,
        "chat": bench_chat,
        "rows": bench_rows,
        "gpu": bench_gpu}
    benches[args.what](args)


if __name__ == "__main__":
    main()
