"""Write what LLVM makes of a kernel's inner code for any instruction set.

    python -m tools.kernel_asm --isa neon q8.rows_q8 3 0 2

compiles the intrinsic `rows_q8` of `kimi_cpu/kernels/q8.py`, with its literal arguments 3, 0 and
2, for 64-bit ARM with `sdot`, whatever machine this is, and prints the assembly. The same passes
run as when Numba compiles, so what is read here is what that machine executes.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from kimi_cpu.kernels import isa

TRIPLES = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}


def _emit(kernel: str, literals: list[int]) -> str:
    """LLVM's text of a function that is the intrinsic `module.name` and nothing else."""
    from llvmlite import ir
    from numba.core import types

    module_name, _, name = kernel.rpartition(".")
    intrinsic = getattr(importlib.import_module(f"kimi_cpu.kernels.{module_name}"), name)
    given = [types.literal(n) for n in literals]
    n_args = intrinsic._defn.__code__.co_argcount - 1 - len(given)
    signature, codegen = intrinsic._defn(None, *given, *[types.int64] * n_args)
    module = ir.Module(kernel)
    i64 = ir.IntType(64)
    returns = ir.VoidType() if signature.return_type == types.void else i64
    function = ir.Function(module, ir.FunctionType(returns, [i64] * n_args), name)
    builder = ir.IRBuilder(function.append_basic_block())
    constants = [ir.Constant(i64, n) for n in literals]
    result = codegen(_Context(), builder, signature, [*constants, *function.args])
    if isinstance(returns, ir.VoidType):
        builder.ret_void()
    else:
        builder.ret(result)
    return str(module)


class _Context:
    """What intrinsics without a result ask of Numba's context."""

    def get_dummy_value(self) -> Any:
        return None


def assembly(variant: str, kernel: str, literals: list[int]) -> str:
    """The kernel's assembly. Once in a process, which can call no kernel afterwards."""
    import llvmlite.binding as llvm

    isa.write_code_for(variant)
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    about = isa.VARIANTS[variant]
    cpu, features = about.target
    target = llvm.Target.from_triple(TRIPLES[about.machine or "x86_64"])
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3, codemodel="small")
    module = llvm.parse_assembly(_emit(kernel, literals))
    module.triple = TRIPLES[about.machine or "x86_64"]
    module.data_layout = str(machine.target_data)
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    return machine.emit_assembly(module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=isa.VARIANTS, default=isa.VARIANT)
    parser.add_argument("kernel", metavar="MODULE.INTRINSIC")
    parser.add_argument("literals", nargs="*", type=int, metavar="LITERAL")
    options = parser.parse_args()
    print(assembly(options.isa, options.kernel, options.literals))


if __name__ == "__main__":
    main()
