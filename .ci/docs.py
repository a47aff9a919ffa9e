"""Make the documentation site from nbs/ as nbdev_docs does; needs Quarto.

With --process: only what comes before Quarto, into _proc/.

For its tables of functions nbdev runs the exported cells of a notebook and those with an import; an import
that stands together with other code takes that code along, without the cells before it. Here such cells are
left alone.
"""
import argparse, ast, warnings
from nbdev import processors, quarto, serve
from nbdev.config import get_config

DEFINES, runs = {'export', 'exports', 'exporti', 'exec_doc'}, processors._do_eval
OPTIONS = dict(force=True, file_glob='*.ipynb') # of the sidebar
HERE = dict(n_workers=0) # in this process, as others would not know of the change

def of_one_piece(cell):
    "Whether nbdev is to run a cell: if it would, and the cell is exported or is nothing but imports."
    return runs(cell) and (
        cell.directives_.keys() & DEFINES
        or all(isinstance(part, (ast.Import, ast.ImportFrom)) for part in cell.parsed_())
    )

def process():
    "Write the sidebar, nbdev's settings for Quarto, and the notebooks without what is not to be shown."
    quarto.refresh_quarto_yml()
    quarto.nbdev_sidebar.__wrapped__(**OPTIONS)
    serve.proc_nbs(**OPTIONS, **HERE)

if __name__ == '__main__':
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument('--process', action='store_true', help='stop before Quarto')
    processors._do_eval = of_one_piece
    get_config()['recursive'] = 'True' # the folder with the pictures, too
    warnings.filterwarnings('ignore', message='Found cells containing imports')
    if args.parse_args().process:
        process()
    else:
        quarto.nbdev_docs.__wrapped__(**OPTIONS, **HERE)
