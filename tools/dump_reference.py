"""Record the oracle's outputs for the fixed cases of `tests/oracle.py`.

    python -m tools.dump_reference        # needs `pip install '.[oracle]'`

Writes `tests/vectors/oracle.npz` (per case: float32 logits [T, V] and the greedy continuation) and
`tests/vectors/oracle.json` (the digest of each case's weights, and the versions that made it all).
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.oracle import (
    CASES,
    NEW_TOKENS,
    VECTORS,
    live_oracle,
    oracle_greedy,
    oracle_logits,
    weights_digest,
)


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    digests: dict[str, str] = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as tmp:
            folder = case.write(Path(tmp))
            model = live_oracle(folder)
            prompt = case.prompt(model.config.vocab_size)
            arrays[f"{case.name}.logits"] = oracle_logits(model, prompt)
            arrays[f"{case.name}.greedy"] = np.array(oracle_greedy(model, prompt, NEW_TOKENS))
            digests[case.name] = weights_digest(folder)
        print(f"{case.name}: recorded")
    np.savez_compressed(VECTORS / "oracle.npz", allow_pickle=False, **arrays)
    provenance = {
        "made_by": "python -m tools.dump_reference",
        "oracle": "transformers DeepseekV3ForCausalLM, float32, eager attention",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "weights_sha256": digests,
    }
    (VECTORS / "oracle.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main()
