"""Prints how far two trained checkpoints are apart: the largest, over all parameters, of the distance between both,
relative to how far the second moved from the start.

Run with a host's own Python: ``python compare.py START OURS EAGER``, folders with safetensors.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def parameters(folder: str) -> dict:
    files = sorted(Path(folder).rglob("*.safetensors"))
    if not files:
        raise SystemExit(f"no weights in {folder}")
    return {name: x.double() for file in files for name, x in load_file(file).items()}


start, ours, eager = map(parameters, sys.argv[1:4])
if not ours.keys() == eager.keys() == start.keys():
    raise SystemExit(f"other parameters: {sorted(ours.keys() ^ eager.keys() | eager.keys() ^ start.keys())}")
moved = {name: (eager[name] - x).norm().item() for name, x in start.items()}
still = [name for name, distance in moved.items() if distance == 0]
if still:
    raise SystemExit(f"eager left these where they were: {still}")
apart = {name: (ours[name] - x).norm().item() / moved[name] for name, x in eager.items()}
print(torch.tensor([*apart.values()]).max().item())  # NaN if one is
