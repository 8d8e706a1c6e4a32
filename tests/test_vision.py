"""Pictures and the CLIP tower against transformers' numbers. python -m pytest tests/test_vision.py"""
import base64
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from PIL import Image
from safetensors.torch import load_file, save_file

from model import load_vit
from vision import InputError, ViTConfig, load_image, preprocess, read_preprocessing

CLIP = FIXTURES / "tiny-clip"


@pytest.mark.parametrize("name", ["landscape_rgb.png", "portrait_gray.jpg", "alpha_rgba.png", "palette_p.png"])
def test_pixels_are_those_of_transformers(name):
    expected = load_file(CLIP / "expected.safetensors")[f"pixel_values.{name.split('.')[0]}"]
    pixels = preprocess(load_image(CLIP / "images" / name), read_preprocessing(CLIP, 56))
    torch.testing.assert_close(pixels, expected, atol=1e-4, rtol=0)
    old_spelling = read_preprocessing(CLIP, 56) | {"size": 56, "crop_size": 56}
    assert torch.equal(pixels, preprocess(load_image(CLIP / "images" / name), old_spelling))


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
    Image.new("RGB", (1, 60_000)).save(tmp_path / "thread.png")
    with pytest.raises(InputError, match="thread.png cannot be read: 1 x 60000 pixels is too long"):
        load_image(tmp_path / "thread.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="decompression bomb"):
        load_image(CLIP / "images/palette_p.png")


def test_what_is_no_clip_is_refused(tmp_path):
    shutil.copy(FIXTURES / "tiny-llama/config.json", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(InputError, match="hidden_size, .* missing"):
        ViTConfig.read(tmp_path)
    (tmp_path / "config.json").write_text('{"broken": ')
    with pytest.raises(InputError, match="line 1, column 12"):
        ViTConfig.read(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 64, "crop_size": 64}')
    with pytest.raises(InputError, match=r"makes pictures of \(3, 64, 64\), the vision model takes \(3, 56, 56\)"):
        read_preprocessing(tmp_path, 56)
    with pytest.raises(InputError, match=r"takes pictures \(3, 56, 56\), not \(3, 64, 64\)"):
        load_vit(CLIP)(torch.zeros(1, 3, 64, 64))
