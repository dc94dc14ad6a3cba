"""The arithmetic of the model, twice with the same signatures.

`kernels.reference` is plain NumPy: the definition of each operation. `kernels.fast` is Numba with
LLVM intrinsics: importing it imports numba, so nothing here does; write
`from kimi_cpu.kernels import fast` where the speed is needed.
"""
