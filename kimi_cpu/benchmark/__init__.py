"""Measuring the engine: what `kimi-cpu bench` shows and `bench/` records.

`traffic` counts bytes and time spent by part, `pagecache` empties the system's page cache of our
files, `runner` measures.
"""
