"""Conversations in LLaVA's form, from a JSON to a trained model that holds them."""

import json

import fake_llava
import numpy as np
import pytest
import torch
from conftest import SMALL, furthest, logits_after, one_line, same, weights
from PIL import Image

import checkpoint
import export
import inference
import sample
import train
from config import UserError
from data import Data
from pretrained.convnets import ConvNeXt
from sources import command
from tokenizer import TEMPLATES

TALK = [{"from": "human", "value": "<image>\nwhat is it ?"}, {"from": "gpt", "value": "a ball ."}]


def item(images=("0.png",), said=TALK):
    return {"image": list(images), "conversations": said}


def many(count=20):
    """Conversations of no, one and two pictures, of one turn and of three."""
    items = []
    for i in range(count):
        more = [
            {"from": "human", "value": f"and number {i} ?"},
            {"from": "gpt", "value": "a cup ."},
        ]
        both = [
            {"from": "human", "value": "<image> or <image> ?"},
            {"from": "gpt", "value": "both ."},
        ]
        kinds = [
            item([f"{i % 20}.png"], TALK + more * 2),
            item([f"{i % 20}.png", f"{(i + 1) % 20}.png"], both),
            item([], more),
        ]
        items.append(kinds[i % 3])
    return items


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        noise = np.random.RandomState(i).randint(0, 256, (20 + i, 40, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"pictures/{i}.png")
    return tmp_path


def prepare(items, *flags, name="llava", size="--size=16"):
    with open("chat.json", "w") as file:
        json.dump(items, file)
    flags = ["--json=chat.json", "--images=pictures", size, "--vocab_size=300", *flags]
    command.main(["llava", f"--name={name}", *flags])
    return Data(f"data/{name}")


def test_conversations_are_samples_with_their_pictures(place):
    dataset = prepare(many(40))
    assert dataset.meta["template"] == {"name": "baby_v1", "system": ""}
    samples, shown = dataset.open("chat_train", "samples"), dataset.open("chat_train", "image_ids")
    tokens, learn = dataset.open("chat_train", "tokens"), dataset.open("chat_train", "loss_mask")
    assert len(samples) + dataset.count("chat_val", "samples") == 40
    for first, length, first_shown, images in samples.astype(int).tolist():
        own = tokens[first : first + length].tolist()
        assert own.count(dataset.tokenizer.image) == images <= 2
        learnt = [t for t, flag in zip(own, learn[first : first + length]) if flag]
        words = dataset.tokenizer.decode(learnt)
        assert words in ("a ball . a cup . a cup .", "both .", "a cup .")
        assert learnt.count(dataset.tokenizer.eos) == len(words.split(".")) - 1
    assert len(shown) == samples[:, 3].sum()


def words_of(dataset, split="chat_train"):
    """The samples of a split as text, special tokens included."""
    names = {i: name for name, i in dataset.tokenizer.specials.items()}
    tokens, written = dataset.open(split, "tokens"), []
    for first, count, *_ in dataset.open(split, "samples").astype(int).tolist():
        ids = tokens[first : first + count].tolist()
        decode = lambda i: dataset.tokenizer.encoding.decode([i])
        written.append("".join(names.get(i) or decode(i) for i in ids))
    return written


def test_items_as_others_write_them(place, capsys):
    """images for image, a system text, a first turn of gpt, an <image> inside a question, and
    one item a line."""
    system, gpt = {"from": "system", "value": "Be kind."}, {"from": "gpt", "value": "Hello."}
    inside = [{"from": "human", "value": "what is <image> this ?"}, TALK[1]]
    kinds = [
        {"images": ["0.png"], "conversations": [system, *TALK]},
        {"images": "1.png", "conversations": [gpt, *TALK]},
        {"image": "2.png", "conversations": inside},
    ]
    items = [kinds[i % 3] | {list(kinds[i % 3])[0]: f"{i % 20}.png"} for i in range(60)]
    dataset = prepare(items, "--template=v1")
    written = words_of(dataset)
    assert set(written) == {
        " Be kind. USER: <image> \nwhat is it ? ASSISTANT: a ball .<eos>",
        " USER: <image> \nwhat is it ? ASSISTANT: a ball .<eos>",
        " USER: what is <image>  this ? ASSISTANT: a ball .<eos>",
    }
    (place / "lines.jsonl").write_text("\n".join(json.dumps(one) for one in items) + "\n\n")
    flags = ["--images=pictures", "--size=16", "--vocab_size=300", "--template=v1"]
    command.main(["llava", "--name=lines", "--json=lines.jsonl", *flags])
    assert Data("data/lines").meta["corpus"] == dataset.meta["corpus"]
    moved = prepare(items, "--template=v1", "--image_first", name="moved")
    assert " USER: <image> \nwhat is  this ? ASSISTANT: a ball .<eos>" in words_of(moved)
    films = [one | {"video": "a.mp4"} for one in items[:2]] + items[2:]
    assert prepare(films, "--template=v1", name="films").meta["corpus"] == dataset.meta["corpus"]
    assert (
        "chat.json: 2 items have a film, item 0 first; its image alone" in capsys.readouterr().out
    )
    (place / "lines.jsonl").write_text(json.dumps(items[0]) + "\n{\n")
    with pytest.raises(UserError, match="lines.jsonl:2: not JSON"):
        command.main(["llava", "--name=lines", "--json=lines.jsonl", *flags])


def test_pictures_are_found_beside_their_own_json_first(place):
    """Published data have the same names in every split: validation once took its pictures from
    training's folder, in silence."""
    for split, shade in (("train", 40), ("val", 200)):
        (place / split / "images").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), (shade + i,) * 3).save(place / split / f"images/{i}.png")
        items = [item([f"images/{i % 3}.png"]) for i in range(12)]
        (place / split / "data.json").write_text(json.dumps(items))
    files = ["--json=train/data.json", "--val=val/data.json", "--images=train"]
    command.main(["llava", "--name=two", *files, "--size=16", "--vocab_size=300"])
    shades = lambda name, split: set(
        Data(f"data/{name}").open(split, "frames")[:, 0, 0, 0].tolist()
    )
    assert shades("two", "chat_train") == {40, 41, 42}
    assert shades("two", "chat_val") == {200, 201, 202}
    files = ["--train=train/data.json", "--val=val/data.json", "--frames=train"]
    command.main(["saycam", "--name=saycam", *files, "--size=16", "--vocab_size=300"])
    assert shades("saycam", "train") == {40, 41, 42} and shades("saycam", "val") == {200, 201, 202}


def test_plain_is_captions(place):
    said = [
        {"from": "human", "value": "describe it\n<image>"},
        {"from": "gpt", "value": "a ball ."},
    ]
    dataset = prepare([item([f"{i % 20}.png"], said) for i in range(20)], "--template=plain")
    tokens = dataset.open("train", "tokens")[: dataset.open("train", "samples")[0, 1]]
    assert tokens[0] == dataset.tokenizer.image and tokens[-1] == dataset.tokenizer.eos
    assert dataset.tokenizer.decode(tokens) == "a ball ."
    assert dataset.count("train", "text") and not dataset.count("chat_train", "samples")


@pytest.mark.parametrize(
    "corrupt, message",
    [
        (item(["0.png", "1.png"]), "item 3: 1 <image> for 2 pictures"),
        (item([]), "item 3: 1 <image> for 0 pictures"),
        (item(said=TALK[:1]), "item 3: want human and gpt in turn"),
        (item(said=[TALK[0], *TALK[::-1]]), "item 3: want human and gpt in turn"),
        (
            item(said=[{"from": "system", "value": "Be kind."}, *TALK]),
            "item 3: .*no place for a sys",
        ),
        (item(said=[{"from": "human", "value": ["<image>"]}, TALK[1]]), "must be a text"),
        (item(said=[{"from": "human", "value": "<image> <video>"}, TALK[1]]), "contains <video>"),
        ({"video": "a.mp4", "conversations": TALK}, "item 3: it has a 'video' and no image"),
        (item() | {"images": ["1.png"]}, "item 3: it has both image and images"),
        (item(said=[]), "item 3: a conversation without turns"),
        (item(said=[TALK[0], {"from": "gpt", "value": " "}]), "item 3: an answer is empty"),
        (item(said=[TALK[0], {"from": "cat", "value": "meow"}]), "nobody is called 'cat'"),
        (item(said=[TALK[0], {"from": "gpt", "value": "<image>"}]), "an <image> in an answer"),
        ({"image": "0.png"}, "item 3: no {"),
        ("words", "item 3: no {"),
        (item(said=[{"from": "human"}, TALK[1]]), "item 3: no {"),
    ],
    ids=str,
)
def test_a_corrupted_item_is_an_error_with_its_place(place, corrupt, message):
    with pytest.raises(UserError, match=message) as error:
        prepare(many(3) + [corrupt] + many(12))
    assert one_line(error) and "chat.json" in str(error.value)
    assert not (place / "data/llava/meta.json").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give --json FILE"),
        (["--json=none.json"], "none.json"),
        (["--json=few.json", "--images=pictures"], "fewer than 10 pictures"),
        (["--json=few.json", "--canvases=33x32"], "want WIDTHxHEIGHT in whole tiles"),
        (
            ["--json=few.json", "--canvases=32x16", "--resample=reduced", "--size=16"],
            "tiles of a reduced picture",
        ),
        (["--json=few.json", "--like=none.pt"], "no such checkpoint"),
        (["--json=few.json", "--template=v9"], "is not allowed"),
        (["--json=bad.json"], "not JSON"),
    ],
)
def test_a_mistaken_command_is_one_clear_line(place, flags, message):
    (place / "few.json").write_text(json.dumps([item()] * 3))
    (place / "bad.json").write_text("{")
    if message != "fewer than 10 pictures":
        (place / "few.json").write_text(json.dumps(many(30)))
    with pytest.raises((UserError, OSError), match=message) as error:
        command.main(["llava", "--images=pictures", *flags])
    assert one_line(error)


def test_a_picture_that_cannot_be_read_takes_its_conversation_along(place):
    (place / "pictures/0.png").write_bytes(b"no picture")
    dataset = prepare([item([f"{i % 20}.png"]) for i in range(40)], "--max_skipped=0.5")
    assert dataset.count("chat_train", "samples") + dataset.count("chat_val", "samples") == 38


def test_tiles_on_disk(place):
    dataset = prepare(many(30), "--canvases", "32x16", "16x32", "32x32", name="tiled")
    images = dataset.open("chat_train", "images").astype(int)
    assert (images[:, 1] * images[:, 2] > 0).all() and (images[:, 3] == 40).all()
    ends = images[:, 0] + 1 + images[:, 1] * images[:, 2]
    assert (ends[:-1] == images[1:, 0]).all() and ends[-1] == dataset.count("chat_train", "frames")
    assert dataset.count("chat_train", "clips") == dataset.count("chat_train", "frames")
    assert dataset.image_format.canvases == ((32, 16), (16, 32), (32, 32))


def test_what_was_prepared_outlives_a_mistake(place):
    dataset = prepare(many(40))
    with pytest.raises(UserError, match="which the vocabulary does not have"):
        prepare(many(40), "--template=llama3")
    assert Data("data/llava").meta == dataset.meta and dataset.open("chat_train", "tokens").size
    with pytest.raises(UserError, match=r"item 0: --template plain is for captions"):
        prepare(many(40), "--template=plain")


def test_a_given_flag_changes_the_form_that_a_model_has(place, recipe):
    like = f"--like={recipe}/phase2.pt"
    of_model = prepare(many(40), like, size="--vocab_size=300").image_format
    changed = prepare(many(40), like, "--norm=clip", size="--fit=crop").image_format
    assert (of_model.fit, changed.fit) == ("squash", "crop")
    assert changed.mean != of_model.mean and changed.resample == of_model.resample == "bilinear"
    tiled = prepare(many(40), like, "--canvases=32x16", size="--norm=half").image_format
    assert tiled.size == 16 and tiled.canvases == ((32, 16),)
    for flag in ("--resample=reduced", "--size=64"):  # not with the tiles that the other has
        with pytest.raises(UserError, match="no such image format") as error:
            prepare(many(40), "--like=data/llava", size=flag)
        assert one_line(error)


# ---- trained on


def test_forgotten_pictures_are_an_error_or_mended(place, capsys):
    """BabyLLaVA-V2's trap: a human turn without <image>, which would train without its pictures."""
    turns = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "a ball ."}]
    items = many(40)
    items[7] = item(["0.png", "1.png"], turns)
    with pytest.raises(UserError, match="item 7: 0 <image> for 2 pictures; --fix"):
        prepare(items)
    dataset = prepare(items, "--fix", name="fixed")
    whole = [split for split in ("chat_train", "chat_val") if dataset.count(split, "samples")]
    assert sum(dataset.count(split, "samples") for split in whole) == 40
    fixed = [*TALK[:0], {"from": "human", "value": "<image><image>what ?"}, turns[1]]
    by_hand = prepare([*items[:7], item(["0.png", "1.png"], fixed), *items[8:]], name="by_hand")
    assert by_hand.meta["corpus"] == dataset.meta["corpus"]
    assert "chat.json: --fix put <image> into 1 items, item 7 first" in capsys.readouterr().out
    items[7] = item(["0.png", "1.png"], [{"from": "human", "value": "<image>what ?"}, turns[1]])
    with pytest.raises(UserError, match="item 7: 1 <image> for 2 pictures$"):
        prepare(items, "--fix")


@pytest.fixture
def trained(place, recipe):
    """data/llava in the words of the recipe, and out/chat: its phase 3, after phase 2."""
    prepare(many(40), f"--like={recipe}/phase2.pt")
    flags = ["--data=data/llava", f"--init={recipe}/phase2.pt", "--block_size=200", *SMALL]
    run = [flag for flag in flags if flag not in SMALL or "block_size" not in flag]
    train.main([*run, "--phase=3", "--out=out/chat", "--phase3_steps=8"])
    return run


def test_conversations_are_trained_on_and_held(trained, capsys):
    loaded = checkpoint.load("out/chat/phase3.pt")
    assert loaded.choose_template() == (TEMPLATES["baby_v1"], "")
    sample.main(["--checkpoint=out/chat/phase3.pt", "--image=pictures/0.png", "--prompt=what ?"])
    assert capsys.readouterr().out
    assert loaded.model.gpt.config.block_size == 200  # longer than the recipe's 48


def test_lora_learns_its_factors_alone_is_merged_and_goes_on(trained, recipe):
    lora = [*trained, "--phase=3", "--lora_rank=2", "--phase3_steps=8", "--save_every=3"]
    train.main([*lora, "--out=out/lora"])
    before, after = weights(recipe / "phase2.pt"), weights("out/lora/phase3.pt")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    linears = ("qkv_proj.weight", "o_proj.weight", "gate_up_proj.weight", "down_proj.weight")
    assert all(name.endswith(linears) or name.startswith("projector") for name in moved)
    assert any("qkv_proj" in name for name in moved)
    difference = (
        after["gpt.layers.0.mlp.down_proj.weight"] - before["gpt.layers.0.mlp.down_proj.weight"]
    )
    assert torch.linalg.matrix_rank(difference, rtol=1e-4) <= 2
    assert inference.caption_pictures(checkpoint.load("out/lora/phase3.pt"), []) == []

    def stop_at_6(*args, **kwargs):
        if args[1] == 6:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    from training import phases

    original = phases.save
    phases.save = stop_at_6
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main([*lora, "--out=out/killed"])
    finally:
        phases.save = original
    assert checkpoint.read("out/killed/phase3.pt")["step"] == 3
    train.main([*lora, "--out=out/killed"])
    assert same(weights("out/killed/phase3.pt"), after)


def test_lora_in_a_part_of_the_gpt_leaves_its_weights_alone(trained, recipe):
    lora = [*trained, "--phase=3", "--lora_rank=2", "--out=out/part"]
    train.main([*lora, "--phase3_learn", "projector", "gpt.layers.1"])
    before, after = weights(recipe / "phase2.pt"), weights("out/part/phase3.pt")
    moved = {n for n in before if n[:4] == "gpt." and not torch.equal(before[n], after[n])}
    assert moved and all(n.startswith("gpt.layers.1.") and "norm" not in n for n in moved)
    with pytest.raises(UserError, match="nothing of it is trained"):
        train.main([*lora[:-1], "--out=out/none", "--phase3_learn", "gpt.norm"])


@pytest.mark.parametrize("part", ["projector", "tower"])
def test_a_batch_of_text_alone_while_the_language_model_does_not_learn(trained, part):
    """Every third conversation has no picture: such a batch once had nothing to go back through."""
    train.main([*trained, "--phase=3", "--out=out/alone", "--phase3_learn", part])
    assert checkpoint.read("out/alone/phase3.pt")["done"]


def test_gradient_checkpointing_changes_no_bit(trained):
    train.main([*trained, "--phase=3", "--out=out/again", "--phase3_steps=8", "--recompute"])
    assert same(weights("out/again/phase3.pt"), weights("out/chat/phase3.pt"))


def test_tiles_are_trained_on_with_the_tower_at_its_own_rate(trained, recipe):
    prepare(many(40), f"--like={recipe}/phase2.pt", "--canvases", "32x16", "16x32", name="tiled")
    flags = [flag for flag in trained if "--data" not in flag]
    learn = ["--phase3_learn", "projector", "gpt", "tower=1e-2"]
    train.main([*flags, "--data=data/tiled", "--phase=3", "--out=out/tiled", *learn])
    after, before = weights("out/tiled/phase3.pt"), weights(recipe / "phase2.pt")
    assert set(after) - set(before) == {"image_newline"}
    assert not torch.equal(
        after["tower.patch_embed.proj.weight"], before["tower.patch_embed.proj.weight"]
    )
    loaded = checkpoint.load("out/tiled/phase3.pt")
    embeds = inference.embed_pictures(loaded, inference.read_pictures(loaded, ["pictures/0.png"]))
    assert len(embeds[0]) == 4 + 2 * (4 + 1)  # 2 x 2 patches, then two rows of 4 and a newline
    resumed = [*flags, "--data=data/tiled", "--phase=3", "--out=out/tiled", *learn]
    train.main(resumed)  # done already
    frozen = [*flags, "--data=data/tiled", "--phase=3", "--out=out/frozen"]
    train.main(frozen)
    train.main([*frozen[:-1], "--out=out/live", "--features=live"])
    assert furthest(weights("out/live/phase3.pt"), weights("out/frozen/phase3.pt")) < 1e-3


# ---- folders to start from


def test_training_goes_on_from_a_folder(place):
    """In its own tokens, template and form of pictures; out again as a checkpoint of ours."""
    fake_llava.make(place / "vicuna")
    dataset = prepare(many(40), "--like=vicuna", name="like", size="--fit=pad")
    assert dataset.meta["template"]["name"] == "v1" and dataset.meta["tokenizer"] == "json"
    flags = ["--data=data/like", "--init=vicuna", "--out=out/on", "--phase=3", "--phase3_lr=1e-2"]
    steps = ["--phase3_steps=6", "--phase3_batch=4", "--eval_every=3", "--device=cpu"]
    train.main([*flags, *steps])
    loaded = checkpoint.load("out/on/phase3.pt")
    assert loaded.tokenizer.dump() == dataset.tokenizer.dump()
    assert loaded.choose_template() == (TEMPLATES["v1"], "")
    log = [json.loads(line) for line in open("out/on/log.jsonl")]
    for option, has in [
        ("projector=linear", "mlp2x_gelu"),
        ("select_layer=-1", "-2"),
        ("n_layer=9", ""),
    ]:
        with pytest.raises(UserError, match=f"contradicts vicuna.*{has}"):
            train.main([*flags[:2], "--out=out/no", "--phase=3", *steps, f"--{option}"])
    export.main(["out/on/phase3.pt", "there"])
    back = inference.open_model("there")
    assert same(back.model.state_dict(), loaded.model.state_dict())
    assert back.tokenizer.dump() == loaded.tokenizer.dump()
    ids = json.load(open("there/generation_config.json"))
    assert ids["eos_token_id"] == [2]
    losses = [entry["val_loss"] for entry in log if "val_loss" in entry]
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match="another vocabulary"):
        prepare(many(40), name="other")
        train.main(["--data=data/other", "--init=vicuna", "--out=out/no", "--phase=3", *steps])


def test_a_tower_and_a_language_model_from_folders(place):
    """LLaVA-1.5's stage 1: CLIP and a Llama as they are, and a projector between them."""
    import transformers

    torch.manual_seed(0)
    words = fake_llava.sentence_piece(False)
    size = words.get_vocab_size()
    said = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=size,
        max_position_embeddings=256,
    )
    fake_llava.randomise(transformers.LlamaForCausalLM(said)).save_pretrained(place / "llama")
    words.save(str(place / "llama/tokenizer.json"))
    words = {"eos_token": "</s>", "bos_token": "<s>"}
    (place / "llama/tokenizer_config.json").write_text(json.dumps(words))
    seen = fake_llava.towers(transformers)["clip"](
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
    )
    clip = fake_llava.randomise(transformers.CLIPVisionModel(seen))
    clip.save_pretrained(place / "clip")
    said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a ball ."}]
    pairs = [item([f"{i % 20}.png"], said) for i in range(40)]
    prepare(pairs, "--like=llama", "--template=plain", "--size=28", "--norm=clip", name="pairs")
    parts = ["--vision_weights=clip", "--language_weights=llama", "--select_layer=-2"]
    steps = ["--phase1_steps=3", "--phase1_batch=4", "--phase2_steps=3", "--phase2_batch=4"]
    flags = ["--data=data/pairs", "--out=out/stage1", "--device=cpu", "--evaluate=False"]
    train.main([*flags, *parts, *steps, "--phase=1"])  # takes both as they are, then trains
    loaded = checkpoint.load("out/stage1/phase1.pt")
    assert loaded.tokenizer.image == size < loaded.model.gpt.config.vocab_size < size + 65
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        theirs = clip(pixels, output_hidden_states=True).hidden_states[-2]
        assert (loaded.model.encode_images(pixels) - theirs[:, 1:]).abs().max() < 1e-4
    with pytest.raises(UserError, match="not in the tokens of llama"):
        prepare(pairs, "--template=plain", "--size=28", name="other")
        train.main(["--data=data/other", "--out=out/no", "--device=cpu", *parts, "--phase=0"])


# ---- and out again


def opened(folder):
    import transformers

    return (
        transformers.AutoModelForImageTextToText.from_pretrained(folder).eval(),
        transformers.AutoProcessor.from_pretrained(folder),
    )


@pytest.mark.parametrize("tiled", [False, True])
def test_what_learnt_conversations_is_exported_with_its_template(trained, recipe, tiled):
    """transformers' apply_chat_template writes our tokens, and its model has our logits."""
    flags, source = [flag for flag in trained if "--data" not in flag], "out/chat/phase3.pt"
    if tiled:
        prepare(
            many(40), f"--like={recipe}/phase2.pt", "--canvases", "32x16", "16x32", name="tiled"
        )
        said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a ball ."}]
        pairs = [item([f"{i % 20}.png"], said) for i in range(40)]
        prepare(pairs, f"--like={recipe}/phase2.pt", "--template=plain", name="captions")
        own = "--init", "--select_layer"  # given below, or inherited
        flags = [flag for flag in flags if not flag.startswith(own)]
        shape = ["--select_layer=-2", f"--init={recipe}"]
        train.main([*flags, "--data=data/captions", "--phase=1", "--out=out/t1", *shape])
        source = "out/t3/phase3.pt"
        train.main(
            [*flags, "--data=data/tiled", "--phase=3", "--init=out/t1/phase1.pt", "--out=out/t3"]
        )
    export.main([source, "there"])
    theirs, processor = opened("there")
    loaded = checkpoint.load(source)
    embeds = inference.embed_pictures(loaded, inference.read_pictures(loaded, ["pictures/3.png"]))
    tokens = torch.tensor(
        [inference.make_prompt(loaded, embeds, "what is it ?", TEMPLATES["baby_v1"])]
    )
    content = [{"type": "image"}, {"type": "text", "text": "what is it ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    picture = Image.open("pictures/3.png").convert("RGB")
    inputs = processor(images=picture, text=text, return_tensors="pt")
    assert inputs["input_ids"].tolist() == tokens.tolist()
    with torch.no_grad():
        ours = logits_after(loaded.model, tokens, embeds[0])
        assert (theirs(**inputs).logits - ours).abs().max() < 1e-4
    back = inference.open_model("there")
    assert same(back.model.state_dict(), loaded.model.state_dict())
    assert back.choose_template() == (TEMPLATES["baby_v1"], "")


def test_a_ready_convnext_gets_a_stage_more(place, recipe):
    """ConvLLaVA's stages 1 to 3: what learns in each, and nothing else."""
    torch.manual_seed(0)
    tower = ConvNeXt((1, 1), width=16, stem=2)
    torch.save(tower.state_dict(), "conv.pth")
    said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a ball ."}]
    pairs = [item([f"{i % 20}.png"], said) for i in range(40)]
    prepare(pairs, f"--like={recipe}/phase2.pt", "--template=plain", name="pairs")
    shape = ["--vision_weights=conv.pth", "--extra_stage=1", f"--init={recipe}"]
    flags = ["--data=data/pairs", "--out=out/conv", *SMALL]
    flags = [flag for flag in flags if not flag.startswith(("--patch", "--vision_"))]
    train.main([*flags, *shape, "--phase=1", "--phase1_learn", "projector", "tower.stages.2"])
    one = weights("out/conv/phase1.pt", "tower.")
    assert all(torch.equal(one[f"tower.{n}"], w) for n, w in tower.state_dict().items())
    learn = ["--phase2_learn", "projector", "gpt", "tower.stages.1", "tower.stages.2"]
    train.main([*flags, "--phase=2", *learn])
    two = weights("out/conv/phase2.pt", "tower.")
    moved = {name.split(".")[2] for name in one if not torch.equal(one[name], two[name])}
    assert moved == {"1", "2"}
    assert checkpoint.load("out/conv/phase2.pt").model.image_tokens(16) == 4
