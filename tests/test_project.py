"""What the cells of a notebook cannot see: the package from outside, and rules that hold for all notebooks
together."""
import ast, json, os, re, shlex, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest, yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CFG = ConfigParser(delimiters=['='])
CFG.read(ROOT/'settings.ini', encoding='utf-8')
CFG = CFG['DEFAULT']
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))

def module_name(path):
    """The name of a module below the package: `run.sources.load` for `capnb/run/sources/load.py`; a
    package's is `run.__init__`."""
    return '.'.join(path.relative_to(ROOT/'capnb').with_suffix('').parts)

FILES = {module_name(p): p for p in sorted((ROOT/'capnb').rglob('*.py'))}
MODULES = [m for m in FILES if not m.endswith('__init__')]
each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)

def cells(path, kind=None):
    "The cells of a notebook, each with its source as one string."
    found = [
        c | dict(source=''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']
    ]
    return [c for c in found if kind in (None, c['cell_type'])]

def modules_of(path):
    "The modules that a notebook is exported to: its `default_exp`, and those that `#| export NAME` names."
    sources = [c['source'] for c in cells(path, 'code')]
    default = [m[1] for s in sources if (m := re.search(r'^#\s*\|\s*default_exp\s+([\w.]+)', s, re.M))]
    exports = [m[1] for s in sources if (m := re.match(r'#\s*\|\s*export[is]?[ \t]*([\w.]*)', s))]
    return list(dict.fromkeys([*default, *filter(None, exports)])) if exports else default

def number(path):
    "The place of a chapter among the others, such as (1, 'b') for 30e_images; None where it has no number."
    return (int(m[1]), m[2]) if (m := re.match(r'(\d+)([a-z]?)_', path.stem)) else None

def python(code, *words):
    "Run `code` in a fresh process at the top of the repository."
    command = [sys.executable, '-c', code, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

# Layers, from the bottom: imports go down only, or to a lower number of the same layer. Understand and Fast
# stand side by side.
BASE = """settings files log options checkpoint hardware hub images pixels image_pool many_images
out_of_memory towers image_processors words caption_cells row_images""".split()
COURSE = '''data encoder own_encoder adapter decoder any_decoder generation caption_lengths captioner
unfreezing build saving batches optimizer validation training intervals evaluation score_tables scores
inference explanation'''.split()
BELOW = dict(
    base=[],
    drawing=['base'],
    course=['base', 'drawing'],
    insight=['base', 'drawing', 'course'],
    fast=['base', 'drawing', 'course'],
    run=['base', 'drawing', 'course', 'insight', 'fast'],
    front=['base', 'drawing', 'course', 'insight', 'fast', 'run'],
)

def layer(module):
    "The layer that a module belongs to: by its package, or by its name where it lies at the top."
    if module.split('.')[0] in ('insight', 'fast', 'run'): return module.split('.')[0]
    named = {
        'storybook': 'drawing',
        '__init__': 'front',
        'commands': 'run',
        **dict.fromkeys(BASE, 'base'),
        **dict.fromkeys(COURSE, 'course'),
    }
    return named[module]

def imports_of(module):
    "The modules of this package that a module imports, inside functions too."
    package = ['capnb', *module.split('.')[:-1]]
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name != 'capnb']
        elif isinstance(node, ast.ImportFrom):
            base = (
                '.'.join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            names = [f'{base}.{a.name}' for a in node.names]
        else:
            continue
        for name in (n.removeprefix('capnb.') for n in names if n.startswith('capnb.')):
            # a name of a module, or one that a module defines; what the package itself defines is its front
            # door's
            if found := next((m for m in (name, name.rpartition('.')[0]) if m in MODULES), None):
                yield found
            elif not any(m.startswith(f'{name}.') for m in MODULES):
                yield '__init__'

NUMBERS = {m: number(p) for p in NOTEBOOKS for m in modules_of(p)}

def upward_imports(module):
    """What a module imports that lies neither in a lower layer, nor in a lower number of its own, nor in its
    own chapter."""
    mine = layer(module)
    for other in sorted(set(imports_of(module))):
        others = layer(other)
        if not (others in BELOW[mine] or others == mine and NUMBERS[other] <= NUMBERS[module]):
            yield other

# Imports that the rule forbids and that are still there. This only gets shorter: a line that is no longer
# true fails the test.
NOT_YET_DOWN = {
}

def test_there_is_something_to_test():
    assert NOTEBOOKS and MODULES

# A process that has imported what others wrote, and nothing of ours, is copied for each module: a forgotten
# import
# shows as it does in a fresh one, in a fraction of its time.
IMPORT_EACH = '''
import json, os, sys, traceback
import accelerate, datasets, ipywidgets, matplotlib.pyplot, torch._dynamo, transformers
import transformers.generation.utils, transformers.image_processing_utils
import transformers.models.auto.modeling_auto, transformers.models.clip.modeling_clip
import transformers.models.llava.modeling_llava, transformers.models.qwen3.modeling_qwen3
import rouge_score.rouge_scorer, transformers.integrations.mistral
failed = {}
for module in sys.argv[1:]:
    told, tell = os.pipe()
    if not os.fork():
        try:
            __import__(module)
        except BaseException:
            os.write(tell, traceback.format_exc().encode()[-5000:])
        os._exit(0)
    os.close(tell)
    with os.fdopen(told) as said:
        failed[module] = said.read()
    os.wait()
print(json.dumps(failed))
'''

@pytest.fixture(scope='module')
def told_by_import():
    "What went wrong when each module was imported, nothing where all went well."
    done = python(IMPORT_EACH, *(f'capnb.{module}' for module in MODULES))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

@pytest.mark.parametrize('module', MODULES)
def test_module_imports_alone(module, told_by_import):
    assert told_by_import[f'capnb.{module}'] == ''

def test_import_is_light():
    done = python('import sys, capnb; print([m for m in ("torch", "transformers") if m in sys.modules])')
    assert done.stdout.strip() == '[]', done.stdout + done.stderr

@each_notebook
def test_notebook_has_its_module(path):
    modules = modules_of(path)
    assert set(modules) <= set(FILES)
    exports = any(re.match(r'#\s*\|\s*export', c['source']) for c in cells(path, 'code'))
    assert bool(modules) == exports, 'a notebook has a module if it exports something'

def test_module_has_its_notebook():
    assert set(MODULES) - {'_modidx'} == {m for p in NOTEBOOKS for m in modules_of(p)} - {'__init__'}

def test_each_module_is_the_default_of_one_chapter():
    defaults = [modules_of(p)[0] for p in NOTEBOOKS if modules_of(p)]
    assert sorted(defaults) == sorted(set(defaults))

def test_each_chapter_has_a_number_of_its_own():
    numbers = [n for p in NOTEBOOKS if (n := number(p))]
    assert [n for n in sorted(set(numbers)) if numbers.count(n) > 1] == []

@each_notebook
def test_no_stored_error(path):
    errors = [o['ename'] for c in cells(path, 'code') for o in c['outputs'] if o['output_type'] == 'error']
    assert not errors

@each_notebook
def test_title_and_subtitle(path):
    first = cells(path, 'markdown')[0]['source']
    assert re.match(r'# \S.*\n+> \S.*\.$', first, re.M), 'first an H1 title and a sentence after `>`'

@each_notebook
def test_imports_only_from_lower_numbers(path):
    for module in modules_of(path):
        upwards, listed = set(upward_imports(module)), NOT_YET_DOWN.get(module, set())
        assert upwards <= listed, f'{module} imports upwards'
        assert listed <= upwards, f'{module} no longer imports these: shorten NOT_YET_DOWN'

def test_what_does_not_import_downwards_is_there():
    assert set(NOT_YET_DOWN) <= set(MODULES), 'gone: shorten NOT_YET_DOWN'

def test_no_module_imports_itself_by_way_of_another():
    needs = {m: set(imports_of(m)) - NOT_YET_DOWN.get(m, set()) for m in MODULES if m != '_modidx'}
    for _ in range(len(needs)):
        needs = {m: wanted for m in needs if (wanted := needs[m] & set(needs))} # those that need nothing go
    assert not needs, f'a circle among {sorted(needs)}'

@pytest.mark.parametrize('script', CFG['console_scripts'].split())
def test_command_exists(script):
    module, function = script.split('=')[1].split(':')
    tree = ast.parse((ROOT/(module.replace('.', '/') + '.py')).read_text(encoding='utf-8'))
    assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]

@pytest.mark.parametrize('requirement', [*CFG['requirements'].split(), *CFG['dev_requirements'].split()])
def test_pin_lies_in_the_range(requirement):
    lines = (ROOT/'.ci/constraints.txt').read_text(encoding='utf-8').split()
    pins = {canonicalize_name(name): version for name, version in (line.split('==') for line in lines)}
    wanted = Requirement(requirement)
    assert canonicalize_name(wanted.name) in pins, 'there is no pin'
    assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)], prereleases=True)

def test_a_file_goes_to_one_worker(request):
    """pytest 9.2 with xdist 3.8 loses the groups without a word; each worker then trains what the tests of a
    file share."""
    if 'PYTEST_XDIST_WORKER' in os.environ:
        assert request.node.nodeid.endswith('@test_project.py')

def test_the_changelog_names_what_is_there():
    text = (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')
    for row in re.findall(r'^\| .*? \| (.*) \|$', text, re.M):
        package = ''
        for name in re.findall(r'`((?:capnb)?\.[\w.*]+)`', row):
            name = name if name.startswith('capnb') else package + name # `.loss` after `capnb.fast.packing`
            package = name.rpartition('.')[0]
            module, attribute = name.removeprefix('capnb.').removesuffix('.*'), ''
            if module not in MODULES:
                module, _, attribute = module.rpartition('.')
            found = module in MODULES and (not attribute or attribute in FILES[module].read_text('utf-8'))
            assert (
                found
                or (
                    ROOT / 'capnb' / name.removeprefix('capnb.').removesuffix('.*').replace('.', '/')
                ).is_dir()
            ), name

def test_a_chapter_leaves_the_logger_as_it_was():
    "`nbdev_test` runs chapters one after another in one process: a later one would say nothing."
    for path in NOTEBOOKS:
        sources = '\n'.join(c['source'] for c in cells(path, 'code'))
        levels = re.findall(r"\blog\.setLevel\('?(?:logging\.)?(\w+)", sources)
        assert not levels or levels[-1] in ('INFO', 'level'), path.name # `level` is what it was before

COURSE_CHAPTERS = [p for p in NOTEBOOKS if re.match(r'0[1-9]', p.stem)]

@pytest.mark.parametrize('path', COURSE_CHAPTERS, ids=lambda p: p.stem)
def test_the_course_needs_no_other_track(path):
    "Not in a cell that shows something, either."
    source = '\n'.join(c['source'] for c in cells(path, 'code'))
    assert re.findall(r'(?:from|import) capnb\.(?:run|fast|insight)\b[.\w]*', source) == []

WORKFLOWS = sorted((ROOT/'.github'/'workflows').glob('*.yml'))

def commands_of(workflow):
    "The commands that a workflow runs, each as a list of words."
    steps = [step for job in yaml.safe_load(workflow.read_text(encoding='utf-8'))['jobs'].values()
             for step in job['steps']]
    lines = [line for step in steps for line in step.get('run', '').splitlines() if line.strip()]
    return [shlex.split(line) for line in lines]

@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.stem)
def test_commands_of_workflows_exist(path):
    found = commands_of(path)
    assert found
    for first, *rest in found:
        assert shutil.which(first), f'{first} is no command of an environment with capnb[dev]'
        for file in (word for word in rest if word.startswith('.ci/')):
            assert (ROOT/file).is_file(), f'{file} does not exist'

@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if number(p)], ids=lambda p: p.stem)
def test_a_heading_carries_its_number(path):
    wanted = '{}{}'.format(*number(path))
    assert cells(path, 'markdown')[0]['source'].startswith(f'# {wanted}. ')

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_running_all_cells_exports_nothing(path):
    assert not [c for c in cells(path, 'code') if 'nbdev_export(' in c['source']]

# Every address outside of this machine that a notebook, the README or a page of the package names, and why
OUTSIDE = {
    'https://arxiv.org/abs/1311.2901': 'the paper on occlusion',
    'https://arxiv.org/abs/1608.00507': 'the paper on the pointing game',
    'https://captum.ai': 'the library that attributions are compared with',
    'https://docs.ray.io/en/latest/data/data.html': 'what captions at scale are built on',
    'https://docs.ray.io/en/latest/serve/index.html': 'an alternative for serving',
    'https://docs.vllm.ai': 'a server that runs a shared LLaVA',
    'https://download.pytorch.org/whl/cpu': 'the small build of PyTorch',
    'https://filesystem-spec.readthedocs.io': 'how files elsewhere are named',
    'https://github.com/linkedin/Liger-Kernel': 'fused kernels, an extra',
    'https://github.com/pytorch/pytorch/issues/81620': 'why a message means that memory ran out',
    'https://html.spec.whatwg.org/multipage/server-sent-events.html': 'the format of a stream',
    'https://ipywidgets.readthedocs.io': 'what widgets are built on',
    'https://lightning.ai/docs/litserve': 'what serving is built on',
    'https://mlflow.org': 'a tracker',
    'https://optuna.org': 'samplers for sweeps',
    'https://peps.python.org/pep-0562/': 'why a module may have a `__getattr__`',
    'https://wandb.ai': 'a tracker',
}
ADDRESS = re.compile(r'https?://[^\s)\'"`<>\\\\{}\]]+')
MADE_UP = re.compile(r'https?://(127\.0\.0\.1|localhost|HOST|a\.org|example\.com|evil\.example|$)')

def test_outside_links_have_a_purpose():
    "Addresses of the project itself come from settings.ini."
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    ours = config['DEFAULT']['git_url'], config['DEFAULT']['doc_host']
    texts = [c['source'] for p in NOTEBOOKS for c in cells(p)]
    pages = [p for p in (ROOT/'capnb').rglob('*') if p.suffix in ('.html', '.css', '.js')]
    texts += [p.read_text(encoding='utf-8') for p in (*pages, ROOT/'README.md')]
    found = {url.rstrip('.,;:') for text in texts for url in ADDRESS.findall(text)}
    assert {url for url in found if not MADE_UP.match(url) and not url.startswith(ours)} == set(OUTSIDE)

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_no_output_names_a_machine(path):
    "Not the home folder, an environment or a checkout of whoever executed it."
    found = json.dumps([c.get('outputs', []) for c in cells(path, 'code')])
    assert re.findall(r'/(?:root|home/\w+|Users/\w+)/|/site-packages/', found) == []

def test_what_only_linux_has_is_asked_for_there_only():
    "Triton, which Liger Kernel needs, has wheels for Linux alone."
    [liger] = [Requirement(words) for words in CFG['gpu_requirements'].split()]
    assert liger.marker.evaluate(dict(sys_platform='linux'))
    assert not liger.marker.evaluate(dict(sys_platform='win32'))
