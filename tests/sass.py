"""What ptxas made of a kernel: uniform registers that some path reads and never wrote.

Warpgroup products find their operands in shared memory by descriptors in uniform registers. Triton 3.6's ptxas takes a
descriptor that it computed in one loop or branch for an equal one in the next, also where the first may be skipped
(``opaque_zero`` of the Hopper kernels gets around it). The result is silently wrong, and only for lengths that skip the
first loop, so that running a kernel may not show it. Every path through its instructions does.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import triton

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
BRANCH = re.compile(r"BRA(?:\.\S+)?\s+(?:!?(?:U?P|UR)\w+,\s*)*`?\(?0x([0-9a-f]+)")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
PRODUCT = re.compile(r"HGMMA\S* R\d+, (R\d+, )?gdesc\[UR(\d+)\]")
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
    code = [(int(found[1], 16), found[2].strip()) for found in map(INSTRUCTION.search, listing.splitlines()) if found]
    place = {address: i for i, (address, _) in enumerate(code)}
    following = [_following(i, text, place, len(code)) for i, (_, text) in enumerate(code)]
    effects = [_effects(text) for _, text in code]
    before: list[frozenset | None] = [None] * len(code)

    def spread(start: int, written: frozenset) -> None:
        before[start], work = written, [start]
        while work:
            i = work.pop()
            after = before[i] | effects[i][0]
            for j in following[i]:
                met = after if before[j] is None else before[j] & after
                if met != before[j]:
                    before[j] = met
                    work.append(j)

    spread(0, frozenset())
    # a jump through a table (BRX) leads to the parts of a warp-specialised kernel, each of which starts at a place that
    # nothing else leads to
    jumps = [before[i] | effects[i][0] for i, (_, text) in enumerate(code) if "BRX" in text and before[i] is not None]
    common = frozenset.intersection(*jumps) if jumps else frozenset()
    for i, (_, text) in enumerate(code):
        if before[i] is None and text != "NOP":
            spread(i, common)
    return [
        f"{code[i][0]:x} {code[i][1]}"
        for i in range(len(code))
        if before[i] is not None and effects[i][1] - before[i] - {ZERO}
    ]


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
