"""Import this before a network runs: it makes the first results of a process on an Intel CPU those of all later ones.

MKL looks up the kernel of each of its vector functions when that is called first. If two of torch's threads are the
first callers, one of them may compute its part of that one tensor with a kernel of about four digits (pytorch/pytorch
issue 188792; torch 2.13's MKL 2024.2 has it, 2025 has not). In one of six cold processes the angles of the rotary
embedding were hit. One call of each on one element, by one thread, avoids it.
"""

import torch

for dtype in (torch.float32, torch.float64):
    one = torch.full((1,), 0.5, dtype=dtype)
    for name in "acos asin atan cos erf erfc erfinv exp log log10 log1p log2 sin sqrt tan tanh".split():
        getattr(one, name)()
