# Install as /usr/share/bash-completion/completions/tcmu-replication; read at the first TAB.
eval "$(_TCMU_REPLICATION_COMPLETE=bash_source tcmu-replication)"
