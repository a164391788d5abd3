import pytest
import torch

from tritflow.calibration.trajectories import Batch
from tritflow.distillation.online import OnlineStates

STEPS, BATCH, BATCHES = 6, 4, 3
SIGMAS = torch.stack([torch.linspace(1, 0, STEPS + 1), torch.linspace(1, 0, STEPS + 1) ** 1.5])


def teacher(hidden_states, timestep, text, guidance, **_):
    return (hidden_states + text[:, None, None] * timestep[:, None, None]) * guidance[:, None, None]


def states(student_share=0.0, seed=0, **kwargs):
    return OnlineStates(
        teacher, {"text": torch.arange(5.0)}, {"shared": torch.ones(2)}, SIGMAS, (1.0, 0.5), (3, 2),
        batch_size=BATCH, batches=BATCHES, student_share=student_share, dtype=torch.float32, seed=seed, **kwargs,
    )  # fmt: skip


def one(made, number, student=None):
    draws = made.draws(number)
    kwargs = made.inputs(draws)
    batch = Batch(kwargs, made.velocity(kwargs))
    made.advance(draws, batch.velocity, batch.velocity if student is None else student(batch))
    return draws, batch


def test_a_trajectory_is_the_samplers_from_noise_to_picture():
    made = states()
    x, prompt, schedule, guidance = (made.state[n].clone() for n in ("x", "prompt", "schedule", "guidance"))
    for number in range(BATCHES * (STEPS - 1)):
        one(made, number)
    for i in range(STEPS - 1):
        sigma, after = SIGMAS[schedule, i], SIGMAS[schedule, i + 1]
        velocity = teacher(x, sigma, prompt.float(), torch.tensor([1.0, 0.5])[guidance])
        x = x + (after - sigma)[:, None, None] * velocity
    assert torch.allclose(made.state["x"], x, atol=1e-5)
    assert made.state["step"].tolist() == [STEPS - 1] * made.size
    for number in range(BATCHES * (STEPS - 1), BATCHES * STEPS):
        one(made, number)
    assert not made.state["step"].any()  # at the end all begin again, from noise of their own
    assert abs(float(made.state["x"].std()) - 1) < 0.3


def test_phases_are_spread_and_stay_so():
    made = states()
    made.fill()
    for number in range(BATCHES * 4):
        assert made.state["step"].bincount(minlength=STEPS).tolist() == [made.size // STEPS] * STEPS or number % BATCHES
        one(made, number)


def test_every_trajectory_is_taken_once_an_epoch():
    made = states()
    seen = torch.cat([made.draws(n)["rows"] for n in range(BATCHES)])
    assert seen.sort().values.tolist() == list(range(made.size))
    assert seen.tolist() != torch.cat([made.draws(n)["rows"] for n in range(BATCHES, 2 * BATCHES)]).tolist()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_students_trajectories_follow_the_student(share):
    made = states(student_share=share)
    assert made.state["student"].float().mean() == share
    before = made.state["x"].clone()
    draws, _ = one(made, 0, student=lambda batch: torch.zeros_like(batch.velocity))
    assert torch.equal(made.state["x"][draws["rows"]], before[draws["rows"]]) == (share == 1.0)


def test_a_step_depends_on_the_seed_and_its_number_alone():
    a, b = states(), states()
    for number in range(5):
        one(a, number)
    for name, value in b.draws(7).items():
        assert torch.equal(value, a.draws(7)[name]), name
    assert not torch.equal(states(seed=1).draws(7)["noise"], a.draws(7)["noise"])


def test_kwargs_are_those_of_a_transformer():
    _, batch = one(states(), 0)
    assert set(batch.kwargs) == {"hidden_states", "timestep", "guidance", "text", "shared"}
    assert batch.velocity.shape == (BATCH, 3, 2)


def test_short_places_begin_again_early_and_phases_stay_spread():
    made = states(early_share=0.5, early_steps=2)
    assert made.short.sum() == made.size // 2
    made.fill()
    for number in range(BATCHES * 4):
        if number % BATCHES == 0:
            assert made.state["step"][made.short].bincount(minlength=2).tolist() == [3, 3]
            assert made.state["step"][~made.short].bincount(minlength=STEPS).tolist() == [1] * STEPS
        one(made, number)


def test_a_share_of_one_mixes_every_prompt_with_another_for_its_whole_way():
    made, plain = states(mixed_share=1.0), states()
    rows = torch.arange(made.size)
    mix, first, second = (made.state[n] for n in ("mix", "prompt", "other"))
    assert torch.equal(first, plain.state["prompt"])  # what is drawn besides changes nothing else
    expected = first + mix * (second - first)
    assert torch.allclose(made._kwargs(rows)["text"], expected)
    assert mix.min() > 0
    assert mix.max() < 1
    for number in range(BATCHES * (STEPS - 1)):
        one(made, number)
    assert torch.allclose(made._kwargs(rows)["text"], expected)
    for number in range(BATCHES * (STEPS - 1), BATCHES * STEPS):
        one(made, number)
    assert not torch.allclose(made._kwargs(rows)["text"], expected)


def test_trajectories_that_are_not_mixed_have_their_prompt_to_the_bit():
    made = states(mixed_share=0.3)
    plain = made.state["mix"] == 0
    assert 0 < int(plain.sum()) < made.size
    assert torch.equal(made._kwargs(torch.arange(made.size))["text"][plain], made.state["prompt"][plain].float())


def test_a_pool_smaller_than_the_samplers_steps_is_filled():
    calls = []

    def counted(hidden_states, **kwargs):
        calls.append(len(hidden_states))
        return teacher(hidden_states, **kwargs)

    made = OnlineStates(
        counted, {"text": torch.arange(5.0)}, {}, SIGMAS, (1.0,), (3, 2),
        batch_size=3, batches=1, student_share=0.0, dtype=torch.float32, seed=0,
    )  # fmt: skip
    made.fill()
    assert made.state["step"].tolist() == [0, 1, 2]
    assert calls == [2, 1]
