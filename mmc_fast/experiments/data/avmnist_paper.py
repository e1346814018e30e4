"""avMNIST in the protocol of the paper's table 3: 1,500 recordings of three speakers, each with an image of its digit."""

from __future__ import annotations

import numpy as np

from mmc_fast.experiments.data.archive import Archive

PAPER_VARIANTS = {"paper": None, "paper-95": 0.95, "paper-90": 0.90, "paper-85": 0.85, "paper-80": 0.80}
"""Variant -> share of the training and validation rows without audio; with a share, no test row has audio."""

_SPEAKERS = (1, 3, 4)  # jackson, nicolas, theo: those of the first release of the Free Spoken Digit Dataset
_SEED = 2505
_TRAIN, _VALIDATION = 30, 5  # of the 50 recordings of one digit by one speaker; the rest is the test part


def paper_rows(archive: Archive, share: float | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row of the image, recording, part, and whether there is audio, for each of the 1,500 samples.

    1,050 rows to train on, of which 150 are the validation part, and 450 to test, the same shares of every digit and
    speaker. No image and no recording occurs twice. Rows without audio at a lower share are also without it at a higher.
    """
    rng = np.random.default_rng(_SEED)
    digit, speaker, label = archive.read("rec_digit"), archive.read("rec_speaker"), archive.read("label")
    recordings, images, parts = [], [], []
    for d in range(10):
        drawn = rng.permutation(np.flatnonzero(label == d))
        used = 0
        for s in _SPEAKERS:
            mine = rng.permutation(np.flatnonzero((digit == d) & (speaker == s)))
            recordings.append(mine)
            images.append(drawn[used : used + len(mine)])
            parts.append(np.digitize(np.arange(len(mine)), (_TRAIN, _TRAIN + _VALIDATION)))
            used += len(mine)
    split = np.concatenate(parts).astype(np.uint8)
    heard = np.ones(len(split), bool)
    if share is not None:
        heard[split == 2] = False
        for part in (0, 1):
            rows = rng.permutation(np.flatnonzero(split == part))
            heard[rows[round((1 - share) * len(rows)) :]] = False
    return np.concatenate(images), np.concatenate(recordings), split, heard
