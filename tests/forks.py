"""
Run scripts as a shell would, but in forks of one process that has imported torch: the tests start a
hundred scripts, and importing torch takes each of them two seconds.

As a script, this file is that process: it reads a line of jobs, runs them side by side, and writes
a line of exit codes.
"""

import importlib
import json
import os
import runpy
import socket
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
        return self.run_all([command], cwd, [env], input)[0]

    def run_group(self, count, command, cwd, env, imports=()):
        """What torchrun starts, without torchrun: the CompletedProcess of each process.

        imports: modules that all of them need."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        envs = [env | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return self.run_all([command] * count, cwd, envs, imports=imports)

    def run_all(self, commands, cwd, envs, input=None, imports=()):
        if self.process is None:
            how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen([sys.executable, __file__], **how)
        with tempfile.TemporaryDirectory() as name:
            jobs = []
            for i, (command, env) in enumerate(zip(commands, envs)):
                files = [Path(name) / f"{stream}{i}" for stream in ("in", "out", "err")]
                for file, content in zip(files, (input or "", "", "")):
                    file.write_text(content)
                files = list(map(str, files))
                jobs.append({"command": command, "cwd": str(cwd), "env": env, "files": files})
            asked = {"imports": imports, "jobs": jobs}
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            codes = json.loads(self.process.stdout.readline())
            return [
                subprocess.CompletedProcess(
                    job["command"], code, *(Path(file).read_text() for file in job["files"][1:])
                )
                for job, code in zip(jobs, codes)
            ]


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
        asked, children = json.loads(line), []
        for module in asked["imports"]:
            importlib.import_module(module)
        for job in asked["jobs"]:
            children.append(os.fork())
            if not children[-1]:
                become(job)
                sys.exit()
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    serve()
