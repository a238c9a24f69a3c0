"""Refuse to run on somebody else's `custom_ops` or `inductor_passes`.

Both names are common, and the first one on `sys.path` wins. Importing this module checks that the packages
Python would load are the ones installed beside this one, before anything is imported from them. Nothing is
imported to find out.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

SIBLINGS = ("custom_ops", "inductor_passes")


def _found(name: str) -> Path | None:
    """Return the folder (or file) that `import name` would load or has loaded; None if there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:
        # Something other than an import put it in sys.modules: it has no __spec__.
        return Path(f"<sys.modules[{name!r}]>")
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin or f"<{name}>")


def check_siblings() -> None:
    """Raise ImportError unless `custom_ops` and `inductor_passes` are the ones installed with `lowered_attn`.

    They lie in the same folder as `lowered_attn`, in a wheel and in an editable install alike.
    """
    home = Path(__file__).resolve().parent.parent
    for name in SIBLINGS:
        expected = home / name
        found = _found(name)
        if found is None:
            raise ImportError(
                f"lowered_attn needs its own package {name}: expected {expected}, got nothing of that name. "
                f"Reinstall lowered-attn.",
                name=name,
            )
        if found.resolve() != expected:
            raise ImportError(
                f"lowered_attn needs its own package {name}: expected {expected}, got {found}, which hides "
                f"it. Rename or remove the other {name}, or put {home} before {found.parent} on sys.path.",
                name=name,
                path=str(found),
            )


check_siblings()
