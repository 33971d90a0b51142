"""What the forward and the backward kernels have in common: owned weight tiles, biases, activations, dropout.

Conventions: D is the width, r the bottleneck, E the experts of a projection; an id is -1 (merged) or an expert, and
any other id owns nothing. Statistics and sums are float32. Tiles are padded to powers of two: columns past D or r are
loaded as zero, so that they add nothing to a product.
"""

from __future__ import annotations

import triton
import triton.language as tl

MERGED = tl.constexpr(-1)  # the expert id that means: all of them, averaged
NOBODY = tl.constexpr(-2)  # one that owns nothing
SQRT_HALF = tl.constexpr(0.7071067811865476)
KEEP_NORMAL, READ_AGAIN, READ_ONCE = tl.constexpr(""), tl.constexpr("evict_last"), tl.constexpr("evict_first")
PHILOX_ROUNDS = tl.constexpr(7)
INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)  # the normal density at 0


@triton.jit
def load_tile(pointers, mask, EVEN: tl.constexpr, EVICTION: tl.constexpr = KEEP_NORMAL):
    """Masked load, without the mask where the tile is known to lie inside: whole 16-byte vectors, no predicates.

    EVICTION: what the L2 cache is told: READ_AGAIN, READ_ONCE or nothing.
    """
    if EVEN:
        tile = tl.load(pointers, eviction_policy=EVICTION)
    else:
        tile = tl.load(pointers, mask=mask, other=0, eviction_policy=EVICTION)
    return tile


@triton.jit
def mask_if(mask, condition):
    """The mask where a scalar condition holds, else nothing.

    Not `mask & condition`: the interpreter of Triton 3.9 makes integers of a scalar condition that is broadcast.
    """
    return (mask.to(tl.int32) & condition.to(tl.int32)) != 0


@triton.jit
def ownership(owner, expert, inverse_experts):
    """How much of each weight the group uses: 1 or 0 for an expert, 1 / E merged. owner: int tile -> float32."""
    owned = tl.where(owner.to(tl.int32) == expert, 1.0, 0.0)
    return tl.where(expert == MERGED, inverse_experts, owned)


@triton.jit
def weight_tile(weight_ptr, init_ptr, owner_ptr, offsets, mask, expert, inverse_experts, EVEN: tl.constexpr):
    """The weights that the group computes with, W0 + (W - W0) * ownership, float32, made in registers.

    Reads 4 bytes a weight, 1 more for its owner where the projection is split and 4 more for W0 where there is one.
    """
    weight = load_tile(weight_ptr + offsets, mask, EVEN).to(tl.float32)
    if owner_ptr is not None:
        owned = ownership(load_tile(owner_ptr + offsets, mask, EVEN), expert, inverse_experts)
        if init_ptr is not None:
            init = load_tile(init_ptr + offsets, mask, EVEN).to(tl.float32)
            weight = init + (weight - init) * owned
        else:
            weight = weight * owned
    return weight


@triton.jit
def bias_vector(bias_ptr, columns, valid, stride, expert, inverse_experts, EXPERTS: tl.constexpr, SPLIT: tl.constexpr):
    """The group's bias for some columns: its expert's row of `[E, stride]`, or the mean of all rows. float32.

    All rows form one tile whose unused rows are never read, not a loop: a loop here would keep the compiler from
    pipelining the loop around it.
    """
    if SPLIT:
        EXPERTS_PADDED: tl.constexpr = triton.next_power_of_2(EXPERTS)
        rows = tl.arange(0, EXPERTS_PADDED)
        owned = tl.where(rows < EXPERTS, ownership(rows, expert, inverse_experts), 0.0)[:, None]
        pointers = bias_ptr + rows[:, None] * stride + columns[None, :]
        table = tl.load(pointers, mask=(owned != 0.0) & valid[None, :], other=0.0).to(tl.float32)
        bias = tl.sum(table * owned, axis=0)
    else:
        bias = tl.load(bias_ptr + columns, mask=valid, other=0.0).to(tl.float32)
    return bias


@triton.jit
def slot_of(
    experts_ptr, group, projection: tl.constexpr, EXPERTS: tl.constexpr, SPLIT: tl.constexpr, BY_EXPERT: tl.constexpr
):
    """Which of a projection's prepared weights a group computes with (prepare_weights.py), int64.

    projection: 0 down, 1 up. BY_EXPERT: there is a slot for each expert, one for merged and one for any other id.
    """
    slot = group.to(tl.int64)
    if not SPLIT:
        slot *= 0
    elif BY_EXPERT:
        expert = tl.load(experts_ptr + 2 * group + projection).to(tl.int64)
        known = (expert >= 0) & (expert < EXPERTS)
        slot = tl.where(known, expert, tl.where(expert == MERGED, EXPERTS, EXPERTS + 1))
    return slot


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """GELU (exact), ReLU or SiLU of a float32 tile."""
    if ACTIVATION == "gelu":
        hidden = 0.5 * z * (1.0 + tl.math.erf(z * SQRT_HALF))
    elif ACTIVATION == "relu":
        hidden = tl.maximum(z, 0.0)
    else:
        tl.static_assert(ACTIVATION == "silu", "unknown activation")
        hidden = z * tl.sigmoid(z)
    return hidden


@triton.jit
def activation_derivative(z, ACTIVATION: tl.constexpr):
    """The derivative of `activate` at z."""
    if ACTIVATION == "gelu":
        cumulative = 0.5 * (1.0 + tl.math.erf(z * SQRT_HALF))
        slope = cumulative + z * tl.exp(-0.5 * z * z) * INVERSE_SQRT_TWO_PI
    elif ACTIVATION == "relu":
        slope = tl.where(z > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "silu", "unknown activation")
        gate = tl.sigmoid(z)
        slope = gate * (1.0 + z * (1.0 - gate))
    return slope


@triton.jit
def dropout_factor(
    seed_ptr, group, rows, tokens, threshold, keep_scale, FIRST_SAMPLE: tl.constexpr, BLOCK_BOTTLENECK: tl.constexpr
):
    """What dropout multiplies the hidden tile by: 0 or 1 / (1 - p); float32 `[rows, BLOCK_BOTTLENECK]`.

    The 16-bit number of channel c is half c % 2 of lane c % 8 // 2 of Philox-4x32-7 with key seed[0] and counter
    (c // 8, token, first_sample + sample, group), as `mosa_fast.ops.philox.dropout_keep` defines it: eight channels a
    call. The activation survives where its number is at least `threshold`.

    Args:
        rows: int32, row numbers within the group, sample-major: sample * tokens + token.
        FIRST_SAMPLE: seed has a second element, the global index of the first sample.
    """
    first_sample = tl.load(seed_ptr + 1) if FIRST_SAMPLE else 0
    octets = tl.arange(0, BLOCK_BOTTLENECK // 8).to(tl.uint32)[None, :]
    sample = (rows // tokens + first_sample).to(tl.uint32)[:, None]
    token = (rows % tokens).to(tl.uint32)[:, None]
    zero = octets * 0 + token * 0
    word0, word1, word2, word3 = tl.philox(
        tl.load(seed_ptr), octets + zero, token + zero, sample + zero, group.to(tl.uint32) + zero, PHILOX_ROUNDS
    )
    # Interleavings put half h of lane l of octet o at channel 8 o + 2 l + h. A half is compared in the upper bits of a
    # word, where those below it decide nothing.
    even = tl.join(word0, word2).reshape([rows.shape[0], BLOCK_BOTTLENECK // 4])
    odd = tl.join(word1, word3).reshape([rows.shape[0], BLOCK_BOTTLENECK // 4])
    words = tl.join(even, odd).reshape([rows.shape[0], BLOCK_BOTTLENECK // 2])
    numbers = tl.join(words << 16, words).reshape([rows.shape[0], BLOCK_BOTTLENECK])
    return tl.where(numbers >= threshold.to(tl.uint32) << 16, keep_scale, 0.0)


NO_RANK = tl.constexpr(1 << 20)  # the first rank of columns that belong to no target: past every rank


@triton.jit
def block_of_columns(block, RANGES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Where a block of columns lies, when ranges of columns are cut into blocks one after the other.

    RANGES: for each (first column, last but one, row of the up-weight that belongs to the first column, first rank of
    its target). A block never reaches into the next range.

    Returns:
        The block's first column, its range's end, its first row of the up-weight, and its target's first rank.
    """
    start = block * BLOCK_COLUMNS
    end = start * 0
    row = start * 0
    rank = start * 0
    first = 0  # block of the range
    for index in tl.static_range(len(RANGES)):
        last = first + (RANGES[index][1] - RANGES[index][0] + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
        inside = (block >= first) & (block < last)
        columns_before = (block - first) * BLOCK_COLUMNS
        start = tl.where(inside, RANGES[index][0] + columns_before, start)
        end = tl.where(inside, RANGES[index][1], end)
        row = tl.where(inside, RANGES[index][2] + columns_before, row)
        rank = tl.where(inside, RANGES[index][3], rank)
        first = last
    return start, end, row, rank


@triton.jit
def target_tile(
    weight_ptr,
    owner_ptr,
    experts,
    inverse_experts,
    row,
    column_valid,
    first_rank,
    ranks,
    RANK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Up-weights of a block of columns as a tile `[BLOCK_COLUMNS, ranks of all targets]`, float32.

    Zero but for the ranks of the columns' own target: one product serves all targets, at the price of multiplying by
    zeros, which the tensor cores have time for. experts: the up-expert of each rank's target.
    """
    own = ranks - first_rank
    rows = row + tl.arange(0, BLOCK_COLUMNS)
    valid = column_valid[:, None] & ((own >= 0) & (own < RANK))[None, :]
    offsets = rows[:, None] * RANK + own[None, :]
    return weight_tile(weight_ptr, None, owner_ptr, offsets, valid, experts[None, :], inverse_experts, EVEN)


@triton.jit
def target_experts(experts_ptr, projection, group, groups, ranks, RANK: tl.constexpr, RANKS: tl.constexpr):
    """The expert of each rank's target for one group; projection: 0 down, 1 up. experts: int32 `[T, V, 2]`."""
    return tl.load(experts_ptr + ((ranks // RANK) * groups + group) * 2 + projection, mask=ranks < RANKS, other=0)
