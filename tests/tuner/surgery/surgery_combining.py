"""Rules of the surgery histories: adapters are scaled, interpolated, added up, and swapped for saved ones."""

import warnings
from dataclasses import replace

from hypothesis import strategies as st

from dvora.tuner.state.hotswap import hotswap_adapter
from tests.tuner.models_compared import assert_unchanged, snapshot
from tests.tuner.surgery.surgery_base import (
    Saved,
    SurgeryBase,
    has_adapters,
    has_room,
    has_saved,
    present,
    several,
    some_saved,
    step,
)
from tests.tuner.surgery.surgery_checks import check_delta, vectors_of
from tests.tuner.surgery.surgery_settings import Adapter

SHARES = [1.0, 0.5, -2.0, 0.0]


class CombiningRules(SurgeryBase):
    """What is made of the vectors of adapters."""

    @has_adapters
    @step(name=present, strength=st.sampled_from([0.0, 0.5, 1.0, 1.5]), data=st.data())
    def set_strength(self, name: str, strength: float, data: st.DataObject) -> None:
        adapter = self.reference.adapters[name]
        weight = data.draw(st.none() | st.sampled_from(sorted(adapter.vectors)), label="weight")
        asked = strength if weight is None else {weight.removesuffix(".weight"): strength}
        if any(name in merged for merged in self.reference.merged.values()):
            with self.refused("scale a merged adapter", "is merged"):
                self.model.base_model.set_strength(asked, name)
            return
        self.count("set strength" if weight is None else "set strength of a layer")
        self.model.base_model.set_strength(asked, name)
        adapter.strength |= dict.fromkeys(adapter.vectors if weight is None else [weight], strength)

    @has_room
    @has_adapters
    @step(first=present, second=present, t=st.sampled_from([0.0, 0.25, 1.0]))
    def interpolate(self, first: str, second: str, t: float) -> None:
        a, b, name = self.reference.adapters[first], self.reference.adapters[second], self.free_name()
        must = alike(a, b) and {*a.strength.values(), *b.strength.values()} == {1.0}
        if self.done_or_refused("interpolate", must, first, second, t, name):
            self.enter_combined(name, first)
            for place, vector in vectors_of(self.model).items():
                if place.adapter == name:
                    x, y = (each.vectors[place.weight][place.vector].double() for each in (a, b))
                    assert (vector.double() - (x + t * (y - x))).abs().max() <= 1e-6 * max(x.abs().max(), y.abs().max())

    @has_room
    @has_adapters
    @step(names=several, data=st.data())
    def add_up(self, names: list[str], data: st.DataObject) -> None:
        """A sum is what it says or it is refused; a copy of one adapter is possible where its rows have a gain."""
        shares = data.draw(st.lists(st.sampled_from(SHARES), min_size=len(names), max_size=len(names)), label="shares")
        name = self.free_name()
        whole = shares == [1.0] and {*self.reference.adapters[names[0]].strength.values()} == {1.0}
        must = whole and self.reference.smallest_gain(names[0]) > 0.02
        if self.done_or_refused("weighted sum", must, names, shares, name):
            self.enter_combined(name, names[0])
            for weight in self.reference.adapters[name].vectors:
                pairs = zip(shares, names, strict=True)
                expected = sum(share * self.reference.delta(weight, each) for share, each in pairs)
                check_delta(self.reference.delta(weight, name), expected, weight, self.reference, slack=10)

    @has_saved
    @has_adapters
    @step(saved=some_saved, name=present)
    def hot_swap(self, saved: Saved, name: str) -> None:
        adapter, reference = self.reference.adapters[name], self.reference
        merged = any(name in each for each in reference.merged.values())
        if merged or not alike(adapter, saved.adapter):
            with self.refused("hot swap", "merged|own instead|shape|not adapted here|lacks vectors"):
                hotswap_adapter(self.model, saved.folder, name)
            return
        self.count("hot swap")
        hotswap_adapter(self.model, saved.folder, name)
        self.enter_loaded(name, saved)
        adapter.strength = dict(saved.adapter.strength)

    def done_or_refused(self, operation: str, must: bool, *arguments: object) -> bool:
        """Ask for a combination, which may be refused unless it `must` not be."""
        ask = self.model.base_model.interpolate_adapters
        if operation == "weighted sum":
            ask = self.model.base_model.add_weighted_adapter
        before = snapshot(self.model)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*Unmerging the model first")
                ask(*arguments)
        except ValueError:
            assert not must
            self.count(f"refused: {operation}")
            assert_unchanged(self.model, before)
            return False
        self.count(operation)
        return True

    def enter_combined(self, name: str, like: str) -> None:
        """Enter the new adapter, with the vectors that it has, in the reference."""
        settings = replace(self.reference.adapters[like].settings, strength=1.0)
        self.reference.add(name, settings)
        for place, vector in vectors_of(self.model).items():
            if place.adapter == name:
                self.reference.adapters[name].vectors[place.weight][place.vector] = vector.detach().clone()


def alike(a: Adapter, b: Adapter) -> bool:
    """Whether two adapters differ in nothing that decides what their vectors mean."""
    one, other = a.settings, b.settings
    of_one, of_other = ((s.seed, s.projections, s.r, s.alpha, s.direction) for s in (one, other))
    return of_one == of_other and a.shapes() == b.shapes()
