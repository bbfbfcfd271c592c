"""
Chat templates of Hugging Face folders, which are programs in Jinja, as a Template of ours.

A program is run on conversations whose words are marks. What it writes between the marks becomes
the fields of a Template, which must then write further conversations exactly as the program does.
A program that cannot be written so is refused: --template names another. Jinja is run by jinja2,
which torch brings along.
"""

import json
import re
from dataclasses import asdict, replace

from common.files import read_text
from config import UserError
from tokenizer import TEMPLATES, Template

QUESTION, ANSWER, SYSTEM, NEXT = "Qaqaqa", "Zozozo", "Sisisi", "Wuwuwu"  # marks
WORDS = ("What is this?", "A red ball.", "And that?", "Two cups, I think.", "Why so?")


class Unlike(Exception):
    """Why a program cannot be written as a Template."""


def find_program(folder, read_json):
    """The Jinja of a folder's chat template, or "". transformers looks for it in this order."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = read_json(folder / name, {}).get("chat_template")
        if isinstance(found, list):  # several, with names
            found = {one.get("name"): one.get("template") for one in found}.get("default")
        if found:
            return found
    return ""


# ---------------------------------------------------------------------------------------------
# Running a program


class Program:
    """A chat template of Jinja. names: {"bos_token": text, ...}."""

    def __init__(self, source, names):
        try:
            from jinja2 import sandbox
        except ImportError:
            raise UserError(
                "a folder's chat template is read by jinja2: pip install jinja2, or give --template"
            ) from None
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False)
        environment.globals |= {"raise_exception": raise_exception, "strftime_now": no_date}
        # these two mark what is learnt, and write nothing
        source = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", source)
        source = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", source)
        self.names = names
        try:
            self.program = environment.from_string(source)
        except Exception as error:  # jinja2's, of many kinds
            raise Unlike(f"it is no Jinja ({error})") from None
        self.takes_lists = self.choose_form()

    def choose_form(self):
        """Whether contents are lists of images and texts, as a LLaVA's programs want them, or
        texts, as those of language models do."""
        self.takes_lists = True
        try:
            written = self.run([("user", QUESTION, 0)])
        except Unlike:
            return False
        return QUESTION in written and "'type'" not in written and '"type"' not in written

    def run(self, messages, prompt=True):
        """The text of messages [(role, words, number of images)]. prompt: up to where the next
        answer starts. Raises Unlike."""
        said = []
        for role, words, images in messages:
            content = "<image>\n" * images + words
            if self.takes_lists:
                content = [{"type": "image"}] * images + [{"type": "text", "text": words}]
            said.append({"role": role, "content": content})
        try:
            return self.program.render(
                messages=said,
                add_generation_prompt=prompt,
                tools=None,
                documents=None,
                **self.names,
            )
        except Exception as error:  # raise_exception(), or whatever a program does wrong
            raise Unlike(f"it refuses a conversation ({error})") from None


def raise_exception(message):
    raise ValueError(message)


def no_date(form):
    raise ValueError("it writes today's date")


# ---------------------------------------------------------------------------------------------
# From texts to a Template


def between(text, before, after):
    """The part of a text between its beginning and its end. Raises Unlike if it has others."""
    if not (text.startswith(before) and text.endswith(after)):
        raise Unlike("its turns differ")
    if len(text) < len(before) + len(after):
        raise Unlike("its turns differ")
    return text[len(before) : len(text) - len(after)]


def cut(text, mark):
    """The two parts of a text around a mark, which must occur once. Raises Unlike."""
    if text.count(mark) != 1:
        raise Unlike(f"of what is said, it writes some {text.count(mark)} times")
    return text.split(mark)


def common_end(one, two):
    """The longest text that both end with."""
    length = 0
    while length < min(len(one), len(two)) and one[-length - 1] == two[-length - 1]:
        length += 1
    return one[len(one) - length :]


def derive(program, stops):
    """(Template, default system text) of a Program; in its texts the special tokens are written
    out. stops: the texts of tokens that end an answer. Raises Unlike."""
    ask, said = ("user", QUESTION, 0), ("assistant", ANSWER, 0)
    first, header = cut(program.run([ask]), QUESTION)
    two = program.run([ask, said, ("user", NEXT, 0)])
    before, rest = cut(between(two, first + QUESTION, NEXT + header), ANSWER)
    whole = program.run([ask, said], prompt=False)
    last = between(whole, first + QUESTION + before + ANSWER, "")
    user = common_end(first, rest.removeprefix(last))
    begin, closing = first[: len(first) - len(user)], rest[: len(rest) - len(user)]
    found = [last.index(stop) + len(stop) for stop in stops if stop in last]
    end, gap = (last[: min(found)], last[min(found) :]) if found else ("{eos}", "")
    begin, system, default = derive_system(program, begin, user + QUESTION + header)
    user, picture, lead = derive_picture(program, user, header)
    answer = before[len(header) :] + "{}" if before.startswith(header) else "{}"
    past = ""
    if answer != before[len(header) :] + "{}" or closing != end + gap:
        past = user + "{question}" + before + "{answer}" + closing
    texts = (
        user,
        header,
        before,
        closing,
        end,
        begin,
        system.replace("{}", ""),
        gap,
        picture,
        lead,
    )
    if any("{" in text.replace("{eos}", "") for text in texts):
        raise Unlike("it writes braces, which stand for what is said in a Template of ours")
    made = Template(
        user + "{}" + header, answer, end, begin, system, gap, picture, lead=lead, past=past
    )
    return made, default


def derive_system(program, begin, rest):
    """(begin, system, default system text). begin: the text before the first question, which `rest`
    starts with."""
    try:
        before, after = cut(program.run([("system", SYSTEM, 0), ("user", QUESTION, 0)]), SYSTEM)
        after = between(after, "", rest)
    except Unlike:  # no place for a system text, or one within the first question
        return begin, "", ""
    if before.startswith(begin):
        return begin, before[len(begin) :] + "{}" + after, ""
    if begin.startswith(before) and begin.endswith(after):
        default = begin[len(before) : len(begin) - len(after)]
        if default:
            return "", before + "{}" + after, default
    return begin, "", ""  # for example, around no text there is the same as around a text


def derive_picture(program, user, header):
    """(user, picture, lead). Some write something between the images and the words of a question,
    and write it also without images: that is the lead."""
    if not program.takes_lists:
        return user, Template.picture, ""
    written = program.run([("user", QUESTION, 1)])
    before, after = cut(written, "<image>")
    after = between(after, "", QUESTION + header)
    if before.endswith(user):
        return user, "<image>" + after, ""
    if after and user.endswith(after) and before.endswith(user.removesuffix(after)):
        return user.removesuffix(after), "<image>", after
    raise Unlike("its images stand elsewhere than before a question")


def write(template, turns, system, images=()):
    """The text of a conversation, its last answer None, as a Template writes it. images: the number
    of images before each question."""
    text = template.begin + (template.system.replace("{}", system) if system else "")
    for i, (question, answer) in enumerate(turns):
        pictures = template.picture * (images[i] if images else 0)
        question = pictures + template.lead + question
        if answer is None:
            text += template.user.replace("{}", question)
        elif template.past:
            text += template.past.replace("{question}", question).replace("{answer}", answer)
        else:
            text += template.user.replace("{}", question) + template.answer.replace("{}", answer)
            text += template.end + template.between
    return text


def check(program, template, default):
    """Raise Unlike unless a Template writes a few conversations as the Program does."""
    one, two, three, four, five = WORDS
    for turns in (
        [(one, None)],
        [(one, two), (three, None)],
        [(one, two), (three, four), (five, None)],
    ):
        messages = [
            (role, words, 0)
            for turn in turns
            for role, words in zip(("user", "assistant"), turn)
            if words is not None
        ]
        if write(template, turns, default) != program.run(messages):
            raise Unlike("its turns differ from each other")
        if template.system:
            messages = [("system", four, 0), *messages]
            if write(template, turns, four) != program.run(messages):
                raise Unlike("its system text changes the turns")
    if program.takes_lists:
        messages = [("user", one, 2), ("assistant", two, 0), ("user", three, 1)]
        if write(template, [(one, two), (three, None)], default, (2, 1)) != program.run(messages):
            raise Unlike("its images stand elsewhere than before a question")


def with_roles(template, bos, eos, adds_bos):
    """A Template with {eos} for the text of that token, and {bos} if the tokenizer adds one, which
    it does to a text that does not begin with it. Raises Unlike."""
    texts = {name: text for name, text in asdict(template).items() if isinstance(text, str)}
    begins = bool(bos) and template.begin.startswith(bos)
    for name, text in texts.items():
        if bos and bos in text.removeprefix(bos if name == "begin" else ""):
            raise Unlike("it writes <bos> within a conversation")
        texts[name] = text.replace(eos, "{eos}") if eos else text
    if adds_bos and not begins:
        texts["begin"] = "{bos}" + texts["begin"]
    return replace(template, **texts)


def name_of(template, eos, adds_bos):
    """The name of the Template in TEMPLATES that writes the same, or ""."""
    for name, known in TEMPLATES.items():
        texts = {
            field: text.replace(eos or "{eos}", "{eos}")
            for field, text in asdict(known).items()
            if isinstance(text, str)
        }
        texts["begin"] = texts["begin"] if adds_bos else texts["begin"].replace("{bos}", "")
        if template == replace(known, **texts, models=()):
            return name
    return ""


def read(source, tokenizer, names):
    """{"name", "system", "fields"} of a folder's chat template in Jinja; "fields" are those of a
    Template, None if it is one of TEMPLATES. tokenizer: the folder's; names: {"bos_token": text,
    ...} of its tokenizer_config.json. Raises Unlike."""
    of_id = {i: text for text, i in tokenizer.specials.items()}
    stops = [of_id[i] for i in tokenizer.stops if i in of_id]
    program = Program(source, names)
    template, default = derive(program, stops)
    check(program, template, default)
    adds_bos = tokenizer.bos is not None
    bos = of_id.get(tokenizer.bos, names.get("bos_token"))
    template = with_roles(template, bos, of_id.get(tokenizer.eos), adds_bos)
    name = name_of(template, of_id.get(tokenizer.eos), adds_bos)
    fields = None if name else asdict(template) | {"own": True}
    return {"name": name or "its own", "system": default, "fields": fields}
