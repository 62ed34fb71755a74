# mypy: ignore-errors
"""Token-level scores of the text unit in Triton (see cuda.py for the interface, ../text_unit.py for the twin).

One program scores one mention against a group of entities, for mention tokens t and an entity's query rows s:
  p_t   = mean over s of softmax over t of (query_s . key_t)
  c     = sum over t of p_t value_t                                 (values are centred over channels)
  score = <direction_e, c / sqrt(mean c^2 + eps)>

The query rows of a group are packed one after the other, so that only its last tile has places to spare. Keys come in
two pieces, each a power of two (77 as 64 + 16, not 128), channels in pieces of CHUNK. Products are of the rows' dtype,
sums float32. In names of shapes: G the group's entities, R a tile of packed rows, T and U the first and second piece
of tokens, C a piece of channels.

Only cuda.py may import this file, and only when it is called: there is no Triton on macOS.
"""

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 was set before the import above."""


@triton.jit
def text_unit(
    key,  # rows of mentions
    value,
    query,  # rows of entities
    direction,  # float32 [E, d]
    mentions,  # int64 [M, 5]: first row of keys, of values, tokens, first pair, end of pairs
    query_start,  # int32 [E]
    num_rows,  # int32 [E]
    entity_of_pair,  # int32 [pairs], ordered by mention
    programs,  # int64 [programs, 2]: g and m, for pairs g * GROUP to (g + 1) * GROUP of mention m
    scores,  # float32 [M, E]
    num_entities,
    eps,
    WIDTH: tl.constexpr,  # d
    FIRST: tl.constexpr,  # tokens of the first piece of keys
    SECOND: tl.constexpr,
    SHIFT: tl.constexpr,  # whether logits may be too large for exp as they are
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    m = tl.load(programs + tl.program_id(0) * 2 + 1)
    mention = mentions + m * 5
    key += tl.load(mention) * WIDTH
    value += tl.load(mention + 1) * WIDTH
    tokens = tl.load(mention + 2)

    group = tl.load(programs + tl.program_id(0) * 2)
    pair_G = tl.load(mention + 3) + group * GROUP + tl.arange(0, GROUP)
    is_pair_G = pair_G < tl.load(mention + 4)
    e_G = tl.load(entity_of_pair + pair_G, mask=is_pair_G, other=0)
    length_G = tl.load(num_rows + e_G, mask=is_pair_G, other=0)
    begin_G = tl.cumsum(length_G, axis=0) - length_G
    offset_G = tl.load(query_start + e_G, mask=is_pair_G, other=0) - begin_G
    num_packed = tl.sum(length_G, axis=0)

    attention_TG = tl.zeros([FIRST, GROUP], tl.float32)
    attention_UG = tl.zeros([SECOND, GROUP], tl.float32)
    for first in range(0, num_packed, ROWS):
        packed_R = first + tl.arange(0, ROWS)
        is_own_RG = (packed_R[:, None] >= begin_G[None, :]) & (packed_R[:, None] < (begin_G + length_G)[None, :])
        row_R = packed_R + tl.sum(tl.where(is_own_RG, offset_G[None, :], 0), axis=1)
        is_row_R = packed_R < num_packed
        logits_RT = _logits(query, row_R, is_row_R, key, 0, tokens, WIDTH, ROWS, FIRST, CHUNK)
        logits_RU = _logits(query, row_R, is_row_R, key, FIRST, tokens, WIDTH, ROWS, SECOND, CHUNK)
        if SHIFT:
            top_R = tl.maximum(tl.max(logits_RT, axis=1), tl.max(logits_RU, axis=1))
            logits_RT -= top_R[:, None]
            logits_RU -= top_R[:, None]
        weight_RT = tl.exp(logits_RT)
        weight_RU = tl.exp(logits_RU)
        share_R = 1.0 / (tl.sum(weight_RT, axis=1) + tl.sum(weight_RU, axis=1))
        own_RG = is_own_RG.to(query.dtype.element_ty)
        attention_TG = _add_weights(attention_TG, weight_RT * share_R[:, None], own_RG)
        attention_UG = _add_weights(attention_UG, weight_RU * share_R[:, None], own_RG)

    attention_TG *= (1.0 / length_G.to(tl.float32))[None, :]
    attention_UG *= (1.0 / length_G.to(tl.float32))[None, :]
    squares_G = tl.zeros([GROUP], tl.float32)
    projection_G = tl.zeros([GROUP], tl.float32)
    for channel in tl.static_range(0, WIDTH, CHUNK):
        context_GC = _add_context(tl.zeros([GROUP, CHUNK], tl.float32), attention_TG, value, 0, tokens, channel, WIDTH)
        context_GC = _add_context(context_GC, attention_UG, value, FIRST, tokens, channel, WIDTH)
        direction_GC = _rows(direction, e_G, is_pair_G, channel, WIDTH, CHUNK)
        squares_G += tl.sum(context_GC * context_GC, axis=1)
        projection_G += tl.sum(context_GC * direction_GC, axis=1)
    score_G = projection_G / tl.sqrt(squares_G / WIDTH + eps)
    tl.store(scores + m * num_entities + e_G, score_G, mask=is_pair_G)


@triton.jit
def _rows(values, row_N, is_row_N, channel, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK channels of token rows, from `channel` on; 0 where there is no row or no channel."""
    channel_C = channel + tl.arange(0, CHUNK)
    offset_NC = row_N.to(tl.int64)[:, None] * WIDTH + channel_C[None, :]
    return tl.load(values + offset_NC, mask=is_row_N[:, None] & (channel_C < WIDTH)[None, :], other=0.0)


@triton.jit
def _logits(
    query,
    row_R,
    is_row_R,
    key,
    first_token,
    tokens,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Products of query rows with a piece of the keys; -inf beyond the last token."""
    token_T = first_token + tl.arange(0, TOKENS)
    logits_RT = tl.zeros([ROWS, TOKENS], tl.float32)
    for channel in tl.static_range(0, WIDTH, CHUNK):
        query_RC = _rows(query, row_R, is_row_R, channel, WIDTH, CHUNK)
        key_TC = _rows(key, token_T, token_T < tokens, channel, WIDTH, CHUNK)
        logits_RT = tl.dot(query_RC, tl.trans(key_TC), logits_RT, input_precision="ieee")
    return tl.where((token_T < tokens)[None, :], logits_RT, float("-inf"))


@triton.jit
def _add_weights(attention_TG, weight_RT, own_RG):
    """Adds the weights of each entity's own rows. (Tokens come first: one piece of them is a tensor core's height.)"""
    return tl.dot(tl.trans(weight_RT.to(own_RG.dtype)), own_RG, attention_TG, input_precision="ieee")


@triton.jit
def _add_context(context_GC, attention_TG, value, first_token, tokens, channel, WIDTH: tl.constexpr):
    """Adds some channels of a piece of the values, weighted by the attention."""
    token_T = first_token + tl.arange(0, attention_TG.shape[0])
    value_TC = _rows(value, token_T, token_T < tokens, channel, WIDTH, context_GC.shape[1])
    return tl.dot(tl.trans(attention_TG.to(value_TC.dtype)), value_TC, context_GC, input_precision="ieee")
