import numpy as np
import pytest
import torch

from geomcache.stages.train import flow


def test_time_by_hand() -> None:
    """u = r ** (2/3): the generator's own r gives t = (0.999 - u) / 0.999, cut at 0."""
    t = flow.sample_time((1000,), torch.Generator().manual_seed(3)).double()
    r = torch.rand(1000, generator=torch.Generator().manual_seed(3)).double()
    expected = np.maximum((0.999 - r.numpy() ** (2 / 3)) / 0.999, 0)
    np.testing.assert_allclose(t.numpy(), expected, atol=1e-6)


def test_time_follows_the_analytic_distribution_and_dwells_on_noise() -> None:
    """E[Beta(1.5, 1)] = 0.6, so the mean time is 0.3994 (0.6 if the direction were reversed)."""
    t = flow.sample_time((200_000,), torch.Generator().manual_seed(0))
    assert abs(t.mean().item() - (0.999 - 0.6) / 0.999) < 0.003
    for point in (0.05, 0.25, 0.5, 0.9):
        assert abs((t <= point).float().mean().item() - flow.time_cdf(torch.tensor(point)).item()) < 0.005
    assert (t < 0.1).sum() > 3 * (t > 0.9).sum()
    assert t.min() == 0
    assert t.max() <= 1


def test_cdf_by_hand() -> None:
    assert flow.time_cdf(torch.tensor(0.0)).item() == pytest.approx(1 - 0.999**1.5, abs=1e-6)
    assert flow.time_cdf(torch.tensor(1.0)).item() == 1
    assert flow.time_cdf(torch.tensor(0.5)).item() == pytest.approx(1 - 0.4995**1.5, abs=1e-6)


def test_path_by_hand() -> None:
    noise, action = torch.tensor([[[2.0]]]), torch.tensor([[[6.0]]])
    for t, expected in ((0.0, 2.0), (0.25, 3.0), (1.0, 6.0)):
        assert flow.interpolate(noise, action, torch.tensor([t])).item() == expected
    assert flow.velocity_target(noise, action).item() == 4.0


def test_euler_runs_from_noise_to_data() -> None:
    """On the straight path's own velocity, any number of steps lands on the data."""
    noise, action = torch.randn(2, 1, 3, 2), torch.randn(2, 1, 3, 2)
    seen = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t.item())
        return (action - x) / (1 - t)

    torch.testing.assert_close(flow.euler(velocity, noise, 4), action, atol=1e-5, rtol=0)
    assert seen == [0.0, 0.25, 0.5, 0.75]


def test_euler_by_hand() -> None:
    """dx/dt = x from 1 in two steps: 1.5, then 2.25."""
    assert flow.euler(lambda x, _t: x, torch.tensor(1.0), 2).item() == 2.25
