"""
Run scripts as a shell would, but in forks of one process that has imported torch: the tests start a
hundred scripts, and importing torch takes each of them two seconds.

As a script, this file is that process: it reads a job a line, and writes its exit code.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

MODES = (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)  # of stdin, stdout, stderr


class Forks:
    """Starts the process when it is needed first."""

    def __init__(self):
        self.process = None

    def run(self, command, cwd, env, input=None):
        """A subprocess.CompletedProcess of [script, argument, ...]."""
        if self.process is None:
            how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen([sys.executable, __file__], **how)
        with tempfile.TemporaryDirectory() as name:
            files = [Path(name) / stream for stream in ("in", "out", "err")]
            for file, content in zip(files, (input or "", "", "")):
                file.write_text(content)
            job = {"command": command, "cwd": str(cwd), "env": env, "files": list(map(str, files))}
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            said, wrong = (file.read_text() for file in files[1:])
        return subprocess.CompletedProcess(command, code, said, wrong)


def become(job):
    """Turn this process, a fork, into one that runs the script."""
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    for number, (path, mode) in enumerate(zip(job["files"], MODES)):
        os.dup2(os.open(path, mode), number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, "w" if i else "r") for i in range(3))
    sys.argv, sys.path[0] = job["command"], str(Path(job["command"][0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def serve():
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import tiktoken  # noqa: F401
    import torch  # noqa: F401
    import tqdm  # noqa: F401

    while line := sys.stdin.readline():
        child = os.fork()
        if not child:
            become(json.loads(line))
            sys.exit()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)


if __name__ == "__main__":
    serve()
