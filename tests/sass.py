"""What ptxas made of a kernel: descriptors of wgmma in uniform registers, which Triton 3.6's gets wrong in two ways.

wgmma finds its operands in shared memory by descriptors. ptxas reuses one from an earlier loop or branch, even one that
may be skipped (``opaque_zero`` of the Hopper kernels prevents it): ``unwritten``. The result is silently wrong, but
only for lengths that skip the first loop, so running a kernel may not show it. Short of registers it adds up one from a
register that holds something else: ``misplaced``. Following every path through the instructions shows both.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import triton

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
BRANCH = re.compile(r"BRA(?:\.\S+)?\s+(?:!?(?:U?P|UR)\w+,\s*)*`?\(?0x([0-9a-f]+)")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
PRODUCT = re.compile(r"HGMMA\S* R\d+, (R\d+, )?gdesc\[UR(\d+)\]")
SUM_OF_64 = re.compile(r"UIADD3\.64 UR(\d+), (.*)")
EXCLUSIVE_OR = re.compile(r"ULOP3\.LUT UR(\d+), UR(\d+), UR(\d+), URZ, 0x3c, !UPT")
NO_RESULT = ("UTMA", "USETMAXREG", "UBLK")  # these begin with U and write no uniform register
ZERO = 63  # URZ is printed as such, but some forms name it


def disassemble(cubin: bytes, folder: Path) -> str:
    """The listing by the disassembler of Triton's own wheel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(
        [tools / "cuobjdump", "-sass", path], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout


def unwritten(listing: str) -> list[str]:
    """Instructions that read a uniform register which is not written on every path to them."""
    code = _instructions(listing)
    effects = [_effects(text) for _, text in code]
    before = _before(code, lambda i, written: written | effects[i][0], frozenset.intersection, frozenset())
    return [
        f"{address:x} {text}"
        for i, (address, text) in enumerate(code)
        if before[i] is not None and effects[i][1] - before[i] - {ZERO}
    ]


def misplaced(listing: str) -> list[str]:
    """Products whose descriptor has an address in its upper word.

    The upper words of a descriptor hold strides and the swizzle: a constant, with carries. ``R2UR`` is believed.
    """
    code = _instructions(listing)
    effects = [_effects(text) for _, text in code]

    def after(i: int, state: frozenset) -> frozenset:
        """``state``: pairs of a register and an instruction that made an address of which it holds some part."""
        written, read = effects[i]
        if not written:
            return state
        body = PREDICATE.sub("", code[i][1])
        made: set[tuple[int, int]] = set()
        if pair := SUM_OF_64.search(body):  # word by word
            to = int(pair[1])
            for of in map(int, re.findall(r"UR(\d+)", pair[2])):
                made |= {(to + register - of, origin) for register, origin in state if register in (of, of + 1)}
        elif found := EXCLUSIVE_OR.search(body):  # three of them exchange two registers
            to, *of = map(int, found.groups())
            first, second = ({origin for register, origin in state if register == x} for x in of)
            made = {(to, origin) for origin in first ^ second}
        elif body.startswith(("ULEA", "ULDC", "S2UR", "CS2UR", "UIMAD")):
            made = {(register, i) for register in written}
        elif not body.startswith("R2UR"):
            made = {(to, origin) for to in written for register, origin in state if register in read}
        return frozenset(made | {pair for pair in state if pair[0] not in written})

    before = _before(code, after, frozenset.union, frozenset())
    found = []
    for i, (address, text) in enumerate(code):
        product = PRODUCT.search(text)
        if product and before[i] is not None:
            base = int(product[2])
            upper = {base + 3} if product[1] else {base + 1, base + 3}
            if upper & {register for register, _ in before[i]}:
                found.append(f"{address:x} {text}")
    return found


def _instructions(listing: str) -> list[tuple[int, str]]:
    """(address, text)"""
    return [(int(found[1], 16), found[2].strip()) for found in map(INSTRUCTION.search, listing.splitlines()) if found]


def _before(code: list, after: Callable, meet: Callable, start: frozenset) -> list[frozenset | None]:
    """What holds before each instruction, on all paths to it: ``after(i, before)`` holds after instruction i, and
    ``meet`` joins paths. None where no path leads."""
    place = {address: i for i, (address, _) in enumerate(code)}
    following = [_following(i, text, place, len(code)) for i, (_, text) in enumerate(code)]
    before: list[frozenset | None] = [None] * len(code)

    def spread(first: int, known: frozenset) -> None:
        before[first], work = known, [first]
        while work:
            i = work.pop()
            holds = after(i, before[i])
            for j in following[i]:
                met = holds if before[j] is None else meet(before[j], holds)
                if met != before[j]:
                    before[j] = met
                    work.append(j)

    spread(0, start)
    # a jump through a table (BRX) leads to the parts of a warp-specialised kernel, each of which starts at a place that
    # nothing else leads to
    jumps = [after(i, before[i]) for i, (_, text) in enumerate(code) if "BRX" in text and before[i] is not None]
    common = meet(*jumps) if jumps else start
    for i, (_, text) in enumerate(code):
        if before[i] is None and text != "NOP":
            spread(i, common)
    return before


def _following(i: int, text: str, place: dict[int, int], n: int) -> list[int]:
    body = PREDICATE.sub("", text)
    falls_through = [i + 1] if i + 1 < n else []
    if found := BRANCH.search(body):
        target = place.get(int(found[1], 16))
        conditional = body != text or re.search(r"BRA\S*\s+!?(U?P\d|UR)", body)
        return ([] if target is None else [target]) + (falls_through if conditional else [])
    if body.startswith(("EXIT", "RET", "BRX", "BRA")):
        return falls_through if body != text else []
    return falls_through


def _effects(text: str) -> tuple[frozenset[int], frozenset[int]]:
    """Uniform registers that an instruction writes and reads. A predicated write counts as one."""
    body = PREDICATE.sub("", text)
    name, _, operands = body.partition(" ")
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", operands)]
    written: set[int] = set()
    if name.startswith(("U", "R2UR", "S2UR", "CS2UR", "VOTEU", "REDUX")) and not name.startswith(NO_RESULT):
        first = next((k for k, part in enumerate(parts) if not re.fullmatch(r"U?P[T\d]+", part)), None)
        if first is not None and (found := re.fullmatch(r"UR(\d+)", parts[first])):
            written.add(int(found[1]))
            if re.search(r"\.64|WIDE|\.128", name):
                written.add(int(found[1]) + 1)
            parts[first] = ""
    read: set[int] = set()
    rest = ",".join(parts)
    if found := PRODUCT.search(body):  # four registers: the descriptors of A and of B; A may be in registers
        base = int(found[2])
        read |= {base + 2, base + 3} if found[1] else {base, base + 1, base + 2, base + 3}
        rest = re.sub(r"gdesc\[UR\d+\]", "", rest)
    for found in re.finditer(r"\bUR(\d+)\b(\.64)?", rest):
        read.add(int(found[1]))
        if found[2] or re.search(r"^U\S*\.64|UTMA", name):
            read.add(int(found[1]) + 1)
    return frozenset(written), frozenset(read)
