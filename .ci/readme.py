"Write README.md and its pictures from nbs/index.ipynb. With --check: only say whether they are current."
import argparse, posixpath, re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r'^#\s*\|\s*(.+?)\s*$\n?', re.M)
HIDE = {'hide', 'include: false'}

def shown(cell):
    "Take the directives out of `cell` and do what they say. False: the cell is not shown at all."
    if cell.cell_type == 'raw': return False
    if cell.cell_type == 'markdown': return True
    head = re.match(r'(?:\s*#\s*\|.*(?:\n|$))*', cell.source)[0]
    flags = {re.sub(r':\s*', ': ', f) for f in DIRECTIVE.findall(head)}
    cell.source = cell.source[len(head):].strip('\n')
    if 'echo: false' in flags:
        cell.metadata['transient'] = {'remove_source': True} # nbconvert's own word for it
    if 'output: false' in flags:
        cell.outputs = []
    return not flags & HIDE and bool(cell.source.strip() or cell.outputs)

def relink(text, folder='nbs'):
    """Let links that start from the notebook's folder start from the top of the repository, and one empty
    line be enough."""
    def move(m): return m[1] + posixpath.normpath(posixpath.join(folder, m[2]))
    link = r'(\]\(|<(?:img|a)\b[^>]*?\b(?:src|href)=["\'])(?![a-z]+:|[#/])([^)\s"\']+)'
    return re.sub(link, move, re.sub(r'\n(?:[ \t]*\n)+', '\n\n', text))

def render():
    "Every file that the notebook makes: its path from the top of the repository, and its bytes."
    source = ROOT/'nbs/index.ipynb'
    if not source.exists():
        sys.exit('There is no nbs/index.ipynb to write README.md from')
    nb = nbformat.read(source, as_version=4)
    nb.metadata['language_info'] = {'name': 'python'}
    nb.cells = [c for c in nb.cells if shown(c)]
    text, found = MarkdownExporter().from_notebook_node(
        nb, dict(unique_key='output', output_files_dir='images')
    )
    files = {}
    # numbered in order of appearance; a picture that is not shown gets none
    for name, data in found['outputs'].items():
        if f']({name})' not in text: continue
        new = f'images/index_{len(files)}{Path(name).suffix}'
        text, files[f'nbs/{new}'] = text.replace(f']({name})', f']({new})'), data
    parts = re.split(r'(^```.*?^```[^\n]*$)', text, flags=re.M|re.S) # code stays as it is
    text = ''.join(p if p.startswith('```') else relink(p) for p in parts).strip() + '\n'
    files['README.md'] = (
        f'<!-- Written by .ci/readme.py from nbs/index.ipynb: edit that. -->\n\n{text}'.encode()
    )
    return files

if __name__ == '__main__':
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument(
        '--check', action='store_true', help='write nothing; exit 1 if something is not current'
    )
    check, files = args.parse_args().check, render()
    stale = [n for n, data in files.items() if not (ROOT/n).exists() or (ROOT/n).read_bytes() != data]
    extra = [
        f'nbs/images/{p.name}'
        for p in (ROOT / 'nbs/images').glob('index_*')
        if f'nbs/images/{p.name}' not in files
    ]
    if check and (stale or extra):
        sys.exit(f"Not current: {', '.join(stale+extra)}. Run: python .ci/readme.py")
    for name in () if check else extra:
        (ROOT/name).unlink()
    for name in () if check else stale:
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(files[name])
