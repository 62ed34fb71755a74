"""Texts that leave the program: secrets in addresses are masked, control characters are made visible.

Standard library only: errors mask their own messages.
"""

import re
import sys

HIDDEN = "***"
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]+:/{1,3}"  # a path has made s3:/ of s3://
_COLON = r"(?::|%3[Aa])"
# user:password@, the password up to the last @, as it may hold slashes and more of them; host:8080/... has a port
_PASSWORD = re.compile(rf"({_SCHEME})[^\s/:@\"'<>]*{_COLON}(?!\d{{1,5}}(?:[/?#]|$))[^\s\"'<>]*@")
# but a bucket has none: digits there are a password too
_BUCKET = re.compile(
    rf"((?:s3[an]?|gcs?|gs|az|adl|abfss?|wasbs?|oss|cosn?|obs|b2|r2):/{{1,3}})[^\s/:@\"'<>]*{_COLON}[^\s\"'<>]*@",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"(https?:/{1,2})[^\s/:@\"'<>]+@", re.IGNORECASE)  # a name alone is nobody's at a web server
_QUERY = re.compile(rf"({_SCHEME}[^\s\"'<>?]*\?)([^\s\"'<>]+?)(?=[:.,;)]*(?:[\s\"'<>]|$))")
_VALUE = re.compile(r"([^=&;]+)=([^&;]+)")
_SECRET_NAME = re.compile(r"signature|token|secret|passw|pwd|credential|^sig$|^auth|key(id)?$|accessid$", re.IGNORECASE)

# C0 but tab and newline, delete, C1; and half surrogates, which stand for bytes of file names that are no UTF-8
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def masked(text: str) -> str:
    """The text without `user:password@`, and without the signatures, keys and tokens of queries.

    >>> masked("s3://key:secret@bucket/data and https://host/x?X-Amz-Signature=abc&page=2")
    's3://***@bucket/data and https://host/x?X-Amz-Signature=***&page=2'
    """
    if ":/" not in text:
        return text
    for pattern in (_PASSWORD, _BUCKET, _TOKEN):
        text = pattern.sub(rf"\1{HIDDEN}@", text)
    return _QUERY.sub(lambda found: found[1] + _VALUE.sub(_masked_value, found[2]), text)


def has_secret(text: str) -> bool:
    """Whether a text holds an address with something that `masked` hides."""
    return masked(text) != text


def printable(text: str) -> str:
    """The text with its control characters but tab and newline as escapes: a terminal obeys none of it.

    >>> printable("\\x1b[31mred")
    '\\\\x1b[31mred'
    """
    return _CONTROL.sub(_escape, text)


def shown(text: str) -> str:
    """The text as people are shown it: `masked` and `printable`."""
    return printable(masked(text))


def _masked_value(found: re.Match[str]) -> str:
    return f"{found[1]}={HIDDEN}" if _SECRET_NAME.search(found[1]) else found[0]


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte, by Python's surrogateescape
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def on_stderr(line: str) -> None:
    """Where lines go that nobody else takes."""
    print(shown(line), file=sys.stderr)
