"""
A fake SAYCam in the published layout, for those without the agreement: noise for pictures.

    python tests/fake_saycam.py 20000     # times `data.py saycam` on so many frames

frames.txt is a zip of S_YYYYMMDD_AABB_PP_UUU_FF.jpg, 224 x 224; {train,val,test}.json are CVCL's,
Azure_transcribed_corpus_train.json and SAYCam_train_data.json BabyLLaVA's.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SAID = ("that 's a ball .", "you see the cat ?", "oh , look at the doggie !", "your nose ?")


def jpeg(rng, size):
    noise = Image.fromarray(rng.randint(0, 256, (14, 14, 3), np.uint8))
    noise.resize((size, size), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


def write(folder, utterances=(12, 4, 4), size=224, method=zipfile.ZIP_STORED, pictures=50, seed=0):
    """Write it; returns {frame name: JPEG bytes}. At most 32 frames an utterance, 5 a second."""
    folder, rng = Path(folder), np.random.RandomState(seed)
    folder.mkdir(parents=True, exist_ok=True)
    pool, frames, pairs = [jpeg(rng, size) for _ in range(pictures)], {}, []
    with zipfile.ZipFile(folder / "frames.txt", "w", method) as archive:
        for day, (split, count) in enumerate(zip(("train", "val", "test"), utterances)):
            entries = []
            for u in range(count):
                video = f"S_2013{u // 1000 + 1:02d}{day + 1:02d}_0937_{u % 1000 // 100:02d}"
                names = [f"{video}_{u % 100:03d}_{f:02d}.jpg" for f in range(rng.randint(1, 33))]
                for name in names:
                    frames[name] = pool[rng.randint(len(pool))]
                    archive.writestr(f"train_5fps/{name}", frames[name])
                said = SAID[u % 4]
                entries.append(
                    {
                        "utterance": said,
                        "transcript_filename": f"{video}.csv",
                        "video_filename": f"{video}.mp4",
                        "utterance_num": u % 100,
                        "num_frames": len(names),
                        "timestamps": [f / 5 for f in range(len(names))],
                        "frame_filenames": names,
                    }
                )
                alike = [0.1 + 0.2 * (f % 2) for f in range(len(names))] if u % 2 else 0.3
                pairs.append(
                    {
                        "image": names if u % 2 else names[0],
                        "conversations": [
                            {"from": "human", "value": "<image>"},
                            {"from": "gpt", "value": said},
                        ],
                        "similarity": alike,
                    }
                )
            (folder / f"{split}.json").write_text(json.dumps({"data": entries}))
    (folder / "SAYCam_train_data.json").write_text(json.dumps(pairs))
    (folder / "Azure_transcribed_corpus_train.json").write_text(json.dumps(["hello baby ."] * 40))
    return frames


def main(count):
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        frames = len(write(".", (count * 9 // 165, count // 330, count // 330), pictures=500))
        script = Path(__file__).resolve().parent.parent / "data.py"
        command = [
            sys.executable,
            str(script),
            "saycam",
            "--frames",
            "frames.txt",
            "--annotations",
            "train.json",
            "val.json",
            "test.json",
        ]
        start = time.perf_counter()
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        took = time.perf_counter() - start
        print(
            f"{frames} frames in {took:.1f} s: {frames / took:.0f} a second on {os.cpu_count()} "
            f"cores; SAYCam's 600,285 would take {600285 / frames * took / 60:.0f} minutes"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]))
