"""`kimi-cpu inspect` on a tiny checkpoint and on a config alone."""

from __future__ import annotations

import json
import shutil

import pytest

from kimi_cpu.cli.inspect import count, size
from kimi_cpu.cli.main import main
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=1)


def test_text(tiny, capsys):
    assert main(["inspect", str(tiny)]) == 0
    out = capsys.readouterr().out
    for word in ("kimi_k2", "experts", "MLA", "YaRN", "tensors", "INT4", "RAM at least"):
        assert word in out
    assert "�" not in out and max(map(len, out.splitlines())) < 200


def test_json(tiny, capsys):
    assert main(["inspect", "--json", str(tiny)]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["path"] == str(tiny) and value["total_bytes"] == (
        value["expert_bytes"] + value["trunk_bytes"]
    )


def test_config_alone(tiny, tmp_path, capsys):
    shutil.copy(tiny / "config.json", tmp_path)
    assert main(["inspect", str(tmp_path / "config.json")]) == 0
    assert "none here; as published" in capsys.readouterr().out


def test_damaged_is_an_error(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "m")
    shard = next((tmp_path / "m").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    assert main(["inspect", str(tmp_path / "m")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and shard.name in err


def test_sizes_for_people():
    assert [size(n) for n in (0, 999, 24.8e6, 594.2e9)] == ["0 B", "999 B", "24.8 MB", "594 GB"]
    assert [count(n) for n in (5, 7.7e6, 1.03e12)] == ["5", "7.7 M", "1.03 T"]
