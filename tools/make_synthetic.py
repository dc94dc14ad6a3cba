"""Write a checkpoint of Kimi K2 Thinking's true widths with random weights, to measure on.

The folder has the published format (config.json, generation_config.json, INT4 experts, bf16
rest, shards and index), only with fewer layers and, by default, a smaller vocabulary. Tokenizer and
chat template are of our own making (see synthetic_tokenizer.py): it can be served and chatted with,
though random weights say nothing.

python tools/make_synthetic.py --out DIR --layers 2     # 1 dense + 1 MoE layer, 11 GB
python tools/make_synthetic.py --out DIR --layers 61 --vocab 163840     # all of it, 594 GB

Ctrl-C leaves a folder that the same command completes; so it does one of earlier versions, which
had no tokenizer. The bytes depend on the arguments alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kimi_cpu.config import ModelConfig
from kimi_cpu.errors import ConfigError, UsageError, UserError
from kimi_cpu.quant import GROUP_SIZE, f32_to_bf16
from kimi_cpu.store.checkpoint import INDEX_NAME
from kimi_cpu.store.layout import expert_linears, trunk_linears, vectors
from kimi_cpu.store.safetensors import NUMPY_DTYPES
from kimi_cpu.store.writer import QUANTIZATION
from tools.synthetic_tokenizer import MIN_VOCAB, tokenizer_files

MANIFEST_NAME = "make_synthetic.json"

#: Part of the manifest: raise it when the same arguments begin to give other weights.
GENERATOR_VERSION = 1

#: Left free on the disk after the last shard.
SPARE_BYTES = 64 << 20

#: Bytes made and written at once: what is made stays in the L2 cache. A multiple of 16.
CHUNK_BYTES = 1 << 20

#: A tensor's bytes are random draws from a codebook of this many 32-bit words, so that 16 random
#: bits give 8 INT4 weights: several times faster than drawing and rounding normal numbers.
BOOK_WORDS = 1 << 16

#: Spread of INT4 values before rounding: the largest of 32 normal weights then lands on 7 or so.
NIBBLE_STD = 3.4

#: Spread of the logarithm of INT4 scales.
SCALE_SPREAD = 0.25

#: safetensors' own writer puts tensors of wider types first, then goes by name; so do published
#: files, where a tensor therefore starts at any multiple of 8 bytes.
_DTYPE_RANK = {"F32": 0, "I32": 1, "BF16": 2}

Words = npt.NDArray[np.uint32]
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Arguments:
    """What decides the bytes of a checkpoint; named as the options."""

    layers: int
    dense: int
    experts: int
    vocab: int
    seed: int
    tiny: bool


class Size(NamedTuple):
    """Defaults of the full and the tiny size."""

    experts: int
    vocab: int
    shard_bytes: int
    widths: dict[str, int]


#: Shards of 2 GB instead of the published 9.8: that much is lost when interrupted. The default
#: vocabulary gives the head about the share of a token's traffic that it has under 61 layers.
FULL = Size(
    experts=384,
    vocab=8192,
    shard_bytes=2_000_000_000,
    widths={
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 262144,
        "moe_intermediate_size": 2048,
        "num_attention_heads": 64,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 64,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
)
TINY = Size(
    experts=16,
    vocab=512,
    shard_bytes=200_000,
    widths={
        "hidden_size": 64,
        "intermediate_size": 96,
        "kv_lora_rank": 32,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 32,
        "num_attention_heads": 4,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 48,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
)


def config_values(arguments: Arguments) -> dict[str, Any]:
    """`config.json` as published, with the layers, experts and vocabulary asked for."""
    size = TINY if arguments.tiny else FULL
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "bos_token_id": arguments.vocab - 256,
        "dtype": "bfloat16",
        "eos_token_id": arguments.vocab - 254,
        "ep_size": 1,
        "first_k_dense_replace": arguments.dense,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "kimi_k2",
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": arguments.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_hidden_layers": arguments.layers,
        "num_nextn_predict_layers": 0,
        "pretraining_tp": 1,
        "quantization_config": QUANTIZATION,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 64.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": size.widths["max_position_embeddings"] // 64,
            "type": "yarn",
        },
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "transformers_version": "4.51.3",
        "use_cache": True,
        "vocab_size": arguments.vocab,
        **size.widths,
    }


class Book(NamedTuple):
    """What a tensor's random numbers are: `kind` with `mean` and `std` of the values.

    kind: "bf16" or "f32" normal; "scale": bf16, log-normal around 0 with root mean square `std`;
    "int4": normal, rounded to [-8, 7].
    """

    kind: str
    mean: float
    std: float


class Tensor(NamedTuple):
    """One tensor to write; `content` is its bytes, or the codebook they are drawn from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: Book | bytes

    @property
    def nbytes(self) -> int:
        n_bytes = NUMPY_DTYPES[self.dtype].itemsize
        for n in self.shape:
            n_bytes *= n
        return n_bytes


class Shard(NamedTuple):
    """One file: its name, everything before the data, and the tensors in the data's order."""

    name: str
    head: bytes
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return len(self.head) + sum(tensor.nbytes for tensor in self.tensors)


def tensors_of(config: ModelConfig) -> Iterator[Tensor]:
    """All tensors, layer by layer.

    Weights have variance 1 / in_features. Those that add to the residual stream are smaller by
    sqrt(2 layers), so that it grows by a constant factor whatever the number of layers, and so
    that tokens stay different enough for an even use of the experts.
    """

    def position(name: str) -> int:
        if name.startswith("model.layers."):
            return int(name.split(".")[2])
        return -1 if name.startswith("model.embed") else config.num_hidden_layers

    def weight_std(name: str, in_features: int) -> float:
        damped = name.endswith(("o_proj", "down_proj"))
        return float((in_features * (2 * config.num_hidden_layers if damped else 1)) ** -0.5)

    def vector(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("e_score_correction_bias"):
            return Tensor(name, "F32", shape, Book("f32", 0.0, 0.01))
        if name.endswith("norm.weight"):
            return Tensor(name, "BF16", shape, Book("bf16", 1.0, 0.1))
        std = 1.0 if name.startswith("model.embed") else weight_std(name, shape[1])
        return Tensor(name, "BF16", shape, Book("bf16", 0.0, std))

    def linear(name: str, out_features: int, in_features: int) -> Iterator[Tensor]:
        book = Book("bf16", 0.0, weight_std(name, in_features))
        yield Tensor(f"{name}.weight", "BF16", (out_features, in_features), book)

    def expert(name: str, out_features: int, in_features: int) -> Iterator[Tensor]:
        scale_std = weight_std(name, in_features) / _nibble_rms()
        n_groups = in_features // GROUP_SIZE
        shape = np.array([out_features, in_features], dtype="<i4").tobytes()
        packed_shape, scale_shape = (out_features, in_features // 8), (out_features, n_groups)
        yield Tensor(f"{name}.weight_packed", "I32", packed_shape, Book("int4", 0.0, NIBBLE_STD))
        yield Tensor(f"{name}.weight_scale", "BF16", scale_shape, Book("scale", 0.0, scale_std))
        yield Tensor(f"{name}.weight_shape", "I32", (2,), shape)

    # Each source runs through the layers; the sort is stable, so a layer's experts stay in order.
    trunk = chain.from_iterable(linear(*item) for item in trunk_linears(config))
    experts = chain.from_iterable(expert(*item) for item in expert_linears(config))
    small = (vector(*item) for item in vectors(config))
    yield from sorted(chain(small, trunk, experts), key=lambda tensor: position(tensor.name))


def plan_shards(config: ModelConfig, shard_bytes: int) -> list[Shard]:
    """Cut the tensors into files of at most about `shard_bytes`."""
    groups: list[list[Tensor]] = [[]]
    n_bytes = 0
    for tensor in tensors_of(config):
        if groups[-1] and n_bytes + tensor.nbytes > shard_bytes:
            groups.append([])
            n_bytes = 0
        groups[-1].append(tensor)
        n_bytes += tensor.nbytes
    shards = []
    for i, group in enumerate(groups, start=1):
        group.sort(key=lambda tensor: (_DTYPE_RANK[tensor.dtype], tensor.name))
        name = f"model-{i:05d}-of-{len(groups):06d}.safetensors"
        shards.append(Shard(name, _head(group), tuple(group)))
    return shards


def _head(tensors: Sequence[Tensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _generator(seed: int, name: str) -> np.random.SFC64:
    # Raw output of a bit generator only: NumPy may change how it makes other distributions.
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return np.random.SFC64(int.from_bytes(digest, "little"))


def _shuffled(values: npt.NDArray[Any], seed: int, name: str) -> npt.NDArray[Any]:
    keys = _generator(seed, name).random_raw(len(values))
    return values[np.argsort(keys, kind="stable")]


@lru_cache(maxsize=1)
def _normal_quantiles() -> npt.NDArray[np.float64]:
    normal = NormalDist()
    n = BOOK_WORDS
    return np.array([normal.inv_cdf((i + 0.5) / n) for i in range(n)])


@lru_cache(maxsize=1)
def _nibble_cdf() -> npt.NDArray[np.float64]:
    """Share of INT4 values <= -8, <= -7, ... <= 7."""
    normal = NormalDist(0.0, NIBBLE_STD)
    return np.array([normal.cdf(q + 0.5) for q in range(-8, 7)] + [1.0])


def _nibble_rms() -> float:
    share = np.diff(_nibble_cdf(), prepend=0.0)
    return float(np.sqrt(np.sum(share * np.arange(-8, 8) ** 2)))


@lru_cache(maxsize=2)
def _normal_pairs(seed: int) -> npt.NDArray[np.float64]:
    """[BOOK_WORDS, 2]: both columns hold all quantiles of a normal distribution."""
    columns = [_shuffled(_normal_quantiles(), seed, f"column {i}") for i in (0, 1)]
    return np.stack(columns, axis=1)


@lru_cache(maxsize=64)
def codebook(book: Book, seed: int) -> Words:
    """uint32 [BOOK_WORDS]: 8 INT4 values, 2 bf16 or 1 float32 a word."""
    if book.kind == "int4":
        ends = np.rint(_nibble_cdf() * BOOK_WORDS * 8).astype(np.int64)
        counts = (ends - np.concatenate([[0], ends[:-1]])).tolist()
        nibbles = _shuffled(np.repeat(np.arange(16, dtype=np.uint8), counts), seed, "int4")
        return np.ascontiguousarray(nibbles[0::2] | nibbles[1::2] << 4).view("<u4")
    z = _normal_pairs(seed)
    if book.kind == "f32":
        return (book.mean + book.std * z[:, 0]).astype("<f4").view("<u4")
    if book.kind == "scale":
        # A log-normal number's root mean square is exp(spread^2) times its median.
        values = book.std * np.exp(SCALE_SPREAD * z - SCALE_SPREAD**2)
    else:
        values = book.mean + book.std * z
    return f32_to_bf16(values.astype(np.float32)).astype("<u2").view("<u4")[:, 0]


def chunks(tensor: Tensor, seed: int) -> Iterator[memoryview]:
    """The tensor's bytes; they depend on its name, shape, content and `seed` alone.

    A chunk is valid until the next one is asked for.
    """
    if isinstance(tensor.content, bytes):
        yield memoryview(tensor.content)
        return
    words = codebook(tensor.content, seed)
    generator = _generator(seed, tensor.name)
    buffer = np.empty(CHUNK_BYTES // 4, dtype="<u4")
    for begin in range(0, tensor.nbytes, CHUNK_BYTES):
        n_bytes = min(CHUNK_BYTES, tensor.nbytes - begin)
        drawn = generator.random_raw(-(-n_bytes // 16)).astype("<u8", copy=False).view("<u2")
        out = buffer[: len(drawn)]
        np.take(words, drawn, out=out, mode="clip")  # "raise" would go through a second buffer
        yield out.view(np.uint8).data[:n_bytes]


def is_complete(folder: Path, shard: Shard) -> bool:
    """Whether the shard's file is there with its whole length and the header planned."""
    path = folder / shard.name
    if not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.head)) == shard.head


def write_shard(folder: Path, shard: Shard, seed: int, progress: Progress) -> None:
    """Write one file under a temporary name and rename it once it is safely on the disk."""
    path = folder / shard.name
    part = _part(path)
    try:
        with part.open("wb") as file:
            file.write(shard.head)
            progress(len(shard.head))
            for tensor in shard.tensors:
                for chunk in chunks(tensor, seed):
                    file.write(chunk)
                    progress(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    _write_file(path, (json.dumps(values, indent=2) + "\n").encode())


def _write_file(path: Path, data: bytes) -> None:
    part = _part(path)
    part.write_bytes(data)
    part.replace(path)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _check_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but a checkpoint of these very arguments.

    Raises UsageError.
    """
    hint = "Give another --out, or delete the folder first."
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file, not a folder", hint)
    path = folder / MANIFEST_NAME
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder}: is not empty and was not made by this program", hint)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: is damaged", hint)
    differences = [
        f"{key} {found.get(key)} there, {manifest.get(key)} here"
        for key in sorted(manifest.keys() | found.keys())
        if found.get(key) != manifest.get(key)
    ]
    if differences:
        raise UsageError(f"{folder}: made with other arguments: {'; '.join(differences)}", hint)


def _check_space(folder: Path, needed: int) -> None:
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"{folder}: {needed / 1e9:.2f} GB to write, but only {free / 1e9:.2f} GB are free",
            "Free space, give another --out, or ask for fewer --layers or --experts.",
        )


def make(folder: Path, arguments: Arguments) -> tuple[int, int]:
    """Write the checkpoint, or what is missing of it; returns (bytes, number of shards).

    Raises UsageError (arguments that make no model, a folder of other content) or UserError (not
    enough space), both before anything is written.
    """
    values = config_values(arguments)
    generation = {"eos_token_id": values["eos_token_id"]}
    try:
        config = ModelConfig.from_dict(values, generation, where="the model asked for")
    except ConfigError as error:
        raise UsageError(error.message, error.hint) from None
    manifest = {"generator_version": GENERATOR_VERSION, **asdict(arguments)}
    _check_folder(folder, manifest)
    shards = plan_shards(config, (TINY if arguments.tiny else FULL).shard_bytes)
    total = sum(shard.nbytes for shard in shards)
    missing = [shard for shard in shards if not is_complete(folder, shard)]
    for shard in missing:  # a killed run leaves its last file behind
        _part(folder / shard.name).unlink(missing_ok=True)
    needed = sum(shard.nbytes for shard in missing)
    _check_space(folder, needed)

    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / MANIFEST_NAME, manifest)
    _write_json(folder / "config.json", values)
    _write_json(folder / "generation_config.json", generation)
    for name, data in tokenizer_files(config.vocab_size, config.max_position_embeddings).items():
        _write_file(folder / name, data)
    label, done = str(folder), total - needed
    with tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=label) as bar:
        for shard in missing:
            write_shard(folder, shard, arguments.seed, bar.update)
    # Last, because a folder without it is not taken for a checkpoint.
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    data_bytes = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    index = {"metadata": {"total_size": data_bytes}, "weight_map": weight_map}
    _write_json(folder / INDEX_NAME, index)
    return total, len(shards)


def _arguments(options: argparse.Namespace) -> Arguments:
    size = TINY if options.tiny else FULL
    arguments = Arguments(
        layers=options.layers,
        dense=options.dense,
        experts=size.experts if options.experts is None else options.experts,
        vocab=size.vocab if options.vocab is None else options.vocab,
        seed=options.seed,
        tiny=options.tiny,
    )
    if not 0 <= arguments.dense <= arguments.layers:
        raise UsageError(
            f"--dense {arguments.dense} does not fit --layers {arguments.layers}",
            "--layers counts all layers, dense ones included.",
        )
    if arguments.vocab < MIN_VOCAB:
        raise UsageError(
            f"--vocab {arguments.vocab} is below {MIN_VOCAB}",
            "256 ids are single bytes, the last 256 are special.",
        )
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--layers", type=int, required=True, help="all layers, dense ones included")
    parser.add_argument("--dense", type=int, default=1, help="dense layers, the first (default 1)")
    parser.add_argument("--experts", type=int, help=f"experts a layer (default {FULL.experts})")
    vocab_help = f"token ids (default {FULL.vocab}; the published 163840 add 4.5 GB)"
    parser.add_argument("--vocab", type=int, help=vocab_help)
    parser.add_argument("--seed", type=int, default=0, help="of all weights (default 0)")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help=f"shrink all widths, for tests (default {TINY.experts} experts, {TINY.vocab} ids)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code (130 when interrupted)."""
    options = _parser().parse_args(argv)
    try:
        n_bytes, n_shards = make(options.out, _arguments(options))
    except UserError as error:
        message, hint, code = error.message, error.hint, error.exit_code
    except OSError as error:
        message = f"{error.filename or options.out}: {error.strerror or error}"
        hint, code = "What is complete is kept; the same command continues.", 1
    except KeyboardInterrupt:
        message, hint, code = "interrupted", "The same command continues.", 130
    else:
        print(f"{options.out}: {n_bytes / 1e9:.2f} GB in {n_shards} shards")
        return 0
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
