"""Rules of the surgery histories: models are saved, loaded, copied, pickled and unloaded."""

import copy

import torch
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn

from dvora import DVoRAConfig
from tests.cases import COPIES
from tests.tuner.surgery.surgery_base import (
    Saved,
    SurgeryBase,
    has_adapters,
    has_room,
    has_saved,
    present,
    some_saved,
    step,
    wrapper_is_usable,
)
from tests.tuner.surgery.surgery_checks import check_close, take_over_merged
from tests.tuner.surgery.surgery_model import TOKENS, Mixed, mixed
from tests.tuner.tiny import same_bits


class CopyRules(SurgeryBase):
    """What leaves a model and comes back."""

    @wrapper_is_usable
    @has_adapters
    @step(name=present)
    def save(self, name: str) -> None:
        self.count("save")
        self.save_one(name)

    @wrapper_is_usable
    @has_saved
    @has_room
    @step(saved=some_saved, trainable=st.booleans(), meta_first=st.booleans())
    def load(self, saved: Saved, trainable: bool, meta_first: bool) -> None:
        self.count("load")
        name = self.free_name()
        with self.unmerges():
            self.model.load_adapter(saved.folder, name, is_trainable=trainable, low_cpu_mem_usage=meta_first)
        self.reference.add(name, saved.adapter.settings)
        self.enter_loaded(name, saved)
        self.reference.adapters[name].strength = dict(saved.adapter.strength)
        self.reference.adapters[name].trained = trainable
        self.reference.training &= trainable

    @has_saved
    @has_adapters
    @step(saved=some_saved, name=present, trainable=st.booleans())
    def load_over(self, saved: Saved, name: str, trainable: bool) -> None:
        if any(name in merged for merged in self.reference.merged.values()):
            with self.refused("load over a merged adapter", "is merged into"):
                self.model.load_adapter(saved.folder, name, is_trainable=trainable)
            return
        if self.reference.adapters[name].shapes() != saved.adapter.shapes():
            with self.refused("load over another shape", "not adapted here|lacks vectors|has shape"):
                self.model.load_adapter(saved.folder, name, is_trainable=trainable)
            return
        self.count("load over")
        self.model.load_adapter(saved.folder, name, is_trainable=trainable)
        self.enter_loaded(name, saved)
        self.reference.training &= trainable

    @has_saved
    @step(saved=some_saved, trainable=st.booleans(), meta_first=st.booleans())
    def load_into_a_fresh_model(self, saved: Saved, trainable: bool, meta_first: bool) -> None:
        self.count("load into a fresh model")
        self.reference.unmerge()
        base = mixed(self.reference.dtype, self.reference.tied)
        base.load_state_dict(self.reference.stored)
        options = {"adapter_name": saved.folder.name, "is_trainable": trainable, "low_cpu_mem_usage": meta_first}
        self.adopt(PeftModel.from_pretrained(base, saved.folder, **options))
        self.reference = self.reference.of_its_base(trainable)
        self.reference.add(saved.folder.name, saved.adapter.settings)
        self.reference.activate([saved.folder.name], trainable)
        self.enter_loaded(saved.folder.name, saved)
        self.reference.adapters[saved.folder.name].strength = dict(saved.adapter.strength)

    @has_room
    @step(meta_first=st.booleans())
    def load_what_was_made_for_another_base(self, meta_first: bool) -> None:
        other = mixed(self.reference.dtype)
        with torch.no_grad():
            other.get_parameter("blocks.plain.up.weight").copy_(torch.eye(8, 6))
        folder = f"{self.folder.name}/other"
        get_peft_model(other, DVoRAConfig(r=2, target_modules=["plain.up"])).save_pretrained(folder)
        with self.refused("load what was made for another base", "another base model"):
            self.model.load_adapter(folder, self.free_name(), low_cpu_mem_usage=meta_first)

    @step(way=st.sampled_from(sorted(COPIES)), go_on_with_copy=st.booleans())
    def copy(self, way: str, go_on_with_copy: bool) -> None:
        self.count(way)
        original, copied = self.model, COPIES[way](self.model)
        self.adopt(copied if go_on_with_copy else original)
        spoil(original if go_on_with_copy else copied)

    @step(merge=st.booleans())
    def unload_a_copy(self, merge: bool) -> None:
        merge = merge and not self.reference.adapts_tied(None)
        self.count("merge and unload a copy" if merge else "unload a copy")
        reference, copied = copy.deepcopy(self.reference), copy.deepcopy(self.model)
        with self.merging():
            plain = copied.merge_and_unload() if merge else copied.unload()
        if merge:
            take_over_merged(dict(plain.named_parameters()), reference.merge(None), reference)
        assert type(plain) is Mixed
        assert plain.state_dict().keys() == reference.stored.keys()
        assert all(same_bits(value, reference.stored[name]) for name, value in plain.state_dict().items())
        with torch.no_grad():
            check_close(plain(TOKENS), reference.of_its_base().outputs(), reference)
        spoil(plain)

    @step(assign=st.booleans())
    def load_own_state_dict(self, assign: bool) -> None:
        assign = assign and not self.reference.tied  # assigning, torch unties
        if self.reference.merged:
            with self.refused("load own state dict while merged", "call unmerge_adapter first"):
                self.model.load_state_dict(self.model.state_dict(), assign=assign)
            return
        self.count("load own state dict")
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1)
        self.model.load_state_dict(state, assign=assign)
        self.known.clear()


@torch.no_grad()
def spoil(model: nn.Module) -> None:
    """Overwrite every tensor of a model that is not needed any more: nothing else may depend on it."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(float("nan"))
