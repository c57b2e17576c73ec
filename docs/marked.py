"""Parts of pages that scripts write: what stands between two comments."""

from __future__ import annotations


def between(page: str, name: str, text: str, *, by: str) -> str:
    """`page` with `text` between its comments "NAME: made by BY" and "end of NAME"."""
    begin, end = f"<!-- {name}: made by {by} -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page has no place for {name} made by {by}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
