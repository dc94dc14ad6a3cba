"""What a machine will do with a model, before it does it, and whether it is set up for it.

`shape` says what a model consists of, from a checkpoint or from the config of one that is not here;
`machine` measures memory, disk and arithmetic in seconds; `routing` replays choices of experts
through the store's own policy to get hit rates; `predict` makes rates and times of these; `advice`
computes what would change them most. `checks` looks at the installation for `kimi-cpu doctor`.
"""
