"""fsdd_logmel20: the 3,000 recordings of the Free Spoken Digit Dataset as log-mel pictures of 20 bands and 20 frames."""

from __future__ import annotations

import io
import re
import wave
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmc_fast.errors import InputError
from mmc_fast.experiments.data.prepare.originals import Originals
from mmc_fast.experiments.data.prepare.recipe import Recipe

SPEAKERS = ["george", "jackson", "lucas", "nicolas", "theo", "yweweler"]
RATE = 8000  # samples in a second, and in a picture: longer recordings are cut, shorter ones end in silence
BANDS = FRAMES = 20
RANGE_DB = 80.0
WINDOW, FFT, FINE = 256, 512, 5  # samples of a window, length of its transform, windows averaged to a frame
SHA256 = "a2e8a660492f28d9eed6270b290d26cbc5c81d6077ce87d3c0ad5adf4d4ee696"  # of all names and contents
FSDD_SOURCE = "Free Spoken Digit Dataset (Jackson et al.), CC BY-SA 4.0"
_NAME = re.compile(rf"(\d)_({'|'.join(SPEAKERS)})_(\d+)\.wav")


@dataclass(frozen=True)
class Recordings:
    """Wave forms [R, 8000] of zero mean and unit power, with digit, speaker and number of each, in that order.

    ``split``: numbers 0 to 4 are the test part, as its makers say, 5 to 9 the validation part. ``speaker_split``: one
    speaker (theo) tests, one (yweweler) validates.
    """

    waves: np.ndarray
    digit: np.ndarray
    speaker: np.ndarray
    number: np.ndarray

    @property
    def split(self) -> np.ndarray:
        return np.where(self.number < 5, 2, np.where(self.number < 10, 1, 0)).astype(np.uint8)

    @property
    def speaker_split(self) -> np.ndarray:
        return np.where(self.speaker == 4, 2, np.where(self.speaker == 5, 1, 0)).astype(np.uint8)

    def pictures(self, originals: Originals) -> np.ndarray:
        """uint8 [R, 20, 20], the log-mel picture of each."""
        result = np.empty((len(self.waves), BANDS, FRAMES), np.uint8)
        for i, samples in enumerate(self.waves):
            result[i] = log_mel(samples)
            originals.progress("log-mel pictures", i + 1, len(self.waves))
        return result


def read_recordings(originals: Originals) -> Recordings:
    """All files ``DIGIT_SPEAKER_NUMBER.wav``, 16 bit, mono, 8 kHz."""
    files = originals.collect(_NAME.fullmatch, "recordings (0_george_0.wav, …)", expected=3000, sha256=SHA256)
    keyed = []
    for name, content in files.items():
        found = _NAME.fullmatch(name)
        assert found is not None
        with originals.reading(name):
            samples = _samples(name, content)
        keyed.append(((int(found[1]), SPEAKERS.index(found[2]), int(found[3])), samples))
    keyed.sort(key=lambda pair: pair[0])
    digit, speaker, number = np.array([key for key, _ in keyed], np.uint8).T.copy()
    return Recordings(np.stack([samples for _, samples in keyed]), digit, speaker, number)


def _samples(name: str, content: bytes) -> np.ndarray:
    try:
        with wave.open(io.BytesIO(content)) as file:
            kind = (file.getframerate(), file.getnchannels(), file.getsampwidth())
            raw = file.readframes(file.getnframes())
            whole = len(raw) == 2 * file.getnframes() > 0
    except wave.Error as error:
        raise ValueError(str(error)) from None
    if kind != (RATE, 1, 2) or not whole:
        raise InputError(
            f"{name}: needed are 8000 Hz, mono, 16 bit and all samples; got {kind[0]} Hz, {kind[1]} channels"
        )
    samples = np.frombuffer(raw, "<i2") / 32768
    samples = samples - samples.mean()
    samples = samples / (np.sqrt((samples**2).mean()) + 1e-9)
    return np.pad(samples[:RATE], (0, max(0, RATE - len(samples))))


def _mel_bank(low: float = 60.0, high: float = 4000.0) -> np.ndarray:
    """[FFT/2 + 1, BANDS]: triangles of unit sum whose corners are equally spaced on the mel scale."""
    ends = 2595 * np.log10(1 + np.array([low, high]) / 700)
    mel = np.linspace(ends[0], ends[1], BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    frequency = np.fft.rfftfreq(FFT, 1 / RATE)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequency - left) / (centre - left), (right - frequency) / (right - centre)
    weights = np.maximum(0, np.minimum(rising, falling))
    return (weights / np.maximum(weights.sum(1, keepdims=True), 1e-9)).T


_BANK = _mel_bank()
_STARTS = np.round(np.arange(FRAMES * FINE) * (RATE / (FRAMES * FINE))).astype(int)


def log_mel(samples: np.ndarray) -> np.ndarray:
    """uint8 [20, 20] (band, frame): 255 is the loudest cell of the recording, 0 is 80 dB below it."""
    padded = np.pad(samples, (WINDOW // 2, WINDOW))
    windows = padded[_STARTS[:, None] + np.arange(WINDOW)] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(windows, FFT, axis=1)) ** 2
    cells = (power @ _BANK).reshape(FRAMES, FINE, BANDS).mean(1).T
    decibel = 10 * np.log10(np.maximum(cells, 1e-10))
    decibel = np.clip(decibel - decibel.max(), -RANGE_DB, 0)
    return np.round((decibel + RANGE_DB) / RANGE_DB * 255).astype(np.uint8)


def build(originals: Originals) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    recordings = read_recordings(originals)
    arrays = {"logmel": recordings.pictures(originals), "digit": recordings.digit, "speaker": recordings.speaker}
    arrays |= {"number": recordings.number, "rec_split": recordings.split, "speaker_split": recordings.speaker_split}
    return arrays, {"name": "FSDD log-mel 20x20", "speakers": SPEAKERS, "source": FSDD_SOURCE}


RECIPE = Recipe(
    where="recordings/*.wav of https://github.com/Jakobovski/free-spoken-digit-dataset (v1.0.8 or later, as a folder or "
    "archive), CC BY-SA 4.0",
    build=build,
)
