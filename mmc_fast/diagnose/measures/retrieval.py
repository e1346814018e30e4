"""Retrieval of one tower's samples by the other's."""

from __future__ import annotations

import torch
from torch import Tensor

from mmc_fast.errors import InputError


def recalled(outputs: Tensor, k: int) -> Tensor:
    """Whether each query finds its own candidate among the k most similar of all, ``[N]`` float64; their mean is recall@k.

    ``outputs [N, 2 d]``: embeddings of the queries and of the candidates side by side, row by row a pair; similarity is the cosine.
    Of candidates that are equally similar each order is as likely, so a hit can be a fraction. Time and memory ``O(N²)``. Source: the
    usual measure of cross-modal retrieval (Radford et al., ICML 2021). Limits: recall falls with N. Rescaling a tower changes nothing.
    """
    if outputs.dim() != 2 or outputs.shape[1] % 2:
        raise InputError(
            f"recall: outputs are {list(outputs.shape)}; give the embeddings of both towers side by side [samples, 2 d]"
        )
    queries, candidates = (torch.nn.functional.normalize(x, dim=1) for x in outputs.double().chunk(2, 1))
    similarity = queries @ candidates.t()
    own = similarity.diagonal()[:, None]
    near = (similarity - own).abs() <= 1e-12
    better, equal = ((similarity > own) & ~near).sum(1), near.sum(1)
    return ((k - better).double() / equal).clamp(0, 1)
