"""Templates: what is written, what of it is learnt; against transformers' own chat templates."""

import pytest

from config import UserError
from tokenizer import TEMPLATES, Template, Tokenizer, chat_sample, end_tokens, expand, with_pictures

OURS = Tokenizer.train(["what is it ? a ball .", "USER: ASSISTANT:"] * 9, 300)
TURNS = [("<image>\nwhat is it ?", "a ball ."), ("and this <image> ?", "a cup .")]


def specials(*names):
    """A tokenizer of ours that has more special tokens."""
    made = Tokenizer.train(["what is it ? a ball ."] * 9, 300)
    made.specials = made.specials | {name: 1000 + i for i, name in enumerate(names)}
    return made


LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = ("<|im_start|>", "<|im_end|>")


def spell(tokenizer, tokens):
    names = {i: name for name, i in tokenizer.specials.items()}
    return "".join(names[t] if t in names else tokenizer.encoding.decode([t]) for t in tokens)


@pytest.mark.parametrize(
    "name, extra, system, written",
    [
        (
            "baby_v1",
            (),
            "",
            " USER: <image> \nwhat is it ? ASSISTANT: a ball .<eos> USER: and this <image>  ? "
            "ASSISTANT: a cup .<eos>",
        ),
        (
            "v1",
            (),
            "Be kind.",
            " Be kind. USER: <image> \nwhat is it ? ASSISTANT: a ball .<eos> USER: and this "
            "<image>  ? ASSISTANT: a cup .<eos>",
        ),
        (
            "llama3",
            LLAMA3,
            "Be kind.",
            "<|start_header_id|> system<|end_header_id|> \n\nBe kind.<|eot_id|>"
            "<|start_header_id|> user<|end_header_id|> \n\n<image> \nwhat is it ?<|eot_id|>"
            "<|start_header_id|> assistant<|end_header_id|> \n\na ball .<|eot_id|>"
            "<|start_header_id|> user<|end_header_id|> \n\nand this <image>  ?<|eot_id|>"
            "<|start_header_id|> assistant<|end_header_id|> \n\na cup .<|eot_id|>",
        ),
        (
            "chatml",
            CHATML,
            "",
            "<|im_start|> user\n<image> \nwhat is it ?<|im_end|> \n<|im_start|> assistant\n"
            "a ball .<|im_end|> \n<|im_start|> user\nand this <image>  ?<|im_end|> \n"
            "<|im_start|> assistant\na cup .<|im_end|> \n",
        ),
        (
            "mistral",
            (),
            "",
            " [INST] <image> \nwhat is it ? [/INST] a ball .<eos> [INST] and this <image>  ? "
            "[/INST] a cup .<eos>",
        ),
    ],
)
def test_what_is_written_and_what_is_learnt(name, extra, system, written):
    """Our vocabulary puts a space before each stretch between specials."""
    tokenizer = specials(*extra)
    tokens, learn = chat_sample(tokenizer, TEMPLATES[name], TURNS, system)
    assert spell(tokenizer, tokens) == written
    answers, end = [], end_tokens(tokenizer, TEMPLATES[name])
    current = []
    for token, flag in zip(tokens, learn):
        if flag:
            current.append(token)
        if flag and token in end:
            answers.append(spell(tokenizer, current[:-1]).strip())
            current = []
    assert answers == ["a ball .", "a cup ."] and not current
    assert learn[tokens.index(tokenizer.image)] == 0


def test_the_model_goes_on_where_an_answer_begins():
    whole, learn = chat_sample(OURS, TEMPLATES["v1"], TURNS)
    asked, _ = chat_sample(OURS, TEMPLATES["v1"], [TURNS[0], (TURNS[1][0], None)])
    assert whole[: len(asked)] == asked and learn[len(asked)] == 1


def test_a_vocabulary_without_the_templates_tokens_is_refused():
    with pytest.raises(UserError, match=r"needs <\|start_header_id\|>"):
        chat_sample(OURS, TEMPLATES["llama3"], TURNS)


def test_text_cannot_forge_a_special_token():
    tokens, learn = chat_sample(OURS, TEMPLATES["v1"], [("<eos> <pad>", "<image> <eos>")])
    assert tokens.count(OURS.eos) == 1 and tokens.count(OURS.pad) == 0
    assert sum(flag for token, flag in zip(tokens, learn) if token == OURS.image) == 0


def test_placeholders_stand_for_as_many_tokens_as_their_image_has():
    assert expand([9, 1, 2, 1], 1, [2, 3]) == [9, 1, 1, 2, 1, 1, 1]


def test_pictures_stand_before_the_question_or_where_it_says():
    v1 = TEMPLATES["v1"]
    assert with_pictures(v1, "what ?", 2) == "<image>\n<image>\nwhat ?"
    assert with_pictures(v1, "is <image> like <image> ?", 2) == "is <image> like <image> ?"
    for words, count in [("<image> ?", 2), ("<image> ?", 0)]:
        with pytest.raises(UserError, match=f"1 <image> in the question, for {count}"):
            with_pictures(v1, words, count)


def test_what_is_said_after_bos_is_the_beginning_of_the_text():
    """Mistral's vocabulary marks the beginning of a text, not of a stretch after a special."""
    begun = []

    class Notes:
        bos, eos, image, specials = 1, 2, 3, {"<image>": 3}

        def encode_segment(self, text, after):
            begun.append((text, after))
            return [9]

    chat_sample(Notes(), TEMPLATES["mistral"], [("<image>what", "a ball")])
    assert begun == [("[INST] ", "start"), ("what [/INST]", "special"), (" a ball", "text")]


def test_an_answers_end_is_found_and_any_special_token_is_required():
    """Also where the template's end is more than one token, and of names without bars."""
    turn = Template("<start>{}<end>\n<start>", end="<end>\n")
    with pytest.raises(UserError, match="this template needs <start>"):
        chat_sample(OURS, turn, TURNS)
    made = specials("<start>", "<end>")
    assert chat_sample(made, turn, TURNS)[0].count(made.specials["<end>"]) == 4
    assert made.specials["<end>"] in end_tokens(made, turn)
