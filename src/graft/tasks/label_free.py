"""Scores of a classifier on images without labels: to choose an epoch, or a run, by."""

from __future__ import annotations

import torch
from torch import Tensor

TEMPERATURE = 0.05  # as published


def label_free(logits: Tensor) -> dict[str, Tensor]:
    """Of (N, C) logits, or (N, K, C) of K heads: each (), or (K,)."""
    if logits.ndim == 3:
        heads = [label_free(head) for head in logits.unbind(1)]
        return {name: torch.stack([head[name] for head in heads]) for name in heads[0]}
    log_p = logits.float().log_softmax(1)
    p = log_p.exp()
    return {"entropy": -(p * log_p).sum(1).mean(), "snd": neighbourhood_density(p)}


def neighbourhood_density(p: Tensor) -> Tensor:
    """Soft neighbourhood density of probabilities (N, C) (Saito et al. 2021): how many neighbours
    an image has, as the mean entropy of its similarities to the others. Larger is better: predicted
    classes are then tight clusters.
    """
    directions = torch.nn.functional.normalize(p, dim=1)
    similarity = directions @ directions.T / TEMPERATURE
    similarity.fill_diagonal_(-torch.inf)
    log_q = similarity.log_softmax(1)
    return -(log_q.exp() * log_q.nan_to_num(neginf=0.0)).sum(1).mean()
