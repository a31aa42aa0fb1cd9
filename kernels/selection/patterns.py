"""Patterns that name layers: one or more whole dotted parts of a tensor's name, anywhere in it.

`img_in` and `blocks.0.attn` are patterns. `*` matches any characters within one part. A negative number counts a list
of blocks from its end: `blocks.-1` is the last block.

A pattern is never compiled to a regular expression, which can take exponential time. Matching takes time bounded by the
length of the pattern times the length of the name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice, repeat
from operator import contains

from ..errors import PatternError

MOST_COUNTED = 2
"""Negative numbers in one pattern. Blocks are nested once or twice."""

LONGEST_PATTERNS = 1 << 16
"""Characters of all patterns of one request together."""

LONGEST_COMPARED = 64
"""Characters. Similar names are suggested only for patterns up to this length: comparing takes quadratic time."""
MOST_COMPARED = 5000
"""Names that a pattern is compared with for a suggestion."""
LONGEST_SHOWN = 100
"""Characters of a pattern in an error message."""

CACHED_NAMES = 1 << 15
CACHED_PARTS = 1 << 16
LONGEST_CACHED = 256
"""Characters of a cached name or part."""


@dataclass(frozen=True)
class Pattern:
    """One parsed pattern."""

    text: str
    """As the user wrote it."""
    parts: tuple[str, ...]
    """Its dotted parts; `*` is the only wildcard."""

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Raises PatternError for an empty pattern and for one with an empty part."""
        parts = tuple(text.strip().strip(".").split("."))
        if not all(parts):
            raise PatternError(
                f"{_shown(text)!r} is not a pattern: give whole dotted parts of a layer's name, e.g. blocks.0.attn"
            )
        return cls(text, parts)

    def resolve(self, names: Iterable[str]) -> Pattern:
        """The pattern with its negative numbers replaced by numbers of blocks, counted in `names`.

        Raises PatternError for more than MOST_COUNTED negative numbers: each one goes through all names.
        """
        if sum(part[0] == "-" and _is_number(part[1:]) for part in self.parts) > MOST_COUNTED:
            raise PatternError(f"pattern '{self.text[:80]}' has more than {MOST_COUNTED} negative numbers; give fewer")
        parts: tuple[str, ...] = ()
        for part in self.parts:
            if part[0] == "-" and _is_number(part[1:]):
                part = str(_count_children(parts, names) + int(part))
            parts += (part,)
        return Pattern(self.text, parts)

    def matches(self, name: str) -> bool:
        """Whether as many consecutive parts of a dotted name match the pattern's parts, one by one."""
        return bool(self._alone.matching(name))

    @cached_property
    def _alone(self) -> PatternSet:
        return PatternSet([self])


class PatternSet:
    """Patterns matched together, in one pass over the parts of a name.

    The parts of all patterns form one row of bits. A bit is set while its pattern, up to and including this part,
    matches the parts of the name read last: the Shift-And algorithm (Baeza-Yates and Gonnet, A New Approach to Text
    Searching, 1992) over parts in place of characters.
    """

    def __init__(self, patterns: Iterable[Pattern]):
        self.patterns = tuple(patterns)
        self._shortest = min((len(pattern.parts) for pattern in self.patterns), default=0)
        self._starts = self._ends = count = 0
        self._last: dict[int, Pattern] = {}
        """Number of parts up to the end of a pattern -> the pattern."""
        literals: dict[str, int] = {}
        globs: dict[str, int] = {}
        for pattern in self.patterns:
            self._starts |= 1 << count
            for part in pattern.parts:
                table = globs if "*" in part else literals
                table[part] = table.get(part, 0) | 1 << count
                count += 1
            self._ends |= 1 << count - 1
            self._last[count] = pattern
        self._bits = _MatchingBits(literals, {_Glob(part): bits for part, bits in globs.items()})

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def matching(self, name: str) -> tuple[Pattern, ...]:
        """The patterns that match a name, in their order."""
        parts = split_name(name)
        if len(parts) < self._shortest:
            return ()
        state = found = 0
        starts = self._starts
        for bits in map(self._bits.__getitem__, parts):
            state = (state << 1 | starts) & bits
            found |= state
        found &= self._ends
        matching = []
        while found:
            bit = found & -found
            matching.append(self._last[bit.bit_length()])
            found ^= bit
        return tuple(matching)

    def last_parts(self, name: str) -> Iterator[str]:
        """For each match in a name: the last part that the pattern matches."""
        state = 0
        for part in split_name(name):
            state = (state << 1 | self._starts) & self._bits[part]
            if state & self._ends:
                yield part


class _MatchingBits(dict[str, int]):
    """Part of a name -> the bits of the pattern parts that match it. A cache: computed on the first request."""

    def __init__(self, literals: dict[str, int], globs: dict[_Glob, int]):
        super().__init__()
        self._literals = literals
        self._always = 0
        """The bits of the parts that match everything: stars alone."""
        groups: dict[str, list[tuple[_Glob, int]]] = {"": []}
        for glob, bits in globs.items():
            if glob.shortest:
                groups.setdefault(glob.start[:1], []).append((glob, bits))
            else:
                self._always |= bits
        self._floating = groups.pop("")
        """The globs that begin with a star."""
        self._globs = {first: group + self._floating for first, group in groups.items()}
        """First character of a part -> the globs that can match it; for other characters, the floating ones."""

    def __missing__(self, part: str) -> int:
        bits = self._literals.get(part, 0) | self._always
        for glob, its_bits in self._globs.get(part[:1], self._floating):
            if glob.matches(part):
                bits |= its_bits
        if len(part) <= LONGEST_CACHED:
            if len(self) >= CACHED_PARTS:
                self.clear()
            self[part] = bits
        return bits


class _Glob:
    """A pattern's part with `*`: a literal start and end, and literals between them in order.

    Taking the leftmost place for each literal is enough: it leaves the most room for those that follow.
    """

    def __init__(self, part: str):
        self.start, *between, self.end = part.split("*")
        self.between = [(literal, len(literal)) for literal in between if literal]
        self.repeated = self.between[0][0] if len({*self.between}) == 1 else None
        """The literal between the stars, where all of them are the same: counting it is enough."""
        self.characters = "".join(between) if all(length == 1 for _, length in self.between) else None
        self.shortest = len(part) - part.count("*")

    def matches(self, part: str) -> bool:
        if len(part) < self.shortest or not (part.startswith(self.start) and part.endswith(self.end)):
            return False
        at, stop = len(self.start), len(part) - len(self.end)
        if self.repeated:
            return part.count(self.repeated, at, stop) >= len(self.between)
        if self.characters is not None:  # `in` consumes an iterator up to the character: faster than many finds
            rest = iter(part[at:stop])
            return all(map(contains, repeat(rest), self.characters))  # type: ignore[arg-type]
        index = part[:stop].index
        try:
            for literal, length in self.between:
                at = index(literal, at) + length
        except ValueError:
            return False
        return True


def split_name(name: str) -> Sequence[str]:
    """The dotted parts of a name."""
    return _split_cached(name) if len(name) <= LONGEST_CACHED else name.split(".")


@lru_cache(CACHED_NAMES)
def _split_cached(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def check_length(patterns: Iterable[str]) -> None:
    """Raises PatternError for more than LONGEST_PATTERNS characters in all patterns of a request together."""
    length = sum(map(len, patterns))
    if length > LONGEST_PATTERNS:
        raise PatternError(
            f"the patterns have {length:,} characters together; at most {LONGEST_PATTERNS:,} are allowed: "
            "use * for many names at once"
        )


def no_match(pattern: str, names: Iterable[str]) -> str:
    """The message for a pattern that matches nothing, with similar names."""
    near = _similar(pattern, names) if len(pattern) <= LONGEST_COMPARED else []
    hint = f"did you mean {', '.join(near)}?" if near else "a pattern is whole dotted parts of a name"
    return f"pattern '{_shown(pattern)}' matches no tensor; {hint}"


def _shown(pattern: str) -> str:
    return pattern if len(pattern) <= LONGEST_SHOWN else f"{pattern[:LONGEST_SHOWN]}…"


def _similar(pattern: str, names: Iterable[str]) -> list[str]:
    length = len(pattern.strip(".").split("."))
    candidates: dict[str, None] = {}
    for name in names:
        parts = split_name(name)
        candidates.update(dict.fromkeys(".".join(parts[i : i + length]) for i in range(len(parts) - length + 1)))
    return difflib.get_close_matches(pattern, islice(candidates, MOST_COMPARED), n=5, cutoff=0.5)


def _count_children(parent: tuple[str, ...], names: Iterable[str]) -> int:
    """One more than the largest number that follows the parts `parent` in a name; 0 without one."""
    if parent:
        search = PatternSet([Pattern("", (*parent, "*"))])
        children = {part for name in names for part in search.last_parts(name)}
    else:
        children = set().union(*map(split_name, names))
    return max(map(int, filter(_is_number, children)), default=-1) + 1


def _is_number(text: str) -> bool:
    """Whether it can be the number of a block: nine digits at most, because int() raises for thousands of digits."""
    return text.isdecimal() and len(text) < 10
