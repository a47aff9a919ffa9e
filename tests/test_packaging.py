"The package as others get it: source distribution and wheel are built, installed and used."
import os, shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_SHIPPED = { # only a clone of the repository has a use for these
    '.github/workflows/ci.yml', '.github/workflows/site.yml', '.gitignore', '.pre-commit-config.yaml',
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (ROOT/'.git').exists(), reason='this is no clone')]

def call(*command, cwd, **env):
    "Run a command to its end; gives what it prints."
    # neither this checkout nor this run of pytest is what the command works for
    here = {k: v for k,v in os.environ.items() if k != 'PYTHONPATH' and not k.startswith('PYTEST_')}
    env = here | env
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout

@pytest.fixture(scope='module')
def files():
    "The files of the repository that are there, by their path from its top."
    names = call('git', 'ls-files', '--cached', '--others', '--exclude-standard', cwd=ROOT).splitlines()
    return {n for n in names if (ROOT/n).exists()}

@pytest.fixture(scope='module')
def built(files, tmp_path_factory):
    "A source distribution of the repository, and the wheel that is built from it."
    source = tmp_path_factory.mktemp('source')
    for name in files:
        (source/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, source/name)
    call(sys.executable, '-m', 'build', '--no-isolation', cwd=source)
    return next((source/'dist').glob('*.tar.gz')), next((source/'dist').glob('*.whl'))

def install(archive, folder):
    "Install an archive, without what it needs, into a folder; gives the environment that finds it there."
    call(
        sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-build-isolation', '--no-index',
        '--target', folder, archive, cwd=folder.parent,
    )
    return dict(PYTHONPATH=str(folder))

def use(folder, env):
    "Train and caption with what is installed in a folder, by its commands and from Python."
    work = folder.parent
    python = "import capnb, pathlib; print(pathlib.Path(capnb.__file__).parent.parent, capnb.__version__)"
    place, version = call(sys.executable, '-c', python, cwd=work, **env).split()
    assert Path(place) == folder
    sizes = '--training_size_limit 24 --batch_size 8 --num_epochs 1 --adapter_width 16'.split()
    call(folder/'bin'/'capnb_train', *sizes, '--evaluation_enabled', 'false', cwd=work, **env)
    code = "from capnb.storybook import Storybook; Storybook('test')[0]['image'].save('page.png')"
    call(sys.executable, '-c', code, cwd=work, **env)
    said = call(folder/'bin'/'capnb_caption', 'page.png', cwd=work, **env)
    code = "from capnb import load; print(load(device='cpu').caption('page.png'))"
    assert call(sys.executable, '-c', code, cwd=work, **env).strip() in said
    assert f'capnb {version}' in call(folder/'bin'/'capnb_train', '--version', cwd=work, **env)

def test_wheel_holds_each_file_of_the_package(built, files):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {n for n in wheel.namelist() if '.dist-info/' not in n}
    assert names == {n for n in files if n.startswith('capnb/')}

def test_sdist_holds_each_file_of_the_repository(built, files):
    with tarfile.open(built[0]) as sdist:
        names = {m.name.partition('/')[2] for m in sdist.getmembers() if m.isfile()}
    made = {'PKG-INFO', 'setup.cfg'}
    assert {n for n in names if not n.startswith('capnb.egg-info/')} - made == files - NOT_SHIPPED

def test_wheel_is_installed_and_used(built, tmp_path):
    folder = tmp_path/'site'
    use(folder, install(built[1], folder))

def test_sdist_is_installed_and_its_tests_pass(built, tmp_path):
    folder = tmp_path/'site'
    env = install(built[0], folder)
    use(folder, env)
    with tarfile.open(built[0]) as sdist:
        sdist.extractall(tmp_path, filter='data')
    here = next(tmp_path.glob('capnb-*'))
    names = ['tests/test_project.py', 'tests/test_front_door.py', 'tests/test_settings.py']
    call(sys.executable, '-m', 'pytest', '-n', '0', '-q', *names, cwd=here, **env)
