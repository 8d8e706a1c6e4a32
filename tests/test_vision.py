"""Pictures, both towers and the three projections against the numbers of others. python -m pytest tests/test_vision.py"""
import base64
import io
import json
import os
import random
import shutil
import struct
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES
from PIL import Image
from safetensors.torch import load_file, save_file

import model as model_file
from model import LlamaConfig, fill, load_vit, make_projection, make_vit
from vision import CLIP_PREPROCESSING, InputError, QwenConfig, ViTConfig, fit, fixed_positions, load_image, preprocess, read_json, read_preprocessing, read_vit_config, write_whole

CASES = FIXTURES / "cases"
CLIP, QWEN, PROJECTIONS = FIXTURES / "tiny-clip", FIXTURES / "tiny-qwen-visual", FIXTURES / "tiny-projections"


@pytest.mark.parametrize("name", ["landscape_rgb.png", "portrait_gray.jpg", "alpha_rgba.png", "palette_p.png"])
def test_pixels_are_those_of_transformers(name, tmp_path):
    expected = load_file(CLIP / "expected.safetensors")[f"pixel_values.{name.split('.')[0]}"]
    pixels = preprocess(load_image(CLIP / "images" / name), read_preprocessing(CLIP, 56))
    torch.testing.assert_close(pixels, expected, atol=1e-4, rtol=0)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads((CLIP / "preprocessor_config.json").read_text()) | {"size": 56, "crop_size": 56}))  # the old spelling
    assert read_preprocessing(tmp_path, 56) == read_preprocessing(CLIP, 56)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"height": 70, "width": 56}}))
    squashed = fit(load_image(CLIP / "images" / name), read_preprocessing(tmp_path, 56))
    assert squashed.tobytes() == load_image(CLIP / "images" / name).resize((56, 70), Image.Resampling.BICUBIC).crop((0, 7, 56, 63)).tobytes()


def test_features_are_those_of_transformers():
    expected = load_file(CLIP / "expected.safetensors")
    with torch.no_grad():
        last = load_vit(CLIP)(expected["pixel_values"])
        before = load_vit(CLIP, feature_layer=-2)(expected["pixel_values"])
        patches = load_vit(CLIP, class_token=False)(expected["pixel_values"])
    torch.testing.assert_close(last, expected["last_hidden_state"], atol=1e-4, rtol=0)
    torch.testing.assert_close(before, expected["hidden_states_minus_2"], atol=1e-4, rtol=0)
    torch.testing.assert_close(patches, last[:, 1:])
    assert load_vit(CLIP, class_token=False).config.image_tokens == 16


def test_a_vision_model_alone_loads_with_and_without_prefix(tmp_path):
    tower = {k: v for k, v in load_file(CLIP / "model.safetensors").items() if k.startswith("vision_model.")}
    expected = load_file(CLIP / "expected.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((CLIP / "config.json").read_text())["vision_config"]))
    for prefix in ("vision_model.", ""):
        save_file({k.replace("vision_model.", prefix, 1): v for k, v in tower.items()}, tmp_path / "model.safetensors")
        with torch.no_grad():
            features = load_vit(tmp_path)(expected["pixel_values"])
        torch.testing.assert_close(features, expected["last_hidden_state"], atol=1e-4, rtol=0)


def test_a_picture_inside_a_json_file(tmp_path):
    data = base64.b64encode((CLIP / "images/landscape_rgb.png").read_bytes())
    (tmp_path / "a.json").write_bytes(b'{"x": "' + data + b'"}')
    inside = load_image((tmp_path / "a.json", 7, len(data)))
    assert inside.tobytes() == load_image(CLIP / "images/landscape_rgb.png").tobytes()


def test_awkward_pictures(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert (np.asarray(load_image(tmp_path / "deep.png"))[..., 0] == ramp // 257).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.new("RGB", (30, 10)).save(tmp_path / "phone.jpg", exif=exif)
    assert load_image(tmp_path / "phone.jpg").size == (10, 30)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    assert load_image(tmp_path / "print.jpg").getpixel((4, 4))[0] > 200
    frames = [Image.new("P", (8, 8), i) for i in range(2)]
    frames[0].putpalette([255, 0, 0, 0, 255, 0])
    frames[1].putpalette([255, 0, 0, 0, 255, 0])
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "moving.gif").getpixel((4, 4)) == (255, 0, 0)


def test_a_picture_that_cannot_be_read_is_named_with_the_reason(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="nowhere.png cannot be read: No such file"):
        load_image(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="text.png cannot be read: cannot identify"):
        load_image(tmp_path / "text.png")
    whole = (CLIP / "images/portrait_gray.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="half.jpg cannot be read: .*truncated"):
        load_image(tmp_path / "half.jpg")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "half.avif")
    whole = (tmp_path / "half.avif").read_bytes()
    (tmp_path / "half.avif").write_bytes(whole[:-20])
    with pytest.raises(InputError, match="half.avif cannot be read: .*decode"):
        load_image(tmp_path / "half.avif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="decompression bomb"):
        load_image(CLIP / "images/palette_p.png")


# orientation -> what it does to the rows of pixels (EXIF 2.3, section 4.6.4)
TURNS = {None: lambda a: a, 1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
         5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a[:, ::-1], -1), 8: np.rot90}


@pytest.mark.parametrize("file", sorted((CASES / "exif").iterdir()), ids=lambda file: file.stem)
def test_odd_metadata_is_no_reason_to_refuse_a_picture(file):
    turn = None if file.stem in ("cut-exif", "xmp-latin1") else 6
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert (np.asarray(load_image(file)) == TURNS[turn](pixels)).all()


@pytest.mark.parametrize("kind, mode", [(kind, mode) for kind, modes in (("JPEG", "RGB L CMYK"), ("PNG", "RGB L RGBA"), ("WEBP", "RGB RGBA"),
                                                                         ("AVIF", "RGB RGBA"), ("TIFF", "RGB L CMYK RGBA")) for mode in modes.split()])
def test_a_picture_is_turned_as_its_orientation_says(tmp_path, kind, mode):
    """Also an uncompressed TIFF, which Pillow itself turns wrong where it maps the file"""
    picture = Image.fromarray((np.arange(40 * 24 * 3) % 251).astype(np.uint8).reshape(24, 40, 3)).convert(mode)
    for turn in range(10):
        exif = Image.Exif()
        exif[0x112] = turn
        picture.save(tmp_path / "turned", kind, exif=exif)
        picture.save(tmp_path / "plain", kind)
        plain = np.asarray(load_image(tmp_path / "plain"))
        assert (np.asarray(load_image(tmp_path / "turned")) == TURNS.get(turn, TURNS[1])(plain)).all(), turn


def test_long_text_and_profiles_beside_the_pixels(tmp_path):
    assert load_image(CASES / "png/ztxt.png").getpixel((0, 0)) == (200, 30, 30)
    for name in ("profile.png", "profile.jpg", "profile.webp"):
        Image.new("RGB", (8, 8), "white").save(tmp_path / name, icc_profile=b"x" * 1_500_000)
        assert load_image(tmp_path / name).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode, clear", [("RGB", (0, 0, 255)), ("L", 7), ("P", 0), ("RGBA", None), ("LA", None)])
def test_what_is_transparent_is_white(tmp_path, mode, clear):
    """By a colour that stands for nothing, or by an alpha of its own"""
    colour = {"RGB": (0, 0, 255), "L": 7, "P": 0, "RGBA": (0, 0, 255, 0), "LA": (7, 0)}[mode]
    Image.new(mode, (4, 4), colour).save(tmp_path / "it.png", **({} if clear is None else {"transparency": clear}))
    assert load_image(tmp_path / "it.png").getpixel((1, 1)) == (255, 255, 255)


def test_pixels_of_16_bits_are_as_a_viewer_shows_them_and_those_of_32_are_refused(tmp_path):
    ramp = np.arange(256).reshape(16, 16)
    for name in ("short.png", "short.tif", "short.jp2"):
        Image.fromarray((ramp * 257).astype(np.uint16)).save(tmp_path / name)
        assert (np.asarray(load_image(tmp_path / name))[..., 0] == ramp).all(), name
    for name in ("f01.tif", "i32.tif"):
        with pytest.raises(InputError, match=f"{name} cannot be read: it has 32 bits a value.* save it with 8 or 16"):
            load_image(CASES / "modes" / name)


@pytest.mark.slow
def test_pictures_of_a_hundred_megapixels(tmp_path):
    """What Pillow warns of is read; what it refuses is refused"""
    Image.new("1", (12_000, 7_700), 1).save(tmp_path / "scan.png")
    assert load_image(tmp_path / "scan.png").size == (12_000, 7_700)
    Image.new("1", (18_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match="bomb.png cannot be read: .*decompression bomb"):
        load_image(tmp_path / "bomb.png")


def test_a_picture_as_long_as_a_thread_is_refused(tmp_path):
    Image.new("RGB", (60_000, 120)).save(tmp_path / "long.png")
    assert fit(load_image(tmp_path / "long.png"), read_preprocessing(CLIP, 56)).size == (56, 56)
    Image.new("RGB", (60_000, 119)).save(tmp_path / "thread.png")
    with pytest.raises(InputError, match="thread.png cannot be read: it is more than 500 times as long as wide"):
        load_image(tmp_path / "thread.png")


ROUNDS = int(os.environ.get("ROUNDS", 400))  # 4000 takes a quarter of a minute


def judged(data, file, count, expect=lambda pixels: pixels):
    """Nothing but InputError comes out, and no picture is refused that Pillow gives but those of 32 bits and threads"""
    file.write_bytes(data)
    try:
        picture = Image.open(io.BytesIO(data))
        good = np.asarray(picture.convert("RGB")) if picture.mode not in "IF" and max(picture.size) <= 500 * min(picture.size) else None
    except Exception:
        good = None
    try:
        image = load_image(file)
        assert image.mode == "RGB"
        if expect and good is not None:
            assert (np.asarray(image) == expect(good)).all()
        count["read"] += 1
    except InputError:
        assert good is None, "a good picture was refused"
        count["refused"] += 1


@pytest.mark.filterwarnings("ignore")
def test_wild_tags(tmp_path):
    """`-s` prints how many were read"""
    dice, count, file = random.Random(0), {"read": 0, "refused": 0}, io.BytesIO()
    Image.fromarray((np.arange(40 * 24 * 3) % 251).astype(np.uint8).reshape(24, 40, 3)).save(file, "JPEG")
    known = [0x10f, 0x110, 0x11a, 0x11b, 0x128, 0x131, 0x132, 0x13b, 0x14a, 0x2bc, 0x8769, 0x8773, 0x8825, 0x9286, 0xa005]
    for _ in range(ROUNDS):
        order, tags, data = dice.choice("<>"), dice.randint(0, 8), b""
        turn = dice.choice([None, *range(1, 9)])
        entries = [] if turn is None else [struct.pack(order + "HHIHH", 0x112, 3, 1, turn, 0)]
        start = 8 + 2 + 12 * (tags + len(entries)) + 4
        for _ in range(tags):
            kind, amount = dice.choice([*range(14), 16, dice.randrange(65536)]), dice.choice([0, 1, 1, 1, 2, 3, 8, 90, dice.randrange(2 ** 32)])
            size = amount * {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}.get(kind, 1)
            value = dice.randbytes(4)
            if 4 < size < 999:
                value = struct.pack(order + "I", start + len(data))
                data += dice.choice([dice.randbytes(size), bytes(size), b"\xff" * size])
            entries.append(struct.pack(order + "HHI", dice.choice([*known, dice.randrange(0x113, 65536)]), kind, amount) + value)
        dice.shuffle(entries)
        exif = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries)) + b"".join(entries) + dice.choice([bytes(4), dice.randbytes(4)]) + data
        exif = b"Exif\0\0" + exif
        whole = file.getvalue()
        judged(whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:], tmp_path / "x", count, TURNS[turn])
    print(f"wild tags: {count}")
    assert count["refused"] < ROUNDS / 100, "two in a thousand are no pictures to Pillow either"


@pytest.mark.filterwarnings("ignore")
def test_random_bytes_in_every_format_that_pillow_writes(tmp_path):
    dice, count, files = random.Random(1), {"read": 0, "refused": 0}, []
    Image.init()
    picture = Image.fromarray((np.arange(40 * 24 * 3) % 251).astype(np.uint8).reshape(24, 40, 3))
    for kind in sorted(Image.SAVE.keys() - {"EPS", "PDF"}):  # the first needs a program, the second cannot be read
        for mode in ("RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I;16", "I", "F"):
            file = io.BytesIO()
            with suppress(Exception):  # not every format takes every mode
                (picture.convert("L") if mode[0] in "IF" else picture).convert(mode).save(file, kind)
                files.append(file.getvalue())
    assert len(files) > 100
    for n in range(ROUNDS):
        data = bytearray(files[n % len(files)])
        for _ in range(dice.choice([1, 1, 2, 4, 10])):
            data[dice.randrange(min(len(data), dice.choice([64, 400, len(data)])))] = dice.choice([0, 255, dice.randrange(256)])
        judged(bytes(data[:None if dice.random() < 0.9 else dice.randrange(len(data))]), tmp_path / "x", count, None)
    print(f"random bytes: {count}")
    assert min(count.values()) > ROUNDS / 5


STEPS = {"do_resize": False, "resample": 2, "do_center_crop": False, "do_rescale": False, "rescale_factor": 1 / 127.5, "do_normalize": False}


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_preprocessing_that_are_not_computed_are_refused(tmp_path, name):
    config = json.loads((CLIP / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | {name: STEPS[name]}))
    with pytest.raises(InputError, match=rf"pictures with {name} = .* are not supported, only "):
        read_preprocessing(tmp_path, 56)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | {name: None, "crop_size": None}))
    picture = load_image(CLIP / "images/landscape_rgb.png")
    assert torch.equal(preprocess(picture, read_preprocessing(tmp_path, 56)), preprocess(picture, read_preprocessing(CLIP, 56)))


@pytest.mark.parametrize("config", [{"model_type": "clip", "vision_config": {"dropout": 0.0, "model_type": "clip_vision_model"}, "projection_dim": 512},
                                    {"model_type": "clip_vision_model"}, {"model_type": "clip", "vision_config": {"hidden_size": None}}])
def test_what_transformers_leaves_out_of_a_configuration_is_that_of_clip_b32(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_vit_config(tmp_path)
    assert (read.hidden_size, read.intermediate_size, read.num_hidden_layers, read.num_attention_heads) == (768, 3072, 12, 12)
    assert (read.image_size, read.patch_size, read.hidden_act, read.layer_norm_eps, read.image_tokens) == (224, 32, "quick_gelu", 1e-5, 50)


@pytest.mark.parametrize("older", [None, {"image_mean": [0.25, 0.25, 0.25], "size": 112}])
def test_what_transformers_5_says_of_preprocessing_is_read(tmp_path, older):
    """Its processor_config.json alone, or beside an older file, over which it holds; without the section it says nothing"""
    config = json.loads((CLIP / "preprocessor_config.json").read_text()) | {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config, "processor_class": "CLIPProcessor"}))
    if older:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(older))
    read = read_preprocessing(tmp_path, 56)
    assert (read["image_mean"], read["image_std"], read["size"]) == ([0.5] * 3, [0.5] * 3, {"shortest_edge": 56})
    picture = load_image(CLIP / "images/landscape_rgb.png")
    assert preprocess(picture, read).max() <= 1 < preprocess(picture, read_preprocessing(CLIP, 56)).max()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": config | {"resample": 2}}))
    with pytest.raises(InputError, match="pictures with resample = 2 are not supported, only 3"):
        read_preprocessing(tmp_path, 56)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert read_preprocessing(tmp_path, 112)["image_mean"] == (older or CLIP_PREPROCESSING)["image_mean"]


@pytest.mark.parametrize("text, name", [('{"a": 1, "b": 2, "a": 1}', "a"), ('{"x": {"c": {"é": null, "é": 2}}}', "é"), ('[1, {"": 1, "": 1}]', "")])
def test_a_name_that_stands_twice_is_refused(tmp_path, text, name):
    (tmp_path / "it.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"it.json cannot be read: the name '{name}' stands twice"):
        read_json(tmp_path / "it.json", (dict, list))


def test_two_processes_write_the_same_file(tmp_path, monkeypatch):
    """The second begins and ends while the first writes: the last one's stands, and no half of one is left"""
    write, file = type(tmp_path).write_text, tmp_path / "index"

    def interrupted(path, text, **how):
        write(path, text, **how)
        if text == "first":
            with monkeypatch.context() as second:
                second.setattr(os, "getpid", lambda: 1)
                write_whole(file, "second")
    monkeypatch.setattr(type(tmp_path), "write_text", interrupted)
    write_whole(file, "first")
    assert file.read_text() == "first" and [*tmp_path.iterdir()] == [file]


def test_what_is_no_clip_is_refused(tmp_path):
    shutil.copy(FIXTURES / "tiny-llama/config.json", tmp_path)
    with pytest.raises(InputError, match="not that of a CLIP vision model: its model_type is neither"):
        read_vit_config(tmp_path)
    (tmp_path / "config.json").write_text('{"broken": ')
    with pytest.raises(InputError, match="config.json cannot be read: .*line 1 column 12"):
        read_vit_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 64, "crop_size": 64}')
    with pytest.raises(InputError, match=r"makes pictures of 64, the vision model takes 56 x 56"):
        read_preprocessing(tmp_path, 56)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"longest_edge": 64}, "crop_size": 56}')
    with pytest.raises(InputError, match=r"pictures of size {'longest_edge': 64} are not supported, only a shortest_edge"):
        read_preprocessing(tmp_path, 56)
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model", "hidden_act": "gelu_new"}')
    with pytest.raises(InputError, match="config.json: hidden_act = 'gelu_new' is not supported, only quick_gelu and gelu"):
        read_vit_config(tmp_path)
    for S in (42, 70):
        with pytest.raises(RuntimeError, match="must match the size"):
            load_vit(CLIP)(torch.zeros(1, 3, S, S))


# ---- Qwen-VL's encoder ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", [QWEN, QWEN / "qwen_vl"])
def test_qwen_features_are_those_of_the_original(folder):
    expected, tower, seen = load_file(QWEN / "expected.safetensors"), load_vit(folder), {}
    for name, module in (("after_ln_pre", tower.ln_pre), ("after_blocks", tower.transformer["resblocks"][-1]),
                         ("after_attn_pool", tower.attn_pool)):
        module.register_forward_hook(lambda module, given, result, name=name: seen.update({name: result}))
    with torch.no_grad():
        seen["output"] = tower(expected["pixel_values"].float())
    for name, value in seen.items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0)
    assert len(seen) == 4 and (tower.config.image_tokens, tower.config.class_token) == (16, False)


def test_only_the_encoder_of_a_qwen_checkpoint_is_read(monkeypatch):
    """Bytes asked for of both shards: those of the tensors below transformer.visual., without transformer.visual.proj"""
    asked, open_file = [], model_file.safe_open

    class Counting:
        """A safetensors file that notes what is read of it"""

        def __init__(self, *args):
            self.file = open_file(*args)

        def __enter__(self):
            self.content = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):  # keys, and get_slice for its shape
            assert name in ("keys", "get_slice")
            return getattr(self.content, name)

        def get_tensor(self, name):
            tensor = self.content.get_tensor(name)
            asked.append((name, tensor.nbytes))
            return tensor

    monkeypatch.setattr(model_file, "safe_open", Counting)
    load_vit(QWEN / "qwen_vl")
    every = {k: v for shard in QWEN.glob("qwen_vl/*.safetensors") for k, v in load_file(shard).items()}
    needed = {k: v.nbytes for k, v in every.items() if k.startswith("transformer.visual.") and k != "transformer.visual.proj"}
    assert dict(asked) == needed and len(asked) == len(needed)
    assert sum(needed.values()) < sum(tensor.nbytes for tensor in every.values())


def test_a_published_qwen_checkpoint_of_bin_shards(tmp_path):
    """Its index names a shard a block; those without a tensor of the encoder need not be there"""
    shutil.copy(QWEN / "qwen_vl/config.json", tmp_path)
    every = {k: v for shard in QWEN.glob("qwen_vl/*.safetensors") for k, v in load_file(shard).items()}
    shards = {}
    for name, tensor in every.items():
        number = 1 if not name.startswith("transformer.visual.") else 2 if "resblocks" in name else 3
        shards.setdefault(f"pytorch_model-0000{number}-of-00003.bin", {})[name] = tensor
    for file, content in shards.items():
        torch.save(content, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {k: f for f, c in shards.items() for k in c}}))
    (tmp_path / "pytorch_model-00001-of-00003.bin").unlink()
    ours, extracted = load_vit(tmp_path), load_vit(QWEN)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), extracted.parameters()))
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(InputError, match="pytorch_model-00002-of-00003.bin cannot be read: No such file"):
        load_vit(tmp_path)


def multi_head(attention, in_proj_weight, in_proj_bias, queries, keys, values):
    """torch's own multi-head attention with these weights"""
    judge = torch.nn.MultiheadAttention(queries.shape[-1], getattr(attention, "heads", None) or attention.num_heads, batch_first=True)
    judge.load_state_dict({"in_proj_weight": in_proj_weight, "in_proj_bias": in_proj_bias,
                           "out_proj.weight": attention.out_proj.weight, "out_proj.bias": attention.out_proj.bias})
    return judge(queries, keys, values, need_weights=False)[0]


@torch.no_grad()
@pytest.mark.parametrize("width, heads, grid, output, queries", [(64, 4, 8, 384, 16), (48, 2, 20, 256, 36), (128, 8, 16, 128, 256)])
def test_qwen_with_several_heads_and_other_grids(width, heads, grid, output, queries):
    """Against torch's MultiheadAttention and interpolate: resized tables, several resampler heads"""
    config = QwenConfig(output, int(2.3 * width), 2, heads, grid * 7, 7, width=width, n_queries=queries)
    torch.manual_seed(0)
    tower, pixels = make_vit(config).eval(), torch.randn(2, 3, grid * 7, grid * 7)
    for parameter in tower.parameters():
        parameter.normal_(std=0.2)

    def resized(table, side):
        old = round(len(table) ** 0.5)
        image = table.view(old, old, -1).permute(2, 0, 1)[None]
        return F.interpolate(image, (side, side), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).reshape(side * side, -1)

    def norm(layer, x):
        return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, 1e-6)

    x = F.conv2d(pixels, tower.conv1.weight, stride=7).flatten(2).permute(0, 2, 1) + resized(tower.positional_embedding, grid)
    x = norm(tower.ln_pre, x)
    for block in tower.transformer["resblocks"]:
        d = width // heads  # rows of in_proj: head by head its query, key, value -> all queries, all keys, all values
        order = torch.arange(3 * width).view(heads, 3, d).transpose(0, 1).flatten()
        normed = norm(block.ln_1, x)
        x = x + multi_head(block.attn, block.attn.in_proj.weight[order], block.attn.in_proj.bias[order], normed, normed, normed)
        x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(norm(block.ln_2, x))))
    pool = tower.attn_pool
    assert pool.attn.num_heads == output // 128
    values = norm(pool.ln_kv, x @ pool.kv_proj.weight.T)
    asking = (norm(pool.ln_q, pool.query) + pool.pos_embed).expand(2, -1, -1)
    x = multi_head(pool.attn, pool.attn.in_proj_weight, pool.attn.in_proj_bias, asking, values + resized(pool.pos_embed, grid), values)
    torch.testing.assert_close(tower(pixels), norm(tower.ln_post, x), atol=1e-4, rtol=1e-4)


def test_what_kind_of_tower_a_folder_holds(tmp_path):
    assert isinstance(read_vit_config(QWEN), QwenConfig) and isinstance(read_vit_config(CLIP), ViTConfig)
    shutil.copy(QWEN / "model.safetensors", tmp_path)
    shutil.copy(CLIP / "config.json", tmp_path)
    with pytest.raises(InputError, match="do not fit the model: .*attn_pool"):
        load_vit(tmp_path)
    shutil.copy(QWEN / "config.json", tmp_path)
    assert load_vit(tmp_path).config.image_tokens == 16
    shutil.copy(CLIP / "model.safetensors", tmp_path)
    with pytest.raises(InputError, match="embeddings.class_embedding is not in the model"):
        load_vit(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"width": None}, "is not that of Qwen-VL's picture encoder: 'width' missing"), ({"output_dim": 96}, "resampler of width 96")])
def test_a_qwen_configuration_that_cannot_be_is_refused(tmp_path, change, message):
    config = json.loads((QWEN / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"visual": config["visual"] | change}))
    with pytest.raises(InputError, match=message):
        make_vit(read_vit_config(tmp_path))


@pytest.mark.parametrize("folder, layer", [(CLIP, 0), (CLIP, -4), (QWEN, -2)])
def test_a_layer_that_is_not_there_is_refused(folder, layer):
    with pytest.raises(InputError, match=f"feature layer {layer}: .* gives the features of its layers"):
        load_vit(folder, feature_layer=layer)


@torch.no_grad()
@pytest.mark.parametrize("act, size, patch, dtype", [("quick_gelu", 64, 16, torch.float32), ("gelu", 100, 14, torch.float16)])
@pytest.mark.parametrize("whole", [True, False])
def test_clip_in_all_its_spellings_as_transformers_writes_it(tmp_path, act, size, patch, dtype, whole):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                                           image_size=size, patch_size=patch, hidden_act=act, projection_dim=16)
    if whole:
        text = transformers.CLIPTextConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
        theirs = transformers.CLIPModel(transformers.CLIPConfig(text_config=text.to_dict(), vision_config=config.to_dict()))
    else:
        theirs = transformers.CLIPVisionModel(config)
    theirs.to(dtype).save_pretrained(tmp_path)
    ours, pixels = load_vit(tmp_path, feature_layer=-2), torch.randn(2, 3, size, size)
    theirs = theirs.float().vision_model if whole else theirs.float()
    hidden = theirs(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(ours(pixels), hidden[-2], atol=1e-4, rtol=0)
    ours.config.feature_layer = -1
    torch.testing.assert_close(ours(pixels), hidden[-1], atol=1e-4, rtol=0)


# ---- projections ---------------------------------------------------------------------------------------------------

def llama_of_width(D):
    """Sizes of a small language model"""
    return LlamaConfig(D, 2 * D, 1, 4, 4, D // 4, 64)


@torch.no_grad()
@pytest.mark.parametrize("name, kind", [("baseline", "linear"), ("vit", "vit"), ("perceiver", "perceiver"), ("perceiver_8x8", "perceiver")])
def test_projections_are_those_of_the_original(name, kind):
    expected = load_file(PROJECTIONS / "expected.safetensors")
    projection = make_projection(kind, read_vit_config(PROJECTIONS), llama_of_width(128))
    fill(projection, [PROJECTIONS / f"{name.removesuffix('_8x8')}.safetensors"])
    result = projection(expected[f"{name}.input"].float())
    if name == "perceiver_8x8":
        result, name = result[:, :32], f"{name}.output_first_32"
    torch.testing.assert_close(result, expected[name if "." in name else f"{name}.output"], atol=1e-4, rtol=0)


def test_the_fixed_table_is_that_of_the_checkpoints():
    for file, side in ((QWEN / "model.safetensors", 4), (PROJECTIONS / "perceiver.safetensors", 16)):
        table = next(v for k, v in load_file(file).items() if k.endswith("pos_embed"))
        torch.testing.assert_close(fixed_positions(side, 128), table, atol=1e-6, rtol=0)


def test_a_perceiver_leaves_out_the_class_token_and_nothing_else():
    features = torch.randn(1, 17, 48)
    clip, bare = read_vit_config(CLIP), read_vit_config(CLIP, class_token=False)
    with_token = make_projection("perceiver", clip, llama_of_width(128))
    without = make_projection("perceiver", bare, llama_of_width(128))
    without.load_state_dict(with_token.state_dict())
    changed = features.clone()
    changed[:, 0] += 1
    assert torch.equal(with_token(features), with_token(changed)) and torch.equal(with_token(features), without(features[:, 1:]))
    qwen = make_projection("perceiver", read_vit_config(QWEN), llama_of_width(256))
    features = torch.randn(1, 16, 128)
    assert qwen(features).shape == (1, 256, 256)
    for token in range(16):  # the original loses the first of Qwen's
        changed = features.clone()
        changed[:, token] += 1
        assert not torch.equal(qwen(features), qwen(changed))


def test_a_perceiver_begins_as_the_original_does():
    torch.manual_seed(0)
    projection = make_projection("perceiver", read_vit_config(CLIP), llama_of_width(256))
    for weight in (projection.query, projection.kv_proj.weight, projection.attn.out_proj.weight, projection.projection[1].weight):
        assert 0.015 < weight.std() < 0.025
    assert not any(layer.bias.any() for layer in (projection.kv_proj, projection.attn.out_proj, projection.projection[1]))


def test_a_language_model_too_narrow_for_a_perceiver_is_refused():
    with pytest.raises(InputError, match="resampler of width 64 .* at least 128"):
        make_projection("perceiver", read_vit_config(CLIP), llama_of_width(64))
    with pytest.raises(InputError, match="not known, only linear, vit and perceiver"):
        make_projection("baseline", read_vit_config(CLIP), llama_of_width(64))
