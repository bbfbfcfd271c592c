"""
How long does preparing a film take, and how much memory? Films of 10 and of 20 minutes, 640 x
360 at 30 frames a second, with 20 utterances a minute, are made and prepared.

    pip install imageio-ffmpeg            # or any ffmpeg on PATH
    python benchmarks/video.py
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sources import ffmpeg  # noqa: E402

MINUTES = (10, 20)


def make(folder, minutes):
    """A film of a test pattern, and its transcript."""
    folder.mkdir()
    source = f"testsrc2=size=640x360:rate=30:duration={60 * minutes}"
    command = [ffmpeg.find_ffmpeg(), "-v", "error", "-f", "lavfi", "-i", source]
    command += ["-pix_fmt", "yuv420p", "-c:v", "libx264", "-preset", "ultrafast"]
    subprocess.run([*command, str(folder / "film.mp4")], check=True)
    rows = ["start,end,text"]
    for i in range(20 * minutes):
        rows.append(f"{3 * i + 0.5},{3 * i + 2.5},look at number {i} , here it is !")
    (folder / "film.csv").write_text("\n".join(rows))


def main():
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        for minutes in MINUTES:
            make(Path(f"films{minutes}"), minutes)
            begun = time.perf_counter()
            flags = [f"--videos=films{minutes}", f"--name=film{minutes}", "--vocab_size=300"]
            preparing = subprocess.Popen([sys.executable, str(ROOT / "data.py"), "video", *flags])
            _, status, usage = os.wait4(preparing.pid, 0)
            took, peak = time.perf_counter() - begun, usage.ru_maxrss / 1024
            if status:
                sys.exit("it failed")
            print(f"{minutes} minutes: prepared in {took:.1f} s, largest process {peak:.0f} MB")


if __name__ == "__main__":
    main()
