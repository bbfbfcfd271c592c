"""The quick caption, as a user types it, and every way to get it wrong."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line, shell
from PIL import Image

import checkpoint
import data
import inference
import sample
from common.images import read_image
from config import UserError


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "x.png")
    return str(tmp_path / "x.png")


def test_the_shipped_model_captions_the_shipped_picture(tmp_path):
    """From any folder, cold, in under 5 s on an idle machine; it stops by itself."""
    start = time.perf_counter()
    done = shell(ROOT / "sample.py", "--image", ROOT / "assets/scene.png", cwd=tmp_path)
    assert time.perf_counter() - start < 20
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("model: assets/toy.pt") and "sixteen drawn things" in done.stderr
    assert "stopped at the limit" not in done.stdout and len(done.stdout.split()) > 1
    assert sum(path.stat().st_size for path in (ROOT / "assets").iterdir()) <= 8.2e6


def test_captions_end_with_eos_not_with_the_limit():
    loaded = checkpoint.load(ROOT / "assets/toy.pt")
    embeds = inference.embed_pictures(
        loaded, inference.read_pictures(loaded, [ROOT / "assets/scene.png"])
    )
    assert 1 < len(inference.caption_pictures(loaded, embeds, 60)[0].split()) < 30


def test_prompt_samples_and_several_pictures(recipe, home, picture, capsys):
    sample.main(
        [
            "--checkpoint",
            "out/full/phase2.pt",
            "--image",
            picture,
            f"--image={picture}",
            "--prompt",
            "look",
            "--num_samples=2",
            "--temperature=1",
            "--max_new_tokens=3",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("look") for line in lines)
    sample.main(["--checkpoint=out/full/phase2.pt", "--image", picture, picture])
    sample.main(["--checkpoint=out/full/language.pt", "--max_new_tokens=3"])  # words alone
    assert capsys.readouterr().out


def test_attention_is_drawn(recipe, home, picture, tmp_path):
    sample.main(
        [
            "--checkpoint=out/full/phase2.pt",
            "--image",
            picture,
            "--max_new_tokens=4",
            f"--attention={tmp_path}/out.png",
        ]
    )
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.size[1] == 144 and sheet.size[0] > 128


def test_a_picture_means_the_same_in_sampling_as_in_training(recipe, home):
    """The features sample.py makes of an image file are those that phase 1 read from its bin."""
    from training import features

    dataset = data.Data("data/tiny")
    Image.fromarray(dataset.open("train", "frames")[3]).save("frame3.png")
    loaded = checkpoint.load("out/full/phase2.pt")
    seen = inference.encode_frames(loaded, read_image("frame3.png", loaded.image_format)[None])[0]
    stored = np.array(features.open_stored(dataset, "train", loaded.model)[3], np.float32)
    assert (seen - torch.tensor(stored)).abs().max() < 1e-2


def test_the_same_words_from_stored_features_and_from_frames(recipe, home):
    from training import features

    loaded, dataset = checkpoint.load("out/full/phase2.pt"), data.Data("data/tiny")
    stored = torch.tensor(np.array(features.open_stored(dataset, "train", loaded.model)[:6]))
    frames = dataset.open("train", "frames")[:6]
    tokens = torch.full((6, 4), loaded.tokenizer.image)
    speak = lambda images: torch.stack(
        list(
            loaded.model.generate(
                tokens,
                loaded.model.embed_images(images),
                12,
                temperature=1.0,
                generator=torch.Generator().manual_seed(1),
            )
        )
    )
    assert torch.equal(speak(stored.float()), speak(inference.encode_frames(loaded, frames)))


@pytest.mark.parametrize(
    "args, message",
    [
        (["--checkpoint=none.pt"], "no such checkpoint"),
        (["--checkpoint=llava-hf/llava-1.5-7b-hf"], "Hugging Face hub, download it first"),
        (["--checkpoint=data/tiny/meta.json"], "not a checkpoint, or cut short"),
        (["--checkpoint=out/full/vision.pt"], "a tower alone"),
        (["--checkpoint=out/full/language.pt", "--image=frame.png"], "cannot see"),
        (
            ["--checkpoint=out/full/phase2.pt", "--image=frame.png", "--prompt=" + "ball " * 99],
            "this model holds 48",
        ),
        (["--checkpoint=out/full/language.pt", "--prompt=" + "ball " * 99], "this model holds 48"),
        (["--checkpoint=out/full/phase2.pt", "--device=gpu"], "cpu, cuda, cuda:1 ... or mps"),
        (["--checkpoint=out/full/phase2.pt", "--attention=x.png"], "needs an --image"),
        (["--checkpoint=out/full/phase2.pt", "--image=frame.png", "--attention=x.zzz"], "x.zzz"),
        (["--checkpoint=out/full/phase2.pt", "--image=nowhere.png"], "no such image"),
        (["--max_new_tokens=0"], "is not allowed: 1 to"),
        (["--temperature=-1"], "is not allowed"),
    ],
)
def test_mistakes_are_one_clear_line(recipe, home, args, message):
    Image.new("RGB", (9, 9)).save("frame.png")
    with pytest.raises(UserError, match=message) as error:
        sample.main(args)
    assert one_line(error)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_that_is_not_in_unicode_gets_escapes(tmp_path, encoding):
    """Words and errors that it cannot print, and questions that it writes in its own way."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import config\n"
        "def main(argv):\n    print(input(), '\\u2603 \\u00e9')\n"
        "    raise config.UserError('no \\u2603')\nconfig.run(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)],
        input="caf\u00e9\n".encode("latin-1"),
        env={**os.environ, "PYTHONIOENCODING": encoding},
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    right = "\u2603" if encoding == "utf-8" else "\\u2603"
    assert done.stderr.decode(encoding).strip() == f"error: no {right}"
    assert right in done.stdout.decode(encoding)


@pytest.mark.parametrize(
    "command",
    [
        ["sample.py", "--image", "nowhere.jpg"],
        ["sample.py", "--imge", "x"],
        ["eval.py", "--checkpoint", "none.pt"],
        ["train.py", "configs/none.py"],
        ["data.py", "pairs", "--csv", "none.csv"],
        ["data.py", "pairs", "--text", "none.txt"],
        ["data.py", "saycam", "--frames", "none", "--annotations", "none.json"],
        ["sample.py", "--device", "mps", "--image", str(ROOT / "assets/scene.png")],
    ],
)
def test_no_mistake_shows_a_traceback(tmp_path, command):
    done = shell(ROOT / command[0], *command[1:], cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
