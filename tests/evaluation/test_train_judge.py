"""Training of the judge: pictures and targets, and a run that is stopped and goes on."""

import numpy as np
import pytest
import torch

from evaluation import judge_targets
from evaluation.judge import SIDE, JudgeNet, decode
from evaluation.judge_pictures import COLORS, OTHER, SHAPES, draw_labelled
from evaluation.judge_targets import loss_of, targets_of, training_batch
from evaluation.train_judge import TrainJudgeConfig, main


def test_pictures_depend_on_seed_and_step_only_and_vary():
    a, b, c = (training_batch(0, step, 3)[0] for step in (4, 4, 5))
    assert torch.equal(a, b) and not torch.equal(a, c)
    drawn = [draw_labelled(np.random.default_rng(i), SIDE) for i in range(150)]
    assert {k for d in drawn for k in d.classes} == set(range(4))
    assert {k for d in drawn for k in d.colors} == set(range(OTHER + 1))
    assert {len(d.classes) for d in drawn} >= {0, 1, 2, 3, 4, 5}
    assert all(0 <= x0 < x1 <= SIDE and 0 <= y0 < y1 <= SIDE for d in drawn for x0, y0, x1, y1 in d.boxes)


def test_targets_decode_to_the_labels():
    rng, drawn, decoded = np.random.default_rng(1), 0, 0
    for _ in range(30):
        labels = draw_labelled(rng, SIDE)
        heat, where, colors, boxes = targets_of([labels])
        color_map, box_map = torch.zeros(OTHER + 1, *heat.shape[-2:]), torch.zeros(4, *heat.shape[-2:])
        for (_, row, column), color, box in zip(where.tolist(), colors.tolist(), boxes, strict=True):
            color_map[color, row, column], box_map[:, row, column] = 1, box
        found = [(n, f) for n, f in decode(heat[0], color_map, box_map, (SIDE, SIDE)) if f.confidence == 1]
        assert len(found) <= len(labels.classes)
        true = {
            (SHAPES[s], None if c == OTHER else COLORS[c], b)
            for s, c, b in zip(labels.classes, labels.colors, labels.boxes, strict=True)
        }
        for name, f in found:
            assert any((name, f.color) == (n, c) and np.allclose(f.box, b, atol=1e-3) for n, c, b in true)
        drawn, decoded = drawn + len(labels.classes), decoded + len(found)
    assert decoded > 0.8 * drawn > 0


def test_the_loss_falls_towards_the_targets():
    torch.manual_seed(0)
    net = JudgeNet()
    images, targets = training_batch(0, 0, 4)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss, parts = loss_of(net, images, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0] and set(parts) == {"heat", "color", "box"}


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole = TrainJudgeConfig(tmp_path / "a" / "judge.safetensors", steps=4, batch_size=2, save_every=2)
    main(whole)
    real, calls = judge_targets.training_batch, []

    def stops(seed, step, size):
        calls.append(step)
        if step == 3 and len(calls) < 5:
            raise KeyboardInterrupt
        return real(seed, step, size)

    monkeypatch.setattr(judge_targets, "training_batch", stops)
    cut = TrainJudgeConfig(tmp_path / "b" / "judge.safetensors", steps=4, batch_size=2, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        main(cut)
    assert not cut.output.exists()
    main(cut)
    assert calls == [0, 1, 2, 3, 2, 3]
    assert whole.output.read_bytes() == cut.output.read_bytes()
    assert [p.name for p in cut.output.parent.iterdir()] == ["judge.safetensors"]
