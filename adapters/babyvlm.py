"""
A model of nanoBabyLLaVA inside lmms-eval (0.3 to 0.7), for the BabyVLM challenge. `python export.py
CHECKPOINT.pt DIR --to babyvlm` copies this file to DIR/model.py, beside the weights and the code
that it loads, DIR/checkpoint.pt and DIR/nanobabyllava/.

    simple_evaluate(model=NanoBabyLLaVA(pretrained="DIR"), tasks=[...])    # an instance
    python -m lmms_eval --model NAME --model_args pretrained=DIR ...       # registered

`pretrained` is such a folder, a .pt beside it, or the name of a repository on the Hugging Face hub
with the same files. Answers are greedy, whatever the task's temperature. No item ends a run: one
that fails, or has no room in the context, gets an empty answer, and a line says how many did.
"""

import importlib.util
import json
from contextlib import suppress
from pathlib import Path

from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from PIL import Image

try:  # lmms-eval 0.7 turns a bare tuple into text; a GenerationResult is passed on unchanged
    from lmms_eval.api.instance import GenerationResult
except ImportError:

    def GenerationResult(loss):
        return loss


LONGEST = 32  # tokens of an answer, where the task does not say


def find_path(pretrained):
    """The path of a submission's folder or .pt; downloaded if there is none. Raises ValueError."""
    name = pretrained.removeprefix("https://huggingface.co/").rstrip("/")
    if Path(name).exists():
        return Path(name)
    if "://" in name or len(name.split("/")) > 2 or name.startswith(("/", ".")):
        raise ValueError(f"{pretrained}: no such folder, nor a repository on the Hugging Face hub")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name))


def open_exported(path):
    """adapters/loading.py's function of that name, from the exported folder: this file is copied
    elsewhere alone."""
    folder = path if path.is_dir() else path.parent
    code = folder / "nanobabyllava" / "adapters" / "loading.py"
    if not code.exists():  # a clone of nanoBabyLLaVA
        code = Path(__file__).parent / "loading.py"
    spec = importlib.util.spec_from_file_location("nanobabyllava_loading", code)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.open_exported


def questions_of(doc):
    """The questions of a Memory dialogue."""
    return [turn["value"] for turn in doc["conversations"] if turn["from"] == "human"]


@register_model("nanobabyllava")
class NanoBabyLLaVA(lmms):
    """pretrained: see above. batch_size: how many requests are answered together. device: empty:
    cuda if there is one. conv_template is accepted and not used: the model has its own."""

    is_simple = True  # it takes the simple form of requests, not chat messages

    def __init__(
        self, pretrained, batch_size=1, device="", conv_template="", max_batch_size=None, dtype=""
    ):
        super().__init__()
        path = find_path(str(pretrained))
        self.inference, self.loaded = open_exported(path)(path, device, dtype)
        self.template, self.system = self.inference.question_template(self.loaded)
        self.batch_size = 1 if str(batch_size).startswith("auto") else int(batch_size)
        self.failed = []  # a reason for each empty answer
        self.try_out()

    def try_out(self):
        """Answer a question and score a text about a grey picture. Raises the error if that does
        not work: else an environment in which nothing works would give empty answers to all."""
        grey = Image.new("RGB", (32, 32), "grey")
        ask = self.inference.answer_dialogues
        ask(self.loaded, [(["<image> a?"], [grey])], self.embed, self.template, self.system, 2)
        self.inference.score_text(
            self.loaded, "", "a", self.embed([grey]), self.template, self.system
        )

    # -----------------------------------------------------------------------------------------
    # Pictures

    def embed(self, pictures):
        """The embeddings of pictures, PIL images or paths, that are shown together."""
        if not pictures:
            return []
        image_format = self.loaded.image_format
        if len(pictures) > 1:
            image_format = image_format.beside_others()
        read = [self.inference.read_picture(picture, image_format) for picture in pictures]
        return self.inference.embed_pictures(self.loaded, read)

    def doc_of(self, doc_id, task, split):
        return self.task_dict[task][split][doc_id]

    def visuals_of(self, doc_to_visual, doc):
        """The pictures of a document as PIL images: some tasks nest them in lists."""
        found, wanted = [], [doc_to_visual(doc)]
        while wanted:
            one = wanted.pop(0)
            if isinstance(one, (list, tuple)):
                wanted = [*one, *wanted]
            elif isinstance(one, Image.Image):
                found.append(one)
            elif one is not None:
                raise ValueError(f"a picture of {type(one).__name__}: want PIL images")
        return found

    # -----------------------------------------------------------------------------------------
    # Answers

    def answer(self, dialogues, options):
        """The answers of dialogues [(questions, pictures)]: a list for each dialogue. One that
        raises an error gets empty answers. options: gen_kwargs of the task."""
        most = int(options.get("max_new_tokens") or LONGEST)
        try:
            said, unanswered = self.inference.answer_dialogues(
                self.loaded, dialogues, self.embed, self.template, self.system, most,
                self.batch_size)  # fmt: skip
        except Exception as error:
            if len(dialogues) > 1:  # which one was it?
                return [self.answer([dialogue], options)[0] for dialogue in dialogues]
            self.failed.append(f"{type(error).__name__}: {error}")
            return [[""] * len(dialogues[0][0])]
        self.failed += ["no room in the context"] * sum(unanswered)
        until = options.get("until") or []
        for end in [until] if isinstance(until, str) else until:
            if end:
                said = [[answer.split(end)[0].strip() for answer in own] for own in said]
        return said

    def answer_all(self, requests, make):
        """The answers of requests, in batches of equal gen_kwargs. make(request) -> (questions,
        pictures)."""
        answers, batches = [[""]] * len(requests), {}
        for number, request in enumerate(requests):
            batches.setdefault(repr(request.args[1]), []).append(number)
        for numbers in batches.values():
            for start in range(0, len(numbers), self.batch_size):
                own, dialogues = [], []
                for number in numbers[start : start + self.batch_size]:
                    try:
                        dialogues.append(make(requests[number]))
                        own.append(number)
                    except Exception as error:
                        self.failed.append(f"{type(error).__name__}: {error}")
                options = dict(requests[numbers[start]].args[1])
                for number, said in zip(own, self.answer(dialogues, options) if own else []):
                    answers[number] = said
        self.report(len(requests))
        return answers

    def report(self, count):
        """Print how many of `count` requests got no answer."""
        if self.failed:
            print(f"{len(self.failed)} empty answers in {count} items, first: {self.failed[0]}")
            self.failed = []

    def generate_until(self, requests):
        """A reply to each request, a string."""

        def make(request):
            context, _, doc_to_visual, doc_id, task, split = request.args
            visuals = self.visuals_of(doc_to_visual, self.doc_of(doc_id, task, split))
            if visuals and "<image>" not in context:
                context = " ".join(["<image>"] * len(visuals)) + "\n" + context
            if context.count("<image>") != len(visuals):
                raise ValueError(f"{context.count('<image>')} <image> for {len(visuals)} pictures")
            return [context], visuals

        return [said[0] for said in self.answer_all(requests, make)]

    def generate_until_multi_round(self, requests):
        """The replies to all rounds of each request, a JSON list. The rounds and their pictures are
        those of the document; the model's own replies stay in the context."""

        def make(request):
            _, _, _, _, doc_id, task, split = request.args
            doc = self.doc_of(doc_id, task, split)
            names = doc["image"]
            return questions_of(doc), [names] if isinstance(names, str) else list(names)

        replies = self.answer_all(requests, make)
        for number, request in enumerate(requests):
            if replies[number] == [""]:  # it failed before it was asked
                with suppress(Exception):  # the document itself may be at fault
                    questions = questions_of(self.doc_of(*request.args[4:]))
                    replies[number] = [""] * len(questions)
        return [json.dumps(said) for said in replies]

    # -----------------------------------------------------------------------------------------
    # Likelihoods

    def loglikelihood(self, requests):
        """(loss, whether greedy) of each request's continuation: its mean negative log-likelihood
        per token, lower is better. After pictures alone the text is a caption; after a question an
        answer in the model's template. One that fails has an infinite loss."""
        results = []
        for request in requests:
            context, doc_to_target, doc_to_visual, doc_id, task, split = request.args
            try:
                doc = self.doc_of(doc_id, task, split)
                text = doc_to_target if isinstance(doc_to_target, str) else doc_to_target(doc)
                visuals = self.visuals_of(doc_to_visual, doc)
                result = self.inference.score_text(
                    self.loaded, context, str(text), self.embed(visuals), self.template, self.system
                )
            except Exception as error:
                self.failed.append(f"{type(error).__name__}: {error}")
                result = float("inf"), False
            results.append(GenerationResult(result))
        self.report(len(requests))
        return results
