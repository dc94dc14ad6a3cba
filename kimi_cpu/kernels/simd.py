"""A small vocabulary of 16-lane vector operations, written as LLVM IR.

Numba's own loops run these kernels 15 times too slow, so the hot loops are emitted directly:
`Emit` wraps llvmlite's builder with logical vectors of 16 float32 / int32 lanes (64 int8 lanes),
which LLVM maps to one 512-bit, two 256-bit or four 128-bit registers. Only the int8 dot product,
the fused multiply-add and access under a mask differ between instruction sets. Memory is addressed
by integers (the kernels' arguments are plain addresses), every load allows any alignment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic as numba_intrinsic

from kimi_cpu.kernels.isa import LLVM_MAJOR, VARIANT

#: Numba's decorator, and the same for functions that take some arguments as literals.
intrinsic: Callable[[Callable[..., Any]], Any] = numba_intrinsic
literal_intrinsic: Callable[[Callable[..., Any]], Any] = numba_intrinsic(prefer_literal=True)

_cgutils: Any = cgutils  # untyped

LANES = 16
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
FLOAT = ir.FloatType()
POINTER = ir.PointerType()


def vec(element: ir.Type, lanes: int = LANES) -> ir.VectorType:
    return ir.VectorType(element, lanes)


F32x16, I32x16 = vec(FLOAT), vec(I32)

# The instruction that adds four products of bytes to each int32 lane: LLVM's name for it, the lanes
# of a register, and whether LLVM takes the bytes as such.
_DOT = {
    "avx512vnni": ("llvm.x86.avx512.vpdpbusd.512", 16, LLVM_MAJOR >= 22),
    "avxvnni": ("llvm.x86.avx512.vpdpbusd.256", 8, LLVM_MAJOR >= 22),
    "neon": ("llvm.aarch64.neon.sdot.v4i32.v16i8", 4, True),
}.get(VARIANT)
# Sizes of elements that the machine loads and stores under a mask; LLVM would take other vectors
# apart, lane by lane.
_MASKED_BITS = {"avx512vnni": (16, 32), "avxvnni": (32,), "avx2": (32,)}.get(VARIANT, ())
#: Whether `Emit.dot_s8` takes its first factor as unsigned.
UNSIGNED_DOT = VARIANT in ("avx512vnni", "avxvnni")


def const(ty: ir.Type, value: float | int) -> ir.Constant:
    """A scalar constant, or a vector constant with all lanes equal."""
    if isinstance(ty, ir.VectorType):
        return ir.Constant(ty, [ir.Constant(ty.element, value)] * ty.count)
    return ir.Constant(ty, value)


def quarters(*lanes: int) -> list[int]:
    """The lanes of a shuffle of two vectors that does the same in each quarter of 4 lanes.

    0 .. 3 are the first vector's lanes of the quarter, 4 .. 7 the second's.
    """
    return [4 * q + i if i < 4 else 12 + 4 * q + i for q in range(4) for i in lanes]


@dataclass(frozen=True)
class Lanes:
    """The first n of 16 lanes, and the same as a mask, <16 x i1>; n may be beyond 0 and 16."""

    n: Any
    mask: Any


def _bits(ty: ir.Type) -> int:
    """Bits of a scalar or of a vector's element."""
    element = ty.element if isinstance(ty, ir.VectorType) else ty
    return 32 if element == FLOAT else int(element.width)


def _suffix(ty: ir.VectorType) -> str:
    """A vector type in the names of LLVM's intrinsics."""
    return f"v{ty.count}{'f' if ty.element == FLOAT else 'i'}{_bits(ty)}"


class Emit:
    """Writes vector code at the builder's position; addresses are i64 values."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder
        self._slot_address: Any = None

    # Integers

    def i64(self, value: Any) -> Any:
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def add(self, a: Any, b: Any) -> Any:
        return self.b.add(self.i64(a), self.i64(b))

    def mul(self, a: Any, b: Any) -> Any:
        return self.b.mul(self.i64(a), self.i64(b))

    def min(self, a: Any, b: Any) -> Any:
        a, b = self.i64(a), self.i64(b)
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    # Memory

    def load(self, ty: ir.Type, addr: Any, offset: int = 0) -> Any:
        if offset:
            addr = self.add(addr, offset)
        return self.b.load(self.b.inttoptr(addr, POINTER), typ=ty, align=1)

    def store(self, value: Any, addr: Any, offset: int = 0) -> None:
        if offset:
            addr = self.add(addr, offset)
        self.b.store(value, self.b.inttoptr(addr, POINTER), align=1)

    def prefetch(self, addr: Any, ahead: int) -> None:
        """Ask for the cache line `ahead` bytes further on; harmless outside any mapping.

        Not on machines that have AVX2 and nothing newer: Zen 3 reads streams of its own accord,
        and half as fast if it is asked to (`bench/LOG.md`, 2026-11-29).
        """
        if VARIANT == "avx2":
            return
        self.call("llvm.prefetch.p0", ir.VoidType(), [
            self.b.inttoptr(self.add(addr, ahead), POINTER),
            const(I32, 0), const(I32, 2), const(I32, 1),
        ])  # fmt: skip

    def lanes_below(self, n: Any) -> Lanes:
        """The lanes i < n (an i64 within 32 bits, may be negative)."""
        lanes = ir.Constant(I32x16, [ir.Constant(I32, i) for i in range(LANES)])
        n = self.i64(n)
        return Lanes(n, self.b.icmp_signed("<", lanes, self.splat(self.b.trunc(n, I32))))

    def load_splat(self, element: ir.Type, addr: Any, offset: int = 0) -> Any:
        """One number in memory, repeated to 64 bytes (16 times 4, or 64 int8 of 4 repeated)."""
        if element == I8:
            return self.b.bitcast(self.splat(self.load(I32, addr, offset)), vec(I8, 64))
        return self.splat(self.load(element, addr, offset))

    def load_fours(self, addr: Any, offset: int = 0) -> list[Any]:
        """16 int8 in memory as four vectors: each four of them repeated to 64 bytes."""
        if VARIANT != "neon":
            return [self.load_splat(I8, addr, offset + 4 * j) for j in range(4)]
        # `sdot` itself can repeat one of a register's fours, which saves loads and registers.
        fours = self.load(vec(I32, 4), addr, offset)
        return [
            self.b.bitcast(self.shuffle(fours, fours, [j] * LANES), vec(I8, 64)) for j in range(4)
        ]

    def scratch(self, n_bytes: int) -> Any:
        """Address of n_bytes of the function's stack, 64-byte aligned, not initialised."""
        with self.b.goto_entry_block():  # not alloca_once: it fills with zeros, byte by byte
            slot = self.b.alloca(ir.ArrayType(I8, n_bytes + 64))
            return self.b.and_(self.add(self.b.ptrtoint(slot, I64), 63), ir.Constant(I64, -64))

    def load_masked(self, ty: ir.VectorType, addr: Any, lanes: Lanes) -> Any:
        """16 elements; those outside `lanes` are zero and their memory is not touched."""
        if _bits(ty) in _MASKED_BITS:
            return self.call(f"llvm.masked.load.{_suffix(ty)}.p0", ty, [
                self.b.inttoptr(addr, POINTER), const(I32, 1), lanes.mask, const(ty, 0),
            ])  # fmt: skip
        result = self.variable(const(ty, 0))
        with self.b.if_else(self.b.icmp_signed(">=", lanes.n, self.i64(LANES))) as (whole, part):
            with whole:
                self.set(result, self.load(ty, addr))
            with part:
                self.store(const(ty, 0), self._slot())
                self._copy_below(lanes.n, ty.element, addr, self._slot())
                self.set(result, self.load(ty, self._slot()))
        return self.get(result)

    def store_masked(self, value: Any, addr: Any, lanes: Lanes) -> None:
        """Write those of 16 elements that are in `lanes`."""
        ty = value.type
        if _bits(ty) in _MASKED_BITS:
            self.call(f"llvm.masked.store.{_suffix(ty)}.p0", ir.VoidType(), [
                value, self.b.inttoptr(addr, POINTER), const(I32, 1), lanes.mask,
            ])  # fmt: skip
            return
        with self.b.if_else(self.b.icmp_signed(">=", lanes.n, self.i64(LANES))) as (whole, part):
            with whole:
                self.store(value, addr)
            with part:
                self.store(value, self._slot())
                self._copy_below(lanes.n, ty.element, self._slot(), addr)

    def _slot(self) -> Any:
        """Address of 64 bytes of the stack, for the moment."""
        if self._slot_address is None:
            self._slot_address = self.scratch(64)
        return self._slot_address

    def _copy_below(self, n: Any, element: ir.Type, source: Any, to: Any) -> None:
        """Copy n elements, at most 15 and none if n is negative, in pieces of 8, 4, 2 and 1."""
        some = self.b.icmp_signed(">", n, self.i64(0))
        for size in (8, 4, 2, 1):
            bit = self.b.icmp_signed("!=", self.b.and_(n, self.i64(size)), self.i64(0))
            with self.b.if_then(self.b.and_(some, bit)):
                at = self.mul(self.b.and_(n, self.i64(-2 * size)), _bits(element) // 8)
                piece = self.load(vec(element, size), self.add(source, at))
                self.store(piece, self.add(to, at))

    # Control

    @contextlib.contextmanager
    def loop(self, start: Any, stop: Any, step: int = 1) -> Iterator[Any]:
        """`for i in range(start, stop, step)`; yields i."""
        with _cgutils.for_range_slice(
            self.b, self.i64(start), self.i64(stop), self.i64(step), I64
        ) as (index, _):
            yield index

    def variable(self, initial: Any) -> Any:
        """A mutable value (LLVM promotes it to a register); use get and set."""
        slot = _cgutils.alloca_once(self.b, initial.type)
        self.b.store(initial, slot)
        return slot

    def get(self, slot: Any) -> Any:
        return self.b.load(slot)

    def set(self, slot: Any, value: Any) -> None:
        self.b.store(value, slot)

    def call(self, name: str, result: ir.Type, args: Sequence[Any]) -> Any:
        function = _cgutils.get_or_insert_function(
            self.b.module, ir.FunctionType(result, [a.type for a in args]), name
        )
        return self.b.call(function, args)

    # Float vectors

    def splat(self, scalar: Any, lanes: int = LANES) -> Any:
        ty = vec(scalar.type, lanes)
        one = self.b.insert_element(ir.Constant(ty, ir.Undefined), scalar, const(I32, 0))
        return self.shuffle(one, one, [0] * lanes)

    def shuffle(self, a: Any, b: Any, lanes: Sequence[int]) -> Any:
        mask = ir.Constant(vec(I32, len(lanes)), [ir.Constant(I32, i) for i in lanes])
        return self.b.shuffle_vector(a, b, mask)

    def transpose_fours(self, rows: Sequence[Any]) -> list[Any]:
        """4 vectors of 16 lanes: the 4 x 4 matrix of each quarter of the lanes transposed."""

        low, high = quarters(0, 4, 1, 5), quarters(2, 6, 3, 7)
        ab, cd = [[self.shuffle(a, b, lanes) for lanes in (low, high)]
                  for a, b in (rows[:2], rows[2:])]  # fmt: skip
        low, high = quarters(0, 1, 4, 5), quarters(2, 3, 6, 7)
        return [self.shuffle(ab[half], cd[half], lanes) for half in (0, 1) for lanes in (low, high)]

    def transpose(self, rows: Sequence[Any]) -> list[Any]:
        """16 vectors of 16 lanes, as a matrix, transposed: 64 two-input shuffles."""
        # quads[q][k]: quarter c of the lanes holds column 4 c + k of rows 4 q .. + 3
        quads = [self.transpose_fours(rows[4 * q : 4 * q + 4]) for q in range(4)]

        def whole(*which: int) -> list[int]:
            return [4 * w + i for w in which for i in range(4)]

        out: list[Any] = [None] * LANES
        for k in range(4):
            even, odd = [
                [self.shuffle(quads[2 * h][k], quads[2 * h + 1][k], whole(*w)) for h in (0, 1)]
                for w in ((0, 2, 4, 6), (1, 3, 5, 7))
            ]
            for pair, first in ((even, 0), (odd, 1)):
                out[4 * first + k] = self.shuffle(pair[0], pair[1], whole(0, 2, 4, 6))
                out[4 * (first + 2) + k] = self.shuffle(pair[0], pair[1], whole(1, 3, 5, 7))
        return out

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c: one instruction, or two where there is no fused one."""
        name = "llvm.fmuladd" if VARIANT == "portable" else "llvm.fma"
        return self.call(f"{name}.{_suffix(a.type)}", a.type, [a, b, c])

    def select(self, mask: Any, a: Any, b: Any) -> Any:
        return self.b.select(mask, a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def minimum(self, a: Any, b: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered("<", a, b), a, b)

    def _fold(self, v: Any, combine: Any) -> Any:
        """Combine the 16 lanes pairwise, always in the same order -> scalar."""
        half = LANES // 2
        while half:
            v = combine(self.shuffle(v, v, range(half)), self.shuffle(v, v, range(half, 2 * half)))
            half //= 2
        return self.b.extract_element(v, const(I32, 0))

    def sum(self, v: Any) -> Any:
        return self._fold(v, self.b.fadd)

    def sum_i32(self, v: Any) -> Any:
        return self._fold(v, self.b.add)

    def max(self, v: Any) -> Any:
        return self._fold(v, self.maximum)

    def bf16(self, bits: Any) -> Any:
        """<16 x i16> bf16 bits -> <16 x float>, exact."""
        wide = self.b.shl(self.b.zext(bits, I32x16), const(I32x16, 16))
        return self.b.bitcast(wide, F32x16)

    def round(self, v: Any) -> Any:
        """Nearest integer, ties to even, for |v| < 2^22: adding 1.5 * 2^23 drops the fraction."""
        magic = const(F32x16, 12582912.0)
        return self.b.fsub(self.b.fadd(v, magic), magic)

    def exp(self, v: Any) -> Any:
        """e^v within 2 units in the last place; v is clamped to [-87, 88]."""
        v = self.minimum(self.maximum(v, const(F32x16, -87.0)), const(F32x16, 88.0))
        k = self.round(self.b.fmul(v, const(F32x16, 1.44269504)))
        # ln 2 in two parts, the first exact in k * ln2
        r = self.fma(k, const(F32x16, -0.693359375), v)
        r = self.fma(k, const(F32x16, 2.12194440e-4), r)
        p = const(F32x16, 1.9875691500e-4)
        for coefficient in (
            1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5,
        ):  # fmt: skip
            p = self.fma(p, r, const(F32x16, coefficient))
        p = self.fma(self.b.fmul(p, r), r, self.b.fadd(r, const(F32x16, 1.0)))
        exponent = self.b.add(self.b.fptosi(k, I32x16), const(I32x16, 127))
        scale = self.b.bitcast(self.b.shl(exponent, const(I32x16, 23)), F32x16)
        return self.b.fmul(p, scale)

    # Integer dot products

    def dot_u4_s8(
        self, totals: Sequence[Any], weights: Sequence[tuple[Any, Any]],
        activations: Sequence[Sequence[tuple[Any, Any]]],
    ) -> list[Any]:  # fmt: skip
        """totals[c] + the dot products of the weights with activations[c], in each of 16 lanes.

        totals: <16 x i32>. weights: up to four pairs (low, high) of <64 x i8>, unsigned up to 15;
        activations[c]: as many (even, odd), <64 x i8>, signed. A lane sums four products of each.
        """
        if _DOT:
            return self._add_dots(self._dot, totals, weights, activations)
        # 16-bit sums of all, at most 8 * 2 * 15 * 127 = 30480, before they become 32-bit ones
        is_avx2 = VARIANT == "avx2"
        parts = [range(32), range(32, 64)] if is_avx2 else [range(64)]
        sums: list[list[Any]] = [[None] * len(parts) for _ in totals]
        for j, pair in enumerate(weights):
            for parity in range(2):
                w = [self.shuffle(pair[parity], pair[parity], part) for part in parts]
                for c, x in enumerate(activations):
                    v = x[j][parity]
                    for i, part in enumerate(parts):
                        products = self._multiply_16(w[i], self.shuffle(v, v, part))
                        before = sums[c][i]
                        sums[c][i] = products if before is None else self.b.add(before, products)
        if not is_avx2:
            return [
                self._add_fours(total, mine[0]) for total, mine in zip(totals, sums, strict=True)
            ]
        return [
            self.b.add(
                total, self.shuffle(self._sum_pairs(low), self._sum_pairs(high), range(LANES))
            )
            for total, (low, high) in zip(totals, sums, strict=True)
        ]

    def _multiply_16(self, u: Any, s: Any) -> Any:
        """Products of unsigned and signed bytes, <n x i16>; AVX2 has sums of two, half as many."""
        if VARIANT == "avx2":
            return self._multiply_pairs(u, s)
        wide = vec(I16, u.type.count)
        return self.b.mul(self.b.zext(u, wide), self.b.sext(s, wide))

    def dot_s8(
        self, totals: Sequence[Any], weights: Sequence[tuple[Any, Any]],
        activations: Sequence[Sequence[tuple[Any, Any]]],
    ) -> list[Any]:  # fmt: skip
        """As `dot_u4_s8` for weights that are signed, or unsigned if UNSIGNED_DOT.

        Activations are not -128.
        """
        return self._add_dots(self._dot if _DOT else self._dot_s8, totals, weights, activations)

    @staticmethod
    def _add_dots(
        dot: Callable[[Any, Any, Any], Any], totals: Sequence[Any],
        weights: Sequence[tuple[Any, Any]], activations: Sequence[Sequence[tuple[Any, Any]]],
    ) -> list[Any]:  # fmt: skip
        """totals[c] + dot of each of the weights and its own of activations[c]."""
        totals = list(totals)
        for j, pair in enumerate(weights):
            for c, x in enumerate(activations):
                for w, v in zip(pair, x[j], strict=True):
                    totals[c] = dot(totals[c], w, v)
        return totals

    def _dot_s8(self, total: Any, w: Any, x: Any) -> Any:
        """total + four products a lane of signed bytes, where the machine has no instruction."""
        if VARIANT == "avx2":

            def products(w: Any, x: Any) -> Any:
                size = self.call("llvm.abs.v32i8", vec(I8, 32), [w, const(I1, 0)])
                signed = self.call("llvm.x86.avx2.psign.b", vec(I8, 32), [x, w])
                # At most 2 * 128 * 127: no 16-bit overflow
                return self._sum_pairs(self._multiply_pairs(size, signed))

            return self.b.add(total, self._by_registers(8, products, w, x))
        wide = vec(I16, 64)
        return self._add_fours(total, self.b.mul(self.b.sext(w, wide), self.b.sext(x, wide)))

    def _dot(self, total: Any, a: Any, b: Any) -> Any:
        """The machine's own instruction: total + four products of bytes a lane."""
        assert _DOT
        name, lanes, as_bytes = _DOT

        def one(total: Any, a: Any, b: Any) -> Any:
            if not as_bytes:
                a, b = self.b.bitcast(a, total.type), self.b.bitcast(b, total.type)
            return self.call(name, total.type, [total, a, b])

        return self._by_registers(lanes, one, total, a, b)

    def _by_registers(self, lanes: int, compute: Callable[..., Any], *vectors: Any) -> Any:
        """`compute` for every part of `lanes` of the 16 lanes, and the results put together."""
        parts = []
        for first in range(0, LANES, lanes):
            here = []
            for v in vectors:
                size = v.type.count // LANES
                here.append(self.shuffle(v, v, range(size * first, size * (first + lanes))))
            parts.append(compute(*here))
        while len(parts) > 1:
            both = range(2 * parts[0].type.count)
            pairs = zip(parts[::2], parts[1::2], strict=True)
            parts = [self.shuffle(first, second, both) for first, second in pairs]
        return parts[0]

    def _multiply_pairs(self, u: Any, s: Any) -> Any:
        """AVX2: <32 x i8> unsigned and signed -> <16 x i16>, sums of two products."""
        return self.call("llvm.x86.avx2.pmadd.ub.sw", vec(I16), [u, s])

    def _sum_pairs(self, v: Any) -> Any:
        """AVX2: <16 x i16> -> <8 x i32>."""
        return self.call("llvm.x86.avx2.pmadd.wd", vec(I32, 8), [v, const(vec(I16), 1)])

    def _add_fours(self, total: Any, products: Any) -> Any:
        """total <16 x i32> + the sums of each four of <64 x i16>."""
        for i in range(4):
            lane = self.shuffle(products, products, range(i, 64, 4))
            total = self.b.add(total, self.b.sext(lane, I32x16))
        return total


# What Numba code itself needs to touch memory by address.


@intrinsic
def load_f32(typingctx: Any, addr: Any) -> Any:
    """float32 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return Emit(builder).load(FLOAT, args[0])

    return types.float32(types.int64), codegen


@intrinsic
def store_f32(typingctx: Any, addr: Any, value: Any) -> Any:
    """Write a float32 to an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        Emit(builder).store(args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def load_i32(typingctx: Any, addr: Any) -> Any:
    """int32 at an address, as int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(Emit(builder).load(I32, args[0]), I64)

    return types.int64(types.int64), codegen


@intrinsic
def store_i32(typingctx: Any, addr: Any, value: Any) -> Any:
    """Write the low 32 bits of an int64 to an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        Emit(builder).store(builder.trunc(args[1], I32), args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def load_i64(typingctx: Any, addr: Any) -> Any:
    """int64 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return Emit(builder).load(I64, args[0])

    return types.int64(types.int64), codegen


@intrinsic
def load_f64(typingctx: Any, addr: Any) -> Any:
    """float64 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return Emit(builder).load(ir.DoubleType(), args[0])

    return types.float64(types.int64), codegen


@intrinsic
def store_f64(typingctx: Any, addr: Any, value: Any) -> Any:
    """Write a float64 to an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        Emit(builder).store(args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.float64), codegen
