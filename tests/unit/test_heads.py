"""Heads and the normalisation of features."""

from __future__ import annotations

import pytest
import torch

from graft.models.heads import CosineHead, Head, LinearHead, MLPHead, Standardize


@pytest.mark.parametrize("kind", [LinearHead, MLPHead, CosineHead])
@pytest.mark.parametrize("norm", ["none", "standardize", "batchnorm"])
def test_heads_map_features_to_logits_and_learn(kind: type[Head], norm: str) -> None:
    torch.manual_seed(0)
    head = kind(6, 3, norm=norm)  # type: ignore[misc, arg-type]
    labels = torch.arange(60) % 3
    features = torch.eye(6)[labels] + 0.1 * torch.randn(60, 6)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(head(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    assert head(features).shape == (60, 3)
    assert (head(features).argmax(1) == labels).all()


def test_a_linear_head_starts_with_equal_logits() -> None:
    assert (LinearHead(5, 4)(torch.randn(2, 5)) == 0).all()


def test_standardize_is_measured_once_and_is_the_same_in_training() -> None:
    features = torch.randn(500, 4) * torch.tensor([1.0, 5.0, 0.2, 3.0]) + 7
    norm = Standardize(4)
    norm.measure(features.split(64))
    norm.train()
    assert torch.allclose(norm(features).mean(0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(norm(features).std(0, correction=0), torch.ones(4), atol=1e-3)
    before = norm(features[:3])
    norm(torch.randn(500, 4) * 100)
    assert torch.equal(norm(features[:3]), before)


def test_a_dead_feature_does_not_blow_up() -> None:
    features = torch.randn(100, 2) * torch.tensor([1.0, 0.0])
    norm = Standardize(2)
    norm.measure(features.split(64))
    assert norm(features + torch.tensor([0.0, 1e-3])).abs().max() < 10


def test_cosine_logits_do_not_depend_on_the_length_of_features() -> None:
    head = CosineHead(5, 3, scale=10.0)
    features = torch.randn(4, 5)
    assert torch.allclose(head(features), head(7 * features), atol=1e-5)
    assert head(features).abs().max() <= 10.0 + 1e-4


def test_an_unknown_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head\.norm=layer: must be one of"):
        LinearHead(3, 2, norm="layer")  # type: ignore[arg-type]
