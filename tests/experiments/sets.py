"""UCF-101 and MSR-VTT in small, laid out as they are distributed."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

CLASSES = {"ApplyEyeMakeup": 4, "HandstandPushups": 2, "YoYo": 2}  # clips in the training list


def frames(n: int, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """A moving pattern, uint8 (n, height, width, 3)."""
    y, x = np.mgrid[:height, :width]
    phase = [(x * (1 + seed % 3) + 3 * i, y * 2 + 5 * i, (x + y) + 7 * (i + seed)) for i in range(n)]
    return np.stack([np.stack(channels, -1) % 256 for channels in phase]).astype(np.uint8)


def write(path: Path, clip: np.ndarray, codec: str = "libx264", fps: int = 25, **options: str) -> None:
    """A video file; its container is that of the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        stream.bit_rate = 2_000_000
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_packed(path: Path, clip: np.ndarray) -> None:
    """An AVI as Xvid writes it and thousands of UCF-101 are: each B-frame lies in the packet of the frame before it in
    the file, and an empty frame in the next packet keeps the count."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        options = {"bf": "1", "g": "12", "sc_threshold": "1000000000", "flags": "+bitexact"}
        stream: Any = container.add_stream("mpeg4", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        stream.bit_rate = 2_000_000
        encoded = [p for f in clip for p in stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24"))]
        coded = [bytes(packet) for packet in [*encoded, *stream.encode()]]
        start = coded[0].index(b"\0\0\1\xb3")  # the group of pictures that follows the headers
        coded[0] = coded[0][:start] + b"\0\0\1\xb2DivX503b1393p" + coded[0][start:]
        chunks: list[bytes] = []
        for data in coded:
            if data[data.index(b"\0\0\1\xb6") + 4] >> 6 == 2:  # a B-frame
                chunks[-1] += data
                chunks.append(b"\0\0\1\xb6\x50\x00\x7f")  # a P-frame in which nothing is coded
            else:
                chunks.append(data)
        for i, data in enumerate(chunks):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 25)
            packet.is_keyframe = i == 0
            container.mux(packet)


def make_ucf101(root: Path) -> Path:
    """UCF-101/Class/v_Class_gXX_cYY.avi and ucfTrainTestlist/, of three classes."""
    train, test = [], []
    for number, (name, count) in enumerate(CLASSES.items(), 1):
        for i in range(count + 1):
            spelt = name.replace("Handstand", "HandStand")  # the set writes this class in two ways
            file = f"{name}/v_{spelt}_g{i + 8:02d}_c01.avi"
            clip = frames(41, seed=7 * number + i)
            if i == 1:
                write_packed(root / "UCF-101" / file, clip)
            else:
                write(root / "UCF-101" / file, clip, "mpeg4")
            (train if i < count else test).append(f"{file} {number}" if i < count else file)
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{i} {name}\r\n" for i, name in enumerate(CLASSES, 1)))
    (lists / "trainlist01.txt").write_text("\r\n".join(train) + "\r\n")
    (lists / "testlist01.txt").write_text("\n".join(test) + "\n")
    return root


def make_msrvtt(root: Path) -> Path:
    """test_videodatainfo.json and TestVideo/ of three videos with two captions each, one with a third."""
    videos = [f"video{number}" for number in (7010, 7011, 7012)]
    for i, video in enumerate(videos):
        write(root / "TestVideo" / f"{video}.mp4", frames(40, seed=i))
    said = [(videos[i % 3], f"caption {i // 3} of {videos[i % 3]}") for i in range(6)] + [(videos[1], "one more")]
    sentences = [{"caption": text, "video_id": video, "sen_id": 200_000 + i} for i, (video, text) in enumerate(said)]
    about = {"category": 9, "url": "https://example.org", "start time": 1.0, "end time": 2.6, "split": "test"}
    listed = [{**about, "video_id": video, "id": 7010 + i} for i, video in enumerate(videos)]
    (root / "test_videodatainfo.json").write_text(json.dumps({"info": {}, "videos": listed, "sentences": sentences}))
    return root
