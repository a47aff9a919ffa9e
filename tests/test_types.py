"What a type checker makes of the package, as its users would have it."
import ast, os, subprocess, sys
from pathlib import Path
import pytest
import capnb

HERE = Path(__file__).resolve().parent
SCRIPT = HERE/'public_names.py'

def test_the_script_uses_every_name():
    source = SCRIPT.read_text(encoding='utf-8')
    used = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
    assert set(capnb.__all__) <= used
    assert 'ignore' not in source and (HERE.parent/'capnb'/'py.typed').exists()

def mypy(file, cache, tmp_path):
    "What mypy says of a file, from a folder in which it finds nothing but what is installed."
    done = subprocess.run(
        [sys.executable, '-m', 'mypy', '--follow-imports=silent', '--cache-dir', cache, file],
        cwd=tmp_path,
        env={**os.environ, 'MYPYPATH': str(HERE.parent)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    return done.returncode, done.stdout + done.stderr

@pytest.mark.slow
def test_mypy_passes_and_finds_mistakes(tmp_path):
    code, text = mypy(SCRIPT, tmp_path/'cache', tmp_path)
    assert code == 0, text
    source, bad = SCRIPT.read_text(encoding='utf-8'), tmp_path/'bad.py'
    for good, wrong, said in (
        ('h.batch_size', 'h.batch_sise', 'has no attribute "batch_sise"'),
        ('result.curve', 'result.curves', 'has no attribute "curves"'),
        ("limit=100", "limit='100'", 'incompatible type "str"'),
        ("device='cpu'", "devise='cpu'", 'Unexpected keyword argument "devise"'),
        ('captioner.caption(', 'captioner.captions(', 'not callable'),
    ):
        bad.write_text(source.replace(good, wrong, 1), encoding='utf-8')
        code, text = mypy(bad, tmp_path/'cache', tmp_path)
        assert code == 1 and said in text, (wrong, text)
