"""Strict JSON, and a reader that knows which keys of a config were never looked at."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_cpu.errors import ConfigError, UserError

_MAX_JSON_BYTES = 16 << 20

#: Keys that change nothing in what is computed here: training, generation defaults (the sampler
#: has its own), bookkeeping of transformers, and classification labels.
_HARMLESS = """
_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
attention_dropout attn_implementation auto_map aux_loss_alpha bad_words_ids begin_suppress_tokens
decoder_start_token_id diversity_penalty do_sample dtype early_stopping
encoder_no_repeat_ngram_size ep_size experts_implementation exponential_decay_length_penalty
finetuning_task forced_bos_token_id forced_eos_token_id id2label ignore_index initializer_range
is_decoder label2id length_penalty max_length media_placeholder_token_id min_length
no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp
problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
router_aux_loss_coef sep_token_id seq_aux suppress_tokens task_specific_params temperature
tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
unsloth_version use_bfloat16 use_cache use_unified_vision_chunk video_placeholder vision_config
"""
_HARMLESS_KEYS = frozenset(_HARMLESS.split())


def parse_json_object(
    data: bytes, where: str, error: type[UserError], hint: str = ""
) -> dict[str, Any]:
    """Strict JSON: one object, UTF-8, no duplicate keys, no NaN or Infinity.

    Raises `error` naming `where`, whatever the bytes are.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = counts.most_common(1)[0][0]
            raise error(f"{where}: key {twice[:80]!r} appears twice", hint)
        return result

    def constant(text: str) -> Any:
        raise error(f"{where}: {text} is not a JSON number", hint)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise error(f"{where}: JSON is nested too deeply", hint) from None
    except ValueError as exc:  # also UnicodeDecodeError and over-long integers
        raise error(f"{where}: not valid JSON ({exc})", hint) from None
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, found {type(value).__name__}", hint)
    return value


def load_json_object(
    path: Path, error: type[UserError], hint: str = "", max_bytes: int = _MAX_JSON_BYTES
) -> dict[str, Any]:
    """Read a file as one strict JSON object; raises `error` naming the file."""
    if not path.is_file():
        raise error(f"{path}: no such file", hint)
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as exc:
        raise error(f"{path}: cannot be read ({exc.strerror or exc})", hint) from None
    if len(data) > max_bytes:
        raise error(f"{path}: larger than {max_bytes} bytes", hint)
    return parse_json_object(data, str(path), error, hint)


def short(value: Any) -> str:
    """A value for an error message: on one line, escaped, not too long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def shown(name: str) -> str:
    """A name from a file for an error message: as it is, or escaped if it is odd."""
    return name if name.isprintable() and len(name) <= 200 else ascii(name[:200])


def _is_off(value: Any) -> bool:
    """True for values that switch a feature off: null, false, 0, "", [] and {}."""
    return not value


class Reader:
    """Takes keys out of a config one by one, and knows at the end which were never taken."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self.taken: set[str] = set()

    def fail(self, key: str, problem: str, hint: str = "") -> ConfigError:
        return ConfigError(f"{self.where}: {shown(key)} {problem}", hint)

    def get(self, key: str, default: Any = None) -> Any:
        self.taken.add(key)
        return self.values.get(key, default)

    def need(self, key: str) -> Any:
        if key not in self.values:
            raise self.fail(key, "is missing", "Use the checkpoint's own, complete config.json.")
        return self.get(key)

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.need(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, f"= {short(value)} is no integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        value = self.need(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"= {short(value)} is no number")
        if not low <= value <= high:
            raise self.fail(key, f"= {short(value)} lies outside {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.need(key)
        if not isinstance(value, bool):
            raise self.fail(key, f"= {short(value)} is neither true nor false")
        return value

    def only(self, key: str, allowed: Any, reason: str) -> None:
        """Accept a missing key or `allowed`; refuse any other value with `reason`."""
        value = self.get(key, allowed)
        if type(value) is not type(allowed) or value != allowed:
            raise self.fail(
                key,
                f"= {short(value)} is not supported: {reason}",
                f"Only {key} = {json.dumps(allowed)} is implemented.",
            )

    def finish(self) -> None:
        """Refuse keys that were neither read nor known to be harmless, unless they are off."""
        for key, value in self.values.items():
            if key in self.taken or key in _HARMLESS_KEYS or _is_off(value):
                continue
            raise self.fail(
                key,
                f"= {short(value)} is not understood and could change the computation",
                "If you know that it does not, remove the key from config.json (or set it to "
                "null); otherwise this engine cannot run the model.",
            )
