"""
Checks before the first step. Every phase that a run will train is set up without weights, on the
meta device, where tensors have shapes and no numbers: a wrong option of phase 2 is reported in
seconds, and not after phase 1 has been trained.

training/planning.py computes with the same models what a run will take.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn

import checkpoint
from common.devices import Unfilled
from dino import DINO
from training import lora, models, phases, resume
from training.optimizer import set_trainable


@dataclass
class Rehearsal:
    """A phase that is set up without weights."""

    name: str
    phase: phases.Phase
    settings: object  # a copy of train.Config, with what the phase inherits and its steps
    model: nn.Module  # on the meta device
    groups: list  # [({name: parameter}, rate)] of what is trained
    batches: list  # of its splits
    start: int  # steps that an interrupted run has taken
    dataset: object  # data.Data
    device: torch.device
    world: int
    pays_features: bool = False  # whether it computes features that are stored

    @property
    def steps(self):
        return getattr(self.settings, f"{self.name}_steps")

    @property
    def batch(self):
        return getattr(self.settings, f"{self.name}_batch")

    @property
    def work(self):
        """About how many FLOP the phase takes: 2 for each parameter and position forward, twice
        that backward, with attention and the head left out."""
        size, batch = self.dataset.image_format.size, self.batch
        count = lambda module: sum(p.numel() for p in module.parameters())
        if isinstance(self.model, DINO):  # two crops of 3/4 of the side; the teacher only forward
            tower = self.model.student["backbone"]
            patches = tower.num_patches(size) * 0.75**2
            local = self.settings.local_views * tower.num_patches(size) / 4
            seen = 2 * patches * (1 - self.settings.student_mask)
            flop = (6 * (seen + local) + 2 * 2 * patches) * count(tower) * batch
        else:
            trained = any(p.requires_grad for p in self.model.gpt.parameters())
            length = self.batches[0].plan(0).length
            flop = (6 if trained else 4) * batch * length * count(self.model.gpt)
        return flop * (self.steps - self.start)

    @property
    def stores_features(self):
        return phases.stores_features(self.settings, self.model)

    @property
    def reads_frames(self):
        """Whether the tower runs in every step."""
        has_frames = self.dataset.count(self.phase.splits[0], "frames") > 0
        has_tower = getattr(self.model, "gpt", None) is None or self.model.tower is not None
        return has_frames and has_tower and not self.stores_features

    @property
    def features_are_there(self):
        """Whether features of this shape lie in the data folder: of this tower, most likely."""
        for split in self.phase.splits:
            frames = self.dataset.count(split, "frames")
            digest = self.dataset.meta["splits"].get(split, {}).get("frames_digest", "")[:16]
            found = (self.dataset.directory / "features").glob(f"{digest}_*.bin")
            size = frames * self.features_an_image * 2
            if frames and not any(path.stat().st_size == size for path in found):
                return False
        return True

    @property
    def features_an_image(self):
        """Numbers that the features of a frame are."""
        return self.model.num_features(self.dataset.image_format.size) * self.model.tower.width


def rehearse(settings, names, table, dataset, processes, planned=None, load_weights=None):
    """The Rehearsals of the phases `names`, but of those that are done or come from elsewhere. The
    options NAME_steps of `settings` are set for phases that have NAME_epochs. table: train.py's
    PHASES. Raises UserError for whatever the run would stop at.

    planned: {phase: checkpoint on the meta device}, to which those of `names` are added.
    load_weights(phase, source): weights from elsewhere; None: from their files."""
    planned, found = {} if planned is None else planned, []
    for name in names:
        phase, own = table[name], copy.copy(settings)
        if phase.weights_option and getattr(own, phase.weights_option):
            planned[name] = rehearse_import(own, name, phase, dataset, load_weights)
            continue
        parents = resume.find_parents(own, name, table, dataset, ignore, planned)
        parents = {parent: resume.on_meta(one) for parent, one in parents.items()}
        inherited = resume.inherit(own, parents)
        inherited |= {option: getattr(own, option) for option in phase.inherited}
        phases.check_batch(own, name, processes)
        with torch.device("meta"), Unfilled():
            model = models.make_model(own, phase, dataset, parents)
        phases.check_backends(own, model, processes.device)
        groups = set_trainable(model, *phases.what_is_trained(own, name, phase))
        batches = phases.open_batches(own, name, phase, dataset, model)
        phases.set_steps(own, name, batches[0])
        setattr(settings, f"{name}_steps", getattr(own, f"{name}_steps"))
        saved = resume.find_saved(own, name, phase, dataset, parents, ignore)
        if saved and saved["done"]:
            planned[name] = saved
            continue
        planned[name] = describe(own, name, phase, dataset, model, inherited)
        start = saved["step"] if saved else 0
        device, world = processes.device, processes.world
        one = Rehearsal(name, phase, own, model, groups, batches, start, dataset, device, world)
        first = not any(other.pays_features for other in found)
        one.pays_features = one.stores_features and first and not one.features_are_there
        found.append(one)
    return found


def ignore(line):
    """The report of what the run itself will print."""


def rehearse_import(settings, name, phase, dataset, load_weights):
    """The checkpoint on the meta device that weights from elsewhere will become."""
    source = getattr(settings, phase.weights_option)
    resume.find_imported(settings, name, phase, source)
    model = load_weights(phase, source) if load_weights else phase.load_weights(source, dataset)
    model.to("meta")
    inherited = dict.fromkeys(phase.inherited) | {phase.weights_option: str(source)}
    return describe(settings, name, phase, dataset, model, inherited)


def describe(settings, name, phase, dataset, model, inherited):
    """The checkpoint of a phase as it will be at its end, with a model on the meta device."""
    whole = model.result()
    state = {n: w for n, w in whole.state_dict().items() if not lora.is_factor(n)}
    contents = checkpoint.describe(
        settings,
        name,
        dataset,
        whole,
        step=0,
        done=False,  # no digest: there are no weights
        parents={},
        inherited=inherited,
        validates_on=phase.validates_on,
        state=state,
    )
    return contents | {"done": True}
