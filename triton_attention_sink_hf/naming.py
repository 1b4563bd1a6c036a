"""What a string in ``attn_implementation`` does, and why: transformers' errors name neither the mistake nor the fix."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass

from .registration import FOLDER, NAME, path_problem, register, registered_names

DISTRIBUTION, PACKAGE = "triton-attention-sink", "triton_attention_sink_hf"
AUTOLOAD, TORCH_AUTOLOAD = "TRITON_ATTENTION_SINK_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"
_HUB = re.compile(r"[^/:]+/[^/:]+(?:@[^/:]+)?(?::[^/:]+)?")  # what transformers takes for a kernel on the Hub
_USES = {
    DISTRIBUTION: "pip's name, for pip install",
    PACKAGE: "the name of the Python package, for import and verl's external_lib",
}


@dataclass(frozen=True)
class Verdict:
    """Whether transformers takes a string, whether it then gets this package's attention, and why."""

    works: bool
    ours: bool
    reason: str


def judge(string: str) -> Verdict:
    """What ``attn_implementation=string`` would do in a process that has imported this package. Loads no kernel."""
    try:
        register()
        from transformers import AttentionInterface
    except ImportError as error:
        return Verdict(False, False, f"{error}")
    if string in registered_names():
        return Verdict(True, True, "this package's attention")
    if "|" in string:
        return Verdict(False, False, "transformers splits it at '|'")
    known = {"eager", *AttentionInterface().valid_keys()}
    if string in known:
        return Verdict(
            True, False, "transformers' own attention, not this package's; a model or a missing package may refuse it"
        )
    for name, use in _USES.items():
        if string == name:
            return Verdict(False, False, f"{name!r} is {use}; the attention is called {NAME!r}")
    plain = re.sub(r"[\s-]+", "_", string.strip().strip("'\"").strip()).lower()
    if "/" not in string and difflib.get_close_matches(plain, [NAME, PACKAGE], cutoff=0.75):
        return Verdict(False, False, f"the attention is called {NAME!r}: is this one mistyped?")
    is_path = string.startswith((".", "~", "/")) or os.path.exists(string)
    if is_path:
        return Verdict(False, False, path_problem(string) or _other_folder(string))
    if _HUB.fullmatch(string):
        return _hub_kernel()
    near = difflib.get_close_matches(string, known, n=1)
    return Verdict(False, False, f"no such name is registered{f'; is it {near[0]!r}?' if near else ''}")


def _other_folder(path: str) -> str:
    advice = f"write {NAME!r}, or the folder that the package was imported from, {FOLDER!r}"
    if os.path.realpath(path) == os.path.realpath(FOLDER):
        return f"it leads to this package by another path: {advice}"
    return f"it is {'not' if os.path.exists(path) else 'no folder, and not'} the folder of this package: {advice}"


def _hub_kernel() -> Verdict:
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("kernels")
    except PackageNotFoundError:
        return Verdict(False, False, "a kernel on the Hub, which cannot be loaded: the package kernels is missing")
    return Verdict(True, False, f"a kernel on the Hub (kernels {installed}), not this installation; not tried")


def automatic_registration() -> str | None:
    """Why ``import torch`` does not make the name known in new processes; None if it does."""
    from importlib.metadata import entry_points

    if not any(entry.name == NAME for entry in entry_points(group="torch.backends")):
        return "the package is not installed with pip, or by an older release"
    if os.environ.get(AUTOLOAD) == "0":
        return f"{AUTOLOAD}=0"
    if os.environ.get(TORCH_AUTOLOAD, "1") != "1":
        return f"{TORCH_AUTOLOAD}={os.environ[TORCH_AUTOLOAD]}"
    return None
