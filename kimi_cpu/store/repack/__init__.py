"""`kimi-cpu repack`: a published checkpoint into the packed format (docs/format.md).

`source` knows the published one by its headers, `plan` lays out the packed one in pieces, `make`
makes and checks a piece (`convert` has the arithmetic, `files` the reading and writing), `workers`
do that in threads, `progress` remembers what is done, `run` puts them together, and `verify` proves
the result.
"""

from kimi_cpu.store.repack.plan import Options
from kimi_cpu.store.repack.run import LocalShards, Plan, Report, Shards, plan_repack, repack
from kimi_cpu.store.repack.verify import Verified, verify

__all__ = [
    "LocalShards", "Options", "Plan", "Report", "Shards", "Verified", "plan_repack", "repack",
    "verify",
]  # fmt: skip
