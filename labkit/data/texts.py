"""Damage inside a text: invisible characters, wrong decoding, gaps to fill in, template tokens."""

import re
from collections.abc import Iterator

from labkit.data.formats import Fault
from labkit.data.problems import quote

# Invisible characters: C0 and C1 controls without tab and line ends, zero-width space, marks that
# turn the writing direction, byte order marks inside a text, and halves of surrogate pairs.
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_PLACEHOLDER = re.compile(
    r"\{\{[^{}\n]{1,40}\}\}"
    r"|(?i:<(?:(?:your|insert|enter)[ _-])?(?:first|last|full|user|company|product)?[ _-]?"
    r"(?:name|company|product|date|email|address|phone|city|number|topic|customer|placeholder)>)"
    r"|(?i:\[(?:your|insert|enter) [^\]\n]{1,40}\])"
    r"|\[(?:NAME|COMPANY|DATE|EMAIL|ADDRESS|PHONE|CITY)\]"
    r"|\b(?:TODO|TBD|FIXME)\b"
    r"|(?i:lorem ipsum)"
)
_SPECIAL_TOKEN = re.compile(r"<\|\w{1,40}\|>|<(?:start|end)_of_turn>|\[/?INST\]")
# Most rows hold none of this, so one look spares them the five closer ones.
_SUSPECT = re.compile(rf"[^\x20-\x7e\n\t]|^\s|\s$|\{{\{{|[<\[]|TODO|TBD|FIXME|{'(?i:lorem ipsum)'}")
# What UTF-8's continuation bytes 0x80-0xBF turn into in Latin-1 or in Windows-1252.
_CONTINUATION = "\x80-\xbf" + bytes(range(0x80, 0xA0)).decode("cp1252", "ignore")
# Of two-byte characters only those that accented Latin and Cyrillic letters turn into: others (a
# capital letter before a closing guillemet, say) occur in healthy text.
_MISREAD = re.compile(
    f"[ÂÃÐÑ][{_CONTINUATION}]|[\xe0-\xef][{_CONTINUATION}]{{2}}|[\xf0-\xf4][{_CONTINUATION}]{{3}}"
)


def text_faults(where: str, text: str) -> Iterator[Fault]:
    """Damage inside one text of a row; `where` names the field."""
    if not _SUSPECT.search(text):
        return
    if match := _CONTROL.search(text):
        message = f"{where} holds U+{ord(match.group()):04X} at {match.start()}; remove it"
        yield Fault("control-chars", message)
    if damaged := _mojibake(text):
        message = f"{where} holds {quote(damaged)}; decode the source with its own encoding"
        yield Fault("mojibake", message)
    if gap := _placeholder(text):
        yield Fault("placeholder", f"{where} holds {quote(gap)}; fill it in")
    if match := _SPECIAL_TOKEN.search(text):
        message = f"{where} holds {quote(match.group())}; leave such tokens to the chat template"
        yield Fault("special-token", message)
    if text.strip() and tidy(where, text) != text:  # a blank text has a code of its own
        message = f"{where} is {quote(text)}; remove white space at its ends and Windows line ends"
        yield Fault("whitespace", message)


def tidy(where: str, text: str) -> str:
    """The text without white space at its ends and with plain line ends.

    One space is left at the seam of a plain prompt and completion, where TRL joins the two.
    """
    plain = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if where == "prompt" and text.endswith(" "):
        return plain + " "
    if where in ("completion", "chosen", "rejected") and text.startswith(" "):
        return " " + plain
    return plain


def _mojibake(text: str) -> str:
    """The first character of UTF-8 that was decoded as Windows-1252 or Latin-1, or ""."""
    if "\ufffd" in text:
        return "\ufffd"
    for match in _MISREAD.finditer(text):
        single_bytes = b"".join(map(_one_byte, match.group()))
        if single_bytes.decode(errors="ignore"):
            return match.group()
    return ""


def _one_byte(character: str) -> bytes:
    """Windows-1252, or Latin-1 for the five bytes that Windows-1252 leaves undefined."""
    if "\x80" <= character <= "\x9f":
        return character.encode("latin-1")
    return character.encode("cp1252")


def _placeholder(text: str) -> str:
    """The first gap to fill in, or ""; `<name>` is none where `</name>` makes it a tag."""
    for match in _PLACEHOLDER.finditer(text):
        gap = match.group()
        if not (gap.startswith("<") and f"</{gap[1:]}" in text):
            return gap
    return ""
