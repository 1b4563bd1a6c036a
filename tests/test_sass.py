"""``sass.py`` finds a uniform register that some path reads before it is written, a descriptor that is an address where
it should be a constant, and nothing else."""

import pytest
from sass import misplaced, unwritten

# UR4 and UR5 are written at 30, which a branch may skip; read at 40 they must have been
LISTING = """
/*0000*/ UMOV UR8, 0x400 ;
/*0010*/ UMOV UR9, 0x40000040 ;
/*0020*/ {branch} ;
/*0030*/ UIADD3.64 UR4, UR8, 0x2, URZ ;
/*0040*/ {reader} ;
/*0050*/ EXIT ;
"""
READERS = {
    "an address": "UIADD3 UR7, UP0, UR4, 0x2, URZ",
    "the upper half of a pair": "UIADD3.X UR7, UR5, URZ, URZ, UP0, !UPT",
    "the second descriptor of a product": "HGMMA.64x64x16.F32.BF16 R24, R152, gdesc[UR2], R24",
    "a memory operand": "LDS R2, [R3+UR4]",
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_register_that_one_path_reads_unwritten(reader):
    assert unwritten(LISTING.format(branch="@!P0 BRA 0x40", reader=reader)) == [f"40 {reader}"]
    assert unwritten(LISTING.format(branch="NOP", reader=reader)) == []


def test_a_product_of_two_operands_in_shared_memory_reads_two_descriptors():
    reader = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24"
    assert unwritten(LISTING.format(branch="NOP", reader=reader)) == [f"40 {reader}"]  # UR6 and UR7


def test_a_loop_keeps_what_it_wrote_before():
    listing = """
    /*0000*/ UMOV UR4, 0x1 ;
    /*0010*/ UIADD3 UR4, UR4, 0x1, URZ ;
    /*0020*/ @P0 BRA 0x10 ;
    /*0030*/ STS [UR4], R2 ;
    /*0040*/ EXIT ;
    """
    assert unwritten(listing) == []


def test_parts_reached_through_a_table_begin_with_what_the_jump_had():
    listing = """
    /*0000*/ R2UR UR4, R2 ;
    /*0010*/ BRX R4 -0x10 ;
    /*0020*/ UMOV UR5, UR4 ;
    /*0030*/ EXIT ;
    /*0040*/ UMOV UR6, UR5 ;
    /*0050*/ EXIT ;
    """
    assert unwritten(listing) == ["40 UMOV UR6, UR5"]


# UR4 is the address of shared memory, UR7 the lower word of a descriptor, 0x80000020 its upper word
DESCRIPTOR = """
/*0000*/ ULEA UR4, UR11, UR4, 0x18 ;
/*0010*/ USHF.R.U32.HI UR7, URZ, 0x4, UR4 ;
/*0020*/ UMOV UR10, URZ ;
/*0030*/ UIADD3 UR14, UP1, UR7, 0x40, URZ ;
/*0040*/ {upper} ;
/*0050*/ {after} ;
/*0060*/ HGMMA.64x32x16.F32.BF16 R104, R28, gdesc[UR12].tnspB, R104 ;
/*0070*/ EXIT ;
"""
CARRY = "UIADD3.X UR15, {}, -0x7fffffe0, URZ, UP1, !UPT"
SWAP = " ;\n/*0051*/ ".join(f"ULOP3.LUT UR{a}, UR14, UR15, URZ, 0x3c, !UPT" for a in (14, 15, 14))


@pytest.mark.parametrize("name", ["UR4", "UR7"])
def test_a_descriptor_with_an_address_in_its_upper_word(name):
    listing = DESCRIPTOR.format(upper=CARRY.format(name), after="NOP")
    assert misplaced(listing) == ["60 HGMMA.64x32x16.F32.BF16 R104, R28, gdesc[UR12].tnspB, R104"]


@pytest.mark.parametrize(
    "after", ["NOP", "UIADD3.64 UR14, UR14, 0x80, URZ", "UIADD3.64 UR14, UR14, UR14, URZ", f"{SWAP} ;\n/*0058*/ {SWAP}"]
)
def test_a_right_descriptor(after):
    assert misplaced(DESCRIPTOR.format(upper=CARRY.format("UR10"), after=after)) == []


def test_exchanged_words_are_misplaced():
    assert misplaced(DESCRIPTOR.format(upper=CARRY.format("UR10"), after=SWAP))


def test_two_operands_in_shared_memory_have_two_upper_words():
    listing = DESCRIPTOR.format(upper=CARRY.format("UR10"), after="UMOV UR13, UR7").replace("R28, ", "")
    assert misplaced(listing) == ["60 HGMMA.64x32x16.F32.BF16 R104, gdesc[UR12].tnspB, R104"]
