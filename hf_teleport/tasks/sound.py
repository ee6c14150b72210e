"""Decode and resample sound files: by soundfile if it is installed, or WAV files by the standard library."""

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


def decode(sound: dict[str, Any]) -> tuple[np.ndarray, int]:
    """Decode a sound. Returns its samples (N,) between -1 and 1, the mean of its channels, and its sampling rate in Hz.

    Args:
        sound: `bytes` of a sound file, or its `path`.

    Raises:
        ValueError: the file can't be read. Without soundfile only WAV files of integers can.
    """
    data = sound["bytes"] if sound.get("bytes") is not None else Path(sound["path"]).read_bytes()
    try:
        import soundfile
    except ModuleNotFoundError:
        return _wav(data, sound.get("path"))
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except RuntimeError as error:  # the base class of soundfile's errors
        raise ValueError(f"the sound {sound.get('path') or 'in the data'} could not be read, remove it: {error}") from error
    return samples.mean(axis=1), rate


def sound_folders(folders: dict[str, str]) -> DatasetDict:
    """The sound files in each folder ('audio'), and the names of their subfolders ('label').

    This does not use `datasets`, which needs torchcodec to read sounds.

    Raises:
        ValueError: a folder has no sounds in subfolders.
    """
    found = {
        split: [path for path in sorted(Path(folder).glob("*/**/*")) if path.suffix.lower() in _SUFFIXES]
        for split, folder in folders.items()
    }
    if empty := [folders[split] for split, paths in found.items() if not paths]:
        raise ValueError(
            f"{empty[0]!r} has no sounds ({', '.join(_SUFFIXES)}) in subfolders; give a folder with a subfolder for each class."
        )
    labels = {split: [path.relative_to(folders[split]).parts[0] for path in paths] for split, paths in found.items()}
    kind = ClassLabel(names=sorted({label for split in labels.values() for label in split}))
    features = Features({"audio": {"bytes": Value("binary"), "path": Value("string")}, "label": kind})
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"audio": [{"bytes": None, "path": str(path)} for path in paths], "label": labels[split]}, features=features
            )
            for split, paths in found.items()
        }
    )


def _wav(data: bytes, path: str | None) -> tuple[np.ndarray, int]:
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(
            f"the sound {path or 'in the data'} could not be read: {error}. Without soundfile only WAV files of integers can be "
            "read: pip install soundfile."
        ) from error
    if width == 1:  # samples of one byte are unsigned, all others are signed
        whole = np.frombuffer(frames, np.uint8).astype(np.int32) - 128
    else:
        octets = np.frombuffer(frames, np.uint8).reshape(-1, width)
        # Shift to the top of four bytes and back, to extend the sign.
        whole = np.pad(octets, ((0, 0), (4 - width, 0))).view("<i4")[:, 0] >> 8 * (4 - width)
    samples = whole.astype(np.float32) / 2 ** (8 * width - 1)
    return samples.reshape(-1, channels).mean(axis=1), rate


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Convert samples (N,) to another rate in Hz. The result has N wanted / rate samples, rounded up.

    Raises:
        ModuleNotFoundError: the rates differ, and SciPy is not installed.
    """
    if rate == wanted:
        return samples
    try:
        from scipy.signal import resample_poly
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the sounds have {rate} Hz and the model takes {wanted} Hz; to convert them: pip install 'hf_teleport[audio]'."
        ) from error
    return resample_poly(samples, wanted, rate).astype(np.float32)
