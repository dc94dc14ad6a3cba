"""Train the embedded nano model, or export the newest checkpoint in the published file format.

python tools/train_nano.py --state DIR --minutes 95          # resumes by itself
python tools/train_nano.py --state DIR --export weights/nano
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from nano.bpe import Codec, read_ranks, write_ranks
from nano.corpus import make_ranks
from nano.export import export
from nano.torch_model import NanoConfig
from nano.trainer import Budget, load_model, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, required=True, help="folder of the training state")
    parser.add_argument("--minutes", type=float, default=90, help="training time in all sittings")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--export", type=Path, help="write the newest checkpoint there and stop")
    parser.add_argument("--unquantized", action="store_true", help="export bfloat16 experts")
    options = parser.parse_args()
    if options.export:
        model, record, codec = load_model(options.state, ema=True)
        ranks = options.state / "ranks"
        size = export(model, codec, ranks, options.export, not options.unquantized)
        print(f"{options.export}: {size / 1e6:.2f} MB, {record}")
        return
    options.state.mkdir(parents=True, exist_ok=True)
    ranks = options.state / "ranks"
    if not ranks.exists():
        write_ranks(ranks, make_ranks(options.seed))
    config = NanoConfig(vocab_size=Codec(read_ranks(ranks)).vocab_size)
    train(options.state, config, Budget(options.minutes, options.lr, options.seed))


if __name__ == "__main__":
    main()
