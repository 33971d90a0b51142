"""The weights that each group computes with, made once a pass for all layers of a model, in one launch.

For each layer, and each slot of it with experts (d, u), with g and b the weight and bias of the layer's norm:

    prepared_down    = W_down[d] diag(g)                [R', D']    in the product dtype
    prepared_up      = W_up[u]                          [D', R']    in the product dtype
    prepared_vectors = e = W_down[d] b + b_down[d]      [R']        float32
                       w = row sums of prepared_down    [R']        float32, as it is rounded, so that the mean cancels
    prepared_up_bias = b_up[u]                          [D']        float32

with W[e] = W0 + (W - W0) * [owner == e], or W0 + (W - W0) / E merged. Padded with zeros to R' ranks and D' columns, so
that kernels need neither masks, owners nor arithmetic for weights. A projection that is not split has one slot. One
that is has a slot for every group; or, where that would be more, for every expert, for merged, and for ids out of range
(`slot_of` in device_functions.py says which is whose).

Bytes a layer and slot: read 4 to 9 a weight of both projections (float32, its owner, W0), written 2 or 4. A ViT-B of 12
layers with r = 64, both projections split, for two groups in bfloat16: 20 MB read, half of them from the L2 cache, and
4.7 MB written. What it saves: each program of the forward (BLOCK_ROWS tokens) reads 4 D r bytes of both projections for
9 D r with one of them split, 14 D r with both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mosa_fast.kernels.device_functions import MERGED, NOBODY, bias_vector, load_tile, weight_tile


@triton.jit(do_not_specialize=["groups", "down_slots", "up_slots"])
def prepare_weights_kernel(
    norm_weight_ptrs,
    norm_bias_ptrs,
    down_weight_ptrs,
    down_bias_ptrs,
    up_weight_ptrs,
    up_bias_ptrs,
    down_init_ptrs,
    down_owner_ptrs,
    up_owner_ptrs,
    experts_ptr,
    prepared_down_ptr,
    prepared_up_ptr,
    prepared_vectors_ptr,
    prepared_up_bias_ptr,
    groups,
    down_slots,
    up_slots,
    WIDTH: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    BLOCK_BOTTLENECK: tl.constexpr,
    DOWN_EXPERTS: tl.constexpr,
    UP_EXPERTS: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One program: BLOCK_ROWS ranks of a slot's down-projection, or as many weights of an up-projection.

    The second axis of the grid is the layer. Of each kind of tensor there is a pointer for every layer, or None.
    experts: int32 `[layers, V, 2]`. BY_EXPERT: slots are for experts.
    """
    BLOCK: tl.constexpr = BLOCK_ROWS * BLOCK_COLUMNS
    UP_COLUMNS: tl.constexpr = BLOCK // BLOCK_BOTTLENECK if BLOCK > BLOCK_BOTTLENECK else 1
    DOWN_BLOCKS: tl.constexpr = BLOCK_BOTTLENECK // BLOCK_ROWS
    UP_BLOCKS: tl.constexpr = (PADDED_WIDTH + UP_COLUMNS - 1) // UP_COLUMNS
    part = tl.program_id(0)
    layer = tl.program_id(1)
    experts_ptr += layer * groups * 2
    if part < down_slots * DOWN_BLOCKS:
        slot = part // DOWN_BLOCKS
        ranks = part % DOWN_BLOCKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        rank_valid = ranks < BOTTLENECK
        expert = _expert_of(experts_ptr, slot, DOWN_EXPERTS, down_owner_ptrs is not None, BY_EXPERT)
        place = layer.to(tl.int64) * down_slots + slot
        down_rows = prepared_down_ptr + place * (BLOCK_BOTTLENECK * PADDED_WIDTH) + ranks[:, None] * PADDED_WIDTH
        weight_bias = tl.zeros([BLOCK_ROWS], tl.float32)  # W b
        weight_sums = tl.zeros([BLOCK_ROWS], tl.float32)  # w
        for start in range(0, PADDED_WIDTH, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            column_valid = columns < WIDTH
            weight = weight_tile(
                _of_layer(down_weight_ptrs, layer),
                _of_layer(down_init_ptrs, layer),
                _of_layer(down_owner_ptrs, layer),
                ranks[:, None] * WIDTH + columns[None, :],
                rank_valid[:, None] & column_valid[None, :],
                expert,
                1.0 / DOWN_EXPERTS,
                WIDTH % BLOCK_COLUMNS == 0 and BOTTLENECK == BLOCK_BOTTLENECK,
            )
            if norm_weight_ptrs is not None:
                norm_weight = load_tile(_of_layer(norm_weight_ptrs, layer) + columns, column_valid, False)
                norm_bias = load_tile(_of_layer(norm_bias_ptrs, layer) + columns, column_valid, False)
                weight_bias += tl.sum(weight * norm_bias.to(tl.float32)[None, :], axis=1)
                weight *= norm_weight.to(tl.float32)[None, :]
                weight_sums += tl.sum(weight.to(PRODUCT).to(tl.float32), axis=1)
            tl.store(down_rows + columns[None, :], weight.to(PRODUCT), mask=(columns < PADDED_WIDTH)[None, :])
        weight_bias += bias_vector(
            _of_layer(down_bias_ptrs, layer),
            ranks,
            rank_valid,
            BOTTLENECK,
            expert,
            1.0 / DOWN_EXPERTS,
            DOWN_EXPERTS,
            down_owner_ptrs is not None,
        )
        vectors = prepared_vectors_ptr + place * (2 * BLOCK_BOTTLENECK) + ranks
        tl.store(vectors, weight_bias)
        tl.store(vectors + BLOCK_BOTTLENECK, weight_sums)
    else:
        part -= down_slots * DOWN_BLOCKS
        slot = part // UP_BLOCKS
        up_columns = part % UP_BLOCKS * UP_COLUMNS + tl.arange(0, UP_COLUMNS)
        up_ranks = tl.arange(0, BLOCK_BOTTLENECK)
        valid = up_columns < WIDTH
        padded_valid = up_columns < PADDED_WIDTH
        expert = _expert_of(experts_ptr + 1, slot, UP_EXPERTS, up_owner_ptrs is not None, BY_EXPERT)
        place = layer.to(tl.int64) * up_slots + slot
        up_weight = weight_tile(
            _of_layer(up_weight_ptrs, layer),
            None,
            _of_layer(up_owner_ptrs, layer),
            up_columns[:, None] * BOTTLENECK + up_ranks[None, :],
            valid[:, None] & (up_ranks < BOTTLENECK)[None, :],
            expert,
            1.0 / UP_EXPERTS,
            WIDTH % UP_COLUMNS == 0 and PADDED_WIDTH == WIDTH and BOTTLENECK == BLOCK_BOTTLENECK,
        )
        up_rows = prepared_up_ptr + place * (PADDED_WIDTH * BLOCK_BOTTLENECK) + up_columns[:, None] * BLOCK_BOTTLENECK
        tl.store(up_rows + up_ranks[None, :], up_weight.to(PRODUCT), mask=padded_valid[:, None])
        up_bias = bias_vector(
            _of_layer(up_bias_ptrs, layer),
            up_columns,
            valid,
            WIDTH,
            expert,
            1.0 / UP_EXPERTS,
            UP_EXPERTS,
            up_owner_ptrs is not None,
        )
        tl.store(prepared_up_bias_ptr + place * PADDED_WIDTH + up_columns, up_bias, mask=padded_valid)


@triton.jit
def _of_layer(pointers, layer):
    """A layer's pointer, or None."""
    pointer = None
    if pointers is not None:
        pointer = pointers[0]
        for index in tl.static_range(1, len(pointers)):
            pointer = tl.where(layer == index, pointers[index], pointer)
    return pointer


@triton.jit
def _expert_of(experts_ptr, slot, EXPERTS: tl.constexpr, SPLIT: tl.constexpr, BY_EXPERT: tl.constexpr):
    """The expert whose weights a slot holds; experts_ptr: of the projection, for the first group."""
    if BY_EXPERT or not SPLIT:  # where it is not split, nobody asks
        expert = tl.where(slot < EXPERTS, slot, tl.where(slot == EXPERTS, MERGED, NOBODY))
    else:
        expert = tl.load(experts_ptr + 2 * slot)
    return expert
