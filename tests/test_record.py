"The record of the slow tests and the number of tests, which CI checks."
import json, runpy, subprocess, sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from xml.etree import ElementTree
import pytest

ROOT = Path(__file__).resolve().parent.parent
record = runpy.run_path(str(ROOT/'.ci/record.py'))
NOW = datetime(2026, 5, 10, 12, tzinfo=timezone.utc)

def written(folder, **change):
    tests = {f'tests/test_a.py::test_{name}': dict(outcome='passed', seconds=9.5) for name in 'bc'}
    said = dict(date=(NOW-timedelta(days=2, hours=5)).isoformat(), package='abc', tests=tests) | change
    file = folder/'slow.json'
    file.write_text(record['as_text'](said), encoding='utf-8')
    return file

def test_age_and_package(tmp_path):
    file = written(tmp_path)
    assert len(file.read_text().splitlines()) == 4 and json.loads(file.read_text())['package'] == 'abc'
    said = record['check_slow'](file, 'abc', NOW)
    assert said == 'The 2 slow tests passed 2 days and 5 hours ago, in 19 s; the package is the same since.'
    assert 'the package is another since' in record['check_slow'](file, 'abd', NOW)

def test_missing_empty_or_failed(tmp_path):
    with pytest.raises(SystemExit, match='There is no slow.json: run .ci/slow'):
        record['check_slow'](tmp_path/'slow.json')
    with pytest.raises(SystemExit, match='names no test'):
        record['check_slow'](written(tmp_path, tests={}), 'abc', NOW)
    failed = {'tests/test_a.py::test_b': dict(outcome='failed', seconds=1)}
    with pytest.raises(SystemExit, match=r'The slow tests failed: tests/test_a.py::test_b'):
        record['check_slow'](written(tmp_path, tests=failed), 'abc', NOW)

def test_skipped_is_no_failure(tmp_path):
    skipped = {'tests/test_a.py::test_b': dict(outcome='skipped', seconds=0)}
    assert 'The 1 slow tests passed' in record['check_slow'](written(tmp_path, tests=skipped), 'abc', NOW)

def test_hash_follows_names_and_bytes(tmp_path):
    hash_of, seen = record['package_hash'], set()
    for name,text in (('a.py', '1'), ('a.py', '2'), ('b.py', '2'), ('b.css', '2')):
        for old in tmp_path.iterdir():
            old.unlink()
        (tmp_path/name).write_text(text)
        seen.add(hash_of(tmp_path))
    (tmp_path/'__pycache__').mkdir()
    (tmp_path/'__pycache__'/'b.pyc').write_text('compiled')
    assert len(seen) == 4 and hash_of(tmp_path) in seen

def test_number_of_tests_never_falls(tmp_path):
    file = tmp_path/'collected'
    with pytest.raises(SystemExit, match='There is no collected'):
        record['check_collected'](file, 5)
    file.write_text('1200\n')
    assert record['check_collected'](file, 1201) == 'There are 1,201 tests; there were 1,200.'
    with pytest.raises(SystemExit, match='There are 1,190 tests, 10 fewer than the 1,200 that there were'):
        record['check_collected'](file, 1190)

def test_slow_tests_that_were_not_run_are_counted(tmp_path):
    assert record['check_slow_tests'](written(tmp_path), 7) == 'The record knows 2 of 7 slow tests.'

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_b[x@y]@test_a.py" time="9.54"/>
<testcase classname="tests.test_a" name="test_c" time="1"><failure/></testcase>
<testcase classname="tests.test_a" name="test_c" time="2"/>
<testcase classname="tests.test_a" name="test_d" time="0"><skipped/></testcase>
</testsuite></testsuites>"""

def test_report_of_pytest_is_read():
    assert record['outcomes'](ElementTree.fromstring(REPORT)) == {
        'tests/test_a.py::test_b[x@y]': dict(outcome='passed', seconds=9.5),
        'tests/test_a.py::test_c': dict(outcome='failed', seconds=1.),
        'tests/test_a.py::test_d': dict(outcome='skipped', seconds=0.),
    }

def test_what_passed_is_not_run_again_while_the_package_is_the_same(tmp_path):
    failed = dict(outcome='failed', seconds=1)
    tests = {'tests/test_a.py::test_b': dict(outcome='passed', seconds=1), 'tests/test_a.py::test_c': failed}
    file = written(tmp_path, tests=tests)
    assert list(record['known']('abc', file)) == ['tests/test_a.py::test_b']
    assert record['known']('abd', file) == record['known']('abc', tmp_path/'none.json') == {}

def test_ci_asks_for_both():
    assert 'python .ci/record.py check' in (ROOT/'.ci/run').read_text()
    done = subprocess.run([sys.executable, ROOT/'.ci/record.py'], capture_output=True, text=True)
    assert done.returncode == 1 and 'python .ci/record.py run' in done.stderr
