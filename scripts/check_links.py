"""Links between pages lead to files and headings that are there: ``python scripts/check_links.py [ROOT]``.

Reads every Markdown file that git follows. Addresses on other machines are not asked.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^(```+|~~~+).*?^\1", re.M | re.S)
LINK = re.compile(
    r"\[[^\]\[]*(?:\[[^\]]*\][^\]\[]*)*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|(?:src|href)=\"([^\"]+)\""
)


def pages(root: Path) -> list[Path]:
    """Markdown files of a checkout that are committed, or would be."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [root / name for name in sorted(set(names)) if name and (root / name).is_file()]


@cache
def anchors(page: Path) -> frozenset[str]:
    """Names that links may give to the headings of a page: small letters, dashes for spaces."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found: dict[str, int] = {}
    names = set(re.findall(r"(?:id|name)=\"([^\"]+)\"", text))
    for title in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        names.add(f"{slug}-{count}" if count else slug)
    return frozenset(names)


def dead_links(root: Path) -> list[str]:
    """``page: target`` for every link of a page that leads nowhere."""
    dead = []
    for page in pages(root):
        text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
        for first, second in LINK.findall(text):
            target = first or second
            if re.match(r"[a-z][a-z0-9+.-]*:", target, re.I):
                continue
            name, _, anchor = unquote(target).partition("#")
            place = (
                (root / name.lstrip("/") if name.startswith("/") else page.parent / name) if name else page
            )
            if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
                dead.append(f"{page.relative_to(root).as_posix()}: {target}")
    return dead


def main() -> int:
    """Say which links are dead; 1 when there is one."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    dead = dead_links(root)
    sys.stdout.write(
        "".join(f"{line}\n" for line in dead) or f"links of {len(pages(root))} pages lead somewhere\n"
    )
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
