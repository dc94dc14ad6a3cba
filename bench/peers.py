"""One run of llama.cpp or ik_llama.cpp in a process of its own, for `bench/compare.py`.

    python -m bench.peers SPEC.json RESULT.json     # stdout belongs to the library

Runs under the Python that has `llama-cpp-python` or `ik-llama-cpp-python`; needs nothing of ours.
Token ids go straight into `llama_decode`: no tokenizer, no sampling. Settings are llama-bench's
(batches of up to 2048 tokens, computed 512 at a time, f16 latents) and each peer's best: its
flash attention, its fused operations, its repacked weights.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

N_BATCH, N_UBATCH = 2048, 512

#: Names the library that ik-llama-cpp-python loads instead of its own.
LIB_PATH = "IK_LLAMA_CPP_LIB_PATH"


@dataclass(frozen=True)
class Peer:
    """The package on PyPI that an engine comes in, and its settings in its own words."""

    package: str
    settings: str


#: llama.cpp repacks Q4_0 while loading by default, into memory of its own: where that does not hold
#: the file, only --no-repack runs. ik_llama.cpp does it on request, which takes twice the time to
#: load and rules mmap out.
PEERS = {
    "llama.cpp": Peer("llama-cpp-python", "-fa auto -ub 512"),
    "llama.cpp --no-repack": Peer("llama-cpp-python", "-fa auto -ub 512 --no-repack"),
    "ik_llama.cpp": Peer("ik-llama-cpp-python", "-mla 3 -fa 1 -fmoe 1 -ub 512"),
    "ik_llama.cpp -rtr 1": Peer("ik-llama-cpp-python", "-mla 3 -fa 1 -fmoe 1 -rtr 1 -ub 512"),
}


class Llama:
    """llama.cpp: a loaded GGUF file and one timeline of tokens."""

    def __init__(self, spec: dict[str, Any], n_ctx: int) -> None:
        from llama_cpp import llama_cpp

        path, threads = spec["path"], spec["threads"]
        self.api: Any = llama_cpp
        silent = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        self._silent = silent
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        model.use_extra_bufts = not spec["engine"].endswith("--no-repack")
        self._model = _loaded(llama_cpp.llama_model_load_from_file(path.encode(), model), path)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = n_ctx, N_BATCH, N_UBATCH
        context.n_threads = context.n_threads_batch = threads
        _set_yarn(context, spec)
        self._context = _loaded(llama_cpp.llama_init_from_model(self._model, context), path)
        self.system = llama_cpp.llama_print_system_info().decode()
        self.build = _ggml_build()
        self._length = 0

    def compute(self, ids: list[int]) -> None:
        """Append up to N_BATCH tokens; the logits of the last one are kept."""
        tokens = (self.api.llama_token * len(ids))(*ids)
        status = self.api.llama_decode(self._context, self._batch(tokens))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self._length += len(ids)

    def _batch(self, tokens: Any) -> Any:
        return self.api.llama_batch_get_one(tokens, len(tokens))

    def cut(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        memory = self.api.llama_get_memory(self._context)
        self.api.llama_memory_seq_rm(memory, 0, length, -1)
        self._length = length

    def wait(self) -> None:
        """Until everything is computed."""
        synchronize = self.api._lib.llama_synchronize
        synchronize.argtypes = [ctypes.c_void_p]
        synchronize.restype = None
        synchronize(self._context)

    def logits(self) -> list[float]:
        """Of the last token."""
        return list(self.api.llama_get_logits_ith(self._context, -1)[: self._n_vocab])


class IkLlama(Llama):
    """ik_llama.cpp, whose interface is that of an older llama.cpp."""

    def __init__(self, spec: dict[str, Any], n_ctx: int) -> None:
        from ik_llama_cpp import _ctypes_api as api

        path, threads, shape = spec["path"], spec["threads"], spec["mha_shape"]
        self.api = api
        api.llama_backend_init()
        model = api.llama_model_default_params()
        model.n_gpu_layers, model.mla = 0, 3
        # It knows only the released models' shapes when MLA is described as one key head, as
        # llama.cpp wants it: say it in its own terms.
        overrides = (api.llama_model_kv_override * (len(shape) + 1))()
        for override, (key, value) in zip(overrides, shape.items(), strict=False):
            override.tag, override.key, override.value.val_i64 = 0, key.encode(), value
        model.kv_overrides = overrides
        if spec["engine"].endswith("-rtr 1"):  # repacks the weights while loading
            model.repack_tensors, model.use_mmap = True, False
        self._model = _loaded(api.llama_model_load_from_file(path.encode(), model), path)
        self._n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        context = api.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = n_ctx, N_BATCH, N_UBATCH
        context.n_threads = context.n_threads_batch = threads
        context.mla_attn, context.flash_attn, context.fused_moe_up_gate = 3, True, True
        _set_yarn(context, spec)
        self._context = _loaded(api.llama_init_from_model(self._model, context), path)
        info = api._lib.llama_print_system_info
        info.restype = ctypes.c_char_p
        self.system = info().decode()
        self.build = "library of IK_LLAMA_CPP_LIB_PATH" if os.environ.get(LIB_PATH) else "wheel"
        self._remove = api._lib.llama_kv_cache_seq_rm
        self._remove.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
        self._remove.restype = ctypes.c_bool
        self._length = 0

    def _batch(self, tokens: Any) -> Any:
        return self.api.llama_batch(
            n_tokens=len(tokens),
            token=ctypes.cast(tokens, self.api.llama_token_p),
            all_pos_0=self._length,
            all_pos_1=1,
            all_seq_id=0,
        )

    def cut(self, length: int) -> None:
        self._remove(self._context, 0, length, -1)
        self._length = length


def _set_yarn(context: Any, spec: dict[str, Any]) -> None:
    """Both ignore the file's YaRN betas for deepseek2; K2's are not their defaults."""
    for name, value in spec["yarn"].items():
        setattr(context, name, value)


def _ggml_build() -> str:
    """ggml's version and commit, where the library tells them."""
    from llama_cpp._ggml import libggml

    names = []
    for name in ("ggml_version", "ggml_commit"):
        if function := getattr(libggml, name, None):
            function.argtypes, function.restype = [], ctypes.c_char_p
            names.append(function().decode())
    return " ".join(["ggml", *names])


def _loaded(handle: Any, path: str) -> Any:
    if not handle:
        raise RuntimeError(f"{path}: cannot be loaded")
    return handle


def run_test(peer: Llama, test: dict[str, int], ids: list[int]) -> float:
    """As `kimi_cpu.benchmark.runner.run_test`: seconds for a test after its context."""
    prompt_end = test["n_depth"] + test["n_prompt"]
    end = prompt_end + test["n_gen"]
    begin = time.perf_counter()
    for first in range(test["n_depth"], prompt_end, N_BATCH):
        peer.compute(ids[first : min(first + N_BATCH, prompt_end)])
    for token in ids[prompt_end:end]:
        peer.compute([token])
    peer.wait()
    return time.perf_counter() - begin


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Every test of the spec: a warm-up pass over its own tokens, then the repetitions.

    `spec`: engine, path, threads, repetitions, ids, tests (name, n_prompt, n_gen, n_depth each),
    mha_shape (GGUF keys that describe the attention as multi-head, for ik_llama.cpp), yarn (context
    parameters).
    Returns engine, version, system, settings, seconds (test name -> list) and logits (the last
    token's of each test).
    """
    engine, ids = spec["engine"], spec["ids"]
    make = Llama if engine.startswith("llama.cpp") else IkLlama
    package = PEERS[engine].package
    peer = make(spec, -(-len(ids) // 256) * 256)
    seconds: dict[str, list[float]] = {}
    logits = {}
    for test in spec["tests"]:
        peer.cut(0)
        for first in range(0, test["n_depth"], N_BATCH):
            peer.compute(ids[first : min(first + N_BATCH, test["n_depth"])])
        samples = []
        for _ in range(spec["repetitions"] + 1):
            peer.cut(test["n_depth"])
            samples.append(run_test(peer, test, ids))
        seconds[test["name"]] = samples[1:]
        logits[test["name"]] = peer.logits()
    return {
        "engine": engine,
        "version": f"{package} {importlib.metadata.version(package)} ({peer.build})",
        "system": peer.system,
        "settings": PEERS[engine].settings,
        "seconds": seconds,
        "logits": logits,
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
