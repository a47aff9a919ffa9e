"""Write the documentation site into _docs/site: chapters, and a page for each module (mkdocs, mkdocstrings).

A link or an anchor that leads nowhere stops it. `python .ci/site.py --serve` shows it on this machine.
"""
import re, shutil, subprocess, sys
import nbformat, yaml
from latex2mathml.converter import convert
from nbconvert import MarkdownExporter
from readme import ROOT, shown

PAGES, BUILT = ROOT/'_docs/pages', ROOT/'_docs/site'
TRACKS = {'0': 'The course', '1': 'Understand', '2': 'Fast', '3': 'Run'}

def as_page(text):
    "Markdown of a notebook as Markdown of the site: links lead to pages, formulas are MathML."
    parts = re.split(r'(^ *```.*?^ *```[^\n]*$|`[^`\n]*`)', text, flags=re.M|re.S) # code stays as it is
    for i in range(0, len(parts), 2):
        part = re.sub(r'\]\((?!https?:)(?:nbs/)?([^)\s]*?)\.ipynb(#[^)]*)?\)', r'](\1.md\2)', parts[i])
        part = part.replace('](../CHANGELOG.md)', '](CHANGELOG.md)')
        part = part.replace('<details>', '<details markdown="1">')
        parts[i] = re.sub(r'(?<![\\$\w])\$([^$\n]+?)\$(?![\w$])', lambda m: convert(m[1]), part)
    return ''.join(parts)

def write_chapter(path):
    "Write a chapter's page, and its images beside it."
    nb = nbformat.read(path, as_version=4)
    nb.metadata['language_info'] = {'name': 'python'}
    nb.cells = [c for c in nb.cells if shown(c)]
    folder = f'images/{path.stem}'
    how = dict(unique_key=path.stem, output_files_dir=folder)
    text, found = MarkdownExporter(exclude_input_prompt=True).from_notebook_node(nb, how)
    for name,data in found['outputs'].items():
        file = PAGES/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (PAGES/f'{path.stem}.md').write_text(as_page(text), encoding='utf-8')
    return {re.search(r'^# (.+)$', text, re.M)[1]: f'{path.stem}.md'}

def write_module(path):
    "Write the page of a module, which mkdocstrings fills."
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    page = PAGES/f'api/{name}.md'
    page.parent.mkdir(exist_ok=True)
    page.write_text(f'# {name}\n\n::: {name}\n', encoding='utf-8')
    return {name.removeprefix('capnb.'): f'api/{name}.md'}

def settings(chapters, modules):
    "What mkdocs is told."
    scheme = dict(light='default', dark='slate')
    palette = [
        dict(media=f'(prefers-color-scheme: {name})', scheme=scheme[name], primary='teal',
             toggle=dict(icon=f'material/weather-{icon}', name=f'Switch to {other}'))
        for name,other,icon in (('light', 'dark', 'sunny'), ('dark', 'light', 'night'))
    ]
    python = dict(
        paths=[str(ROOT)],
        options=dict(docstring_style='numpy', show_source=False, show_root_toc_entry=False, heading_level=2,
                     filters=['!^_'], separate_signature=True, show_signature_annotations=True),
    )
    tracks = [{name: [c for first,c in chapters if first==key]} for key,name in TRACKS.items()]
    return dict(
        site_name='capnb', docs_dir=str(PAGES), site_dir=str(BUILT), strict=True, use_directory_urls=False,
        nav=[{'capnb': 'index.md'}, *tracks, {'Modules': modules}, {'Changes': 'CHANGELOG.md'}],
        theme=dict(name='material', font=False, palette=palette,
                   features=['navigation.tabs', 'navigation.indexes', 'search.suggest', 'content.code.copy']),
        plugins=['search', dict(mkdocstrings=dict(handlers=dict(python=python)))],
        markdown_extensions=['tables', 'md_in_html', 'toc', 'pymdownx.superfences',
                             dict([('pymdownx.highlight', {})])],
        validation=dict(links=dict(not_found='warn', anchors='warn', unrecognized_links='warn')),
    )

def build(serve=False):
    "Write the pages and let mkdocs make the site; gives its exit code."
    notebooks = sorted((ROOT/'nbs').glob('*.ipynb'))
    PAGES.mkdir(parents=True, exist_ok=True)
    chapters = [(p.stem[0], write_chapter(p)) for p in notebooks]
    for source in (ROOT/'CHANGELOG.md', ROOT/'nbs/results.md'):
        (PAGES/source.name).write_text(as_page(source.read_text(encoding='utf-8')), encoding='utf-8')
    shutil.copytree(ROOT/'nbs/images', PAGES/'images', dirs_exist_ok=True)
    for figures in (ROOT/'nbs').glob('*.json'):
        shutil.copy(figures, PAGES)
    modules = [p for p in sorted((ROOT/'capnb').rglob('*.py')) if not p.name.startswith('_')]
    config = ROOT/'_docs/mkdocs.yml'
    config.write_text(yaml.safe_dump(settings(chapters, list(map(write_module, modules)))), encoding='utf-8')
    command = [sys.executable, '-m', 'mkdocs', 'serve' if serve else 'build', '-f', config]
    return subprocess.run(command, cwd=ROOT).returncode

if __name__ == '__main__':
    sys.exit(build('--serve' in sys.argv[1:]))
