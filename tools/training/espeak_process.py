"""Speaks one text with eSpeak NG's library, in a process of its own: `python -m training.espeak_process REQUEST`.

The library carries state from one text to the next, so the same text sounds the same only in a new process. REQUEST is
JSON: voice, words_per_minute, pitch (0-100), text. Standard output gets a line of JSON, {"rate": Hz, "phonemes":
[[seconds, mnemonic], ...]}, then mono PCM16 in the machine's byte order. Only the standard library, to start quickly.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any, Final

LIBRARY: Final = "libespeak-ng.so.1"
# speak_lib.h, version 1.51
_RETRIEVAL, _PHONEME_EVENTS, _UTF8 = 1, 1, 1
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_EVENT_END, _EVENT_PHONEME = 0, 7


class _Id(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def speak(text: str, voice: str, words_per_minute: int, pitch: int) -> tuple[int, bytes, list[tuple[float, str]]]:
    """The sample rate, the PCM16 and the phoneme events of a text. Once a process.

    Raises OSError where the library or the voice is missing.
    """
    library = ctypes.CDLL(LIBRARY)
    rate = library.espeak_Initialize(_RETRIEVAL, 0, None, _PHONEME_EVENTS)
    if rate <= 0:
        raise OSError("eSpeak NG finds no data; install the package espeak-ng-data")
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise OSError(f"eSpeak NG has no voice {voice!r}; see espeak-ng --voices=en")
    library.espeak_SetParameter(_PARAMETER_RATE, words_per_minute, 0)
    library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
    pcm, phonemes = bytearray(), list[tuple[float, str]]()

    def receive(samples: Any, count: int, events: Any) -> int:
        if count > 0:
            pcm.extend(ctypes.string_at(samples, 2 * count))
        i = 0
        while events[i].type != _EVENT_END:
            if events[i].type == _EVENT_PHONEME:
                phonemes.append((events[i].audio_position / 1000, events[i].id.string.decode("utf-8", "replace")))
            i += 1
        return 0

    callback = _Callback(receive)
    library.espeak_SetSynthCallback(callback)
    encoded = text.encode()
    library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    return rate, bytes(pcm), phonemes


def main() -> None:
    request = json.loads(sys.argv[1])
    rate, pcm, phonemes = speak(request["text"], request["voice"], request["words_per_minute"], request["pitch"])
    head = json.dumps({"rate": rate, "phonemes": phonemes})
    sys.stdout.buffer.write(head.encode() + b"\n" + pcm)


if __name__ == "__main__":
    main()
