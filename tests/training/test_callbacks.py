import numpy as np
import pandas as pd
import pytest
from lightning.pytorch.callbacks import Callback

from chestct.models.features import outputs
from chestct.training import callbacks
from chestct.training.train import train


class Spy(Callback):
    """What slices counted in each epoch, and how they scored when it began."""

    counts: list[np.ndarray]
    scores: list[np.ndarray]

    def on_train_epoch_start(self, trainer, model):
        self.scores.append(outputs(model.net, trainer.datamodule.dataset("train"), 8)[0][:, 0])
        self.counts.append(np.zeros(len(self.scores[-1]), np.float32))
        model.train()

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.counts[-1][batch["i"]] = batch["w"]


def test_a_quarter_of_the_normal_slices_counts_more_by_what_was_learned(small, tmp_path, monkeypatch):
    Spy.counts, Spy.scores = [], []
    monkeypatch.setattr(callbacks, "EndWithParent", Spy)
    data = train(small("data.balance=true", "optim.hard_normals=3", "trainer.max_epochs=3"), tmp_path).data
    plain = data.dataset("train", train=True)
    normal, (first, *later) = plain.y.numpy() == 0, Spy.counts
    np.testing.assert_array_equal(first, plain.w)  # nothing is learned yet
    for counts, score in zip(later, Spy.scores[1:], strict=True):
        np.testing.assert_array_equal(counts[~normal], first[~normal])
        assert counts[normal].sum() == pytest.approx(first[normal].sum(), rel=1e-6)
        more = counts[normal] / first[normal]
        hard = score[normal] >= np.quantile(score[normal], 0.75)
        assert 0.2 < hard.mean() < 0.3
        np.testing.assert_allclose(more[hard], 3 * more[~hard].mean(), rtol=1e-5)
        np.testing.assert_allclose(more[~hard], more[~hard].mean(), rtol=1e-5)


def test_normal_slices_are_hard_among_those_of_their_own_source():
    table = pd.DataFrame({"source": [*"aaaabbbbb"], "target": [0, 0, 0, 0, 0, 0, 0, 0, 1]})
    table["score"] = [4.0, 1, 2, 3, 14, 11, 12, 13, 20]
    table["weight"] = [1.0] * 4 + [3.0, 2, 3, 2, 5]
    counts = callbacks.harder(table, 3)
    assert counts.tolist() == pytest.approx([2, *[2 / 3] * 3, 90 / 16, 20 / 16, 30 / 16, 20 / 16, 5])
