"""tcmu-replication with a defect: `python -m tests.support.defective ARGUMENTS`, as `python -m tcmu_replication`.

While the file `defect` lies beside the overlay directory, every pre-image that is to
be kept meets the built-in exception whose name the file has.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tcmu_replication.block.overlay import Overlay
from tcmu_replication.cli.main import main


def _spoilt(keep: Callable[..., Any]) -> Callable[..., Any]:
    def spoilt(overlay: Overlay, *arguments: Any) -> Any:
        marker = Path(overlay.path).parent.parent / "defect"
        if marker.exists():
            raise getattr(builtins, marker.read_text())("injected")
        return keep(overlay, *arguments)

    return spoilt


if __name__ == "__main__":
    Overlay.save = _spoilt(Overlay.save)  # type: ignore[method-assign]
    Overlay.store = _spoilt(Overlay.store)  # type: ignore[method-assign]
    main()
