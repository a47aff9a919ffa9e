"Processes that need not import for many seconds: copies of a server that has imported everything."
import gc, importlib, multiprocessing, os, runpy, signal, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(
    [
        'capnb.run.commands',
        'capnb.evaluation',
        'capnb.run.training',
        'transformers.models.clip.modeling_clip',
        'transformers.models.qwen3.modeling_qwen3',
        'matplotlib.figure',
        'matplotlib.pyplot',
        'matplotlib.backends.backend_agg',
        'torch._dynamo',
        'datasets',
        'fastcore.test',
        'nbdev',
        'pytest',
    ]
)

def outside(**more):
    "The environment of a process that imports this checkout and asks no network."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    return {**os.environ, 'PYTHONPATH': path, 'HF_HUB_OFFLINE': '1', 'PYTHONUTF8': '1', **more}

def fork(target, *args):
    "Start `target(*args)` in a copy of the server; the first call starts the server."
    process = SERVER.Process(target=target, args=args)
    with patch.dict(os.environ, outside(MPLBACKEND='Agg')):
        process.start()
    return process

def write_to(*files):
    "Have what this process, and what it starts, says on its output and error output go to one file or two."
    for fd,file in zip((1, 2), files*2, strict=False):
        os.dup2(file, fd)
    # as Python opens them at its start, and not as the server found its own
    sys.stdout = open(1, 'w', encoding='utf-8', closefd=False)
    sys.stderr = open(2, 'w', encoding='utf-8', errors='backslashreplace', buffering=1, closefd=False)

def reads_hub_only(env):
    "Whether such changes of the environment concern the clients of the hub and nothing else."
    return all(name.startswith('HF_') or name.upper()=='NO_PROXY' for name in env)

def read_hub_environment():
    "Have the clients of the hub, which read the environment on import, read it as it is now."
    import datasets.config, huggingface_hub.hf_api
    importlib.reload(huggingface_hub.constants)
    importlib.reload(datasets.config)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT

def run_script(script, args, cwd, env, prepare, out, err):
    "In a copy of the server: run a script as Python would in a process of its own."
    gc.freeze() # what the server has imported is no garbage
    write_to(out.fileno(), err.fileno())
    multiprocessing.set_start_method('fork', force=True) # what a process of its own would find
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    read_hub_environment()
    sys.argv = [str(script), *args]
    if prepare:
        prepare()
    runpy.run_path(str(script), run_name='__main__')

class ForkedScript:
    "A script in a copy of the server, with as much of `subprocess.Popen` as the tests use."
    def __init__(self, script, args, cwd, env, prepare=None):
        self.args = [str(script), *args]
        readers, writers = zip(*(SERVER.Pipe(duplex=False) for _ in range(2)), strict=True)
        self.process = fork(run_script, script, args, cwd, env, prepare, *writers)
        for end in writers:
            end.close() # or reading would not end with the process
        self.stdout, self.stderr = (open(os.dup(end.fileno()), encoding='utf-8') for end in readers)

    def __enter__(self): return self

    def __exit__(self, *error):
        self.stdout.close()
        self.stderr.close()
        self.wait()

    @property
    def pid(self): return self.process.pid

    @property
    def returncode(self): return self.process.exitcode

    def poll(self): return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def send_signal(self, number):
        if self.process.exitcode is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        "What it says on its output and error output, until its end."
        with ThreadPoolExecutor(2) as readers:
            said = [readers.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        return [text.result() for text in said]
