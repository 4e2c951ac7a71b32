"""Names that the decoder (Python) and the interpreter (C++) share: opcodes, types, modes. `header()` writes enums."""

from __future__ import annotations


def words(text: str) -> list[str]:
    return text.split()


OPS = words("""nop mov movpack movunpack add sub mul_lo mul_hi mul_wide mad_lo mad_hi mad_wide fma div rem neg abs min
max and or xor not cnot shl shr bfe bfi prmt clz popc brev setp selp set cvt cvt2 ld st atom bra bar warpsync shfl vote
match_any match_all redux activemask ret sqrt rcp rsqrt ex2 lg2 sin cos tanh cpasync lop3 shf copysign trap dp4a""")
BITS = {
    "pred": 1,
    **dict.fromkeys(("b8", "u8", "s8"), 8),
    **dict.fromkeys(("b16", "u16", "s16"), 16),
    **dict.fromkeys(("b32", "u32", "s32"), 32),
    **dict.fromkeys(("b64", "u64", "s64"), 64),
    **dict.fromkeys(("f16", "bf16"), 16),
    **dict.fromkeys(("f16x2", "bf16x2", "f32"), 32),
    "f64": 64,
    "b128": 128,
}
TYPES = list(BITS)
FLOATING = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")
COMPARISONS = words("eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan")
SPACES = words("global shared param local const generic")
ATOMS = words("add min max and or xor exch cas inc dec")
ROUNDINGS = words("none rn rz rm rp rni rzi rmi rpi")
SHUFFLES = words("up down bfly idx")
VOTES = words("ballot all any uni")
JOINS = words("none and or xor")


def header() -> str:
    """The enums of machine/launch.h."""
    enums = {"OP": OPS, "T": TYPES, "C": COMPARISONS, "S": SPACES, "A": ATOMS}
    enums |= {"R": ROUNDINGS, "H": SHUFFLES, "V": VOTES, "B": JOINS}
    lines = [f"enum {{ {', '.join(f'{prefix}_{name}' for name in names)} }};" for prefix, names in enums.items()]
    lines.append(f"inline constexpr int kBits[] = {{{', '.join(map(str, BITS.values()))}}};")
    return "\n".join(["#pragma once", "namespace ptx {", *lines, "}", ""])
