"""What the tests of this folder share: a file that may not be read."""
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


@pytest.fixture
def without_permission(tmp_path: Path) -> Callable[[Path], AbstractContextManager]:
    """A context in which a file or folder of this test gives no permission to anybody, also not to root."""
    modes = {folder: folder.stat().st_mode for folder in (tmp_path, *tmp_path.parents)}
    modes = {folder: mode for folder, mode in modes.items() if not mode & 0o1}     # closed to others

    @contextmanager
    def denied(path: Path) -> Iterator[None]:
        root = os.geteuid() == 0
        before = path.stat().st_mode
        if root:                                # root may read everything: become somebody else for a while
            for folder, mode in modes.items():
                folder.chmod(mode | 0o711)
        path.chmod(0)
        if root:
            os.seteuid(NOBODY)
        try:
            yield
        finally:
            if root:
                os.seteuid(0)
                for folder, mode in modes.items():
                    folder.chmod(mode)
            path.chmod(before)
    return denied
