"What setuptools needs to know, read from settings.ini."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

# In settings.ini a requirement holds no space, so a space ends it.
def words(key): return cfg.get(key, '').split()

statuses = [
    '1 - Planning',
    '2 - Pre-Alpha',
    '3 - Alpha',
    '4 - Beta',
    '5 - Production/Stable',
    '6 - Mature',
    '7 - Inactive',
]
licences = dict(apache2='Apache-2.0') # settings.ini's word: the SPDX expression
readme = here/'README.md'

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=words('keywords'),
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license_expression=licences[cfg['license']],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    classifiers=[
        'Development Status :: ' + statuses[int(cfg['status']) - 1],
        'Intended Audience :: ' + cfg['audience'],
        'Natural Language :: ' + cfg['language'],
    ]
    + [f'Programming Language :: Python :: {v}' for v in ('3', '3.11', '3.12', '3.13')],
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    include_package_data=False,
    # the small models that come with the package, the pages' files, and the word that it has types
    package_data={cfg['lib_path']: ['models/**/*', '**/*.html', '**/*.css', '**/*.js', 'py.typed']},
    install_requires=words('requirements'),
    extras_require={
        name.removesuffix('_requirements'): words(name) for name in cfg if name.endswith('_requirements')
    },
    entry_points=dict(
        console_scripts=words('console_scripts'), nbdev=[f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]
    ),
    zip_safe=False,
)
