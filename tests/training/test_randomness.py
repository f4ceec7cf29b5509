"""Draws depend on (seed, epoch, key, purpose, draw) alone, and follow their distributions."""

import itertools
import subprocess
import sys

import numpy as np
import scipy.stats
import torch

from training.randomness import Randomness


def test_the_same_arguments_give_the_same_numbers_in_any_process():
    code = "from training.randomness import Randomness; print(Randomness(5).normal('k', 2, 'noise', (3,), 1).tolist())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert there == f"{Randomness(5).normal('k', 2, 'noise', (3,), 1).tolist()}\n"


def test_every_argument_matters():
    draws = [
        Randomness(seed).normal(key, epoch, purpose, (), draw).item()
        for seed, key, epoch, purpose, draw in itertools.product((0, 1), ("a", "b"), (0, 1), ("noise", "sigma"), (0, 1))
    ]
    assert len(set(draws)) == 32


def test_parts_of_a_name_do_not_run_into_each_other():
    values = {Randomness(1).uniform("2/x", 1, "n").item(), Randomness(1).uniform("x", 1, "n", draw=2).item()}
    assert len(values) == 2
    assert Randomness(11).uniform("x", 1, "n") != Randomness(1).uniform("x", 11, "n")


def test_the_shape_changes_no_number():
    flat, shaped = (Randomness(0).normal("k", 0, "noise", s) for s in ((12,), (3, 4)))
    assert torch.equal(flat, shaped.flatten()) and flat.dtype == torch.float32


def test_distributions_over_keys():
    rng = Randomness(0)
    normal = np.array([rng.normal(f"k{i}", 0, "sigma").item() for i in range(4000)])
    uniform = np.array([rng.uniform(f"k{i}", 0, "dropout").item() for i in range(4000)])
    assert scipy.stats.kstest(normal, "norm").pvalue > 1e-3
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert 0 <= uniform.min() and uniform.max() < 1
    assert abs(np.corrcoef(normal, uniform)[0, 1]) < 0.06
