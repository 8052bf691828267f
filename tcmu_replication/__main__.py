"""`python -m tcmu_replication` is the command tcmu-replication."""

from tcmu_replication.cli.main import main

main()
