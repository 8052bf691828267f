"""Installs tcmu_replication; `handlers/` becomes tcmu_replication.handlers.

Everything that is plain data stands in pyproject.toml; what stands here is the
one thing it cannot say: that a top-level folder is a sub-package.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["tcmu_replication", "tcmu_replication.*"]),
        "tcmu_replication.handlers",
    ],
    package_dir={"tcmu_replication.handlers": "handlers"},
)
