"""LLaMA-2, VisualChat and weights against transformers' numbers and the rules of the design. python -m pytest tests/test_model.py"""
import json
import random
import resource
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, all_logits, sequence, tiny_model
from safetensors.torch import load_file, save_file

from bench import activations, describe
from mmca import IMAGE, TEXT, make_pattern
from data import Tokenizer
import model as model_file
from model import (KVCache, Llama, LlamaConfig, VisualChat, add_lora, choose_device, load_llama, load_vit, make_projection, make_vit,
                   read_llama_config, rotary)
from vision import InputError, ViTConfig, read_preprocessing

KINDS = "mmca", "causal", "cross"


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llama-sharded"])
def test_logits_are_those_of_transformers(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    with torch.no_grad():
        logits = load_llama(FIXTURES / name)(expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llama-sharded"])
def test_greedy_tokens_are_those_of_transformers(name):
    """With the cache, a token at a time"""
    expected = load_file(FIXTURES / name / "expected.safetensors")
    model = VisualChat(load_vit(FIXTURES / "tiny-clip"), load_llama(FIXTURES / name))
    cache, ids, generated = KVCache(model.language_model.model, 40), expected["input_ids"][:1], []
    for _ in range(12):
        generated.append(model.extend(ids, torch.full_like(ids, TEXT), cache).argmax().item())
        ids = torch.tensor([generated[-1:]])
    assert generated == expected["generated"].tolist()


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llama-sharded"])
def test_the_old_and_the_new_spelling_of_a_configuration_say_the_same(tmp_path, name):
    shutil.copy(FIXTURES / name / "config.transformers4.json", tmp_path / "config.json")
    assert read_llama_config(tmp_path) == read_llama_config(FIXTURES / name)


def test_a_configuration_without_later_fields_is_read(tmp_path):
    config = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_llama_config(tmp_path)
    assert (read.num_key_value_heads, read.head_dim, read.rope_theta, read.tie_word_embeddings) == (4, 16, 10000.0, False)
    assert (read.rms_norm_eps, read.max_position_embeddings) == (1e-6, 2048), "transformers' own"


@pytest.mark.parametrize("change", [{"rope_theta": None}, {"rope_theta": 10000}, {"head_dim": None}, {"num_key_value_heads": 2, "attention_bias": None},
                                    {"hidden_act": "swish"}, {"rope_scaling": {}}, {"rope_parameters": {"rope_theta": None, "rope_type": "default"}},
                                    {"rope_parameters": {"rope_theta": 10000.0}}, {"rope_scaling": {"type": "default"}}, {"rms_norm_eps": 1e-5, "model_type": None}])
def test_odd_but_legal_configurations_are_read(tmp_path, change):
    config = json.loads((FIXTURES / "tiny-llama/config.transformers4.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert read_llama_config(tmp_path) == read_llama_config(FIXTURES / "tiny-llama")


@pytest.mark.parametrize("change, name", [({"rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
                                          ({"rope_scaling": {"factor": 4.0}}, "rope_type = 'missing'"),
                                          ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_type = 'missing'"),
                                          ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
                                          ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config = .*'gptq'"),
                                          ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
                                          ({"hidden_act": "gelu"}, "hidden_act"),
                                          ({"model_type": "mistral"}, "mistral")])
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, name):
    config = json.loads((FIXTURES / "tiny-llama/config.transformers4.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=name):
        read_llama_config(tmp_path)


def copy_of(name, folder, change):
    """A copy of a one-file fixture whose tensors went through change(dict)"""
    shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
    tensors = load_file(FIXTURES / name / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_published_buffers_are_dropped_by_name(tmp_path):
    copy_of("tiny-llama", tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_llama(tmp_path)
    copy_of("tiny-clip", tmp_path / "clip", lambda t: t.update({"vision_model.embeddings.position_ids": torch.arange(17)[None]}))
    load_vit(tmp_path / "clip")


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing"),
    (lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.ones(1)}), "model.layers.7.mlp.up_proj.weight is not in the"),
    (lambda t: t.update({"lm_head.weight": torch.ones(3, 4)}), r"lm_head.weight is \(3, 4\) in the file, \(512, 64\) in the")])
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        load_llama(copy_of("tiny-llama", tmp_path, change))


def test_missing_shard_and_missing_weights_are_named(tmp_path):
    shutil.copytree(FIXTURES / "tiny-llama-sharded", tmp_path / "a")
    (tmp_path / "a/model-00003-of-00004.safetensors").unlink()
    with pytest.raises(InputError, match="model-00003-of-00004.safetensors"):
        load_llama(tmp_path / "a")
    (tmp_path / "b").mkdir()
    shutil.copy(FIXTURES / "tiny-llama/config.json", tmp_path / "b")
    with pytest.raises(InputError, match="holds no weights"):
        load_llama(tmp_path / "b")
    (tmp_path / "b/model.safetensors").write_bytes(b"not a safetensors file at all")
    with pytest.raises(InputError, match="model.safetensors cannot be read"):
        load_llama(tmp_path / "b")


class Harm:
    """A pickle that would run code"""

    def __reduce__(self):
        return open, ("harm-was-done", "w")


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bin_files_open_without_running_code(tmp_path, monkeypatch, new):
    """In torch's format since version 1.6, which is mapped, and in the one before; of damaged ones a sentence says so"""
    monkeypatch.chdir(tmp_path)
    shutil.copy(FIXTURES / "tiny-llama/config.json", tmp_path)
    file, mapped, load = tmp_path / "pytorch_model.bin", [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, mmap, **more: mapped.append(mmap) or load(*args, mmap=mmap, **more))
    torch.save(load_file(FIXTURES / "tiny-llama/model.safetensors"), file, _use_new_zipfile_serialization=new)
    ours, theirs = load_llama(tmp_path), load_llama(FIXTURES / "tiny-llama")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters())) and mapped == [new]
    whole, dice = file.read_bytes(), random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(3):
            data[dice.randrange(dice.choice([300, 3000, len(data)]))] = dice.randrange(256)
        file.write_bytes(data[:dice.choice([None, dice.randrange(len(data))])])
        with suppress(InputError):
            load_llama(tmp_path)
    for name in ("pytorch_model.bin", "model.safetensors"):  # the second is looked for first
        for text in ("version https://git-lfs.github.com/spec/v1\noid sha256:1", "<html>", "", "\0" * 99):
            (tmp_path / name).write_text(text)
            with pytest.raises(InputError, match=f"{name} cannot be read: .* Git LFS pointer"):
                load_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Harm()}, file, _use_new_zipfile_serialization=new)
    with pytest.raises(InputError, match="hold more than tensors, and code in them could run"):
        load_llama(tmp_path)
    torch.save([torch.ones(1)], file, _use_new_zipfile_serialization=new)
    with pytest.raises(InputError, match="cannot be read: "):
        load_llama(tmp_path)
    assert not (tmp_path / "harm-was-done").exists()


def test_text_alone_is_llama_under_every_mechanism():
    expected = load_file(FIXTURES / "tiny-llama/expected.safetensors")
    for kind in KINDS:
        modality = torch.full_like(expected["input_ids"], TEXT)
        logits = all_logits(tiny_model(kind), expected["input_ids"], modality)
        torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_changes_nothing_before_it(kind):
    model, (ids, modality) = tiny_model(kind), sequence("TTTITTITT")
    features, word = torch.randn(2, 17, 64), modality[0] == TEXT
    before = all_logits(model, ids, modality, features)
    for j in (1, 2, 20, 39):
        changed = ids.clone()
        changed[0, j] = (changed[0, j] + 1) % 512
        moved = (all_logits(model, changed, modality, features) - before).abs().amax(-1)[0] > 1e-5
        assert not moved[:j].any() and moved[j] and moved[j:][word[j:]].all()
    other = features.clone()
    other[1, 3] += 1
    place = (modality[0] == IMAGE).nonzero().flatten()[17 + 3]
    moved = (all_logits(model, ids, modality, other) - before).abs().amax(-1)[0] > 1e-5
    assert not moved[:place].any() and moved[place:][word[place:]].all()


def test_in_the_decoder_a_picture_sees_no_word_and_an_image_token_only_itself():
    """By the keys and values of the last layer: an image token's depend on its own feature alone"""
    model, (ids, modality) = tiny_model(), sequence("TTTITTITT")

    def kept(ids, features):
        cache = KVCache(model.language_model.model, ids.shape[1])
        with torch.inference_mode():
            who = make_pattern(modality, cache.append(modality))
            model.language_model.model(who.arrange(model.embed(ids, modality, features)), who, cache)
        return torch.cat([cache.keys[-1], cache.values[-1]], 3)[0, :, -34:].flip(1)  # (K, 34, 2 d), in reading order

    features = torch.randn(2, 17, 64)
    before, other, changed = kept(ids, features), features.clone(), ids.clone()
    other[1, 3] += 1
    changed[0, :3] += 1
    assert torch.equal(kept(changed, features), before), "a word changed an image token"
    assert ((kept(ids, other) - before).abs().amax((0, 2)) > 1e-5).nonzero().flatten().tolist() == [17 + 3]


def test_pictures_stand_in_order():
    """The original inserts them in reverse"""
    model, (ids, modality) = tiny_model(), sequence("TITTIIT")
    features = torch.randn(3, 17, 64)
    embeds = model.embed(ids, modality, features)
    torch.testing.assert_close(embeds[modality == IMAGE], features.flatten(0, 1))
    words = model.language_model.model.embed_tokens(ids)
    torch.testing.assert_close(embeds[modality == TEXT], words[modality == TEXT])


def test_a_count_that_does_not_fit_names_both_numbers():
    model, (ids, modality) = tiny_model(), sequence("TIIT")
    with pytest.raises(InputError, match="34 image positions in the batch, but 17 image tokens"):
        model.embed(ids, modality, torch.randn(1, 17, 64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounds", [["TTITTT", "T", "IITT", "TT", "T", "TIT"], ["TTTT", "ITIT", "T"], ["IT", "IT", "IT"]])
def test_round_by_round_is_everything_at_once(kind, rounds):
    model, (ids, modality) = tiny_model(kind), sequence("".join(rounds))
    features = torch.randn("".join(rounds).count("I"), 17, 64)
    expected = all_logits(model, ids, modality, features)[0]
    cache, done, pictures = KVCache(model.language_model.model, ids.shape[1]), 0, 0
    for text in rounds:
        stop, shown = done + sequence(text)[0].shape[1], text.count("I")
        logits = model.extend(ids[:, done:stop], modality[:, done:stop], cache,
                            [model.keep_picture(picture) for picture in features[pictures:pictures + shown]])
        torch.testing.assert_close(logits, expected[stop - 1], atol=2e-5, rtol=1e-4)
        done, pictures = stop, pictures + shown
    with pytest.raises(AssertionError, match="there is room for"):
        model.extend(ids[:, :1], modality[:, :1], cache)


def test_what_the_decoder_keeps_for_a_picture_depends_on_the_picture_alone():
    """Under MMCA: what was read by itself and then placed is what is computed afresh, in a pass over a whole conversation"""
    model, features, config = tiny_model(), torch.randn(2, 17, 64), tiny_model().language_model.config
    pictures = [model.keep_picture(picture) for picture in features]
    for text, order in (("TTIT", [0]), ("TITTTTTTIT", [1, 0]), ("IIT", [0, 1])):
        ids, modality = sequence(text, seed=len(text))
        placed, afresh = (KVCache(model.language_model.model, ids.shape[1]) for _ in range(2))
        model.extend(ids, modality, placed, [pictures[i] for i in order])
        with torch.inference_mode():
            who = make_pattern(modality, afresh.append(modality))
            model.language_model.model(who.arrange(model.embed(ids, modality, features[order])), who, afresh)
        afresh.advance(who)
        assert (placed.num_words, placed.num_image_tokens) == (afresh.num_words, afresh.num_image_tokens) == (text.count("T"), 17 * text.count("I"))
        for one, other in zip(placed.keys + placed.values, afresh.keys + afresh.values):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="shorter"):
        model.extend(ids[:, :17], modality[:, :17], KVCache(model.language_model.model, 17))
    with pytest.raises(ValueError, match="longer"):
        model.extend(ids[:, :17], modality[:, :17], KVCache(model.language_model.model, 17), pictures)
    assert model.keep_picture(features[0]).nbytes == 17 * 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def test_added_layers_are_the_second_term_with_weights_of_their_own():
    model, (_, modality) = tiny_model("cross"), sequence("TTITIT")
    layer, x = model.cross_attention[0], torch.randn(1, 4, 64)
    features = torch.randn(1, 34, 64)
    out = layer(x, features.flip(1), make_pattern(modality, modality, "cross"))
    normed = layer.norm(x)
    for t, seen in enumerate([0, 0, 17, 34]):
        result = x[0, t]
        if seen:
            q = layer.q_proj(normed[0, t]).view(4, 16)
            k = layer.k_proj(features[0, :seen]).view(seen, 2, 16).repeat_interleave(2, 1)
            v = layer.v_proj(features[0, :seen]).view(seen, 2, 16).repeat_interleave(2, 1)
            weights = (torch.einsum("hd,khd->hk", q, k) / 4).softmax(-1)
            result = result + layer.gate.tanh() * layer.o_proj(torch.einsum("hk,khd->hd", weights, v).flatten())
        torch.testing.assert_close(out[0, t], result, atol=1e-5, rtol=1e-5)


def test_loss_of_each_trained_token():
    """Logits only at labelled positions give the same losses as cross entropy over everything"""
    model, (ids, modality) = tiny_model(), sequence("TTITTTTIT")
    behind_a_word = torch.nn.functional.pad(modality, (1, 0))[:, :-1] == TEXT
    labels = torch.where((torch.rand(ids.shape) < 0.5) & (modality == TEXT) & behind_a_word, ids, -100)
    pixels, index = torch.randn(1, 3, 56, 56), torch.tensor([0, 0])
    losses, hits = model(ids, modality, labels, pixels, index)
    logits = all_logits(model, ids, modality, model.encode_images(pixels)[index])[:, :-1]
    full = torch.nn.functional.cross_entropy(logits[0], labels[0, 1:], reduction="none")
    torch.testing.assert_close(losses, full[labels[0, 1:] != -100])
    assert torch.equal(hits, (logits.argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100])
    place = int((modality[0] == IMAGE).nonzero()[-1]) + 1
    labels[0, place] = ids[0, place]
    with pytest.raises(AssertionError, match="a label stands behind an image token"):
        model(ids, modality, labels, pixels, index)


@pytest.mark.parametrize("kind, rows", [("mmca", (8, 42, 42, 42)), ("causal", (42, 42, 42, 42)), ("cross", (8, 8, 8, 8))])
def test_an_image_token_costs_only_what_is_asked_of_it(kind, rows):
    """It asks nothing, so it needs no query, and under CrA the decoder does without it"""
    model, (ids, modality) = tiny_model(kind), sequence("TTITTTITTT")
    seen, layers = [], model.language_model.model.layers
    for module in (layers[0].self_attn.q_proj, layers[0].mlp.up_proj, layers[-1].self_attn.k_proj, layers[-1].mlp.up_proj):
        module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    all_logits(model, ids, modality, torch.randn(2, 17, 64))
    assert tuple(seen) == rows


@pytest.mark.slow
@pytest.mark.parametrize("kind, rank", [("mmca", 2), ("causal", 0), ("cross", 0)])
def test_a_layer_is_one_graph_whatever_the_size_of_the_batch(kind, rank, monkeypatch):
    """torch.compile takes every layer whole; twelve batches of twelve shapes take two graphs of each kind of layer, since the last decoder
    layer leaves image tokens out. A third would raise. Losses and gradients are those of the layers as they are"""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    torch._dynamo.reset()
    model = tiny_model(kind)
    layers = [*model.language_model.model.layers, *model.vision_model.blocks, *(model.cross_attention or [])]
    if rank:
        add_lora(model.language_model.model.layers, rank)
    model.set_trained()

    def step(n):
        torch.manual_seed(n)
        rows = ["T" * (3 + n) + "I" + "T" * (9 + 2 * n), ("IT" + "T" * (n % 4)) * (1 + n % 3) + "T" * 9, "TIT"][:2 + n % 2]
        modality = torch.nn.utils.rnn.pad_sequence([sequence(row)[1][0] for row in rows], batch_first=True)
        ids = torch.randint(3, 512, modality.shape) * (modality == TEXT)
        labels = ids.masked_fill((modality != TEXT) | (modality.roll(1, 1) != TEXT), -100)
        pictures = "".join(rows).count("I")
        losses, _ = model(ids, modality, labels, torch.randn(pictures, 3, 56, 56), torch.arange(pictures))
        losses.sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        return losses.detach(), gradients

    expected = [step(n) for n in range(12)]
    for layer in layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in range(12):
            torch.testing.assert_close(step(n), expected[n], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype, places", [(torch.bfloat16, 3), (torch.float16, 3), (torch.float32, 4)])
def test_positions_are_turned_into_angles_in_float32_whatever_the_format(dtype, places):
    """By the formula in float64; a bfloat16 knows no odd number above 256"""
    positions, config = torch.tensor([[0, 1, 255, 257, 1001, 4095]]), tiny_model().language_model.config
    d = config.head_dim
    angles = positions[0].double()[:, None] / config.rope_theta ** (torch.arange(0, d, 2).double() / d)
    cos, sin = rotary(positions, config, dtype)
    assert cos.dtype == sin.dtype == dtype
    for got, first, second in ((cos, angles.cos(), angles.cos()), (sin, -angles.sin(), angles.sin())):
        torch.testing.assert_close(got[0, 0].double(), torch.cat([first, second], 1), atol=5 * 10.0 ** -places, rtol=0)


@pytest.mark.parametrize("rank, vision_rank", [(0, 0), (2, 0), (0, 2), (2, 2)])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("kind, projection", [("mmca", "linear"), ("cross", "vit")])
def test_what_counts_as_trained_gets_a_gradient_and_nothing_else_does(kind, projection, everything, rank, vision_rank):
    model, (ids, modality) = tiny_model(kind), sequence("TTITTT")
    model.projection = make_projection(projection, model.vision_model.config, model.language_model.config)
    add_lora(model.language_model.model.layers, rank)
    add_lora(model.vision_model.blocks, vision_rank)
    model.set_trained(everything)
    labels = torch.where(modality == TEXT, ids, -100)
    labels[0, 2 + 17] = -100  # behind the picture
    losses, _ = model(ids, modality, labels, torch.randn(1, 3, 56, 56), torch.tensor([0]))
    losses.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("vision_model" in name for name in trained) == (everything or vision_rank > 0)


def test_gradients_reach_embedding_and_projection_through_frozen_weights():
    model, (ids, modality) = tiny_model(), sequence("TTITT")
    model.requires_grad_(False)
    model.projection.requires_grad_(True)
    model.language_model.model.embed_tokens.requires_grad_(True)
    labels = torch.where(modality == TEXT, ids, -100)
    labels[0, 2 + 17] = -100  # behind the picture
    losses, _ = model(ids, modality, labels, torch.randn(1, 3, 56, 56), torch.tensor([0]))
    losses.sum().backward()
    assert model.projection[0].weight.grad.abs().sum() > 0 and model.language_model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert model.vision_model.pre_layrnorm.weight.grad is None and model.language_model.model.norm.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_is_bit_exact(tmp_path, kind, dtype):
    model = tiny_model(kind).to(dtype)
    model.save_pretrained(tmp_path / "it", Tokenizer(FIXTURES / "tokenizer.model"))
    again = VisualChat.from_pretrained(tmp_path / "it", dtype)
    assert again.attention == kind and again.preprocessing["image_mean"] == model.preprocessing["image_mean"]
    ours, theirs = dict(model.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not list(tmp_path.glob(".*")) and (tmp_path / "it/language_model/tokenizer.model").exists()


@pytest.mark.parametrize("projection, tokens", [("linear", 16), ("vit", 16), ("perceiver", 256)])
def test_qwen_and_every_projection_are_saved_and_loaded(tmp_path, projection, tokens):
    config = LlamaConfig(128, 172, 2, 4, 2, 32, 512)
    model = VisualChat(load_vit(FIXTURES / "tiny-qwen-visual"), Llama(config), "mmca", projection).eval()
    model.preprocessing = read_preprocessing(FIXTURES / "tiny-qwen-visual", 56)
    model.save_pretrained(tmp_path / "it")
    again, pixels = VisualChat.from_pretrained(tmp_path / "it"), torch.randn(2, 3, 56, 56)
    assert model.state_dict().keys() == again.state_dict().keys()
    features = model.encode_images(pixels)
    assert again.image_tokens == tokens and features.shape == (2, tokens, 128) and torch.equal(features, again.encode_images(pixels))


def test_describe_counts_published_models_without_loading_them(capsys):
    """Against the numbers of parameters that are published"""
    describe("70b", "clip-l", "mmca", "linear")
    lines = capsys.readouterr().out.splitlines()[1:-1]
    rows = {line[:36].strip() + line[52:62].strip(): int(line[36:52].replace(",", "")) for line in lines}
    assert sum(n for name, n in rows.items() if name.startswith("language_model")) == 68_976_648_192
    assert sum(n for name, n in rows.items() if name.startswith("vision_model")) == 303_179_776
    trained = 32000 * 8192 + 1024 * 8192 + 3 * 8192  # embedding, Linear, LayerNorm
    assert rows["togethertrained"] == trained and rows["together"] == rows["togetherfrozen"] + trained
    assert rows["together"] == 68_976_648_192 + 303_179_776 + trained - 32000 * 8192


def test_describe_opens_folders_and_refuses_what_is_neither(capsys):
    describe(FIXTURES / "tiny-llama", FIXTURES / "tiny-qwen-visual/qwen_vl", "cross", "vit")
    assert "a picture of 56 x 56 takes 16 tokens" in capsys.readouterr().out
    with pytest.raises(InputError, match="7 is neither a folder nor one of 7b, 13b, 70b"):
        describe("7", "clip-l", "mmca", "linear")


@pytest.mark.parametrize("layers, pictures", [(4, 0), (4, 3), (8, 0)])
def test_describe_foretells_the_activations(layers, pictures):
    """All that autograd keeps of the recipe's forward pass in 16 bit, with layers computed again too"""
    torch.manual_seed(0)
    vision = ViTConfig(64, 128, 2, 4, 56, 14)
    model = VisualChat(make_vit(vision), Llama(LlamaConfig(256, 704, layers, 8, 4, 32, 1000))).bfloat16()
    model.set_trained()
    modality = torch.tensor([[TEXT] * 100 + [IMAGE] * 17 * pictures + [TEXT] * 400])
    ids = torch.randint(3, 1000, modality.shape)
    for again in (False, True):
        model.language_model.model.gradient_checkpointing, kept = again, {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            labels = ids.masked_fill((modality == IMAGE) | (modality.roll(1) == IMAGE), -100)
            model(ids, modality, labels, torch.randn(pictures, 3, 56, 56), torch.arange(pictures))
        measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        formula = activations(model.language_model.config, ids.shape[1], again)
        if again:  # while it is computed again, a layer keeps all; the forward pass ends before that
            formula -= activations(replace(model.language_model.config, num_hidden_layers=1), ids.shape[1])
            formula += ids.shape[1] * 4 * (256 + 1000)
        assert 0.9 < measured / formula < 1.1


def test_layers_on_several_devices_give_the_numbers_of_one(tmp_path):
    """The numbers are those of one device; on the second, which holds no numbers, nothing of the first is used"""
    for kind in ("mmca", "causal", "cross"):
        tiny_model(kind).save_pretrained(tmp_path / kind)
        logits = []
        for devices in ("cpu", "cpu,cpu", "cpu,meta"):
            devices, dtype = choose_device(devices)
            model = VisualChat.from_pretrained(tmp_path / kind, dtype, devices)
            layers = model.language_model.model
            cache = KVCache(layers, 60)
            torch.manual_seed(1)
            for text in ("TITT", "TT", "TIT"):
                ids, modality = sequence(text)
                features = model.encode_images(torch.randn(1, 3, 56, 56)) if "I" in text else []
                logits.append(model.extend(ids, modality, cache, [model.keep_picture(picture) for picture in features]))
        assert all(torch.equal(a, b) for a, b in zip(logits[:3], logits[3:6])) and logits[8].is_meta and cache.length == 3 + 17 + 2 + 2 + 17
        where = [layer.mlp.up_proj.weight.device.type for layer in layers.layers]
        assert where == [keys.device.type for keys in cache.keys] == ["cpu", "cpu", "meta"]
        assert layers.embed_tokens.weight.is_cpu and layers.norm.weight.is_meta and model.language_model.lm_head.weight.is_meta


def test_more_devices_than_layers_are_left_out():
    """Where the last layer's result is, the norm and the head are too; the device behind it stays empty"""
    layers = read_llama_config(FIXTURES / "tiny-llama").num_hidden_layers
    model = load_llama(FIXTURES / "tiny-llama", devices=["cpu"] * layers + ["meta"])
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_tied_head_is_asked_on_its_own_device(tmp_path):
    """It is the word embedding's weight, on the first device, while the last layer's result is on the last"""
    model = tiny_model()
    model.language_model.config.tie_word_embeddings = True
    model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "it")
    devices, dtype = choose_device("cpu,meta")
    model = VisualChat.from_pretrained(tmp_path / "it", dtype, devices)
    layers, (ids, modality) = model.language_model.model, sequence("TTT")
    with pytest.raises(NotImplementedError, match="no data"):  # that device holds no numbers to be brought to the head's
        model.extend(ids, modality, KVCache(layers, 8))


@pytest.mark.parametrize("projection", ["vit", "perceiver"])
def test_each_part_that_is_saved_in_shards_opens(tmp_path, monkeypatch, projection):
    monkeypatch.setattr(model_file, "SHARD_BYTES", 20_000)
    vision, language = load_vit(FIXTURES / "tiny-clip"), load_llama(FIXTURES / "tiny-llama")
    if projection == "perceiver":
        language = Llama(LlamaConfig(128, 172, 2, 4, 2, 32, 512))
    model = VisualChat(vision, language, "cross", projection)
    model.preprocessing = read_preprocessing(FIXTURES / "tiny-clip", 56)
    model.save_pretrained(tmp_path / "it")
    for part in ("language_model/model", "vision_model/model", "projection", "cross_attention"):
        assert len(list((tmp_path / "it").glob(f"{part}-*-of-*.safetensors"))) > 1 and (tmp_path / f"it/{part}.safetensors.index.json").exists(), part
    again = VisualChat.from_pretrained(tmp_path / "it")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_what_was_trained_alone_opens_from_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "SHARD_BYTES", 20_000)
    model = tiny_model()
    add_lora(model.language_model.model.layers, 2)
    model.set_trained()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.1)
    model.save_pretrained(tmp_path / "it", None, (FIXTURES / "tiny-llama", FIXTURES / "tiny-clip"))
    assert len(list((tmp_path / "it/language_model").glob("trained-*.safetensors"))) > 1
    again, (ids, modality) = VisualChat.from_pretrained(tmp_path / "it"), sequence("TTITTT")
    features = torch.randn(1, 17, 64)
    torch.testing.assert_close(all_logits(again, ids, modality, features), all_logits(model, ids, modality, features), atol=1e-4, rtol=1e-4)


def test_a_chain_of_what_was_trained_alone_opens_whole(tmp_path):
    """Trained from what was itself trained alone: each link brings what it has, the later wins"""
    bases, expected = (FIXTURES / "tiny-llama", FIXTURES / "tiny-clip"), load_llama(FIXTURES / "tiny-llama").state_dict()
    for link, (name, value) in enumerate([("model.norm.weight", 3.0), ("model.embed_tokens.weight", 5.0), ("model.norm.weight", 7.0)]):
        language, vision = load_llama(bases[0]), load_vit(bases[1])
        model = VisualChat(vision, language).requires_grad_(False)
        model.preprocessing = {}
        language.get_parameter(name).requires_grad_(True).data.fill_(value)
        expected[name] = torch.full_like(expected[name], value)
        model.save_pretrained(tmp_path / f"{link}", None, bases)
        bases = tmp_path / f"{link}/language_model", tmp_path / f"{link}/vision_model"
    again = load_llama(bases[0]).state_dict()
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_the_tokens_that_end_an_answer_are_those_of_the_tokenizer(tmp_path):
    """transformers' generate stops at what config.json names"""
    tokenizer = Tokenizer(FIXTURES / "tokenizer.model")
    tokenizer.bos, tokenizer.eos = 7, 9
    tiny_model().save_pretrained(tmp_path / "it", tokenizer)
    config = json.loads((tmp_path / "it/language_model/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (7, 9)


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path):
    tiny_model().save_pretrained(tmp_path / "it")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(InputError, match="it cannot be written: .*File too large"):
            tiny_model("cross").save_pretrained(tmp_path / "it")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    assert VisualChat.from_pretrained(tmp_path / "it").attention == "mmca"


def test_what_a_crash_has_left_beside_a_checkpoint_is_no_obstacle(tmp_path):
    """Killed once while the old one was removed, and again before the next state"""
    (tmp_path / ".it.unfinished").mkdir()
    for name in ("it", ".it.old.unfinished", ".it.unfinished/language_model"):
        tiny_model().save_pretrained(tmp_path / name)
    tiny_model("cross").save_pretrained(tmp_path / "it")
    assert [path.name for path in tmp_path.iterdir()] == ["it"] and VisualChat.from_pretrained(tmp_path / "it").attention == "cross"


@pytest.mark.parametrize("name", ["pathlib.Path.rename", "shutil.rmtree"])
@pytest.mark.parametrize("at", range(3))
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, name, at):
    """The old one or the new one, under its name or beside it; half of one never has its name"""
    tiny_model().save_pretrained(tmp_path / "it")
    module, function = {"pathlib.Path.rename": (Path, "rename"), "shutil.rmtree": (shutil, "rmtree")}[name]
    real, calls = getattr(module, function), []

    def killed(path, *rest, **more):
        calls.append(path)
        if len(calls) == at + 1:  # in the middle: something of it is gone
            if function == "rmtree" and (path / "config.json").exists():
                (path / "config.json").unlink()
            raise KeyboardInterrupt
        return real(path, *rest, **more)
    monkeypatch.setattr(module, function, killed)
    with suppress(KeyboardInterrupt):
        tiny_model("cross").save_pretrained(tmp_path / "it")
    found = {path.name: path for path in tmp_path.iterdir() if (path / "config.json").exists()}
    assert "it" in found or len(found) > 0 and not (tmp_path / "it").exists()
    for path in found.values():
        VisualChat.from_pretrained(path)


def test_a_weight_that_does_not_lie_in_one_piece_is_saved(tmp_path):
    """Some .bin files hold transposed tensors, and chat.py lays weights by columns"""
    model = tiny_model()
    weight = model.language_model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()
    model.save_pretrained(tmp_path / "it")
    assert torch.equal(VisualChat.from_pretrained(tmp_path / "it").language_model.lm_head.weight, weight)


def test_half_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="config.json cannot be read"):
        VisualChat.from_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path / "it")
    (tmp_path / "it/projection.safetensors").unlink()
    with pytest.raises(InputError, match="projection.safetensors"):
        VisualChat.from_pretrained(tmp_path / "it")


def test_transformers_opens_what_is_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny_model()
    model.save_pretrained(tmp_path / "it", Tokenizer(FIXTURES / "tokenizer.model"))
    ids, modality = sequence("TTTTTTTT")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "it/language_model", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(all_logits(model, ids, modality), theirs(ids).logits, atol=1e-4, rtol=0)
        pixels = torch.randn(2, 3, 56, 56)
        theirs = transformers.CLIPVisionModel.from_pretrained(tmp_path / "it/vision_model", dtype=torch.float32)
        torch.testing.assert_close(model.vision_model(pixels), theirs(pixels).last_hidden_state, atol=1e-4, rtol=0)


def test_a_build_for_gpus_runs_on_a_machine_without_one(monkeypatch):
    """torch knows an accelerator for which it was built, and on a plain pip install of Linux that is CUDA, be there one or not"""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None if check_available else torch.device("cuda"))
    assert choose_device() == ([torch.device("cpu")], torch.float32)


def test_cudnn_attention_is_not_used():
    """Torch's first choice on an H100: half a second for each new shape, and NaN gradients for some"""
    torch.backends.cuda.enable_cudnn_sdp(True)
    choose_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the operations that are computed, by name"""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function == torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.names.append("by a mask" if by_mask else function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_python_runs_ahead_of_a_gpu_from_the_decoder_on(kind):
    """It waits where a number or a size depends on what is computed. Before the decoder that is needed; behind its first layer no kernel
    would be launched before the last one is done"""
    model, (ids, modality) = tiny_model(kind), sequence("TTITTTITT")
    labels = torch.where((modality == TEXT) & (modality.roll(1) == TEXT), ids, -100)
    waits = "by a mask", "nonzero", "_local_scalar_dense", "item", "equal", "masked_select", "unique_dim"
    for everything in (False, True):
        model.set_trained(everything)
        with Operations() as noted:
            model.language_model.model.layers[0].register_forward_pre_hook(lambda *_: noted.names.append("decoder"))
            losses, hits = model(ids, modality, labels, torch.randn(2, 3, 56, 56), torch.arange(2))
            losses.mean().backward()
        behind = noted.names[noted.names.index("decoder"):]
        assert "mm" in behind and not set(behind) & set(waits), [name for name in behind if name in waits]
        assert set(noted.names) & set(waits), "those before it are seen"
