"""Writes hash_vectors.json beside it: slots and signs of virtual elements, for every family of hashes.

    python3 tests/golden/hash_vectors.py     # needs nothing but Python; the tests only read the file

Each vector is a hash, described as in a checkpoint, the length of `hashed_weight`, and elements `[row, column, slot, sign]`; for
hashes of signatures, the signature stands in the place of the row. The
numbers come from the formulas in docs/format.md in Python's unbounded integers, so they share no code and no arithmetic with the
crate.
"""

import json
import math
import pathlib

WORD = 2**64 - 1
HALF = 2**32 - 1
GOLDEN = 0x9E3779B97F4A7C15


def finalise(h):
    h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & WORD
    h = (h ^ h >> 27) * 0x94D049BB133111EB & WORD
    return h ^ h >> 31


# The first outputs of SplitMix64 from state 0, as published with it.
assert [finalise(i * GOLDEN & WORD) for i in (1, 2, 3)] == [
    0xE220A8397B1DCDAF,
    0x6E789E6AA1B965F4,
    0x06C45D188009454F,
]


def affine(spec, row, column, length):
    block = spec["block"]
    total = (row * spec["a"] + column // block * spec["b"] + spec["c"]) & WORD
    return total % spec["modulus"] % (length - block + 1) + column % block, 1


def mix(spec, row, column, length):
    block = spec["block"]
    num_blocks, within = length // block, column % block
    start = finalise(spec["seed"]) + (column // block + 1) * GOLDEN & WORD
    if spec.get("balanced"):
        product = row * (WORD // num_blocks + 1 & WORD)
        y, stratum = product >> 32 & HALF, product >> 64 & HALF
        turn = stratum * 0x9E3779B9 + (finalise(start) >> 32) & HALF
        turn = (turn ^ turn >> 15) * 0x846CA68B & HALF
        signs = ((row ^ turn) & HALF) * 0x7FEB352D & HALF
        signs = (signs ^ signs >> 15) * 0x846CA68B & HALF
        signs = signs ^ signs >> 16
        stride = next(n for n in range(7, 100) if math.gcd(n, num_blocks) == 1)
        fraction = y * stride + turn & HALF
    else:
        h = finalise(start + row & WORD)
        fraction, signs = h >> 32, h
    slot = (fraction * num_blocks >> 32) * block + within
    return slot, -1 if spec["signed"] and signs >> within & 1 else 1


def lma(spec, signature, column, length):
    r, bits, block = spec["random_numbers"], spec["key_bits"], spec["block"]
    i, x = column // block, 0
    for t in range(spec["keys_to_use"]):
        position = (r[11 + 2 * t] * i + r[12 + 2 * t]) % r[0] % (64 // bits - 1)
        x ^= (signature >> bits * position & 2**bits - 1) << t * bits
    return (x * r[3] + i * r[2] + r[1]) % r[0] % (length - block + 1) + column % block, 1


def semantic(spec, signature, column, length):
    block, bits = spec["block"], spec["key_bits"]
    num_blocks, within, i = length // block, column % block, column // block
    keys = [signature >> bits * k & 2**bits - 1 for k in range(64 // bits)]
    selected = {(i + t) % len(keys) for t in range(spec["keys_to_use"])}
    x = sum(key << bits * k for k, key in enumerate(keys) if k in selected)
    h = finalise(finalise(spec["seed"]) + (i + 1) * GOLDEN + x & WORD)
    slot = ((h >> 32) * num_blocks >> 32) * block + within
    return slot, -1 if spec["signed"] and h >> within & 1 else 1


FORMULAS = {"affine": affine, "mix": mix, "lma": lma, "semantic": semantic}


def vector(spec, length, elements):
    formula = FORMULAS[spec["kind"]]
    # A row is a signed index, reinterpreted as unsigned.
    elements = [
        [row, column, *formula(spec, row & WORD, column, length)]
        for row, column in elements
    ]
    assert all(0 <= slot < length for _, _, slot, _ in elements)
    return {"hash": spec, "len": length, "elements": elements}


ROWS = [0, 1, 2, 123_456_789, 2**31, 2**40, 2**63 - 1, -1, -(2**63)]
# Past every row of a table that fits the memory.
FAR_COLUMNS = [2**31 - 2, 2**40 + 5]


def elements(rows, columns):
    return [(row, column) for row in rows for column in columns]


def ends_of_blocks(block, column_blocks):
    """The first and the last column of these blocks of columns."""
    return sorted({b * block + i for b in column_blocks for i in (0, block - 1)})


# The `random_numbers` of LMA and ROBE by default: NumPy's RandomState(1024).randint(0, r[0], 50) after r[0].
LMA_NUMBERS = [
    2_038_074_743, 634_329_019, 1_825_252_241, 871_205_356, 80_759_397, 1_857_946_201, 679_088_993, 343_857_360,
    425_474_381, 538_847_776, 1_086_915_907, 369_480_626, 585_176_928, 1_830_667_799, 17_682_904, 42_749_099,
    642_135_753, 666_118_921, 852_289_015, 1_807_511_361, 400_946_194, 961_960_675, 1_717_623_355, 348_735_301,
    1_908_929_968, 1_392_981_797, 1_360_581_189, 1_828_438_555, 1_817_122_323, 2_000_861_453, 1_801_692_958,
    1_281_466_102, 667_742_013, 855_380_150, 891_042_863, 1_350_848_844, 1_649_242_629, 616_218_555, 55_336_518,
    788_062_612, 278_737_588, 243_163_105, 1_493_390_320, 1_218_376_079, 856_629_825, 1_016_047_144, 1_703_267_098,
    1_161_549_658, 628_776_731, 801_766_055, 106_811_102,
]


def affine_spec(a, b, c, modulus, block, **more):
    return {"kind": "affine", "a": a, "b": b, "c": c, "modulus": modulus, "block": block} | more


def mix_spec(seed, block, signed, balanced):
    spec = {"kind": "mix", "seed": seed, "block": block, "signed": signed}
    return spec | {"balanced": True} if balanced else spec


def vectors():
    # HashedEmbeddingBag's.
    original = affine_spec(9_824_516_537, 57_857_966_300_227, 104_729, 117_130_198_221_199, 1)
    columns = [0, 1, 3, 5, 127]
    for length in (1, 2, 1600, 1_000_003):
        yield vector(original, length, elements(ROWS, columns))
    yield vector(original, 2**60, elements(ROWS, columns + FAR_COLUMNS))

    # ROBE's with the default seed. It is defined where its signed arithmetic does not overflow.
    modulus, c, b, a = 2_038_074_743, 634_329_019, 1_825_252_241, 871_205_356
    rows = [0, 1, 2, 5, 99_999, 2**31]
    for block, lengths in (1, (1000, 1_000_003)), (8, (8, 1000, 1_000_003)):
        robe = affine_spec(a, b, c, modulus, block, overflow="refuse")
        columns = [0, 1, 3, 7, 8, 29, 64, 127]
        for length in lengths:
            yield vector(robe, length, elements(rows, columns))
        yield vector(robe, 2**60, elements(rows, columns))

    # Every step wraps, and no block begins at a multiple of anything.
    wraps = affine_spec(2**64 - 59, (2**64 - 1) // 3, 7, 2**64 - 5, 3)
    for length in (3, 100_003):
        yield vector(wraps, length, elements(ROWS, range(7)))
    yield vector(wraps, 2**60, elements(ROWS, [*range(7), *FAR_COLUMNS]))

    for balanced in (False, True):
        for seed, block, signed in (
            (0, 1, True),
            (2**64 - 1, 3, True),
            (7, 4, False),
            (1, 8, True),
            (9, 32, True),
            (4, 64, False),
        ):
            spec = mix_spec(seed, block, signed, balanced)
            columns = ends_of_blocks(block, (0, 1, 3))
            # One block, a prime number of them, a power of two, and 2*3*5*7*11*13, whose smallest coprime stride is 17.
            for num_blocks in (1, 7, 1024, 30_030):
                yield vector(spec, num_blocks * block, elements(ROWS, columns))
        # All columns of a block, so that every sign bit is seen.
        for signed in (True, False):
            for seed in (0, 42):
                spec = mix_spec(seed, 16, signed, balanced)
                columns = [b * 16 + i for b in (0, 1, 3, 7) for i in range(16)]
                rows = [0, 1, 123_456_789, 2**40, -1]
                yield vector(spec, 1_280_000, elements(rows, columns))
        # As many blocks as there can be: slots show the high half of the hash, and the signs of 32 columns all of the low half.
        spec = mix_spec(0, 32, True, balanced)
        columns = [b * 32 + i for b in (0, 1, 3) for i in range(32)]
        yield vector(spec, 32 * HALF, elements([0, 1, 2**40, -1], columns))
        spec = mix_spec(42, 32, True, balanced)
        yield vector(spec, 32 * HALF, elements([123_456_789], range(32 * 7, 32 * 8)))
        spec = mix_spec(42, 5, True, balanced)
        yield vector(spec, 5 * HALF, elements(ROWS, FAR_COLUMNS))

    # LMA with the default seed, and with other shapes of keys. It is defined where its signed arithmetic does not overflow.
    signatures = [0, 1, 0x123456789ABCDEF0, 2**63 - 1, 0x0F0E0D0C0B0A0908, -1, -(2**63), -0x0123456789ABCDF]
    columns = [0, 1, 5, 7, 8, 17, 31, 64, 127]
    for length, block, bits, keys in (
        (1_000_003, 1, 4, 8),
        (1_000_003, 8, 4, 8),
        (65_536, 16, 8, 4),
        (4096, 4, 2, 12),
        (1000, 3, 1, 20),
        (1_000_003, 8, 32, 1),
        (8, 8, 3, 10),
        (2**60, 2, 5, 6),
    ):
        spec = {"kind": "lma", "random_numbers": LMA_NUMBERS[: 11 + 2 * keys]}
        spec |= {"key_bits": bits, "keys_to_use": keys, "block": block}
        yield vector(spec, length, elements(signatures, columns))

    for seed, bits, keys, block, signed in (
        (0, 16, 2, 1, True),
        (7, 4, 8, 4, False),
        (2**64 - 1, 8, 1, 16, True),
        (1, 32, 2, 3, True),
        (9, 1, 17, 8, True),
        (4, 2, 32, 64, False),
        (3, 16, 3, 32, True),
    ):
        spec = {"kind": "semantic", "seed": seed, "key_bits": bits, "keys_to_use": keys}
        spec |= {"block": block, "signed": signed}
        columns = ends_of_blocks(block, range(9))
        for num_blocks in (1, 1024, 30_030):
            yield vector(spec, num_blocks * block, elements(signatures, columns))


def main():
    lines = ",\n".join(json.dumps(v, separators=(",", ":")) for v in vectors())
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text(f"[\n{lines}\n]\n")


main()
