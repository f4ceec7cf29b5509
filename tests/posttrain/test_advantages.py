import pytest
import torch

from posttrain.rollout.credit import batch_std, group_advantages


def test_advantages_are_standard_scores_within_each_group():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    got = group_advantages(rewards)
    for row, reward in zip(got, rewards, strict=True):
        wanted = (reward - reward.mean()) / (reward.var(correction=0).sqrt() + 1e-4)
        torch.testing.assert_close(row, wanted)
    torch.testing.assert_close(got.mean(1), torch.zeros(5), atol=1e-6, rtol=0)


def test_a_prompts_difficulty_does_not_matter():
    rewards = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    shifted = rewards + torch.tensor([[0.0], [10.0], [-3.0]])
    torch.testing.assert_close(group_advantages(shifted), group_advantages(rewards), atol=1e-4, rtol=1e-4)


def test_a_group_of_equal_rewards_has_exactly_no_advantage():
    for value in (0.0, 0.1, 1 / 3, 123.456):
        assert torch.equal(group_advantages(torch.full((2, 24), value)), torch.zeros(2, 24))


def test_outliers_are_clipped():
    rewards = torch.zeros(1, 101)
    rewards[0, 0] = 1.0
    assert group_advantages(rewards).max() == 5.0
    assert group_advantages(rewards, clip=2.0).max() == 2.0


def test_the_batchs_std_does_not_blow_up_prompts_without_differences():
    rewards = torch.tensor([[0.0, 1.0], [0.5, 0.5001]])
    own, shared = group_advantages(rewards), group_advantages(rewards, std=batch_std(rewards))
    assert own[1].abs().max() > 0.3 and shared[1].abs().max() < 1e-3
    assert shared[0, 1] == pytest.approx(0.5 / (rewards.std(correction=0).item() + 1e-4))


@pytest.mark.parametrize("rewards", [torch.zeros(3, 1), torch.zeros(6), torch.tensor([[0.0, float("nan")]])])
def test_what_cannot_be_compared_is_refused(rewards):
    with pytest.raises(ValueError, match="advantages compare|NaN"):
        group_advantages(rewards)
