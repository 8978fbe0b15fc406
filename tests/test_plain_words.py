"""Plain words: the product's names, comments, messages and documents use the field's terms, not a dialect of its own.

The table is the style guide's. A word counts where it is a word of a text, and where it is a part of a name: names are
split at underscores and capitals. English and the operating system need some of these words: ALLOWED names each use.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PRODUCT = ("tierkv", "storage", "kernels", "tools", "README.md", "ARCHITECTURE.md", "docs")

# A pattern of words, lower case, and what to say instead.
WORDS = {
    r"seal(s|ed|er|ing)?": "content digest",
    r"tails?": "partial block",
    r"offer(s|ed|ing)?": "push; eviction heap",
    r"victims?": "eviction queue; entries to evict",
    r"famil(y|ies)": "children",
    r"trunks?": "root",
    r"siblings?": "children",
    r"meetings?": "overlap of loading and recomputing",
    r"split loads?|may split": "overlap of loading and recomputing",
    r"join(s|ed|ing)?": "overlap of loading and recomputing",
    r"tall(y|ies)": "request statistics",
    r"tell(s|ing)?|told": "record, notify, return whether",
    r"registrars?": "commit",
    r"admissions?": "acquire",
    r"assembl(y|ies)": "factory",
    r"accords?": "consensus",
    r"keepers?": "connection",
    r"watch(es|ed|ing|er|ers)?": "observers",
    r"tickets?": "claim, lease, queue entry",
    r"lanes?": "priority class, queue",
    r"settl(e|es|ed|ing)": "synchronize, complete, repair",
    r"link(s|ed|ing)?": "connection, bus, child record",
    r"(give|gives|gave|given|giving) up": "fail",
    r"(give|gives|gave|given|giving) back": "return",
    r"lend(s|ing)?|lent": "lease",
    r"(bring|brings|brought|bringing) up": "load",
    r"tend(s|ed|ing)?": "maintain",
    r"behind the requests?": "in the background",
    r"what waits": "pending",
    r"of no tier": "staging",
    r"mend(s|ed|ing)?": "fix",
    r"foretell(s|ing)?|foretold": "predict",
    r"sights?": "observability",
    r"who|whoever|whose turn|somebody|nobody|everybody|anybody": "the thread, the caller, another process",
}


@dataclass(frozen=True)
class Allowed:
    """A use that English or the operating system wants: in these files, this pattern of lower-case text."""

    files: str
    phrase: str
    reason: str


ALLOWED = (
    Allowed("*.py", r"\.join\(", "str.join, os.path.join, Thread.join"),
    Allowed("*", r"(symbolic|hard) links?", "the file system's terms"),
    Allowed("*", r"\btend to\b", "English: usually do"),
    Allowed(
        "tierkv/daemon/lease_flags.py", r"\bseal(s|ing|ed)?\b", "the kernel's term for a memfd that keeps its size"
    ),
    Allowed("storage/warm.py", r"\bseal(s|ing|ed)?\b", "the kernel's term for a memfd that keeps its size"),
    Allowed("storage/lmdb_directory.py", r"\bos\.link\(", "the system call for a hard link"),
    Allowed("tierkv/metrics/exposition.py", r"\bmetric family\b", "Prometheus' term, in prometheus_client's names"),
    Allowed("tierkv/profiling/report_html.py", r"\bfont-family\b", "CSS"),
    Allowed("tierkv/*/*.py", r"\bfollow links\b", "whether a symbolic link is followed"),
    Allowed("storage/*.py", r"\bfollow links\b", "whether a symbolic link is followed"),
)


@dataclass(frozen=True)
class Text:
    """A file's text in lower case, names split into words, lines joined, so that a phrase may run over a line's end."""

    text: str
    line_starts: list[int]

    def line(self, offset: int) -> int:
        return bisect_right(self.line_starts, offset)


def split_names(text: str) -> str:
    """Split names at underscores and capitals, and make all lower case: LaneQueue_a -> lane queue a."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    return text.replace("_", " ").lower()


def text_of(path: Path) -> Text:
    lines, starts, end = [], [], 0
    for line in path.read_text("utf-8").splitlines():
        words = split_names(line).strip().removeprefix("#").strip()
        starts.append(end)
        lines.append(words)
        end += len(words) + 1
    return Text(" ".join(lines), starts)


def files_of(root: Path, rooms: Sequence[str]) -> Iterator[Path]:
    for room in rooms:
        path = root / room
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (each for each in found if each.suffix in (".py", ".md") and each.is_file())


def blank(text: str, name: str) -> str:
    """Replace the allowed phrases of a file by blanks of the same length."""
    for allowed in ALLOWED:
        if fnmatch(name, allowed.files):
            text = re.sub(allowed.phrase, lambda found: " " * len(found[0]), text)
    return text


def faults_of(root: Path, rooms: Sequence[str]) -> list[str]:
    """Return one line for each word that is not plain: file, line, word, and what to say."""
    pattern = re.compile("|".join(rf"(?P<w{at}>\b(?:{word})\b)" for at, word in enumerate(WORDS)))
    instead = list(WORDS.values())
    faults = []
    for path in files_of(root, rooms):
        name = path.relative_to(root).as_posix()
        text = text_of(path)
        places = [(0, found) for found in pattern.finditer(blank(split_names(name), name))]
        places += [(text.line(found.start()), found) for found in pattern.finditer(blank(text.text, name))]
        for line, found in places:
            faults.append(f"{name}:{line}: {found[0]!r}; say: {instead[int(str(found.lastgroup)[1:])]}")
    return faults


def test_the_product_uses_plain_words() -> None:
    faults = faults_of(ROOT, PRODUCT)
    assert not faults, "\n".join(faults)


def test_every_allowed_use_occurs() -> None:
    texts = {path.relative_to(ROOT).as_posix(): text_of(path).text for path in files_of(ROOT, PRODUCT)}
    for allowed in ALLOWED:
        used = any(re.search(allowed.phrase, text) for name, text in texts.items() if fnmatch(name, allowed.files))
        assert used, f"{allowed.phrase} is not used in {allowed.files}: remove it from ALLOWED"


# --- The checker, with faults planted ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "num_victims = 1",
        "class LaneQueue: ...",
        "def may_split(): ...",
        "_MIN_OFFERS = 1",
        'raise OSError("the ticket is lost")',
        "x = 1  # Nobody waits",
        "# It gives up after a while",
        "def give_back(): ...",
        "self._watch.tell(1)",
        "'''What waits, and\nwhat comes behind\nthe request.'''",
        "# the link to the GPU",
        "import tierkv.daemon.link",
    ],
)
def test_a_planted_word_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "module.py").write_text(f"'''Fine.'''\n\n{line}\n", "utf-8")
    faults = faults_of(tmp_path, ["room"])
    assert faults
    assert all(fault.startswith(("room/module.py:3:", "room/module.py:4:")) for fault in faults), faults


def test_a_planted_word_in_a_document_and_in_a_file_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Title\n\nA tail is\nbrought up.\n", "utf-8")
    (tmp_path / "cold_links.py").write_text("", "utf-8")
    faults = faults_of(tmp_path, ["README.md", "cold_links.py"])
    assert [fault.split(";")[0] for fault in faults] == [
        "README.md:3: 'tail'",
        "README.md:4: 'brought up'",
        "cold_links.py:0: 'links'",
    ]


def test_other_words_and_allowed_uses_are_no_faults(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        '", ".join(names)\nthread.join()\n# a symbolic link; details, planes, retained, whole, according to, attend\n'
        "follow_symlinks = True\n# blocks tend to lie together\n",
        "utf-8",
    )
    assert faults_of(tmp_path, ["module.py"]) == []
    (tmp_path / "other.py").write_text("follow_links = True\n", "utf-8")
    assert len(faults_of(tmp_path, ["other.py"])) == 1  # allowed in another file only
