"""Labels of every kind: which task and score they mean, how they are read, and what a score of outputs is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmc_fast.diagnose.tasks import BOUNDED, METRICS, RANKED, Task, metric_name
from mmc_fast.errors import InputError

E3 = torch.eye(3)


def adapter(labels: Any, **more: Any) -> Any:
    return SimpleNamespace(labels=lambda batch: labels, **more)


@pytest.mark.parametrize(
    ("labels", "outputs", "metric", "kind", "score", "read"),
    [
        (torch.tensor([2, 0, 1]), 3, None, "classes", "accuracy", [2, 0, 1]),
        (torch.tensor([[2.0], [0.0]]), 3, None, "classes", "accuracy", [2, 0]),
        (torch.tensor([1, 0, 1]), 2, None, "classes", "auroc", [1, 0, 1]),
        (torch.tensor([1.0, 0.0]), 1, None, "classes", "auroc", [1, 0]),
        (torch.tensor([1, 0]), 1, "accuracy", "classes", "accuracy", [1, 0]),
        (E3[[2, 0]], 3, None, "classes", "accuracy", [2, 0]),
        (E3[[2, 0]], 4, None, "labels", "f1", None),
        (torch.tensor([[1, 1, 0], [0, 1, 0]]), 3, None, "labels", "f1", [[1, 1, 0], [0, 1, 0]]),
        (torch.tensor([[1, 0], [1, 0]]), 2, "macro_auroc", "labels", "macro_auroc", [[1, 0], [1, 0]]),
        (torch.tensor([0.5, -1.0]), 1, None, "numbers", "r2", [[0.5], [-1.0]]),
        (torch.tensor([[0.5, 1.0]]), 2, None, "numbers", "r2", [[0.5, 1.0]]),
        (torch.tensor([1, 0]), 1, "r2", "numbers", "r2", [[1.0], [0.0]]),
        (torch.tensor([[3.0, 1.0], [4.0, 0.0]]), 1, "concordance", "survival", "concordance", [[3.0, 1.0], [4.0, 0.0]]),
        (torch.arange(2), 4, "recall@5", "pairs", "recall@5", [[0.0], [0.0]]),
        (np.array([2, 0], dtype=np.int16), 3, None, "classes", "accuracy", [2, 0]),
        ([np.int64(1), 0], 3, None, "classes", "accuracy", [1, 0]),
        ([0.5, 2], 1, None, "numbers", "r2", [[0.5], [2.0]]),
        (np.array(["cat", "ant"]), 3, None, "classes", "accuracy", [2, 0]),
    ],
)
def test_what_labels_mean(labels: Any, outputs: int, metric: Any, kind: str, score: str, read: Any) -> None:
    given = adapter(labels, classes=["ant", "bee", "cat"])
    task = Task.of(given, None, outputs, metric)
    assert task is not None
    assert (task.kind, task.metric, task.outputs) == (kind, score, outputs)
    assert (task.score is None) == (kind != "pairs")
    if read is None:
        with pytest.raises(InputError, match="several labels are"):
            task.labels(given, None)
    else:
        y = task.labels(given, None)
        assert y.tolist() == read
        assert y.dtype == {"numbers": torch.float32, "pairs": torch.float32, "survival": torch.float64}.get(
            kind, torch.int64
        )


def test_labels_come_from_the_adapter_else_from_the_end_of_the_batch() -> None:
    own, none = adapter(torch.tensor([1, 0])), adapter(None)
    plain: Any = SimpleNamespace()
    last = torch.tensor([2, 2])
    for batch in ((torch.ones(2), last), [torch.ones(2), torch.ones(2), last]):
        assert Task.of(own, batch, 3, None).labels(own, batch).tolist() == [1, 0]
        assert Task.of(plain, batch, 3, None).labels(plain, batch).tolist() == [2, 2]
        assert Task.of(none, batch, 3, None) is None
    for batch in (last, (last,), {"y": last}):
        assert Task.of(plain, batch, 3, None) is None
    assert Task("classes", "accuracy", 3).labels(none, None) is None


@pytest.mark.parametrize(
    ("task", "labels", "told"),
    [
        (Task("classes", "accuracy", 3), torch.tensor([0, 3]), "run from 0 to 3 for 3 outputs"),
        (Task("classes", "accuracy", 3), torch.tensor([0, -1]), "run from -1 to 0 for 3 outputs"),
        (Task("classes", "accuracy", 3), torch.tensor([0.5]), "no whole numbers"),
        (Task("classes", "accuracy", 3), torch.eye(2), "one-hot"),
        (Task("classes", "accuracy", 3), torch.ones(2, 3), "one-hot"),
        (Task("classes", "auroc", 1), torch.tensor([0, 2]), "run from 0 to 2 for 1 outputs"),
        (Task("labels", "f1", 3), torch.ones(2, 2), "several labels are"),
        (Task("labels", "f1", 2), torch.tensor([[0, 2]]), "several labels are"),
        (Task("labels", "f1", 2), torch.tensor([0, 1]), "several labels are"),
        (Task("numbers", "r2", 2), torch.ones(2), "for 2 outputs"),
        (Task("numbers", "r2", 1), torch.tensor([torch.inf]), "finite numbers"),
        (Task("survival", "concordance", 1), torch.ones(2, 3), "time and event"),
        (Task("survival", "concordance", 2), torch.ones(2, 2), "time and event"),
        (Task("survival", "concordance", 1), torch.full((2, 2), torch.nan), "time and event"),
        (Task("classes", "accuracy", 3), "ant", "labels are str"),
    ],
)
def test_labels_that_do_not_fit(task: Task, labels: Any, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        task.labels(adapter(labels), None)
    assert "\n" not in str(caught.value)


def test_edges_of_what_fits() -> None:
    assert Task("classes", "auroc", 1).labels(adapter(torch.tensor([1])), None).tolist() == [1]
    assert Task("classes", "accuracy", 3).labels(adapter(torch.tensor([2])), None).tolist() == [2]
    assert len(Task("classes", "accuracy", 3).labels(adapter(torch.empty(0, dtype=torch.long)), None)) == 0
    with pytest.raises(InputError, match="'auroc' is for 2 classes and there are 3 outputs"):
        Task.of(adapter(torch.tensor([0, 1])), None, 3, "auroc")


def test_scores_on_their_scales(generator: torch.Generator) -> None:
    y = torch.randn(9, 2, generator=generator)
    one = y[:, :1]
    classes = Task("classes", "auroc", 2)
    torch.testing.assert_close(classes.margins(y), y[:, 1] - y[:, 0])
    torch.testing.assert_close(classes.margins(one), one[:, 0])
    assert torch.equal(Task("labels", "macro_auroc", 2).margins(y), y)
    torch.testing.assert_close(classes.answers(y), y.exp() / y.exp().sum(1, keepdim=True))
    torch.testing.assert_close(classes.answers(one), 1 / (1 + (-one).exp()))
    torch.testing.assert_close(Task("labels", "f1", 2).answers(y), 1 / (1 + (-y).exp()))
    for kind in ("numbers", "survival", "pairs"):
        assert torch.equal(Task(kind, "", 2).answers(y), y.double())
    assert Task("classes", "accuracy", 1).evaluate(
        torch.tensor([[0.1], [-0.1], [2.0]]), torch.tensor([1, 1, 1])
    ) == pytest.approx(2 / 3)
    assert Task("classes", "accuracy", 1).evaluate(torch.zeros(1, 1), torch.tensor([0])) == 1
    nothing = torch.zeros(3, 2, dtype=torch.long)
    assert Task("labels", "f1", 2).evaluate(-torch.ones(3, 2), nothing) == 0

    def own(outputs: Tensor, labels: Tensor) -> float:
        return float(outputs.sum() - labels.sum())

    task = Task.of(adapter(torch.tensor([0, 1])), None, 3, own)
    assert (task.metric, task.kind) == ("own", "classes")
    assert task.evaluate(torch.ones(2, 3), torch.tensor([0, 1])) == 5
    accuracy = type("accuracy", (), {"__call__": own})()
    names = [metric_name(m) for m in (own, "f1", None, accuracy)]
    assert names == ["own", "f1", None, "own accuracy"], "not taken for the score of that name"
    assert set(BOUNDED) == set(METRICS) - {"r2"}
    assert set(RANKED) == {name for name in METRICS if "auroc" in name} | {"concordance"}
