"What tests of the console commands share."
import atexit, contextlib, gc, importlib, io, os, shutil, subprocess, sys, tempfile
from configparser import ConfigParser
from pathlib import Path
from unittest.mock import patch
import pytest
from forks import ForkedScript, outside, reads_hub_only

ROOT = Path(__file__).resolve().parent.parent
# or the workers of pytest and what they start wait for one another
os.environ.setdefault(
    'OMP_NUM_THREADS',
    str(max(1, (os.cpu_count() or 1) // int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 1)))),
)
# features are kept there, not in the home of who runs the tests
os.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp(prefix='capnb-tests-')
atexit.register(shutil.rmtree, os.environ['XDG_CACHE_HOME'], ignore_errors=True)

@pytest.hookimpl(tryfirst=True) # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """The tests of a file go to one worker, as they share what it trains; the exercises of the chapters need
    nothing of each other, so they come last: then neither worker waits long for the other."""
    items.sort(key=lambda item: item.path.name=='test_exercises.py')
    for item in items:
        if item.path.name != 'test_exercises.py':
            item.add_marker(pytest.mark.xdist_group(item.path.name))

def pytest_collection_finish():
    "Imports leave objects by the million, which nobody need look through again when garbage is collected."
    gc.freeze()

@pytest.fixture(scope='session')
def environment(): return outside

@pytest.fixture(scope='session')
def scripts():
    "The console commands of settings.ini: (module, function) by name."
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    found = [script.split('=') for script in config['DEFAULT']['console_scripts'].split()]
    return {name: tuple(target.split(':')) for name,target in found}

@pytest.fixture(scope='session')
def start(scripts, tmp_path_factory):
    """Start a console command by its name in the folder `cwd`, through a script like the one that pip
    installs; in a copy of a process that has imported all, but where `env` changes the environment, which
    libraries read on import, or where it must be a `fresh` one. The copy calls `prepare` first. What still
    runs at the end of all tests is killed, or this process would wait for it."""
    folder, started = tmp_path_factory.mktemp('scripts'), []
    for name,(module, function) in scripts.items():
        (folder / name).write_text(
            'import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler) # a runner in the'
            ' background has it ignored\n'
            f"from {module} import {function}\nif __name__ == '__main__': sys.exit({function}())\n"
        )
    def start(name, *args, cwd, env=None, fresh=False, prepare=None):
        assert name in scripts, f'settings.ini has no console script {name}'
        words, there = [str(a) for a in args], outside(COLUMNS='200', **(env or {}))
        if not fresh and reads_hub_only(env or {}):
            process = ForkedScript(folder / name, words, cwd, there, prepare)
        else:
            process = subprocess.Popen(
                [sys.executable, folder / name, *words],
                cwd=cwd,
                env=there,
                text=True,
                encoding='utf-8',
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        started.append(process)
        return process
    yield start
    for process in started:
        process.kill()

@pytest.fixture(scope='session')
def run(start):
    "Run a console command to its end; gives exit code, output and error output."
    def run(name, *args, **how):
        with start(name, *args, **how) as process:
            try:
                out, err = process.communicate(timeout=600)
            finally:
                process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)
    return run

@pytest.fixture(scope='session')
def call(scripts):
    """Call the function of a console command in this process, which has imported already what a new one
    imports for many seconds; gives what `run` gives."""
    def call(name, *args, cwd):
        module, function = scripts[name]
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(
            err
        ), patch.dict(os.environ, COLUMNS='200'):
            try:
                getattr(importlib.import_module(module), function)([str(a) for a in args])
            except SystemExit as e:
                code = e.code or 0
        return subprocess.CompletedProcess([name, *args], code, out.getvalue(), err.getvalue())
    return call

@pytest.fixture(scope='module')
def browser_with():
    "Start a Chromium of this machine with some flags; without one, what needs it is skipped."
    path = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not path:
        pytest.skip('there is no Chromium on this machine')
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as p, contextlib.ExitStack() as stack:
        def launch(*flags):
            return stack.enter_context(
                contextlib.closing(p.chromium.launch(executable_path=path, args=['--no-sandbox', *flags]))
            )
        yield launch

@pytest.fixture(scope='module')
def browser(browser_with): return browser_with()
