"""
Splitting a text before byte pairs are merged, as the pre-tokenizers of a tokenizer.json say.

Their patterns are written for the Oniguruma library, with classes such as \\p{L} that Python's `re`
does not have, and with other meanings of \\s and \\w. translate() writes such a class out as ranges
of characters. What has no translation is refused by name.
"""

import re
import sys
from functools import lru_cache

import tiktoken

from config import UserError

# The pattern of a ByteLevel pre-tokenizer that names none: GPT-2's.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What Oniguruma's escapes mean: categories of Unicode, and more characters; those of \w only
# outside of a class.
OF_ESCAPES = {
    "d": (("Nd",), ""),
    "s": (("Z",), "\t\n\v\f\r\x85"),
    "w": (("L", "M", "Nd", "Nl", "Pc"), "\xb2\xb3\xb9\xbc\xbd\xbe"),
}
# Letters in circles and squares are signs by category, and letters for \w.
RINGED = [(0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189)]
CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}
ANYTHING = sys.maxunicode


@lru_cache
def ranges_of(name):
    """[(first, last code point), ...] of the characters \\p{name}, of a category or a script of
    Unicode. tiktoken is asked, whose tables are newer than Python's and the same on every machine.
    Raises ValueError for a name that does not exist."""
    bytes_only = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding(
        "characters", pat_str=rf"\p{{{name}}}+", mergeable_ranks=bytes_only, special_tokens={}
    )
    found = bytes(encoding.encode_ordinary(all_characters())).decode("utf-8")
    ranges = []
    for code in map(ord, found):  # in order
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return [tuple(both) for both in ranges]


@lru_cache
def all_characters():
    """Every character of Unicode once, in order."""
    return "".join(map(chr, [*range(0xD800), *range(0xE000, ANYTHING + 1)]))


def complement(ranges):
    """The ranges between sorted ranges."""
    between, first = [], 0
    for low, high in ranges:
        if low > first:
            between.append((first, low - 1))
        first = max(first, high + 1)
    return between + ([(first, ANYTHING)] if first <= ANYTHING else [])


def written(ranges):
    """Ranges as the inside of a class of `re`."""
    return "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in ranges)


def of_escape(letter, in_class):
    """The ranges of \\d, \\s, \\w, or of all others for \\D, \\S, \\W. Raises KeyError."""
    categories, more = OF_ESCAPES[letter.lower()]
    ranges = [r for category in categories for r in ranges_of(category)]
    if not (in_class and letter in "wW"):
        ranges += [(ord(char), ord(char)) for char in more]
    ranges = sorted(ranges + RINGED if letter in "wW" else ranges)
    return complement(ranges) if letter.isupper() else ranges


ESCAPE = re.compile(
    r"\\(?:(?P<p>[pP])\{(?P<not>\^?)(?P<name>\w+)\}|x\{(?P<braced>[0-9a-fA-F]+)\}"
    r"|x(?P<two>[0-9a-fA-F]{2})|u(?P<four>[0-9a-fA-F]{4})|(?P<letter>[a-zA-Z0-9])|(?P<sign>.))",
    re.DOTALL,
)


def translate_escape(found, pattern, in_class):
    """The inside of a class of `re` for a match of ESCAPE. Raises UserError."""
    code = found["braced"] or found["two"] or found["four"]
    if code:
        return f"\\U{int(code, 16):08x}"
    if found["sign"]:
        return re.escape(found["sign"])
    if found["letter"] in CONTROLS:
        return re.escape(CONTROLS[found["letter"]])
    try:
        if found["p"]:
            ranges = ranges_of(found["name"])
            negated = (found["p"] == "P") != bool(found["not"])
            return written(complement(ranges) if negated else ranges)
        return written(of_escape(found["letter"], in_class))
    except (KeyError, ValueError):
        raise UserError(
            f"tokenizer.json: {found[0]} in the pattern {pattern[:40]!r} is not supported"
        ) from None


@lru_cache
def translate(pattern):
    """An Oniguruma pattern as a compiled pattern of `re`. Raises UserError."""
    parts, i, in_class = [], 0, False
    while i < len(pattern):
        char = pattern[i]
        if char == "\\":
            found = ESCAPE.match(pattern, i)
            if not found:
                raise UserError(f"tokenizer.json: the pattern {pattern[:40]!r} ends in a backslash")
            inside = translate_escape(found, pattern, in_class)
            is_set = found["p"] or (found["letter"] or "n") not in CONTROLS
            parts.append(f"[{inside}]" if is_set and not in_class else inside)
            i = found.end()
            continue
        if in_class and (char == "[" or pattern.startswith("&&", i)):
            raise UserError(
                f"tokenizer.json: a class inside a class in the pattern {pattern[:40]!r} is not "
                "supported"
            )
        if char == "[" and not in_class:
            in_class = True
            for start in ("[^]", "[]", "[^", "["):  # a ] that comes first is a character
                if pattern.startswith(start, i):
                    break
            parts.append(start.replace("]", "\\]"))
            i += len(start)
            continue
        if char == "]" and in_class:
            in_class = False
            parts.append(char)
        elif in_class:
            parts.append(char if char in "-^" else re.escape(char))
        elif pattern.startswith(("}+", "(?<name", "(?P"), i):
            raise UserError(f"tokenizer.json: the pattern {pattern[:40]!r} is not supported")
        else:
            parts.append(char)
        i += 1
    try:
        return re.compile("".join(parts), re.MULTILINE)  # $ is the end of a line there
    except (re.error, OverflowError) as error:
        raise UserError(f"tokenizer.json: the pattern {pattern[:40]!r}: {error}") from None


def split(text, pattern, behavior, invert=False):
    """The pieces of a text, cut at the matches of a compiled pattern. behavior: what becomes of the
    matches, as in the `tokenizers` package; invert: the matches are what lies between."""
    pieces, end = [], 0  # (piece, whether it is a match)
    for found in pattern.finditer(text):
        if found.end() > found.start():
            pieces += [(text[end : found.start()], invert), (found[0], not invert)]
            end = found.end()
    pieces = [piece for piece in [*pieces, (text[end:], invert)] if piece[0]]
    if behavior == "Isolated":
        return [piece for piece, _ in pieces]
    if behavior == "Removed":
        return [piece for piece, is_match in pieces if not is_match]
    joined, before = [], None  # before: whether the piece before was a match
    for piece, is_match in pieces:
        joins = {
            "Contiguous": is_match == before,
            "MergedWithPrevious": is_match and before is False,
            "MergedWithNext": not is_match and before is True,
        }[behavior]
        if joins:
            joined[-1] += piece
        else:
            joined.append(piece)
        before = is_match
    return joined


def refuse_step(step):
    raise UserError(f"tokenizer.json: the pre-tokenizer {str(step)[:60]} is not supported")


def read_step(step):
    """A step of a pre-tokenizer, as a function from a text to its pieces. Raises UserError."""
    kind = step["type"]
    if kind == "Split":
        pattern = step["pattern"]
        literal = pattern.get("String")
        compiled = re.compile(re.escape(literal)) if literal else translate(pattern["Regex"])
        behavior, invert = step["behavior"], bool(step["invert"])
        if behavior not in (
            "Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"
        ):  # fmt: skip
            refuse_step(step)
        return lambda text: split(text, compiled, behavior, invert)
    if kind == "Digits":
        digit = translate(r"\p{N}")
        behavior = "Isolated" if step["individual_digits"] else "Contiguous"
        return lambda text: split(text, digit, behavior)
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        if not step.get("use_regex", True):
            return lambda text: [text]
        pattern = translate(GPT2_PATTERN)
        return lambda text: split(text, pattern, "Isolated")
    return refuse_step(step)
