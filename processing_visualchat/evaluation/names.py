"""Names that a user gives, looked up with the nearest one in the error."""

from collections.abc import Iterable
from difflib import get_close_matches


def find_name(name: str, known: Iterable[str], kind: str) -> str:
    """The name itself if it is known; a `ValueError` names the nearest one, or all of them."""
    known = list(known)
    if name in known:
        return name
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}? There are" if nearest else "choose one of"
    raise ValueError(f"There is no {kind} {name!r}; {hint} {', '.join(sorted(known))}.")
