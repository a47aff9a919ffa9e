"""The one way in which outputs of notebooks are made, and a record of it.

`python .ci/executed.py run [--cuda] [CHAPTER...]` executes chapters (`.ci/execute` calls this). `check` fails
where the code cells of a chapter are not those of its record, and counts those with another package.
"""
import hashlib, json, os, platform, re, subprocess, sys, time
from datetime import datetime, timezone
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from record import ROOT, package_hash

FILE = ROOT/'nbs/executed.json'
FLAG = re.compile(r'^#\s*\|\s*(notest|cuda|eval:\s*false)\s*$', re.M)

def notebooks(names=()):
    "The chapters whose names begin with one of `names`; all without names."
    found = sorted((ROOT/'nbs').glob('*.ipynb'))
    for name in names:
        if not any(p.stem.startswith(name) for p in found):
            sys.exit(f'there is no chapter {name!r} in nbs')
    return [p for p in found if not names or p.stem.startswith(tuple(names))]

def read_notebook(path): return nbformat.read(path, as_version=4)

def code_hash(notebook):
    "A hash over the code cells of a chapter; spaces at their ends do not count."
    sources = [c.source.rstrip() for c in notebook.cells if c.cell_type=='code']
    return hashlib.sha256('\0'.join(sources).encode()).hexdigest()[:16]

def machine():
    "What a chapter runs on, in words."
    import torch
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    return f'{os.cpu_count()} CPU cores ({platform.machine()})'

def flag(cell):
    "The flag because of which a cell is not executed everywhere, or None."
    found = cell.cell_type=='code' and FLAG.search(cell.source)
    return found[1] if found else None

def on_card(cell):
    "Whether a cell for a card can run here: one that names CAPNB_PHOTOS needs this folder of photographs."
    return flag(cell)=='cuda' and ('CAPNB_PHOTOS' not in cell.source or 'CAPNB_PHOTOS' in os.environ)

def execute_cells(notebook, folder, cuda):
    """Execute a notebook in a kernel of its own, without the cells that are flagged; on a card with its cells.

    There are no progress bars: as widgets, they would be stored as a text that stays at 0 %.
    """
    here = dict(metadata=dict(path=folder))
    # for the kernel: bars of capnb, of Hugging Face and of MLflow
    os.environ |= dict.fromkeys(('TQDM_DISABLE', 'HF_HUB_DISABLE_PROGRESS_BARS'), '1')
    os.environ['MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR'] = 'false'
    os.environ['KINETO_LOG_LEVEL'] = '99' # PyTorch's profiler says when it starts and stops
    client = NotebookClient(notebook, timeout=3600, kernel_name='python3', resources=here)
    client.reset_execution_trackers()
    with client.setup_kernel():
        for i,cell in enumerate(notebook.cells):
            if cell.cell_type=='code' and (flag(cell) is None or cuda and on_card(cell)):
                client.execute_cell(cell, i)

def store(path, notebook):
    nbformat.write(notebook, path)
    subprocess.run(['nbdev_clean', '--fname', str(path)], check=True)

def execute(path, record):
    "Execute a chapter and store its outputs; gives its record. An error is raised, and nothing is stored."
    start, notebook, before = time.monotonic(), read_notebook(path), record.get('cuda', {})
    execute_cells(notebook, path.parent, False)
    store(path, notebook)
    not_here = {c.id: before.get(c.id) for c in notebook.cells if flag(c)=='cuda'}
    return dict(
        code=code_hash(notebook), package=package_hash(), seconds=round(time.monotonic()-start, 1),
        machine=machine(), date=now(), **(dict(cuda=not_here) if not_here else {})
    )

def execute_cuda(path, record):
    "The same on a card, for the outputs of the cells flagged cuda alone."
    stored, executed = read_notebook(path), read_notebook(path)
    execute_cells(executed, path.parent, True)
    done = dict(record.get('cuda', {}))
    for old,new in zip(stored.cells, executed.cells, strict=True):
        if on_card(old):
            old.outputs = new.outputs
            done[old.id] = dict(date=now(), device=machine())
    store(path, stored)
    return dict(record, cuda=done)

def now(): return datetime.now(timezone.utc).isoformat(timespec='seconds')

def read_records():
    return json.loads(FILE.read_text(encoding='utf-8')) if FILE.exists() else {}

def write_records(records):
    "Write the records, a line for each chapter."
    lines = [f' {json.dumps(name)}: {json.dumps(how)}' for name,how in sorted(records.items())]
    whole = FILE.with_suffix('.part')
    whole.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')
    whole.replace(FILE)

def wanted(path, records, cuda):
    "Whether a chapter is executed where none is named: its code or the package is new; on a card, its cells."
    if cuda: return any(map(on_card, read_notebook(path).cells))
    how = records.get(path.stem, {})
    return (how.get('code'), how.get('package')) != (code_hash(read_notebook(path)), package_hash())

def run(names, cuda):
    "Execute chapters, one after the other; gives the exit code."
    records, failed = read_records(), []
    for path in notebooks(names):
        if not names and not wanted(path, records, cuda): continue
        start = time.monotonic()
        try:
            records[path.stem] = (execute_cuda if cuda else execute)(path, records.get(path.stem, {}))
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
            failed.append(path.stem)
            print(f'{path.stem}: {e}', file=sys.stderr)
            continue
        write_records(records)
        print(f'{path.stem}: {time.monotonic()-start:.0f} s', flush=True)
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else 'all executed')
    print(*not_run_here(records), sep='\n')
    return bool(failed)

def not_run_here(records):
    "A line for each cell that needs a card: when and where it ran last."
    for name,how in sorted(records.items()):
        for cell,where in how.get('cuda', {}).items():
            last = f"{where['date']}, {where['device']}" if where else 'no card has run it'
            yield f'not run here: {name} {cell}: {last}'

def check(records=None, paths=None):
    "What is to be said of the record; exits where code cells of a chapter have no matching one."
    records = read_records() if records is None else records
    codes = {p.stem: code_hash(read_notebook(p)) for p in paths or notebooks()}
    if bad := [name for name,code in codes.items() if records.get(name, {}).get('code')!=code]:
        sys.exit(f"Executed with other code, or not at all: {', '.join(bad)}; run .ci/execute")
    package = package_hash()
    old = [name for name in codes if records[name]['package']!=package]
    return f"All {len(codes)} chapters ran with the code they have, {len(old)} with another package."

if __name__ == '__main__':
    what, *words = sys.argv[1:] or ['']
    if what=='run':
        sys.exit(run([w for w in words if w!='--cuda'], '--cuda' in words))
    if what!='check':
        sys.exit(__doc__)
    print(check())
