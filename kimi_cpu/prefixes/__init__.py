"""What has been computed is kept: latents of prompts and replies, found by their longest prefix.

cache.py      PrefixCache: sessions that begin with what is known, and what becomes of them
tree.py       blocks of latents in memory, a tree over tokens' keys; what has to go first
disk.py       blocks on disk: written by a thread of its own, shared by processes, bounded
blockfile.py  the format of one block
identity.py   which latents are interchangeable

Tokens are compared by their keys (`attention_form`), which also tell how their latents were
computed: here, and in files, "tokens" are keys, int32.
"""

from kimi_cpu.prefixes.cache import PrefixCache

__all__ = ["PrefixCache"]
