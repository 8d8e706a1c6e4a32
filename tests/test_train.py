"""train.py as users start it, with tiny models. python -m pytest tests/test_train.py"""
import argparse
import fcntl
import json
import multiprocessing
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, ROOT, tiny_model
from safetensors.torch import load_file

from data import DATASETS, Epoch, Samples, Tokenizer, Turn, collate, encode, read_datasets
from model import Llama, VisualChat, load_llama, load_vit, plain_weights, read_llama_config, save_weights
import train
from train import batches, command_line, deal, engine_settings, finish_batch, own_device, parameter_groups, schedule, sentence_of
from vision import InputError, checkpoint_path, fixed_positions

LAUNCHER = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port", "29517"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "0"}
STARTER = """
import gc, json, os, resource, signal, sys, traceback
import deepspeed, torch.distributed.fsdp, deepspeed.ops.op_builder.all_ops, deepspeed.runtime.zero.muon.muon_optimizer  # else imported in each run
import train

def become(job, rank):
    os.setsid()
    for fd, file in ((0, os.devnull), (1, job["folder"] + "/run.out"), (2, job["folder"] + "/run.err")):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), fd)
    for kind, most in job["limits"].items():
        resource.setrlimit(getattr(resource, kind), (most, resource.getrlimit(getattr(resource, kind))[1]))
    for name, value in job["environment"].items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if job["processes"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["processes"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=job["port"])
    sys.argv = job["command"]
    code = 1
    try:
        exec(job["code"], {})
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # Python's own end takes half a second: it would copy what it shares with this process

gc.freeze()
for line in sys.stdin:
    job, children = json.loads(line), []
    for rank in range(job["processes"]):
        children.append(os.fork())
        if not children[-1]:
            become(job, rank)
    print(*children, flush=True)
    code = 0
    while children:  # as the launcher: one that fails takes the others along
        child, status = os.wait()
        children.remove(child)
        code = code or os.waitstatus_to_exitcode(status)
        for other in children if code else ():
            os.kill(other, signal.SIGTERM)
    print(code, flush=True)
"""


@cache
def starter():
    """A process that has imported train.py and DeepSpeed, which takes five seconds, and forks one for each run"""
    return subprocess.Popen([sys.executable, "-c", STARTER], cwd=ROOT, env=os.environ | ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True, start_new_session=True)


def heard(folder):
    """The next line of the starter, as numbers"""
    if not select.select([starter().stdout], [], [], 300)[0]:
        os.killpg(starter().pid, signal.SIGKILL)
        starter.cache_clear()
        raise TimeoutError((folder / "run.err").read_text())
    return list(map(int, starter().stdout.readline().split()))


def words(folder, flags):
    """What a user types behind the word python"""
    model = [] if "--checkpoint" in flags else ["--language_model", folder / "llama", "--vision_model", FIXTURES / "tiny-clip"]
    return list(map(str, ["train.py", *model, "--data_path", folder, "--out", folder / "out", "--workers", "1", *flags]))


def begin(folder, *flags, two=False, code="import train; train.main()", port=None, limits={}, **environment):
    """Start train.py on the miniature data in folder -> the ids of its processes. two: two processes; code: in the
    place of train.main(); limits: of the system, by their names"""
    for name in ("out", "err"):
        (folder / f"run.{name}").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = port or free.getsockname()[1]
    job = {"command": words(folder, flags), "code": code, "processes": 1 + two, "port": str(port), "limits": limits, "environment": environment,
           "folder": str(folder)}
    print(json.dumps(job), file=starter().stdin, flush=True)
    return heard(folder)


def end(folder):
    """Wait for what began -> its exit code, stdout and stderr"""
    (code,) = heard(folder)
    return code, (folder / "run.out").read_text(), (folder / "run.err").read_text()


def run(folder, *flags, fails=False, by=None, **how):
    """The same, to its end -> the lines of log.jsonl, or with fails its stderr. by: the words before train.py, for a process that is not forked: what
    Python, torch and DeepSpeed read from the environment they read when they start"""
    if by:
        process = subprocess.Popen([*by, *words(folder, flags)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env=os.environ | ENVIRONMENT | how, start_new_session=True)
        try:
            out, err = process.communicate(timeout=300)
        finally:  # what hangs would hold the port, and every later run with two processes would fail
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.returncode
    else:
        begin(folder, *flags, **how)
        code, out, err = end(folder)
    if fails:
        assert code == 2 and "Traceback" not in out + err, out + err
        lines = [line for line in err.splitlines() if line.startswith("train.py")]
        assert len(lines) == 1, err
        return lines[0]
    assert code == 0, out + err
    return [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def processes():
    """What a test that starts processes asks for; it is not quick"""
    yield
    if starter.cache_info().currsize:
        starter().kill()


@pytest.fixture
def folder(tmp_path, processes):
    """13 conversations of answers of very different lengths, three of them without a picture, and a model with a tokenizer"""
    (tmp_path / "llava").mkdir()
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/train2017").symlink_to(FIXTURES / "tiny-clip/images")
    shutil.copytree(FIXTURES / "tiny-llama", tmp_path / "llama")
    shutil.copy(FIXTURES / "tokenizer.model", tmp_path / "llama")
    names = sorted(path.name for path in (FIXTURES / "tiny-clip/images").iterdir())
    config = json.loads((tmp_path / "llama/config.json").read_text())
    (tmp_path / "llama/config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    records = [{"image": names[i % 4], "conversations": [
        {"from": "human", "value": "What is it?" + ("" if i in (2, 5, 6) else "\n<image>")},
        {"from": "gpt", "value": "a cat " * (1 + i * i % 17)}]} for i in range(13)]
    for i in (2, 5, 6):
        del records[i]["image"]
    (tmp_path / "llava/conversation_58k.json").write_text(json.dumps(records))
    return tmp_path


def left(folder):
    """What a run has left in its folder; a log in which nothing stands was only locked"""
    return sorted(path.name for path in folder.glob("out/*") if path.name != "log.jsonl" or path.stat().st_size)


def losses(log):
    return [line["loss"] for line in log if line.get("loss") is not None]


def test_processes_accumulation_and_zero_make_no_difference(folder):
    """The loss is the mean over the trained tokens of the global batch, however it is cut; a mean of means is another.

    The last batch of an epoch holds too few samples for both processes, some micro-batches hold no picture."""
    common = ["--datasets", "llava_dial", "--concatenate", "1", "--batch_size", "8", "--epochs", "2", "--eval_fraction", "0.2",
              "--learning_rate", "0.02", "--embedding_learning_rate", "0.01", "--overwrite"]
    one = run(folder, *common, "--micro_batch_size", "8", "--zero_stage", "0")
    assert [line["step"] for line in one if "loss" in line] == [1, 2, 3, 4]
    assert one[0]["--learning_rate"] == "0.02" and one[0]["--warmup"] == "0.1" and one[0]["--dtype"] == "torch.float32"
    assert one[1].keys() == {"step", "epoch", "loss", "learning_rate", "tokens", "trained_tokens", "rounds_left_out", "broken", "seconds"}
    assert losses(one)[-1] < 0.9 * losses(one)[0], "it learns"
    evaluations = [line for line in one if "eval_loss" in line]
    assert len(evaluations) == 2 and all(0 <= line["eval_exact"] <= 1 for line in evaluations)
    for two, flags in ((False, ["--micro_batch_size", "1", "--zero_stage", "0"]), (True, ["--micro_batch_size", "3"]),
                       (True, ["--micro_batch_size", "1", "--zero_stage", "2"])):
        other = run(folder, *common, *flags, two=two)
        torch.testing.assert_close(torch.tensor(losses(other)), torch.tensor(losses(one)), atol=2e-5, rtol=2e-5)
        for a, b in zip(evaluations, (line for line in other if "eval_loss" in line)):
            assert abs(a["eval_loss"] - b["eval_loss"]) < 2e-5 and a["eval_exact"] == b["eval_exact"]
        assert [line["trained_tokens"] for line in other if "loss" in line] == [line["trained_tokens"] for line in one if "loss" in line]
    model = VisualChat.from_pretrained(folder / "out/best")
    for (name, trained), (_, base) in zip(model.named_parameters(), tiny_model().named_parameters()):
        recipe = name.startswith("projection") or name == "language_model.model.embed_tokens.weight"
        assert recipe != torch.equal(trained, base), f"{name}: the recipe trains embedding and projection, nothing else"


def test_held_out_data_from_another_folder_is_measured_set_by_set(folder):
    """What is held out comes from another folder, by the same names; each set is counted by itself. The model that was saved says the same"""
    held = folder / "held"
    shutil.copytree(folder / "llava", held / "llava")
    (held / "coco").symlink_to(folder / "coco")
    records = json.loads((held / "llava/conversation_58k.json").read_text())
    (held / "llava/conversation_58k.json").write_text(json.dumps(records[:3]))
    for place, talks in ((folder, 6), (held, 2)):
        (place / "own.json").write_text(json.dumps([[{"question": f"And {n}?", "answer": "A cat."}] for n in range(talks)]))
    log = run(folder, "--datasets", "llava_dial", folder / "own.json", "--eval_path", held, "--concatenate", "1", "--batch_size", "6",
              "--micro_batch_size", "3", "--epochs", "1", "--learning_rate", "0.03")
    assert sum("loss" in line for line in log) == 4, "19 conversations to train on: none is held out of them (17 would be 3 steps)"
    result = next(line for line in log if "eval_loss" in line)
    model, tokenizer = VisualChat.from_pretrained(folder / "out/best"), Tokenizer(folder / "llama/tokenizer.model")
    loss = tokens = 0
    for name, count in (("llava_dial", 3), (str(held / "own.json"), 2)):
        args = argparse.Namespace(datasets=[name], concatenate=[1], samples=["all"], seed=0, data_path=held, out=folder)
        conversations = list(Epoch(read_datasets(args), [range(count)], 0, 0))
        samples = Samples(conversations, tokenizer, 17, model.preprocessing, 4096, 8)
        with torch.no_grad():
            losses, hits = zip(*(model(**collate([samples[n]])) for n in range(len(samples))))
        assert result["eval_exact_of"][name] == sum(bool(h.all()) for h in hits) / len(hits)
        loss, tokens = loss + sum(float(part.sum()) for part in losses), tokens + sum(map(len, losses))
    assert abs(result["eval_loss"] - loss / tokens) < 1e-4


def test_other_data_sets_can_be_measured_on_than_trained_on(folder):
    """--eval_datasets, from --eval_path; --concatenate is about those that are trained on"""
    held, kinds = folder / "held", ["cats.json", "dogs.json", "birds.json"]
    held.mkdir()
    for name in kinds:
        (held / name).write_text(json.dumps([[{"question": "And now?", "answer": f"It is {name}."}]] * 3))
    flags = ["--datasets", "llava_dial", held / "cats.json", "--concatenate", "2", "1", "--batch_size", "4", "--epochs", "1", "--max_steps", "2",
             "--eval_datasets", *kinds]
    assert "--eval_datasets are read from --eval_path" in run(folder, *flags, fails=True)
    result = next(line for line in run(folder, *flags, "--eval_path", held) if "eval_loss" in line)
    assert list(result["eval_exact_of"]) == [str(held / name) for name in kinds]


def test_the_demo_is_a_file_of_flags(tmp_path, processes):
    """Flags that follow it win; a run that is there stays"""
    subprocess.run([sys.executable, ROOT / "demo/make.py", tmp_path / "data/demo", "--scenes", "32"], check=True)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    command = [sys.executable, str(ROOT / "train.py"), "@demo/flags", "--max_steps", "1", "--samples", "4", "--workers", "0"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "env": os.environ | ENVIRONMENT}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    assert "which_of_three" in done.stdout and "exact match" in done.stdout and (checkpoint_path(tmp_path / "out/best") / "config.json").exists()
    first = json.loads((tmp_path / "out/log.jsonl").open().readline())
    assert first["--concatenate"] == "[6, 2, 1, 1, 1]" and first["--samples"] == "[4]" and first["--learning_rate"] == "0.006"
    done = subprocess.run(command, **options)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--out out already holds a run; name another folder" in done.stderr


def test_a_tower_of_16_bit_bin_files_trains_under_zero_3(folder):
    """What zero.Init makes of tensors does not touch what is read from the file"""
    shutil.copytree(FIXTURES / "tiny-clip", folder / "tower")
    (folder / "tower/model.safetensors").unlink()
    weights = load_file(FIXTURES / "tiny-clip/model.safetensors")
    torch.save({name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}, folder / "tower/pytorch_model.bin")
    assert losses(run(folder, "--datasets", "llava_dial", "--batch_size", "4", "--max_steps", "1", "--eval_fraction", "0", "--vision_model", folder / "tower"))


@pytest.mark.parametrize("two", [False, True])
def test_a_step_takes_the_gradient_of_the_mean_over_all_trained_tokens(folder, two):
    """AdamW hides a factor: with an eps of 1000 and a rate of 1000 its first step is the gradient itself. Against plain torch"""
    talks = [[{"question": "Why?", "answer": "a cat " * n}] for n in (1, 2, 5, 9, 4)]
    (folder / "text.json").write_text(json.dumps(talks))
    (folder / "ds.json").write_text(json.dumps({"optimizer": {"params": {"eps": 1000}}, "gradient_clipping": 0.0}))
    run(folder, "--datasets", folder / "text.json", "--batch_size", "5", "--micro_batch_size", "2", "--epochs", "1", "--eval_fraction", "0",
        "--learning_rate", "1000", "--warmup", "0", "--zero_stage", "0", "--deepspeed_config", folder / "ds.json", two=two)
    llama, tokenizer = load_llama(folder / "llama"), Tokenizer(FIXTURES / "tokenizer.model")
    losses = []
    for (said,) in talks:
        example = encode([Turn(said["question"], said["answer"])], tokenizer, 17)
        logits = llama(example.input_ids[None])[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, example.labels[1:], reduction="none")[example.labels[1:] != -100])
    weight = llama.model.embed_tokens.weight
    (gradient,) = torch.autograd.grad(torch.cat(losses).mean(), weight)
    step = weight - load_llama(checkpoint_path(folder / "out/best/language_model")).model.embed_tokens.weight
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(step, gradient, atol=1e-6, rtol=2e-3)


def test_under_zero_3_a_perceiver_begins_as_written_and_a_missing_weight_is_named(folder):
    (folder / "wide").mkdir()
    shutil.copy(FIXTURES / "tokenizer.model", folder / "wide")
    sizes = {"hidden_size": 128, "intermediate_size": 172, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 512}
    (folder / "wide/config.json").write_text(json.dumps(sizes))
    weights = Llama(read_llama_config(folder / "wide"))
    save_weights(plain_weights(weights), folder / "wide/model.safetensors")
    flags = ["--datasets", "llava_dial", "--batch_size", "4", "--epochs", "1", "--max_steps", "1", "--eval_fraction", "0", "--language_model",
             folder / "wide", "--projection", "perceiver", "--learning_rate", "1e-30", "--overwrite"]
    run(folder, *flags, two=True)
    begun = load_file(checkpoint_path(folder / "out/best/projection.safetensors"))
    for name in ("kv_proj", "attn.out_proj", "projection.1"):
        assert begun[f"{name}.bias"].abs().max() < 1e-20 and 0.018 < begun[f"{name}.weight"].std() < 0.022, name
    save_weights([part for part in plain_weights(weights) if part[0] != "model.norm.weight"], folder / "wide/model.safetensors")
    assert "model.norm.weight is missing" in run(folder, *flags, fails=True)


def test_cross_attention_takes_the_same_steps_on_two_processes(folder):
    """A process without a picture runs the added layers too"""
    common = ["--datasets", "llava_dial", "--concatenate", "1", "--batch_size", "4", "--epochs", "1", "--eval_fraction", "0",
              "--attention", "cross", "--overwrite"]
    one = run(folder, *common, "--micro_batch_size", "4", "--zero_stage", "0")
    two = run(folder, *common, "--micro_batch_size", "1", two=True)
    torch.testing.assert_close(torch.tensor(losses(one)), torch.tensor(losses(two)), atol=2e-5, rtol=2e-5)


def test_qwen_and_a_perceiver_take_the_same_steps_on_two_processes(folder):
    """Everything trained but the perceiver's table of positions"""
    (folder / "wide").mkdir()
    shutil.copy(FIXTURES / "tokenizer.model", folder / "wide")
    sizes = {"hidden_size": 128, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
    (folder / "wide/config.json").write_text(json.dumps(sizes))
    torch.manual_seed(0)
    save_weights(plain_weights(Llama(read_llama_config(folder / "wide"))), folder / "wide/model.safetensors")
    common = ["--datasets", "llava_dial", "--concatenate", "1", "--batch_size", "4", "--epochs", "1", "--eval_fraction", "0",
              "--language_model", folder / "wide", "--vision_model", FIXTURES / "tiny-qwen-visual/qwen_vl", "--trainable", "all",
              "--projection", "perceiver", "--max_steps", "3", "--overwrite"]
    one = run(folder, *common, "--micro_batch_size", "4", "--zero_stage", "0")
    two = run(folder, *common, "--micro_batch_size", "1", two=True)
    torch.testing.assert_close(torch.tensor(losses(one)), torch.tensor(losses(two)), atol=2e-5, rtol=2e-5)
    model, base = VisualChat.from_pretrained(folder / "out/best"), load_vit(FIXTURES / "tiny-qwen-visual")
    for (name, trained), (_, old) in zip(model.vision_model.named_parameters(), base.named_parameters()):
        assert torch.equal(trained, old) == (name == "attn_pool.pos_embed"), name
    assert torch.equal(model.projection.pos_embed, fixed_positions(16, 128)) and model.image_tokens == 256


def test_every_weight_is_trained_with_another_projection_and_layer_and_chats(folder):
    flags = ["--datasets", "llava_dial", "--batch_size", "4", "--max_steps", "3", "--epochs", "2", "--eval_fraction", "0.3", "--trainable", "all",
             "--projection", "vit", "--feature_layer", "-2", "--no_class_token"]
    assert losses(run(folder, *flags)) and (checkpoint_path(folder / "out/best") / "language_model/tokenizer.model").exists()
    model, base = VisualChat.from_pretrained(folder / "out/best"), load_vit(FIXTURES / "tiny-clip")
    assert (model.image_tokens, model.vision_model.config.feature_layer, model.projection_kind) == (16, -2, "vit")
    for (name, trained), (_, old) in zip(model.vision_model.named_parameters(), base.named_parameters()):
        assert torch.equal(trained, old) == name.startswith(("post_layernorm", "encoder.layers.2")), name
    picture = FIXTURES / "tiny-clip/images/palette_p.png"
    (folder / "ask.json").write_text(json.dumps({"one": [["What is it?", f"'{picture}'"], ["Why?"]]}))
    done = subprocess.run([sys.executable, "chat.py", str(folder / "out/best"), "--script", str(folder / "ask.json"), "--out",
                           str(folder / "answers.csv"), "--max_new_tokens", "5"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (folder / "answers.csv").read_text().splitlines()
    assert lines[0] == "test_name,image_path,question,answer" and lines[1].startswith(f"one,'{picture}',What is it?,")
    assert "already holds a run" in run(folder, *flags, fails=True)


@pytest.mark.parametrize("kind, two, more", [
    ("mmca", False, ["--zero_stage", "0"]), ("mmca", True, ["--save_trained_only", "--vision_lora_rank", "2"]),
    ("cross", False, ["--projection", "vit", "--zero_stage", "3"]), ("cross", True, ["--feature_layer", "-2", "--no_class_token"])])
def test_a_run_begins_from_a_checkpoint_where_the_other_ended(folder, kind, two, more):
    """The held-out loss before its first step is that after the last of the run before, with a new LoRA over the merged one; on other data it learns"""
    flags = ["--datasets", "llava_dial", "--batch_size", "4", "--micro_batch_size", "2", "--eval_fraction", "0.3", "--lora_rank", "2", "--learning_rate", "0.01"]
    (ended,) = [line for line in run(folder, *flags, *more, "--attention", kind, "--epochs", "1", two=two) if "eval_loss" in line]
    (folder / "out").rename(folder / "first")
    again = ["--checkpoint", folder / "first/best", *[flag for flag in more if "trained_only" in flag]]
    begun, _ = [line for line in run(folder, *flags, *again, "--epochs", "1", two=two) if "eval_loss" in line]
    assert (begun["step"], begun["epoch"], begun["eval_exact"]) == (0, 0, ended["eval_exact"])
    assert begun["eval_loss"] == pytest.approx(ended["eval_loss"], rel=2e-6)
    assert f"epoch 0: held-out loss {begun['eval_loss']:.4f}, " in (folder / "run.err").read_text() + (folder / "run.out").read_text()
    model = VisualChat.from_pretrained(folder / "out/best")
    before = VisualChat.from_pretrained(folder / "first/best")
    assert model.vision_model.config == before.vision_model.config and (model.attention, model.projection_kind) == (kind, before.projection_kind)
    assert not torch.equal(next(model.projection.parameters()), next(before.projection.parameters())), "it is trained"
    if kind == "cross":
        assert all(layer.gate for layer in before.cross_attention), "the layers that were added are not new"
    (folder / "again.json").write_text(json.dumps([[{"images": ["coco/train2017/palette_p.png"], "question": "Who?", "answer": "a dog"}]] * 8))
    other = ["--datasets", folder / "again.json", "--checkpoint", folder / "out/best", "--out", folder / "other", "--learning_rate", "0.01"]
    run(folder, *other, "--batch_size", "4", "--epochs", "4", "--eval_fraction", "0.2", two=two)
    scores = [json.loads(line) for line in (folder / "other/log.jsonl").read_text().splitlines()]
    scores = [line["eval_loss"] for line in scores if "eval_loss" in line]
    assert len(scores) == 5 and scores[-1] < scores[0] / 2


def test_what_a_checkpoint_has_is_not_asked_for(folder):
    """The same again is no contradiction, another one is; its folders by hand are said to leave its projection"""
    flags = ["--datasets", "llava_dial", "--batch_size", "4", "--max_steps", "1", "--eval_fraction", "0"]
    run(folder, *flags, "--attention", "cross")
    (folder / "out").rename(folder / "first")
    first = folder / "first/epoch-1"
    again = [*flags, "--checkpoint", folder / "first/best", "--overwrite"]
    run(folder, *again, "--attention", "cross", "--language_model", folder / "first/best/language_model")
    for name, value, other in (("attention", "cross", "mmca"), ("projection", "linear", "vit"), ("feature_layer", -1, "-2"), ("class_token", True, None),
                               ("language_model", first / "language_model", folder / "llama"), ("vision_model", first / "vision_model", FIXTURES)):
        typed = [f"--{name}", other] if other else ["--no_class_token"]
        message = run(folder, *again, *typed, fails=True)
        assert f"the {name} of --checkpoint {first} is {value}, and a flag says {other or False}: leave that flag out" in message
    by_hand = [*flags, "--language_model", first / "language_model", "--vision_model", first / "vision_model", "--overwrite"]
    run(folder, *by_hand)
    assert (folder / "run.out").read_text().count(f"the projection begins anew; --checkpoint {first} goes on with the one there\n") == 1
    run(folder, *flags, "--overwrite")
    assert "begins anew" not in (folder / "run.out").read_text()
    assert "config.json is not that of a checkpoint of train.py: 'attention' missing" in run(folder, *flags, "--checkpoint", folder / "llama", fails=True)
    assert "nowhere/config.json cannot be read: No such file" in run(folder, *flags, "--checkpoint", folder / "nowhere", fails=True)
    before = {path: path.stat().st_mtime_ns for path in (folder / "first").rglob("*")}
    run(folder, *again, "--save_trained_only")
    second = ["--checkpoint", folder / "out/best", "--out", folder / "first"]
    assert f"{first}/language_model lies in --out {folder}/first, which this run would replace" in run(folder, *flags, *second, "--overwrite", fails=True)
    shutil.copytree(first, folder / "copy/epoch-1")
    for how in ("--resume", "--overwrite"):  # a checkpoint that was copied there, and no state
        own = ["--checkpoint", folder / "copy/epoch-1", "--out", folder / "copy", how]
        assert re.search("already holds a run|lies in --out", run(folder, *flags, *own, fails=True))
    assert {path: path.stat().st_mtime_ns for path in (folder / "first").rglob("*")} == before, "nothing of it is touched"
    (folder / "copy/epoch-1").rename(folder / "copy/epoch-1-backup")
    run(folder, *flags, "--checkpoint", folder / "copy/epoch-1-backup", "--out", folder / "copy", "--overwrite")
    (folder / "first/epoch-1/projection.safetensors").unlink()
    assert "first/epoch-1 holds no weights: projection.safetensors" in run(folder, *again, fails=True)
    (folder / "recipe").write_text("--seed '1")
    assert "No closing quotation" in run(folder, f"@{folder}/recipe", fails=True)


@pytest.mark.parametrize("two", [False, True])
def test_monitors_have_every_number_of_the_log(mine, two):
    """DeepSpeed's csv_monitor, over the samples seen; with TensorBoard and others it is the same call"""
    folder, flags = mine
    (folder / "ds.json").write_text(json.dumps({"csv_monitor": {"enabled": True, "output_path": str(folder / "curves"), "job_name": "it"}}))
    log = run(folder, *flags, "--micro_batch_size", "2", "--eval_fraction", "0.3", "--deepspeed_config", folder / "ds.json", two=two)
    for name, count in (("loss", 6), ("learning_rate", 6), ("trained_tokens", 6), ("eval_loss", 3), ("eval_exact", 3)):
        expected = [[str(4 * line["step"]), str(line[name])] for line in log if name in line]
        rows = [line.split(",") for line in (folder / f"curves/it/Train_Samples_{name}.csv").read_text().splitlines()]
        assert rows == [["step", name], *expected] and len(expected) == count


def test_bad_input_is_one_sentence_and_exit_code_2(folder):
    base = ["--datasets", "llava_dial", "--batch_size", "4"]
    assert "'lava' is not known; the known ones are llava," in run(folder, "--datasets", "lava", fails=True)
    assert "detail_23k.json is missing: liuhaotian/LLaVA-Instruct-150K" in run(folder, "--datasets", "llava", fails=True)
    assert "--samples has 3 values for 1" in run(folder, *base, "--samples", "1", "2", "3", fails=True)
    assert "nowhere/config.json cannot be read: No such file" in run(folder, *base, "--vision_model", folder / "nowhere", fails=True)
    assert "argument --resume: not allowed with argument --overwrite" in run(folder, *base, "--overwrite", "--resume", fails=True)
    assert "--trainable all trains every weight" in run(folder, *base, "--trainable", "all", "--lora_rank", "2", fails=True)
    assert not left(folder)
    (folder / "out/best").write_text("somebody's")
    assert "already holds a run" in run(folder, *base, fails=True) and (folder / "out/best").read_text() == "somebody's"
    (folder / "out/best").unlink()
    (folder / "out/log.jsonl").write_text('{"step": 0}\n')
    assert "already holds a run" in run(folder, *base, fails=True) and (folder / "out/log.jsonl").read_text() == '{"step": 0}\n'
    (folder / "out/log.jsonl").unlink()
    model = folder / "out/epoch-1"
    model.mkdir()
    assert "already holds a run" in run(folder, *base, fails=True)
    (model / "config.json").write_text("{}")
    assert "lies in --out" in run(folder, *base, "--overwrite", "--vision_model", model, fails=True) and model.exists()
    assert "config.json cannot be read" in run(folder, *base, "--overwrite", "--vision_model", folder, fails=True) and model.exists()
    shutil.rmtree(model)


def test_deepspeed_compiles_nothing(folder):
    """Two processes, ZeRO-3, no compiler on the PATH: nothing is built, and so no lock is left to wait for"""
    (folder / "nothing").mkdir()
    flags = ["--datasets", "llava_dial", "--batch_size", "4", "--micro_batch_size", "2", "--max_steps", "2"]
    assert len(losses(run(folder, *flags, two=True, PATH=str(folder / "nothing"), CXX="no-such-compiler",
                          TORCH_EXTENSIONS_DIR=str(folder / "nothing")))) == 2
    assert not list((folder / "nothing").iterdir())


@pytest.fixture
def mine(folder):
    """Twelve short conversations of one's own about a picture -> (folder, its flags)"""
    shutil.copy(FIXTURES / "tiny-clip/images/palette_p.png", folder / "red.png")
    talk = [{"images": ["red.png"], "question": "What colour?", "answer": "red"}, {"question": "Sure?", "answer": "yes"}]
    (folder / "mine.json").write_text(json.dumps([talk] * 12))
    return folder, ["--datasets", folder / "mine.json", "--batch_size", "4", "--epochs", "3"]


def state_is_good(folder):
    """The weights of the last state are numbers"""
    for file in (folder / "out/state").rglob("*.pt"):
        def check(content):
            for part in content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ():
                check(part)
            assert not isinstance(content, torch.Tensor) or content.isfinite().all()
        check(torch.load(file, weights_only=False))


@pytest.mark.parametrize("more", [[], ["--save_every", "1"], ["--eval_fraction", "0", "--save_every", "1"]])
def test_a_loss_that_is_not_finite_stops_the_run(mine, more):
    folder, flags = mine
    message = run(folder, *flags, "--eval_fraction", "0.25", "--learning_rate", "6e17", "--warmup", "0.99", *more, fails=True)
    found = re.fullmatch(r"train.py: the (?:held-out loss after|loss of) step (\d+) is (?:nan|inf): begin anew with a lower --learning_rate or a "
                         r"longer --warmup \(and --overwrite\); --resume goes on from step (\d+)", message)
    assert found and int(found[2]) < int(found[1]), message
    assert [path.name for path in folder.glob("out/state/step-*")] == [f"step-{found[2]}"]
    state_is_good(folder)
    assert "NaN" not in (folder / "out/log.jsonl").read_text() and "Infinity" not in (folder / "out/log.jsonl").read_text()
    for file in checkpoint_path(folder / "out/best").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


BAD_WEIGHTS = """
import torch, train, deepspeed
step = deepspeed.DeepSpeedEngine.step
def poisoned(engine):
    step(engine)
    if engine.global_steps == 4:
        engine.module.projection[1].weight.data.fill_(float("nan"))
deepspeed.DeepSpeedEngine.step = poisoned
train.main()
"""


def test_weights_that_are_no_numbers_are_not_saved(mine):
    """The step after which they are had a good loss; nothing is held out to tell"""
    folder, flags = mine
    flags = [*flags, "--eval_fraction", "0", "--zero_stage", "0", "--epochs", "1", "--batch_size", "3", "--micro_batch_size", "3"]
    message = run(folder, *flags, fails=True, code=BAD_WEIGHTS)
    assert message.endswith("out/epoch-1 cannot be written: 1.weight has values that are no finite numbers")
    assert not list(folder.glob("out/*epoch-*")) and not (folder / "out/best").exists()


BAD_HELD_OUT = """
import train
evaluate, calls = train.evaluate, []
def overflown(*inputs):
    calls.append(evaluate(*inputs))
    return calls[-1]._replace(loss=float({loss!r})) if len(calls) == 2 else calls[-1]
train.evaluate = overflown
train.main()
"""


def test_a_held_out_loss_that_is_not_finite_stops_the_run(mine):
    """The weights are numbers, and so is the loss of every step; the state of the epoch before stays"""
    folder, flags = mine
    message = run(folder, *flags, "--eval_fraction", "0.25", fails=True, code=BAD_HELD_OUT.format(loss="inf"))
    assert message.startswith("train.py: the held-out loss after step 6 is inf: begin anew") and message.endswith("goes on from step 3")
    assert left(folder) == ["best", "epoch-1", "log.jsonl", "state"] and (folder / "out/state/latest").read_text() == "step-3"
    assert (folder / "out/best").read_text() == "epoch-1"


def test_best_is_the_epoch_with_the_lowest_held_out_loss(mine):
    """The second of three is bad, and the last is good again: better than the first"""
    folder, flags = mine
    bad = BAD_HELD_OUT.format(loss="1e6")
    flags = [*flags, "--eval_fraction", "0.25", "--learning_rate", "0.01"]
    log = run(folder, *flags, "--max_steps", "6", code=bad)
    assert len([line for line in log if "eval_loss" in line]) == 2 and (folder / "out/best").read_text() == "epoch-1"
    losses = [line["eval_loss"] for line in run(folder, *flags, "--overwrite", code=bad) if "eval_loss" in line]
    assert losses[2] < losses[0] < losses[1] and (folder / "out/best").read_text() == "epoch-3"
    assert checkpoint_path(folder / "out") == checkpoint_path(folder / "out/best") == folder / "out/epoch-3"
    assert checkpoint_path(folder / "out/best/vision_model") == folder / "out/epoch-3/vision_model"


def test_a_run_without_anything_to_train_on_is_refused(mine):
    folder, flags = mine
    message = run(folder, *flags, "--max_length", "40", fails=True)
    assert message == "train.py: nothing is left to train on: of 11 samples none has a round that fits into --max_length 40 and --max_images 8"
    talk = [{"images": ["red.png"] * 9, "question": "What colour?", "answer": "red"}]
    (folder / "mine.json").write_text(json.dumps([talk] * 12))
    assert "none has a round that fits into --max_length 4096 and --max_images 8" in run(folder, *flags, fails=True)
    assert not left(folder)


def test_a_step_without_a_label_has_no_loss(mine):
    folder, flags = mine
    short, long = ([{"question": "?", "answer": answer}] for answer in ("red", "red " * 200))
    (folder / "mine.json").write_text(json.dumps([short, long, long, long]))
    flags = [*flags, "--batch_size", "1", "--micro_batch_size", "1", "--max_length", "100", "--eval_fraction", "0", "--epochs", "1"]
    log = run(folder, *flags)
    assert len(losses(log)) == 1 and all(loss > 0 for loss in losses(log)) and sorted(line["trained_tokens"] for line in log[1:])[:3] == [0, 0, 0]
    assert [line["step"] for line in log] == [0, 1, 2, 3, 4]


def test_max_length_is_at_most_the_positions_of_the_model(mine):
    folder, flags = mine
    tokenizer, config = Tokenizer(folder / "llama/tokenizer.model"), json.loads((folder / "llama/config.json").read_text())
    whole = encode([Turn("What colour?", "red", ["red.png"]), Turn("Sure?", "yes")], tokenizer, 17)
    positions = len(whole.input_ids) - 1  # the second round goes beyond
    (folder / "llama/config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    log = run(folder, *flags, "--micro_batch_size", "2", "--max_steps", "2", "--eval_fraction", "0", two=True)
    out = (folder / "run.out").read_text()
    assert out.splitlines().count(f"--max_length 4096 is more than the language model's positions: {positions} is taken") == 1, out
    assert [line["trained_tokens"] for line in log if "loss" in line] == [4 * len(tokenizer.encode("red") + [tokenizer.eos])] * 2
    assert "12 rounds left out" not in out and "8 rounds left out" in out


@pytest.mark.parametrize("settings, words", [
    ({"zero_optimization": {"stage3_prefetch_bucket_size": 15099494.4}}, "stage3_prefetch_bucket_size Input should be a valid integer"),
    ({"zero_optimization": {"reduce_bucketsize": 5}}, "reduce_bucketsize Extra inputs are not permitted"),
    ({"optimizer": {"type": "Nope"}}, "Nope is not a supported DeepSpeed Optimizer"), ({"optimizer": {"params": {"betaz": 1}}}, "'betaz'"),
    ({"zero_optimization": {"offload_optimizer": {"device": "disk"}}}, "offload_optimizer.device Input should be"),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler is set by --warmup, take it out of the file")])
def test_settings_that_deepspeed_cannot_use_are_named_with_their_file(mine, settings, words):
    folder, flags = mine
    (folder / "ds.json").write_text(json.dumps(settings))
    message = run(folder, *flags, "--deepspeed_config", folder / "ds.json", fails=True)
    assert words in message and message.startswith(f"train.py: {folder}/ds.json: ")
    assert not left(folder)


@pytest.mark.parametrize("settings, words", [
    ({"optimizer": {"params": {"lr": 1e-12}}}, "lr is set by --learning_rate"), ({"train_batch_size": 4}, "train_batch_size is set by --batch_size"),
    ({"optimizer": {"type": "Adam", "params": {"lr": 1e-12}}}, "lr is set by --learning_rate"), ({"bf16": {"enabled": True}}, "enabled is set by --dtype"),
    ({"zero_optimization": {"stage": 2}}, "stage is set by --zero_stage"), ({"activation_checkpointing": {}}, "set by --gradient_checkpointing"),
    ({"gradient_cliping": 1.0}, "gradient_cliping is not known to DeepSpeed"), ({"zero_optimisation": {}}, "zero_optimisation is not known")])
def test_settings_that_are_not_taken_are_named(tmp_path, settings, words):
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    with pytest.raises(InputError) as error:
        settings_of(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/ds.json: ") and words in str(error.value)


def settings_of(folder):
    args = argparse.Namespace(batch_size=4, micro_batch_size=4, zero_stage=3, learning_rate=1e-3, dtype=torch.float32, deepspeed_config=folder / "ds.json")
    return engine_settings(args, 1)


def test_settings_are_merged_and_auto_is_left_to_the_flags(tmp_path):
    """As in the files that others write for transformers; an optimizer of another type is taken whole"""
    (tmp_path / "ds.json").write_text(json.dumps({
        "bf16": {"enabled": "auto"}, "train_batch_size": "auto", "gradient_clipping": "auto", "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto",
        "overlap_comm": True}, "optimizer": {"params": {"lr": "auto", "weight_decay": 0.1}}, "fp16": None}))
    settings = settings_of(tmp_path)
    assert settings["bf16"] == {"enabled": False} and settings["gradient_clipping"] == 1.0 and settings["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert settings["optimizer"] == {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True}}
    for kind in ("auto", None):
        (tmp_path / "ds.json").write_text(json.dumps({"optimizer": {"type": kind, "params": {"lr": "auto"}}}))
        assert settings_of(tmp_path)["optimizer"]["type"] == "AdamW" and settings_of(tmp_path)["optimizer"]["params"]["torch_adam"]
    (tmp_path / "ds.json").write_text('{"optimizer": {"type": "Lamb", "params": {"max_coeff": 5}}}')
    assert settings_of(tmp_path)["optimizer"] == {"type": "Lamb", "params": {"max_coeff": 5}}


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_refused_setting_leaves_the_earlier_run(mine, stage):
    folder, flags = mine
    flags = [*flags, "--max_steps", "1", "--zero_stage", stage]
    run(folder, *flags)
    before = left(folder)
    for settings in ({"zero_optimization": {"reduce_bucketsize": 5}}, {"optimizer": {"params": {"betaz": 1}}}):
        (folder / "ds.json").write_text(json.dumps(settings))
        run(folder, *flags, "--overwrite", "--deepspeed_config", folder / "ds.json", fails=True)
        assert left(folder) == before == ["best", "epoch-1", "log.jsonl"]


def test_records_that_are_left_out_are_named(folder):
    records = json.loads((folder / "llava/conversation_58k.json").read_text())
    bad = [{"image": "a.jpg", "conversations": [{"from": "system", "value": "Be good."}]}] * 4
    flags = ["--datasets", "llava_dial", "--batch_size", "4", "--micro_batch_size", "4", "--max_steps", "1", "--eval_fraction", "0"]
    (folder / "llava/conversation_58k.json").write_text(json.dumps(bad + 3 * records))
    run(folder, *flags)
    named = "; ".join(f"conversation_58k[{n}]: no round" for n in range(3))
    assert f"\n4 of 43 records are left out: {named}\n" in (folder / "run.out").read_text()
    (folder / "llava/conversation_58k.json").write_text(json.dumps(bad))
    assert "llava_dial: no conversation is left to train on" in run(folder, *flags, "--overwrite", fails=True)
    assert f"\n4 of 4 records are left out: {named}\n" in (folder / "run.out").read_text()


def test_settings_that_deepspeed_can_use_are_taken(mine):
    """What is null is as if it was not there; optimizer states in the machine's memory; another optimizer has --learning_rate"""
    folder, flags = mine
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "gradient_clipping": None}))
    flags = [*flags, "--max_steps", "2", "--overwrite"]
    torch.testing.assert_close(torch.tensor(losses(run(folder, *flags, "--deepspeed_config", folder / "ds.json"))), torch.tensor(losses(run(folder, *flags))))
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"zero_hpz_partition_size": 2}}))
    run(folder, *flags, "--deepspeed_config", folder / "ds.json", "--micro_batch_size", "2", two=True)
    (folder / "ds.json").write_text(json.dumps({"optimizer": {"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": False, "betas": [0.9, 0.95]}}}))
    torch.testing.assert_close(torch.tensor(losses(run(folder, *flags, "--deepspeed_config", folder / "ds.json"))), torch.tensor(losses(run(folder, *flags))))


def wait_for_lines(log, count):
    """Until so many lines stand in the log"""
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, f"{log} never had {count} lines"
        time.sleep(0.01)


@pytest.mark.parametrize("two, kind", [(False, signal.SIGINT), (True, signal.SIGINT), (False, signal.SIGTERM)])
def test_ctrl_c_is_one_sentence_and_resume_goes_on(mine, two, kind):
    folder, flags = mine
    talks = json.loads((folder / "mine.json").read_text())
    (folder / "mine.json").write_text(json.dumps(talks * 100))
    flags = [*flags, "--micro_batch_size", "2", "--save_every", "3"]
    if two:
        process = subprocess.Popen([*LAUNCHER, *words(folder, flags)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   env=os.environ | ENVIRONMENT, start_new_session=True)
    started = process.pid if two else begin(folder, *flags)[0]
    wait_for_lines(folder / "out/log.jsonl", 8)
    os.killpg(started, kind)
    code, out, err = (None, *process.communicate(timeout=60)) if two else end(folder)
    lines = [line for line in err.splitlines() if line.startswith("train.py")]
    assert len(lines) == 1 and (two or code == 130 and "Traceback" not in err), err  # the launcher has one of its own
    stopped, saved = map(int, re.fullmatch(r"train.py: stopped at step (\d+); --resume goes on from step (\d+)", lines[0]).groups())
    assert stopped >= 7 and saved == stopped // 3 * 3 and (folder / f"out/state/step-{saved}").exists()


def records(folder, pictures):
    """LLaVA conversations of one round about these pictures"""
    said = [{"image": name, "conversations": [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "a cat"}]}
            for name in pictures]
    (folder / "llava/conversation_58k.json").write_text(json.dumps(said))


def test_broken_and_missing_pictures_are_replaced_and_named_until_they_are_too_many(folder):
    shutil.rmtree(folder / "coco")
    shutil.copytree(FIXTURES / "datasets/coco/train2017", folder / "coco/train2017")
    good = sorted(path.name for path in (folder / "coco/train2017").iterdir())
    whole = (folder / "coco/train2017" / good[0]).read_bytes()
    (folder / "coco/train2017/cut.jpg").write_bytes(whole[:len(whole) // 2])
    flags = ["--datasets", "llava_dial", "--concatenate", "1", "--eval_fraction", "0", "--batch_size", "100", "--micro_batch_size", "25",
             "--epochs", "1", "--zero_stage", "0"]
    records(folder, [good[n % len(good)] for n in range(298)] + ["gone.jpg", "cut.jpg"])
    log = run(folder, *flags, two=True)
    assert sum(line.get("broken", 0) for line in log) == 1 and "cut.jpg cannot be read: image file is truncated" in (folder / "run.err").read_text()
    assert f"1 of 300 records are left out: {folder}/coco/train2017/gone.jpg: no such picture" in (folder / "run.out").read_text()
    assert [line["trained_tokens"] for line in log if "loss" in line] == [300, 300, 297], "another took the place of what cannot be read"
    records(folder, [good[n % len(good)] for n in range(150)] + ["cut.jpg"] * 150)
    message = run(folder, *flags, "--overwrite", two=True, fails=True)
    assert re.search(r"\d+ samples of this epoch have a picture that cannot be read, more than 1%", message)
    records(folder, [good[n % len(good)] for n in range(296)] + ["gone.jpg"] * 4)
    (folder / "empty").mkdir()
    (folder / "empty/config.json").write_text("{}")
    message = run(folder, *flags, "--overwrite", "--vision_model", folder / "empty", fails=True)
    assert "4 of 300 conversations lack a picture, more than 1%" in message, "before a model is opened"


def test_two_processes_use_each_sample_of_an_epoch_once(folder):
    """Each sample of the epoch is used once over both, as one process would draw it"""
    sets = folder / "sets"
    shutil.copytree(FIXTURES / "datasets", sets)
    args = argparse.Namespace(data_path=sets, out=folder / "out", datasets=list(DATASETS), samples=["all"], concatenate=[2], seed=5)
    log = run(folder, "--data_path", sets, "--datasets", *DATASETS, "--concatenate", "2", "--seed", "5", "--eval_fraction", "0",
              "--batch_size", "8", "--micro_batch_size", "2", "--epochs", "2", "--workers", "2", "--zero_stage", "0", two=True)
    tokenizer, data = Tokenizer(FIXTURES / "tokenizer.model"), read_datasets(args)
    steps = []
    for epoch in (0, 1):
        samples = [encode(c, tokenizer, 17, max_length=4096, max_images=8) for c in Epoch(data, [range(len(d.records)) for d in data], 5, epoch)]
        for first in range(0, len(samples), 8):
            part = samples[first:first + 8]
            steps.append((sum(len(e.input_ids) for e in part), sum(int((e.labels != -100).sum()) for e in part)))
    assert [(line["tokens"], line["trained_tokens"]) for line in log if "loss" in line] == steps and len(set(steps)) == len(steps)


@pytest.mark.parametrize("world, size", [(1, 16), (2, 2), (4, 4), (1, 8), (3, 8), (8, 8), (24, 8)])
def test_micro_batches_of_a_step_hold_samples_of_like_size(world, size):
    """Each sample once, in its step; the largest first, so that all processes work on like sizes; after `done` steps as if from the start. Any number
    of processes shares a step, each as often"""
    generator = random.Random(0)
    talks = [[Turn("q" * generator.randint(1, 50), "a", ["p.jpg"] * generator.randint(0, 2)) for _ in range(generator.randint(1, 3))] for _ in range(43)]
    sizes = [(sum(len(t.images) for t in turns), sum(len(t.question + t.answer) for t in turns)) for turns in talks]
    args = argparse.Namespace(batch_size=16, micro_batch_size=size)
    parts = [list(deal(talks, args, rank, world)) for rank in range(world)]
    rounds = -(-16 // (world * size))
    assert {len(part) for part in parts} == {3 * rounds} and max(len(micro) for part in parts for micro in part) <= size
    for step in range(3):
        runs = [[n for part in parts for n in part[step * rounds + i]] for i in range(rounds)]
        assert sorted(n for run in runs for n in run) == list(range(16 * step, min(16 * step + 16, 43)))
        for run, following in zip(runs, runs[1:]):
            assert not following or min(sizes[n] for n in run) >= max(sizes[n] for n in following)
    assert list(deal(talks, args, 0, world, done=2)) == parts[0][2 * rounds:]


LORA = ["--datasets", "llava_dial", "--concatenate", "1", "--batch_size", "4", "--epochs", "2", "--eval_fraction", "0.2",
        "--lora_rank", "2", "--vision_lora_rank", "2", "--overwrite"]


def test_lora_layers_computed_again_and_factors_alone_give_the_same_model(folder):
    """LoRA with layers computed again = without, on two processes too; merged weights = base and factors"""
    one = run(folder, *LORA, "--micro_batch_size", "4", "--zero_stage", "0")
    merged = dict(VisualChat.from_pretrained(folder / "out/best").named_parameters())
    base = dict(tiny_model().named_parameters())
    for part in ("self_attn.q_proj", "mlp.down_proj"):
        assert not torch.equal(merged[f"language_model.model.layers.0.{part}.weight"], base[f"language_model.model.layers.0.{part}.weight"])
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(merged[name], base[name]), "LoRA in both towers"
    two = run(folder, *LORA, "--micro_batch_size", "1", "--gradient_checkpointing", "--save_trained_only", two=True)
    torch.testing.assert_close(torch.tensor(losses(one)), torch.tensor(losses(two)), atol=2e-5, rtol=2e-5)
    names = set(load_file(checkpoint_path(folder / "out/best") / "language_model/trained.safetensors"))
    assert "model.embed_tokens.weight" in names and "model.layers.0.mlp.up_proj.lora_A" in names and "lm_head.weight" not in names
    for name, value in VisualChat.from_pretrained(folder / "out/best").named_parameters():
        torch.testing.assert_close(value, merged[name], atol=1e-4, rtol=1e-4)
    again = run(folder, *LORA, "--language_model", folder / "out/best/language_model", "--out", folder / "again", "--max_steps", "1")
    assert losses(again) or (folder / "again/best").exists(), "what was trained alone is a starting point"


TRACED = """
import os, functools, torch
torch.compile = functools.partial(torch.compile, fullgraph=True{})
torch._dynamo.config.specialize_float = True  # each graph would be made twice
import deepspeed
import train
begin = deepspeed.initialize
def noted(**given):
    zero = given["config"]["zero_optimization"]
    layer = sum(getattr(p, "ds_numel", p.numel()) for p in given["model"].language_model.model.layers[0].parameters())
    ahead, asked = zero["stage3_prefetch_bucket_size"], os.environ.get("ASKED")
    assert ahead == int(asked) if asked else ahead >= layer, "the next layer is fetched while one is at work"
    assert zero["stage3_max_live_parameters"] >= max(1e9, 3 * layer)
    return begin(**given)
deepspeed.initialize = noted
train.main()
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2, "nothing was compiled"
"""


@pytest.mark.parametrize("kind, two, backend, more, asked", [
    ("mmca", False, "aot_eager", ["--micro_batch_size", "4", "--gradient_checkpointing"], ""),
    ("cross", True, "eager", ["--micro_batch_size", "1", "--projection", "vit", "--vision_lora_rank", "0", "--eval_fraction", "0"], "123")])
def test_compiled_layers_take_the_same_steps(folder, kind, two, backend, more, asked):
    """Under ZeRO-3, where layers gather their parameters as leaves, against one process without: LoRA in both towers, layers computed again, and
    what is held out; on two processes CrA, and a ViT layer in the projection behind a frozen tower. By the compiler's first half, or quarter, which need no C++"""
    flags = [*LORA, "--attention", kind, *more, "--max_steps", "2"]
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage3_prefetch_bucket_size": int(asked)} if asked else {}}))
    plain = run(folder, *flags, "--micro_batch_size", "4", "--zero_stage", "0")
    compiled = run(folder, *flags, "--compile", "--deepspeed_config", folder / "ds.json", two=two, code=TRACED.format(f", backend='{backend}'"),
                   ASKED=asked)
    for name, count in (("loss", 2), ("eval_loss", 1 - two)):
        expected, found = ([line[name] for line in log if name in line] for log in (plain, compiled))
        assert len(expected) == count
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=2e-5, rtol=2e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="a CPU compiles with a C++ compiler")
def test_layers_compiled_for_this_machine_take_the_same_steps(folder):
    flags = ["--datasets", "llava_dial", "--samples", "12", "--concatenate", "1", "--batch_size", "4", "--micro_batch_size", "4", "--epochs", "2",
             "--max_steps", "5", "--eval_fraction", "0", "--overwrite"]
    plain = run(folder, *flags)
    compiled = run(folder, *flags, "--compile", code=TRACED.format(""))
    assert len(losses(plain)) == 5
    torch.testing.assert_close(torch.tensor(losses(compiled)), torch.tensor(losses(plain)), atol=1e-5, rtol=0)


def steps_of(log):
    """What the log says of each step and epoch; of what was computed twice the later line holds"""
    lines = [{name: value for name, value in line.items() if name not in ("seconds", *train.FREE)} for line in log]
    return {(line["step"], "eval_loss" in line): line for line in lines}


def test_an_interrupted_run_takes_the_same_steps(folder):
    """Killed with SIGKILL and resumed, also while a state is written, the log is that of an undisturbed run"""
    kills = int(os.environ.get("KILLS", 2))
    flags = ["--datasets", "llava_dial", "--concatenate", "1", "--batch_size", "2", "--micro_batch_size", "1", "--epochs",
             2 * kills, "--eval_fraction", "0.2", "--save_every", "1"]
    whole = run(folder, *flags)
    (folder / "out").rename(folder / "whole")
    assert not (folder / "whole/state").exists(), "a finished run keeps no state"
    generator, log = random.Random(0), folder / "out/log.jsonl"
    for _ in range(kills):
        begun = len(log.read_text().splitlines()) if log.exists() else 0
        (started,) = begin(folder, *flags, "--resume")
        wait_for_lines(log, begun + generator.randint(1, 5))
        time.sleep(generator.random() * 0.2)
        os.killpg(started, signal.SIGKILL)
        assert end(folder)[0] == -signal.SIGKILL, "it came to its end before"
        for path in [*(folder / "out").glob("epoch-*"), *(folder / "out").glob("best")]:
            VisualChat.from_pretrained(path)
    assert (folder / "out/state/latest").exists()
    assert steps_of(run(folder, *flags, "--resume")) == steps_of(whole), "bit for bit"
    assert "already holds a run" in run(folder, *flags, "--resume", fails=True), "it is finished"


KILLED = """
import os, signal, torch, train, deepspeed
calls = []
def die(*_, **__):
    calls.append(1)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return {name}_(*_, **__)
{name}_ = {name}
{name} = die
train.main()
"""


def test_a_kill_while_a_state_is_written_loses_nothing(folder):
    """In the middle of DeepSpeed's files, before the new state has its name, before the old one is removed, and while a checkpoint takes its place"""
    flags = ["--datasets", "llava_dial", "--concatenate", "1", "--batch_size", "2", "--micro_batch_size", "1", "--epochs", "2", "--eval_fraction", "0.2",
             "--save_every", "1", "--zero_stage", "0"]
    whole = run(folder, *flags)
    (folder / "out").rename(folder / "whole")
    found = []
    for name, call in (("torch.save", 2), ("train.write_whole", 2), ("train.shutil.rmtree", 2), ("deepspeed.DeepSpeedEngine.save_checkpoint", 3)):
        killed = KILLED.format(name=name, call=call).replace(f"{name}_", "real")
        begin(folder, *flags, "--resume", "--workers", "0", code=killed)
        code, _, err = end(folder)
        assert code == -signal.SIGKILL, err
        found.append(sorted(path.name for path in (folder / "out/state").glob("step-*")))
        assert not (folder / "out/state/latest").exists() or (folder / "out/state/latest").read_text() in found[-1]
    assert max(map(len, found)) == 2, "two states lay there at least once"
    assert steps_of(run(folder, *flags, "--resume")) == steps_of(whole)


def test_a_full_disk_loses_nothing_and_a_state_of_another_run_is_refused(folder):
    """What was there stays; what is wrong is named; with room again the run goes on"""
    config = json.loads((folder / "llama/config.json").read_text()) | {"intermediate_size": 8000}
    (folder / "llama/config.json").write_text(json.dumps(config))  # much is frozen: a checkpoint is larger than a state
    torch.manual_seed(0)
    save_weights(plain_weights(Llama(read_llama_config(folder / "llama"))), folder / "llama/model.safetensors")
    flags = ["--datasets", "llava_dial", "--concatenate", "1", "--batch_size", "4", "--micro_batch_size", "2", "--epochs", "2",
             "--eval_fraction", "0.2"]
    out = folder / "out"
    assert "the state of step 3 cannot be written to " in run(folder, *flags, limits={"RLIMIT_FSIZE": 200_000}, fails=True)
    assert not (out / "state/latest").exists()
    for two in (True, False):
        message = run(folder, *flags, "--overwrite", two=two, limits={"RLIMIT_FSIZE": 2_000_000}, fails=True)
        assert message.startswith(f"train.py: {out.resolve()}/epoch-1 cannot be written: ") and "File too large" in message
    assert left(folder) == ["log.jsonl", "state"] and (out / "state/latest").read_text() == "step-3", "nothing half-written"

    resume = [*flags, "--resume"]
    message = run(folder, *resume, "--learning_rate", "0.5", fails=True)
    assert "--resume: the --learning_rate was 0.001, here it is 0.5; make it the same again, or begin anew" in message
    assert "the number of processes (--num_accelerators) was 1, here it is 2" in run(folder, *resume, two=True, fails=True)
    (folder / "csv.json").write_text(json.dumps({"gradient_clipping": 2.0}))
    assert "the --deepspeed_config was None, here it is {'gradient_clipping': 2.0}" in run(folder, *resume, "--deepspeed_config", folder / "csv.json", fails=True)
    data = (folder / "llava/conversation_58k.json").read_text()
    (folder / "llava/conversation_58k.json").write_text(json.dumps(json.loads(data)[1:]))
    assert "the numbers of samples was [10, 10, 3], here it is [10, 10, 2]" in run(folder, *resume, fails=True)
    (folder / "llava/conversation_58k.json").write_text(data)
    file = next((out / "state/step-3").rglob("*.pt"))
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    assert "state cannot be read: " in run(folder, *resume, fails=True)
    file.write_bytes(whole)
    begun = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text("")
    assert re.search(r"--resume: the .* was None, here it is ", run(folder, *resume, fails=True)), "what the run was is no longer known"
    (out / "log.jsonl").write_text(begun)
    copies = [out / name for name in ("epoch-1-backup", "state/step-3-backup", "state-backup")]  # somebody's, left alone at the next save, at the end and later
    for copy in copies:
        copy.mkdir()
    log = run(folder, *resume)
    assert left(folder) == ["best", "epoch-1", "epoch-1-backup", "epoch-2", "log.jsonl", "state", "state-backup"] and [*out.glob("state/*")] == copies[1:2]
    copies[1].rename(out / "step-3")
    (out / "epoch-1").rename(folder / "elsewhere")
    (out / "epoch-1").symlink_to(folder / "elsewhere")
    run(folder, *flags[:-2], "--eval_fraction", "0", "--max_steps", "1", "--overwrite")
    assert left(folder) == ["best", "epoch-1", "epoch-1-backup", "log.jsonl", "state-backup", "step-3"], "and epoch-2 is replaced"
    assert (folder / "elsewhere/config.json").exists() and not (out / "epoch-1").is_symlink()
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6] and (checkpoint_path(out / "best") / "config.json").exists()


def test_zero_makes_no_difference_in_16_bit_either(folder):
    """Without it DeepSpeed makes an optimizer's state by a step of its own, which must not count"""
    flags = ["--datasets", "llava_dial", "--batch_size", "4", "--epochs", "2", "--eval_fraction", "0", "--learning_rate", "0.02",
             "--dtype", "bfloat16", "--overwrite"]
    none, one = (losses(run(folder, *flags, "--zero_stage", stage)) for stage in "01")
    assert none == one and len(one) >= 3 and one[-1] < one[0]


def test_out_of_memory_names_what_helps():
    args = argparse.Namespace(micro_batch_size=4, max_length=4096, gradient_checkpointing=None)
    with pytest.raises(RuntimeError) as error:
        torch.empty(10 ** 15)  # no machine has it
    for failure in (error.value, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")):
        assert "--micro_batch_size (now 4), a lower --max_length (now 4096), or --gradient_checkpointing (now off)" in sentence_of(failure, args)
    assert sentence_of(RuntimeError("something else"), args) is None


MEMORY = """
import gc, sys, time
sys.path.append("tests")
import torch
from contextlib import nullcontext
from bench import states
from model import Llama, LlamaConfig, VisualChat, make_vit, size_of
from vision import ViTConfig
from train import start_distributed
deepspeed = start_distributed(torch.device("cpu"))
for stage in range(4):
    settings = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
                "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
    gc.collect()
    old = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]  # kept, so that no new one gets its id
    before = set(map(id, old))
    with deepspeed.zero.Init(config_dict_or_path=settings) if stage == 3 else nullcontext():
        model = VisualChat(make_vit(ViTConfig(32, 64, 2, 2, 28, 14)), Llama(LlamaConfig(128, 352, 4, 4, 2, 32, 2000)))
    model.set_trained(everything=True)
    engine, *_ = deepspeed.initialize(model=model if stage == 3 else model.bfloat16(), config=settings,
                                      model_parameters=[p for p in model.parameters() if p.requires_grad])
    ids = torch.arange(8)[None]
    for update in (True, False):
        losses, _ = engine(ids, ids * 0 + 1, ids, torch.zeros(0, 3, 28, 28), torch.arange(0))
        engine.backward(losses.sum())
        if update:
            engine.step()
    time.sleep(0.3)  # gloo's thread lets go of what it has sent
    gc.collect()
    tensors = [t for t in gc.get_objects() if id(t) not in before and isinstance(t, torch.Tensor) and t.is_floating_point()]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    counts = [sum(size_of(p).numel() for p in model.parameters() if p.requires_grad or all) for all in (True, False)]
    if torch.distributed.get_rank() == 0:
        print("MEMORY", stage, sum(sizes.values()), sum(states(*counts, 2, stage)), flush=True)
    engine.destroy()
    del engine, model, tensors, losses
"""


def test_describe_foretells_the_bytes_of_a_run(tmp_path, processes):
    """Two processes, ZeRO 0 to 3: all tensors that live between backward pass and step"""
    begin(tmp_path, two=True, code=MEMORY)
    code, out, err = end(tmp_path)
    found = [list(map(int, line.split()[-3:])) for line in out.splitlines() if "MEMORY" in line]
    assert code == 0 and [stage for stage, *_ in found] == [0, 1, 2, 3], out + err
    for stage, measured, formula in found:
        assert 0.9 < measured / formula < 1.1, found


# ---- machines that are not ours ----------------------------------------------------------------------------------------

def accelerator(monkeypatch, kind, count, built_for=None):
    """Stand in for a machine with `count` accelerators of a kind -> the list of what is asked of torch.accelerator"""
    asked = []
    current = lambda check_available=False: torch.device(kind) if kind and count else None if check_available else torch.device(built_for)  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "set_device_index", asked.append)
    return asked


def test_a_build_for_gpus_trains_on_a_machine_without_one(mine):
    """What a plain pip install of torch gives on Linux, on a laptop"""
    folder, flags = mine
    built = """
import torch, train
torch.accelerator.current_accelerator = lambda check_available=False: None if check_available else torch.device("cuda")
train.main()
"""
    assert len(losses(run(folder, *flags, "--max_steps", "2", code=built))) == 2


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    """Its index is set before the first tensor is made, or GPU 0 would be opened by all of them"""
    asked = accelerator(monkeypatch, "cuda", 8)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "empty", lambda *_, device: asked.append(device) or torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(train, "start_distributed", lambda device: sys.exit())
    with pytest.raises(SystemExit):
        train.train(argparse.Namespace(dtype=None, compile=False, trainable="recipe", lora_rank=0, vision_lora_rank=0, save_trained_only=None), None)
    assert asked == [3, "cuda:3"]


def test_two_processes_on_one_gpu_are_told_what_to_do(monkeypatch):
    accelerator(monkeypatch, "cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match=r"process 1 of this machine has no GPU of its own \(found: 1\). Start fewer \(deepspeed --num_accelerators N\)"):
        own_device()


def test_an_apple_gpu_is_left_alone_by_training(monkeypatch):
    assert accelerator(monkeypatch, "mps", 1) == [] and own_device() == "cpu"


MACHINE = """
import os
del os.sched_getaffinity  # macOS
def refused(*_):
    raise OSError(95, "Operation not supported")
os.symlink = os.link = refused  # exFAT, Google Drive
import train
train.main()
"""


def test_a_machine_without_affinity_and_links_trains_and_chats(mine):
    """macOS; a disk that knows no links: a run of several epochs, and a chat"""
    folder, flags = mine
    assert len(losses(run(folder, *flags, "--eval_fraction", "0.25", code=MACHINE, OMP_NUM_THREADS=None))) >= 4
    best = checkpoint_path(folder / "out/best")
    assert best.name.startswith("epoch-") and (best / "config.json").exists() and not (folder / "out/best").is_symlink()
    done = subprocess.run([sys.executable, "chat.py", str(folder / "out/best"), "--max_new_tokens", "4"], cwd=ROOT, input="Hello?\n", capture_output=True, text=True)
    assert done.returncode == 0 and "> " in done.stdout, done.stderr


SMALL = """
import ctypes, subprocess, sys
if ctypes.CDLL(None).unshare(0x20000):  # a view of the mounts for itself
    sys.exit(77)
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"], check=True)
import train
train.main()
"""


def test_a_small_shared_memory_is_one_sentence(mine):
    """Docker gives 64 MB, which is too little for larger pictures and batches: at once, and not when the workers' time is up"""
    folder, flags = mine
    begin(folder, "--help", code=SMALL)
    if end(folder)[0]:
        pytest.skip("needs the right to mount")
    message = run(folder, *flags, "--workers", "2", fails=True, code=SMALL)
    assert message == ("train.py: /dev/shm is too small for what --workers 2 read ahead: make it larger (docker run --shm-size 8g), or do without "
                       "them (--workers 0)")
    assert losses(run(folder, *flags, "--workers", "0", "--max_steps", "1", "--overwrite", code=SMALL))


def test_what_no_shared_memory_is_left_for_fails_where_it_is_heard(monkeypatch):
    """In the worker's own code, not in the thread that sends its batches"""
    tokenizer, shared = Tokenizer(FIXTURES / "tokenizer.model"), []
    example = encode([Turn("What is it?", "red")], tokenizer, 17)
    for worker in (None, "a worker"):
        monkeypatch.setattr(train, "get_worker_info", lambda: worker)
        shared += [[value.is_shared() for value in finish_batch([example], example)[0].values()]]
    assert shared == [[False] * 5, [True] * 5]


def test_a_step_of_many_micro_batches_needs_many_open_files(mine):
    """Five tensors each; with the 1,024 of most shells a batch of 256 on one GPU, one sample at a time, would stop"""
    folder, flags = mine
    flags = ["--datasets", *[folder / "mine.json"] * 6, "--batch_size", "64", "--micro_batch_size", "1", "--max_steps", "1", "--eval_fraction", "0",
             "--zero_stage", "0"]
    assert losses(run(folder, *flags, limits={"RLIMIT_NOFILE": 200}))


def test_a_second_run_in_the_same_folder_is_refused(mine):
    folder, flags = mine
    run(folder, *flags, "--max_steps", "1")
    before = (folder / "out/log.jsonl").read_text()
    with open(folder / "out/log.jsonl", "a") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        assert f"another run is at work in --out {folder}/out: name another folder" in run(folder, *flags, "--overwrite", fails=True)
    assert (folder / "out/log.jsonl").read_text() == before
    run(folder, *flags, "--max_steps", "1", "--overwrite")


def test_a_disk_that_knows_no_locks_is_named(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(sys, "argv", ["train.py", "--language_model", str(FIXTURES / "tiny-llama"), "--vision_model", str(FIXTURES / "tiny-clip"),
                                      "--out", str(tmp_path / "out")])
    train.open_log(command_line())
    assert capsys.readouterr().out == f"--out {tmp_path}/out cannot be locked (Operation not supported): take care that no other run writes there\n"


def test_a_port_that_is_taken_is_one_sentence(mine):
    folder, flags = mine
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = run(folder, *flags, two=True, port=port, fails=True)
    assert f"the processes cannot meet at 127.0.0.1:{port}; if another run is there, deepspeed --master_port N takes another port" in message
    assert not left(folder)


def test_a_terminal_that_lacks_a_character_is_no_reason_to_stop(mine):
    """PYTHONIOENCODING=ascii, as in cron and in containers: what is printed has a question mark there, the log the character"""
    folder, flags = mine
    shutil.copy(folder / "mine.json", folder / "猫.json")
    flags = ["--datasets", folder / "mine.json", folder / "猫.json", *flags[2:], "--max_steps", "1", "--eval_fraction", "0.25"]
    log = run(folder, *flags, by=[sys.executable], PYTHONIOENCODING="ascii")
    assert str(folder / "猫.json") in next(line for line in log if "eval_loss" in line)["eval_exact_of"]


def test_the_workers_read_the_next_step_while_this_one_is_computed(processes, monkeypatch):
    """All micro-batches of a step are taken before the first is computed"""
    read = multiprocessing.Value("i", 0)

    class Conversations(list):
        def __getitem__(self, index):
            if multiprocessing.parent_process():
                with read.get_lock():
                    read.value += 1
            return super().__getitem__(index)

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    args = argparse.Namespace(batch_size=16, micro_batch_size=1, workers=2, max_length=100, max_images=8)
    loader = batches(Conversations([[Turn("What is it?", "red")]] * 64), tiny_model(), Tokenizer(FIXTURES / "tokenizer.model"), args)
    for _ in range(16):
        next(loader)
    deadline = time.monotonic() + 20
    while read.value < 32 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert read.value == 32, "16 of this step and 16 of the next"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_other_processes_the_system_makes_an_end(monkeypatch, rank):
    """They may wait in a kernel, where no Python runs; process 0 has a sentence to say"""
    kinds, found = (signal.SIGINT, signal.SIGTERM), []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["train.py", "--language_model", "a", "--vision_model", "b"])
    monkeypatch.setattr(train, "train", lambda *_: found.extend(map(signal.getsignal, kinds)))
    before = list(map(signal.getsignal, kinds))
    try:
        train.main()
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)
    assert [handler is signal.SIG_DFL for handler in found] == [rank == "1"] * 2


@pytest.mark.parametrize("environment, seconds", [({}, 3600), ({"DEEPSPEED_TIMEOUT": "5"}, 300)])
def test_processes_wait_an_hour_for_each_other(processes, environment, seconds):
    """Process 0 may make the index of tens of gigabytes meanwhile; DEEPSPEED_TIMEOUT, which DeepSpeed reads when it is imported, says otherwise"""
    code = """
import torch, train
train.start_distributed(torch.device("cpu"))
print(torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert float(done.stdout.splitlines()[-1]) == seconds, done.stderr


def test_the_learning_rate_rises_from_the_first_step_and_falls_to_zero():
    """Ten steps up, then half a cosine: 1/10, 2/10, ... 1, and in the middle of the fall a half"""
    rates = [schedule(step, 10, 110) for step in range(111)]
    assert rates[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1])
    assert rates[60] == pytest.approx(0.5) and rates[110] == pytest.approx(0) and rates[35] == pytest.approx((1 + 0.5 ** 0.5) / 2)
    assert schedule(0, 1, 1) == 1


def test_the_recipe_is_that_of_the_paper(tmp_path, monkeypatch):
    """AdamW with betas 0.9 and 0.95, no weight decay, clipping at 1, rate 1e-3, 10% warm-up, 128 samples a step, 6 epochs"""
    (tmp_path / "ds.json").write_text("{}")
    settings = settings_of(tmp_path)
    assert settings["optimizer"] == {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0, "torch_adam": True}}
    assert settings["gradient_clipping"] == 1.0
    monkeypatch.setattr(sys, "argv", ["train.py", "--language_model", "x", "--vision_model", "x"])
    args = command_line()
    assert (args.learning_rate, args.warmup, args.batch_size, args.epochs, args.max_length, args.max_images) == (1e-3, 0.1, 128, 6, 4096, 8)


def test_every_weight_that_is_trained_is_in_one_group_of_the_optimizer():
    model = tiny_model("cross")
    for everything in (False, True):
        model.set_trained(everything)
        groups = parameter_groups(model, argparse.Namespace(learning_rate=1, embedding_learning_rate=2))
        grouped = [id(p) for group in groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_what_would_take_other_steps_may_not_change_on_resume(tmp_path, monkeypatch):
    """Every flag of the command line but those that say where and how it is computed"""
    free = {"out", "resume", "overwrite", "save_every", "save_trained_only", "workers", "micro_batch_size",
            "gradient_checkpointing", "local_rank"}
    monkeypatch.setattr(sys, "argv", ["train.py", "--language_model", "x", "--vision_model", "x"])
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 1)
    args = command_line()
    args.out = tmp_path
    with open(tmp_path / "log.jsonl", "w+") as log:
        train.begin_log(log, False, args, [[1, 2]], [[3]], 7)
        train.begin_log(log, True, args, [[1, 2]], [[3]], 7)
        for name in vars(args):
            changed = argparse.Namespace(**vars(args) | {name: "other"} if name != "deepspeed_config" else {**vars(args), name: FIXTURES / "tiny-llama/config.json"})
            if name in free:
                train.begin_log(log, True, changed, [[1, 2]], [[3]], 7)
            else:
                with pytest.raises(InputError, match=f"--resume: the --{name} was "):
                    train.begin_log(log, True, changed, [[1, 2]], [[3]], 7)
        for numbers in (([[1]], [[3]], 7), ([[1, 2]], [[3, 4]], 7), ([[1, 2]], [[3]], 8)):
            with pytest.raises(InputError, match="--resume: the number"):
                train.begin_log(log, True, args, *numbers)


@pytest.mark.parametrize("given, rate", [(None, 0.5), (0.0, 0.0), (0.25, 0.25)])
def test_the_word_embedding_has_a_rate_of_its_own_if_it_is_given(given, rate):
    model = tiny_model()
    model.set_trained()
    others, words = parameter_groups(model, argparse.Namespace(learning_rate=0.5, embedding_learning_rate=given))
    assert (others["lr"], words["lr"]) == (0.5, rate) and words["params"] == [model.language_model.model.embed_tokens.weight]
    assert len(others["params"]) == len(list(model.projection.parameters())) == 4
