"""
Frames of a film, at the times asked for, by ffmpeg: any file that it decodes. It is called as a
program, the one on PATH or the one that the package imageio-ffmpeg carries.
"""

import os
import re
import shutil
import subprocess
import tempfile

import numpy as np

from config import UserError


def find_ffmpeg():
    """The path of ffmpeg. Raises UserError, which says how to get it."""
    found = shutil.which("ffmpeg")
    if found:
        return found
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise UserError(
            "no ffmpeg: install it, or `pip install imageio-ffmpeg`, which carries one"
        ) from None


def read_exactly(pipe, count):
    """`count` bytes of a pipe, or fewer where it ends."""
    content = bytearray()
    while len(content) < count:
        block = pipe.read(count - len(content))
        if not block:
            break
        content += block
    return content


def read_header(pipe):
    """(width, height) of the next picture of a stream of PPMs, or None where it ends."""
    fields = []
    while len(fields) < 4:  # P6, width, height, 255
        line = pipe.readline()
        if not line:
            return None
        fields += line.split()
    return int(fields[1]), int(fields[2])


def read_frames(path, fps):
    """Yield the pictures (height, width, 3) uint8 that are on the screen at 0, 1 / fps, 2 / fps ...
    seconds of a film, one at a time. Raises UserError where there is none, or ffmpeg complains."""
    # round=up: a picture counts from the first of these times that is not before its own, so that
    # at n / fps there is what is seen then. Pixels that are not square are made so.
    chain = f"fps={fps}:round=up:start_time=0,scale=iw*sar:ih"
    command = [find_ffmpeg(), "-v", "error", "-nostdin", "-i", str(path), "-map", "0:v:0"]
    command += ["-vf", chain, "-f", "image2pipe", "-c:v", "ppm", "-"]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints)
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
        complaints.seek(0)
        lines = complaints.read().decode("utf-8", "replace").splitlines()
    why = re.sub(r"^\[[^\]]*\]\s*", "", lines[0]) if lines else "it holds no picture"
    if failed or not count:
        if any("matches no streams" in line for line in lines):
            why = "it has sound or text alone"
        if os.path.getsize(path) == 0:
            why = "it is empty"
        raise UserError(f"{path}: no film that ffmpeg can show ({why})")
