"""Which routed experts are in memory, and how the others get there.

`policy` decides what to let go, `simulation` replays recorded routing through a policy, `backends`
read an expert (mapped or directly into slots of our own), `reader` has the threads that do it,
`probe` finds the faster way on this disk, `budget` divides memory, and `residency` is the
`ExpertStore` that puts them together.
"""
