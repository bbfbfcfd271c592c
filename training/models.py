"""
How the model of each phase is made, before the phase trains it.

The field `make` of a phase is one of the functions new_* and from_phase_before: make(settings,
dataset, parents) -> model. parents: {phase: checkpoint}.
"""

import checkpoint
import vision
from config import UserError
from dino import DINO
from model import GPT, BabyLLaVA, GPTConfig, make_projector
from training import lora

# Options of train.py that are sizes of a model.GPTConfig under the same name
GPT_SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_hidden", "block_size")


def new_dino(settings, dataset, parents):
    tower_class, size = vision.TOWERS[settings.vision_tower](), dataset.image_format.size
    student, teacher = (tower_class.from_options(settings, size) for _ in range(2))
    if settings.student_mask and settings.vision_tower != "vit":
        raise UserError(f"student_mask: a {settings.vision_tower} has no patches to leave out")
    return DINO(
        student,
        teacher,
        settings.prototypes,
        settings.local_views,
        settings.teacher_temperature,
        settings.momentum,
        settings.head_hidden,
        settings.head_bottleneck,
        settings.student_mask,
    )


def new_language_model(settings, dataset, parents):
    sizes = GPTConfig(
        vocab_size=dataset.tokenizer.vocab_size,
        **{name: getattr(settings, name) for name in GPT_SIZES},
        dropout=settings.dropout,
        attention=settings.attention,
        norm=settings.norm,
    )
    if sizes.fault():
        raise UserError(sizes.fault())
    return BabyLLaVA(GPT(sizes), image_token=dataset.tokenizer.image)


def refuse_tiles(image_attention, dataset):
    """Raise UserError for tiles with image_attention "full"."""
    if image_attention == "full" and dataset.image_format.canvases:
        raise UserError(
            f"image_attention=full: {dataset.directory} has pictures in tiles, whose numbers "
            "differ; use causal"
        )


def new_projector(settings, dataset, parents):
    """The tower and the GPT of earlier phases, with a new projector between them."""
    refuse_tiles(settings.image_attention, dataset)
    size = dataset.image_format.size
    backends = {"attention": settings.attention, "norm": settings.norm}
    parent = with_gpt(parents["language"], block_size=settings.block_size)
    gpt = checkpoint.build(parent, **backends).model.gpt
    tower = checkpoint.build(parents["vision"]).model.tower
    if settings.extra_stage:
        tower = with_extra_stage(tower, settings.extra_stage)
    if tower.fault(size, settings.select_layer):
        raise UserError(tower.fault(size, settings.select_layer))
    try:
        projector = make_projector(settings.projector, tower.width, gpt.config.n_embd)
    except ValueError as error:
        raise UserError(f"--projector: {error}") from None
    model = BabyLLaVA(
        gpt,
        projector,
        tower,
        dataset.tokenizer.image,
        settings.select_layer,
        settings.keep_cls,
        settings.image_attention,
        tiled=bool(dataset.image_format.canvases),
        image_pool=settings.image_pool,
    )
    check_grid(model, size)
    return model


def check_grid(model, size):
    """Raise UserError if the image tokens of an image of this size are not a grid that can be
    pooled or joined to tiles as the options ask."""
    if not model.projector.keeps_grid and (model.tiled or model.image_pool > 1):
        raise UserError("--projector: with this one there are no tiles and no --image_pool")
    if model.tiled and model.keep_cls:
        raise UserError("--keep_cls: a map of tiles has no position for CLS tokens")
    side = int(model.tower.num_patches(size) ** 0.5)
    if side % model.image_pool:
        raise UserError(
            f"image_pool {model.image_pool}: {side} x {side} patches do not divide into that"
        )


def with_extra_stage(tower, depth):
    """A ConvNeXt with one more, random stage of `depth` blocks: ConvLLaVA's fifth."""
    if vision.describe_tower(tower)["kind"] != "convnext":
        raise UserError("extra_stage: only a ConvNeXt has stages")
    arguments = tower.arguments | {"depths": [*tower.arguments["depths"], depth]}
    larger = type(tower)(**arguments)
    larger.load_state_dict(larger.state_dict() | tower.state_dict())
    return larger


def with_gpt(parent, **sizes):
    """A checkpoint with some sizes of its GPT replaced. A size of None is not replaced: the GPT
    came from elsewhere, not from these options."""
    gpt = parent["parts"]["gpt"] | {k: v for k, v in sizes.items() if v is not None}
    return parent | {"parts": parent["parts"] | {"gpt": gpt}}


def from_phase_before(settings, dataset, parents):
    """The model of the phase before, with the dropout of this phase."""
    (parent,) = parents.values()
    sizes = {"dropout": settings.dropout}
    if "block_size" in parent["inherited"]:  # else it came from elsewhere and keeps its own
        sizes["block_size"] = settings.block_size
    parent = with_gpt(parent, **sizes)
    model = checkpoint.build(parent, attention=settings.attention, norm=settings.norm).model
    if dataset.image_format.canvases:
        refuse_tiles(model.image_attention, dataset)
        model.use_tiles()
    check_grid(model, dataset.image_format.size)
    return model


def make_model(settings, phase, dataset, parents):
    """The model of a phase, untrained by this phase."""
    # a model that --init names replaces all earlier phases, whatever this phase would start from
    make = from_phase_before if list(parents) == ["init"] else phase.make
    model = make(settings, dataset, parents)
    if "lora_rank" in phase.options and settings.lora_rank:
        lora.add_lora(model.gpt, settings.lora_rank, settings.lora_alpha)
    if isinstance(model, BabyLLaVA):
        model.gpt.recompute = settings.recompute
    return model


def restore(model, saved):
    """Load into a model what an interrupted run of its phase has trained. saved: its checkpoint."""
    if lora.has_lora(model):  # saved weights have the factors merged in: keep the ones from before
        merged = lora.merged_names(model)
        state = {n: w for n, w in saved["weights"].items() if n not in merged} | saved["lora"]
        model.load_state_dict(model.state_dict() | state)
    else:
        model.load_state_dict(saved.get("dino") or saved["weights"])
