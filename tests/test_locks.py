"""The lock rules: what says that its caller holds the lock checks it, and what says that he does not, that too."""

from __future__ import annotations

import ast
import inspect
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pattern_engine import PatternEngine, open_tiny

from tierkv.background.work_queue import WorkQueue
from tierkv.cache import TierCache
from tierkv.values.block import Tier
from tierkv.values.locks import NO_LOCK, OwnedCondition, OwnedLock
from tierkv.values.stats import StatsRecorder

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tierkv", "storage")
HELD = re.compile(r"\bcaller\s+holds\s+the\s+(cache's\s+)?lock\b", re.IGNORECASE)
NOT_HELD = re.compile(r"\bcaller\s+does\s+not\s+hold\s+the\s+lock\b", re.IGNORECASE)
ALL_HELD = re.compile(r"\bcaller\s+of\s+every\s+method\s+holds\s+the\s+lock\b", re.IGNORECASE)
EXEMPT = re.compile(r"\bneeds\s+no\s+lock\b", re.IGNORECASE)
OTHER_WORDS = re.compile(
    r"\block\s+(is|must\s+be)\s+held|\bwants?\s+the\s+lock|\b(owner|facade|counts)\s+holds\s+(a|the)\s+lock"
    r"|\b(under|with|without)\s+the\s+lock\s*[.;:,\"-]",
    re.IGNORECASE,
)
"""Other ways to say it: a rule that is worded so would not be seen, and not be checked."""


def checks_of(source: str) -> Iterator[tuple[str, bool, bool]]:
    """Yield (name, whether the code checks it, whether it says that the lock is held) for each rule of a module."""
    tree = ast.parse(source)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    covered = {method: node.name for node in classes for method in node.body if ALL_HELD.search(_doc(node))}
    owners = {method: node.name for node in classes for method in node.body}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        text = _doc(node)
        by_class = node in covered and not node.name.startswith("_") and not EXEMPT.search(text)
        is_held, is_not_held = bool(by_class or HELD.search(text)), bool(NOT_HELD.search(text))
        if is_held or is_not_held:
            name = f"{owners[node]}.{node.name}" if node in owners else node.name
            yield name, _begins_with_check(node, negated=is_not_held), is_held


def _doc(node: ast.AST) -> str:
    return ast.get_docstring(node) or ""  # type: ignore[arg-type]


def _begins_with_check(function: ast.FunctionDef, *, negated: bool) -> bool:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    first = body[0] if body else None
    if not isinstance(first, ast.Assert):
        return False
    test = first.test
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return negated and ast.unparse(test.operand).endswith(".is_owned()")
    return not negated and ast.unparse(test).endswith(".is_owned()")


def modules() -> Iterator[tuple[str, str]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not path.is_relative_to(ROOT / "tierkv" / folder) or folder == "tierkv":
                yield str(path.relative_to(ROOT)), path.read_text("utf-8")


def test_every_method_whose_docstring_has_a_lock_rule_begins_with_its_check() -> None:
    rules = [(file, *rule) for file, source in modules() for rule in checks_of(source)]
    assert [f"{file}: {name}" for file, name, is_checked, _ in rules if not is_checked] == []
    assert len([rule for rule in rules if rule[3]]) >= 90  # a search that finds nothing would pass as well
    assert len([rule for rule in rules if not rule[3]]) >= 4


def test_lock_rules_have_one_wording() -> None:
    odd = [
        f"{file}:{number}: {line.strip()}"
        for file, source in modules()
        for number, line in enumerate(source.splitlines(), start=1)
        if OTHER_WORDS.search(line) and ('"""' in line or "#" in line or "The " in line) and "with self" not in line
    ]
    assert odd == []


@pytest.mark.parametrize(
    ("body", "is_checked"),
    [
        ("assert self._lock.is_owned()", True),
        ("assert not self._lock.is_owned()", False),
        ("self.x = 1", False),
        ("self.x = 1\n        assert self._lock.is_owned()", False),
    ],
)
def test_a_rule_without_its_check_is_found(body: str, is_checked: bool) -> None:
    source = f'class A:\n    def f(self):\n        """Do it; the caller\n        holds the lock."""\n        {body}\n'
    assert list(checks_of(source)) == [("A.f", is_checked, True)]


def test_a_class_rule_covers_its_public_methods_and_leaves_out_what_needs_no_lock() -> None:
    source = (
        'class A:\n    """The caller of every method holds the lock."""\n'
        "    def f(self):\n        return 1\n"
        '    def g(self):\n        """Return it; needs no lock."""\n'
        "    def _h(self):\n        return 1\n"
    )
    assert list(checks_of(source)) == [("A.f", False, True)]


# --- Called without the lock ------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[TierCache]:
    with open_tiny(tmp_path) as opened:
        engine = PatternEngine(opened)
        opened.release(engine.start(list(range(9))))
        opened.flush()
        yield opened


def parts_of(cache: TierCache) -> list[Any]:
    """Return a cache's parts that have lock rules."""
    tiers, offloader = cache._tiers, cache._offloader
    parts = [
        tiers,
        tiers.index,
        tiers.observers,
        tiers.stats,
        offloader,
        offloader.writer,
        cache.blocks,
        cache._prefixes,
    ]
    parts += [cache.blocks, cache._prefixes, cache._committer, cache._running, cache._acquirer]
    return [*parts, cache._acquirer._statistics, cache._acquirer._loader, cache._acquirer._reading]


def rules_of(part: object) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the methods of an object whose caller must hold the lock, by name, bases included."""
    for kind in type(part).__mro__[:-1]:
        for name, is_checked, is_held in checks_of(inspect.getsource(inspect.getmodule(kind) or kind)):
            owner, _, method = name.partition(".")
            if owner == kind.__name__ and is_held and is_checked and method in vars(kind):
                yield f"{type(part).__name__}.{method}", getattr(part, method)


def test_no_method_with_a_lock_rule_works_without_the_lock(cache: TierCache) -> None:
    called = 0
    for part in parts_of(cache):
        for name, method in rules_of(part):
            with pytest.raises(AssertionError) as caught:
                call_with_nothing(method)
            assert "is_owned" in str(caught.traceback[-1].statement), name
            called += 1
    assert called >= 70


def call_with_nothing(method: Callable[..., Any]) -> Any:
    """Call a method with None for each argument that it needs: its check comes before any use."""
    needed = [each for each in inspect.signature(method).parameters.values() if each.default is each.empty]
    named = {each.name: None for each in needed if each.kind is each.KEYWORD_ONLY}
    result = method(*(None for each in needed if each.kind is not each.KEYWORD_ONLY), **named)
    return next(result) if inspect.isgenerator(result) else result


def test_the_lock_of_another_thread_does_not_count(cache: TierCache) -> None:
    is_held, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        with cache._tiers.changed:
            is_held.set()
            is_over.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert is_held.wait(20)
    try:
        with pytest.raises(AssertionError):
            cache._tiers.reap()
    finally:
        is_over.set()
        thread.join()


def test_what_must_not_be_called_with_the_lock_refuses_that(cache: TierCache) -> None:
    loader = cache._acquirer._loader
    with cache._tiers.changed, pytest.raises(AssertionError) as caught:
        loader.promote(None, None, num_blocks=1)  # type: ignore[arg-type]
    assert "is_owned" in str(caught.traceback[-1].statement)


def test_every_count_of_a_busy_cache_changes_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()

    class CheckedCounter(Counter[Any]):
        def __setitem__(self, key: Any, count: int) -> None:
            assert cache._tiers.changed.is_owned(), key
            seen.add(str(key))
            super().__setitem__(key, count)

        def update(self, counts: Any) -> None:  # which does not call the above where it is empty
            for key, count in dict(counts if isinstance(counts, Mapping) else Counter(counts)).items():
                self[key] += count

    def checked(self: StatsRecorder, name: str, value: object) -> None:
        assert self._lock.is_owned(), name
        seen.add(name)
        object.__setattr__(self, name, value)

    with open_tiny(tmp_path, hot=4) as cache:
        for name, value in vars(cache._tiers.stats).items():
            if isinstance(value, Counter):
                setattr(cache._tiers.stats, name, CheckedCounter())
        monkeypatch.setattr(StatsRecorder, "__setattr__", checked, raising=False)
        engine = PatternEngine(cache)
        for start in (0, 100, 0, 200):
            cache.release(engine.start(list(range(start, start + 14))))
        cache.flush()
        cache.evict(Tier.HOT)
        cache.check()
    assert {"requests", "misses", "prompt_tokens", "Tier.HOT", "Tier.WARM", "absent"} <= seen


def test_an_owned_lock_and_condition_know_their_owner() -> None:
    for lock in (OwnedLock(), OwnedCondition()):
        assert not lock.is_owned()
        with lock, lock:
            assert lock.is_owned()
        assert not lock.is_owned()
    assert NO_LOCK.is_owned()


def test_a_condition_that_waits_gives_its_lock_up() -> None:
    condition = OwnedCondition()
    with condition:
        assert not condition.wait(0.001)
        assert condition.is_owned()


def test_the_inner_steps_of_a_queue_want_its_lock() -> None:
    queue = WorkQueue[int](max_entries=1)
    with pytest.raises(AssertionError):
        queue._pop()
