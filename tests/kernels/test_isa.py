"""Instruction sets: how one is chosen, and the code that LLVM makes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from kimi_cpu.kernels import isa

ROOT = Path(__file__).parents[2]
#: A variant of another architecture than this one.
FOREIGN = "neon" if isa.IS_X86 else "avx2"
x86_only = pytest.mark.skipif(not isa.IS_X86, reason="about x86-64")


def run(*command, **env):
    environment = {k: v for k, v in os.environ.items() if k != "KIMI_CPU_ISA"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT,
        env=environment | env, timeout=900, check=False,
    )  # fmt: skip


def isa_says(expression, **env):
    """What an expression about `isa` is in a new process."""
    result = run("-c", f"from kimi_cpu.kernels import isa; print({expression})", **env)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# The choice


def test_the_best_variant_is_the_default():
    assert list(isa.runnable()) == [v for v in isa.VARIANTS if v in isa.runnable()]
    assert isa_says("isa.VARIANT") == isa.runnable()[0]
    assert isa.runnable()[-1] == "portable"


@pytest.mark.parametrize("variant", isa.runnable())
def test_every_runnable_variant_can_be_forced(variant):
    assert isa_says("(isa.VARIANT, isa.REGISTERS)", KIMI_CPU_ISA=f" {variant.upper()} ") == str(
        (variant, isa.VARIANTS[variant].registers)
    )


def test_cache_folders_differ():
    """A variant never runs another one's compiled code, nor another CPU's or source's."""
    folders = {isa_says("isa.CACHE_FOLDER", KIMI_CPU_ISA=v) for v in isa.runnable()}
    assert len(folders) == len(isa.runnable())
    if isa.IS_X86:
        other_cpu = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2,+ssse3"}
        assert isa_says("isa.CACHE_FOLDER", KIMI_CPU_ISA="portable", **other_cpu) not in folders


@pytest.mark.parametrize("forced", ["avx1024", FOREIGN])
def test_what_cannot_run_is_one_line_and_a_hint(forced):
    result = run("-m", "kimi_cpu", "run", "hi", KIMI_CPU_ISA=forced)
    assert result.returncode == 2 and not result.stdout and "Traceback" not in result.stderr
    error, hint = result.stderr.strip().splitlines()[-2:]
    assert error.startswith("error: ") and forced in error
    assert hint.startswith("hint: ") and ", ".join(isa.runnable()) in hint


@x86_only
def test_a_cpu_without_avx2():
    """Numba's own variables describe one; the variant follows what Numba will emit."""
    old = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2,+ssse3"}
    assert isa_says("isa.VARIANT", **old) == "portable"
    result = run("-c", "from kimi_cpu.kernels import isa", KIMI_CPU_ISA="avx2", **old)
    assert "UsageError" in result.stderr and "avx2" in result.stderr


def test_kernels_are_compiled_once(tmp_path):
    """A constant argument would make a copy for it, of the callees too: a longer first start."""
    code = """
import sys
from kimi_cpu.kernels import fast, isa
assert not isa.is_cached()
left = list(fast.compile_all())
assert isa.is_cached() and left == list(range(len(left), 0, -1)), left
kernels = [m for name, m in sys.modules.items() if name.startswith("kimi_cpu.kernels")]
functions = {f for m in kernels for f in vars(m).values() if hasattr(f, "nopython_signatures")}
compiled = [f for f in functions if f.signatures]
assert len(compiled) > 20, compiled
print(*[f"{f.__name__} {f.signatures}" for f in compiled if len(f.signatures) > 1], sep="\\n")
"""
    result = run("-c", code, XDG_CACHE_HOME=str(tmp_path), NUMBA_OPT="0")
    assert result.returncode == 0 and result.stdout.strip() == "", result.stdout + result.stderr


@pytest.mark.skipif("avx512vnni" not in isa.runnable(), reason="needs AVX-512 VNNI")
def test_a_forced_variant_is_compiled_for_a_machine_that_has_no_more():
    assert isa_says("isa.CPU_NAME", KIMI_CPU_ISA="avx2") == "haswell"
    assert isa_says("isa.CPU_NAME", KIMI_CPU_ISA="portable") == "x86-64"


@pytest.mark.parametrize("dotprod", [True, False])
def test_arm(monkeypatch, dotprod):
    """LLVM says nothing of `sdot`, so its feature is added where the system has it."""
    monkeypatch.setattr(isa, "_machine", lambda: "aarch64")
    monkeypatch.setattr(isa, "get_host_cpu_features", lambda: "+neon,-sve")
    monkeypatch.setattr(isa, "_has_dotprod", lambda: dotprod)
    assert isa.runnable() == (["neon", "portable"] if dotprod else ["portable"])
    monkeypatch.setattr(isa.numba_config, "CPU_NAME", None)
    monkeypatch.setattr(isa.numba_config, "CPU_FEATURES", None)
    isa._set_target("")
    features = isa.numba_config.CPU_FEATURES
    assert features == ("+neon,-sve,+dotprod" if dotprod else "+neon,-sve")
    monkeypatch.setattr(isa, "get_host_cpu_features", lambda: "")  # macOS
    assert isa._host_features() == "+dotprod" * dotprod


def test_dotprod_of_this_machine(monkeypatch):
    monkeypatch.setattr(isa.sys, "platform", "darwin")
    assert isa._has_dotprod()
    monkeypatch.setattr(isa.sys, "platform", "win32")
    monkeypatch.setattr(isa.ctypes, "CDLL", lambda name: object())
    assert not isa._has_dotprod()


# What has been compiled


def test_single_kernels_are_no_complete_cache(monkeypatch, tmp_path):
    """After an interrupted first compilation the next start still says that it compiles."""
    monkeypatch.setattr(isa, "CACHE_FOLDER", tmp_path)
    (tmp_path / "kernel.nbc").write_bytes(b"")
    assert not isa.is_cached()
    isa.mark_cached()
    assert isa.is_cached()
    monkeypatch.setattr(isa, "CACHE_FOLDER", tmp_path / "gone")
    isa.mark_cached()  # nothing to write to is no error
    assert not isa.is_cached()


# The code of the inner loops, on this machine or not


class Loop(NamedTuple):
    """The basic block of an assembly text that holds the most of some instruction."""

    found: int
    in_all: int
    instructions: list[str]

    @property
    def stack(self) -> int:
        """Instructions that touch the stack."""
        return sum(bool(re.search(r"\[sp|%rsp", i)) for i in self.instructions)


def loop(text, instruction):
    blocks = [[]]
    for line in text.splitlines():
        if re.match(r"\.?LBB", line):
            blocks.append([line])
        elif line.startswith("\t") and not line.startswith("\t."):
            blocks[-1].append(line.strip().replace("\t", " "))
            if re.match(r"\t(j\w+|b(\.\w+)?|cbn?z|tbn?z|ret\w*)\s", line):
                blocks.append([])
    counts = [sum(bool(re.search(instruction, line)) for line in block) for block in blocks]
    most = blocks[counts.index(max(counts))]
    return Loop(max(counts), sum(counts), most)


def assemblies(variant, *kernels):
    """The assembly of kernels with their literal arguments, by one process."""
    code = (
        "import json, sys; from tools.kernel_asm import assembly;"
        "print(json.dumps([assembly(sys.argv[1], k, n) for k, n in json.loads(sys.argv[2])]))"
    )
    result = run("-c", code, variant, json.dumps(kernels))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


class Code(NamedTuple):
    """What a variant's dot products look like.

    Attributes:
        dot: the instruction, a pattern of how LLVM writes it.
        parts: how many of them make one of 16 lanes.
        tokens: of the largest tile.
        never: what may not occur: another variant's way.
    """

    dot: str
    parts: int
    tokens: int
    never: str


CODE = {
    "avx512vnni": Code("^vpdpbusd .*%zmm", 1, 8, "vpmaddubsw"),
    "avxvnni": Code("^{vex} vpdpbusd .*%ymm", 2, 4, r"zmm|vpmaddubsw|\n\tvpdpbusd"),
    "avx2": Code("vpmaddubsw", 2, 3, "zmm|vpdpbusd"),
    "neon": Code("sdot v", 4, 2, r"smull|\bz\d+\."),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("variant", CODE)
def test_inner_loops_are_dot_products(variant, bits):
    """The tiles of one and of several tokens: one loop, nothing called, hardly a register spilt."""
    code = CODE[variant]
    kernels = [("q8.rows_q8", (3 if bits == 4 else 4, 0, 1))]
    kernels += [("q8.rows_q8", (3 if bits == 4 else 4, 1, code.tokens))]
    for (name, literals), text in zip(kernels, assemblies(variant, *kernels), strict=True):
        assert not re.search(code.never, text), name
        assert not re.search(r"\tcall|\tbl\t", text), f"{name} calls"
        inner = loop(text, code.dot)
        assert inner.found == inner.in_all, f"{name}: all in one loop"
        label, last = inner.instructions[0].partition(":")[0], inner.instructions[-1]
        assert last.endswith(label) and last.split()[0] not in ("b", "jmp"), f"{name}: no loop"
        if literals[1] == 1:  # one row vector: two groups of 8 dot products a token
            assert inner.found == 2 * 8 * code.tokens * code.parts
        # `vpmaddubsw` is half of a dot product and needs registers between; one token waits for
        # the memory, not for the cache
        few = 0.3 if variant == "avx2" or literals[-1] == 1 else 0.11
        assert inner.stack <= few * len(inner.instructions), f"{name} spills {inner.stack}"


def test_arm_repeats_four_bytes_in_the_instruction():
    (text,) = assemblies("neon", ("q8.rows_q8", (3, 1, 2)))
    # 2 groups, 8 dot products, 4 registers, 2 tokens
    assert len(re.findall(r"sdot\tv\d+\.4s, v\d+\.16b, v\d+\.4b\[\d\]", text)) == 128
    assert len(re.findall(r"fmla\tv\d+\.4s", text)) == 16


#: Every other kind of inner code, with its literal arguments.
OTHERS = [
    ("matmul.dot_tile", (4, 1)), ("matmul.dot_tile", (2, 4)), ("gemm.fill_blocks", ()),
    ("q8.rows_q8", (2, 0, 4)), ("q8.four_rows_q8", (2,)),
    ("packed._tile_f32", (8, 4)), ("int4._pack_group", ()),
    ("attention_tile.scores_tile", (0,)), ("attention_tile.values_tile", (0,)),
    ("attention_tile.softmax_block", (0,)), ("attention_absorb._weighted_rows", (1, 4)),
    ("rows._add", ()), ("threads._pause", ()), ("threads._swap_if_equal", ()),
]  # fmt: skip


@pytest.mark.parametrize("variant", isa.VARIANTS)
def test_everything_compiles_for_every_machine(variant):
    for (kernel, _), text in zip(OTHERS, assemblies(variant, *OTHERS), strict=True):
        assert "ret" in text
        assert not re.search(r"\tcall|\tbl\t", text), f"{kernel} calls"
