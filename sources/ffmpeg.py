"""
Frames of a film at given times, decoded by the program ffmpeg: the one on PATH, or the one in the
package imageio-ffmpeg.
"""

import os
import re
import shutil
import subprocess
import tempfile

import numpy as np

from config import UserError


def find_ffmpeg():
    """The path of ffmpeg. Raises UserError with how to get it."""
    found = shutil.which("ffmpeg")
    if found:
        return found
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise UserError(
            "no ffmpeg: install it, or `pip install imageio-ffmpeg`, which contains one"
        ) from None


def read_exactly(pipe, count):
    """`count` bytes of a pipe, or fewer at its end."""
    content = bytearray()
    while len(content) < count:
        block = pipe.read(count - len(content))
        if not block:
            break
        content += block
    return content


def read_header(pipe):
    """(width, height) of the next picture in a stream of PPMs; None at its end."""
    fields = []
    while len(fields) < 4:  # P6, width, height, 255
        line = pipe.readline()
        if not line:
            return None
        fields += line.split()
    if fields[0] != b"P6" or fields[3] != b"255":
        raise ValueError(f"ffmpeg was asked for 8 bits, and gives {fields}")
    return int(fields[1]), int(fields[2])


def read_frames(path, fps):
    """Yield the pictures (height, width, 3) uint8 on the screen at 0, 1 / fps, 2 / fps ... seconds
    of a film. Raises UserError if there are none, or with ffmpeg's error message."""
    # round=up: each time gets the picture that is on the screen then, not the nearest one. The
    # scale makes non-square pixels square. rgb24: else films of more than 8 bits stay so.
    chain = f"fps={fps}:round=up:start_time=0,scale=iw*sar:ih"
    film = f"file:{path}"  # else a name such as "12:30 bath.mp4" is taken for a protocol
    command = [find_ffmpeg(), "-v", "error", "-nostdin", "-i", film, "-map", "0:v:0"]
    command += ["-vf", chain, "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages)
        try:
            count = 0
            for size in iter(lambda: read_header(process.stdout), None):
                content = read_exactly(process.stdout, size[0] * size[1] * 3)
                if len(content) < size[0] * size[1] * 3:
                    break
                count += 1
                yield np.frombuffer(content, np.uint8).reshape(size[1], size[0], 3)
            failed = process.wait() != 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        messages.seek(0)
        lines = messages.read().decode("utf-8", "replace").splitlines()
    why = re.sub(r"^\[[^\]]*\]\s*", "", lines[0]) if lines else "it has no pictures"
    if failed or not count:
        if any("matches no streams" in line for line in lines):
            why = "it has only sound or text"
        if os.path.getsize(path) == 0:
            why = "it is empty"
        raise UserError(f"{path}: not a film that ffmpeg can decode ({why})")
