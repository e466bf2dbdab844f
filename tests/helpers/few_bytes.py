"""Codes, dither and remainders in plain NumPy and Python integers: an oracle that shares no code with the package."""

import zlib

import numpy as np

MASK = 2**64 - 1


def splitmix64(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def words(name, seed, step, size):
    """A 32-bit word for each element of a tensor, in the step with this count (1 is the first)."""
    key = splitmix64(splitmix64(zlib.crc32(name.encode()) ^ seed) ^ step) >> 32
    i = np.arange(size, dtype=np.uint64)
    k = np.uint64(key) ^ (i // 128 * 0x85EBCA6B & 0xFFFFFFFF)
    k = (k ^ (k >> np.uint64(15))) * 0x2C1B3C6D & 0xFFFFFFFF
    k ^= k >> np.uint64(13)
    return (k + i % 128 * 0x9E3779B9 & 0xFFFFFFFF).astype(np.int64)


def bits_of(x):
    return np.ascontiguousarray(x, np.float32).reshape(-1).view(np.uint32).astype(np.int64)


def floats_of(bits):
    return bits.astype(np.uint32).view(np.float32)


def encode16(v, w):
    return ((np.minimum(bits_of(v), 0x7FC00000) + (w >> 17)) >> 15).astype(np.uint16)


def decode16(codes):
    return floats_of(codes.reshape(-1).astype(np.int64) << 15)


def encode8(v, w):
    bits = bits_of(v)
    codes, bases = np.empty(bits.size, np.uint8), []
    for begin in range(0, bits.size, 128):
        some = bits[begin : begin + 128]
        finite = some[some < 0x7F800000]
        most = int(finite.max()) if finite.size else 0
        base = max(0, ((most + 0xFFFFF) >> 20) - 255)
        moved = np.minimum(some, 0x7F800000) + (w[begin : begin + 128] >> 12) - (base << 20)
        codes[begin : begin + 128] = np.clip(moved >> 20, 0, 255)
        bases.append(base)
    return codes, np.array(bases, np.uint16)


def decode8(codes, bases):
    return floats_of((codes.reshape(-1).astype(np.int64) + bases.astype(np.int64).repeat(128)[: codes.size]) << 20)


def without_payload(x):
    return np.where(np.isnan(np.asarray(x, np.float32).reshape(-1)), 0x7FC00000, bits_of(x))


def split(x):
    """Split a float32 into a bfloat16 and the 16 bits that it lacks."""
    bits = without_payload(x)
    return ((bits + 0x8000) >> 16 & 0xFFFF).astype(np.uint16), (bits & 0xFFFF).astype(np.uint16).view(np.int16)


def join(p, rest):
    """The float32 of both. A zero or infinity written beside a remainder stays as it is."""
    upper = p.reshape(-1).view(np.uint16).astype(np.int64) << 16
    both = floats_of((upper + rest.reshape(-1).astype(np.int64)) & 0xFFFFFFFF)
    return np.where(np.isnan(both), floats_of(upper), both)


def dithered(x, w):
    return ((without_payload(x) + (w & 0xFFFF)) >> 16 & 0xFFFF).astype(np.uint16)


def nasty(rng, size, dtype=np.float32):
    """Gradients over 42 decades, with zeros, subnormals, infinities and NaNs of either sign and several payloads."""
    g = (rng.standard_normal(size) * 10.0 ** rng.uniform(-30, 12, size)).astype(np.float32)
    few = max(1, size // 300)
    for x in (np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, -1e-45, 3e38, 2e19, 1e-19):
        g[rng.integers(0, size, few)] = x
    bits = g.view(np.uint32)
    bits[rng.integers(0, size, few)] = 0x7F8ABCDE
    bits[rng.integers(0, size, few)] = 0xFFFFFFFF
    with np.errstate(over="ignore", invalid="ignore"):
        return g.astype(dtype)
