"""Chat templates of other people's folders, against what transformers makes of them."""

import json

import jinja_templates
import pytest
from conftest import one_line

import export
from config import UserError
from pretrained import chat_templates, hf_config
from tokenizer import chat_sample, read_template, with_pictures

transformers = pytest.importorskip("transformers")
from fake_llava import byte_level, sentence_piece  # noqa: E402

MARKS = (
    "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|user|>", "<|assistant|>", "<|system|>",
    "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
END = {"LLAMA3": "<|eot_id|>", "NEXT_LLAMA3": "<|eot_id|>", "LLAMA31": "<|eot_id|>",
       "PHI3": "<|end|>", "GEMMA": "<end_of_turn>"}  # fmt: skip
CHATML = ("ONEVISION", "QWEN2", "QWEN25", "CHATML", "CHATML_NO_NEWLINE", "SMOL")
REFUSED = {"LLAMA2": "within a conversation", "DATE": "today's date"}
TURNS = [
    ("What's this?", "A red ball."),
    ("And that, on the left?", "It's a cup."),
    ("Why so?", None),
]
NAMES = {"NEXT_LLAMA3": "llama3", "CHATML": "chatml"}  # known ones


def make_folder(folder, name, adds_bos, kind="byte"):
    """A folder with this chat template; returns (transformers' tokenizer, ours)."""
    words = byte_level(specials=MARKS, vocab_size=400) if kind == "byte" else None
    words = words or sentence_piece(kind == "mistral")
    if kind != "byte":
        words.add_special_tokens(list(MARKS))
    content = json.loads(words.to_str())
    if adds_bos:
        bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                "<s>": {"id": "<s>", "ids": [words.token_to_id("<s>")], "tokens": ["<s>"]}
            },
        }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    end = "<|im_end|>" if name in CHATML else END.get(name, "</s>")
    source = jinja_templates.ALL[name]
    settings = {"eos_token": end, "bos_token": "<s>", "add_bos_token": adds_bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": source}))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token=end
    )
    theirs.chat_template = source
    image = words.token_to_id("<image>")
    ours = hf_config.read_tokenizer(folder, {"vocab_size": 999}, image)
    return theirs, ours


def messages_of(turns, system, images, lists):
    """transformers' form of a conversation; images: of the first question."""
    said = [("system", system)] if system else []
    for question, answer in turns:
        said += [("user", question)] + ([("assistant", answer)] if answer else [])
    messages = [{"role": role, "content": words} for role, words in said]
    if lists:
        for number, message in enumerate(messages):
            own = images if number == bool(system) else 0
            text = {"type": "text", "text": message["content"]}
            message["content"] = [{"type": "image"}] * own + [text]
    return messages


KINDS = [("byte", False), ("byte", True), ("llama2", True), ("mistral", True)]


@pytest.mark.parametrize("kind, adds_bos", KINDS)
@pytest.mark.parametrize("name", jinja_templates.ALL)
def test_prompts_are_those_of_the_folders_own_template(tmp_path, name, kind, adds_bos):
    """One, two and three turns, with and without a system text and pictures: the ids that
    transformers makes, and its default system text."""
    theirs, ours = make_folder(tmp_path, name, adds_bos, kind)
    described = hf_config.find_template(tmp_path, "llama", ours)
    if name in REFUSED:
        assert REFUSED[name] in described["why"]
        return
    template = read_template(described)
    source = jinja_templates.ALL[name]
    lists = "'type'" in source
    systems = ["", "Be kind to all."] if template.system else [""]
    for length in (1, 2, 3):
        turns = [*TURNS[: length - 1], (TURNS[length - 1][0], None)]
        for system in systems:
            for images in (0, 1, 2) if lists else (0,):
                messages = messages_of(turns, system, images, lists)
                text = theirs.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
                # a processor adds bos to a text that does not begin with it
                wanted = theirs(text, add_special_tokens=not text.startswith("<s>"))["input_ids"]
                first = with_pictures(template, turns[0][0], images)
                tokens, _ = chat_sample(
                    ours,
                    template,
                    [(first, turns[0][1]), *turns[1:]],
                    system or described["system"],
                )
                assert tokens == wanted, text


def test_default_system_texts_are_taken_over(tmp_path):
    for name, begins in (("VICUNA", "A chat between"), ("QWEN25", "You are Qwen"), ("CHATML", "")):
        _, ours = make_folder(tmp_path, name, adds_bos=False)
        described = hf_config.find_template(tmp_path, "llama", ours)
        assert described["system"].startswith(begins) and bool(described["system"]) == bool(begins)


@pytest.mark.parametrize("name", NAMES)
def test_a_template_that_is_known_has_its_name(tmp_path, name):
    _, ours = make_folder(tmp_path, name, adds_bos=True)
    described = hf_config.find_template(tmp_path, "llama", ours)
    if name != "CHATML":  # ours has no bos, which this tokenizer puts there
        assert described == {"name": NAMES[name], "system": "", "fields": None}
    _, ours = make_folder(tmp_path, name, adds_bos=False)
    assert hf_config.find_template(tmp_path, "llama", ours)["system"] == ""


@pytest.mark.parametrize(
    "source, why",
    [
        ("{% for m in messages %}", "it is no Jinja"),
        ("hello", "writes some 0 times"),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "writes some 2 times"),
        ("{% for m in messages %}{{ loop.index }}: {{ m.content }} {% endfor %}", "the turns"),
        ("{{ raise_exception('no') }}", "it refuses a conversation"),
        ("{% for m in messages %}{{ '{}' + m.content }}{% endfor %}", "it writes braces"),
        ("{% for m in messages %}{{ m.content }}{{ '.' * messages|length }}{% endfor %}", "turns"),
    ],
)
def test_what_cannot_be_written_as_a_template_is_refused(tmp_path, source, why, monkeypatch):
    monkeypatch.setitem(jinja_templates.ALL, "ONE", source)
    _, ours = make_folder(tmp_path, "ONE", adds_bos=False)
    described = hf_config.find_template(tmp_path, "llama", ours)
    assert why in described["why"] and str(tmp_path) in described["why"]


def test_without_jinja_one_line_says_what_to_install(tmp_path, monkeypatch):
    import sys

    _, ours = make_folder(tmp_path, "CHATML", adds_bos=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match="pip install jinja2, or give --template") as error:
        hf_config.find_template(tmp_path, "llama", ours)
    assert one_line(error)


def test_without_a_template_that_of_its_language_model_is_taken(tmp_path, capsys):
    _, ours = make_folder(tmp_path, "CHATML", adds_bos=False)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for kind, name in (("qwen2", "chatml"), ("llama", "v1"), ("mistral", "mistral")):
        described = hf_config.find_template(tmp_path, kind, ours)
        assert described == {"name": name, "system": ""}
        assert f"no chat template; --template {name} is taken" in capsys.readouterr().err


def test_the_last_place_that_transformers_looks_at_is_the_tokenizers(tmp_path):
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    files = {
        "tokenizer_config.json": {"chat_template": named},
        "chat_template.json": {"chat_template": "P"},
    }
    for (name, content), wanted in zip(files.items(), "DP"):
        (tmp_path / name).write_text(json.dumps(content))
        assert chat_templates.find_program(tmp_path, hf_config.read_json) == wanted
    (tmp_path / "chat_template.jinja").write_text("J")
    assert chat_templates.find_program(tmp_path, hf_config.read_json) == "J"


@pytest.mark.parametrize("name", [name for name in jinja_templates.ALL if name not in REFUSED])
def test_an_exported_template_writes_the_same_prompts(tmp_path, name):
    """What is read from a folder, written by export.py as Jinja again, and run."""
    theirs, ours = make_folder(tmp_path, name, adds_bos=False)
    described = hf_config.find_template(tmp_path, "llama", ours)
    template, lists = read_template(described), "'type'" in jinja_templates.ALL[name]
    source = export.chat_template(template, described["system"], {"eos_token": theirs.eos_token})
    again = chat_templates.Program(source, {})
    for length in (1, 2, 3):
        turns = [*TURNS[: length - 1], (TURNS[length - 1][0], None)]
        for system in ["", "Be kind."] if template.system else [""]:
            messages = messages_of(turns, system, int(lists), lists)
            wanted = theirs.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            found = again.program.render(messages=messages, add_generation_prompt=True)
            assert found == wanted
