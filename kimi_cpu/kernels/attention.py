"""Causal attention with an online softmax over blocks of cache rows.

Decode: the queries are the heads of the tokens, keys and values the latents themselves, shared by
all heads, of one or several timelines, in blocks of BLOCK_TOKENS rows anywhere in memory. The rows
are cut into splits of SPLIT_ROWS at fixed places, so that threads share a long context; an item (a
group of queries, a split) leaves unnormalised sums, which are then merged.
Prefill: the queries are the tokens of one head. Nothing of size T x S exists. Borders of blocks and
splits lie at fixed rows, so a query's result depends neither on the queries that are computed with
it nor on the number of threads.

`scratch` is the address of work space for up to `slots` ranges at a time: `slots` cells of 64
bytes, zero in the beginning, and then `slots` areas. Addresses should be multiples of 64.
"""

from __future__ import annotations

import numpy as np

from kimi_cpu.kernels.attention_tile import (
    BLOCK_ROWS,
    FORM_BF16,
    FORM_F32,
    LANE_GROUP,
    PANEL,
    PANEL_GAP,
    ROW_STEP,
    TILE,
    exchange,
    fill,
    pack_queries,
    pack_rows_bf16,
    pack_rows_f32,
    scale_to,
    scores_tile,
    softmax_block,
    values_tile,
)
from kimi_cpu.kernels.common import BLOCK_TOKENS, KIND_BF16, KIND_F32
from kimi_cpu.kernels.isa import jit, standalone
from kimi_cpu.kernels.simd import load_f32, load_i32, load_i64, store_i32

#: Rows of a timeline that one item of decode attention covers; a multiple of BLOCK_ROWS.
SPLIT_ROWS = 1024
assert BLOCK_TOKENS % BLOCK_ROWS == 0 == SPLIT_ROWS % BLOCK_ROWS
#: Queries of a head that share packed keys and values in prefill.
QUERY_BLOCK = 8 * LANE_GROUP

#: Bytes of scratch that say whether a slot is in use.
SLOT_CELL = 64


def _panels(n: int) -> int:
    return -(-n // PANEL)


def query_bytes(form: int, key_dim: int, p_dim: int) -> int:
    """Size of a group's transposed queries, a multiple of 64."""
    size = 4 if form == FORM_F32 else 2
    return (_panels(key_dim) + _panels(p_dim)) * PANEL * size * LANE_GROUP


def state_bytes(v_dim: int) -> int:
    """Size of a group's running maxima, sums, limits and weighted values."""
    return (3 + _panels(v_dim) * PANEL) * LANE_GROUP * 4


def _block_bytes(form: int, key_dim: int, p_dim: int, v_dim: int) -> int:
    size = 4 if form == FORM_F32 else 2
    panels = _panels(key_dim) + _panels(p_dim) + _panels(v_dim)
    panel_bytes = BLOCK_ROWS * PANEL * size + PANEL_GAP
    return panels * panel_bytes + (BLOCK_ROWS + 1) * LANE_GROUP * 4


def decode_scratch_bytes(form: int, rank: int, p_dim: int) -> int:
    """Size of a slot of `decode_range`."""
    return _block_bytes(form, rank, p_dim, rank)


def prefill_scratch_bytes(form: int, n_dim: int, p_dim: int, v_dim: int) -> int:
    """Size of a slot of `prefill_range`."""
    groups = QUERY_BLOCK // LANE_GROUP
    own = groups * (query_bytes(form, n_dim, p_dim) + state_bytes(v_dim))
    return own + _block_bytes(form, n_dim, p_dim, v_dim)


def decode_groups(n_tokens: int, n_heads: int) -> int:
    """Groups of the queries of a timeline in a decode attention."""
    return -(-n_tokens * n_heads // LANE_GROUP)


def decode_splits(rows: int) -> int:
    """Splits of so many rows."""
    return -(-rows // SPLIT_ROWS)


@jit
def _claim(scratch, slots):  # type: ignore[no-untyped-def]
    """Number of a slot that was free and now is not."""
    slot = 0
    while exchange(scratch + slot * SLOT_CELL, 1) != 0:
        slot = slot + 1 if slot + 1 < slots else 0
    return slot


@jit
def _start_group(  # type: ignore[no-untyped-def]
    state, v_dim, first_query, n_queries, divisor, position
):
    """Nothing seen yet; query i sees the rows 0 .. position + i // divisor."""
    fill(state, -np.inf, LANE_GROUP)
    fill(state + LANE_GROUP * 4, 0.0, LANE_GROUP)
    for lane in range(LANE_GROUP):
        query = min(first_query + lane, n_queries - 1)
        store_i32(state + (2 * LANE_GROUP + lane) * 4, position + 1 + query // divisor)
    fill(state + 3 * LANE_GROUP * 4, 0.0, (v_dim + PANEL - 1) // PANEL * PANEL * LANE_GROUP)


@jit
def _in_block(  # type: ignore[no-untyped-def]
    table, row, keys, key_stride, k_pe, k_pe_stride
):
    """Addresses of a row's key and rotated key in its block."""
    block, inner = load_i64(table + row // BLOCK_TOKENS * 8), row % BLOCK_TOKENS
    return block + keys + inner * key_stride, block + k_pe + inner * k_pe_stride


@standalone
def _attend(  # type: ignore[no-untyped-def]
    form, queries, state, n_queries, table, keys, key_stride, k_pe, k_pe_stride, is_bf16, values,
    value_stride, n_dim, p_dim, v_dim, row_start, row_stop, scratch,
):  # fmt: skip
    """Add the rows row_start .. row_stop-1 to the groups of n_queries queries.

    A key is n_dim numbers at keys and p_dim at k_pe, bf16 bits if is_bf16 (k_pe only, if there
    are own values); values 0 means that the first v_dim key dimensions are the values. With a
    table the rows lie in blocks, and keys and k_pe are distances from a block's address; then
    there are no own values. Strides in bytes; form is FORM_F32 or FORM_BF16.
    """
    row_bytes = LANE_GROUP * 4
    size = 4 if form == FORM_F32 else 2
    n_panels = (n_dim + PANEL - 1) // PANEL
    p_panels = (p_dim + PANEL - 1) // PANEL
    v_panels = (v_dim + PANEL - 1) // PANEL
    panel_bytes = BLOCK_ROWS * PANEL * size + PANEL_GAP
    group_bytes = (n_panels + p_panels) * PANEL * size // 4 * row_bytes
    out_stride = v_panels * PANEL * 4
    group_state = 3 * row_bytes + LANE_GROUP * out_stride
    pe_at = scratch + n_panels * panel_bytes
    own_values_at = pe_at + p_panels * panel_bytes
    values_at = scratch if form == FORM_F32 and values == 0 else own_values_at
    scores_at = own_values_at + v_panels * panel_bytes
    alpha_at = scores_at + BLOCK_ROWS * row_bytes
    keys_bf16 = is_bf16 and values == 0
    row_length = n_dim * (2 if keys_bf16 else 4) + (0 if values == 0 else v_dim * 4)
    ahead_lines = (row_length // 64 + n_panels + p_panels - 1) // (n_panels + p_panels)
    for first in range(row_start, row_stop, BLOCK_ROWS):
        n = min(BLOCK_ROWS, row_stop - first)
        rows = (n + ROW_STEP - 1) // ROW_STEP * ROW_STEP
        key, pe = keys + first * key_stride, k_pe + first * k_pe_stride
        following = key + BLOCK_ROWS * key_stride
        if table != 0:
            key, pe = _in_block(table, first, keys, key_stride, k_pe, k_pe_stride)
            following = key
            if first + BLOCK_ROWS < row_stop:
                following, _ = _in_block(
                    table, first + BLOCK_ROWS, keys, key_stride, k_pe, k_pe_stride
                )
        value = values + first * value_stride
        if form == FORM_F32:
            if keys_bf16:
                pack_rows_f32(KIND_BF16, key, key_stride, n, rows, n_dim, scratch)
            else:
                pack_rows_f32(KIND_F32, key, key_stride, n, rows, n_dim, scratch)
            if is_bf16:
                pack_rows_f32(KIND_BF16, pe, k_pe_stride, n, rows, p_dim, pe_at)
            else:
                pack_rows_f32(KIND_F32, pe, k_pe_stride, n, rows, p_dim, pe_at)
            if values != 0:
                pack_rows_f32(KIND_F32, value, value_stride, n, rows, v_dim, values_at)
        else:
            if keys_bf16:
                pack_rows_bf16(KIND_BF16, key, key_stride, n, rows, n_dim, scratch, values_at)
            else:
                pack_rows_bf16(KIND_F32, key, key_stride, n, rows, n_dim, scratch, 0)
                pack_rows_bf16(KIND_F32, value, value_stride, n, rows, v_dim, 0, values_at)
            pack_rows_bf16(KIND_BF16, pe, k_pe_stride, n, rows, p_dim, pe_at, 0)
        for first_query in range(0, n_queries, LANE_GROUP):
            group = first_query // LANE_GROUP
            query, m = queries + group * group_bytes, state + group * group_state
            limits, out = m + 2 * row_bytes, m + 3 * row_bytes
            seen = min(n, load_i32(limits + row_bytes - 4) - first)
            if seen <= 0:
                continue
            seen = (seen + ROW_STEP - 1) // ROW_STEP * ROW_STEP
            lanes = min(LANE_GROUP, n_queries - first_query)
            if form == FORM_F32:
                for r in range(0, seen, TILE):
                    scores_tile(
                        FORM_F32, scratch + r * PANEL * 4, query, n_panels + p_panels,
                        scores_at + r * row_bytes, following + r * key_stride, key_stride,
                        ahead_lines if group == 0 else 0,
                    )  # fmt: skip
                softmax_block(FORM_F32, scores_at, seen, first, limits, m, alpha_at)
                for p in range(v_panels):
                    for lane in range(0, lanes, TILE):
                        values_tile(
                            FORM_F32, scores_at + lane * 4, values_at + p * panel_bytes, seen,
                            alpha_at + lane * 4, out + lane * out_stride + p * PANEL * 4,
                            out_stride,
                        )  # fmt: skip
            else:
                for r in range(0, seen, TILE):
                    scores_tile(
                        FORM_BF16, scratch + r * PANEL * 2, query, n_panels + p_panels,
                        scores_at + r * row_bytes, following + r * key_stride, key_stride,
                        ahead_lines if group == 0 else 0,
                    )  # fmt: skip
                softmax_block(FORM_BF16, scores_at, seen, first, limits, m, alpha_at)
                for p in range(v_panels):
                    for lane in range(0, lanes, TILE):
                        values_tile(
                            FORM_BF16, scores_at + lane * 4, values_at + p * panel_bytes,
                            seen // 2, alpha_at + lane * 4,
                            out + lane * out_stride + p * PANEL * 4, out_stride,
                        )  # fmt: skip


@jit
def _pack_group(  # type: ignore[no-untyped-def]
    form, q, q_stride, q_pe, q_pe_stride, n, n_dim, p_dim, scale, out
):
    """A group's transposed queries: n_dim numbers at q and p_dim at q_pe, times scale."""
    size = 4 if form == FORM_F32 else 2
    pe_at = out + (n_dim + PANEL - 1) // PANEL * PANEL * size * LANE_GROUP
    if form == FORM_F32:
        pack_queries(FORM_F32, q, q_stride, n, n_dim, scale, out)
        pack_queries(FORM_F32, q_pe, q_pe_stride, n, p_dim, scale, pe_at)
    else:
        pack_queries(FORM_BF16, q, q_stride, n, n_dim, scale, out)
        pack_queries(FORM_BF16, q_pe, q_pe_stride, n, p_dim, scale, pe_at)


@jit
def decode_items(starts, timelines, n_tokens, n_queries):  # type: ignore[no-untyped-def]
    """Items of a decode attention: for each timeline, groups of n_queries queries x splits."""
    n_groups, items = (n_queries + LANE_GROUP - 1) // LANE_GROUP, 0
    for i in range(timelines):
        items += (load_i64(starts + i * 8) + n_tokens + SPLIT_ROWS - 1) // SPLIT_ROWS * n_groups
    return items


@jit
def decode_pack_range(  # type: ignore[no-untyped-def]
    form, q_lat, q_pe, queries, n_queries, rank, p_dim, scale, start, stop
):
    """Transpose the groups start .. stop-1 of q_lat [B T H, R] and q_pe [B T H, P] into queries.

    n_queries = T H are of one timeline; a group has none of two.
    """
    size = 4 if form == FORM_F32 else 2
    panels = (rank + PANEL - 1) // PANEL + (p_dim + PANEL - 1) // PANEL
    n_groups = (n_queries + LANE_GROUP - 1) // LANE_GROUP
    for group in range(start, stop):
        own = group % n_groups * LANE_GROUP
        first = group // n_groups * n_queries + own
        _pack_group(
            form, q_lat + first * rank * 4, rank * 4, q_pe + first * p_dim * 4, p_dim * 4,
            min(LANE_GROUP, n_queries - own), rank, p_dim, scale,
            queries + group * panels * PANEL * size * LANE_GROUP,
        )  # fmt: skip


@jit
def decode_range(  # type: ignore[no-untyped-def]
    form, queries, tables, starts, c_kv, k_pe, is_bf16, states, n_tokens, n_heads, rank, p_dim,
    scratch, slots, slot_bytes, start, stop,
):  # fmt: skip
    """Items start .. stop-1 of a decode attention over the latents of some timelines.

    Token t of a timeline sees its rows 0 .. position + t. A timeline's items follow those of the
    one before; its item split * n_groups + group leaves its sums in states, one for each item.
    tables, starts, c_kv and k_pe are those of `common.Latents`; queries come from
    `decode_pack_range`; FORM_BF16 needs bf16 latents.
    """
    n_queries = n_tokens * n_heads
    n_groups = (n_queries + LANE_GROUP - 1) // LANE_GROUP
    size = 4 if form == FORM_F32 else 2
    panels = (rank + PANEL - 1) // PANEL
    group_bytes = (panels + (p_dim + PANEL - 1) // PANEL) * PANEL * size * LANE_GROUP
    item_bytes = (3 + panels * PANEL) * LANE_GROUP * 4
    element = 2 if is_bf16 else 4
    slot = _claim(scratch, slots)
    place = scratch + slots * SLOT_CELL + slot * slot_bytes
    timeline, first_item = 0, 0
    while start < stop:
        items = decode_items(starts + timeline * 8, np.int64(1), n_tokens, n_queries)
        if start >= first_item + items:
            timeline += 1
            first_item += items
            continue
        position = load_i64(starts + timeline * 8)
        split = (start - first_item) // n_groups
        group = start - first_item - split * n_groups
        last = min(n_groups, group + stop - start)
        for g in range(group, last):
            _start_group(
                states + (start + g - group) * item_bytes, rank, g * LANE_GROUP, n_queries,
                n_heads, position,
            )  # fmt: skip
        end = min(n_queries, last * LANE_GROUP)
        most = position + 1 + (end - 1) // n_heads
        _attend(
            form, queries + (timeline * n_groups + group) * group_bytes,
            states + start * item_bytes, end - group * LANE_GROUP, load_i64(tables + timeline * 8),
            c_kv, rank * element, k_pe, p_dim * element, is_bf16, 0, 0, rank, p_dim, rank,
            split * SPLIT_ROWS, min(most, (split + 1) * SPLIT_ROWS), place,
        )  # fmt: skip
        start += last - group
    exchange(scratch + slot * SLOT_CELL, 0)


@jit
def decode_merge_range(  # type: ignore[no-untyped-def]
    states, out, n_tokens, n_heads, rank, starts, start, stop
):
    """Queries start .. stop-1 (token * n_heads + head) of out [B T, H, R] from the items' sums."""
    n_queries = n_tokens * n_heads
    n_groups = (n_queries + LANE_GROUP - 1) // LANE_GROUP
    padded = (rank + PANEL - 1) // PANEL * PANEL
    item_bytes = (3 + padded) * LANE_GROUP * 4
    for query in range(start, stop):
        timeline = query // n_queries
        own = query - timeline * n_queries
        lane = own % LANE_GROUP
        item = decode_items(starts, timeline, n_tokens, n_queries) + own // LANE_GROUP
        state = states + item * item_bytes + lane * 4
        n_splits = (load_i64(starts + timeline * 8) + own // n_heads) // SPLIT_ROWS + 1
        largest = load_f32(state)
        for split in range(1, n_splits):
            largest = max(largest, load_f32(state + split * n_groups * item_bytes))
        total = 0.0
        for split in range(n_splits):
            at = state + split * n_groups * item_bytes
            total += load_f32(at + LANE_GROUP * 4) * 2.0 ** (load_f32(at) - largest)
        for split in range(n_splits):
            at = state + split * n_groups * item_bytes
            factor = 2.0 ** (load_f32(at) - largest) / total
            values = at - lane * 4 + (3 * LANE_GROUP + lane * padded) * 4
            scale_to(values, factor, 0.0 if split == 0 else 1.0, out + query * rank * 4, rank)


@jit
def prefill_range(  # type: ignore[no-untyped-def]
    form, q_nope, q_pe, keys, k_pe, is_bf16, out, n_tokens, n_heads, n_dim, p_dim, v_dim, position,
    scale, scratch, slots, slot_bytes, start, stop,
):  # fmt: skip
    """Items start .. stop-1 of a prefill attention; token t sees the rows 0 .. position + t.

    An item is a block of QUERY_BLOCK tokens of a head, the longest first. keys are float32
    [S, H, n_dim + v_dim], each head's keys and then its values; k_pe is [S, P], bf16 bits if
    is_bf16, which FORM_BF16 needs.
    """
    n_blocks = (n_tokens + QUERY_BLOCK - 1) // QUERY_BLOCK
    size = 4 if form == FORM_F32 else 2
    panels = (n_dim + PANEL - 1) // PANEL + (p_dim + PANEL - 1) // PANEL
    group_bytes = panels * PANEL * size * LANE_GROUP
    padded = (v_dim + PANEL - 1) // PANEL * PANEL
    item_bytes = (3 + padded) * LANE_GROUP * 4
    key_stride = n_heads * (n_dim + v_dim) * 4
    slot = _claim(scratch, slots)
    queries = scratch + slots * SLOT_CELL + slot * slot_bytes
    states = queries + QUERY_BLOCK // LANE_GROUP * group_bytes
    place = states + QUERY_BLOCK // LANE_GROUP * item_bytes
    for item in range(start, stop):
        head = item % n_heads
        t = (n_blocks - 1 - item // n_heads) * QUERY_BLOCK
        n = min(QUERY_BLOCK, n_tokens - t)
        at = t * n_heads + head
        for first in range(0, n, LANE_GROUP):
            group, here = first // LANE_GROUP, at + first * n_heads
            _pack_group(
                form, q_nope + here * n_dim * 4, n_heads * n_dim * 4, q_pe + here * p_dim * 4,
                n_heads * p_dim * 4, min(LANE_GROUP, n - first), n_dim, p_dim, scale,
                queries + group * group_bytes,
            )  # fmt: skip
            _start_group(
                states + group * item_bytes, v_dim, t + first, n_tokens, np.int64(1), position
            )
        head_keys = keys + head * (n_dim + v_dim) * 4
        _attend(
            form, queries, states, n, 0, head_keys, key_stride, k_pe,
            p_dim * (2 if is_bf16 else 4), is_bf16, head_keys + n_dim * 4, key_stride, n_dim,
            p_dim, v_dim, 0, position + t + n, place,
        )  # fmt: skip
        for i in range(n):
            lane = i % LANE_GROUP
            state = states + i // LANE_GROUP * item_bytes
            values = state + (3 * LANE_GROUP + lane * padded) * 4
            factor = np.float32(1.0) / load_f32(state + (LANE_GROUP + lane) * 4)
            scale_to(values, factor, 0.0, out + (at + i * n_heads) * v_dim * 4, v_dim)
    exchange(scratch + slot * SLOT_CELL, 0)
