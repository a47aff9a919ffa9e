"""What the quick checks leave out, and what must not get less.

`python .ci/record.py run`: run the slow tests, write down how each ended, count all tests, and commit both
(`.ci/slow` calls this). What is stopped goes on from there in a second call, as long as the package is the
same. `check`: fail where that record is missing or names a failure, say how old it is and whether the package
is still the same, and fail where tests were lost. `.ci/execute` executes the slow cells of chapters, with a
record of its own.
"""
import hashlib, json, re, subprocess, sys, tempfile
import xml.etree.ElementTree as xml
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SLOW, COLLECTED = ROOT/'.ci/slow.json', ROOT/'.ci/collected'

def package_hash(folder=ROOT/'capnb'):
    "A hash over the names and the bytes of all files of the package."
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts):
        data = path.read_bytes()
        whole.update(f'{path.relative_to(folder).as_posix()} {len(data)}\n'.encode() + data)
    return whole.hexdigest()[:16]

def collect(marks):
    "The tests that pytest finds with such marks, by their ids, and how many it says that there are."
    command = [sys.executable, '-m', 'pytest', '--collect-only', '-q', '-n', '0', '-m', marks]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.findall(r'^(\d+)(?:/\d+)? tests? collected', done.stdout, re.M)
    if done.returncode or not found:
        sys.exit(f'The tests cannot be collected:\n{done.stdout[-3000:]}')
    return re.findall(r'^(tests/\S+\.py::.+)$', done.stdout, re.M), int(found[0])

def collected(marks=''):
    "How many tests pytest finds, all or those with such marks."
    return collect(marks)[1]

def run_tests(names):
    "Run some slow tests; for each how it ended and its seconds."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder)/'report.xml'
        command = [sys.executable, '-m', 'pytest', '-rfE', '-m', 'slow', f'--junitxml={report}', *names]
        subprocess.run(command, cwd=ROOT)
        if not report.exists():
            sys.exit('pytest wrote no report')
        return outcomes(xml.parse(report))

def outcomes(report):
    "How each test of a report in the form of JUnit ended, and its seconds."
    found, ended = {}, {'failure': 'failed', 'error': 'failed', 'skipped': 'skipped'}
    for case in report.iter('testcase'):
        outcome = next((ended[part.tag] for part in case if part.tag in ended), 'passed')
        file = case.get('classname').replace('.', '/') + '.py'
        # a test that belongs to a group of pytest-xdist ends in its name, which here is that of its file
        name = f"{file}::{case.get('name').removesuffix('@' + Path(file).name)}"
        # of a test that failed and could not be tidied up, too, there are two
        if found.get(name, {}).get('outcome') != 'failed':
            found[name] = dict(outcome=outcome, seconds=round(float(case.get('time')), 1))
    return found

def write(package, tests):
    "Write down what has been run so far."
    now = datetime.now(timezone.utc).isoformat(timespec='seconds')
    SLOW.write_text(as_text(dict(date=now, package=package, tests=tests)), encoding='utf-8')

def known(package, file=SLOW):
    "What of a record needs no second run: what did not fail, if the package is still the same."
    record = json.loads(file.read_text(encoding='utf-8')) if file.exists() else dict(package=None)
    if record['package'] != package: return {}
    return {name: how for name,how in record['tests'].items() if how['outcome']!='failed'}

def run():
    """Run all that is slow, write down how each ended a dozen at a time, so that what is stopped goes on from
    there, and commit the record; gives the exit code."""
    package = package_hash()
    there, tests = collect('slow')[0], known(package)
    tests = {name: how for name,how in tests.items() if name in there}
    left = [name for name in there if name not in tests]
    for at in range(0, len(left), 12):
        tests |= run_tests(left[at:at+12])
        write(package, tests)
    COLLECTED.write_text(f'{collected()}\n', encoding='utf-8')
    failed = failures(dict(tests=tests))
    said = f"{len(tests)-len(failed)} of {len(tests)} passed" if failed else f'{len(tests)} passed'
    subprocess.run(['git', 'add', SLOW, COLLECTED], cwd=ROOT, check=True)
    message = f'Record of the slow tests: {said}'
    subprocess.run(['git', 'commit', '-m', message, '--', SLOW, COLLECTED], cwd=ROOT, check=True)
    return 1 if failed else 0

def as_text(record):
    "A record as JSON, with a line for each test."
    lines = [f'  {json.dumps(name)}: {json.dumps(how)}' for name,how in sorted(record['tests'].items())]
    head = json.dumps({k: v for k,v in record.items() if k!='tests'})[:-1]
    return head + ', "tests": {\n' + ',\n'.join(lines) + '\n}}\n'

def failures(record):
    return [name for name,how in record['tests'].items() if how['outcome']=='failed']

def check_slow(file=SLOW, package=None, now=None):
    "What is to be said of the record, in a line; exits where it is missing or names a failure."
    if not file.exists():
        sys.exit(f'There is no {file.name}: run .ci/slow')
    record = json.loads(file.read_text(encoding='utf-8'))
    if failed := failures(record):
        sys.exit(f"The slow tests failed: {', '.join(failed)}")
    if not record['tests']:
        sys.exit(f'{file.name} names no test: run .ci/slow')
    age = (now or datetime.now(timezone.utc)) - datetime.fromisoformat(record['date'])
    same = record['package'] == (package or package_hash())
    took = sum(how['seconds'] for how in record['tests'].values())
    return (
        f"The {len(record['tests'])} slow tests passed {age.days} days and {age.seconds//3600} hours ago, in "
        f"{took:.0f} s; the package is {'the same' if same else 'another'} since."
    )

def check_slow_tests(file=SLOW, there=None):
    "How many of the slow tests the record knows, in a line."
    known = json.loads(file.read_text(encoding='utf-8'))['tests']
    return f"The record knows {len(known)} of {collected('slow') if there is None else there} slow tests."

def check_collected(file=COLLECTED, now=None):
    "What is to be said of the number of tests, in a line; exits where it has fallen."
    if not file.exists():
        sys.exit(f'There is no {file.name}: run .ci/slow')
    before, now = int(file.read_text()), collected() if now is None else now
    if now < before:
        sys.exit(f'There are {now:,} tests, {before-now:,} fewer than the {before:,} that there were')
    return f'There are {now:,} tests; there were {before:,}.'

if __name__ == '__main__':
    if sys.argv[1:] == ['run']:
        sys.exit(run())
    if sys.argv[1:] != ['check']:
        sys.exit(__doc__)
    print(check_slow(), check_slow_tests(), sep='\n')
    print(check_collected())
