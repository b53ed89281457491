"""Vectors by adapter name, of one adapter and of many."""

import pytest
import torch

from dvora.tuner.layers.vectors import VectorDict, vectors_in, vectors_of_many
from tests.cases import randn


def test_vectors_of_many_adapters_are_those_of_each() -> None:
    magnitudes, lambdas_b, lambdas_d = dicts = VectorDict(), VectorDict(), VectorDict()
    for number, name in enumerate(("whole", "magnitude", "other")):
        magnitudes.put(name, randn(5, seed=number))
        if name != "magnitude":
            lambdas_b.put(name, randn(5, seed=number + 3))
            lambdas_d.put(name, randn(2, seed=number + 6))
    names = ["other", "magnitude", "whole"]
    for name, found in zip(names, vectors_of_many(dicts, names), strict=True):
        for own, expected in zip(found, vectors_in(dicts, name), strict=True):
            assert torch.equal(own, expected)
            assert name == "magnitude" or own is expected


def test_a_rounded_magnitude_is_warned_of_also_among_many() -> None:
    magnitudes, lambdas_b, lambdas_d = dicts = VectorDict(), VectorDict(), VectorDict()
    magnitudes.put("rounded", randn(5, seed=0).half())
    lambdas_b.put("rounded", randn(5, seed=1))
    lambdas_d.put("rounded", randn(2, seed=2))
    with pytest.warns(UserWarning, match="rounds it by up to 0.4 %"):
        vectors_of_many(dicts, ["rounded"])
