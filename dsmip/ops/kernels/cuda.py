"""The text unit's token-level score in Triton (text_unit_triton.py) on a GPU; float32 or float16 rows, no gradients.

M mentions, E entities, R token rows, d unit width. Triton is imported when it is first needed: not every platform has
it. Tests run the same code on CPU tensors, in Triton's interpreter (see `tests/ops/kernels/test_cuda.py`).
"""

from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from dsmip.ops.kernels.rows import Pairs, TokenRows, checked

MAX_TOKENS = 96
"""Of a mention: all its logits with a tile of query rows are in registers, and those of more float32 ones spill."""
_TOKEN_BLOCKS = ((16, 16), (32, 16), (32, 32), (64, 16), (64, 32))
_SAFE_LOGIT = 60.0  # exp of it, times MAX_TOKENS, is far from the largest float32
_GROUP = 16  # entities of one program: the least rows of a tensor core's product
_ROWS = 64  # query rows, and
_CHUNK = 32  # channels that are multiplied at a time
# compiled for sm_90, half precision takes 170 registers a thread, and float32, without tensor cores, nearly all
_LAUNCH = {
    torch.float16: {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True},
    torch.float32: {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True},
}


@cache
def why_unavailable() -> str | None:
    """Why there is no Triton kernel, in one line; None when there is one. The first call compiles it for one pair."""
    try:
        if not _kernel().INTERPRETED and not torch.cuda.is_available():
            return "PyTorch sees no GPU"
        row = torch.ones(1, 16, device=_device_type())
        one = TokenRows(row, *torch.tensor([[0], [1]], device=row.device))
        _scores(Pairs(one, one, one, row, None), 1.0).item()  # waits for the GPU
    except ImportError as error:
        return f"Triton is not installed ({error})"
    except Exception as error:  # whatever a driver, Triton's compiler or the C compiler that it calls may raise
        return f"Triton does not work here: {next(iter(str(error).splitlines()), repr(error))}"
    return None


def can_score(num_tokens_M: Tensor) -> bool:
    """Whether mentions of so many tokens can be scored on the device of the tensor: at most `MAX_TOKENS`, on a GPU."""
    return num_tokens_M.device.type == _device_type() and bool((num_tokens_M <= MAX_TOKENS).all())


def local_scores(
    key: TokenRows,
    value: TokenRows,
    query: TokenRows,
    direction_Ed: Tensor,
    eps: float,
    wanted_ME: Tensor | None = None,
) -> Tensor:
    """`dsmip.ops.text_unit.local_scores` of M mentions, E entities: float32 [M, E], 0 where not wanted (bool [M, E]).

    Rows are all float32, or all float16: then operands of products are, while sums and softmax stay float32. Pairs that
    are not wanted cost nothing. The last bits of a score depend on which entities a mention is asked for. NaN or
    infinity in, NaN out, for the pairs of that item alone; an item without tokens scores NaN.

    Raises:
        RuntimeError: the kernel is not available.
        ValueError: another dtype, device or shape, rows outside their tensor, or more than `MAX_TOKENS` keys.
    """
    reason = why_unavailable()
    if reason is not None:
        raise RuntimeError(f"the Triton kernel is not available: {reason}")
    dtypes = (torch.float32, torch.float16)
    pairs = checked(Pairs(key, value, query, direction_Ed, wanted_ME), _device_type(), dtypes)
    if not can_score(pairs.key.length_N):
        raise ValueError(f"a mention has more than {MAX_TOKENS} tokens")
    return _scores(pairs, eps)


def _kernel() -> ModuleType:
    from dsmip.ops.kernels import text_unit_triton

    return text_unit_triton


def _device_type() -> str:
    return "cpu" if _kernel().INTERPRETED else "cuda"


def _scores(pairs: Pairs, eps: float) -> Tensor:
    key, value, query, direction_Ed, _ = pairs
    values_Rd = value.values_Rd.float()
    centred_Rd = (values_Rd - values_Rd.mean(dim=1, keepdim=True)).to(value.values_Rd.dtype)
    num_rows_E, largest_query = _finite_rows(query)
    largest_key = _norms(key.values_Rd).amax() if len(key.values_Rd) else 0.0
    is_safe = bool(largest_query * largest_key < _SAFE_LOGIT)  # False for NaN

    wanted_ME = pairs.wanted_ME
    if wanted_ME is None:
        wanted_ME = torch.ones(pairs.num_mentions, pairs.num_entities, dtype=torch.bool, device=direction_Ed.device)
    scores_ME = torch.zeros(wanted_ME.shape, device=direction_Ed.device)
    entity_of_pair = wanted_ME.nonzero()[:, 1].int()
    end_M = wanted_ME.sum(dim=1).cumsum(0)
    first_M = F.pad(end_M, (1, 0))[:-1]
    mentions_M5 = torch.stack([key.start_N, value.start_N, key.length_N, first_M, end_M], dim=1)
    tensors = (direction_Ed, mentions_M5, query.start_N.int(), num_rows_E, entity_of_pair)
    launch = _LAUNCH[key.values_Rd.dtype]
    with torch.cuda.device_of(scores_ME):  # Triton launches on the current device
        for (first, second), programs_P2 in programs(key.length_N, end_M - first_M, pairs.num_entities):
            _kernel().text_unit[(len(programs_P2),)](
                key.values_Rd,
                centred_Rd,
                query.values_Rd,
                *tensors,
                programs_P2,
                scores_ME,
                pairs.num_entities,
                eps,
                WIDTH=pairs.width,
                FIRST=first,
                SECOND=second,
                SHIFT=not is_safe,
                GROUP=_GROUP,
                ROWS=_ROWS,
                CHUNK=_CHUNK,
                **launch,
            )
    return scores_ME


def programs(num_tokens_M: Tensor, num_pairs_M: Tensor, num_entities: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """For each way to cut keys that is needed: its blocks, and all groups of pairs int64 [P, 2] as (group, mention).

    Programs that run at the same time score like entities, whose rows are then in the cache.
    """
    sizes = torch.tensor([sum(blocks) for blocks in _TOKEN_BLOCKS], device=num_tokens_M.device)
    way_M = torch.bucketize(num_tokens_M, sizes)
    num_groups_M = (num_pairs_M + _GROUP - 1) // _GROUP
    group_G1 = torch.arange((num_entities + _GROUP - 1) // _GROUP, device=num_tokens_M.device)[:, None]
    for way in way_M[num_pairs_M > 0].unique().tolist():
        yield _TOKEN_BLOCKS[way], ((group_G1 < num_groups_M) & (way_M == way)).nonzero().contiguous()


def _finite_rows(query: TokenRows) -> tuple[Tensor, Tensor | float]:
    """Numbers of rows int32 [E], 0 for entities that have NaN or infinity among theirs, and the largest norm.

    Rows of several entities share a matrix product, where NaN in one would spread to all.
    """
    norm_R = _norms(query.values_Rd)
    is_finite_R = norm_R.isfinite()
    broken_R1 = F.pad((~is_finite_R).long().cumsum(0), (1, 0))  # broken rows before each row
    is_whole_E = broken_R1[query.start_N] == broken_R1[query.start_N + query.length_N]
    largest = norm_R.where(is_finite_R, 0.0).amax() if len(norm_R) else 0.0
    return query.length_N.where(is_whole_E, 0).int(), largest


def _norms(values_Rd: Tensor) -> Tensor:
    norm_R: Tensor = torch.linalg.vector_norm(values_Rd, dim=1, dtype=torch.float32)
    return norm_R
