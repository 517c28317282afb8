"""Says a WAV through a tenant: python live.py ws://127.0.0.1:8086/ws/TENANT speech.wav [folder for the frames]"""

import asyncio
import json
import struct
import sys
import wave
from pathlib import Path

from websockets.asyncio.client import connect

HEADER = "<BBHIQI"  # version 1, kind (1 audio, 2 frame), flags, epoch, pts, length


async def send(socket, speech):
    await socket.send(json.dumps({"type": "start", "sample_rate": speech.getframerate()}))
    while data := speech.readframes(speech.getframerate() // 25):  # 40 ms; any size will do
        await socket.send(struct.pack(HEADER, 1, 1, 0, 0, 0, len(data)) + data)
    await socket.send(json.dumps({"type": "segment_end"}))


async def main(url, path, folder=""):
    with wave.open(path) as speech:  # mono PCM16
        async with connect(url, subprotocols=["lipsync.v1"], compression=None) as socket:
            sending = asyncio.create_task(send(socket, speech))
            async for message in socket:
                if isinstance(message, str):
                    print(message)
                    if json.loads(message)["type"] == "playback_finished":
                        break
                elif message[1] == 2:
                    _, _, speaking, _, pts, _, number, dropped = struct.unpack_from(HEADER + "II", message)
                    print(f"frame of background {number} at {pts}, {speaking=}, {dropped=}")
                    if folder:
                        Path(folder, f"{pts:010d}.jpg").write_bytes(message[28:])
                    await socket.send(json.dumps({"type": "ack", "pts": pts}))
            await sending


asyncio.run(main(*sys.argv[1:]))
