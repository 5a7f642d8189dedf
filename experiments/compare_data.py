"""A data set of `experiments.data` as a `datasets.Dataset`, for `data.name` of the command line."""

from __future__ import annotations

from datasets import Dataset

from experiments import data

__all__ = ["rotten_tomatoes"]


def rotten_tomatoes() -> Dataset:
    texts, labels = data.rotten_tomatoes()
    return Dataset.from_dict({"text": list(texts), "label": list(labels)})
